"""Tasks for people to label: Label Studio's import format, and a sheet for a spreadsheet."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from rlhf_pipeline.data.records import Prompt

# Where a cell begins with one of these, a spreadsheet takes it for a formula, or for our mark against that; reading
# takes the mark off again.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n", "'")
_EMPTY = "(empty)"  # an answer of nothing would be overlooked


def for_people(prompt: Prompt) -> str:
    """A prompt to be read: a single question as it stands, a conversation with who says what."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0].text
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.text}" for turn in prompt)


def label_studio_tasks(candidates: Sequence[dict[str, Any]], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Rows of `candidates.jsonl` as tasks to import. Who gave an answer is not in them."""
    found = []
    for row, prompt in zip(candidates, prompts, strict=True):
        texts = {answer["id"]: answer["text"] if answer["text"].strip() else _EMPTY for answer in row["answers"]}
        items = [{"id": name, "title": str(n), "body": text} for n, (name, text) in enumerate(texts.items(), 1)]
        found.append({"data": {"task": row["task"], "prompt": for_people(prompt), "items": items, **texts}})
    return found


def sheet(candidates: Sequence[dict[str, Any]], prompts: Sequence[Prompt]) -> str:
    """The same as CSV, with empty columns for ranks: 1 is best, equal numbers tie.

    It begins with a byte order mark, without which Excel does not take it for UTF-8.
    """
    most = max((len(row["answers"]) for row in candidates), default=0)
    numbers = range(1, most + 1)
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerow(["task", "prompt", *(f"answer{n}" for n in numbers), *(f"rank{n}" for n in numbers)])
    for row, prompt in zip(candidates, prompts, strict=True):
        texts = [answer["text"] if answer["text"].strip() else _EMPTY for answer in row["answers"]]
        cells = [row["task"], for_people(prompt), *texts]
        writer.writerow([_plain(cell) for cell in cells] + [""] * (2 * most - len(texts)))
    return "\ufeff" + out.getvalue()


def _plain(cell: str) -> str:
    return f"'{cell}" if cell.startswith(FORMULA) else cell
