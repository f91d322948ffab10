"""Model cards: what a stage's files say about its model, as the README.md that the hub reads and shows.

`card.md` is the template, `facts.py` what goes in. Here every value becomes Markdown that marks up nothing: names,
paths and generated text can end no table, no block and no metadata.
"""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup

from rlhf_pipeline.report import show
from rlhf_pipeline.report.cards.facts import gather, metadata
from rlhf_pipeline.stages import POLICIES
from rlhf_pipeline.texts import shown

CARD = "README.md"
# What marks up a line of Markdown; a character reference shows it as itself (CommonMark 0.31, section 2.5).
_MARKS = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*[]|~$"}
_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # inside a word it marks up nothing
_LONGEST = 300  # characters of one text


def card(folder: Path) -> str:
    """The card of the model in `runs/<name>/<stage>`."""
    return _rendered(gather(folder))


def write_cards(folder: Path, run: dict[str, Any]) -> None:
    """Write the card of a stage's model; for stage=evaluate, those of the same run's models that it judged.

    `run` is what is about to be the stage's run.json.
    """
    if (folder / "model").is_dir():
        _write(folder, gather(folder, run))
    if run["stage"] == "evaluate":
        for other in (folder.parent / stage for stage in POLICIES):
            if (other / "model").is_dir() and (found := gather(other, judged=run))["compared"]:
                _write(other, found)


def named(card: str, repository: str) -> str:
    """A card whose code opens the model by its id on the hub."""
    line = f"model_id = {_literal(repository)}"
    return re.sub(r'^model_id = ".*"$', lambda _: line, card, count=1, flags=re.MULTILINE)


def plain(value: object) -> Markup:
    """A value as one line of Markdown that marks up nothing, also in a table. What is Markdown already stays."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, list) and value:
        return Markup(", ").join(map(plain, value))
    if isinstance(value, str) and len(value) > _LONGEST:
        value = value[:_LONGEST] + " ..."
    line = " ".join(show(value).split())
    return Markup(_UNDERSCORE.sub("&#95;", line.translate(_MARKS)))


def _table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    lines = [head, ["---"] * len(head), *rows]
    return Markup("\n".join(f"| {' | '.join(map(plain, line))} |" for line in lines))


def _yaml(values: dict[str, Any]) -> Markup:
    """A block of YAML, in a fence longer than any in it; characters that hide are written as escapes."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=not _hides(values), width=110)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}yaml\n{text}{fence}")


def _literal(text: str) -> Markup:
    """A string as Python writes it, on one line."""
    return Markup(json.dumps(text, ensure_ascii=_hides(text)))


def _hides(value: object) -> bool:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return shown(text) != text


def _rendered(found: dict[str, Any]) -> str:
    from huggingface_hub import ModelCard
    from jinja2 import Environment, FileSystemLoader, Undefined

    def finalize(value: object) -> Markup:
        return plain(None if isinstance(value, Undefined) else value)

    # ModelCard.from_template takes no `finalize`, which escapes whatever the template shows.
    templates = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, finalize=finalize,
                            trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)  # fmt: skip
    templates.globals |= {"table": _table, "yaml": _yaml, "literal": _literal}
    head = Markup(metadata(found).to_yaml())
    return str(ModelCard(templates.get_template("card.md").render(metadata=head, **found)))


def _write(folder: Path, found: dict[str, Any]) -> None:
    """Whole or not at all. The half-written file is outside the model's folder, whose files a kill must not add to."""
    temporary = folder / f".card.{os.getpid()}"
    temporary.write_text(_rendered(found), encoding="utf-8")
    os.replace(temporary, folder / "model" / CARD)
