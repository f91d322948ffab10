"""Rows that hold one label each: pairs, ranked lists and the rows of a sheet."""

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from rlhf_pipeline.data import fields
from rlhf_pipeline.data.plain_rows import Fields, RowError
from rlhf_pipeline.data.records import Judgement, Prompt, Turn
from rlhf_pipeline.data.sheets import unmarked

_ASSISTANT = "\n\nAssistant:"
_RANK = re.compile(r"rank(0|[1-9][0-9]{0,8})")
_PAIR = {"chosen", "selected", "rejected", "rejected_response", "winner"}
_ALLOWED = (
    "allowed are prompt, chosen, rejected; prompt, responses; a sheet's prompt, answer1, rank1, ..; exports of Label "
    "Studio; data.columns={chosen: ..} says what they are called here"
)


@dataclass(frozen=True)
class Reading:
    """How labels are read."""

    columns: Mapping[str, str] = field(default_factory=dict)  # our names of columns to the file's
    label: str | None = None  # the control that counts, where an annotation holds several
    buckets: Sequence[str] | None = None  # a Ranker's, best first
    untouched_seconds: float = 5.0  # an annotation submitted sooner, as it was shown, is set aside
    unnamed: str | None = None  # who filled in a sheet that names nobody


@dataclass(frozen=True)
class Label:
    """One person's label of one task, and whether it is used. If several have the same `key`, the latest counts."""

    kind: Literal["judged", "rejected", "skipped", "unlabelled"]
    row: Fields  # as the file has it
    task: str | None = None
    annotator: str | None = None
    judgement: Judgement | None = None
    why: str | None = None
    key: Hashable = None
    when: str = ""
    file: str = ""
    where: str = ""


def judged(
    prompt: Prompt, answers: Sequence[str], ranks: Sequence[float | None], task: str | None, annotator: str | None,
    margin: float | None = None,
) -> Judgement:  # fmt: skip
    """A judgement of the answers that have a rank, at least two."""
    kept = [(answer, rank) for answer, rank in zip(answers, ranks, strict=True) if rank is not None]
    if len(kept) < 2:
        raise RowError(f"{len(kept)} of {len(answers)} answers ranked; it takes two or more")
    return Judgement(prompt, tuple(a for a, _ in kept), tuple(rank for _, rank in kept), task, annotator, margin)


def of_row(row: Fields, unnamed: str | None) -> list[Label]:
    """The label that a row holds: a sheet's, a ranked list or a pair. Nothing for an empty line of a sheet."""
    sheet = [int(match[1]) for match in map(_RANK.fullmatch, row) if match and f"answer{match[1]}" in row]
    if sheet and all(map(fields.blank, row.values())):
        return []
    task, who = fields.name(row.get("task")), fields.name(row.get("annotator")) or (unnamed if sheet else None)
    ranks: Sequence[float | None] = (1, 2)
    if sheet:
        prompt, answers, ranks = _sheet(row, sorted(sheet))
    elif "responses" in row or "ranked" in row:
        prompt, answers, ranks = _ranking(row)
    elif _PAIR & row.keys():
        prompt, *answers = _pair(row)
    else:
        raise RowError(f"no label among the columns {', '.join(row)[:200] or '(none)'}; {_ALLOWED}")
    if all(rank is None for rank in ranks):
        return [Label("unlabelled", row, task, who)]
    # `task` may be a kind of work and `annotator` a constant, so the answers are part of the key.
    key = (task, who, prompt, frozenset(answers)) if task and who else None
    margin = _number("margin", row.get("margin"))
    return [Label("judged", row, task, who, judged(prompt, answers, ranks, task, who, margin), key=key)]


def _number(key: str, value: object) -> float | None:
    if not fields.blank(value) and fields.number(value) is None:
        raise RowError(f"'{key}' is {str(value)[:40]!r}, not a number")
    return fields.number(value)


def _sheet(row: Fields, numbers: Sequence[int]) -> tuple[Prompt, list[str], list[float | None]]:
    """rank1 belongs to answer1 and so on: 1 is the best, equal numbers are ties."""
    ranks = [_number(f"rank{n}", row[f"rank{n}"]) for n in numbers]
    answers = [unmarked(fields.text(row, f"answer{n}")) for n in numbers]
    for n, rank, words in zip(numbers, ranks, answers, strict=True):
        if rank is not None and not words.strip():
            raise RowError(f"rank{n} is given to answer{n}, which is empty")
    return unmarked(fields.text(row, "prompt")), answers, ranks


def _ranking(row: Fields) -> tuple[Prompt, list[str], Sequence[float | None]]:
    """Answers with their ranks, else best first."""
    key = "ranked" if "ranked" in row else "responses"
    answers, given = fields.decoded(row[key]), fields.decoded(row.get("ranks"))
    if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
        raise RowError(f"'{key}' is not a list of 2 or more texts")
    if not fields.blank(given) and (not isinstance(given, list) or len(given) != len(answers)):
        raise RowError(f"'ranks' is not a list of {len(answers)} numbers, one to each response")
    question = "" if key == "ranked" else fields.prompt(row)
    if "context" in row and isinstance(question, str):  # Open Assistant: what was said before the prompt
        question = (*fields.turns(row, "context"), Turn("user", question))
    return question, answers, [_number("ranks", rank) for rank in given] if given else range(1, len(answers) + 1)


def _pair(row: Fields) -> tuple[Prompt, str, str]:
    if "winner" in row:  # each answer is in a column named after its author; `winner` names the better one
        return _won(row)
    chat = fields.chat(row)
    if chat and "rejected_response" in row:  # ms-swift: the conversation ends with the better answer
        said = fields.turns(row, chat)
        return said[:-1], said[-1].text, _answer(row, "rejected_response")
    key = "selected" if "selected" in row and "chosen" not in row else "chosen"
    better, worse = _answer(row, key), _answer(row, "rejected")
    if len(fields.messages(row, key) or ()) > 1:  # the whole conversation on either side
        return (*fields.before(row), *fields.turns(row, key)[:-1]), better, worse
    if chat:
        return (*fields.before(row), *fields.turns(row, chat)), better, worse
    if {"prompt", "instruction"} & row.keys():
        return fields.prompt(row), better, worse
    shared = os.path.commonprefix([better, worse])  # noqa: RUF071  # Anthropic's HH: dialogues that begin alike
    cut = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
    if not shared.startswith("\n\nHuman:") or cut < len(_ASSISTANT):
        raise RowError("'prompt' is missing, and chosen and rejected are not dialogs that begin alike")
    return better[:cut], better[cut:], worse[cut:]


def _won(row: Fields) -> tuple[Prompt, str, str]:
    winner = _answer(row, "winner")
    others = [key for key in row if key not in ("winner", "prompt", "margin", "task", "annotator", "id", winner)]
    if len(others) != 1:
        raise RowError(f"beside '{winner[:40]}' there is not one other answer but {', '.join(others) or 'none'}")
    better, worse = (fields.value_of(row, key, str) for key in (winner, *others))
    return fields.text(row, "prompt") if "prompt" in row else "", better, worse


def _answer(row: Fields, key: str) -> str:
    found = fields.answer(row, key)
    if not found.strip():
        needs = "a preference row needs prompt, chosen, rejected"
        raise RowError(f"'{key}' is {'blank' if key in row else 'missing'}; {needs}")
    return found
