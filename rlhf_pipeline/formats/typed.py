"""Rows of plain values to typed ones: texts, labels, demonstrations, preferences, rankings, dialogues."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.formats.files import at, read_rows
from rlhf_pipeline.records import Demonstration, Dialogue, Labelled, Preference, Ranking, Text

T = TypeVar("T")

_LOG = logging.getLogger("rlhf_pipeline")
_TEXT_COLUMNS = ("text", "review", "sentence", "content")
_LABEL_COLUMNS = ("label", "sentiment")
_LABELS = {"0": 0, "neg": 0, "negative": 0, "1": 1, "pos": 1, "positive": 1}
_ASSISTANT = "\n\nAssistant:"


def read_texts(path: Path, column: str = "text") -> list[Text]:
    """Plain texts; empty ones are skipped and counted in the log."""

    def parse(row: _Row) -> Text | None:
        text = row.text(column)
        return Text(text) if text.strip() else None

    return _collect(path, f"a text row needs {column}", "the text is empty", parse)


def read_labelled(path: Path, text_column: str | None = None, label_column: str | None = None) -> list[Labelled]:
    """Texts with label 0 or 1; rows with no label or no text are skipped and counted in the log."""
    texts = (text_column,) if text_column else _TEXT_COLUMNS
    labels = (label_column,) if label_column else _LABEL_COLUMNS

    def parse(row: _Row) -> Labelled | None:
        text_key, label_key = row.first(*texts), row.first(*labels)
        raw, value = row.fields[text_key], row.fields[label_key]
        if raw is None or value is None or not str(value).strip():
            return None
        text = row.text(text_key).removeprefix("\ufeff").strip()  # Chinese review sets hold stray byte order marks
        label = _LABELS.get(
            str(value).strip().lower().removesuffix(".0")
        )  # 1.0: integers beside nulls, by way of pandas
        if label is None:
            raise row.error(f"'{label_key}' is {value!r}; allowed are 0, 1, neg, pos, negative, positive")
        return Labelled(text, label) if text else None

    needs = f"a labelled row needs {'|'.join(texts)} and {'|'.join(labels)}"
    return _collect(path, needs, "no label or no text", parse)


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Prompts with a good answer; rows with an empty answer are skipped and counted in the log."""

    def parse(row: _Row) -> Demonstration | None:
        if "instruction" in row.fields:
            prompt, answer = _instruction(row), row.text("output")
        elif "question" in row.fields:
            prompt, answer = row.text("question"), row.text("answer")
        else:
            prompt, answer = row.text("prompt"), row.text("completion")
        return Demonstration(prompt, answer) if answer.strip() else None

    needs = "a demonstration row needs prompt, completion (or instruction, output; or question, answer)"
    return _collect(path, needs, "the answer is empty", parse)


def read_preferences(path: Path) -> list[Preference]:
    """Pairs of answers, the better one known; rows with two equal answers are skipped and counted in the log."""

    def parse(row: _Row) -> Preference | None:
        chosen = row.text("selected" if "selected" in row.fields and "chosen" not in row.fields else "chosen")
        rejected = row.text("rejected")
        if chosen == rejected:
            return None
        if "prompt" in row.fields:
            return Preference(row.text("prompt"), chosen, rejected)
        if "instruction" in row.fields:
            return Preference(_instruction(row), chosen, rejected)
        if "conversations" in row.fields:
            return Preference("\n\n".join(row.texts("conversations", "value")), chosen, rejected)
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        shared = chosen[:same] if len(chosen) <= len(rejected) else rejected[:same]
        cut = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
        if not shared.startswith("\n\nHuman:") or cut < len(_ASSISTANT):
            raise row.error("'prompt' is missing, and chosen and rejected are not dialogs that begin alike")
        return Preference(chosen[:cut], chosen[cut:], rejected[cut:])

    return _collect(path, "a preference row needs prompt, chosen, rejected", "chosen and rejected are equal", parse)


def read_rankings(path: Path) -> list[Ranking]:
    """Two or more answers to a prompt, best first; lists without a prompt get an empty one."""

    def parse(row: _Row) -> Ranking:
        if "ranked" in row.fields:
            return Ranking("", row.texts("ranked", at_least=2))
        return Ranking(row.text("prompt"), row.texts("responses", at_least=2))

    return _collect(path, "a ranking row needs prompt and responses, best first (or ranked)", "", parse)


def read_dialogues(path: Path) -> list[Dialogue]:
    """Utterances of two people in turn."""
    needs = 'a dialogue row needs conversation: [{"utterance": ...}, ...]'
    return _collect(path, needs, "", lambda row: Dialogue(row.texts("conversation", "utterance", at_least=2)))


@dataclass(frozen=True, slots=True)
class _Row:
    """One row, where it stands and what its kind needs."""

    path: Path
    number: int
    fields: dict[str, Any]
    needs: str

    def error(self, problem: str) -> UserError:
        return at(self.path, self.number, f"{problem}; {self.needs}")

    def first(self, *keys: str) -> str:
        for key in keys:
            if key in self.fields:
                return key
        raise self.error(f"'{'|'.join(keys)}' is missing among {', '.join(self.fields) or 'no columns'}")

    def text(self, key: str) -> str:
        if key not in self.fields:
            raise self.error(f"'{key}' is missing")
        value = self.fields[key]
        if not isinstance(value, str):
            raise self.error(f"'{key}' is {type(value).__name__}, not text")
        return value

    def texts(self, key: str, inner: str | None = None, at_least: int = 1) -> tuple[str, ...]:
        """A list of texts, or of objects that hold a text under the name inner."""
        if key not in self.fields:
            raise self.error(f"'{key}' is missing")
        items = self.fields[key]
        if isinstance(items, list) and inner:
            items = [item.get(inner) if isinstance(item, dict) else None for item in items]
        if not isinstance(items, list) or len(items) < at_least or not all(isinstance(item, str) for item in items):
            each = f"objects with a text '{inner}'" if inner else "texts"
            raise self.error(f"'{key}' is not a list of {at_least} or more {each}")
        return tuple(items)


def _instruction(row: _Row) -> str:
    """Alpaca's instruction, and its input below it where there is one."""
    detail = row.text("input") if row.fields.get("input") is not None else ""
    return f"{row.text('instruction')}\n\n{detail}" if detail.strip() else row.text("instruction")


def _collect(path: Path, needs: str, why_skipped: str, parse: Callable[[_Row], T | None]) -> list[T]:
    parsed = [parse(_Row(path, number, fields, needs)) for number, fields in read_rows(path)]
    rows = [row for row in parsed if row is not None]
    if not rows:
        raise UserError(f"{path}: all {len(parsed)} rows were skipped ({why_skipped}); {needs}.")
    if len(rows) < len(parsed):
        _LOG.warning("%s: %d of %d rows skipped (%s)", path, len(parsed) - len(rows), len(parsed), why_skipped)
    return rows
