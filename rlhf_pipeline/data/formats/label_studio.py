"""Label Studio's exports: JSON (tasks with annotations), and JSON_MIN, CSV and TSV (an annotation a row).

Answers are compared by its tags Pairwise ("left" or "right") and Ranker (one list, or lists in buckets). Predictions
and drafts are no labels.
"""

import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any, TypeGuard

from rlhf_pipeline.data.formats.files import RowError
from rlhf_pipeline.data.formats.preferences import Given, judged, name, person
from rlhf_pipeline.data.formats.row import Columns, Row, decoded, number, renamed
from rlhf_pipeline.data.records import Judgement, Prompt

_UNSORTED = "_"  # a Ranker with buckets has what was left where it was under this name
# Names of buckets that speak for themselves, best first.
_BUCKETS = (
    ("best",),
    ("better", "good", "preferred", "chosen", "accepted", "relevant"),
    (_UNSORTED, "neutral"),
    ("worse", "bad", "rejected", "irrelevant"),
    ("worst",),
)
_LEVELS = {known: level for level, names in enumerate(_BUCKETS) for known in names}
_STEMS = ("answer", "response", "completion", "output", "text")
_SIDES = (
    *((f"{stem}{gap}{first}", f"{stem}{gap}{second}")
      for stem in _STEMS for gap in ("", "_") for first, second in ("12", "ab")),
    ("left", "right"),
    ("a", "b"),
)  # fmt: skip
_ANSWER = re.compile(rf"(?:{'|'.join(_STEMS)})_?(?:[0-9]+|[a-z])")
_PROMPTS = ("prompt", "instruction", "question", "query", "input", "context", "messages", "conversation", "dialogue")
_SHOWN = {*_PROMPTS, *itertools.chain(*_SIDES)}
# What the exports with an annotation a row write beside the data and the label; `task` is our own.
_ABOUT = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "history", "task")
_NO_COMPARISON = ("rating", "choices", "taxonomy", "number", "labels")  # results of other tags


@dataclass(frozen=True, slots=True)
class Reading:
    """How labels are read: names in the data, the order of buckets, and how long it takes at least to judge."""

    columns: Columns
    buckets: Sequence[str] | None
    untouched_seconds: float

    @property
    def names(self) -> Columns:
        """The file's names of columns, but for the control that is the label."""
        return {ours: theirs for ours, theirs in self.columns.items() if ours != "label"}


@dataclass(frozen=True, slots=True)
class _Value:
    """What one control holds, and where it came from: {"selected": "left"}, or {"ranker": ids}."""

    control: str
    raw: Mapping[str, Any]
    origin: str = ""


def is_task(row: Row) -> bool:
    """Whether a row is a task, as Label Studio imports and exports it."""
    return row.has("annotations") or row.has("completions") or isinstance(row.fields.get("data"), dict)


def is_annotation(row: Row) -> bool:
    """Whether a row is an annotation, with its task's data beside it."""
    return row.has("annotation_id") or _sides(row) is not None or _items(row) is not None


def read_task(row: Row, reading: Reading) -> Iterator[Given]:
    """Every annotation of a task."""
    given, data = row.fields.get("annotations", row.fields.get("completions")), row.fields.get("data")
    task = (name(data.get("task")) if isinstance(data, dict) else None) or name(row.fields.get("id"))
    if given is None or given == []:
        yield Given("unlabelled", row, task=task)
    elif not isinstance(given, list) or not isinstance(data, dict):
        yield Given("rejected", row, why="a task needs a list of annotations and an object as data", task=task)
    else:
        for annotation in given:
            # What is set aside is the task with this annotation alone: once mended, it can be read again.
            alone = row.of({**row.fields, "annotations": [annotation]})
            if isinstance(annotation, dict):
                yield _annotation(alone, annotation, row.of(data), task, reading)
            else:
                yield Given("rejected", alone, why="an annotation is not an object", task=task)


def _annotation(row: Row, annotation: dict[str, Any], data: Row, task: str | None, reading: Reading) -> Given:
    about = {**annotation, "predictions": row.fields.get("predictions")}

    def read() -> tuple[Row, _Value]:
        fields = renamed(data, reading.names)
        values = _values(fields, annotation.get("result"))
        results = {str(n): part.get("value") for n, part in enumerate(annotation["result"]) if isinstance(part, dict)}
        return fields, _chosen(fields, values, reading, results)

    found = _given(row, data, about, task, person(annotation.get("completed_by")), reading, read)
    skipped = any(annotation.get(word) for word in ("was_cancelled", "was_skipped", "skipped"))
    return replace(found, kind="skipped", judgement=None, why=None) if skipped else found


def read_annotation(row: Row, reading: Reading) -> Given:
    """The annotation that a row of JSON_MIN, CSV or TSV holds; `row` has our names of columns."""
    fields = row.fields
    task, who = name(fields.get("task")) or name(fields.get("id")), person(decoded(fields.get("annotator")))
    values = _column_values(row)
    if not values and not name(fields.get("annotation_id")):
        return Given("unlabelled", row, task=task)

    def read() -> tuple[Row, _Value]:
        cells = {key: cell for key, cell in fields.items() if key not in (*_ABOUT, *_PROMPTS, *(_sides(row) or ()))}
        value = _chosen(row, values, reading, cells)
        aside = f"_data_{value.control}"  # the data's column of the control's name
        own = {key: cell for key, cell in fields.items() if key not in (value.control, aside)}
        return row.of({**own, value.control: fields[aside]} if aside in fields else own), value

    about = {key: fields.get(key) for key in ("updated_at", "created_at", "lead_time")}
    return _given(row, row, about, task, who, reading, read)


def _given(
    row: Row, data: Row, about: Mapping[str, Any], task: str | None, who: str | None, reading: Reading,
    read: Callable[[], tuple[Row, _Value]],
) -> Given:  # fmt: skip
    """The annotation whose data and label `read` returns; a RowError sets the row aside."""
    known = name(row.fields.get("id")) or task  # the data's own `task` may be a kind of work
    # A hash of the prompt and the answers is part of the key: every server counts its tasks and its people from 1.
    own = reading.names.values()
    cells = sorted(
        (k, repr(cell)) for k, cell in data.fields.items() if k in own or k in _SHOWN or _ANSWER.fullmatch(k)
    )
    key = (known, who, hash(repr((cells, _items(data))))) if known and who else None
    try:
        fields, value = read()
        judgement = _judgement(fields, value, task, who, reading)
        _check_touched(fields, value, about, reading)
    except RowError as fault:
        return Given("rejected", row, None, fault.why, task, who, key, _date(about))
    return Given("judged", row, judgement, None, task, who, key, _date(about))


def _date(fields: Mapping[str, Any]) -> str:
    """When it was last changed, in one form: Label Studio leaves out a fraction of 0, and others write zones."""
    found = str(fields.get("updated_at") or fields.get("created_at") or "")
    try:
        when = datetime.fromisoformat(found)
        return when.astimezone(UTC).isoformat(timespec="microseconds")
    except (ValueError, OverflowError):
        return found


def _values(row: Row, result: Any) -> list[_Value]:
    """What the two tags wrote among an annotation's results."""
    if not isinstance(result, list):
        raise row.error("'result' is not a list")
    found = []
    for part in result:
        held = part.get("value") if isinstance(part, dict) else None
        if _is_value(held):
            found.append(_Value(str(name(part.get("from_name"))), held, str(name(part.get("origin")))))
    return found


def _is_value(held: Any) -> TypeGuard[dict[str, Any]]:
    return isinstance(held, dict) and ("selected" in held or "ranker" in held)


def _column_values(row: Row) -> list[_Value]:
    """Columns, by whatever name, that hold what the two tags write: in full, else in short."""
    cells = {key: decoded(cell) for key, cell in row.fields.items() if key not in _ABOUT}
    lists = [(key, cell if isinstance(cell, list) else [cell]) for key, cell in cells.items()]
    full = [_Value(key, held) for key, cell in lists for held in cell if _is_value(held)]
    if full:
        return full
    taken, items = {*_PROMPTS, *(_sides(row) or ())}, _items(row) or {}
    free = {key: cell for key, cell in cells.items() if key not in taken}
    sides = [_Value(key, {"selected": cell}) for key, cell in free.items() if cell in ("left", "right")]
    return sides or [_Value(key, {"ranker": cell}) for key, cell in free.items() if _are_ids(cell, items)]


def _are_ids(cell: Any, items: Mapping[str, Any]) -> bool:
    lists = list(cell.values()) if isinstance(cell, dict) else [cell]
    ids = [name(item) for ids in lists if isinstance(ids, list) for item in ids]
    return bool(ids) and all(item in items for item in ids)


def _chosen(row: Row, values: Sequence[_Value], reading: Reading, results: Mapping[str, Any]) -> _Value:
    """The one value that is the label; `results` are those of all tags, or the columns where these may be."""
    label = reading.columns.get("label")
    wanted = [value for value in values if label in (None, value.control)]
    if not values:
        _check_results(row, results)
    if not wanted:
        raise row.error("nothing selected" if label is None else f"nothing selected by '{label}' (data.columns.label)")
    if len(wanted) > 1:
        controls = ", ".join(sorted({value.control for value in wanted}))
        raise row.error(f"{len(wanted)} labels in one, by {controls}; data.columns.label=NAME says which one counts")
    return wanted[0]


def _check_results(row: Row, results: Mapping[str, Any]) -> None:
    """Name the results that there are, if none is a comparison."""
    cells = {key: decoded(cell) for key, cell in results.items()}
    lists = [cell if isinstance(cell, list) else [cell] for cell in cells.values()]
    held = {kind for cells in lists for part in cells if isinstance(part, dict) for kind in part}
    if kinds := [kind.capitalize() for kind in _NO_COMPARISON if kind in held]:
        raise row.error(f"the results are of {', '.join(kinds)}; a comparison takes the tag Pairwise or Ranker")
    texts = [key for key, cell in cells.items() if isinstance(cell, str) and cell.strip()]
    if texts := [key for key in texts if not _ANSWER.fullmatch(key)]:
        raise row.error(f"nothing selected by Pairwise or Ranker; other columns are {', '.join(texts)[:200]}")


def _judgement(row: Row, value: _Value, task: str | None, who: str | None, reading: Reading) -> Judgement:
    prompt = _prompt(row)
    if "selected" in value.raw:
        side, sides = value.raw["selected"], _sides(row)
        if side not in ("left", "right"):
            raise row.error("'selected' is neither left nor right")
        if sides is None:
            raise row.error(
                "no answers such as answer1 and answer2; data.columns={answer1: .., answer2: ..} names them"
            )
        answers = [row.given(key) for key in sides]
        return judged(row, prompt, answers, (1, 2) if side == "left" else (2, 1), task=task, annotator=who)
    places, items = _places(row, value, reading), _items(row) or {}
    shown = sorted(places, key=list(items).index) if set(places) <= set(items) else list(places)
    texts = [_text(row, items, item) for item in shown]
    return judged(row, prompt, texts, [places[item] for item in shown], task=task, annotator=who)


def _places(row: Row, value: _Value, reading: Reading) -> dict[str, int]:
    """The rank of every item that has one by its id, in the order of the ranking."""
    order = _order(value, reading)
    lists = _buckets(row, value.raw["ranker"], reading) if order is None else [[item] for item in order]
    found: dict[str, int] = {}
    for place, ids in enumerate(lists, start=1):
        for item in ids:
            known = name(item)
            if known is None:
                raise row.error("'ranker' holds what is no id")
            if known in found:
                raise row.error(f"'{known[:40]}' is ranked twice")
            found[known] = place
    return found


def _order(value: _Value, reading: Reading) -> list[Any] | None:
    """The ids of a ranker without buckets: a list, alone or as the only one under whatever name is no bucket's."""
    ranker = value.raw["ranker"]
    if isinstance(ranker, dict) and len(ranker) == 1 and reading.buckets is None:
        ((only, ids),) = ranker.items()
        # With buckets, those that are empty are written too: what is unsorted does not stand alone.
        if only in (value.control, _UNSORTED) or only.strip().lower() not in _LEVELS:
            return ids if isinstance(ids, list) else None
    return ranker if isinstance(ranker, list) else None


def _buckets(row: Row, ranker: Any, reading: Reading) -> list[list[Any]]:
    """The lists of a ranker with buckets, best first."""
    if not isinstance(ranker, dict) or not all(isinstance(ids, list) for ids in ranker.values()):
        raise row.error("'ranker' is neither a list of ids nor lists of ids by name")
    if not any(ids for key, ids in ranker.items() if key != _UNSORTED):
        raise row.error("nothing selected: all is left unsorted")
    if reading.buckets is None:
        levels = {key: _LEVELS.get(key.strip().lower()) for key in ranker}
    else:
        order = list(reading.buckets)
        # What is left unsorted has no place in an order of one's own, unless that gives it one.
        ranker = {key: ids for key, ids in ranker.items() if key != _UNSORTED or key in order}
        levels = {key: order.index(key) if key in order else None for key in ranker}
    known = {level: key for key, level in levels.items() if level is not None}
    if len(known) < len(ranker):
        names = ", ".join(key[:40] for key in ranker)
        raise row.error(f"no order is known of the buckets {names}; say data.buckets=[..], best first")
    return [ranker[known[level]] for level in sorted(known)]


def _check_touched(row: Row, value: _Value, annotation: Mapping[str, Any], reading: Reading) -> None:
    """Refuse an annotation submitted unchanged in less time than it takes to judge. An unknown time is accepted."""
    seconds = number(annotation.get("lead_time"))
    if seconds is None or seconds >= reading.untouched_seconds:
        return
    parent, ranked = annotation.get("parent_prediction"), "selected" not in value.raw
    if parent is not None or value.origin.startswith("prediction"):
        before = _predicted(row, value, annotation)
        if before is None:
            same = value.origin == "prediction"
        elif ranked:
            same = "ranker" in before.raw and _places(row, before, reading) == _places(row, value, reading)
        else:
            same = before.raw.get("selected") == value.raw["selected"]
    else:
        in_order = ranked and _order(value, reading) is not None
        same = in_order and list(_places(row, value, reading)) == list(_items(row) or {})
    if same:
        what = "the order as shown" if ranked else "the prediction as it stood"
        raise row.error(f"untouched: {what}, after {seconds:.1f} s")


def _predicted(row: Row, value: _Value, annotation: Mapping[str, Any]) -> _Value | None:
    """The value that a known prediction had put in the control."""
    parent, listed = annotation.get("parent_prediction"), annotation.get("predictions")
    known = [annotation.get("prediction"), *(listed if isinstance(listed, list) else [])]
    for prediction in known:
        if isinstance(prediction, dict) and isinstance(prediction.get("result"), list):
            held = [v for v in _values(row, prediction["result"]) if v.control == value.control]
            if held and parent in (None, prediction.get("id")):
                return held[0]
    return None


def _sides(row: Row) -> tuple[str, str] | None:
    return next((sides for sides in _SIDES if row.has(*sides)), None)


def _items(row: Row) -> dict[str, Any] | None:
    """The objects of a list by their ids, as they are shown; one whose id is not its own is None."""
    for key in sorted(row.fields, key=lambda key: key != "items"):
        cell = None if key in _PROMPTS or key in _ABOUT else decoded(row.fields[key])
        if isinstance(cell, list) and cell and all(isinstance(item, dict) and "id" in item for item in cell):
            found: dict[str, Any] = {}
            for item in cell:
                known = str(name(item["id"]))
                found[known] = None if known in found else item
            return found
    return None


def _text(row: Row, items: Mapping[str, Any], item: str) -> str:
    held = items.get(item) or {}
    found = [*map(held.get, ("body", "html", "title")), row.fields.get(item)]
    texts = [text for text in found if isinstance(text, str)]
    if not texts:
        known = ", ".join(items) or ", ".join(row.fields)
        raise row.error(f"'{item[:40]}' is the id of no answer, or of two; there are {known[:200]}")
    return texts[0]


def _prompt(row: Row) -> Prompt:
    key = next((key for key in _PROMPTS if row.has(key)), None)
    if key is not None:
        cell = decoded(row.fields[key])
        if isinstance(cell, list) and cell and isinstance(cell[0], dict):
            return row.of({key: cell}).turns(key)
        return row.text(key)
    answers = {*(_sides(row) or ()), *(_items(row) or {}), *_ABOUT}
    others = [key for key, cell in row.fields.items() if isinstance(cell, str) and key not in answers]
    others = [key for key in others if not _ANSWER.fullmatch(key) and not isinstance(decoded(row.fields[key]), list)]
    if others:
        raise row.error(f"no prompt among {', '.join(others)[:200]}; data.columns={{prompt: ..}} names it")
    return ""
