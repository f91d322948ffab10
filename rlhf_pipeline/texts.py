"""Texts in any script: how to show them, how to split them into words, and whether a vocabulary fits them."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, TypeVar

T = TypeVar("T")

_IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_IDEOGRAPHS = re.compile(f"[{_IDEOGRAPH}]")
_LATIN = re.compile("[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]")
_WORDS = re.compile(rf"[{_IDEOGRAPH}]|[^\s{_IDEOGRAPH}]+")
_HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories whose characters hide or reorder other text
_JOINERS = "\u200c\u200d"  # hidden characters that Persian, Hindi and emoji need
# A sample is enough, and takes milliseconds whatever the size of the data.
_TEXTS, _CHARACTERS, _TOKENS = 200, 1000, 20_000


def printable(text: str, keep: str = "\n\t") -> str:
    """Return a text for a terminal or page: characters that hide, control or reorder text become \\u escapes."""
    kept = keep + _JOINERS
    return "".join(c if c in kept or unicodedata.category(c) not in _HIDDEN else f"\\u{ord(c):04x}" for c in text)


def words_of(text: str) -> list[str]:
    """Split a text at blanks. Each ideograph is a word, because Chinese has no blanks."""
    return _WORDS.findall(text)


def script_of(texts: Sequence[str], least: int = 20) -> str | None:
    """Return the script of most letters in a sample; None if it is another or there are fewer than `least` letters."""
    sample = "".join(text[:_CHARACTERS] for text in _spaced(texts, _TEXTS))
    letters = sum(map(str.isalpha, sample))
    for script, pattern in (("Chinese", _IDEOGRAPHS), ("Latin", _LATIN)):
        if letters >= least and 2 * len(pattern.findall(sample)) > letters:
            return script
    return None


def mismatch(tokenizer: Any, texts: Sequence[str]) -> str | None:
    """Return why a tokenizer's vocabulary does not fit the texts' script, or None if it fits."""
    script = script_of(texts)
    if script is None:
        return None
    chinese = chinese_share(tokenizer)
    if script == "Chinese" and chinese < 0.05:
        return f"the texts are Chinese, but only {chinese:.1%} of its vocabulary is"
    if script == "Latin" and chinese > 0.5:
        return f"the texts are in Latin letters, but {chinese:.0%} of its vocabulary is Chinese"
    sample = [text[:_CHARACTERS] for text in _spaced(texts, _TEXTS)]
    ids = [token for row in tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"] for token in row]
    unknown = ids.count(tokenizer.unk_token_id) / max(len(ids), 1)
    return f"its vocabulary does not know {unknown:.0%} of the texts' tokens" if unknown > 0.05 else None


def chinese_share(tokenizer: Any) -> float:
    """Return the share of tokens with an ideograph, decoded because byte-level tokens use other characters."""
    tokens = tokenizer.convert_ids_to_tokens(_spaced(range(len(tokenizer)), _TOKENS))
    found = [token is not None and _IDEOGRAPHS.search(tokenizer.convert_tokens_to_string([token])) for token in tokens]
    return sum(map(bool, found)) / max(len(found), 1)


def _spaced(items: Sequence[T], most: int) -> list[T]:
    """Return at most `most` of the items, evenly spaced."""
    return list(items[:: -(-len(items) // most) or 1])
