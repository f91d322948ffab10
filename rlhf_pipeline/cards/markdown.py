"""What files hold as Markdown: names, paths and what a model wrote can end no table, no block and no metadata."""

import json
import os
import re
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

import yaml

from rlhf_pipeline.report import show
from rlhf_pipeline.scripts import HIDDEN

# What marks up a line of Markdown; as a reference it is itself and nothing more (CommonMark 0.31, section 2.5).
_MARKS = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*[]|~$"}
_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # inside a word it marks up nothing
_LONGEST = 300  # characters of one text


def said(value: object) -> str:
    """A value of a file as one line of Markdown, in a table or behind other words: it marks up nothing."""
    value = homeless(value)
    if isinstance(value, str) and len(value) > _LONGEST:
        value = value[:_LONGEST] + " ..."
    return _UNDERSCORE.sub("&#95;", " ".join(show(value).split()).translate(_MARKS))


def plain(value: object) -> str:
    """A value of a file as one short line without characters that hide, for metadata."""
    return " ".join("".join(c for c in str(value) if c.isspace() or not _hides(c)).split())[:100]


def literal(text: str) -> str:
    """A string as Python writes it, between double quotes."""
    return json.dumps(text, ensure_ascii=_hides(text))


def as_yaml(values: dict[str, Any]) -> str:
    """Plain values as YAML; characters that hide are written as escapes."""
    readable = not _hides(json.dumps(values, ensure_ascii=False))
    return str(yaml.safe_dump(values, sort_keys=False, allow_unicode=readable, width=110))


def homeless(value: Any) -> Any:
    """Paths in the home folder from `~` on: a card is to be shown, and whose machine it was made on is nobody's."""
    home = os.path.expanduser("~").rstrip("/") + "/"
    if isinstance(value, str):
        return "~/" + value.removeprefix(home) if len(home) > 1 and value.startswith(home) else value
    if isinstance(value, dict):
        return {key: homeless(inner) for key, inner in value.items()}
    return [homeless(inner) for inner in value] if isinstance(value, list) else value


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Finished cells as a table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def block(language: str, text: str) -> str:
    """A block of code, in a fence longer than any in the text."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _hides(text: str) -> bool:
    return any(c not in "\n\t" and unicodedata.category(c) in HIDDEN for c in text)
