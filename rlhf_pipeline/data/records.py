"""Typed rows, which the readers of files and the generators return. Only the readers know file formats."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Turn:
    """One message of a conversation."""

    role: Role
    text: str


# A text that is used unchanged, or a conversation that the policy's template formats.
Prompt = str | tuple[Turn, ...]


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, to learn language from."""

    text: str


@dataclass(frozen=True, slots=True)
class Code:
    """A file of Python source. The language model learns the whole file; prompts are the heads of its functions."""

    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text with its class: 0 negative, 1 positive (or any class number from 0)."""

    text: str
    label: int


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the answer that a person would like to see."""

    prompt: Prompt
    completion: str  # empty if the row is only a prompt
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # other columns, for rewards

    @property
    def answered(self) -> bool:
        """Whether it ends with an answer to learn."""
        return bool(self.completion.strip())


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Turns of a conversation in order. Replies are learnt; with `both`, every turn except the first."""

    turns: tuple[Turn, ...]
    both: bool = False
    columns: Mapping[str, Any] = field(default_factory=dict, repr=False, compare=False)  # other columns, for rewards

    @property
    def replies(self) -> list[int]:
        """The indexes of the turns that are learnt. Blank turns are left out."""
        spoken = [(i, turn) for i, turn in enumerate(self.turns) if i and turn.text.strip()]
        return [i for i, turn in spoken if self.both or turn.role == "assistant"]

    @property
    def answered(self) -> bool:
        """Whether it ends with a reply to learn."""
        return self.replies[-1:] == [len(self.turns) - 1]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt. A person preferred the first, by `margin` if that is known."""

    prompt: Prompt
    chosen: str
    rejected: str
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class Ranking:
    """Several answers to one prompt, best first. `ranks`, if given, never decrease; equal ranks are ties."""

    prompt: Prompt
    responses: tuple[str, ...]
    ranks: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Judgement:
    """How one annotator ordered the answers of one task: the label as given, before labels are combined."""

    prompt: Prompt
    answers: tuple[str, ...]  # as they were shown
    ranks: tuple[float, ...]  # one per answer; the lowest is best, equal ranks are ties
    task: str | None = None
    annotator: str | None = None
    margin: float | None = None  # for two answers: how much better one is, if known


Prompted = Demonstration | Dialogue | Preference | Ranking  # rows with a prompt of their own
Row = Text | Code | Labelled | Prompted


def is_learnable(row: Row) -> bool:
    """Whether a row holds something to learn: a prompt alone does not."""
    match row:
        case Demonstration():
            return row.answered
        case Dialogue():
            return bool(row.replies)
    return True


def prompt_text(prompt: Prompt) -> str:
    """Return a prompt as text, without a template."""
    return prompt if isinstance(prompt, str) else "\n\n".join(turn.text for turn in prompt)


def answers(row: Row) -> tuple[str, ...]:
    """Return the answers to a row's prompt, best first. If a row has no prompt, return its text."""
    match row:
        case Demonstration(completion=completion):
            return (completion,)
        case Preference(chosen=chosen, rejected=rejected):
            return chosen, rejected
        case Ranking(responses=responses):
            return responses
    return (whole_text(row),)


def whole_text(row: Row) -> str:
    """Return all text of a row."""
    match row:
        case Demonstration() | Preference() | Ranking():
            return "\n\n".join((prompt_text(row.prompt), *answers(row)))
        case Dialogue(turns=turns):
            return "\n".join(turn.text for turn in turns)
    return row.text
