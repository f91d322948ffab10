"""Label Studio's exports: JSON (tasks with annotations), and JSON_MIN, CSV and TSV (an annotation a row).

Answers are compared by its tags Pairwise ("left" or "right") and Ranker (one list, or lists in buckets). Predictions
and drafts are no labels.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from rlhf_pipeline.data import fields
from rlhf_pipeline.data.labels import Label, Reading, judged
from rlhf_pipeline.data.plain_rows import Fields, RowError
from rlhf_pipeline.data.records import Prompt

_UNSORTED = "_"  # the answers that were put into no bucket
_BUCKETS = ("best", "better", "good", _UNSORTED, "neutral", "bad", "worse", "worst")  # unless data.buckets= says
_STEMS = ("answer", "response", "completion", "output", "text")
_SIDES = [(f"{stem}{gap}{a}", f"{stem}{gap}{b}") for stem in _STEMS for gap in ("", "_") for a, b in ("12", "ab")]
_SIDES += [("left", "right"), ("a", "b")]
_PROMPTS = ("prompt", "instruction", "question", "query", "input", "context", "messages", "conversation", "dialogue")
# Columns that JSON_MIN, CSV and TSV add to the data and the label; `task` is our own.
_ABOUT = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "history", "task")
_OTHERS = ("rating", "choices", "taxonomy", "number", "labels")  # what other tags write


class _Value(NamedTuple):
    """What a control holds: {"selected": "left"}, {"ranker": ids}, or what another tag writes."""

    control: str
    held: Fields
    origin: str

    @property
    def compares(self) -> bool:
        return "selected" in self.held or "ranker" in self.held


def is_task(row: Fields) -> bool:
    return "annotations" in row or isinstance(row.get("data"), dict)


def of_task(row: Fields, reading: Reading) -> list[Label]:
    """Every annotation of a task."""
    data: Fields = fields.value_of(row, "data", dict)
    if not fields.holds(row, "annotations"):
        return [Label("unlabelled", row, _task(row, data))]
    notes = fields.value_of(row, "annotations", list)
    # A label's row is the task with this annotation alone: if it is set aside, it can be mended and read again.
    return [_label({**row, "annotations": [note]}, data, note, reading) for note in notes if isinstance(note, dict)]


def of_annotation(row: Fields, reading: Reading) -> Label:
    """The annotation that a row of JSON_MIN, CSV or TSV holds, with its task's data beside it."""
    if not fields.holds(row, "annotation_id"):
        return Label("unlabelled", row, _task(row, row))
    cells = {key: fields.decoded(cell) for key, cell in row.items() if key not in _ABOUT}
    results = [
        {"from_name": key, "value": part}
        for key, cell in cells.items()
        for part in (cell if isinstance(cell, list) else [cell])
        if isinstance(part, dict) and any(kind in part for kind in ("selected", "ranker", *_OTHERS))
    ]
    data = {key: cell for key, cell in row.items() if key not in [result["from_name"] for result in results]}
    return _label(row, data, {**row, "result": results, "completed_by": fields.decoded(row.get("annotator"))}, reading)


def _task(row: Fields, data: Fields) -> str | None:
    return fields.name(data.get("task")) or fields.name(row.get("id"))


def _label(row: Fields, data: Fields, note: Fields, reading: Reading) -> Label:
    """The label of an annotation. `note` has its results, its author and its time; `data` has the answers."""
    by, task = note.get("completed_by"), _task(row, data)
    who = fields.name((by.get("email") or by.get("id")) if isinstance(by, dict) else by)
    # All times are UTC; a fraction of 0 is left out.
    when = str(note.get("updated_at") or note.get("created_at") or "").removesuffix("Z")
    found = Label("skipped", row, task, who, when=when)
    try:
        data = fields.renamed(data, reading.columns)
        sides: Sequence[str] = next((sides for sides in _SIDES if all(side in data for side in sides)), ())
        items = _items(data)
        prompt = _prompt(data, {*sides, *items, *_ABOUT})
        if who and (known := fields.name(row.get("id")) or task):
            # Every server counts its tasks and its people from 1, so the answers are part of the key.
            found = replace(found, key=(known, who, prompt, repr((items, [data[side] for side in sides]))))
        if note.get("was_cancelled"):
            return found
        value = _chosen(note, reading.label)
        lists = _lists(value.held, sides, reading.buckets)
        ranks = {item: place for place, tied in enumerate(lists, start=1) for item in tied}
        if len(ranks) < sum(map(len, lists)):
            raise RowError("an answer is ranked twice")
        listed = {side: data[side] for side in sides} if "selected" in value.held else items
        shown = [item for item in listed if item in ranks] + [item for item in ranks if item not in listed]
        answers = [_answer(listed.get(item, data.get(item)), item) for item in shown]
        judgement = judged(prompt, answers, [ranks[item] for item in shown], task, who)
        seconds = fields.number(note.get("lead_time"))
        as_shown = "ranker" in value.held and lists == [[item] for item in items]
        if seconds is not None and seconds < reading.untouched_seconds and (as_shown or value.origin == "prediction"):
            what = "the order as shown" if as_shown else "the prediction as it stood"
            raise RowError(f"untouched: {what}, after {seconds:.1f} s")
    except RowError as fault:
        return replace(found, kind="rejected", why=fault.args[0])
    return replace(found, kind="judged", judgement=judgement)


def _chosen(note: Fields, label: str | None) -> _Value:
    """The one value that is the label."""
    values = [
        _Value(str(part.get("from_name")), part["value"], str(part.get("origin")))
        for part in fields.value_of(note, "result", list)
        if isinstance(part, dict) and isinstance(part.get("value"), dict)
    ]
    found = [value for value in values if value.compares and label in (None, value.control)]
    if len(found) > 1:
        controls = ", ".join(sorted({value.control for value in found}))
        raise RowError(f"{len(found)} labels in one, by {controls}; data.columns.label=NAME says which one counts")
    if found:
        return found[0]
    if others := [kind.capitalize() for kind in _OTHERS if any(kind in value.held for value in values)]:
        raise RowError(f"the results are of {', '.join(others)}; a comparison takes the tag Pairwise or Ranker")
    raise RowError("nothing selected" + (f" by '{label}' (data.columns.label)" if label else ""))


def _lists(held: Fields, sides: Sequence[str], buckets: Sequence[str] | None) -> list[list[str]]:
    """The names of the answers, best first; those that tie together."""
    if "selected" in held:
        if held["selected"] not in ("left", "right"):
            raise RowError("'selected' is neither left nor right")
        if not sides:
            raise RowError("no answers such as answer1 and answer2; data.columns={answer1: .., answer2: ..} names them")
        return [[side] for side in (sides if held["selected"] == "left" else reversed(sides))]
    ranker = held["ranker"]
    # A Ranker with buckets writes empty ones too, so a single list is one without buckets.
    if isinstance(ranker, dict) and len(ranker) == 1 and not buckets:
        (ranker,) = ranker.values()
    if isinstance(ranker, list):
        return [[str(item)] for item in ranker]
    if not isinstance(ranker, dict) or not all(isinstance(items, list) for items in ranker.values()):
        raise RowError("'ranker' is neither a list of ids nor lists of ids by name")
    if not any(items for bucket, items in ranker.items() if bucket != _UNSORTED):
        raise RowError("nothing selected: all is left unsorted")
    order = [bucket.lower() for bucket in buckets or _BUCKETS]
    named = {bucket.strip().lower(): items for bucket, items in ranker.items()}
    if len(named) < len(ranker):
        raise RowError("a bucket occurs twice")
    if not set(named) <= {*order, _UNSORTED}:
        names = ", ".join(bucket[:40] for bucket in ranker)
        raise RowError(f"no order is known of the buckets {names}; say data.buckets=[..], best first")
    # Unsorted answers get no rank from data.buckets=, unless it names '_'.
    return [[str(item) for item in named[bucket]] for bucket in order if bucket in named]


def _items(data: Fields) -> Fields:
    """The objects of a list by their ids, as they are shown."""
    for key in sorted(data, key=lambda key: key != "items"):
        cell = None if key in _PROMPTS or key in _ABOUT else fields.decoded(data[key])
        if isinstance(cell, list) and cell and all(isinstance(item, dict) and "id" in item for item in cell):
            found = {str(item["id"]): item for item in cell}
            if len(found) < len(cell):
                raise RowError(f"an id occurs twice in '{key}'")
            return found
    return {}


def _answer(held: object, item: str) -> str:
    """The text of an answer: that of a list's object, or a column's."""
    texts = [held.get(part) for part in ("body", "html", "title")] if isinstance(held, dict) else [held]
    found = next((text for text in texts if isinstance(text, str)), None)
    if found is None:
        raise RowError(f"'{item[:40]}' is the id of no answer with a text")
    return found


def _prompt(data: Fields, known: set[str]) -> Prompt:
    if key := next((key for key in _PROMPTS if key in data), None):
        return fields.prompt({key: data[key]}, key)
    if others := [key for key, cell in data.items() if isinstance(cell, str) and key not in known]:
        raise RowError(f"no prompt among {', '.join(others)[:200]}; data.columns={{prompt: ..}} names it")
    return ""
