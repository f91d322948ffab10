"""Make pages from the templates. All values are shown as text, and a page loads nothing from the network."""

import base64
import hashlib
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_pipeline.files import write_atomic
from rlhf_pipeline.report.files import as_dict, as_number, columns, dicts_in, finite
from rlhf_pipeline.report.words import Words
from rlhf_pipeline.texts import printable

LONGEST = 4000  # the most characters of one text that are shown
ENGLISH = Words()
_HERE = Path(__file__).parent


def display(value: object, words: Words = ENGLISH) -> str:
    """Return a JSON value as text: integers in full, floats to four digits, a dash for null."""
    if isinstance(value, dict):
        return " · ".join(f"{words(str(key))} {display(inner, words)}" for key, inner in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(display(inner, words) for inner in value) or "–"
    if isinstance(value, float):
        value = value or 0.0  # without the sign of -0.0
        return f"{value:.0f}" if abs(value) < 1e15 and (value.is_integer() or abs(value) >= 1e4) else f"{value:.4g}"
    if isinstance(value, bool):
        return words("yes") if value else words("no")
    return "–" if value is None else str(value)


def lasted(seconds: object, words: Words = ENGLISH) -> str | None:
    """Return a time in its two largest units; None if it is not a finite number."""
    if (time := finite(seconds)) is None:
        return None
    minutes, rest = divmod(round(time), 60)
    if minutes >= 60:
        return words("{} h {} min", minutes // 60, minutes % 60)
    return words("{} min {} s", minutes, rest) if minutes else words("{} s", f"{time:.3g}")


def environment(show: Callable[[Any], str]) -> Any:
    """Return the Jinja2 environment. `show` makes a value text, which is then escaped; a missing value is None."""
    from jinja2 import ChainableUndefined, Environment, FileSystemLoader
    from markupsafe import Markup

    def finalize(value: object) -> object:
        return value if isinstance(value, Markup) else show(None if isinstance(value, ChainableUndefined) else value)

    made = Environment(
        loader=FileSystemLoader(_HERE / "templates"), autoescape=True, finalize=finalize, undefined=ChainableUndefined,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.filters |= {"members": as_dict, "rows": dicts_in, "columns": columns, "number": as_number}
    return made


@cache
def _pages(lang: str) -> Any:
    from markupsafe import Markup

    words = Words(lang)

    def show(value: object) -> str:
        text = display(value, words)
        text = text[:LONGEST] + (" …" if len(text) > LONGEST else "")
        return text if text.isprintable() else printable(text)

    made = environment(show)
    made.globals |= {"_": words, "plain": lambda value: display(value, words)}
    for name, files in (("lines", ["chart.css"]), ("style", ["chart.css", "page.css"]), ("script", ["search.js"])):
        content = "".join((_HERE / file).read_text(encoding="utf-8") for file in files)
        digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
        made.globals |= {name: Markup(content), f"{name}_hash": f"sha256-{digest}"}
    return made


def write_page(target: Path, template: str, words: Words, **values: Any) -> Path:
    """Write a page from the named template, atomically. Returns `target`."""
    write_atomic(target, _pages(str(words.lang)).get_template(f"{template}.html").render(**values))
    return target


def picture(charts: Sequence[Mapping[str, Any]], words: Words = ENGLISH) -> str:
    """Return charts side by side as one SVG file, light or dark as the reader's system."""
    return str(_pages(str(words.lang)).get_template("picture.svg").render(charts=charts))
