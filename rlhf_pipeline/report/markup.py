"""HTML of values, tables and whole pages: what comes from a file is text and never markup."""

import base64
import hashlib
import html
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_pipeline.atomic import write_atomic
from rlhf_pipeline.report.files import members
from rlhf_pipeline.report.words import Words
from rlhf_pipeline.scripts import shown

LONGEST = 4000  # characters of one text that are shown
ENGLISH = Words()


def text(value: object) -> str:
    """Escape for content and attributes alike, with characters that hide shown as escapes such as \\u202e."""
    return html.escape(shown(str(value)))


def show(value: object, words: Words = ENGLISH) -> str:
    """One JSON value as escaped text: whole numbers whole, others to four digits, a dash for null."""
    if isinstance(value, dict):
        return " · ".join(f"{text(key)} {show(inner, words)}" for key, inner in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(show(inner, words) for inner in value) or "–"
    if isinstance(value, float):
        value = value or 0.0  # which has no sign
        return f"{value:.0f}" if abs(value) < 1e15 and (value.is_integer() or abs(value) >= 1e4) else f"{value:.4g}"
    if isinstance(value, bool):
        return words("yes") if value else words("no")
    return "–" if value is None else text(value)


def said(value: object, words: Words, above: str = "", before: object = "", kind: str = "") -> str:
    """A cell of what a model wrote, line breaks kept, after what it was asked; nothing at all is said in words."""
    whole = value if isinstance(value, str) else show(value, words)
    cut = text(whole[:LONGEST]) + (" …" if len(whole) > LONGEST else "") or words("(empty)")
    asked = f'<span class="soft">{text(str(before)[-LONGEST:])}</span>' if before else ""
    answer = f'<span class="soft">{cut}</span>' if value == "" else cut
    return f'<td class="{kind}">{above}<span class="t" dir="auto">{asked}{answer}</span></td>'


def table(label: str, head: Sequence[str], rows: Sequence[str], kind: str = "tall") -> str:
    """A titled table in a box of its own that scrolls, or nothing; rows are the finished inside of each row."""
    heads = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = f"<thead><tr>{heads}</tr></thead>\n<tbody>" + "".join(f"<tr>{row}</tr>\n" for row in rows) + "</tbody>"
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{text(label)}">'
    whole = f'{box}<table class="{kind}">{body}</table></div>'
    return f'<div class="block"><h3>{text(label)}</h3>\n{whole}</div>\n' if rows else ""


def by_row(
    label: str, corner: str, rows: Mapping[str, Mapping[str, Any]], kind: str = "numbers", words: Words = ENGLISH
) -> str:
    """A table with one row a name and one column for every key of any row; label, corner and keys are English."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = {name: "".join(f"<td>{show(row.get(key), words)}</td>" for key in keys) for name, row in rows.items()}
    heads = [words(corner), *map(words.name, keys)]
    whole = [f'<th scope="row">{text(name)}</th>{row}' for name, row in cells.items()]
    return table(words(label), heads, whole, kind)


def by_name(label: str, values: object, words: Words = ENGLISH) -> str:
    """A table of names and values."""
    rows = {words.name(key): {"Value": value} for key, value in members(values).items()}
    return by_row(label, "Name", rows, words=words)


def tiles(values: Mapping[str, Any], words: Words) -> str:
    """Numbers that are meant to be seen first, each with its name."""
    each = (
        f'<div class="tile"><b>{show(v, words)}</b><span>{text(words.name(k))}</span></div>' for k, v in values.items()
    )
    return f'<div class="tiles">{"".join(each)}</div>\n' if values else ""


def facts(values: Mapping[str, str]) -> str:
    """A list of names and finished values."""
    rows = "".join(f"<dt>{text(key[:1].upper() + key[1:])}</dt><dd>{value}</dd>\n" for key, value in values.items())
    return f"<dl>{rows}</dl>\n" if values else ""


def search_box(words: Words) -> str:
    """Where the texts of a section are searched; without a script there is none."""
    label = text(words("Search"))
    box = f'<input type="search" placeholder="{label}" aria-label="{label}" autocomplete="off">'
    return f'<div class="search" hidden>{box}<span class="soft" role="status"></span></div>\n'


@cache
def _part(name: str) -> tuple[str, str]:
    """A file that is written into every page, and how the page's policy names it."""
    content = (Path(__file__).parent / name).read_text(encoding="utf-8")
    return content, "'sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() + "'"


def assemble(
    title: str, state: str, parts: Mapping[str, str], notes: Sequence[str] = (), words: Words = ENGLISH
) -> str:
    """A page of named parts, each finished, without the empty ones; the title is escaped already, names are English.

    The browser is told to load nothing, and to run nothing but this very script.
    """
    (style, style_hash), (script, script_hash) = _part("page.css"), _part("search.js")
    policy = (
        f"default-src 'none'; style-src {style_hash}; script-src {script_hash}; base-uri 'none'; form-action 'none'"
    )
    tone = {"done": " good", "failed": " bad"}.get(state, "")
    badge = f'<span class="status{tone}">{text(words(state))}</span>\n' if state else ""
    told = "".join(f'<p class="soft bad">{text(note)}</p>\n' for note in notes)
    links = body = ""
    for name, inner in ((name, inner) for name, inner in parts.items() if inner):
        key = name.lower().replace(" ", "-")
        links += f'<a href="#{key}">{words(name)}</a>'
        body += f'<section id="{key}">\n<h2>{words(name)}</h2>\n{inner}</section>\n'
    body = body or f'<p class="soft">{words("Nothing recorded.")}</p>\n'
    return (
        f'<!DOCTYPE html>\n<html lang="{"zh-CN" if words.lang == "zh" else "en"}">\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{style}</style>\n<body>\n<header><h1>{title}</h1>\n"
        f"{badge}<nav>{links}</nav>\n{told}</header>\n<main>\n{body}</main>\n<script>{script}</script>\n</body></html>\n"
    )


def write_page(target: Path, content: str) -> Path:
    """Write a page whole or not at all; give where it is."""
    write_atomic(target, content)
    return target
