"""A page from its blocks. A block is plain data; templates/page.html alone makes HTML of it, and escapes everything."""

import base64
import hashlib
from collections.abc import Mapping, Sequence
from functools import cache
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.files import write_atomic
from rlhf_pipeline.report.files import members
from rlhf_pipeline.report.words import Words
from rlhf_pipeline.texts import shown

LONGEST = 4000  # characters of one text that are shown
ENGLISH = Words()
Block = dict[str, Any]  # "kind" names its macro in the template
_HERE = Path(__file__).parent


class Cell(NamedTuple):
    """A cell of a table. `said` is for what a model wrote: line breaks kept, after what it was asked."""

    text: str
    kind: str = ""  # its class in page.css
    above: str = ""
    before: str = ""
    said: bool = False
    empty: bool = False
    link: str = ""


def plain(value: object, words: Words = ENGLISH) -> str:
    """One JSON value as text: whole numbers whole, others to four digits, a dash for null."""
    if isinstance(value, dict):
        return " · ".join(f"{key} {plain(inner, words)}" for key, inner in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(plain(inner, words) for inner in value) or "–"
    if isinstance(value, float):
        value = value or 0.0  # without the sign of -0.0
        return f"{value:.0f}" if abs(value) < 1e15 and (value.is_integer() or abs(value) >= 1e4) else f"{value:.4g}"
    if isinstance(value, bool):
        return words("yes") if value else words("no")
    return "–" if value is None else str(value)


def show(value: object, words: Words = ENGLISH) -> str:
    """The same, escaped for HTML, and with hidden characters as escapes such as \\u202e."""
    return escape(shown(plain(value, words)))


def said(value: object, words: Words, above: str = "", before: object = "", kind: str = "") -> Cell:
    """A cell of what a model wrote, with a line above it and the prompt before it."""
    whole = value if isinstance(value, str) else plain(value, words)
    cut = whole[:LONGEST] + (" …" if len(whole) > LONGEST else "")
    return Cell(cut or words("(empty)"), kind, above, str(before)[-LONGEST:], True, not cut)


def table(label: str, head: Sequence[str], rows: Sequence[Sequence[Cell]], kind: str = "tall") -> list[Block]:
    """A titled table that scrolls by itself; no rows, no table. A cell of kind "row" heads its row."""
    return [{"kind": "table", "label": label, "head": head, "rows": rows, "style": kind}] if rows else []


def by_row(
    label: str, corner: str, rows: Mapping[str, Mapping[str, Any]], kind: str = "numbers", words: Words = ENGLISH
) -> list[Block]:
    """A table with one row per name and one column per key of any row; label, corner and keys are English."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    heads = [words(corner), *map(words.name, keys)]
    cells = [
        [Cell(name, "row"), *(Cell(plain(row.get(key), words)) for key in keys)] for name, row in rows.items() if keys
    ]
    return table(words(label), heads, cells, kind)


def by_name(label: str, values: object, words: Words = ENGLISH) -> list[Block]:
    """A table of names and values."""
    rows = {words.name(key): {"Value": value} for key, value in members(values).items()}
    return by_row(label, "Name", rows, words=words)


def tiles(values: Mapping[str, Any], words: Words) -> list[Block]:
    """Numbers that are meant to be seen first, each with its name."""
    rows = [(plain(value, words), words.name(key)) for key, value in values.items()]
    return [{"kind": "tiles", "rows": rows}] if rows else []


def facts(values: Mapping[str, str]) -> list[Block]:
    """A list of names and values."""
    rows = [(key[:1].upper() + key[1:], value) for key, value in values.items()]
    return [{"kind": "facts", "rows": rows}] if rows else []


def note(text: str) -> list[Block]:
    """A line in a soft colour."""
    return [{"kind": "note", "text": text}] if text else []


@cache
def _template() -> Any:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    def visible(value: object) -> object:
        """Characters that hide or reorder text become escapes; the template's own markup stays."""
        if hasattr(value, "__html__"):
            return value
        text = str(value)
        return text if text.isascii() and text.isprintable() else shown(text)

    loader = FileSystemLoader(_HERE / "templates")
    made = Environment(loader=loader, autoescape=True, finalize=visible, undefined=StrictUndefined, trim_blocks=True)
    return made.get_template("page.html")


@cache
def _part(name: str) -> tuple[str, str]:
    """A file that every page contains, and how the page's policy names it."""
    content = (_HERE / name).read_text(encoding="utf-8")
    return content, "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def assemble(
    title: str, state: str, parts: Mapping[str, Sequence[Block]], notes: Sequence[str] = (), words: Words = ENGLISH
) -> str:
    """A page of named parts, without the empty ones; the parts' names are English.

    The browser is told to load nothing, and to run nothing but the page's own search.
    """
    from markupsafe import Markup

    (style, style_hash), (script, script_hash) = _part("page.css"), _part("search.js")
    return str(
        _template().render(
            title=title, state=state, notes=notes, _=words, lang="zh-CN" if words.lang == "zh" else "en",
            parts={name: blocks for name, blocks in parts.items() if blocks},
            style=Markup(style), style_hash=style_hash, script=Markup(script), script_hash=script_hash,
        )
    )  # fmt: skip


def write_page(target: Path, content: str) -> Path:
    """Write a page whole or not at all; give where it is."""
    write_atomic(target, content)
    return target
