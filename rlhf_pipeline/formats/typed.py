"""Rows of plain values to typed ones: texts, labels, demonstrations, dialogues.

`columns` of a reader maps its own names of columns to the file's.
"""

from pathlib import Path

from rlhf_pipeline.formats.row import Columns, Row, collect
from rlhf_pipeline.records import Demonstration, Dialogue, Labelled, Prompt, Text, Turn

_TEXT_COLUMNS = ("text", "review", "sentence", "content")
_LABEL_COLUMNS = ("label", "sentiment")
_LABELS = {"0": 0, "neg": 0, "negative": 0, "1": 1, "pos": 1, "positive": 1}


def read_texts(path: Path, column: str = "text", columns: Columns | None = None) -> list[Text]:
    """Plain texts; empty ones are skipped and counted in the log."""

    def parse(row: Row) -> Text | None:
        text = row.text(column)
        return Text(text) if text.strip() else None

    return collect(path, f"a text row needs {column}", "the text is empty", parse, columns)


def read_labelled(
    path: Path, text_column: str | None = None, label_column: str | None = None, columns: Columns | None = None
) -> list[Labelled]:
    """Texts with label 0 or 1; rows with no label or no text are skipped and counted in the log."""
    texts = (text_column,) if text_column else _TEXT_COLUMNS
    labels = (label_column,) if label_column else _LABEL_COLUMNS

    def parse(row: Row) -> Labelled | None:
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
    return collect(path, needs, "no label or no text", parse, columns)


def read_demonstrations(path: Path, columns: Columns | None = None) -> list[Demonstration | Dialogue]:
    """Prompts with a good answer, and conversations; rows with an empty answer are skipped and counted in the log.

    A prompt that is text is taken as it stands; an instruction or a question is one turn of a conversation, which the
    policy's template puts into words.
    """

    def parse(row: Row) -> Demonstration | Dialogue | None:
        if key := next((k for k in ("messages", "conversations", "conversation") if row.has(k)), None):
            return _dialogue(row, key)
        prompt: Prompt
        if row.has("instruction"):
            prompt, answer = (Turn("user", row.instruction()),), row.text("output")
        elif row.has("question"):
            prompt, answer = (Turn("user", row.text("question")),), row.text("answer")
        else:
            prompt, answer = row.prompt(), row.answer("completion")
        return Demonstration(prompt, answer) if answer.strip() else None

    needs = "a demonstration row needs prompt, completion (or instruction, output; question, answer; messages)"
    return collect(path, needs, "the answer is empty", parse, columns)


def read_dialogues(path: Path, columns: Columns | None = None) -> list[Dialogue]:
    """Utterances of two people in turn, or messages with their roles."""
    needs = 'a dialogue row needs conversation: [{"utterance": ...}, ...] (or messages with role and content)'

    def parse(row: Row) -> Dialogue:
        return _dialogue(row, row.first("conversation", "messages", "conversations"))

    return collect(path, needs, "", parse, columns)


def _dialogue(row: Row, key: str) -> Dialogue:
    first = row.fields[key][0] if isinstance(row.fields[key], list) and row.fields[key] else None
    if isinstance(first, str) or (isinstance(first, dict) and "utterance" in first):
        said = row.texts(key, None if isinstance(first, str) else "utterance", at_least=2)
        roles = ("user", "assistant")
        return Dialogue(tuple(Turn(roles[i % 2], text) for i, text in enumerate(said)), both=True)  # type: ignore[arg-type]
    if key == "conversation" and not isinstance(first, dict):
        raise row.error("'conversation' is not a list of 2 or more objects with a text 'utterance'")
    turns = row.turns(key)
    if not any(turn.role == "assistant" for turn in turns[1:]):
        raise row.error(f"'{key}' holds no reply of an assistant")
    return Dialogue(turns)
