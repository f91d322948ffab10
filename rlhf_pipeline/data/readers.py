"""Read files into records: texts, labelled texts, demonstrations, dialogues.

`columns` maps a reader's column names to the file's. Rows with nothing to read are skipped, and the log counts them.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from rlhf_pipeline.data import fields
from rlhf_pipeline.data.plain_rows import Fields, RowError, SkippedRowError, kind_of, read_rows
from rlhf_pipeline.data.records import Demonstration, Dialogue, Labelled, Text, Turn
from rlhf_pipeline.errors import UserError

T = TypeVar("T")

_LOG = logging.getLogger("rlhf_pipeline")
_TEXT_COLUMNS = ("text", "review", "sentence", "content")
_LABEL_COLUMNS = ("label", "sentiment")
_PROMPTS = {"prompt", "instruction", "question", "input", *fields.CHATS}
_ANSWERS = ("completion", "output", "answer")
_NOT_KEPT = {"prompt", "prompts", "completion", "completions", *fields.CHATS}  # a reward gets these in another form
_LABELS = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}


def read_texts(path: Path, column: str = "text", columns: Mapping[str, str] | None = None) -> list[Text]:
    """Read plain texts: one per line, or one per row."""

    def parse(row: Fields) -> Text:
        words = fields.text(row, column)
        if not words.strip():
            raise SkippedRowError("the text is empty")
        return Text(words)

    return _read(path, f"a text row needs {column}", parse, columns)


def read_labelled(
    path: Path, columns: Mapping[str, str] | None = None, labels: Mapping[Any, int] | None = None
) -> list[Labelled]:
    """Read texts with label 0 or 1. `labels` maps the file's own label names to 0 or 1."""
    known = _LABELS if labels is None else {_label(name): label for name, label in labels.items()}
    hint = "; for other labels, set data.labels={good: 1, bad: 0}" if labels is None else " (data.labels)"

    def parse(row: Fields) -> Labelled:
        text_key, label_key = _first(row, _TEXT_COLUMNS), _first(row, _LABEL_COLUMNS)
        words = fields.text(row, text_key).removeprefix("\ufeff").strip()  # stray byte order marks
        value = row[label_key]
        if not words or fields.blank(value):
            raise SkippedRowError("no label or no text")
        if _label(value) not in known:
            said = kind_of(value) if isinstance(value, list | dict) else repr(value)
            raise RowError(f"'{label_key}' is {said}; allowed are {', '.join(known)}{hint}")
        return Labelled(words, known[_label(value)])

    needs = f"a labelled row needs {'|'.join(_TEXT_COLUMNS)} and {'|'.join(_LABEL_COLUMNS)}"
    return _read(path, needs, parse, columns)


def _first(row: Fields, keys: tuple[str, ...]) -> str:
    found = next((key for key in keys if key in row), None)
    if found is None:
        raise RowError(f"'{'|'.join(keys)}' is missing; the columns are {', '.join(row) or '(none)'}")
    return found


def _label(value: Any) -> str:
    return str(value).strip().lower().removesuffix(".0")  # in a column with nulls, pandas writes 1 as 1.0


def read_demonstrations(path: Path, columns: Mapping[str, str] | None = None) -> list[Demonstration | Dialogue]:
    """Read prompts or conversations with their good answers. A prompt alone gets an empty completion.

    A text prompt is used unchanged. An instruction or a question is one turn of a conversation, which the policy's
    template formats. The row keeps all columns except prompt, completion and messages.
    """

    def parse(row: Fields) -> Demonstration | Dialogue:
        if chat := fields.chat(row):
            return _dialogue(row, chat)
        if _PROMPTS & row.keys() and not any(fields.holds(row, key) for key in (*_PROMPTS, *_ANSWERS)):
            raise SkippedRowError("the prompt is empty")
        prompt = fields.prompt(row)
        said = next((said for key in _ANSWERS if (said := fields.answer(row, key))), "")
        if isinstance(prompt, tuple) and fields.before(row):
            return Dialogue((*prompt, Turn("assistant", said)) if said else prompt)
        return Demonstration(prompt, said)

    needs = "a demonstration row needs prompt, completion (or instruction, output; question, answer; messages)"

    def parse_whole(row: Fields) -> Demonstration | Dialogue:
        others = {name: cell for name, cell in row.items() if name not in _NOT_KEPT}
        return replace(parse(row), columns=others)

    return _read(path, needs, parse_whole, columns)


def read_dialogues(path: Path, columns: Mapping[str, str] | None = None) -> list[Dialogue]:
    """Read dialogues: utterances of two people in turn, or messages with their roles.

    In a .txt each line is an utterance, and a blank line ends a dialogue.
    """
    needs = 'a dialogue row needs conversation: [{"utterance": ...}, ...] (or messages with role and content)'

    def parse(row: Fields) -> Dialogue:
        return _dialogue(row, fields.chat(row) or _first(row, fields.CHATS))

    return _read(path, needs, parse, columns, blocks=True)


def _dialogue(row: Fields, key: str) -> Dialogue:
    """Return a conversation without blank turns at its end. Its last turn may be a question."""
    items = fields.decoded(row[key])
    first = items[0] if isinstance(items, list) and items else None
    both = isinstance(first, str) or (isinstance(first, dict) and "utterance" in first)
    turns: tuple[Turn, ...]
    if both:
        said: list[Any] = [item.get("utterance") if isinstance(item, dict) else item for item in items]
        said = ["" if fields.blank(words) else words for words in said]
        if not all(isinstance(words, str) for words in said):
            raise RowError(f"'{key}' is not a list of texts, or of objects with a text 'utterance'")
        turns = tuple(Turn("assistant" if i % 2 else "user", words) for i, words in enumerate(said))
    else:
        turns = (*fields.before(row), *fields.turns(row, key))
    while turns and not turns[-1].text.strip():
        turns = turns[:-1]
    if not any(turn.role != "system" and turn.text.strip() for turn in turns):
        raise SkippedRowError("the conversation is empty")
    return Dialogue(turns, both)


def _read(
    path: Path, needs: str, parse: Callable[[Fields], T], columns: Mapping[str, str] | None, blocks: bool = False
) -> list[T]:
    """Parse every row of a file, and log skipped rows and content that is not read."""
    kept: list[T] = []
    skipped, left_out = Counter[str](), Counter[str]()
    for where, row in read_rows(path, blocks):
        try:
            if isinstance(row, RowError):
                raise row
            row = fields.renamed(row, columns or {})
            kept.append(parse(row))
            left_out.update(fields.unread(row) if isinstance(kept[-1], Demonstration | Dialogue) else ())
        except SkippedRowError as fault:
            skipped[str(fault)] += 1
        except (RowError, RecursionError) as fault:
            why = fields.TOO_DEEP if isinstance(fault, RecursionError) else fault.args[0]
            raise UserError(f"{path}, {where}: {why}; {needs}.") from None
    total = len(kept) + skipped.total()
    if not kept:
        raise UserError(f"{path}: all {total} rows were skipped ({'; '.join(skipped)}); {needs}.")
    for why, count in skipped.items():
        _LOG.warning("%s: %d of %d rows skipped (%s)", path, count, total, why)
    say_unread(path, left_out, total)
    return kept


def say_unread(path: Path, left_out: Mapping[str, int], total: int) -> None:
    """Log each kind of content that is not read, with the number of rows."""
    for what, count in left_out.items():
        _LOG.warning("%s: %d of %d rows have %s, which is not read", path, count, total, what)
