"""Model cards: what a stage's files say of its model, as the README.md that the hub reads and shows."""

import os
from pathlib import Path
from typing import Any

from rlhf_pipeline.cards.loading import named
from rlhf_pipeline.cards.made import POLICIES, Made, gather
from rlhf_pipeline.cards.markdown import said
from rlhf_pipeline.cards.metadata import metadata
from rlhf_pipeline.cards.sections import sections

__all__ = ["CARD", "card", "named", "write_cards"]

CARD = "README.md"


def card(folder: Path) -> str:
    """The card of the model in `runs/<name>/<stage>`, whole."""
    return _card(gather(folder))


def write_cards(folder: Path, run: dict[str, Any]) -> None:
    """Write the card of a stage's model; for stage=evaluate, of those of the same run that it judged.

    `run` is what is about to be the stage's run.json.
    """
    if (folder / "model").is_dir():
        _write(gather(folder, run))
    if run["stage"] == "evaluate":
        for other in (folder.parent / stage for stage in POLICIES):
            if (other / "model").is_dir() and (made := gather(other, judged=run)).judged:
                _write(made)


def _card(made: Made) -> str:
    from huggingface_hub import ModelCard

    parts = "".join(f"\n## {title}\n\n{text}\n" for title, text in sections(made).items() if text)
    title = f"{said(made.run.get('name'))}, {said(made.stage)}"
    return str(ModelCard(f"---\n{metadata(made).to_yaml()}\n---\n\n# {title}\n{parts}"))


def _write(made: Made) -> None:
    """Whole or not at all. What is half written lies outside the model's folder, whose files a kill must not add to."""
    temporary = made.folder / f".card.{os.getpid()}"
    temporary.write_text(_card(made), encoding="utf-8")
    os.replace(temporary, made.model / CARD)
