"""Tasks for people to label: Label Studio's import format, and a sheet for a spreadsheet."""

import csv
import io
from collections.abc import Sequence
from typing import Any

from rlhf_pipeline.data.records import Prompt

# Where a cell begins with one of these, a spreadsheet takes it for a formula, or for our mark against that; reading
# takes the mark off again.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n", "'")


def label_studio_tasks(candidates: Sequence[dict[str, Any]], prompts: Sequence[Prompt]) -> list[dict[str, Any]]:
    """Rows of `candidates.jsonl` as tasks to import. Who gave an answer is not in them."""
    found = []
    for row, prompt in zip(candidates, prompts, strict=True):
        texts = {answer["id"]: _shown(answer["text"]) for answer in row["answers"]}
        items = [{"id": name, "title": str(n), "body": text} for n, (name, text) in enumerate(texts.items(), 1)]
        found.append({"data": {"task": row["task"], "prompt": _question(prompt), "items": items, **texts}})
    return found


def sheet(candidates: Sequence[dict[str, Any]], prompts: Sequence[Prompt]) -> str:
    """The same as CSV, with empty columns for ranks: 1 is best, equal numbers tie.

    It begins with a byte order mark, without which Excel does not take it for UTF-8.
    """
    numbers = range(1, max((len(row["answers"]) for row in candidates), default=0) + 1)
    out = io.StringIO("\ufeff")
    out.seek(1)
    writer = csv.DictWriter(out, ["task", "prompt", *(f"answer{n}" for n in numbers), *(f"rank{n}" for n in numbers)])
    writer.writeheader()
    for row, prompt in zip(candidates, prompts, strict=True):
        answers = {f"answer{n}": _shown(answer["text"]) for n, answer in enumerate(row["answers"], 1)}
        cells = {"task": row["task"], "prompt": _question(prompt), **answers}
        writer.writerow({key: f"'{cell}" if cell.startswith(FORMULA) else cell for key, cell in cells.items()})
    return out.getvalue()


def unmarked(cell: str) -> str:
    """A cell without the mark that `sheet` puts before what a spreadsheet would run."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell


def _question(prompt: Prompt) -> str:
    """A single question as it stands, a conversation with who says what."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0].text
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.text}" for turn in prompt)


def _shown(answer: str) -> str:
    return answer if answer.strip() else "(empty)"  # an answer of nothing would be overlooked
