"""A multirun: each job a process and a whole run directory of its own, and a table at the end."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml
from conftest import MINIATURE


def test_a_sweep_gives_each_job_its_run_and_prints_a_table(miniature: Path, workplace: Path) -> None:
    shutil.copytree(miniature, workplace / "runs" / "demo")
    command = [sys.executable, "-m", "rlhf_pipeline", "-m", "stage=ppo", "name=sweep", "trainer.kl_coef=0.02,0.1"]
    done = subprocess.run(
        [*command, "trainer.total_episodes=16", "trainer.per_device_train_batch_size=8",
         "trainer.response_length=8", *MINIATURE[:2]],
        capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for coefficient in (0.02, 0.1):
        job = workplace / "runs" / "sweep" / f"trainer.kl_coef={coefficient}" / "ppo"
        assert yaml.safe_load((job / "config.yaml").read_text())["trainer"]["kl_coef"] == coefficient
        record = json.loads((job / "run.json").read_text())
        assert record["status"] == "done"
        assert record["parents"]["policy"]["path"] == "runs/demo/sft/model"
        assert (job / "model" / "model.safetensors").exists()
        assert (job / "metrics.jsonl").exists()
        assert f"{record['objective']:.3f}" in done.stdout
    table = done.stdout[done.stdout.rindex("runs/sweep (ppo)") :]
    assert "trainer.kl_coef=0.02" in table
    assert "trainer.kl_coef=0.1" in table


def test_a_failed_job_is_reported_and_the_others_finish(miniature: Path, workplace: Path) -> None:
    shutil.copytree(miniature, workplace / "runs" / "demo")
    command = [sys.executable, "-m", "rlhf_pipeline", "-m", "stage=ppo", "name=sweep"]
    done = subprocess.run(
        [*command, "trainer.num_mini_batches=3,1", "trainer.total_episodes=16", "trainer.gradient_accumulation_steps=1",
         "trainer.per_device_train_batch_size=8", "trainer.response_length=8", *MINIATURE[:2]],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    table = done.stdout[done.stdout.rindex("runs/sweep (ppo)") :]
    assert "failed" in table
    assert "done" in table
    assert (workplace / "runs" / "sweep" / "trainer.num_mini_batches=1" / "ppo" / "model").is_dir()
