"""Measures everything on a GPU in one command: PPO against TRL's, SFT, rollouts, sharding and all of IMDB.

    python tests/benchmarks/gpu.py [--parts ppo,sft,rollout,shard,imdb] [--quick] [--device cpu] [--out runs/gpu]

Each part is a process with a time limit, so a part that fails or hangs does not stop the others. Each figure is written
to OUT/results.jsonl at once, and each part's output to OUT/PART.log. A finished part is kept (kept.py), and the tables
are printed at the end. Models are untrained and have GPT-2's sizes; nothing is downloaded. `--device cpu --quick` runs
all parts in minutes with tiny shapes, on any machine. The sides of a comparison take turns, so they are all on the GPU
at once; on a small GPU, add `--models small`.

- ppo: seconds per update of TRL 1.12's own loop and of ours, which take turns; medians of the paired rounds.
- sft: tokens/s of training steps, and MFU: 6 N + 12 L d T operations per token as a share of the GPU's peak
  (PaLM, arXiv 2204.02311, app. B; N without position embeddings, T is the length of a text).
- rollout: new tokens/s of `sample`, and of transformers' generate with each of its two caches.
- shard: a few steps of stage=sft on one GPU, plain and with conf/accelerate/zero2.yaml and fsdp.yaml.
- imdb: a GPT-2 small trained on the reviews, a classifier, PPO, the table; RLHF_SHARED contains data/imdb. If a stage
  runs out of time, the same command resumes it from its checkpoint.
"""

import argparse
import json
import os
import re
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from gpu_parts import PARTS, ROOT, SHAPES, Row, SkipError, call
from kept import Kept, add_options, by_machine, table

from rlhf_pipeline.files import read_jsonl

LIMITS = {"ppo": 900, "sft": 300, "rollout": 420, "shard": 480, "imdb": 1100}  # seconds per part
# bf16 TFLOP/s without sparsity, from the data sheets; the first key that is in the GPU's name counts.
PEAKS = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "RTX 4090": 165, "L4": 121}


def run_part(asked: argparse.Namespace) -> None:
    """Run one part in this process; writes its rows one by one."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `call` also ends this part's children
    with (asked.out / "results.jsonl").open("a") as results:

        def write(row: Row) -> None:
            print(json.dumps({"part": asked.part, **row}), file=results, flush=True)

        try:
            for row in PARTS[asked.part](asked):
                write(row)
        except SkipError as why:
            write({"skipped": f"skipped: {why}"})


def gpu_table(rows: Sequence[Row]) -> str:
    """For each machine, one table per kept part. Lists are only in the file."""
    return by_machine(rows, lambda own: "\n\n".join(map(part_table, own)))


def part_table(part: Row) -> str:
    """How a part ended, and a table of its rows."""
    columns = list(dict.fromkeys(k for row in part["rows"] for k, v in row.items() if type(v) is not list))
    lines = [[str(row.get(column, "")) for column in columns] for row in part["rows"]]
    return f"### {part['name']}: {part['ended']}\n\n{table(columns, lines) if lines else ''}".rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", default=",".join(PARTS), help="comma-separated (default: all)")
    parser.add_argument("--models", default="small,medium", help="small, medium or small,medium (default: both)")
    add_options(parser)
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--rounds", type=int, default=5, help="measured rounds (default: 5)")
    parser.add_argument("--peak-tflops", type=float, help="the GPU's bf16 peak, if this script does not know it")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "gpu", help="default: runs/gpu")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])  # installed or not
    os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1")
    if asked.part:
        return run_part(asked)
    for option, known in (("parts", PARTS), ("models", SHAPES)):
        if unknown := set(getattr(asked, option).split(",")) - set(known):
            parser.error(f"--{option} has {', '.join(sorted(unknown))}; it takes any of {', '.join(known)}.")
    kept = Kept("gpu", asked, "cpu" if asked.device == "cpu" else "auto")
    peak = next((peak for name, peak in PEAKS.items() if re.search(rf"\b{name}\b", kept.gpu or "")), None)
    asked.peak_tflops = asked.peak_tflops or peak
    if asked.device == "cuda" and not kept.gpu:
        parser.error("--device cuda: torch sees no GPU; use --device cpu.")
    if "sft" in asked.parts.split(",") and not asked.peak_tflops and kept.gpu:
        parser.error(f"the peak of {kept.gpu} is unknown; add --peak-tflops, its bf16 TFLOP/s without sparsity.")
    asked.out.mkdir(parents=True, exist_ok=True)
    results = asked.out / "results.jsonl"
    options = ["--models", asked.models, "--rounds", str(asked.rounds), "--out", str(asked.out)]
    options += ["--quick"] * asked.quick + (["--peak-tflops", str(asked.peak_tflops)] if asked.peak_tflops else [])
    parts = []
    for part in asked.parts.split(","):
        print(f"{part}: at most {LIMITS[part]} s, log in {asked.out / part}.log", flush=True)
        before, start = len(read_jsonl(results)), time.monotonic()
        with (asked.out / f"{part}.log").open("w") as log:
            status = call([sys.executable, __file__, "--part", part, *options], LIMITS[part], log)
        how = "done" if status == "0" else f"failed, see {part}.log" if status.lstrip("-").isdigit() else status
        found = read_jsonl(results)[before:]
        skipped = [row["skipped"] for row in found if "skipped" in row]
        ended = "; ".join([*skipped, f"{how} in {time.monotonic() - start:.0f} s"])
        rows = [{k: v for k, v in row.items() if k != "part"} for row in found if "skipped" not in row]
        parts.append(kept.add(part, {"n": 1 if asked.quick else asked.rounds, "ended": ended, "rows": rows}))
    print(f"\n{gpu_table(parts)}")


if __name__ == "__main__":
    main()
