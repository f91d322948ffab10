"""A multirun for real: each job a process and a run of its own, by each launcher and sweeper; a table at the end."""

import fcntl
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import MINIATURE, CommandLine, once

from rlhf_pipeline.files import read_json, read_yaml

# A PPO of two updates.
QUICK = ["stage=ppo", "trainer.total_episodes=16", "trainer.per_device_train_batch_size=8", "trainer.response_length=8",
         "trainer.gradient_accumulation_steps=1", "trainer.num_mini_batches=1", *MINIATURE[:2]]  # fmt: skip


def sweep(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A multirun from the command line."""
    command = [sys.executable, "-m", "rlhf_pipeline", "-m", *once(*QUICK, *words)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **environment})


def found_in(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """How each job ended, and of each row how many seeds there are."""
    found = read_json(folder / "sweep.json")
    return ({job["job"]: job["status"] for job in found["jobs"]},
            {"".join(row["settings"].values()): row["seeds"] for row in found["rows"]})  # fmt: skip


@pytest.fixture
def runs(miniature: Path, workplace: Path) -> Path:
    """The folder of runs with that which jobs begin at."""
    shutil.copytree(miniature, workplace / "runs" / "demo")
    return workplace / "runs"


def test_a_failed_job_stops_no_other_and_is_done_when_the_sweep_is_run_again(runs: Path) -> None:
    folder, words = runs / "coefs", ["sweep=kl", "trainer.kl_coef=0.02,0.1", "seed=1,2", "name=coefs"]
    lock = folder / "trainer.kl_coef=0.1,seed=1" / ".ppo.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:  # as another process would that makes this job
        fcntl.flock(file, fcntl.LOCK_EX)
        done = sweep(*words)
    assert done.returncode == 2, done.stderr
    table = done.stdout[done.stdout.rindex("coefs (ppo)") :]
    assert "failed: trainer.kl_coef=0.1,seed=1: runs/coefs/trainer.kl_coef=0.1,seed=1/ppo is in use by" in (
        table.replace("\n", " ").replace("  ", " ")
    )
    ended, seeds = found_in(folder)
    assert sorted(ended.values()) == ["done", "done", "done", "failed"]
    assert seeds == {"0.02": 2, "0.1": 1}
    for job in ("trainer.kl_coef=0.02,seed=1", "trainer.kl_coef=0.02,seed=2"):
        config = read_yaml(folder / job / "ppo" / "config.yaml")
        record = read_json(folder / job / "ppo" / "run.json")
        assert config["name"] == f"coefs/{job}"
        assert config["trainer"]["kl_coef"] == 0.02
        results = record["results"]
        assert record["objective"] == results["validation_score"] != results["scores"]
        assert record["objective"] == pytest.approx(results["validation_reward"] - 0.05 * results["validation_kl"])
        assert (folder / job / "ppo" / "model").is_dir()
    assert f"{folder.relative_to(runs.parent)}/report.html shows the sweep" in done.stdout

    again = sweep(*words)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("== coefs/") == 1  # the others are done
    assert found_in(folder)[1] == {"0.02": 2, "0.1": 2}
    assert "±" in (folder / "report.html").read_text()


def test_what_has_been_trained_is_kept_where_its_measuring_fails(
    runs: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measure(self: object) -> None:
        raise MemoryError("held-out prompts")

    with monkeypatch.context() as broken:
        broken.setattr("rlhf_pipeline.ppo.PPOTrainer.measure", measure)
        assert command_line(*QUICK, "name=demo", "overwrite=true") == 2
    assert (runs / "demo" / "ppo" / "model" / "config.json").is_file()
    assert read_json(runs / "demo" / "ppo" / "run.json")["status"] == "failed"
    assert command_line(*QUICK, "name=demo") == 0
    record = read_json(runs / "demo" / "ppo" / "run.json")
    assert record["objective"] == record["results"]["validation_score"]


@pytest.mark.slow
def test_submitit_runs_each_job_in_a_process_of_its_own(runs: Path) -> None:
    """By its local executor, as it would on SLURM; what it keeps and logs holds no token."""
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="the extra slurm is not installed")
    words = ["hydra/launcher=submitit_local", "trainer.num_mini_batches=3,1", "name=cluster"]
    done = sweep(*words, HF_TOKEN="hf_a_token_of_mine")
    assert done.returncode == 2, done.stderr
    assert "failed: trainer.num_mini_batches=3: a batch of 8 rows does not divide" in done.stdout.replace("\n", " ")
    assert "2 jobs were submitted by submitit; their output is below runs/cluster/.submitit." in done.stdout
    folder = runs / "cluster"
    assert found_in(folder)[0] == {"trainer.num_mini_batches=3": "failed", "trainer.num_mini_batches=1": "done"}
    assert len(list(folder.glob(".submitit/**/*_log.out"))) == 2
    kept = [path for path in runs.parent.rglob("*") if path.is_file()]
    assert any(path.suffix == ".pkl" for path in kept)
    assert not [path for path in kept if b"hf_a_token_of_mine" in path.read_bytes()]
    # A job that submitit kills at once: the time is up as it begins.
    done = sweep(words[0], "trainer.num_mini_batches=1", "name=late", "hydra.launcher.timeout_min=0")
    assert done.returncode == 1, done.stderr
    assert read_json(runs / "late" / "job0" / "job.json")["status"] == "failed"
    assert "1 of 1 jobs failed" in done.stdout


@pytest.mark.slow
def test_a_search_keeps_its_trials_and_is_over_when_they_are_done(runs: Path) -> None:
    pytest.importorskip("optuna", reason="the extra optuna is not installed")
    words = ["sweep=optuna", "trainer.learning_rate=1e-4", "name=search"]
    done = sweep(*words, "hydra.sweeper.n_trials=1")
    assert done.returncode == 0, done.stderr
    ended = found_in(runs / "search")[0]
    assert list(ended.values()) == ["done"]
    assert all(name.startswith("trainer.kl_coef=0.") for name in ended)
    more = sweep(*words, "hydra.sweeper.n_trials=2")
    assert more.stdout.count("== search/") == 1
    assert len(found_in(runs / "search")[0]) == 2
    over = sweep(*words, "hydra.sweeper.n_trials=2")
    assert over.returncode == 0
    assert over.stdout.count("== search/") == 0
    assert "search (ppo); objective" in over.stdout
