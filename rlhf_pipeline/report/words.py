"""The translations of a page (zh.yaml), and the displayed names of a run's figures (measures.yaml)."""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

LANGUAGES = ("en", "zh")
OTHER = "Other measures"


@cache
def load_yaml(name: str) -> Any:
    """Return the content of zh.yaml or measures.yaml."""
    return yaml.safe_load((Path(__file__).parent / f"{name}.yaml").read_text(encoding="utf-8"))


class Words:
    """Translates a phrase into the page's language. A phrase without a translation stays English."""

    def __init__(self, lang: object = "en") -> None:
        self.lang = lang if lang in LANGUAGES else "en"

    def __call__(self, phrase: str, *values: object) -> str:
        """Return the translated phrase, with the values in place of its braces."""
        said = str(load_yaml("zh").get(phrase, phrase)) if self.lang == "zh" else phrase
        return said.format(*values) if values else said

    def name(self, key: str) -> str:
        """Return the displayed name of a figure; its key if it has no other name."""
        return self(load_yaml("measures")["names"].get(key, key))

    def measure(self, key: str) -> str:
        """Return the displayed name of a measure that is drawn."""
        return self(next((named[key] for named in load_yaml("measures")["drawn"].values() if key in named), key))


def grouped(keys: Sequence[str]) -> dict[str, list[str]]:
    """Return measures by group, in the order of measures.yaml. A measure with "loss" in its name is a loss."""
    groups = {group: [key for key in named if key in keys] for group, named in load_yaml("measures")["drawn"].items()}
    rest = [key for key in keys if not any(key in found for found in groups.values())]
    groups["Loss"] += [key for key in rest if "loss" in key]
    groups[OTHER] = [key for key in rest if "loss" not in key]
    return {group: found for group, found in groups.items() if found}
