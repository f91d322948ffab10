"""Files of human judgements. Each row shows which form it has; a bad row does not stop the others."""

import json
import logging
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf_pipeline.data import label_studio, labels
from rlhf_pipeline.data.fields import name, renamed, unread
from rlhf_pipeline.data.labels import Label, Reading
from rlhf_pipeline.data.plain_rows import Fields, RowError, read_rows
from rlhf_pipeline.data.readers import say_unread
from rlhf_pipeline.data.records import Judgement
from rlhf_pipeline.errors import UserError

_LOG = logging.getLogger("rlhf_pipeline")


@dataclass(frozen=True)
class Judged:
    """The judgements of files; the rows set aside, as rejected.jsonl has them; and how many of each kind there were."""

    judgements: list[Judgement]
    rejected: list[dict[str, Any]]
    counts: dict[str, int]


def read_judgements(
    paths: Path | Sequence[Path], columns: Mapping[str, str] | None = None, buckets: Sequence[str] | None = None,
    untouched_seconds: float = 5.0,
) -> Judged:  # fmt: skip
    """Judgements of answers: pairs, ranked lists, a sheet, or an export of Label Studio.

    `buckets` names a Ranker's buckets, best first. An annotation submitted as shown in less than `untouched_seconds` is
    set aside. If someone judges the same answers twice, the later judgement wins, also across files. Several sheets
    count as one annotator each, unless they name theirs. A file without any judgement is an error.
    """
    if buckets is not None and (len(buckets) < 2 or len(set(buckets)) < len(buckets)):
        raise UserError(f"data.buckets is {buckets}; it takes two or more different names, best first.")
    ours = {key: theirs for key, theirs in (columns or {}).items() if key != "label"}
    found: list[Label] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        unnamed = None if isinstance(paths, Path) else str(path)
        reading = Reading(ours, (columns or {}).get("label"), buckets, untouched_seconds, unnamed)
        found += _file(path, reading)
    return _judged(found)


def _file(path: Path, reading: Reading) -> list[Label]:
    found = [
        replace(label, file=str(path), where=where) for where, row in read_rows(path) for label in _row(row, reading)
    ]
    held = _judged(found)
    said = ", ".join(f"{count} {kind}" for kind, count in held.counts.items())
    first = {row["why"]: row["where"] for row in reversed(held.rejected)}
    for why, count in Counter(row["why"] for row in held.rejected).most_common(3):
        said += f"; {first[why]}: {why}" + (f" ({count} such rows)" if count > 1 else "")
    if not held.judgements:
        raise UserError(f"{path} holds no usable label: {said}.")
    if held.rejected:
        _LOG.warning("%s: %s", path, said)
    say_unread(path, Counter(key for label in found for key in unread(label.row)), len(found))
    return found


def _row(row: Fields | RowError, reading: Reading) -> list[Label]:
    """The labels of a row; a row that cannot be used is rejected, and the others are read."""
    held: Fields = row.args[1] if isinstance(row, RowError) else row
    try:
        if isinstance(row, RowError):
            raise row
        if label_studio.is_task(row):
            return label_studio.of_task(row, reading)
        row = renamed(row, reading.columns)
        if "annotation_id" in row:
            return [label_studio.of_annotation(row, reading)]
        return labels.of_row(row, reading.unnamed)
    except RowError as fault:
        return [Label("rejected", held, name(held.get("task")), name(held.get("annotator")), why=fault.args[0])]
    except RecursionError:
        return [Label("rejected", {}, why="lists in lists, too deep to be read")]


def _judged(found: Sequence[Label]) -> Judged:
    last: dict[Hashable, int] = {}  # by key, the place of the latest label
    for place, label in enumerate(found):
        if label.key and (label.key not in last or found[last[label.key]].when <= label.when):
            last[label.key] = place
    newest = [label for place, label in enumerate(found) if last.get(label.key, place) == place]
    kinds = Counter(label.kind for label in newest)
    counts = {
        "tasks": len({label.task or (label.file, label.where) for label in found}),
        "judgements": kinds["judged"],
        "skipped": kinds["skipped"],
        "unlabelled": kinds["unlabelled"],
        "superseded": len(found) - len(newest),
        "rejected": kinds["rejected"],
    }
    judgements = [label.judgement for label in newest if label.judgement]
    return Judged(judgements, [_set_aside(label) for label in newest if label.kind == "rejected"], counts)


def _set_aside(label: Label) -> dict[str, Any]:
    """A row of rejected.jsonl, in values that JSON and in characters that UTF-8 can hold."""
    about = {key: getattr(label, key) for key in ("file", "where", "task", "annotator", "why")}
    try:
        text = json.dumps({**about, "row": label.row}, ensure_ascii=False, default=str)
        return dict(json.loads(text.encode(errors="replace"), parse_constant=str))
    except (RecursionError, ValueError):
        return {**about, "row": {}}
