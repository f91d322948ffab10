"""Sweeps: what their names stand for, how jobs are called, grouped over seeds, and shown."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from hydra.core.override_parser.overrides_parser import OverridesParser

from rlhf_pipeline import arguments, cli
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report import Words, sweep_page
from rlhf_pipeline.report.__main__ import rebuild
from rlhf_pipeline.sweeps import jobs
from rlhf_pipeline.sweeps.results import report_sweep, summarise

PPO = ["stage=ppo", "name=x"]


def test_a_sweeps_name_is_a_multirun_of_its_settings() -> None:
    assert arguments.complete([*PPO, "sweep=kl"]) == [*PPO, "++trainer.kl_coef=0.01,0.02,0.05,0.1,0.2", "-m"]
    both = arguments.complete([*PPO, "sweep=kl,seeds"])
    assert both == [*PPO, "++trainer.kl_coef=0.01,0.02,0.05,0.1,0.2", "seed=1,2,3,4,5", "-m"]
    assert arguments.complete(["-m", *PPO, "sweep=[kl, seeds]"]) == both
    assert arguments.complete(["stage=ppo", "-m", "seed=1,2"]) == ["stage=ppo", "seed=1,2", "-m"]
    assert arguments.complete(["--multirun", "stage=ppo", "policy=gpt2"]) == [
        "stage=ppo",
        "policy=gpt2",
        "~experiment",
        "-m",
    ]


def test_what_is_said_goes_over_a_sweeps_own_settings() -> None:
    assert arguments.complete([*PPO, "sweep=kl", "trainer.kl_coef=0.03,0.3"])[2:] == [
        "++trainer.kl_coef=0.03,0.3",
        "-m",
    ]
    assert arguments.complete([*PPO, "sweep=seeds", "seed=1,2"])[2:] == ["seed=1,2", "-m"]
    found = arguments.complete([*PPO, "sweep=optuna", "++trainer.kl_coef=0.05"])
    assert "hydra/sweeper=optuna" in found
    assert [a for a in found if "kl_coef" in a] == ["++trainer.kl_coef=0.05"]


def test_a_sweep_keeps_to_what_a_stage_has() -> None:
    found = arguments.complete(["stage=sft", "sweep=optuna"])
    assert any(a.startswith("++trainer.learning_rate=tag(log") for a in found)
    assert not any("kl_coef" in a for a in found)
    with pytest.raises(UserError, match=r"sweep=kl varies trainer\.kl_coef, which stage=sft has not"):
        arguments.complete(["stage=sft", "sweep=kl"])
    with pytest.raises(UserError, match=r"no sweep is called 'k'.*'kl'.*Known: kl, optuna, seeds"):
        arguments.complete([*PPO, "sweep=k"])


def test_of_an_evaluation_a_sweep_is_one_that_has_been() -> None:
    for said in (["stage=evaluate", "sweep=kl"], ["sweep=kl"], ["--config-name", "config", "stage=ppo", "sweep=kl"]):
        assert "sweep=kl" in arguments.complete(said)


def test_no_sweep_is_none_and_of_one_that_is_shown_a_job_is() -> None:
    assert arguments.complete([*PPO, "sweep=null"]) == [*PPO, "sweep=null"]
    show = ["--cfg", "job"]
    for said in (["sweep=kl"], ["++sweep=kl"], ["-m", "seed=1,2"], ["-m", "trainer.kl_coef=interval(0.1,0.2)"]):
        assert arguments.complete([*PPO, *said, *show]) == [*PPO, *show]


def test_every_sweep_that_is_shipped_can_be_read() -> None:
    for path in (arguments.CONF / "sweeps").glob("*.yaml"):
        swept = [a for a in arguments.complete([*PPO, f"sweep={path.stem}"]) if a != "-m"]
        assert any(o.is_sweep_override() for o in OverridesParser.create().parse_overrides(swept)), path


REFUSED = {
    "-m stage=sft name=a,b": "name= is the whole sweep's, and takes one value",
    "-m stage=sft,ppo name=a": "stage= is the whole sweep's",
    "-m stage=sft seed=1,2 trainer.learning_rate=fast": "trainer.learning_rate is 'fast'",
    "-m stage=sft seed=1,2 trainer.hub_token=hf_secret": "trainer.hub_token is not yours to set",
    "-m stage=chat seed=1,2": "drop -m",
    "-m stage=sft seed=1,2 hydra/sweeper=basic hydra.sweep.dir=.": "-m goes with hydra/sweeper=grid or optuna",
    "-m stage=sft trainer.learning_rate=interval(0.1,0.2)": "trainer.learning_rate=interval(...) has no end of values",
    "-m stage=sft seed=1,2 name=/abs/x": "name='/abs/x' is no run name: it is a folder below runs/.",
    "-m stage=sft seed=1,2 hydra.sweeper.max_batch_size=-1": "max_batch_size is -1; it takes a whole number from 1.",
    "-m stage=evaluate seed=1,2 compare=[a,b]": "compare= goes with one run",
    "-m stage=collect seed=1,2 labels=pull": "labels= goes with one run",
    "-m stage=evaluate seed=1,2 sweep=coefs": "sweep= goes with one run",
    "-m stage=sft seed=1,2 sweep.kl_budget=3": "sweep.kl_budget= goes with stage=ppo",
    "-m stage=sft seed=1,2 hydra/launcher=submitit_no": "pip install 'rlhf_pipeline[slurm]'",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_a_mistake_in_a_sweep_is_told_before_any_job_begins(
    asked: str, command_line: CommandLine, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(*asked.split()) == 2
    assert REFUSED[asked] in capsys.readouterr().err
    assert not (workplace / "runs").exists()


def test_a_cluster_that_is_not_there_is_said_to_be_missing(
    command_line: CommandLine, workplace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")
    monkeypatch.setenv("PATH", "")
    assert command_line("-m", "stage=sft", "seed=1,2", "hydra/launcher=submitit_slurm") == 2
    assert "submitit could not submit the jobs: Could not detect" in capsys.readouterr().err


def test_a_job_is_called_by_what_sets_it_apart() -> None:
    assert jobs.job_name(["trainer.kl_coef=0.1", "seed=1"]) == "trainer.kl_coef=0.1,seed=1"
    assert jobs.job_name([]) == "job0"
    # What a folder cannot be called is told apart by a hash; what is too long, in bytes, is one.
    several = [jobs.job_name([f"data.path={path}"]) for path in ("a/b", "a_b", "a b")]
    assert several[1] == "data.path=a_b"
    assert len(set(several)) == 3
    assert re.fullmatch(r"data\.path=a_b-[0-9a-f]{8}", several[0])
    long = [jobs.job_name(["policy.path=" + "文" * 70, f"seed={seed}"]) for seed in (1, 2)]
    assert re.fullmatch(r"job-[0-9a-f]{8}", long[0])
    assert long[0] != long[1]


def add(sweep: Path, settings: dict[str, str], objective: float | None, status: str = "done", **more: Any) -> Path:
    """A job of a sweep, as it leaves its files."""
    folder = sweep / ",".join(f"{key}={value}" for key, value in settings.items()).replace("/", "_")
    told = {key: value for key, value in settings.items() if key != "seed"}
    known = {"stage": "ppo", "settings": told, "seed": int(settings.get("seed", 0)), "status": status,
             "exit": int(status == "failed"), "error": None}  # fmt: skip
    jobs.note(folder, **{**known, **more})
    if objective is not None:
        (folder / "ppo").mkdir()
        record = {
            "name": f"{sweep.name}/{folder.name}",
            "status": "done",
            "objective": objective,
            "seconds": 2.0,
            "results": {"kl": 2 * objective, "validation_reward": objective + 1, "validation_kl": 20.0},
        }
        (folder / "ppo" / "run.json").write_text(json.dumps(record))
        (folder / "ppo" / "report.html").write_text("")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three coefficients: two seeds done of one, one of two of another, none of the last."""
    folder = tmp_path / "runs" / "coefs"
    add(folder, {"trainer.kl_coef": "0.1", "seed": "1"}, 0.5)
    add(folder, {"trainer.kl_coef": "0.1", "seed": "2"}, 0.7)
    add(folder, {"trainer.kl_coef": "0.2", "seed": "1"}, 0.9)
    add(folder, {"trainer.kl_coef": "0.2", "seed": "2"}, None, "failed", error="out of <memory>")
    add(folder, {"trainer.kl_coef": "0.3", "seed": "1"}, None, "waiting")
    add(folder, {"seed": "1"}, None, "done", stage="sft")  # of another stage, which does not compare
    return folder


def test_jobs_are_grouped_over_seeds_and_the_best_comes_first(sweep: Path) -> None:
    found = summarise(sweep, "ppo")
    rows = [(row["settings"], row["objective"], row["stderr"], row["seeds"]) for row in found["rows"]]
    assert rows[0] == ({"trainer.kl_coef": "0.2"}, 0.9, None, 1)  # of one seed there is no standard error
    assert rows[1][0] == {"trainer.kl_coef": "0.1"}
    # Of 0.5 and 0.7: the mean 0.6, the deviation sqrt(2 x 0.01), over sqrt(2).
    assert rows[1][1:] == (pytest.approx(0.6), pytest.approx(0.1), 2)
    assert rows[2] == ({"trainer.kl_coef": "0.3"}, None, None, 0)
    assert [(row["failed"], row["left"]) for row in found["rows"]] == [(1, 0), (0, 0), (0, 1)]
    assert found["rows"][1]["results"]["kl"] == pytest.approx(1.2)
    assert found["objective"] == "reward - selection_kl_coef x KL, on validation prompts"


def test_the_table_is_sorted_and_says_what_failed(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_sweep(sweep, "ppo", [folder.name for folder in sweep.iterdir() if folder.is_dir()])
    said = capsys.readouterr().out
    assert said.index("kl_coef=0.2") < said.index("kl_coef=0.1") < said.index("kl_coef=0.3")
    assert "validation prompts" in said.replace("\n", " ")
    assert "failed: trainer.kl_coef=0.2,seed=2: out of <memory>" in said
    assert "1 of 5 jobs failed" in said
    assert json.loads((sweep / "sweep.json").read_text()) == summarise(sweep, "ppo")
    assert not list(sweep.glob(".sweep.json*"))


def rows_of(folder: Path) -> list[tuple[dict[str, str], list[float]]]:
    """The rows of a sweep's table: what sets each apart, and its seeds' objectives."""
    return [(row["settings"], sorted(row["values"])) for row in summarise(folder, "ppo")["rows"]]


def test_jobs_of_other_commands_are_no_seeds_of_this_one(tmp_path: Path) -> None:
    """Of what the whole commands say: also of settings that no command of theirs swept."""
    rate, folder = "trainer.learning_rate", tmp_path / "b"
    add(folder, {rate: "1e-3"}, 0.1)
    add(folder, {rate: "1e-3", "trainer.num_train_epochs": "9", "seed": "1"}, 0.8)
    add(folder, {rate: "1e-3", "trainer.num_train_epochs": "9", "seed": "2"}, 0.6)
    assert rows_of(folder) == [
        ({"trainer.num_train_epochs": "9"}, [0.6, 0.8]),
        ({"trainer.num_train_epochs": "default"}, [0.1]),
    ]


def test_a_later_commands_seeds_and_values_join_in_and_a_seed_counts_once(tmp_path: Path) -> None:
    add(tmp_path, {"trainer.kl_coef": "0.1"}, 0.5)  # of the seed that is the default
    for seed in ("0", "1", "2"):
        add(tmp_path, {"trainer.kl_coef": "0.1", "seed": seed}, 0.5 + int(seed))
    add(tmp_path, {"trainer.kl_coef": "0.2", "seed": "1"}, None, "failed")
    assert rows_of(tmp_path) == [
        ({"trainer.kl_coef": "0.1"}, [0.5, 1.5, 2.5]),
        ({"trainer.kl_coef": "0.2"}, []),
    ]


def test_what_a_table_says_of_failures_is_of_its_own_command(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_sweep(sweep, "ppo", ["trainer.kl_coef=0.1,seed=1", "trainer.kl_coef=0.1,seed=2"])
    said = capsys.readouterr().out
    assert "failed:" not in said
    assert "jobs failed" not in said


def test_a_job_that_failed_is_not_done_whatever_lies_in_its_folder(tmp_path: Path) -> None:
    add(tmp_path, {"seed": "1"}, 0.9, "failed", error="runs/x holds other work")
    (job,) = summarise(tmp_path, "ppo")["jobs"]
    assert (job["status"], job["objective"], job["error"]) == ("failed", None, "runs/x holds other work")


def test_a_damaged_note_hides_no_other_job(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (sweep / "trainer.kl_coef=0.1,seed=1" / "job.json").write_text("")
    (sweep / "trainer.kl_coef=0.1,seed=2" / "job.json").write_text("[1]")
    report_sweep(sweep, "ppo", ["trainer.kl_coef=0.1,seed=1"])
    assert len(summarise(sweep, "ppo")["jobs"]) == 3
    for path in sweep.glob("*/job.json"):
        path.write_text("{")
    assert rebuild(sweep)[-1].is_file()


def test_a_reward_of_what_was_trained_on_is_called_so(tmp_path: Path) -> None:
    folder = add(tmp_path, {"seed": "1"}, 0.9)
    path = folder / "ppo" / "run.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "results": {"scores": 1.0, "kl": 2.0}}))
    assert summarise(tmp_path, "ppo")["objective"] == (
        "reward - selection_kl_coef x KL while training (no validation prompts)"
    )


# The reward of a policy that hacks it, of a moderate one and of one that stayed where it began, with their KL.
HACKED, MODERATE, TIMID = (0.960, 10.0), (0.934, 2.5), (0.821, 0.8)


@pytest.fixture
def hacked(tmp_path: Path) -> Path:
    """A sweep in which the more the reward is hacked, the higher it is."""
    folder = tmp_path / "runs" / "hacked"
    for coef, (reward, kl) in {"0.01": HACKED, "0.05": MODERATE, "0.2": TIMID}.items():
        job = add(folder, {"trainer.kl_coef": coef}, reward - 0.05 * kl)
        path = job / "ppo" / "run.json"
        results = {"scores": reward, "kl": kl, "validation_reward": reward, "validation_kl": kl}
        path.write_text(json.dumps({**json.loads(path.read_text()), "results": results}))
    return folder


def order_of(found: dict[str, Any]) -> list[str]:
    return [row["settings"]["trainer.kl_coef"] for row in found["rows"]]


def test_a_hacked_policy_is_not_chosen(hacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert order_of(summarise(hacked, "ppo")) == ["0.05", "0.2", "0.01"]
    report_sweep(hacked, "ppo", [])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "kl_coef=" in line]
    assert [(row[1], row[3], row[5], row[7]) for row in rows] == [
        ("kl_coef=0.05", "0.809", "0.934", "2.50"),
        ("kl_coef=0.2", "0.781", "0.821", "0.80"),
        ("kl_coef=0.01", "0.460", "0.960", "10.00"),
    ]
    page = (hacked / "report.html").read_text()
    assert page.index("kl_coef=0.05") < page.index("kl_coef=0.2") < page.index("kl_coef=0.01")
    assert "validation reward" in page
    assert "validation KL" in page


@pytest.mark.parametrize(
    ("budget", "order", "over"),
    [(20, ["0.01", "0.05", "0.2"], 0), (3, ["0.05", "0.2", "0.01"], 1), (1, ["0.2", "0.05", "0.01"], 2),
     (0.5, ["0.2", "0.05", "0.01"], 3)],
)  # fmt: skip
def test_at_a_kl_budget_the_best_reward_within_it_is_chosen(
    budget: float, order: list[str], over: int, hacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_sweep(hacked, "ppo", [], budget)
    found = json.loads((hacked / "sweep.json").read_text())
    assert order_of(found) == order
    said = capsys.readouterr().out
    assert said.count("(over)") == over
    nearest = f"no settings keep within sweep.kl_budget={budget:g}; nearest: kl_coef=0.2"
    assert (nearest in said) == (over == 3)
    assert found["rows"][0]["objective"] == {"0.01": 0.960, "0.05": 0.934, "0.2": 0.821}[order[0]]
    (page,) = (path for path in rebuild(hacked) if path.parent == hacked)  # at the same budget
    assert ("No settings keep within the KL budget" in page.read_text()) == (over == 3)
    assert f"(KL ≤ {budget:g})" in page.read_text()


def test_a_kl_budget_is_said_beside_a_sweep() -> None:
    asked = arguments.complete([*PPO, "sweep=kl", "sweep.kl_budget=3"])
    assert asked == [*PPO, "hydra.sweeper.kl_budget=3.0", "++trainer.kl_coef=0.01,0.02,0.05,0.1,0.2", "-m"]
    assert "hydra.sweeper.kl_budget=0.5" in arguments.complete([*PPO, "-m", "seed=1,2", "++sweep.kl_budget=0.5"])
    with pytest.raises(UserError, match=r"sweep\.kl_budget=3 goes with a sweep of stage=ppo"):
        arguments.complete([*PPO, "sweep.kl_budget=3"])
    with pytest.raises(UserError, match=r"sweep\.kl_budget=3 goes with a sweep of stage=ppo"):
        arguments.complete(["stage=evaluate", "sweep=coefs", "sweep.kl_budget=3"])
    for budget in ("much", "0", "-1", "nan", "inf", "", "1,2"):
        with pytest.raises(UserError, match=r"it takes a number above 0, a KL in nats"):
            arguments.complete([*PPO, "sweep=kl", f"sweep.kl_budget={budget}"])


def test_the_page_links_jobs_and_takes_what_files_hold_as_text(sweep: Path) -> None:
    add(sweep, {"data.path": "<script>alert(1)</script>", "seed": "1"}, 0.1)
    (page,) = (path for path in rebuild(sweep) if path.parent == sweep)  # as make report draws it
    source = page.read_text()
    assert "<script>alert" not in source
    assert "&lt;script&gt;alert" in source
    assert "out of &lt;memory&gt;" in source
    assert 'href="trainer.kl_coef%3D0.1%2Cseed%3D1/ppo/report.html"' in source
    assert "1 of 6 jobs failed" in source
    assert source.index("trainer.kl_coef=0.2, ") < source.index("trainer.kl_coef=0.1, ")
    assert "个作业失败" in rebuild(sweep, "zh")[-1].read_text()


def test_one_number_that_was_swept_is_the_plots_axis_and_anything_else_a_row() -> None:
    def page(*settings: dict[str, str]) -> str:
        rows = [{"settings": own, "objective": float(i), "stderr": 0.5, "values": [float(i)]}
                for i, own in enumerate(settings)]  # fmt: skip
        return sweep_page({"sweep": "x", "stage": "ppo", "rows": rows, "jobs": []}, Words())

    numbers = page({"a.lr": "0.001"}, {"a.lr": "0.01"}, {"a.lr": "0.1"})
    assert ">a.lr (logarithmic)</text>" in numbers
    # Equal steps of a logarithm; the mean's standard error is a line from below it to above.
    assert ['cx="52.0"' in numbers, 'cx="227.0"' in numbers, 'cx="402.0"' in numbers] == [True] * 3
    assert numbers.count("<polyline") == 4
    assert ">a.lr</text>" in page({"a.lr": "1"}, {"a.lr": "2"})
    assert ">lr=1, b=2</text>" in page({"a.lr": "1", "b": "2"}, {"a.lr": "2", "b": "2"})
    assert ">data=imdb</text>" in page({"data": "imdb"}, {"data": "toy"})
    assert "<svg" not in page({"a.lr": "1"})
    broken = {"rows": [{"objective": "x"}, {"objective": math.inf}, 3], "jobs": None}
    assert "<svg" not in sweep_page(broken, Words())


def test_why_a_command_was_refused_is_kept_where_it_is_a_jobs(
    command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RLHF_PIPELINE_JOB", str(workplace / "job"))
    assert command_line("stage=sfd") == 2
    assert "no stage is called 'sfd'" in jobs.read_job(workplace / "job")["error"]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, list[str]]]:
    """The name, stage and settings of each job that is launched, and not run."""
    found: list[tuple[str, str, list[str]]] = []

    def run_job(runs: Path, name: str, stage: str, command: list[str]) -> float:
        found.append((name, stage, command))
        jobs.note(runs / name, status="done")
        return 0.0

    monkeypatch.setattr(cli, "run_job", run_job)
    return found


def test_a_job_is_a_command_that_can_be_typed(
    launched: list[tuple[str, str, list[str]]], command_line: CommandLine, workplace: Path
) -> None:
    assert command_line("-m", "stage=sft", "policy=gpt2", "name=it is", "seed=1,2", "data.limit=9") == 0
    assert [(name, stage) for name, stage, _ in launched] == [("it is/seed=1", "sft"), ("it is/seed=2", "sft")]
    name, _, command = launched[0]
    assert sorted(command) == sorted(
        ["stage=sft", "policy=gpt2", "++data.limit=9", "~experiment", "seed=1", f"name='{name}'"]
    )
    known = jobs.read_job(workplace / "runs" / name)
    assert known["settings"] == {"stage": "sft", "policy": "gpt2", "data.limit": "9", "experiment": "null"}
    assert known["seed"] == 1
    # As the command line takes it.
    assert command_line(*command, "--cfg", "job") == 0
    assert set(json.loads((workplace / "runs" / "it is" / "sweep.json").read_text())["rows"][0]["settings"]) == set()


def test_a_whole_pipeline_and_a_choice_can_be_swept(
    launched: list[tuple[str, str, list[str]]], command_line: CommandLine, workplace: Path
) -> None:
    assert command_line("stage=pipeline", "sweep=seeds", "seed=1,2", "stages.ppo.trainer.kl_coef=0.1,0.2") == 0
    assert {stage for _, stage, _ in launched} == {"ppo"}  # on evaluate's prompts no choice is made
    assert len(launched) == 4
    assert launched[0][0] == "demo/seed=1,stages.ppo.trainer.kl_coef=0.1"
    launched.clear()
    assert command_line("-m", "stage=ppo", "reward=length,toy_sentiment", "name=x", "labeler=length,repetition") == 0
    assert launched[0][0] == "x/reward=length,labeler=length"
    assert len(launched) == 4


@pytest.mark.parametrize(("budget", "best"), [([], "0.05"), (["sweep.kl_budget=1"], "0.2")])
def test_optuna_searches_for_what_the_table_orders_by(
    budget: list[str], best: str, command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna", reason="the extra optuna is not installed")
    worth = {"0.01": HACKED, "0.05": MODERATE, "0.2": TIMID}

    def run_job(runs: Path, name: str, stage: str, command: list[str]) -> None:
        reward, kl = worth[next(word for word in command if word.startswith("++trainer.kl_coef=")).partition("=")[2]]
        results = {"validation_reward": reward, "validation_kl": kl}
        (runs / name / stage).mkdir(exist_ok=True)
        record = {"status": "done", "name": name, "objective": reward - 0.05 * kl, "results": results, "seconds": 1}
        (runs / name / stage / "run.json").write_text(json.dumps(record))
        jobs.note(runs / name, status="done")

    monkeypatch.setattr(cli, "run_job", run_job)
    monkeypatch.setattr("rlhf_pipeline.runs.directory.RunDir.finished", lambda *_, **__: False)
    asked = ["stage=ppo", "sweep=optuna", "name=x", "trainer.learning_rate=1e-4", "trainer.kl_coef=0.01,0.05,0.2"]
    assert command_line(*asked, *budget, "hydra.sweeper.n_trials=8") == 0
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{workplace}/runs/x/optuna.db")
    assert {trial.params["++trainer.kl_coef"] for trial in study.trials} == {*worth}
    assert study.best_params == {"++trainer.kl_coef": best}
    assert order_of(json.loads((workplace / "runs" / "x" / "sweep.json").read_text()))[0] == best


def test_a_job_that_did_not_say_how_it_ended_was_killed(
    command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cli, "run_job", lambda runs, name, *_: None)
    assert command_line("-m", "stage=sft", "seed=1") == 1
    assert "failed: job0: never began, or was killed from outside" in " ".join(capsys.readouterr().out.split())


def test_a_job_that_was_interrupted_leaves_the_sweep_unfinished(
    command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ends = iter(("done", "interrupted"))
    monkeypatch.setattr(cli, "run_job", lambda runs, name, *_: jobs.note(runs / name, status=next(ends)) and None)
    assert command_line("-m", "stage=sft", "seed=1,2") == 1
    (row,) = json.loads((workplace / "runs" / "demo" / "sweep.json").read_text())["rows"]
    assert (row["failed"], row["left"]) == (0, 1)
