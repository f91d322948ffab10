"""Which script texts are written in, whether a vocabulary was made for it, and how they are shown."""

import re
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, TypeVar

T = TypeVar("T")
Script = Literal["Chinese", "Latin"]

_IDEOGRAPH = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_IDEOGRAPHS = re.compile(f"[{_IDEOGRAPH}]")
_LATIN = re.compile("[A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f]")
_WORDS = re.compile(rf"[{_IDEOGRAPH}]|[^\s{_IDEOGRAPH}]+")

HIDDEN = {"Cc", "Cf", "Cs", "Zl", "Zp"}  # Unicode categories whose characters hide or reorder other text

# A sample is enough, and takes milliseconds whatever the size of the data.
_TEXTS, _CHARACTERS, _TOKENS = 200, 1000, 20_000
# Of the vocabulary, and of the texts' tokens.
FEW, UNKNOWN = 0.05, 0.05


def shown(text: str) -> str:
    """A text for a terminal or a page: characters that hide, steer or reorder become escapes such as \\u202e."""
    return "".join(c if c in "\n\t" or unicodedata.category(c) not in HIDDEN else f"\\u{ord(c):04x}" for c in text)


def words_of(text: str) -> list[str]:
    """What stands between blanks; an ideograph is a word of its own, for Chinese has no blanks."""
    return _WORDS.findall(text)


def script_of(texts: Sequence[str], least: int = 20) -> Script | None:
    """The script of most letters in a sample of texts; None where there are fewer than `least`, or it is another."""
    sample = "".join(text[:_CHARACTERS] for text in _spaced(texts, _TEXTS))
    letters = sum(map(str.isalpha, sample))
    if letters < least:
        return None
    if 2 * len(_IDEOGRAPHS.findall(sample)) > letters:
        return "Chinese"
    return "Latin" if 2 * len(_LATIN.findall(sample)) > letters else None


def mismatch(tokenizer: Any, texts: Sequence[str]) -> str | None:
    """Why a tokenizer's vocabulary does not fit the script of texts, in a few words; None where it does."""
    script = script_of(texts)
    if script is None:
        return None
    chinese, unknown = chinese_share(tokenizer), unknown_share(tokenizer, texts)
    if script == "Chinese" and chinese < FEW:
        return f"the texts are Chinese, and of its vocabulary only {chinese:.1%} is"
    if script == "Latin" and chinese > 0.5:
        return f"the texts are in Latin letters, and {chinese:.0%} of its vocabulary is Chinese"
    if unknown > UNKNOWN:
        return f"its vocabulary does not know {unknown:.0%} of the texts' tokens"
    return None


def chinese_share(tokenizer: Any) -> float:
    """The share of tokens with an ideograph. Decoded, for a byte-level vocabulary spells them in other letters."""
    tokens = tokenizer.convert_ids_to_tokens(_spaced(range(len(tokenizer)), _TOKENS))
    found = [token is not None and _IDEOGRAPHS.search(tokenizer.convert_tokens_to_string([token])) for token in tokens]
    return sum(map(bool, found)) / max(len(found), 1)


def unknown_share(tokenizer: Any, texts: Sequence[str]) -> float:
    """The share of a sample's tokens that the tokenizer has no id for."""
    sample = [text[:_CHARACTERS] for text in _spaced(texts, _TEXTS)]
    rows = tokenizer(sample, add_special_tokens=False, verbose=False)["input_ids"] if sample else []
    ids = [token for row in rows for token in row]
    return ids.count(tokenizer.unk_token_id) / max(len(ids), 1)


def _spaced(items: Sequence[T], most: int) -> list[T]:
    """At most `most` of the items, evenly spaced."""
    return list(items[:: -(-len(items) // most) or 1])
