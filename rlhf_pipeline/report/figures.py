"""Tables of the figures of an evaluation, a frontier and a sweep, for pages, terminal, model cards and trackers."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_pipeline.report.files import as_dict, as_number, columns, dicts_in
from rlhf_pipeline.report.page import lasted

_FIRST = ("reward_mean", "reward_stderr", "reward_median", "positive", "kl", "perplexity", "distinct_2", "length")
_GAIN = {"mean": "gain", "low": "95 % from", "high": "95 % to"}
_REWARD = ("reward_mean", "reward_stderr", "kl")
OVER_BUDGET = "over KL budget by"
Rows = dict[str, dict[str, Any]]
Found = Mapping[str, Any]


class Table(NamedTuple):
    """Figures by row name and column key. Title, corner (the first heading) and keys are English."""

    title: str
    corner: str
    rows: Rows


def evaluation_tables(evaluation: Found) -> list[Table]:
    """Return the tables of evaluation.json: each policy by each reward, and the compared pairs."""
    others = {name: as_dict(judged) for name, judged in as_dict(evaluation.get("rewards")).items()}
    moved = {name: as_dict(row) for name, row in as_dict(evaluation.get("moved")).items()}
    own = next((row for name, row in moved.items() if name not in others), {})
    policies = {name: as_dict(row) for name, row in as_dict(evaluation.get("metrics")).items()}
    rest = {name: {key: row[key] for key in row if key not in _FIRST} | {"moved": own.get(name)}
            for name, row in policies.items()}  # fmt: skip
    judged = {
        f"{reward} · {name}": _of(row, _FIRST) | {"moved": moved.get(reward, {}).get(name)}
        for reward, found in others.items()
        for name, row in as_dict(found.get("metrics")).items()
    }
    gains = {
        f"{reward} · {pair}" if reward else pair: {_GAIN.get(key, key): value for key, value in as_dict(gain).items()}
        for reward, found in {"": evaluation, **others}.items()
        for pair, gain in as_dict(found.get("paired_gain")).items()
    }
    found = (
        Table("Before and after", "Policy", {name: _of(row, _FIRST) for name, row in policies.items()}),
        Table("Answer diversity and reward shift", "Policy", rest),
        Table("By other rewards", "Policy", judged),
        Table("Paired gain", "Pair", gains),
    )  # fmt: skip
    return [table for table in found if columns(table.rows.values())]


def frontier_tables(frontier: Found) -> list[Table]:
    """Return the tables of frontier.json: the sweep's policies, and best of n of the policies they started from."""
    starts, points = dicts_in(frontier.get("starts")), dicts_in(frontier.get("points"))
    policies = {name_of(row): _point(row) for row in points}
    best = {}
    for start in starts if points else []:
        place = f" · {start.get('path')} · {start.get('seed')}" if len(starts) > 1 else ""
        for row in dicts_in(start.get("best_of")):
            if (n := as_number(row.get("n"))) and math.log2(max(n, 1)).is_integer():
                best[f"best of {n:g}{place}"] = {**_of(row, _REWARD), **_other_rewards(row)}
    tables = Table("Policies of the sweep", "Run", policies), Table("Best of n, without training", "", best)
    return [*(table for table in tables if table.rows), *fit_tables(frontier)]


def fit_tables(found: Found) -> list[Table]:
    """Return the table of the curves fitted to each run and to best of n."""
    starts = dicts_in(found.get("starts"))
    places = {str(start.get("key")): f" · {start.get('path')} · {start.get('seed')}" for start in starts}
    rows = {}
    for fit in dicts_in(found.get("fits")):
        place = places.get(str(fit.get("start")), "") if len(places) > 1 else ""
        reward = f" · {fit['reward']}" if fit.get("reward") else ""
        form = "d (α - β d)" if fit.get("way") == "best of n" else "d (α - β log d)"
        rows[f"{fit.get('way')}{reward}{place}"] = {"form": form, **_of(fit, ("alpha", "beta", "points"))}
    return [Table("Fitted curves, d = √KL", "Curve", rows)] if rows else []


def comparison_tables(comparison: Found) -> list[Table]:
    """Return the tables of comparison.json: each algorithm's means over seeds by every reward, and gains over SFT."""
    algorithms = {name: as_dict(row) for name, row in as_dict(comparison.get("algorithms")).items()}
    figures, gains = {}, {}
    for name, row in algorithms.items():
        others = {reward: as_dict(own) for reward, own in as_dict(row.get("rewards")).items()}
        time = lasted(row.get("seconds"))
        cost = {"seeds": row.get("seeds"), "sampled_tokens": row.get("sampled_tokens"), "time": time}
        truth = {reward: own.get("reward_mean") for reward, own in others.items()}
        own_figures = {"reward_mean": row.get("reward_mean"), **truth}
        figures[name] = {**own_figures, **_of(row, ("kl", "length", "distinct_2")), **cost}
        for reward, own in {"": row, **others}.items():
            if gain := as_dict(own.get("gain")):
                gains[f"{name} · {reward}" if reward else name] = {key: gain.get(old) for old, key in _GAIN.items()}
    tables = (
        Table("Algorithms, means over seeds", "Algorithm", figures),
        Table("Paired gain over SFT, intervals over prompts and seeds", "Algorithm", gains),
    )
    return [*(table for table in tables if table.rows), *(fit_tables(comparison) if algorithms else [])]


def name_of(point: Found) -> str:
    """Name a policy of a sweep by its run and step; `result` is a final model that is not the last step's."""
    return f"{point.get('run')} · {'result' if point.get('step') is None else point['step']}"


def _other_rewards(row: Found) -> dict[str, Any]:
    """Return the mean of every other reward, such as the true reward."""
    return {str(name): as_dict(other).get("reward_mean") for name, other in as_dict(row.get("rewards")).items()}


def _point(row: Found) -> dict[str, Any]:
    gain, best = as_dict(row.get("gain")), row.get("best_of")
    return {
        **_of(row, _REWARD),
        **{_GAIN[key]: gain.get(key) for key in _GAIN},
        "as good as best of": best if best is not None else "more",
        **_other_rewards(row),
        **_of(row, ("perplexity", "distinct_2", "length")),
        "frontier": bool(row.get("frontier")),
    }


def sweep_figures(row: Found) -> dict[str, Any]:
    """Return the figures of a row of sweep.json: objective over seeds, how its jobs ended, means of their results."""
    ended = {key: row.get(key) or None for key in ("failed", "left")}
    over = {OVER_BUDGET: row["over_budget"]} if as_number(row.get("over_budget")) else {}
    whole = {"objective": row.get("objective"), "± s.e.": row.get("stderr"), "seeds": row.get("seeds")}
    return {**whole, **ended, **over, "time": lasted(row.get("seconds")), **as_dict(row.get("results"))}


def _of(row: object, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: as_dict(row)[key] for key in keys if key in as_dict(row)}
