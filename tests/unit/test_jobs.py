"""The jobs of a sweep: what is done and what is overwritten, who runs a job, and how one ends."""

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine

from rlhf_pipeline import cli
from rlhf_pipeline.sweeps import jobs

SWEEP = ("-m", "stage=sft", "name=a", "seed=1,2")


def done(folder: Path, objective: float = 1.0) -> Path:
    """The record of a stage that is done."""
    path = folder / "sft" / "run.json"
    path.parent.mkdir(parents=True)
    record = {"status": "done", "name": folder.name, "objective": objective, "results": {}, "seconds": 1.0}
    path.write_text(json.dumps(record))
    return path


@pytest.fixture
def sweep(workplace: Path) -> Path:
    """The folder of a sweep."""
    return workplace / "runs" / "a"


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The name of each job that is launched, and not run."""
    found: list[str] = []

    def run_job(runs: Path, name: str, *_: Any) -> None:
        found.append(name)
        jobs.note(runs / name, status="done")

    monkeypatch.setattr(cli, "run_job", run_job)
    return found


def ends(monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    """Let a job's process end so at once."""

    class Process:
        def __init__(self, *_: Any, **__: Any) -> None: ...

        def __enter__(self) -> "Process":
            return self

        def __exit__(self, *_: object) -> None: ...

        def wait(self) -> int:
            return code

    monkeypatch.setattr(jobs.subprocess, "Popen", Process)


def test_what_is_to_be_overwritten_stands_until_its_own_job_begins(
    sweep: Path, command_line: CommandLine, launched: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [done(sweep / f"seed={seed}") for seed in (1, 2)]
    assert command_line(*SWEEP[:-1], "seed=1,2,xx", "overwrite=true") == 2
    assert "seed is 'xx'" in capsys.readouterr().err
    assert all(path.exists() for path in kept)
    assert launched == []
    assert command_line(*SWEEP) == 2  # other work: these records tell of none
    assert "holds other work" in capsys.readouterr().err
    assert command_line(*SWEEP, "overwrite=true") == 0
    assert launched == ["a/seed=1", "a/seed=2"]
    assert all(path.exists() for path in kept)  # to be deleted by the jobs, which did not run here


def test_an_objective_that_is_no_number_is_a_failure(sweep: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ends(monkeypatch, 0)
    for seed, objective in enumerate((0.5, float("nan"), float("-inf"))):
        done(sweep / f"seed={seed}", objective)
        found = jobs.run_job(sweep.parent, f"a/seed={seed}", "sft", [])
        known = jobs.read_job(sweep / f"seed={seed}")
        if seed == 0:
            assert (found, known["status"], known["exit"]) == (0.5, "done", 0)
        else:
            assert (found, known["status"], known["exit"]) == (None, "failed", 1)
            assert known["error"] == f"the objective is {objective}; overwrite=true runs the job again"


def test_jobs_are_of_one_work_whoever_runs_them_and_whatever_their_seed() -> None:
    work = {"stage": "ppo", "data.limit": "9", "experiment": "null", "labeler": "length"}
    command = ["stage=ppo", "++data.limit=3", "++data.limit=9", "~experiment", "reward@labeler=length"]
    more = ["seed=3", "name='a/seed=3'", "overwrite=true", "hydra/launcher=submitit_local", "++report.lang=zh"]
    assert jobs.settings_of(command) == jobs.settings_of([*command, *more]) == work


def test_a_setting_that_is_given_twice_the_same_is_one_job(command_line: CommandLine, launched: list[str]) -> None:
    assert command_line(*SWEEP[:-1], "seed=1,1") == 0
    assert launched == ["a/seed=1"]


def test_what_leaves_no_objective_is_not_searched(
    command_line: CommandLine, workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    asked = ["-m", "stage=collect", "hydra/sweeper=optuna", "collect.prompts=int(interval(2,5))"]
    assert command_line(*asked) == 2
    assert "stage=collect has no objective to search by; Optuna takes one of:" in capsys.readouterr().err
