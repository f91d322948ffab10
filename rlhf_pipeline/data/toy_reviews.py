"""A grammar of short English movie reviews with known sentiment: the demo's built-in data."""

import functools
import math
import random
import re
import zlib
from pathlib import Path

import yaml

from rlhf_pipeline.data.records import Labelled

MIN_WORDS, MAX_WORDS = 12, 30
_GRAMMAR = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
SIGNED: dict[str, tuple[list[str], list[str]]] = _GRAMMAR["signed"]
RULES: dict[str, list[str]] = _GRAMMAR["rules"]


def _roles() -> dict[str, float | str]:
    """Return the role of each phrase: a number is its sentiment, a word says how it changes other phrases."""
    roles: dict[str, float | str] = {}
    for symbol in ("adj", "verb", "verdict", "opinion", "better"):
        for value, phrases in zip((-1.0, 1.0), SIGNED[symbol], strict=True):
            roles |= dict.fromkeys((phrase.removeprefix("a ") for phrase in phrases), value)
    for role, phrases in _GRAMMAR["roles"].items():
        roles |= dict.fromkeys(phrases, {"negative": -1.0, "positive": 1.0}.get(role, role))
    roles |= dict.fromkeys(RULES["who"], "aside")
    return roles | {",": "comma", ";": "comma", "but": "but", ".": "stop", "!": "stop", "?": "stop"}


ROLES = _roles()
# Longest first, so that "anything but" is not read as "but".
_PHRASES = "|".join(sorted((re.escape(phrase) for phrase in ROLES if phrase[0].isalpha()), key=len, reverse=True))
_PATTERN = re.compile(rf"\b(?:{_PHRASES})\b|[.,;!?]")


@functools.cache
def _parsed(template: str) -> tuple[str, list[tuple[str, str, str]]]:
    """Return a template's first words, and each slot after them: relative sign, symbol, the words that follow."""
    first, *rest = re.split(r"<([+-]?)(\w+)>", template)
    return first, list(zip(rest[::3], rest[1::3], rest[2::3], strict=True))


def _expand(template: str, sign: int, rng: random.Random, used: set[str]) -> str:
    """Fill in a template. No phrase is repeated if there is another choice."""
    text, slots = _parsed(template)
    for relative, symbol, following in slots:
        own = -sign if relative == "-" else sign
        options = SIGNED[symbol][own > 0] if symbol in SIGNED else RULES[symbol]
        choice = rng.choice([option for option in options if option not in used] or options)
        used.add(choice)
        text += _expand(choice, own, rng, used) + following
    return text


def _is_held_out(opening: str) -> bool:
    """Decide by the first two words, so that no prompt of two or more words begins reviews of both splits."""
    return zlib.crc32(" ".join(opening.lower().split()[:2]).encode()) % 6 == 0


def _review(sign: int, rng: random.Random, held_out: bool) -> str:
    while _is_held_out(opening := _expand("<opening> ", sign, rng, set())) != held_out:
        pass
    while True:  # redraw only the rest, so that the opening stays independent of the sentiment
        text = opening + _expand("<+review><+tail>", sign, rng, set())
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            break
    text = re.sub(r"\ba (?=[aeiou])", "an ", text)
    return re.sub(r"(?:^|\. )[a-z]", lambda match: match.group().upper(), text)


@functools.lru_cache(maxsize=4)  # drawing takes seconds, and each stage of a pipeline asks for the same reviews
def toy_reviews(count: int, seed: int, held_out: bool = False) -> tuple[Labelled, ...]:
    """`count` reviews, about half of them positive (1). A longer draw with the same seed begins with a shorter one.

    Reviews that are `held_out` begin with other words than all others: no pair of first words is in both splits.
    """
    rng = random.Random(seed)
    labels = (rng.randrange(2) for _ in range(count))
    return tuple(Labelled(_review(1 if label else -1, rng, held_out), label) for label in labels)


def true_sentiment(text: str) -> float:
    """Return the probability that a text is positive, by the rules of the grammar; 0.5 if it has no sentiment."""
    said: dict[str, float] = {}  # by phrase, so that a repeated phrase counts once
    sentence: dict[str, float] = {}
    sign, aside, reported = 1.0, False, 0.0
    for phrase in _PATTERN.findall(text.lower()):
        role = ROLES[phrase]
        if role == "negate":
            sign = -sign
        elif role == "aside":
            aside = True
        elif role in ("agree", "disagree"):
            sentence[phrase] = sign * (reported if role == "agree" else -reported)
        elif isinstance(role, str):  # a comma, "but" or the end of a sentence
            sign, aside = 1.0, False
            if role == "but":
                sentence.clear()  # what comes after it decides
            elif role == "stop":
                said |= sentence
                sentence.clear()
        elif aside:  # a concession, expectation or another's opinion counts if a later phrase agrees or disagrees
            reported = sign * role
        else:
            sentence[phrase] = sign * role
    return 0.5 + 0.5 * math.tanh(0.75 * sum((said | sentence).values()))
