"""stage=evaluate sweep=: reward against KL over the jobs of a sweep and their checkpoints."""

import contextlib
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MINIATURE, CommandLine, Refused, change, settings_of

from rlhf_pipeline.evaluation.frontier import Point, open_point, points_of
from rlhf_pipeline.files import read_json
from rlhf_pipeline.runs.lineage import content_hash
from rlhf_pipeline.stages import evaluate

ARGS = [arg for arg in MINIATURE if "stages.ppo" in arg or "stages" not in arg]
SWEEP = ["stage=evaluate", "sweep=coefs", "evaluate.prompts=24"]


@pytest.fixture(scope="module")
def swept(miniature: Path, tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Path:
    """A run, and a sweep of three jobs from it: one has an adapter, one was cut off."""
    runs = tmp_path_factory.mktemp("swept") / "runs"
    shutil.copytree(miniature, runs / "demo")
    some = ["stage=ppo", "trainer.save_total_limit=null", *ARGS]
    with contextlib.chdir(runs.parent):
        assert command_line(*some, "name=coefs/low", "trainer.kl_coef=0.01") == 0
        assert command_line(*some, "name=coefs/lora", "policy.lora.r=2", "trainer.learning_rate=0.01") == 0
    shutil.copytree(runs / "coefs" / "low", runs / "coefs" / "cut")
    change(runs / "coefs" / "cut" / "ppo" / "run.json", name="coefs/cut", status="failed")
    return runs


@pytest.fixture
def sweep(swept: Path, workplace: Path) -> Path:
    """A copy of it in the current folder."""
    return Path(shutil.copytree(swept, workplace / "runs")) / "coefs"


def found_in(sweep: Path) -> dict[str, Any]:
    return read_json(sweep / "frontier" / "frontier.json")


def test_every_checkpoint_of_every_job_is_measured(
    sweep: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line(*SWEEP, "evaluate.best_of=4", "evaluate.rewards=[{name: length, target: 5}]") == 0
    shown = capsys.readouterr().out
    found = found_in(sweep)
    rows = {(row["run"], row["step"]): row for row in found["points"]}
    assert sorted(rows) == [(job, step) for job in ("cut", "lora", "low") for step in (2, 4, 6)]
    assert rows["cut", 4]["reward_mean"] == rows["low", 4]["reward_mean"]
    assert rows["low", 4]["kl"] != rows["low", 2]["kl"]
    assert len(found["starts"]) == 1
    assert [row["n"] for row in found["starts"][0]["best_of"]] == [1, 2, 3, 4]
    assert all("length" in row["rewards"] for row in found["points"])
    best = max(found["points"], key=lambda row: row["reward_mean"] - 0.05 * row["kl"])  # not by reward alone
    results = read_json(sweep / "frontier" / "run.json")["results"]
    assert (results["reward_mean"], results["kl"]) == (best["reward_mean"], best["kl"])
    assert "Best of n, without training" in shown
    assert max(map(len, shown.splitlines())) <= 100

    # A job's result has the figures that evaluating this job gives it.
    assert command_line("stage=evaluate", "name=coefs/lora", *ARGS[:2], "evaluate.prompts=24") == 0
    own = read_json(sweep / "lora" / "evaluate" / "evaluation.json")
    for key in ("reward_mean", "reward_stderr", "kl", "distinct_2", "self_bleu"):
        assert rows["lora", 6][key] == pytest.approx(own["metrics"]["ppo"][key], abs=1e-6), key
        assert found["starts"][0][key] == pytest.approx(own["metrics"]["sft"][key], abs=1e-6), key
    assert rows["lora", 6]["gain"]["mean"] == pytest.approx(own["paired_gain"]["ppo - sft"]["mean"], abs=1e-6)

    page = (sweep / "frontier" / "report.html").read_text()
    assert page.count('<figure class="wide">') == 2
    assert "Best of n, without training" in page


@pytest.mark.filterwarnings("ignore:fan_in_fan_out")  # as the stages do
def test_a_checkpoint_opens_as_the_policy_that_was_trained(sweep: Path) -> None:
    points = {(point.run, point.step): point for point in points_of(sweep, {})}
    for job in ("low", "lora"):
        result = points[job, 6]
        checkpoint = result._replace(where=result.job.checkpoints / "checkpoint-6")
        last = open_point(checkpoint).model.state_dict()
        for name, tensor in open_point(result).model.state_dict().items():
            torch.testing.assert_close(last[name], tensor, msg=name)


def test_what_is_of_one_run_is_no_setting_of_a_sweeps_measuring(miniature: Path, refused: Refused) -> None:
    for asked in ("compare=[demo,demo]", "evaluate.policies=[sft]", "evaluate.show=[x]"):
        said = refused(f"stage=evaluate sweep=demo runs={miniature.parent} {asked}")
        assert f"drop {asked.partition('=')[0]}=" in said


def add(ppo: Path, sweep: Path, job: str) -> None:
    """A job of a sweep that is a copy of a PPO."""
    shutil.copytree(ppo, sweep / job / "ppo")
    change(sweep / job / "ppo" / "run.json", name=f"{sweep.name}/{job}")


@pytest.fixture
def two(miniature: Path, workplace: Path) -> Path:
    """A sweep of two jobs, each with a checkpoint and a result."""
    shutil.copytree(miniature, workplace / "runs" / "demo")
    for job in ("a", "b"):
        add(miniature / "ppo", workplace / "runs" / "coefs", job)
    return workplace / "runs" / "coefs"


QUICK = [*SWEEP, "evaluate.best_of=2"]


def test_jobs_that_learnt_from_different_rewards_need_a_judge(
    two: Path, command_line: CommandLine, refused: Refused
) -> None:
    for job, target in (("a", 5), ("b", 6)):
        change(two / job / "ppo" / "config.yaml", reward={"name": "length", "target": target})
    said = refused(" ".join(QUICK))
    assert "learnt from different rewards" in said
    assert '"target": 6' in said
    assert command_line(*QUICK, "reward=toy_sentiment") == 0
    assert found_in(two)["reward"] == "toy_sentiment"
    # As it was recorded, it is done; and it is not judged by another reward on the way.
    recorded = ["--config-path", str(two / "frontier"), "--config-name", "config"]
    assert command_line(*recorded) == 0
    assert found_in(two)["reward"] == "toy_sentiment"


def test_a_job_that_has_come_to_nothing_yet_says_nothing_of_the_others(two: Path, command_line: CommandLine) -> None:
    begun = two / "a" / "ppo"
    shutil.rmtree(begun / "model")
    shutil.rmtree(begun / "checkpoints")
    change(begun / "run.json", status="running")
    change(begun / "config.yaml", reward={"name": "length", "target": 5})
    assert command_line(*QUICK) == 0
    assert found_in(two)["reward"] == "runs/demo/reward/model"
    assert {row["run"] for row in found_in(two)["points"]} == {"b"}


def test_a_measuring_that_was_cut_off_goes_on_and_a_sweep_may_grow(
    two: Path, command_line: CommandLine, refused: Refused, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    assert command_line(*QUICK) == 0
    whole, frontier = found_in(two), two / "frontier" / "frontier.json"
    change(frontier, points=whole["points"][:3])  # as a kill would leave it
    change(two / "frontier" / "run.json", status="running")
    measured: list[tuple[str, int]] = []
    measure = evaluate.frontier.point_row

    def noted(point: Point, *more: Any) -> dict[str, Any]:
        measured.append((point.run, point.step))
        return measure(point, *more)

    monkeypatch.setattr(evaluate.frontier, "point_row", noted)
    assert command_line(*QUICK) == 0
    assert found_in(two) == whole
    assert measured == [(row["run"], row["step"]) for row in whole["points"][3:]]

    # A job joins, and a checkpoint that was measured is gone: it stays what its job came by.
    measured.clear()
    before = {(row["run"], row["step"]): row["kl"] for row in whole["points"]}
    assert ("b", 4) in before
    shutil.rmtree(two / "b" / "ppo" / "checkpoints" / "checkpoint-4")
    add(two.parent / "demo" / "ppo", two, "c")
    capsys.readouterr()
    assert command_line(*QUICK) == 0
    assert {run for run, _ in measured} == {"c"}
    after = {(row["run"], row["step"]): row["kl"] for row in found_in(two)["points"]}
    assert after.items() >= before.items()
    assert ("c", 6) in after
    assert "deleted" not in capsys.readouterr().out

    # Once more nothing is new, so nothing is begun.
    measured.clear()
    before = content_hash(two / "frontier")
    assert command_line(*QUICK) == 0
    assert content_hash(two / "frontier") == before
    assert not measured
    said = refused("stage=evaluate sweep=coefs evaluate.prompts=20 evaluate.best_of=2")
    assert "evaluate.prompts is 24 there and 20 here" in said


def test_a_sweep_whose_checkpoints_go_while_it_is_measured_is_measured_again(
    two: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def gone(*_: Any) -> None:
        raise FileNotFoundError

    monkeypatch.setattr(evaluate.frontier, "point_row", gone)
    assert command_line(*QUICK) == 2
    said = capsys.readouterr()
    assert "has been deleted by now" in said.out
    assert "were deleted before they were measured; run this again" in said.err


def test_a_sweep_is_found_by_its_folder_and_a_stage_stands_for_its_run(two: Path) -> None:
    for words, name, jobs in (
        (("sweep=coefs", f"runs={two.parent}"), "coefs", {"a", "b"}),
        (("sweep=./runs/coefs/a/ppo",), "coefs/a", {"a"}),
    ):
        asked = settings_of("stage=evaluate", *words)
        assert asked.name == name
        assert {point.run for point in points_of(Path(asked.sweep), {})} == jobs
