"""The rows of an evaluation, which the terminal and the pages both show."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rlhf_pipeline.report.files import members

_FIRST = ("reward_mean", "reward_stderr", "reward_median", "positive", "kl", "perplexity", "distinct_2", "length")
_GAIN = {"mean": "gain", "low": "95 % from", "high": "95 % to"}


class Table(NamedTuple):
    """A table of figures by row name and column key."""

    title: str
    corner: str
    rows: dict[str, dict[str, Any]]


def evaluation_tables(evaluation: Mapping[str, Any]) -> list[Table]:
    """What evaluation.json holds of each policy by each reward, and of the pairs that were compared."""
    others = {name: members(judged) for name, judged in members(evaluation.get("rewards")).items()}
    moved = {name: members(row) for name, row in members(evaluation.get("moved")).items()}
    own = next((row for name, row in moved.items() if name not in others), {})
    policies = {name: members(row) for name, row in members(evaluation.get("metrics")).items()}
    first = {name: _ordered(row) for name, row in policies.items()}
    rest = {name: {key: value for key, value in row.items() if key not in _FIRST} for name, row in policies.items()}
    rest = {name: row | ({"moved": own[name]} if name in own else {}) for name, row in rest.items()}
    judged = {
        f"{reward} · {name}": _ordered(members(row)) | {"moved": moved.get(reward, {}).get(name)}
        for reward, found in others.items()
        for name, row in members(found.get("metrics")).items()
    }
    gains = {
        f"{reward} · {pair}" if reward else pair: {_GAIN.get(key, key): value for key, value in members(gain).items()}
        for reward, found in {"": evaluation, **others}.items()
        for pair, gain in members(found.get("paired_gain")).items()
    }
    found = (
        Table("Before and after", "Policy", first),
        Table("The answers' texts, and how far their reward moved", "Policy", rest),
        Table("By other rewards", "Policy", judged),
        Table("Paired gain", "Pair", gains),
    )
    return [table for table in found if any(table.rows.values())]


def _ordered(row: Mapping[str, Any]) -> dict[str, Any]:
    return {key: row[key] for key in _FIRST if key in row}
