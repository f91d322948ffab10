"""Fields of a row: texts, numbers and messages, with errors that name the field."""

import ast
import contextlib
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.data.plain_rows import Fields, RowError, SkippedRowError, checked, from_json, kind_of
from rlhf_pipeline.data.records import Prompt, Role, Turn

CHATS = ("conversation", "messages", "conversations")
# The keys of speaker and text: chat messages, ShareGPT, Open Assistant's trees.
_FORMS = (("role", "content"), ("from", "value"), ("role", "text"))
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
}  # fmt: skip
_TOOLS = ("tool", "function", "observation", "function_call", "tool_call", "tool_calls", "tool_response", "ipython")
_THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # a model's thoughts before its answer; they are not read
_SIDES = ("user", "assistant")
TOO_DEEP = "nested too deeply"
_LIKE_MESSAGES = re.compile(r"""\s*\[?\s*\{\s*["'](role|from)["']""")


def blank(value: Any) -> bool:
    """Whether a value is empty: an empty cell, a null, or the NaN that pandas writes for it."""
    return value is None or value != value or value in ([], {}) or (isinstance(value, str) and not value.strip())


def number(value: Any) -> float | None:
    """Return a finite number, which may be written as text; None for anything else."""
    try:
        found = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def name(value: Any) -> str | None:
    """Return an id or name: a whole number, or a non-empty text. In a column with nulls, pandas writes 7 as 7.0."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return (str(value).strip() or None) if isinstance(value, int | str) and not isinstance(value, bool) else None


def decoded(cell: Any) -> Any:
    """Parse the list or object in a CSV cell, written as JSON or as Python.

    The cell stays text if its content cannot be used, for example if a key occurs twice.
    """
    if isinstance(cell, str) and cell.lstrip().startswith(("[", "{")):
        for read in (from_json, _from_python):
            with (
                contextlib.suppress(ValueError, TypeError, SyntaxError, MemoryError),
                warnings.catch_warnings(action="ignore"),  # about backslashes in a text that is not Python
            ):
                value = read(cell.strip())
                return cell if checked(value)[1] else value
    return cell


def _from_python(text: str) -> Any:
    tree = ast.parse(text, mode="eval")
    for node in ast.walk(tree):
        if isinstance(node, ast.Dict) and len(set(map(ast.dump, filter(None, node.keys)))) < len(node.keys):
            raise ValueError("a key occurs twice")
    return ast.literal_eval(tree)


def renamed(row: Fields, columns: Mapping[str, str]) -> Fields:
    """Return a row with the reader's column names instead of the file's (columns: {ours: theirs})."""
    for ours, theirs in columns.items():
        if theirs not in row:
            raise RowError(
                f"data.columns.{ours}={theirs} names no column here; there are {', '.join(row)[:200] or 'none'}"
            )
    names = {theirs: ours for ours, theirs in columns.items()}
    # If another column already has one of our names, it is dropped.
    return {names.get(key, key): cell for key, cell in row.items() if key in names or key not in columns}


def holds(row: Fields, key: str) -> bool:
    return not blank(row.get(key))


def value_of(row: Fields, key: str, kind: type) -> Any:
    if key not in row:
        raise RowError(f"'{key}' is missing")
    if not isinstance(row[key], kind):
        raise RowError(f"'{key}' is {kind_of(row[key])}, not {kind_of(kind())}")
    return row[key]


def text(row: Fields, key: str) -> str:
    """Return a column's text. A null is an empty text."""
    return "" if key in row and blank(row[key]) else str(value_of(row, key, str))


def chat(row: Fields) -> str | None:
    return next((key for key in CHATS if holds(row, key)), None)


def answer(row: Fields, key: str) -> str:
    """Return a column's text, or the text of its last message. Empty if there is none."""
    if not holds(row, key):
        return ""
    if not messages(row, key):
        return text(row, key)
    said = turns(row, key)
    return said[-1].text if said else ""


def prompt(row: Fields, key: str = "prompt") -> Prompt:
    """Return a column's prompt, as text or messages. If it is blank: Alpaca's instruction and input, or a question.

    Alpaca's `system` and `history` come before it.
    """
    ask = next((ask for ask in ("instruction", "question") if holds(row, ask)), None)
    asked: Prompt
    if ask and not holds(row, key):
        asked = (Turn("user", "\n\n".join(text(row, part) for part in (ask, "input") if holds(row, part))),)
    else:
        asked = (turns(row, key) or "") if holds(row, key) and messages(row, key) else text(row, key)
    past = before(row)
    return (*past, *((Turn("user", asked),) if isinstance(asked, str) else asked)) if past else asked


def messages(row: Fields, key: str) -> list[Any] | None:
    """Return a column's messages: a list, a single message, or a cell that contains them as text. None: a text."""
    cell = row[key]
    found = decoded(cell)
    items = [found] if isinstance(found, dict) else found
    if isinstance(items, list):
        return items if not isinstance(cell, str) or all(map(_form, items)) else None
    if isinstance(cell, str) and _LIKE_MESSAGES.match(cell):
        raise SkippedRowError(f"'{key}' begins like a list of messages, and cannot be read as one")
    return None


def turns(row: Fields, key: str) -> tuple[Turn, ...]:
    """Return the turns of a conversation, from messages in any known form. Blank system turns are left out."""
    found = []
    for message in messages(row, key) or ([] if blank(row[key]) else [row[key]]):
        form = _form(message)
        who, words = (message.get(part) for part in form) if form else (None, None)
        if str(who).lower() in _TOOLS or _calls_tools(message) or _calls_tools(row):
            raise SkippedRowError("it calls tools, which are not read")
        if form is None or not (isinstance(words, str) or blank(words)):
            forms = " or ".join(" and ".join(form) for form in _FORMS)
            raise RowError(f"'{key}' is not a list of messages with {forms}")
        role = _ROLES.get(str(who).lower())
        if role is None:
            raise RowError(f"'{key}' has a message from {who!r}; allowed are {', '.join(_ROLES)}")
        if role != "system" or not blank(words):
            found.append(Turn(role, words if isinstance(words, str) else ""))
    return tuple(found)


def _form(message: Any) -> tuple[str, str] | None:
    if not isinstance(message, dict):
        return None
    return next((form for form in _FORMS if form[1] in message and holds(message, form[0])), None)


def _calls_tools(held: Any) -> bool:
    keys = ("tools", "tool_calls", "function_call")
    return isinstance(held, dict) and any(not blank(decoded(held.get(key))) for key in keys)


def before(row: Fields) -> tuple[Turn, ...]:
    """Return the turns before an instruction: Alpaca's `system` and `history` (pairs or messages)."""
    found = [Turn("system", text(row, "system"))] if holds(row, "system") else []
    past = decoded(row.get("history"))
    if isinstance(past, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in past):
        past = [{"role": role, "content": said} for pair in past for role, said in zip(_SIDES, pair, strict=True)]
    return (*found, *(turns({"history": past}, "history") if isinstance(past, list) else ()))


def unread(row: Fields) -> set[str]:
    """Name the content of a row that is not read: a model's thoughts, and a history that is not a list."""
    held = [row, *(item for cell in row.values() if isinstance(cell, list) for item in cell if isinstance(item, dict))]
    found = {key for each in held for key in _THOUGHTS if holds(each, key)}
    return found | ({"history"} if holds(row, "history") and not isinstance(decoded(row["history"]), list) else set())
