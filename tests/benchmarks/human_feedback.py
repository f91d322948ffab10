"""Rounds of feedback on the built-in reviews, labelled with their true sentiment: does more feedback help?

    python tests/benchmarks/human_feedback.py --seeds 3 --rounds 3 --prompts 250 500 1000

Each cell of the table is the policy's true reward on 512 held-out prompts, mean over seeds ± standard error. It takes
hours on two cores. If it is interrupted, the same command resumes it. It also draws the table as an SVG. If a seed
fails, the script names it and goes on; the cells without it then give their number of seeds.
"""

import argparse
import functools
import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev

import kept

from rlhf_pipeline.files import read_json
from rlhf_pipeline.report.charts import Line, even_ticks
from rlhf_pipeline.report.charts import plot as chart
from rlhf_pipeline.report.page import picture

NAME = "human_feedback"


def run(arguments: list[str], log: Path) -> None:
    """Run one command of the pipeline on one core."""
    environment = {**kept.environment(), "OMP_NUM_THREADS": "1"}
    with log.open("a") as file:
        subprocess.run(
            [sys.executable, "-m", "rlhf_pipeline", *arguments], env=environment, stdout=file, stderr=file, check=True
        )


def one_seed(seed: int, prompts: list[int], rounds: int) -> str | None:
    """Pretrain and fine-tune a policy for this seed, then run the rounds for each number of labelled prompts.

    Returns what went wrong, or None. If one number of prompts fails, the others still run.
    """
    common = [f"experiment={NAME}", f"seed={seed}", "labeler=toy_sentiment"]
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
    return stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def cell(values: list[float], seeds: int) -> str:
    """Mean ± standard error, and the number of seeds if some are missing."""
    if not values:
        return "-"
    error = spread(values)
    some = f" ({len(values)} of {seeds} seeds)" if len(values) < seeds else ""
    return f"{mean(values):.3f}" + (f" ± {error:.3f}" if error is not None else "") + some


def gather(prompts: list[int], rounds: int, seeds: int) -> dict[tuple[int, int], dict[str, list[float]]]:
    """Return {(prompts, round): {measure: one value per seed}}; round 0 is the SFT policy."""
    found: dict[tuple[int, int], dict[str, list[float]]] = {}
    for count in prompts:
        for number in range(rounds + 1):
            values = found.setdefault((count, number), {"reward": [], "kl": [], "accuracy": []})
            for seed in range(seeds):
                folder = Path("runs") / NAME / f"seed{seed}" / str(count) / f"round{max(number, 1)}"
                if not (judged := read_json(folder / "evaluate" / "evaluation.json")):
                    continue
                metrics = judged["metrics"]["ppo" if number else "sft"]
                values["reward"].append(metrics["reward_mean"])
                values["kl"].append(metrics["kl"])
                if number:
                    values["accuracy"].append(read_json(folder / "reward" / "quality.json")["accuracy"])
    return found


def table(found: dict[tuple[int, int], dict[str, list[float]]], key: str, seeds: int) -> str:
    """A Markdown table with a row per number of labelled prompts and a column per round."""
    header = ["labelled prompts a round", *map(title, sorted({number for _, number in found}))]
    lines: dict[int, list[str]] = {}
    for (count, _), values in found.items():
        lines.setdefault(count, [str(count)]).append(cell(values[key], seeds))
    return kept.table(header, lines.values())


def title(number: int) -> str:
    """What a round is called."""
    return f"round {number}" if number else "SFT"


def plot(found: dict[tuple[int, int], dict[str, list[float]]]) -> str:
    """The table of rewards as an SVG: a chart per number of labelled prompts, with bars of one standard error."""
    means = {place: mean(values["reward"]) for place, values in found.items() if values["reward"]}
    errors = {place: spread(found[place]["reward"]) or 0.0 for place in means}
    rewards = even_ticks([means[place] + sign * errors[place] for place in means for sign in (-1, 1)])
    rounds = [(number, title(number)) for number in sorted({number for _, number in found})]
    charts = []
    for count in dict.fromkeys(count for count, _ in means):
        points = [(number, value) for (of, number), value in means.items() if of == count]
        lines = [Line("", "c0", points, [(*point, 3.0) for point in points])]
        for number, value in points:
            error = errors[count, number]
            lines.append(Line("", "c0", [(number, value - error), (number, value + error)]))
        charts.append(chart(f"true reward, {count} prompts a round", lines, rounds, rewards))
    return picture(charts)


def main() -> None:
    """Run what is missing, then show the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, nargs="+", default=[250, 500, 1000])
    given = parser.parse_args()
    with ThreadPoolExecutor(2) as pool:
        one = functools.partial(one_seed, prompts=given.prompts, rounds=given.rounds)
        failed = list(pool.map(one, range(given.seeds)))
    found = gather(given.prompts, given.rounds, given.seeds)
    for key in ("reward", "accuracy", "kl"):
        print(f"\n{key}\n{table(found, key, given.seeds)}")
    if any(values["reward"] for values in found.values()):
        path = Path(f"{NAME}.svg")
        path.write_text(plot(found), encoding="utf-8")
        print(f"\nplot -> {path}")
    for why in filter(None, failed):
        print(why, file=sys.stderr)
    sys.exit(1 if any(failed) else 0)


if __name__ == "__main__":
    main()
