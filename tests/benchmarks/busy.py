"""Runs the demo's stages alone and next to a busy process: they get slower, but their metrics must stay the same.

    python tests/benchmarks/busy.py [--run runs/demo] [--quick] [--rounds 3] [--results FOLDER]

`--run` is a finished run of `make demo`. Start this script in the folder where the run was made, because a run stores
the paths of its models. In each round every stage (ppo, sft and evaluate, with few updates, steps and prompts) runs
twice from a copy of it: alone, and next to a process that multiplies matrices in as many threads as there are cores.
The seconds are those of the stage, without loading the libraries. If any metric differs between the runs, the exit
status is 1.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from statistics import median
from typing import Any

from kept import ROOT, Kept, Row, add_options, by_machine, say, spread, table

from rlhf_pipeline.files import read_json, read_jsonl

STAGES = {  # the stages to run, and their settings
    "ppo": ("trainer.total_episodes=1280", "trainer.eval_samples=64"),  # 10 updates
    "sft": ("trainer.max_steps=100",),
    "evaluate": ("evaluate.prompts=256",),
}
QUICK = {
    "ppo": ("trainer.total_episodes=256", "trainer.eval_samples=16"),
    "sft": ("trainer.max_steps=5",),
    "evaluate": ("evaluate.prompts=16",),
}
LOAD = """
import sys, torch
torch.set_num_threads(int(sys.argv[1]))
left, right = torch.randn(2, 512, 512)
while True:
    left @ right
"""
OF_TIME = ("seconds", "eps")  # keys of metrics.jsonl that depend on the clock


@contextmanager
def busy(threads: int) -> Iterator[None]:
    """Run a process that computes like a training until the block ends."""
    process = subprocess.Popen([sys.executable, "-c", LOAD, str(threads)])
    try:
        yield
    finally:
        process.kill()
        process.wait()


def run_stage(stage: str, settings: Sequence[str], run: Path) -> tuple[float, Any]:
    """Run a stage in a copy of `run`; returns its seconds and all its metrics."""
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(run, Path(folder, "demo"), ignore=shutil.ignore_patterns("checkpoints", stage))
        command = [sys.executable, "-m", "rlhf_pipeline", f"stage={stage}", "experiment=demo", f"runs={folder}"]
        done = subprocess.run([*command, *settings], capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"stage={stage} failed:\n{(done.stdout + done.stderr)[-2000:]}")
        out = Path(folder, "demo", stage)
        rows = [{k: v for k, v in row.items() if k not in OF_TIME} for row in read_jsonl(out / "metrics.jsonl")]
        found = read_json(out / "evaluation.json")
        return float(read_json(out / "run.json")["seconds"]), [rows, found.get("metrics"), found.get("paired_gain")]


@by_machine
def busy_table(rows: Sequence[Row]) -> str:
    """One row per stage."""
    lines = []
    for row in rows:
        ratios = [busy / quiet for quiet, busy in zip(row["quiet"], row["busy"], strict=True)]
        seconds = [f"{median(row[how]):.1f}" for how in ("quiet", "busy")]
        lines.append([f"stage={row['name']}", *seconds, spread(ratios), "yes" if row["same"] else "NO"])
    return table(["stage", "alone, s", "beside a busy process, s", "times (range)", "same metrics"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--run", type=Path, default=ROOT / "runs" / "demo", help="default: runs/demo")
    parser.add_argument("--rounds", type=int, help="default: 3; with --quick 1")
    asked = parser.parse_args()
    if not (asked.run / "ppo" / "model").is_dir():
        parser.error(f"{asked.run} has no finished run of the demo; make one: make demo")
    cores = set(sorted(os.sched_getaffinity(0))[:2])  # both processes share them
    os.sched_setaffinity(0, cores)  # child processes inherit it
    kept, rounds, rows = Kept("busy", asked), asked.rounds or (1 if asked.quick else 3), []
    for stage, settings in (QUICK if asked.quick else STAGES).items():
        seconds: dict[str, list[float]] = {"quiet": [], "busy": []}
        metrics = []
        for number in range(rounds):
            for how in ("quiet", "busy") if number % 2 == 0 else ("busy", "quiet"):  # the order alternates
                with busy(len(cores)) if how == "busy" else nullcontext():
                    took, found = run_stage(stage, settings, asked.run)
                seconds[how].append(took)
                metrics.append(found)
            say(f"{stage}: {number + 1} of {rounds} rounds")
        same = all(found == metrics[0] for found in metrics)
        rows.append(kept.add(stage, {"n": rounds, "settings": settings, "same": same, **seconds}))
    print(busy_table(rows))
    sys.exit(not all(row["same"] for row in rows))


if __name__ == "__main__":
    main()
