"""Rows of plain values to typed ones: texts, labels, demonstrations, preferences, rankings, dialogues.

`columns` of a reader maps its own names of columns to the file's.
"""

from pathlib import Path

from rlhf_pipeline.formats.row import Columns, Row, collect
from rlhf_pipeline.records import Demonstration, Dialogue, Labelled, Preference, Prompt, Ranking, Text, Turn

_TEXT_COLUMNS = ("text", "review", "sentence", "content")
_LABEL_COLUMNS = ("label", "sentiment")
_LABELS = {"0": 0, "neg": 0, "negative": 0, "1": 1, "pos": 1, "positive": 1}
_ASSISTANT = "\n\nAssistant:"


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
            prompt, answer = (Turn("user", _instruction(row)),), row.text("output")
        elif row.has("question"):
            prompt, answer = (Turn("user", row.text("question")),), row.text("answer")
        else:
            prompt, answer = _prompt(row), _answer(row, "completion")
        return Demonstration(prompt, answer) if answer.strip() else None

    needs = "a demonstration row needs prompt, completion (or instruction, output; question, answer; messages)"
    return collect(path, needs, "the answer is empty", parse, columns)


def read_preferences(path: Path, columns: Columns | None = None) -> list[Preference | Ranking]:
    """Pairs of answers, the better one known, and lists of answers, best first: told apart by what a row holds.

    Rows whose answers are all equal are skipped and counted in the log.
    """

    def parse(row: Row) -> Preference | Ranking | None:
        if row.has("ranked") or row.has("responses"):
            ranking = _ranking(row)
            return ranking if len(set(ranking.responses)) > 1 else None
        pair = _pair(row)
        return pair if pair.chosen != pair.rejected else None

    needs = "a preference row needs prompt, chosen, rejected"
    return collect(path, needs, "chosen and rejected are equal", parse, columns)


def read_rankings(path: Path, columns: Columns | None = None) -> list[Ranking]:
    """Two or more answers to a prompt, best first; lists without a prompt get an empty one."""
    return collect(path, "a ranking row needs prompt and responses, best first (or ranked)", "", _ranking, columns)


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


def _instruction(row: Row) -> str:
    """Alpaca's instruction, and its input below it where there is one."""
    detail = row.text("input") if row.fields.get("input") is not None else ""
    return f"{row.text('instruction')}\n\n{detail}" if detail.strip() else row.text("instruction")


def _prompt(row: Row) -> Prompt:
    """A prompt as text, or as messages."""
    return row.turns("prompt") if isinstance(row.value("prompt"), list) else row.text("prompt")


def _answer(row: Row, key: str) -> str:
    """An answer as text, or as messages that end with it."""
    return row.turns(key)[-1].text if isinstance(row.value(key), list) else row.text(key)


def _ranking(row: Row) -> Ranking:
    if row.has("ranked"):
        return Ranking("", row.texts("ranked", at_least=2))
    prompt = _prompt(row)
    if row.fields.get("context") and isinstance(prompt, str):  # Open Assistant: what was said before the prompt
        prompt = (*row.turns("context"), Turn("user", prompt))
    elif row.has("context") and isinstance(prompt, str):
        prompt = (Turn("user", prompt),)
    return Ranking(prompt, row.texts("responses", at_least=2))


def _pair(row: Row) -> Preference:
    if row.has("winner"):  # answers by the name of who gave them, and the name of the one preferred
        winner = row.text("winner")
        loser = next((key for key in row.fields if key not in ("winner", "prompt", winner)), "loser")
        prompt = row.text("prompt") if row.has("prompt") else ""
        return Preference(prompt, row.text(winner), row.text(loser), row.number_or_none("margin"))
    better = "selected" if row.has("selected") and not row.has("chosen") else "chosen"
    chosen, rejected = _answer(row, better), _answer(row, "rejected")
    margin = row.number_or_none("margin")
    if isinstance(row.fields[better], list) and len(row.fields[better]) > 1:  # the whole conversation on either side
        return Preference(row.turns(better)[:-1], chosen, rejected, margin)
    if row.has("prompt"):
        return Preference(_prompt(row), chosen, rejected, margin)
    if row.has("instruction"):
        return Preference((Turn("user", _instruction(row)),), chosen, rejected, margin)
    if row.has("conversations"):
        return Preference(row.turns("conversations"), chosen, rejected, margin)
    same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    shared = chosen[:same] if len(chosen) <= len(rejected) else rejected[:same]
    cut = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
    if not shared.startswith("\n\nHuman:") or cut < len(_ASSISTANT):
        raise row.error("'prompt' is missing, and chosen and rejected are not dialogs that begin alike")
    return Preference(chosen[:cut], chosen[cut:], rejected[cut:], margin)
