"""The page's language (zh.yaml), and what people call the figures of a run (measures.yaml)."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

LANGUAGES = ("en", "zh")
OTHER = "Other measures"


@cache
def table(name: str) -> Any:
    """What zh.yaml or measures.yaml holds."""
    return yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8"))


class Words:
    """Says a phrase in the page's language; a phrase without a translation stays English."""

    def __init__(self, lang: object = "en") -> None:
        self.lang = lang if lang in LANGUAGES else "en"

    def __call__(self, phrase: str, *values: object) -> str:
        """The phrase, with values in place of its braces."""
        said = str(table("zh").get(phrase, phrase)) if self.lang == "zh" else phrase
        return said.format(*values) if values else said

    def name(self, key: str) -> str:
        """What people call a figure in the files; its key where it has no other name."""
        return self(table("measures")["names"].get(key, key))

    def measure(self, key: str) -> str:
        """The same for a measure that is drawn."""
        return self(next((named[key] for named in table("measures")["drawn"].values() if key in named), key))


def grouped(keys: Sequence[str]) -> dict[str, list[str]]:
    """Measures by the group they are drawn in, both in the order of measures.yaml; an unknown loss is still a loss."""
    groups = {group: [key for key in named if key in keys] for group, named in table("measures")["drawn"].items()}
    rest = [key for key in keys if not any(key in found for found in groups.values())]
    groups["Loss"] += [key for key in rest if "loss" in key]
    groups[OTHER] = [key for key in rest if "loss" not in key]
    return {group: found for group, found in groups.items() if found}
