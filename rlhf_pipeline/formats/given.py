"""What a row of a file says about answers: a judgement, or why it is none."""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rlhf_pipeline.formats.row import Row
from rlhf_pipeline.records import Judgement, Prompt

Kind = Literal["judged", "rejected", "skipped", "unlabelled"]


@dataclass(frozen=True, slots=True)
class Given:
    """One annotation, whatever it came to: with `key`, the newest of all that have the same one counts."""

    kind: Kind
    row: Row
    judgement: Judgement | None = None
    why: str | None = None
    task: str | None = None
    annotator: str | None = None
    key: Hashable = None
    when: str = ""


def judged(
    row: Row, prompt: Prompt, answers: Sequence[str], ranks: Sequence[float | None], *,
    task: str | None = None, annotator: str | None = None, margin: float | None = None,
) -> Judgement:  # fmt: skip
    """A judgement of those answers that have a rank; it takes two of them."""
    kept = [(answer, rank) for answer, rank in zip(answers, ranks, strict=True) if rank is not None]
    if len(kept) < 2:
        raise row.error(f"{len(kept)} of {len(answers)} answers ranked; it takes two or more")
    words = [prompt] if isinstance(prompt, str) else [turn.text for turn in prompt]
    try:
        "".join((*words, *answers)).encode()
    except UnicodeEncodeError:
        raise row.error("half a character (a lone surrogate) in a text") from None
    texts, places = zip(*kept, strict=True)
    return Judgement(prompt, texts, places, task, annotator, margin)


def person(value: Any) -> str | None:
    """Who labelled: a name, an e-mail address or a number, bare or in an object."""
    return (name(value.get("email")) or name(value.get("id"))) if isinstance(value, dict) else name(value)


def name(value: Any) -> str | None:
    """Who or what is meant: a number or a text that is not empty."""
    if isinstance(value, bool) or not isinstance(value, int | str):
        return None
    return str(value).strip() or None
