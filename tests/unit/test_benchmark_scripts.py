"""Benchmarks as programs: odd inputs by the hundred, and what a GPU would be measured with, on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def run(script: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "tests" / "benchmarks" / script), *options]
    environment = {key: value for key, value in os.environ.items() if key != "RLHF_SHARED"}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


def test_a_hundred_odd_inputs_neither_crash_nor_hang_nor_run_nor_lose_anything(tmp_path: Path) -> None:
    done = run("fuzz.py", "--count", "100", "--keep", str(tmp_path))
    assert done.returncode == 0, done.stdout
    assert "100 inputs in" in done.stdout


def test_the_benchmark_of_a_gpu_prints_its_tables(tmp_path: Path) -> None:
    """A part that cannot be had says why, and leaves the others theirs."""
    done = run("gpu.py", "--device", "cpu", "--quick", "--parts", "imdb,rollout", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "skipped: data/imdb/aclImdb_small.tar.gz is not there; set RLHF_SHARED" in done.stdout
    assert "## rollout: done" in done.stdout
    rows = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    samplers = {row["sampler"] for row in rows if row.get("tokens/s")}
    assert samplers == {"generate, dynamic cache", "generate, static cache", "ours"}
    wrong = run("gpu.py", "--parts", "sft,pop", "--out", str(tmp_path))
    assert wrong.returncode == 2
    assert "--parts has pop; it takes any of ppo, sft, rollout, shard, imdb." in wrong.stderr
