"""Preferences that stand one a row: pairs, ranked lists, and the rows of a sheet that people fill in."""

import re
from collections.abc import Sequence

from rlhf_pipeline.formats.given import Given, judged, name
from rlhf_pipeline.formats.row import Row, decoded, number
from rlhf_pipeline.formats.tasks import FORMULA
from rlhf_pipeline.records import Judgement, Prompt, Turn

_ASSISTANT = "\n\nAssistant:"
_NO_ANSWERS = ("winner", "prompt", "margin", "task", "annotator", "id")
_RANK = re.compile(r"rank([0-9]+)")


def is_sheet(row: Row) -> bool:
    """Whether a row is one of a sheet: answers in columns, and a rank to each."""
    return any(match and row.has(f"answer{match[1]}") for match in map(_RANK.fullmatch, row.fields))


def sheet(row: Row) -> Given | None:
    """A task of a sheet: rank1 of answer1 and so on, 1 the best. None of a line that is empty."""
    if not any(value is not None and str(value).strip() for value in row.fields.values()):
        return None
    numbers = sorted(int(match[1]) for match in map(_RANK.fullmatch, row.fields) if match)
    cells = {n: row.value(f"rank{n}") for n in numbers}
    task, annotator = name(row.fields.get("task")), name(row.fields.get("annotator"))
    if all(cell is None or str(cell).strip() == "" for cell in cells.values()):
        return Given("unlabelled", row, task=task)
    ranks = [_rank(row, f"rank{n}") for n in numbers]
    answers = [_plain(row.text(f"answer{n}")) for n in numbers]
    for n, rank, answer in zip(numbers, ranks, answers, strict=True):
        if rank is not None and not answer.strip():
            raise row.error(f"rank{n} is given to answer{n}, which is empty")
    found = judged(row, _plain(row.text("prompt")), answers, ranks, task=task, annotator=annotator)
    return _given(row, found, answers)


def ranking(row: Row) -> Given:
    """Answers with the ranks that they were given, else best first."""
    lists = {key: decoded(cell) for key, cell in row.fields.items() if key in ("responses", "ranked", "ranks")}
    row = Row(row.path, row.number, {**row.fields, **lists}, row.needs)
    ranked = row.has("ranked")
    answers = row.texts("ranked" if ranked else "responses", at_least=2)
    given = row.fields.get("ranks")
    ranks: Sequence[float | None] = range(1, len(answers) + 1)
    if given not in (None, ""):
        if not isinstance(given, list) or len(given) != len(answers):
            raise row.error(f"'ranks' is not a list of {len(answers)} numbers, one to each response")
        ranks = [_rank(Row(row.path, row.number, {"ranks": value}, row.needs), "ranks") for value in given]
    prompt = "" if ranked else _context(row)
    task, annotator = name(row.fields.get("task")), name(row.fields.get("annotator"))
    return _given(row, judged(row, prompt, answers, ranks, task=task, annotator=annotator), answers)


def pair(row: Row) -> Given:
    """A better and a worse answer, in any of the forms that are about."""
    prompt, chosen, rejected = _pair(row)
    task, annotator = name(row.fields.get("task")), name(row.fields.get("annotator"))
    margin = row.number_or_none("margin")
    answers = (chosen, rejected)
    return _given(row, judged(row, prompt, answers, (1, 2), task=task, annotator=annotator, margin=margin), answers)


def _given(row: Row, found: Judgement, answers: Sequence[str]) -> Given:
    who = found.task, found.annotator
    # `task` may be a kind of work and `annotator` a constant: only with the same answers is it the same person again.
    key = None if None in who else (*who, found.prompt, frozenset(answers))
    return Given("judged", row, found, task=found.task, annotator=found.annotator, key=key)


def _rank(row: Row, key: str) -> float | None:
    value = row.value(key)
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    found = number(value)
    if found is None:
        raise row.error(f"'{key}' is {str(value)[:40]!r}, not a number; 1 is the best, equal numbers are ties")
    return found


def _plain(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def _context(row: Row) -> Prompt:
    prompt = row.prompt()
    if row.fields.get("context") and isinstance(prompt, str):  # Open Assistant: what was said before the prompt
        return (*row.turns("context"), Turn("user", prompt))
    return (Turn("user", prompt),) if row.has("context") and isinstance(prompt, str) else prompt


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
        return (*row.before(), *row.turns(better)[:-1]), chosen, rejected
    if chat:
        return (*row.before(), *row.turns(chat)), chosen, rejected
    if row.has("instruction") and not row.holds("prompt"):
        return (*row.before(), Turn("user", row.instruction())), chosen, rejected
    if row.has("prompt"):
        prompt, before = row.prompt(), row.before()
        asked = (Turn("user", prompt),) if before and isinstance(prompt, str) else prompt
        return (*before, *asked) if isinstance(asked, tuple) else asked, chosen, rejected
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[:same] if len(chosen) <= len(rejected) else rejected[:same]
    cut = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
    if not shared.startswith("\n\nHuman:") or cut < len(_ASSISTANT):
        raise row.error("'prompt' is missing, and chosen and rejected are not dialogs that begin alike")
    return chosen[:cut], chosen[cut:], rejected[cut:]
