"""The benchmark of a GPU, where there is none: tiny shapes on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def bench(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / "gpu.py"), *options]
    environment = {key: value for key, value in os.environ.items() if key != "RLHF_SHARED"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_the_benchmark_of_a_gpu_prints_its_tables(tmp_path: Path) -> None:
    """A part that cannot be had says why, and leaves the others theirs."""
    done = bench("--device", "cpu", "--quick", "--parts", "imdb,rollout", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "## imdb: skipped: data/imdb/aclImdb_small.tar.gz is not there; set RLHF_SHARED" in done.stdout
    assert "## rollout: done" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    assert {row["sampler"] for row in rows if row.get("tokens/s")} == {
        "generate, dynamic cache", "generate, static cache", "ours"
    }  # fmt: skip


def test_what_it_cannot_do_is_a_line(tmp_path: Path) -> None:
    wrong = bench("--parts", "sft,pop", "--out", str(tmp_path))
    assert wrong.returncode == 2
    assert "--parts has pop; it takes any of ppo, sft, rollout, shard, imdb." in wrong.stderr
