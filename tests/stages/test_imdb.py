"""IMDB: the real reviews in their original layout, and the classic demo under the models' hub ids."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from conftest import CommandLine

from rlhf_pipeline.files import read_jsonl


def test_everything_from_the_reviews_in_miniature(shared: Path, workplace: Path, command_line: CommandLine) -> None:
    small = shared / "data" / "imdb" / "aclImdb_small.tar.gz"
    args = ["stage=pipeline", "experiment=imdb_from_scratch", f"data.path={small}", "data.limit=64"]
    args += ["evaluate.prompts=32"]
    args += ["stages.pretrain.trainer.num_train_epochs=1", "stages.reward.trainer.num_train_epochs=1"]
    args += ["stages.ppo.trainer.total_episodes=32", "stages.ppo.trainer.per_device_train_batch_size=16"]
    assert command_line(*args, "policy.vocabulary=600") == 0
    run = workplace / "runs" / "imdb_from_scratch"
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    assert list(evaluation["metrics"]) == ["base", "ppo"]
    assert evaluation["reference"] == "base"
    assert json.loads((run / "reward" / "quality.json").read_text())["rows"] == 64
    lengths = [row["val/response_length"] for row in read_jsonl(run / "ppo" / "metrics.jsonl")]
    assert all(length <= 24 for length in lengths)


def test_the_classic_demo_by_its_hub_ids(hub: dict[str, str], workplace: Path) -> None:
    small = ["stages.ppo.trainer.total_episodes=16", "stages.ppo.trainer.per_device_train_batch_size=4"]
    command = [sys.executable, "-m", "rlhf_pipeline", "stage=pipeline", "experiment=imdb_sentiment", "data.limit=100"]
    done = subprocess.run(
        [*command, *small, "evaluate.prompts=16"], capture_output=True, text=True, env=hub, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    asked = Path(hub["REQUESTS_LOG"]).read_text()
    for name in ("lvwerra/gpt2-imdb", "lvwerra/distilbert-imdb", "datasets/stanfordnlp/imdb"):
        assert name in asked
    run = workplace / "runs" / "imdb_sentiment"
    config = yaml.safe_load((run / "ppo" / "config.yaml").read_text())
    assert config["data"]["min_characters"] == 201
    rows = read_jsonl(run / "ppo" / "metrics.jsonl")
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["objective/kl_coef"] == 0.2
    assert rows[1]["objective/kl_coef"] == pytest.approx(0.2 * (1 - 0.2 * 8 / 10_000))
    for sample in read_jsonl(run / "ppo" / "samples.jsonl"):
        assert sample["prompt"]
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    assert list(evaluation["metrics"]) == ["base", "best of 4", "ppo"]
    rewards = [row["rewards"] for row in evaluation["samples"]]
    better = sum(row["best of 4"] > row["base"] for row in rewards)
    assert better > len(rewards) / 2, "the best of four is better than one, more often than not"
    assert evaluation["metrics"]["best of 4"]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert 4 <= evaluation["metrics"]["base"]["length"] <= 15


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(workplace: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(workplace / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "rlhf_pipeline", "stage=ppo", "experiment=imdb_sentiment"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert done.returncode == 2
    assert time.monotonic() - started < 45  # the imports; the client's own five attempts a file took a minute more
    assert "the hub at http://127.0.0.1:9 cannot be reached" in done.stdout
    loading, error = done.stderr.strip().split("\n", 1)
    assert loading == "loading PyTorch and TRL"
    assert error.startswith("error: reward.path=lvwerra/distilbert-imdb is not in the cache")
    for said in ("http://127.0.0.1:9", "HF_ENDPOINT", "a local path", "make demo"):
        assert said in error
    assert len(error.splitlines()) == 1
