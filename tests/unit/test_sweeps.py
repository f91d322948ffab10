"""Sweeps: the jobs of a command, how one ends, what all come to over seeds, and what is refused before any begins."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine, Refused

from rlhf_pipeline import cli
from rlhf_pipeline.files import read_json
from rlhf_pipeline.report.__main__ import rebuild
from rlhf_pipeline.report.sweep import sweep_page
from rlhf_pipeline.report.words import Words
from rlhf_pipeline.sweeps import jobs
from rlhf_pipeline.sweeps.results import report_sweep, summarise

Launched = list[tuple[str, str, list[str]]]


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Launched:
    """The name, stage and command of each job that is launched, and not run."""
    found: Launched = []

    def run_job(runs: Path, name: str, stage: str, command: list[str]) -> float:
        found.append((name, stage, command))
        jobs.update_job(runs / name, status="done")
        return 0.0

    monkeypatch.setattr(cli, "run_job", run_job)
    return found


@pytest.mark.parametrize(
    ("said", "expected"),
    [
        ("stage=ppo sweep=kl", [f"trainer.kl_coef={coef}" for coef in (0.01, 0.02, 0.05, 0.1, 0.2)]),
        ("stage=ppo sweep=kl,seeds trainer.kl_coef=0.03,0.3 seed=1,2",
         ["trainer.kl_coef=0.03,seed=1", "trainer.kl_coef=0.03,seed=2", "trainer.kl_coef=0.3,seed=1",
          "trainer.kl_coef=0.3,seed=2"]),
        ("-m stage=sft sweep=[seeds]", [f"seed={seed}" for seed in range(1, 6)]),
        ("-m stage=sft seed=1,1", ["seed=1"]),
        ("-m stage=sft seed=1", ["job0"]),
        ("-m stage=ppo reward=length,toy_sentiment labeler=length",
         ["reward=length", "reward=toy_sentiment"]),
        ("stage=pipeline sweep=seeds seed=1 stages.ppo.trainer.kl_coef=0.1,0.2",
         ["stages.ppo.trainer.kl_coef=0.1", "stages.ppo.trainer.kl_coef=0.2"]),
        ("-m stage=sft data=text data.path=a/b,a_b", ["data.path=a_b-8e9d84af", "data.path=a_b"]),
    ],
)  # fmt: skip
def test_a_job_is_called_by_what_sets_it_apart(
    said: str, expected: list[str], launched: Launched, command_line: CommandLine, workplace: Path
) -> None:
    assert command_line(*said.split(), "name=x") == 0
    assert [name for name, _, _ in launched] == [f"x/{name}" for name in expected]
    assert {stage for _, stage, _ in launched} == {"sft" if "sft" in said else "ppo"}  # not evaluate of a pipeline


def test_a_name_that_is_too_long_for_a_folder_is_a_hash() -> None:
    first, second = (jobs.job_name(["policy.path=" + "文" * 70, f"seed={seed}"]) for seed in (1, 2))
    assert re.fullmatch(r"job-[0-9a-f]{8}", first)
    assert first != second


def test_a_job_is_a_command_that_can_be_typed(
    launched: Launched, command_line: CommandLine, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("-m", "stage=sft", "policy=gpt2", "name=it is", "seed=1,2", "data.limit=9") == 0
    name, _, command = launched[0]
    known = jobs.read_job(workplace / "runs" / name)
    assert known["settings"] == {"stage": "sft", "policy": "gpt2", "data.limit": "9", "experiment": "null"}
    assert known["seed"] == 1
    assert read_json(workplace / "runs" / "it is" / "sweep.json")["rows"][0]["settings"] == {}
    capsys.readouterr()
    assert command_line(*command, "--cfg", "job") == 0
    shown = capsys.readouterr().out
    assert "name: it is/seed=1" in shown
    assert "limit: 9" in shown


def test_of_a_sweep_that_is_shown_a_job_is(command_line: CommandLine, capsys: pytest.CaptureFixture[str]) -> None:
    for said in ("sweep=kl", "-m seed=1,2", "-m trainer.kl_coef=interval(0.1,0.2)", "sweep=null"):
        assert command_line("stage=ppo", *said.split(), "--cfg", "job") == 0
        assert "stage: ppo" in capsys.readouterr().out


REFUSED = {
    "-m stage=sft name=a,b": "name= applies to the whole sweep; give it one value",
    "-m stage=sft,ppo name=a": "stage= applies to the whole sweep",
    "-m stage=sft seed=1,2 trainer.learning_rate=fast": "trainer.learning_rate is 'fast'",
    "-m stage=sft seed=1,2 trainer.hub_token=hf_secret": "trainer.hub_token cannot be set",
    "-m stage=chat seed=1,2": "drop -m",
    "-m stage=sft seed=1,2 hub.push=me/x": "the jobs of a sweep would push to one place",
    "-m stage=sft seed=1,2 hydra/sweeper=basic hydra.sweep.dir=.": "-m takes hydra/sweeper=grid or optuna",
    "-m stage=sft trainer.learning_rate=interval(0.1,0.2)": "learning_rate=interval(...) has infinitely many values",
    "-m stage=sft seed=1,2 name=/abs/x": "name='/abs/x/seed=1' is not a run name; give a folder below runs/.",
    "-m stage=sft seed=1,2 hydra.sweeper.max_batch_size=-1": "max_batch_size is -1; it takes a whole number from 1.",
    "-m stage=evaluate seed=1,2 compare=[a,b]": "compare= is for one run",
    "-m stage=collect seed=1,2 labels=pull": "labels= is for one run",
    "-m stage=evaluate seed=1,2 sweep=coefs": "sweep= is for one run",
    "-m stage=sft seed=1,2 sweep.kl_budget=3": "sweep.kl_budget= needs jobs of stage=ppo",
    "stage=ppo sweep.kl_budget=3": "sweep.kl_budget=3 needs a sweep of stage=ppo",
    "stage=evaluate sweep=coefs sweep.kl_budget=3": "sweep.kl_budget=3 needs a sweep of stage=ppo",
    **{f"stage=ppo sweep=kl sweep.kl_budget={budget}": "it takes a number above 0"
       for budget in ("much", "0", "nan", "1,2")},
    "-m stage=sft seed=1,2 hydra/launcher=submitit_no": "pip install 'rlhf_pipeline[slurm]'",
    "stage=sft sweep=kl": "sweep=kl varies trainer.kl_coef, which stage=sft does not have",
    "stage=ppo sweep=k": "no sweep is called 'k'. Did you mean 'kl'?",
    "stage=ppo sweep=demo": "Only stage=evaluate takes a multirun here",
    "stage=evaluate sweep=kl": "kl holds no run of stage=ppo with a checkpoint",
}  # fmt: skip


@pytest.mark.parametrize("asked", REFUSED)
def test_a_mistake_in_a_sweep_is_told_before_any_job_begins(asked: str, refused: Refused) -> None:
    assert REFUSED[asked] in refused(asked)
    assert not Path("runs").exists()


def test_a_cluster_that_is_not_there_is_said_to_be_missing(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")
    monkeypatch.setenv("PATH", "")
    said = refused("-m stage=sft seed=1,2 hydra/launcher=submitit_slurm")
    assert "submitit could not submit the jobs: Could not detect" in said


def test_what_leaves_no_objective_is_not_searched(refused: Refused) -> None:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    said = refused("-m stage=collect hydra/sweeper=optuna collect.prompts=int(interval(2,5))")
    assert "stage=collect has no objective to search by; Optuna takes one of:" in said


# -- how a job ends


def done(folder: Path, objective: float = 1.0, stage: str = "sft", results: dict[str, float] | None = None) -> Path:
    """The record of a stage that is done."""
    path = folder / stage / "run.json"
    (path.parent / "model").mkdir(parents=True, exist_ok=True)
    record = {"status": "done", "name": f"{folder.parent.name}/{folder.name}", "objective": objective, "seconds": 2.0}
    path.write_text(json.dumps({**record, "results": results or {}}))
    return path


def test_what_is_to_be_overwritten_stands_until_its_own_job_begins(
    workplace: Path, command_line: CommandLine, launched: Launched, refused: Refused
) -> None:
    asked = "-m stage=sft name=a seed=1,2"
    kept = [done(workplace / "runs" / "a" / f"seed={seed}") for seed in (1, 2)]
    assert "seed is 'xx'" in refused(f"{asked},xx overwrite=true")
    assert "holds other work" in refused(asked)  # these records tell of none
    assert launched == []
    assert command_line(*asked.split(), "overwrite=true") == 0
    assert [name for name, _, _ in launched] == ["a/seed=1", "a/seed=2"]
    assert all(path.exists() for path in kept)  # to be deleted by the jobs, which did not run here


@pytest.mark.parametrize(
    ("code", "objective", "status", "why"),
    [(0, 0.5, "done", None), (0, math.nan, "failed", "the objective is nan; overwrite=true"),
     (0, -math.inf, "failed", "the objective is -inf"), (3, 0.5, "failed", "exit status 3"),
     (-9, 0.5, "failed", "killed by signal 9")],
)  # fmt: skip
def test_how_a_job_ended_is_in_its_folder(
    code: int, objective: float, status: str, why: str | None, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = workplace / "runs" / "a" / "job0"
    done(folder, objective)
    end = f"exit {code}" if code >= 0 else f"kill -{-code} $$"
    start = jobs.subprocess.Popen
    monkeypatch.setattr(jobs.subprocess, "Popen", lambda words, **options: start(["sh", "-c", end], **options))
    assert jobs.run_job(workplace / "runs", "a/job0", "sft", []) == (objective if status == "done" else None)
    known = jobs.read_job(folder)
    assert known["status"] == status
    assert (known["error"] or "").startswith(why or "")


def test_a_job_that_did_not_say_how_it_ended_was_killed_and_one_that_was_interrupted_is_left(
    command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    ends = iter(("done", "waiting", "interrupted"))
    monkeypatch.setattr(cli, "run_job", lambda runs, name, *_: jobs.update_job(runs / name, status=next(ends)))
    assert command_line("-m", "stage=sft", "seed=1,2,3") == 1
    assert "failed: seed=2: never started, or was killed from outside" in " ".join(capsys.readouterr().out.split())
    (row,) = read_json(workplace / "runs" / "demo" / "sweep.json")["rows"]
    assert (row["failed"], row["left"]) == (1, 1)


def test_jobs_are_of_one_work_whoever_runs_them_and_whatever_their_seed() -> None:
    work = {"stage": "ppo", "data.limit": "9", "experiment": "null", "labeler": "length"}
    command = ["stage=ppo", "++data.limit=3", "++data.limit=9", "~experiment", "reward@labeler=length"]
    more = ["seed=3", "name='a/seed=3'", "overwrite=true", "hydra/launcher=submitit_local", "++report.lang=zh"]
    assert jobs.result_settings(command) == jobs.result_settings([*command, *more]) == work


# -- what a sweep comes to


def add(sweep: Path, settings: dict[str, str], objective: float | None, status: str = "done", **more: Any) -> Path:
    """A job of a sweep, as it leaves its files."""
    folder = sweep / ",".join(f"{key}={value}" for key, value in settings.items()).replace("/", "_")
    told = {key: value for key, value in settings.items() if key != "seed"}
    known = {"stage": "ppo", "settings": told, "seed": int(settings.get("seed", 0)), "status": status, "error": None}
    jobs.update_job(folder, **{**known, **more})
    if objective is not None:
        results = {"kl": 2 * objective, "validation_reward": objective + 1, "validation_kl": 20.0}
        done(folder, objective, "ppo", results).with_name("report.html").write_text("")
    return folder


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    """Three coefficients: two seeds done of one, one of two of another (whatever lies there), none of the last."""
    folder = tmp_path / "runs" / "coefs"
    add(folder, {"trainer.kl_coef": "0.1", "seed": "1"}, 0.5)
    add(folder, {"trainer.kl_coef": "0.1", "seed": "2"}, 0.7)
    add(folder, {"trainer.kl_coef": "0.2", "seed": "1"}, 0.9)
    add(folder, {"trainer.kl_coef": "0.2", "seed": "2"}, 0.99, "failed", error="out of <memory>")
    add(folder, {"trainer.kl_coef": "0.3", "seed": "1"}, None, "waiting")
    add(folder, {"seed": "1"}, None, "done", stage="sft")  # of another stage, which does not compare
    return folder


def test_jobs_are_grouped_over_seeds_and_the_best_comes_first(sweep: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_sweep(sweep, "ppo", [folder.name for folder in sweep.iterdir() if folder.is_dir()])
    found = read_json(sweep / "sweep.json")
    rows = [(row["settings"], row["objective"], row["stderr"], row["seeds"]) for row in found["rows"]]
    assert rows[0] == ({"trainer.kl_coef": "0.2"}, 0.9, None, 1)  # of one seed there is no standard error
    assert rows[1][0] == {"trainer.kl_coef": "0.1"}
    # Of 0.5 and 0.7: the mean 0.6, the deviation sqrt(2 x 0.01), over sqrt(2).
    assert rows[1][1:] == (pytest.approx(0.6), pytest.approx(0.1), 2)
    assert rows[2] == ({"trainer.kl_coef": "0.3"}, None, None, 0)
    assert [(row["failed"], row["left"]) for row in found["rows"]] == [(1, 0), (0, 0), (0, 1)]
    assert found["rows"][1]["results"]["kl"] == pytest.approx(1.2)
    assert found["objective"] == "reward - selection_kl_coef x KL, on validation prompts"

    # The table says what failed, of its own command.
    said = capsys.readouterr().out
    assert said.index("kl_coef=0.2") < said.index("kl_coef=0.1") < said.index("kl_coef=0.3")
    assert "failed: trainer.kl_coef=0.2,seed=2: out of <memory>" in said
    assert "1 of 5 jobs failed" in said
    report_sweep(sweep, "ppo", ["trainer.kl_coef=0.1,seed=1", "trainer.kl_coef=0.1,seed=2"])
    assert not re.search("failed:|jobs failed", capsys.readouterr().out)


def test_later_commands_join_in_if_they_are_the_same_work_and_a_seed_counts_once(tmp_path: Path) -> None:
    """By all settings of the commands, also those that no command swept."""
    rate, epochs = {"trainer.learning_rate": "1e-3"}, "trainer.num_train_epochs"
    add(tmp_path, rate, 0.1)  # of the seed that is the default
    for seed in ("0", "1"):
        add(tmp_path, {**rate, "seed": seed}, 0.1 + int(seed))
    add(tmp_path, {**rate, epochs: "9", "seed": "1"}, 2.5)
    found = [(row["settings"], sorted(row["values"])) for row in summarise(tmp_path, "ppo")["rows"]]
    assert found == [({epochs: "9"}, [2.5]), ({epochs: "default"}, [0.1, 1.1])]


def test_a_damaged_note_hides_no_other_job(sweep: Path) -> None:
    (sweep / "trainer.kl_coef=0.1,seed=1" / "job.json").write_text("")
    (sweep / "trainer.kl_coef=0.1,seed=2" / "job.json").write_text("[1]")
    assert len(summarise(sweep, "ppo")["jobs"]) == 3
    for path in sweep.glob("*/job.json"):
        path.write_text("{")
    assert rebuild(sweep)[-1].is_file()


def test_a_reward_of_what_was_trained_on_is_called_so(tmp_path: Path) -> None:
    done(add(tmp_path, {"seed": "1"}, 0.9), 0.9, "ppo", {"scores": 1.0, "kl": 2.0})
    found = summarise(tmp_path, "ppo")
    assert found["objective"] == "reward - selection_kl_coef x KL while training (no validation prompts)"


# The reward of a policy that hacks it, of a moderate one and of one that stayed where it began, with their KL.
POLICIES = {"0.01": (0.960, 10.0), "0.05": (0.934, 2.5), "0.2": (0.821, 0.8)}


@pytest.fixture
def hacked(tmp_path: Path) -> Path:
    """A sweep in which the more the reward is hacked, the higher it is."""
    folder = tmp_path / "runs" / "hacked"
    for coef, (reward, kl) in POLICIES.items():
        results = {"scores": reward, "kl": kl, "validation_reward": reward, "validation_kl": kl}
        done(add(folder, {"trainer.kl_coef": coef}, 0.0), reward - 0.05 * kl, "ppo", results)
    return folder


def order_of(found: dict[str, Any]) -> list[str]:
    return [row["settings"]["trainer.kl_coef"] for row in found["rows"]]


def test_a_hacked_policy_is_not_chosen(hacked: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report_sweep(hacked, "ppo", [])
    rows = [line.split() for line in capsys.readouterr().out.splitlines() if "kl_coef=" in line]
    assert [" ".join(row[1:8:2]) for row in rows] == [
        "kl_coef=0.05 0.809 0.934 2.50", "kl_coef=0.2 0.781 0.821 0.80", "kl_coef=0.01 0.460 0.960 10.00",
    ]  # fmt: skip
    page = (hacked / "report.html").read_text()
    assert page.index("kl_coef=0.05") < page.index("kl_coef=0.2") < page.index("kl_coef=0.01")


@pytest.mark.parametrize(
    ("budget", "order", "over"),
    [(20, ["0.01", "0.05", "0.2"], 0), (3, ["0.05", "0.2", "0.01"], 1), (1, ["0.2", "0.05", "0.01"], 2),
     (0.5, ["0.2", "0.05", "0.01"], 3)],
)  # fmt: skip
def test_at_a_kl_budget_the_best_reward_within_it_is_chosen(
    budget: float, order: list[str], over: int, hacked: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report_sweep(hacked, "ppo", [], budget)
    found = read_json(hacked / "sweep.json")
    assert order_of(found) == order
    said = capsys.readouterr().out
    assert sum(row["over_budget"] > 0 for row in found["rows"]) == over
    assert ("over" in said) == (over > 0)
    nearest = f"no settings keep within sweep.kl_budget={budget:g}; nearest: kl_coef=0.2"
    assert (nearest in said) == (over == 3)
    assert found["rows"][0]["objective"] == POLICIES[order[0]][0]
    (page,) = (path for path in rebuild(hacked) if path.parent == hacked)  # at the same budget
    assert ("No settings keep within the KL budget" in page.read_text()) == (over == 3)
    assert f"(KL ≤ {budget:g})" in page.read_text()


@pytest.mark.parametrize(("budget", "best"), [([], "0.05"), (["sweep.kl_budget=1"], "0.2")])
def test_optuna_searches_for_what_the_table_orders_by(
    budget: list[str], best: str, command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    optuna = pytest.importorskip("optuna", reason="the extra optuna is not installed")

    def run_job(runs: Path, name: str, stage: str, command: list[str]) -> None:
        reward, kl = POLICIES[jobs.result_settings(command)["trainer.kl_coef"]]
        done(runs / name, reward - 0.05 * kl, stage, {"validation_reward": reward, "validation_kl": kl})
        jobs.update_job(runs / name, status="done")

    monkeypatch.setattr(cli, "run_job", run_job)
    monkeypatch.setattr("rlhf_pipeline.runs.directory.RunDir.finished", lambda *_, **__: False)
    asked = ["stage=ppo", "sweep=optuna", "name=x", "trainer.learning_rate=1e-4", "trainer.kl_coef=0.01,0.05,0.2"]
    assert command_line(*asked, *budget, "hydra.sweeper.n_trials=8") == 0
    study = optuna.load_study(study_name=None, storage=f"sqlite:///{workplace}/runs/x/optuna.db")
    assert {trial.params["++trainer.kl_coef"] for trial in study.trials} == {*POLICIES}
    assert study.best_params == {"++trainer.kl_coef": best}
    assert order_of(read_json(workplace / "runs" / "x" / "sweep.json"))[0] == best


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


def test_the_plot_has_the_objective_of_each_row_with_its_error(tmp_path: Path) -> None:
    def page(*settings: dict[str, str]) -> str:
        rows = [{"settings": own, "objective": float(i), "stderr": 0.5, "values": [float(i)]}
                for i, own in enumerate(settings)]  # fmt: skip
        found = {"sweep": "x", "stage": "ppo", "rows": rows, "jobs": []}
        return sweep_page(tmp_path / "report.html", found, Words()).read_text()

    several = page({"a.lr": "1", "b": "2"}, {"a.lr": "2", "b": "2"}, {"a.lr": "3", "b": "2"})
    assert ">lr=1, b=2</text>" in several
    assert several.count("<polyline") == 3  # from a standard error below the mean to one above
    assert several.count("<circle") == 6
    assert "<svg" not in page({"a.lr": "1"})
    broken = {"rows": [{"objective": "x"}, {"objective": math.inf}, 3], "jobs": None}
    assert "<svg" not in sweep_page(tmp_path / "report.html", broken, Words()).read_text()
