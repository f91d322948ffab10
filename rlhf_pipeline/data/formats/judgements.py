"""Files of human judgements. Each row shows which form it has; a bad row does not stop the others."""

import json
import logging
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_pipeline.data.formats import label_studio, preferences
from rlhf_pipeline.data.formats.files import RowError, read_rows
from rlhf_pipeline.data.formats.preferences import Given, name
from rlhf_pipeline.data.formats.row import Columns, Row, renamed, say_unread
from rlhf_pipeline.data.records import Judgement
from rlhf_pipeline.errors import UserError

_LOG = logging.getLogger("rlhf_pipeline")
_PAIR = ("chosen", "rejected", "rejected_response", "winner")
_ALLOWED = (
    "allowed are prompt, chosen, rejected; prompt, responses; a sheet's prompt, answer1, rank1, ..; exports of Label "
    "Studio; data.columns={chosen: ..} says what they are called here"
)


@dataclass(frozen=True)
class Judged:
    """The judgements of files; the rows set aside, as rejected.jsonl has them; and how many of each kind there were."""

    judgements: list[Judgement]
    rejected: list[dict[str, Any]]
    counts: dict[str, int]


def read_judgements(
    paths: Path | Sequence[Path], columns: Columns | None = None, buckets: Sequence[str] | None = None,
    untouched_seconds: float = 5.0,
) -> Judged:  # fmt: skip
    """Judgements of answers: pairs, ranked lists, a sheet, or an export of Label Studio.

    `buckets` names a Ranker's buckets, best first. An annotation submitted as shown in less than `untouched_seconds` is
    set aside. If someone judges the same answers twice, the later judgement wins, also across files. Several sheets
    count as one annotator each, unless they name theirs. A file without any judgement is an error.
    """
    if buckets is not None and (len(buckets) < 2 or len(set(buckets)) < len(buckets)):
        raise UserError(f"data.buckets is {buckets}; it takes two or more different names, best first.")
    reading = label_studio.Reading(columns or {}, buckets, untouched_seconds)
    if isinstance(paths, Path):
        return _judged(_file(paths, reading))
    return _judged([_signed(found) for path in paths for found in _file(path, reading)])


def _file(path: Path, reading: label_studio.Reading) -> list[Given]:
    """All annotations of a file, in the order of its lines."""
    faults: list[RowError] = []
    given = [found for number, fields in read_rows(path, faults) for found in _row(path, number, fields, reading)]
    given += [_rejected(Row(path, f.number, f.row, ""), f.why) for f in faults]
    given.sort(key=lambda found: found.row.number)
    held = _judged(given)
    said = ", ".join(f"{count} {kind}" for kind, count in held.counts.items())
    if not held.judgements:
        raise UserError(f"{path} holds no usable label: {said}{_reasons(held.rejected)}.")
    if held.rejected:
        _LOG.warning("%s: %s%s", path, said, _reasons(held.rejected))
    say_unread(path, Counter(name for found in given for name in found.row.unread), len(given))
    return given


def _signed(found: Given) -> Given:
    if found.judgement is None or found.annotator is not None or not preferences.is_sheet(found.row):
        return found
    who = str(found.row.path)
    return replace(found, annotator=who, judgement=replace(found.judgement, annotator=who))


def _judged(given: Sequence[Given]) -> Judged:
    counted = _newest(given)
    kinds = Counter(found.kind for found in counted)
    counts = {
        "tasks": len({found.task or (found.row.path, found.row.number) for found in given}),
        "judgements": kinds["judged"],
        "skipped": kinds["skipped"],
        "unlabelled": kinds["unlabelled"],
        "superseded": len(given) - len(counted),
        "rejected": kinds["rejected"],
    }
    rejected = [_set_aside(found) for found in counted if found.kind == "rejected"]
    judgements = [found.judgement for found in counted if found.judgement is not None]
    return Judged(judgements, rejected, counts)


def _row(path: Path, number: int, fields: dict[str, Any], reading: label_studio.Reading) -> Iterator[Given]:
    """The annotations of a row; an error sets aside this row alone."""
    row = Row(path, number, fields, "")
    try:
        yield from _read(row, reading)
    except RowError as fault:
        yield _rejected(row, fault.why)
    except RecursionError:
        yield _rejected(row, "lists in lists, too deep to be read")


def _read(row: Row, reading: label_studio.Reading) -> list[Given]:
    if label_studio.is_task(row):
        return list(label_studio.read_task(row, reading))
    row = renamed(row, reading.names)
    if row.has("annotation_id"):
        return [label_studio.read_annotation(row, reading)]
    if preferences.is_sheet(row):
        found = preferences.sheet(row)
        return [found] if found else []
    if row.has("responses") or row.has("ranked"):
        needs = "a ranking row needs prompt and responses, best first or with ranks"
        return [preferences.ranking(replace(row, needs=needs))]
    if not any(map(row.has, _PAIR)) and label_studio.is_annotation(row):
        return [label_studio.read_annotation(row, reading)]
    if not any(map(row.has, (*_PAIR, "selected"))):
        raise row.error(f"no label among the columns {', '.join(row.fields)[:200] or '(none)'}; {_ALLOWED}")
    return [preferences.pair(replace(row, needs="a preference row needs prompt, chosen, rejected"))]


def _rejected(row: Row, why: str) -> Given:
    return Given(
        "rejected", row, why=why, task=name(row.fields.get("task")), annotator=name(row.fields.get("annotator"))
    )


def _newest(given: Sequence[Given]) -> list[Given]:
    """The annotations without those that the same person replaced later."""
    last: dict[Hashable, int] = {}
    for place, found in enumerate(given):
        if found.key is not None and (found.key not in last or given[last[found.key]].when <= found.when):
            last[found.key] = place
    return [found for place, found in enumerate(given) if found.key is None or last[found.key] == place]


def _set_aside(found: Given) -> dict[str, Any]:
    """A row of rejected.jsonl, in values that JSON and in characters that UTF-8 can hold."""
    about = {"file": str(found.row.path), "line": found.row.number, "task": found.task, "annotator": found.annotator}
    try:
        text = json.dumps([about, found.why, found.row.fields], ensure_ascii=False, default=str)
        about, why, row = json.loads(text.encode(errors="replace"), parse_constant=str)
    except (RecursionError, ValueError):
        about, why, row = about, found.why, {}
    return {**about, "why": why, "row": row}


def _reasons(rejected: Sequence[dict[str, Any]], count: int = 3) -> str:
    """The commonest reasons, each with its first line."""
    first: dict[str, int] = {}
    for row in rejected:
        first.setdefault(row["why"], row["line"])
    often = Counter(row["why"] for row in rejected).most_common(count)
    parts = [f"line {first[why]}: {why}" + (f" ({times} such rows)" if times > 1 else "") for why, times in often]
    more = f"; and {len(first) - count} more reasons" if len(first) > count else ""
    return ("; " + "; ".join(parts) + more) if parts else ""
