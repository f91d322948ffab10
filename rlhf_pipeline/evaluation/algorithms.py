"""Algorithms compared: the policies in frontier.json as means over seeds, with gains over where all started."""

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from rlhf_pipeline.evaluation.frontier import fits
from rlhf_pipeline.evaluation.metrics import paired_gain

Row = dict[str, Any]
_MEANS = ("reward_mean", "kl", "length", "distinct_2")


def over_seeds(
    start: Row, points: Sequence[Row], runs: Mapping[str, Mapping[str, Row]], draws: int, seed: int
) -> dict[str, Any]:
    """The figures of comparison.json.

    `runs` are what each run of an algorithm cost, by the run's name. A gain is over the answers of `start`; its 95 %
    interval, of `draws` resamplings, is over prompts and seeds. `points` become the means over seeds at each step.
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
    return {"algorithms": algorithms, "starts": [start], "points": curves, "fits": fits([start], curves)}


def _means(rows: Sequence[Row]) -> Row:
    """The means of policies that differ in their seed alone."""
    rewards = {name: {"reward_mean": fmean(row["rewards"][name]["reward_mean"] for row in rows)}
               for name in rows[0]["rewards"]}  # fmt: skip
    return {**{key: fmean(row[key] for row in rows) for key in _MEANS}, "rewards": rewards}


def _judged(start: Row, rows: Sequence[Row], draws: int, seed: int) -> Row:
    """The means, with the gain by each reward; the main one is first among the values."""
    found, (main, *others) = _means(rows), start["values"]
    gains = {
        name: paired_gain(start["values"][name], [row["values"][name] for row in rows], draws, seed)
        for name in (main, *others)
    }
    for name in others:
        found["rewards"][name]["gain"] = gains[name]
    return {**found, "gain": gains[main]}
