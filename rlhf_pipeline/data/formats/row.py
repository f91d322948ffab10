"""One row of a file on its way to a typed record, with errors that name its place."""

import ast
import json
import logging
import math
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from rlhf_pipeline.data.formats.files import RowError, kind_of, read_rows
from rlhf_pipeline.data.records import Prompt, Role, Turn
from rlhf_pipeline.errors import UserError

T = TypeVar("T")

Columns = Mapping[str, str]  # a reader's name for a column -> the file's

_LOG = logging.getLogger("rlhf_pipeline")
# The keys of speaker and text: chat messages, ShareGPT, Open Assistant's trees.
_SPEAKS = (("role", "content"), ("from", "value"), ("role", "text"))
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
}  # fmt: skip
_TOOLS = ("tool", "function", "observation", "function_call", "tool_call", "tool_calls", "tool_response", "ipython")
# A model's thoughts before its answer: not read.
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
# Between messages numpy writes no comma.
_NEXT_MESSAGE = re.compile(r"""\}\s+(?=\{\s*['"](?:role|content|text|from|value)['"]\s*:)""")


class SkippedRowError(RowError):
    """A valid row with nothing to read."""


@dataclass(frozen=True, slots=True)
class Row:
    """One row: its fields, its place, and what a row of its kind needs."""

    path: Path
    number: int
    fields: dict[str, Any]
    needs: str
    unread: set[str] = field(default_factory=set, compare=False)  # what it holds that is left out

    def of(self, fields: dict[str, Any]) -> "Row":
        """Other fields at this row's place."""
        return replace(self, fields=fields)

    def error(self, problem: str) -> RowError:
        """A fault of this row, with its place."""
        return RowError(self.path, self.number, f"{problem}; {self.needs}" if self.needs else problem)

    def skipped(self, why: str) -> SkippedRowError:
        """The reason to skip this row and go on."""
        return SkippedRowError(self.path, self.number, why)

    def has(self, *keys: str) -> bool:
        """Whether all of some columns are there."""
        return all(key in self.fields for key in keys)

    def holds(self, key: str) -> bool:
        """Whether a column is there and not blank."""
        return not blank(self.fields.get(key))

    def first(self, *keys: str) -> str:
        """The first of some columns that is there."""
        for key in keys:
            if key in self.fields:
                return key
        raise self.error(f"'{'|'.join(keys)}' is missing among {', '.join(self.fields) or 'no columns'}")

    def value(self, key: str) -> Any:
        """The value of a column."""
        if key not in self.fields:
            raise self.error(f"'{key}' is missing")
        return self.fields[key]

    def text(self, key: str) -> str:
        """A text."""
        value = "" if blank(self.value(key)) else self.value(key)
        if not isinstance(value, str):
            raise self.error(f"'{key}' is {kind_of(value)}, not text")
        return value

    def given(self, key: str) -> str:
        """A text, which may be empty but not null."""
        if not isinstance(self.value(key), str) and not self.holds(key):
            raise self.error(f"'{key}' is blank")
        return self.text(key)

    def messages(self, key: str) -> list[Any] | None:
        """The messages in a column: a list of them, or one alone, or a cell in which they are written; None: a text."""
        value = self.value(key)
        if not isinstance(value, str):
            return value if isinstance(value, list) else [value] if isinstance(value, dict) else None
        quoted = [all(f"{mark}{word}{mark}" in value for word in form) for form in _SPEAKS for mark in "'\""]
        if not value.lstrip().startswith(("[", "{")) or not any(quoted):
            return None
        for written in (value, _NEXT_MESSAGE.sub("}, ", value)):
            found = decoded(written)
            items = [found] if isinstance(found, dict) else found
            if isinstance(items, list):
                return items if all(isinstance(item, dict) and _form(item) for item in items) else None
        raise self.skipped(f"'{key}' begins like a list of messages, and cannot be read as one")

    def turns(self, key: str) -> tuple[Turn, ...]:
        """A conversation as a list of messages, in any of the forms known here."""
        forms = " or ".join(f"{who} and {what}" for who, what in _SPEAKS)
        found = []
        for item in self.messages(key) or ([] if not self.holds(key) else [None]):
            message: dict[str, Any] = item if isinstance(item, dict) else {}
            form = _form(message) or ("", "")
            who, words = message.get(form[0]), message.get(form[1])
            if str(who).lower() in _TOOLS or any(
                not blank(decoded(message.get(k))) for k in ("tools", "tool_calls", "function_call")
            ):
                raise self.skipped("it calls tools, which are not read")
            if form == ("", "") or not (isinstance(words, str) or blank(words)):
                raise self.error(f"'{key}' is not a list of messages with {forms}")
            role = _ROLES.get(str(who).lower())
            if role is None:
                raise self.error(f"'{key}' has a message from {who!r}; allowed are {', '.join(_ROLES)}")
            self.unread.update(name for name in THOUGHTS if not blank(message.get(name)))
            found.append(Turn(role, words if isinstance(words, str) else ""))
        return tuple(found)

    def before(self) -> tuple[Turn, ...]:
        """The turns before an instruction: Alpaca's `system` and `history`."""
        found = [Turn("system", self.text("system"))] if self.holds("system") else []
        past = decoded(self.fields.get("history"))
        if not isinstance(past, list):
            self.unread.update(["history"] if self.holds("history") else [])
        elif all(isinstance(pair, list) and len(pair) == 2 for pair in past):
            roles: tuple[Role, Role] = ("user", "assistant")
            said = [self.of(dict(zip(roles, pair, strict=True))) for pair in past]
            found += [Turn(role, row.text(role)) for row in said for role in roles]
        else:
            found += self.of({"history": past}).turns("history")
        return tuple(found)

    def asked(self, prompt: Prompt) -> Prompt:
        """A prompt after the turns of `before`, if there are any."""
        before = self.before()
        if not before:
            return prompt
        return (*before, *((Turn("user", prompt),) if isinstance(prompt, str) else prompt))

    def numeric(self, key: str, value: Any, hint: str = "") -> float | None:
        """The value of `key` as a finite number, which may be written as text; None if it is empty."""
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        found = number(value)
        if found is None:
            raise self.error(f"'{key}' is {str(value)[:40]!r}, not a number{hint}")
        return found

    def prompt(self) -> Prompt:
        """A prompt as text, or as messages."""
        return self.turns("prompt") if self.messages("prompt") else self.text("prompt")

    def answer(self, key: str) -> str:
        """An answer as text, or as messages that end with it."""
        turns = self.turns(key) if self.messages(key) else ()
        return turns[-1].text if turns else self.text(key)

    def instruction(self) -> str:
        """Alpaca's instruction, and its input below it where there is one."""
        return "\n\n".join(self.text(key) for key in ("instruction", "input") if self.holds(key))


def blank(value: Any) -> bool:
    """Whether a value is empty: an empty cell, a null, or the NaN that pandas writes for it."""
    return value is None or value != value or value in ("", [], {}) or (isinstance(value, str) and not value.strip())


def _form(message: Mapping[str, Any]) -> tuple[str, str] | None:
    return next((form for form in _SPEAKS if form[1] in message and not blank(message.get(form[0]))), None)


def number(value: Any) -> float | None:
    """A finite number, which may be written as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def decoded(cell: Any) -> Any:
    """A cell of a CSV; lists and objects in it are written as JSON, or as Python writes them."""
    if not isinstance(cell, str) or not cell.lstrip().startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of backslashes in what is no Python
            return ast.literal_eval(cell.strip())
    except (ValueError, SyntaxError, MemoryError):
        return cell


def collect(
    path: Path, needs: str, parse: Callable[[Row], T], columns: Columns | None = None,
    rows: Iterable[tuple[int, dict[str, Any]]] | None = None,
) -> list[T]:  # fmt: skip
    """Every row of a file, parsed. Skipped rows and unread content are counted in the log."""
    kept: list[T] = []
    skipped: Counter[str] = Counter()
    unread: Counter[str] = Counter()
    for number, fields in read_rows(path) if rows is None else rows:
        row = renamed(Row(path, number, fields, needs), columns or {})
        try:
            kept.append(parse(row))
        except SkippedRowError as fault:
            skipped[fault.why] += 1
        except RecursionError:
            raise row.error("lists in lists, too deep to be read") from None
        unread.update(row.unread)
    total = len(kept) + skipped.total()
    if not kept:
        raise UserError(f"{path}: all {total} rows were skipped ({'; '.join(skipped)}); {needs}.")
    for why, count in skipped.items():
        _LOG.warning("%s: %d of %d rows skipped (%s)", path, count, total, why)
    say_unread(path, unread, total)
    return kept


def say_unread(path: Path, unread: Mapping[str, int], total: int) -> None:
    """Log each kind of content that is not read, with the number of rows."""
    for name, count in unread.items():
        _LOG.warning("%s: %d of %d rows have %s, which is not read", path, count, total, name)


def renamed(row: Row, columns: Columns) -> Row:
    """A row with the reader's names of columns in place of the file's."""
    for ours, theirs in columns.items():
        if theirs not in row.fields:
            there = ", ".join(row.fields) or "none"
            raise row.error(f"data.columns.{ours}={theirs} names no column here; there are {there}")
    names = {theirs: ours for ours, theirs in columns.items()}
    # A column that has the name now given to another steps aside.
    return row.of({names.get(key, key): cell for key, cell in row.fields.items() if key in names or key not in columns})
