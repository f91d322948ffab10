"""Typed rows: what a file or a generator holds, once it has been read. File formats stop here."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Text:
    """Plain text, to learn language from."""

    text: str


@dataclass(frozen=True, slots=True)
class Labelled:
    """A text with its class: 0 negative, 1 positive (or any class number from 0)."""

    text: str
    label: int


@dataclass(frozen=True, slots=True)
class Demonstration:
    """A prompt and the answer that a person would like to see."""

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """Utterances of two people in turn, the first speaker first."""

    turns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one prompt, of which a person preferred the first."""

    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Ranking:
    """Several answers to one prompt, best first."""

    prompt: str
    responses: tuple[str, ...]


Row = Text | Labelled | Demonstration | Dialogue | Preference | Ranking
