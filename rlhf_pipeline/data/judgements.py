"""Read human judgements: pairs, ranked lists, sheets, and exports of Label Studio. A row's columns show its kind.

A row that cannot be used is set aside with the reason, and the others are read. Label Studio exports JSON (tasks with
annotations), and JSON_MIN, CSV and TSV (one annotation per row). People compare answers with its tags Pairwise ("left"
or "right") and Ranker (one list, or lists in buckets). Predictions and drafts are not labels.
"""

import json
import logging
import os
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline.data import fields
from rlhf_pipeline.data.plain_rows import Fields, RowError, read_rows
from rlhf_pipeline.data.readers import say_unread
from rlhf_pipeline.data.records import Judgement, Prompt, Turn
from rlhf_pipeline.data.sheets import unmarked
from rlhf_pipeline.errors import UserError

_LOG = logging.getLogger("rlhf_pipeline")
_ASSISTANT = "\n\nAssistant:"
_RANK = re.compile(r"rank(0|[1-9][0-9]{0,8})")
_PAIR = {"chosen", "selected", "rejected", "rejected_response"}
_ALLOWED = (
    "allowed are prompt, chosen, rejected; prompt, responses; a sheet's prompt, answer1, rank1, ..; exports of Label "
    "Studio; if this file has other names, set data.columns={chosen: ..}"
)
# Label Studio's exports: possible names of the two answers and of the prompt in a task's data.
_STEMS = ("answer", "response", "completion", "output", "text")
_SIDES = [(f"{stem}{gap}{a}", f"{stem}{gap}{b}") for stem in _STEMS for gap in ("", "_") for a, b in ("12", "ab")]
_SIDES += [("left", "right"), ("a", "b")]
_PROMPTS = ("prompt", "instruction", "question", "query", "input", "context", "messages", "conversation", "dialogue")
# Columns that JSON_MIN, CSV and TSV add to the data and the label; `task` is our own.
_ABOUT = ("id", "annotator", "annotation_id", "created_at", "updated_at", "lead_time", "agreement", "history", "task")
_COMPARE = {"selected", "ranker"}  # keys that the tags Pairwise and Ranker write
_UNSORTED = "_"  # the bucket of answers that nobody has sorted
_BUCKETS = ("best", "better", "good", _UNSORTED, "neutral", "bad", "worse", "worst")  # the default order


@dataclass(frozen=True)
class Judged:
    """The judgements of files, the rows set aside (as in rejected.jsonl), and the number of rows of each kind."""

    judgements: list[Judgement]
    rejected: list[dict[str, Any]]
    counts: dict[str, int]


@dataclass(frozen=True)
class _Reading:
    """How the labels of a file are read."""

    columns: Mapping[str, str]  # our column names to the file's
    label: str | None  # the control to read if an annotation has several
    buckets: Sequence[str] | None  # a Ranker's buckets, best first
    untouched_seconds: float  # an annotation submitted unchanged before this time is set aside
    unnamed: str | None  # the annotator of a sheet that names nobody


@dataclass(frozen=True)
class _Label:
    """One person's label of one task, and whether it is used. If several have the same `key`, the latest counts."""

    kind: Literal["judged", "rejected", "skipped", "unlabelled"]
    row: Fields  # as in the file
    task: str | None = None
    annotator: str | None = None
    judgement: Judgement | None = None
    why: str | None = None
    key: Hashable = None
    when: str = ""
    file: str = ""
    where: str = ""


def read_judgements(
    paths: Path | Sequence[Path], columns: Mapping[str, str] | None = None, buckets: Sequence[str] | None = None,
    untouched_seconds: float = 5.0,
) -> Judged:  # fmt: skip
    """Read judgements of answers: pairs, ranked lists, a sheet, or an export of Label Studio.

    `buckets` names a Ranker's buckets, best first. An annotation submitted as shown in less than `untouched_seconds` is
    set aside. If someone judges the same answers twice, the later judgement wins, also across files. In a list of
    files, each sheet without names counts as one annotator. Raises UserError if a file has no judgement.
    """
    if buckets is not None and (len(buckets) < 2 or len(set(buckets)) < len(buckets)):
        raise UserError(f"data.buckets is {buckets}; it takes two or more different names, best first.")
    ours = dict(columns or {})
    control = ours.pop("label", None)
    every: list[_Label] = []
    for path in [paths] if isinstance(paths, Path) else paths:
        reading = _Reading(ours, control, buckets, untouched_seconds, None if isinstance(paths, Path) else str(path))
        labels = [
            replace(label, file=str(path), where=where)
            for where, row in read_rows(path)
            for label in _labels(row, reading)
        ]
        found = _judged(labels)
        said = ", ".join(f"{count} {kind}" for kind, count in found.counts.items())
        first = {row["why"]: row["where"] for row in reversed(found.rejected)}
        for why, count in Counter(row["why"] for row in found.rejected).most_common(3):
            said += f"; {first[why]}: {why}" + (f" ({count} such rows)" if count > 1 else "")
        if not found.judgements:
            raise UserError(f"{path} holds no usable label: {said}.")
        if found.rejected:
            _LOG.warning("%s: %s", path, said)
        say_unread(path, Counter(key for label in labels for key in fields.unread(label.row)), len(labels))
        every += labels
    return _judged(every)


def _judged(found: Sequence[_Label]) -> Judged:
    last: dict[Hashable, int] = {}  # key to the index of the latest label
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


def _set_aside(label: _Label) -> dict[str, Any]:
    """Return a row of rejected.jsonl, with only values that JSON can hold and characters that UTF-8 can hold."""
    about = {key: getattr(label, key) for key in ("file", "where", "task", "annotator", "why")}
    try:
        text = json.dumps({**about, "row": label.row}, ensure_ascii=False, default=str)
        return dict(json.loads(text.encode(errors="replace"), parse_constant=str))
    except (RecursionError, ValueError):
        return {**about, "row": {}}


def _labels(row: Fields | RowError, reading: _Reading) -> list[_Label]:
    """Return the labels of a row: a task can have several, and an empty line of a sheet has none."""
    held: Fields = row.args[1] if isinstance(row, RowError) else row
    try:
        if isinstance(row, RowError):
            raise row
        if "annotations" in row or isinstance(row.get("data"), dict):
            return _of_task(row, reading)
        row = fields.renamed(row, reading.columns)
        return _of_annotation(row, reading) if "annotation_id" in row else _of_row(row, reading)
    except RowError as fault:
        who = fields.name(held.get("annotator"))
        return [_Label("rejected", held, fields.name(held.get("task")), who, why=fault.args[0])]
    except RecursionError:
        return [_Label("rejected", {}, why=fields.TOO_DEEP)]


def _judgement(
    prompt: Prompt, answers: Sequence[str], ranks: Sequence[float | None], task: str | None, annotator: str | None,
    margin: float | None = None,
) -> Judgement:  # fmt: skip
    """Return the judgement of the answers that have a rank. Raises RowError if fewer than two have one."""
    kept = [(answer, rank) for answer, rank in zip(answers, ranks, strict=True) if rank is not None]
    if len(kept) < 2:
        raise RowError(f"{len(kept)} of {len(answers)} answers ranked; two or more are needed")
    # A conversation without turns counts as no prompt.
    return Judgement(prompt or "", tuple(a for a, _ in kept), tuple(rank for _, rank in kept), task, annotator, margin)


# -- a row with one label: a pair, a ranked list, a line of a sheet


def _of_row(row: Fields, reading: _Reading) -> list[_Label]:
    sheet = sorted(int(match[1]) for match in map(_RANK.fullmatch, row) if match and f"answer{match[1]}" in row)
    if sheet and all(map(fields.blank, row.values())):
        return []
    task, who = fields.name(row.get("task")), fields.name(row.get("annotator")) or (reading.unnamed if sheet else None)
    ranks: Sequence[float | None] = (1, 2)
    if sheet:
        prompt, answers, ranks = _sheet(row, sheet)
    elif "responses" in row or "ranked" in row:
        prompt, answers, ranks = _ranking(row)
    elif "winner" in row:  # each answer is in a column named after its author; `winner` names the better one
        prompt, *answers = _winner(row)
    elif _PAIR & row.keys():
        prompt, *answers = _pair(row)
    else:
        raise RowError(f"no label among the columns {', '.join(row)[:200] or '(none)'}; {_ALLOWED}")
    if all(rank is None for rank in ranks):
        return [_Label("unlabelled", row, task, who)]
    # Many rows may have the same `task` (a category) and `annotator`, so the answers are part of the key.
    key = (task, who, prompt, frozenset(answers)) if task and who else None
    margin = _number("margin", row.get("margin"))
    return [_Label("judged", row, task, who, _judgement(prompt, answers, ranks, task, who, margin), key=key)]


def _number(key: str, value: object) -> float | None:
    if not fields.blank(value) and fields.number(value) is None:
        raise RowError(f"'{key}' is {str(value)[:40]!r}, not a number")
    return fields.number(value)


def _sheet(row: Fields, numbers: Sequence[int]) -> tuple[Prompt, list[str], Sequence[float | None]]:
    """Return a sheet's answers and ranks. rank1 belongs to answer1: 1 is the best, equal numbers are ties."""
    ranks = [_number(f"rank{n}", row[f"rank{n}"]) for n in numbers]
    answers = [unmarked(fields.text(row, f"answer{n}")) for n in numbers]
    for n, rank, words in zip(numbers, ranks, answers, strict=True):
        if rank is not None and not words.strip():
            raise RowError(f"rank{n} is given to answer{n}, which is empty")
    return unmarked(fields.text(row, "prompt")), answers, ranks


def _ranking(row: Fields) -> tuple[Prompt, list[str], Sequence[float | None]]:
    """Return the answers and their ranks. Without ranks, the answers are best first."""
    key = "ranked" if "ranked" in row else "responses"
    answers, given = fields.decoded(row[key]), fields.decoded(row["ranks"]) if fields.holds(row, "ranks") else None
    if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
        raise RowError(f"'{key}' is not a list of 2 or more texts")
    if not fields.blank(given) and (not isinstance(given, list) or len(given) != len(answers)):
        raise RowError(f"'ranks' is not a list of {len(answers)} numbers, one to each response")
    question = "" if key == "ranked" else fields.prompt(row)
    if "context" in row and isinstance(question, str):  # Open Assistant: the turns before the prompt
        question = (*fields.turns(row, "context"), Turn("user", question))
    return question, answers, [_number("ranks", rank) for rank in given] if given else range(1, len(answers) + 1)


def _winner(row: Fields) -> tuple[Prompt, str, str]:
    winner = _answer(row, "winner")
    others = [key for key in row if key not in ("winner", "prompt", "margin", "task", "annotator", "id", winner)]
    if len(others) != 1:
        raise RowError(f"winner '{winner[:40]}' needs one other answer column; there are {', '.join(others) or 'none'}")
    better, worse = (fields.value_of(row, key, str) for key in (winner, *others))
    return fields.text(row, "prompt") if "prompt" in row else "", better, worse


def _pair(row: Fields) -> tuple[Prompt, str, str]:
    chat = fields.chat(row)
    if chat and "rejected_response" in row:  # ms-swift: the conversation ends with the better answer
        return fields.turns(row, chat)[:-1], _answer(row, chat), _answer(row, "rejected_response")
    key = "selected" if "selected" in row and "chosen" not in row else "chosen"
    better, worse = _answer(row, key), _answer(row, "rejected")
    if len(fields.messages(row, key) or ()) > 1:  # both columns hold the whole conversation
        return (*fields.before(row), *fields.turns(row, key)[:-1]), better, worse
    if chat:
        return (*fields.before(row), *fields.turns(row, chat)), better, worse
    if {"prompt", "instruction"} & row.keys():
        return fields.prompt(row), better, worse
    shared = os.path.commonprefix([better, worse])  # noqa: RUF071  # Anthropic's HH: dialogues with a common beginning
    cut = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
    if not shared.startswith("\n\nHuman:") or cut < len(_ASSISTANT):
        raise RowError("'prompt' is missing, and chosen and rejected are not dialogues with a common beginning")
    return better[:cut], better[cut:], worse[cut:]


def _answer(row: Fields, key: str) -> str:
    found = fields.answer(row, key)
    if not found.strip():
        needs = "a preference row needs prompt, chosen, rejected"
        raise RowError(f"'{key}' is {'blank' if key in row else 'missing'}; {needs}")
    return found


# -- Label Studio's exports


def _of_task(row: Fields, reading: _Reading) -> list[_Label]:
    """Return the labels of all annotations of a task."""
    data: Fields = fields.value_of(row, "data", dict)
    if not fields.holds(row, "annotations"):
        return [_Label("unlabelled", row, _task(row, data))]
    notes = fields.value_of(row, "annotations", list)
    # A label's row is the task with only this annotation. If it is set aside, it can be corrected and read again.
    return [_annotated({**row, "annotations": [note]}, data, note, reading) for note in notes if isinstance(note, dict)]


def _of_annotation(row: Fields, reading: _Reading) -> list[_Label]:
    """Return the annotation in a row of JSON_MIN, CSV or TSV. The row also contains its task's data."""
    if not fields.holds(row, "annotation_id"):
        return [_Label("unlabelled", row, _task(row, row))]
    cells = {key: fields.decoded(cell) for key, cell in row.items() if key not in _ABOUT}
    results = [
        {"from_name": key, "value": part}
        for key, cell in cells.items()
        for part in (cell if isinstance(cell, list) else [cell])
        if isinstance(part, dict) and _COMPARE & part.keys()
    ]
    data = {key: cell for key, cell in row.items() if key not in [result["from_name"] for result in results]}
    note = {**row, "result": results, "completed_by": fields.decoded(row.get("annotator"))}
    return [_annotated(row, data, note, reading)]


def _task(row: Fields, data: Fields) -> str | None:
    return fields.name(data.get("task")) or fields.name(row.get("id"))


def _annotated(row: Fields, data: Fields, note: Fields, reading: _Reading) -> _Label:
    """Return the label of an annotation. `note` has its results, author and time; `data` has the answers."""
    by, task = note.get("completed_by"), _task(row, data)
    who = fields.name((by.get("email") or by.get("id")) if isinstance(by, dict) else by)
    # Times are UTC and are compared as text. A time without a fraction would sort wrongly because of its Z.
    when = str(note.get("updated_at") or note.get("created_at") or "").removesuffix("Z")
    label = _Label("skipped", row, task, who, when=when)
    try:
        data = fields.renamed(data, reading.columns)
        sides: Sequence[str] = next((sides for sides in _SIDES if all(side in data for side in sides)), ())
        items = _items(data)
        prompt = _prompt(data, {*sides, *items, *_ABOUT})
        if who and (known := fields.name(row.get("id")) or task):
            # Every server numbers its tasks and users from 1, so the answers are part of the key.
            label = replace(label, key=(known, who, prompt, repr((items, [data[side] for side in sides]))))
        if note.get("was_cancelled"):
            return label
        result = _result(note, reading.label)
        value = result["value"]
        pairwise = "selected" in value
        lists = _pairwise(value["selected"], sides) if pairwise else _ranker(value["ranker"], reading.buckets)
        ranks = {item: place for place, tied in enumerate(lists, start=1) for item in tied}
        if len(ranks) < sum(map(len, lists)):
            raise RowError("an answer is ranked twice")
        listed = {side: data[side] for side in sides} if pairwise else items
        shown = [item for item in listed if item in ranks] + [item for item in ranks if item not in listed]
        answers = [_text(listed.get(item, data.get(item)), item) for item in shown]
        judgement = _judgement(prompt, answers, [ranks[item] for item in shown], task, who)
        seconds = fields.number(note.get("lead_time"))
        as_shown = not pairwise and lists == [[item] for item in items]
        predicted = result.get("origin") == "prediction"
        if seconds is not None and seconds < reading.untouched_seconds and (as_shown or predicted):
            what = "the order as shown" if as_shown else "the prediction unchanged"
            raise RowError(f"untouched: submitted with {what} after {seconds:.1f} s")
    except RowError as fault:
        return replace(label, kind="rejected", why=fault.args[0])
    return replace(label, kind="judged", judgement=judgement)


def _result(note: Fields, label: str | None) -> Fields:
    """Return the result that is the label. Its `value` is {"selected": "left"} or {"ranker": ids}."""
    results = [part for part in fields.value_of(note, "result", list) if isinstance(part, dict)]
    found = [part for part in results if isinstance(part.get("value"), dict) and _COMPARE & part["value"].keys()]
    found = [part for part in found if label in (None, str(part.get("from_name")))]
    if len(found) > 1:
        controls = ", ".join(sorted({str(part.get("from_name")) for part in found}))
        raise RowError(f"{len(found)} labels in one annotation ({controls}); choose one with data.columns.label=NAME")
    if not found:
        by = f"'{label}' (data.columns.label)" if label else "the tag Pairwise or Ranker"
        raise RowError(f"nothing selected by {by}")
    return found[0]


def _pairwise(selected: object, sides: Sequence[str]) -> list[list[str]]:
    """The names of the two answers, the better one first."""
    if selected not in ("left", "right"):
        raise RowError("'selected' is neither left nor right")
    if not sides:
        raise RowError("no answers such as answer1 and answer2; set data.columns={answer1: .., answer2: ..}")
    return [[side] for side in (sides if selected == "left" else reversed(sides))]


def _ranker(ranker: Any, buckets: Sequence[str] | None) -> list[list[str]]:
    """Return lists of the answers' names, best first. Tied answers are in the same list."""
    # A Ranker with buckets also writes empty buckets, so a single list has no buckets.
    if isinstance(ranker, dict) and len(ranker) == 1 and not buckets:
        (ranker,) = ranker.values()
    if isinstance(ranker, list):
        return [[str(item)] for item in ranker]
    if not isinstance(ranker, dict) or not all(isinstance(items, list) for items in ranker.values()):
        raise RowError("'ranker' is neither a list of ids nor lists of ids by name")
    if not any(items for bucket, items in ranker.items() if bucket != _UNSORTED):
        raise RowError("nothing selected: all answers are left unsorted")
    order = [bucket.lower() for bucket in buckets or _BUCKETS]
    named = {bucket.strip().lower(): items for bucket, items in ranker.items()}
    if len(named) < len(ranker):
        raise RowError("a bucket occurs twice")
    if not set(named) <= {*order, _UNSORTED}:
        names = ", ".join(bucket[:40] for bucket in ranker)
        raise RowError(f"the order of the buckets {names} is unknown; set data.buckets=[..], best first")
    # With data.buckets=, unsorted answers get no rank, unless it contains '_'.
    return [[str(item) for item in named[bucket]] for bucket in order if bucket in named]


def _items(data: Fields) -> Fields:
    """Return the objects of a list by id, in the order in which they are shown."""
    for key in sorted(data, key=lambda key: key != "items"):
        cell = None if key in _PROMPTS or key in _ABOUT else fields.decoded(data[key])
        if isinstance(cell, list) and cell and all(isinstance(item, dict) and "id" in item for item in cell):
            found = {str(item["id"]): item for item in cell}
            if len(found) < len(cell):
                raise RowError(f"an id occurs twice in '{key}'")
            return found
    return {}


def _text(held: object, item: str) -> str:
    """Return the text of an answer, which is an object of a list or a column."""
    texts = [held.get(part) for part in ("body", "html", "title")] if isinstance(held, dict) else [held]
    found = next((text for text in texts if isinstance(text, str)), None)
    if found is None:
        raise RowError(f"no answer with a text has the id '{item[:40]}'")
    return found


def _prompt(data: Fields, known: set[str]) -> Prompt:
    if key := next((key for key in _PROMPTS if key in data), None):
        return fields.prompt({key: data[key]}, key)
    if others := [key for key, cell in data.items() if isinstance(cell, str) and key not in known]:
        raise RowError(f"no prompt among the columns {', '.join(others)[:200]}; set data.columns={{prompt: ..}}")
    return ""
