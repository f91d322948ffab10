"""One row of plain values on its way to a typed one: what is asked of it, and how a fault is said."""

import json
import logging
import math
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.formats.files import RowError, read_rows
from rlhf_pipeline.records import Prompt, Role, Turn

T = TypeVar("T")

Columns = Mapping[str, str]  # a reader's name for a column -> the file's

_LOG = logging.getLogger("rlhf_pipeline")
# Who speaks and what, in the forms that are about: chat messages, ShareGPT, Open Assistant's trees.
_SPEAKS = (("role", "content"), ("from", "value"), ("role", "text"))
_ROLES: dict[str, Role] = {
    "system": "system",
    "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "bot": "assistant",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    """One row, where it stands and what its kind needs."""

    path: Path
    number: int
    fields: dict[str, Any]
    needs: str

    def error(self, problem: str) -> RowError:
        """A fault of this row, with its place."""
        return RowError(self.path, self.number, f"{problem}; {self.needs}" if self.needs else problem)

    def has(self, *keys: str) -> bool:
        """Whether all of some columns are there."""
        return all(key in self.fields for key in keys)

    def first(self, *keys: str) -> str:
        """The first of some columns that is there."""
        for key in keys:
            if key in self.fields:
                return key
        raise self.error(f"'{'|'.join(keys)}' is missing among {', '.join(self.fields) or 'no columns'}")

    def value(self, key: str) -> Any:
        """What stands in a column."""
        if key not in self.fields:
            raise self.error(f"'{key}' is missing")
        return self.fields[key]

    def text(self, key: str) -> str:
        """A text."""
        value = self.value(key)
        if not isinstance(value, str):
            raise self.error(f"'{key}' is {type(value).__name__}, not text")
        return value

    def texts(self, key: str, inner: str | None = None, at_least: int = 1) -> tuple[str, ...]:
        """A list of texts, or of objects that hold a text under the name inner."""
        items = self.value(key)
        if isinstance(items, list) and inner:
            items = [item.get(inner) if isinstance(item, dict) else None for item in items]
        if not isinstance(items, list) or len(items) < at_least or not all(isinstance(item, str) for item in items):
            each = f"objects with a text '{inner}'" if inner else "texts"
            raise self.error(f"'{key}' is not a list of {at_least} or more {each}")
        return tuple(items)

    def turns(self, key: str) -> tuple[Turn, ...]:
        """A conversation as a list of messages, in any of the forms known here."""
        items = self.value(key)
        forms = " or ".join(f"{who} and {what}" for who, what in _SPEAKS)
        found = []
        for item in items if isinstance(items, list) else [None]:
            message: dict[str, Any] = item if isinstance(item, dict) else {}
            form = next((f for f in _SPEAKS if set(f) <= set(message)), None)
            if form is None or not isinstance(message[form[1]], str):
                raise self.error(f"'{key}' is not a list of messages with {forms}")
            role = _ROLES.get(str(message[form[0]]).lower())
            if role is None:
                raise self.error(f"'{key}' has a message from {message[form[0]]!r}; allowed are {', '.join(_ROLES)}")
            found.append(Turn(role, message[form[1]]))
        return tuple(found)

    def number_or_none(self, key: str) -> float | None:
        """A number that need not be there; in a CSV it comes as text."""
        value = self.fields.get(key)
        if value is None or value == "":
            return None
        found = number(value)
        if found is None:
            raise self.error(f"'{key}' is {reprlib.repr(value)}, not a number")
        return found

    def prompt(self) -> Prompt:
        """A prompt as text, or as messages."""
        return self.turns("prompt") if isinstance(self.value("prompt"), list) else self.text("prompt")

    def answer(self, key: str) -> str:
        """An answer as text, or as messages that end with it."""
        if not isinstance(self.value(key), list):
            return self.text(key)
        if not (turns := self.turns(key)):
            raise self.error(f"'{key}' is an empty list")
        return turns[-1].text

    def instruction(self) -> str:
        """Alpaca's instruction, and its input below it where there is one."""
        detail = self.text("input") if self.fields.get("input") is not None else ""
        return f"{self.text('instruction')}\n\n{detail}" if detail.strip() else self.text("instruction")


def number(value: Any) -> float | None:
    """A finite number, be it written as text; None of anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        found = float(value)
    except (ValueError, OverflowError):
        return None
    return found if math.isfinite(found) else None


def decoded(cell: Any) -> Any:
    """A cell of a CSV, in which lists and objects stand as JSON."""
    if not isinstance(cell, str) or not cell.startswith(("[", "{")):
        return cell
    try:
        return json.loads(cell)
    except ValueError:
        return cell


def collect(
    path: Path, needs: str, why_skipped: str, parse: Callable[[Row], T | None], columns: Columns | None = None
) -> list[T]:
    """Every row of a file as `parse` has it; None skips a row, and those skipped are counted in the log."""
    parsed = [parse(renamed(Row(path, n, fields, needs), columns or {})) for n, fields in read_rows(path)]
    rows = [row for row in parsed if row is not None]
    if not rows:
        raise UserError(f"{path}: all {len(parsed)} rows were skipped ({why_skipped}); {needs}.")
    if len(rows) < len(parsed):
        _LOG.warning("%s: %d of %d rows skipped (%s)", path, len(parsed) - len(rows), len(parsed), why_skipped)
    return rows


def renamed(row: Row, columns: Columns) -> Row:
    """A row with the reader's names of columns in place of the file's."""
    for ours, theirs in columns.items():
        if theirs not in row.fields:
            there = ", ".join(row.fields) or "none"
            raise row.error(f"data.columns.{ours}={theirs} names no column here; there are {there}")
    names = {theirs: ours for ours, theirs in columns.items()}
    # A column that has the name now given to another steps aside.
    kept = {key: value for key, value in row.fields.items() if key in names or key not in columns}
    fields = {names.get(key, key): value for key, value in kept.items()}
    return Row(row.path, row.number, fields, row.needs)
