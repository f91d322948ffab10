"""Compare algorithms: means over seeds of the measured policies, and their gains over the common start."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf_pipeline.evaluation.frontier import fit_curves
from rlhf_pipeline.evaluation.metrics import paired_gain

Row = dict[str, Any]
_MEANS = ("reward_mean", "kl", "length", "distinct_2")


def means_over_seeds(
    start: Row, points: Sequence[Row], runs: Mapping[str, Mapping[str, Row]], draws: int, seed: int
) -> dict[str, Any]:
    """Return the figures of comparison.json.

    `runs` has the cost of each run by algorithm and run name. Gains are over the answers of `start`. Their 95 %
    intervals, from `draws` resamplings, are over prompts and seeds. `points` are averaged over seeds at each step.
    """
    best = {f"best of {row['n']}": row["drawn"] for row in start["best_of"] if "drawn" in row}
    algorithms = {"SFT": _means([start])} | {name: _judged(start, [row], draws, seed) for name, row in best.items()}
    curves = []
    for algorithm, costs in runs.items():
        own = [[row for row in points if row["run"] == run] for run in costs]
        spent = {key: fmean(cost[key] for cost in costs.values()) for key in ("sampled_tokens", "seconds")}
        judged = _judged(start, [rows[-1] for rows in own], draws, seed)
        algorithms[algorithm] = {**judged, "seeds": len(own), **spent}
        for at in zip(*own, strict=False):  # the same step of each seed
            about = {"run": algorithm, "step": at[0]["step"], "start": start["key"]}
            curves.append({**_means(at), **about})
    return {"algorithms": algorithms, "starts": [start], "points": curves, "fits": fit_curves([start], curves)}


def _means(rows: Sequence[Row]) -> Row:
    """Return the means of policies that differ only in their seed."""
    rewards = {name: {"reward_mean": fmean(row["rewards"][name]["reward_mean"] for row in rows)}
               for name in rows[0]["rewards"]}  # fmt: skip
    return {**{key: fmean(row[key] for row in rows) for key in _MEANS}, "rewards": rewards}


def _judged(start: Row, rows: Sequence[Row], draws: int, seed: int) -> Row:
    """Return the means with the gain by each reward. The first of `start["values"]` is the main reward."""
    found, (main, *others) = _means(rows), start["values"]
    gains = {
        name: paired_gain(start["values"][name], [row["values"][name] for row in rows], draws, seed)
        for name in (main, *others)
    }
    for name in others:
        found["rewards"][name]["gain"] = gains[name]
    return {**found, "gain": gains[main]}
