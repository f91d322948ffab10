"""Rounds of feedback on the built-in reviews, labelled with their true sentiment: does more feedback help?

    python tests/benchmarks/human_feedback.py --seeds 3 --rounds 3 --prompts 250 500 1000

Each cell of the table is the policy's true reward on 512 held-out prompts, mean over seeds ± standard error. It takes
hours on two cores. If it is interrupted, the same command resumes it. It also draws the table as an SVG. If a seed
fails, the script names it and goes on; the cells without it then give their number of seeds.
"""

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parents[2]
NAME = "human_feedback"
COLOURS = ("#2563c9", "#b4530a", "#1a7a48")


def run(arguments: list[str], log: Path) -> None:
    """Run one command of the pipeline on one core."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with log.open("a") as file:
        subprocess.run(
            [sys.executable, "-m", "rlhf_pipeline", *arguments], env=environment, stdout=file, stderr=file, check=True
        )


def one_seed(seed: int, prompts: list[int], rounds: int, extra: list[str]) -> str | None:
    """Pretrain and fine-tune a policy for this seed, then run the rounds for each number of labelled prompts.

    Returns what went wrong, or None. If one number of prompts fails, the others still run.
    """
    common = [f"experiment={NAME}", f"seed={seed}", "labeler=toy_sentiment", *extra]
    parent, log = f"{NAME}/seed{seed}", Path(f"{NAME}-{seed}.log")
    failed = []
    try:
        for stage in ("pretrain", "sft"):
            run([f"stage={stage}", f"name={parent}", *common], log)
    except subprocess.CalledProcessError as error:
        return f"seed {seed}: {stage} ended with exit status {error.returncode}: {last_words(log)}"
    for count in prompts:
        own = [f"name={parent}/{count}", f"collect.prompts={count}", "~stages.pretrain", "~stages.sft"]
        try:
            run(["stage=pipeline", f"rounds={rounds}", *own, *common], log)
        except subprocess.CalledProcessError as error:
            failed.append(f"seed {seed}, {count} prompts: ended with exit status {error.returncode}: {last_words(log)}")
    return "\n".join(failed) or None


def last_words(log: Path) -> str:
    """Return the last line of a log that is not blank, and the log's path."""
    lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
    return f"{lines[-1] if lines else 'no output'} ({log.absolute()})"


def spread(values: list[float]) -> float | None:
    """The standard error of the mean; None for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def cell(values: list[float], seeds: int) -> str:
    """Mean ± standard error, and the number of seeds if some are missing."""
    if not values:
        return "-"
    error = spread(values)
    some = f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else ""
    return f"{statistics.mean(values):.3f}" + (f" ± {error:.3f}" if error is not None else "") + some


def gather(prompts: list[int], rounds: int, seeds: int) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Return {(prompts, round): {measure: one value per seed}}; round 0 is the SFT policy."""
    found: dict[tuple[int, int], dict[str, list[float]]] = {}
    for count in prompts:
        for number in range(rounds + 1):
            values = found.setdefault((count, number), {"reward": [], "kl": [], "accuracy": []})
            for seed in range(seeds):
                folder = Path("runs") / NAME / f"seed{seed}" / str(count) / f"round{max(number, 1)}"
                path = folder / "evaluate" / "evaluation.json"
                if not path.exists():
                    continue
                metrics = json.loads(path.read_text())["metrics"]["ppo" if number else "sft"]
                values["reward"].append(metrics["reward_mean"])
                values["kl"].append(metrics["kl"])
                if number:
                    values["accuracy"].append(json.loads((folder / "reward" / "quality.json").read_text())["accuracy"])
    return found


def table(found: dict[tuple[int, int], dict[str, list[float]]], key: str, seeds: int) -> str:
    """A Markdown table with a row per number of labelled prompts and a column per round."""
    numbers = sorted({number for _, number in found})
    lines = ["| labelled prompts a round | " + " | ".join(f"round {n}" if n else "SFT" for n in numbers) + " |"]
    lines.append("|---" * (len(numbers) + 1) + "|")
    for count in dict.fromkeys(count for count, _ in found):
        lines.append(f"| {count} | " + " | ".join(cell(found[count, n][key], seeds) for n in numbers) + " |")
    return "\n".join(lines)


def plot(found: dict[tuple[int, int], dict[str, list[float]]], prompts: list[int], rounds: int) -> str:
    """The table of rewards as an SVG: a line per number of labelled prompts, with bars of one standard error."""
    means = {place: statistics.mean(values["reward"]) for place, values in found.items() if values["reward"]}
    low, high = math.floor(min(means.values()) * 10), math.floor(max(means.values()) * 10) + 1  # in tenths
    left, top, wide, tall = 60, 20, 420, 220

    def x(number: int) -> float:
        return left + wide * number / rounds

    def y(value: float) -> float:
        return top + tall * (1 - (10 * value - low) / (high - low))

    parts = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 640 290" width="640" font-family="sans-serif" '
        'font-size="12">',
        '<rect width="640" height="290" fill="#fff"/>',
    ]
    for value in (tenths / 10 for tenths in range(low, high + 1)):
        parts.append(f'<path d="M{left} {y(value):.1f}h{wide}" stroke="#e3e5e8"/>')
        parts.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.1f}</text>')
    for n in range(rounds + 1):
        label = f"round {n}" if n else "SFT"
        parts.append(f'<text x="{x(n):.1f}" y="{top + tall + 20}" text-anchor="middle">{label}</text>')
    for place, (count, colour) in enumerate(zip(prompts, itertools.cycle(COLOURS), strict=False)):
        points = [(n, means[count, n]) for n in range(rounds + 1) if (count, n) in means]
        line = " ".join(f"{x(n):.1f},{y(v):.1f}" for n, v in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="2"/>')
        for n, value in points:
            values = found[count, n]["reward"]
            error = spread(values) or 0.0
            parts.append(f'<path d="M{x(n):.1f} {y(value - error):.1f}V{y(value + error):.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{x(n):.1f}" cy="{y(value):.1f}" r="3" fill="{colour}"/>')
        parts.append(
            f'<text x="{left + wide + 12}" y="{top + 16 + 18 * place}" fill="{colour}">{count} prompts a round</text>'
        )
    title = "true reward, mean over seeds, ± s.e."
    parts.append(f'<text x="{left}" y="{top + tall + 44}">{title}</text></svg>\n')
    return "\n".join(parts)


def main() -> None:
    """Run what is missing, then show the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[250, 500, 1000])
    parser.add_argument("--jobs", type=int, default=2, help="seeds that run at once")
    parser.add_argument("--plot", type=Path, default=Path("human_feedback.svg"))
    parser.add_argument("--show", action="store_true", help="run nothing, show the existing results")
    parser.add_argument("extra", nargs="*", help="more settings of the pipeline, after --")
    given = parser.parse_args()
    failed: list[str | None] = []
    if not given.show:
        with ThreadPoolExecutor(given.jobs) as pool:
            one = functools.partial(one_seed, prompts=given.prompts, rounds=given.rounds, extra=given.extra)
            failed = list(pool.map(one, range(given.seeds)))
    found = gather(given.prompts, given.rounds, given.seeds)
    for key in ("reward", "accuracy", "kl"):
        print(f"\n{key}\n{table(found, key, given.seeds)}")
    if any(values["reward"] for values in found.values()):
        given.plot.write_text(plot(found, given.prompts, given.rounds), encoding="utf-8")
        print(f"\nplot -> {given.plot}")
    for why in filter(None, failed):
        print(why, file=sys.stderr)
    sys.exit(1 if any(failed) else 0)


if __name__ == "__main__":
    main()
