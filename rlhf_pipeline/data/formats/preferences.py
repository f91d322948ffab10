"""Judgements with one row each: pairs, ranked lists and the rows of a sheet."""

import re
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_pipeline.data.formats.row import Row, blank, decoded
from rlhf_pipeline.data.formats.tasks import FORMULA
from rlhf_pipeline.data.records import Judgement, Prompt, Turn

Kind = Literal["judged", "rejected", "skipped", "unlabelled"]
_ASSISTANT = "\n\nAssistant:"
_NO_ANSWERS = ("winner", "prompt", "margin", "task", "annotator", "id")
_RANK = re.compile(r"rank([0-9]+)")


@dataclass(frozen=True, slots=True)
class Given:
    """One annotation and what became of it. Of all with the same `key`, the newest counts."""

    kind: Kind
    row: Row
    judgement: Judgement | None = None
    why: str | None = None
    task: str | None = None
    annotator: str | None = None
    key: Hashable = None
    when: str = ""


def judged(
    row: Row, prompt: Prompt, answers: Sequence[str], ranks: Sequence[float | None],
    task: str | None, annotator: str | None, margin: float | None = None,
) -> Judgement:  # fmt: skip
    """A judgement of the answers that have a rank, at least two."""
    kept = [(answer, rank) for answer, rank in zip(answers, ranks, strict=True) if rank is not None]
    if len(kept) < 2:
        raise row.error(f"{len(kept)} of {len(answers)} answers ranked; it takes two or more")
    words = [prompt] if isinstance(prompt, str) else [turn.text for turn in prompt]
    try:
        "".join((*words, *answers)).encode()
    except UnicodeEncodeError:
        raise row.error("half a character (a lone surrogate) in a text") from None
    texts, places = zip(*kept, strict=True)
    return Judgement(prompt, texts, places, task, annotator, margin)


def person(value: Any) -> str | None:
    """Who labelled: a name, an e-mail address or a number, bare or in an object."""
    return (name(value.get("email")) or name(value.get("id"))) if isinstance(value, dict) else name(value)


def name(value: Any) -> str | None:
    """An id or a name: a number or a text that is not empty."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return str(value).strip() or None


def is_sheet(row: Row) -> bool:
    """Whether a row is one of a sheet: answers in columns, and a rank to each."""
    return any(match and row.has(f"answer{match[1]}") for match in map(_RANK.fullmatch, row.fields))


def sheet(row: Row) -> Given | None:
    """A task of a sheet: rank1 belongs to answer1 and so on, 1 is the best. None for an empty line."""
    if all(map(blank, row.fields.values())):
        return None
    numbers = sorted(int(match[1]) for match in map(_RANK.fullmatch, row.fields) if match)
    ranks = [_rank(row, f"rank{n}", row.value(f"rank{n}")) for n in numbers]
    if ranks == [None] * len(ranks):
        return Given("unlabelled", row, task=name(row.fields.get("task")))
    answers = [_plain(row.text(f"answer{n}")) for n in numbers]
    for n, rank, answer in zip(numbers, ranks, answers, strict=True):
        if rank is not None and not answer.strip():
            raise row.error(f"rank{n} is given to answer{n}, which is empty")
    return _given(row, _plain(row.text("prompt")), answers, ranks)


def ranking(row: Row) -> Given:
    """Answers with their ranks, else best first."""
    key = "ranked" if row.has("ranked") else "responses"
    answers, given = decoded(row.fields[key]), decoded(row.fields.get("ranks"))
    if not isinstance(answers, list) or len(answers) < 2 or not all(isinstance(answer, str) for answer in answers):
        raise row.error(f"'{key}' is not a list of 2 or more texts")
    ranks: Sequence[float | None] = range(1, len(answers) + 1)
    if given not in (None, ""):
        if not isinstance(given, list) or len(given) != len(answers):
            raise row.error(f"'ranks' is not a list of {len(answers)} numbers, one to each response")
        ranks = [_rank(row, "ranks", value) for value in given]
    prompt = "" if key == "ranked" else row.prompt()
    if row.has("context") and isinstance(prompt, str):  # Open Assistant: what was said before the prompt
        prompt = (*(row.turns("context") if row.holds("context") else ()), Turn("user", prompt))
    return _given(row, prompt, answers, ranks)


def pair(row: Row) -> Given:
    """A better and a worse answer, in any of the forms in use."""
    prompt, *answers = _pair(row)
    return _given(row, prompt, answers, (1, 2), row.numeric("margin", row.fields.get("margin")))


def _given(
    row: Row, prompt: Prompt, answers: Sequence[str], ranks: Sequence[float | None], margin: float | None = None
) -> Given:
    task, who = name(row.fields.get("task")), name(row.fields.get("annotator"))
    # `task` may be a kind of work and `annotator` a constant: only with the same answers is it the same person again.
    key = None if None in (task, who) else (task, who, prompt, frozenset(answers))
    return Given("judged", row, judged(row, prompt, answers, ranks, task, who, margin), None, task, who, key)


def _rank(row: Row, key: str, value: Any) -> float | None:
    return row.numeric(key, value, "; 1 is the best, equal numbers are ties")


def _plain(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def _answer(row: Row, key: str) -> str:
    """An answer, which is missing where its column is blank."""
    found = row.answer(key)
    if not found.strip():
        raise row.error(f"'{key}' is blank")
    return found


def _pair(row: Row) -> tuple[Prompt, str, str]:
    if row.has("winner"):  # answers by the name of who gave them, and the name of the one preferred
        winner = row.text("winner")
        if not winner.strip():
            raise row.error("'winner' is blank")
        better, others = row.given(winner), [key for key in row.fields if key not in (*_NO_ANSWERS, winner)]
        if len(others) != 1:
            raise row.error(f"beside '{winner[:40]}' there is not one other answer but {', '.join(others) or 'none'}")
        return row.text("prompt") if row.has("prompt") else "", better, row.given(others[0])
    chat = next(filter(row.holds, ("conversations", "messages", "conversation")), None)
    if chat and row.has("rejected_response"):  # ms-swift: the conversation ends with the better answer
        turns = row.turns(chat)
        return turns[:-1], turns[-1].text, _answer(row, "rejected_response")
    better = "selected" if row.has("selected") and not row.has("chosen") else "chosen"
    chosen, rejected = _answer(row, better), _answer(row, "rejected")
    if len(row.messages(better) or ()) > 1:  # the whole conversation on either side
        return row.asked(row.turns(better)[:-1]), chosen, rejected
    if chat:
        return row.asked(row.turns(chat)), chosen, rejected
    if row.has("instruction") and not row.holds("prompt"):
        return row.asked((Turn("user", row.instruction()),)), chosen, rejected
    if row.has("prompt"):
        return row.asked(row.prompt()), chosen, rejected
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = min(chosen, rejected, key=len)[:same]
    cut = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
    if not shared.startswith("\n\nHuman:") or cut < len(_ASSISTANT):
        raise row.error("'prompt' is missing, and chosen and rejected are not dialogs that begin alike")
    return chosen[:cut], chosen[cut:], rejected[cut:]
