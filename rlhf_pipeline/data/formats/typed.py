"""Files to records: texts, labels, demonstrations, dialogues.

`columns` of a reader maps its own names of columns to the file's.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.data.formats.files import kind_of, read_rows, suffix
from rlhf_pipeline.data.formats.row import THOUGHTS, Columns, Row, blank, collect, decoded
from rlhf_pipeline.data.records import Demonstration, Dialogue, Labelled, Prompt, Text, Turn

_TEXT_COLUMNS = ("text", "review", "sentence", "content")
_LABEL_COLUMNS = ("label", "sentiment")
_CHATS = ("messages", "conversations", "conversation")
_ASKED = (("instruction", "input", "output"), ("question", "answer"), ("prompt", "completion"))
_LABELS = {"0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}


def read_texts(path: Path, column: str = "text", columns: Columns | None = None) -> list[Text]:
    """Plain texts; empty ones are skipped and counted in the log."""

    def parse(row: Row) -> Text:
        text = row.text(column)
        if blank(text):
            raise row.skipped("the text is empty")
        return Text(text)

    return collect(path, f"a text row needs {column}", parse, columns)


def read_labelled(
    path: Path, columns: Columns | None = None, labels: Mapping[Any, int] | None = None
) -> list[Labelled]:
    """Texts with label 0 or 1; rows with no label or no text are skipped and counted in the log.

    `labels` are the file's own names of labels, each with 0 or 1.
    """
    known = _LABELS if labels is None else {_label(name): label for name, label in labels.items()}
    own = "" if labels is None else " (data.labels)"

    def parse(row: Row) -> Labelled:
        text_key, label_key = row.first(*_TEXT_COLUMNS), row.first(*_LABEL_COLUMNS)
        text, value = row.text(text_key).removeprefix("\ufeff").strip(), row.fields[label_key]  # stray byte order marks
        if not text or blank(value):
            raise row.skipped("no label or no text")
        label = known.get(_label(value))
        if label is None:
            said = kind_of(value) if isinstance(value, list | dict) else repr(value)
            hint = "" if labels else "; data.labels={good: 1, bad: 0} gives others a meaning"
            raise row.error(f"'{label_key}' is {said}; allowed are {', '.join(known)}{own}{hint}")
        return Labelled(text, label)

    needs = f"a labelled row needs {'|'.join(_TEXT_COLUMNS)} and {'|'.join(_LABEL_COLUMNS)}"
    return collect(path, needs, parse, columns)


def _label(value: Any) -> str:
    return str(value).strip().lower().removesuffix(".0")  # 1.0: integers beside nulls, by way of pandas


def read_demonstrations(path: Path, columns: Columns | None = None) -> list[Demonstration | Dialogue]:
    """Prompts, conversations, and the good answers to them; a prompt alone has an empty completion.

    A prompt that is text is taken as it stands; an instruction or a question is one turn of a conversation, which the
    policy's template puts into words.
    """

    def parse(row: Row) -> Demonstration | Dialogue:
        row.unread.update(filter(row.holds, THOUGHTS))
        if chat := next(filter(row.holds, _CHATS), None):
            return _dialogue(row, chat)
        names = next((names for names in _ASKED if row.has(names[0]) and any(map(row.holds, names))), None)
        if names is None and any(map(row.has, (*_CHATS, *(names[0] for names in _ASKED)))):
            raise row.skipped("the prompt is empty")
        ask, *_, key = names or ("prompt", "completion")
        answer = row.answer(key) if row.has(key) else ""
        prompt: Prompt
        if ask == "prompt":
            prompt = row.prompt()
        else:
            prompt = (Turn("user", row.instruction() if ask == "instruction" else row.text(ask)),)
        asked = row.asked(prompt)
        if asked is not prompt:
            return Dialogue((*asked, *([Turn("assistant", answer)] if answer.strip() else [])))
        return Demonstration(prompt, answer if answer.strip() else "")

    needs = "a demonstration row needs prompt, completion (or instruction, output; question, answer; messages)"
    return collect(path, needs, parse, columns)


def read_dialogues(path: Path, columns: Columns | None = None) -> list[Dialogue]:
    """Utterances of two people in turn, or messages with their roles.

    In a .txt an utterance is a line, and a blank line ends a dialogue.
    """
    needs = 'a dialogue row needs conversation: [{"utterance": ...}, ...] (or messages with role and content)'

    def parse(row: Row) -> Dialogue:
        chat = next(filter(row.holds, _CHATS), None) or row.first("conversation", "messages", "conversations")
        if not row.holds(chat):
            raise row.skipped("the conversation is empty")
        return _dialogue(row, chat)

    return collect(path, needs, parse, columns, _blocks(path) if suffix(path) == ".txt" else None)


def _blocks(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Lines that no blank one parts, as dialogues stand in GPT2-chitchat's train.txt."""
    first, lines = 0, list[str]()
    for number, row in read_rows(path):
        if lines and number != first + len(lines):
            yield first, {"conversation": lines}
            lines = []
        first = first if lines else number
        lines.append(row["text"])
    yield first, {"conversation": lines}


def _dialogue(row: Row, key: str) -> Dialogue:
    """A conversation up to its last words, which may be a question; a blank turn at its end is none."""
    items = decoded(row.fields[key])
    first = items[0] if isinstance(items, list) and items else None
    both = isinstance(first, str) or (isinstance(first, dict) and "utterance" in first)
    turns: tuple[Turn, ...]
    if both:
        said: list[Any] = [item.get("utterance") if isinstance(item, dict) else item for item in items]
        said = ["" if blank(text) else text for text in said]
        if not all(isinstance(text, str) for text in said):
            raise row.error(f"'{key}' is not a list of texts, or of objects with a text 'utterance'")
        turns = tuple(Turn("assistant" if i % 2 else "user", text) for i, text in enumerate(said))
    else:
        if not blank(decoded(row.fields.get("tools"))):
            raise row.skipped("it calls tools, which are not read")
        turns = tuple(turn for turn in (*row.before(), *row.turns(key)) if turn.role != "system" or turn.text.strip())
    while turns and not turns[-1].text.strip():
        turns = turns[:-1]
    if not any(turn.role != "system" and turn.text.strip() for turn in turns):
        raise row.skipped("the conversation is empty")
    return Dialogue(turns, both)
