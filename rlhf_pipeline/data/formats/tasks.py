"""Tasks for people to label: Label Studio's import format, and a sheet for a spreadsheet."""

import csv
import io
from collections.abc import Sequence
from typing import Any

# Where a cell begins with one of these, a spreadsheet takes it for a formula, or for our mark against that; reading
# takes the mark off again.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n", "'")


def _texts(row: dict[str, Any]) -> tuple[str, list[str]]:
    """A row of `candidates.jsonl` as people read it: prompt and answers. An answer of nothing would be overlooked."""
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        turns = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt]
        prompt = prompt[0]["content"] if len(prompt) == 1 else "\n\n".join(turns)
    return prompt, [answer["text"] if answer["text"].strip() else "(empty)" for answer in row["answers"]]


def label_studio_tasks(candidates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `candidates.jsonl` as tasks to import. Who gave an answer is not in them."""
    found = []
    for row in candidates:
        prompt, texts = _texts(row)
        named = {f"answer{n}": text for n, text in enumerate(texts, 1)}
        items = [{"id": name, "title": name.removeprefix("answer"), "body": text} for name, text in named.items()]
        found.append({"data": {"task": row["task"], "prompt": prompt, "items": items, **named}})
    return found


def sheet(candidates: Sequence[dict[str, Any]]) -> str:
    """The same as CSV, with empty columns for ranks: 1 is best, equal numbers tie.

    It begins with a byte order mark, without which Excel does not take it for UTF-8.
    """
    numbers = range(1, 1 + max((len(row["answers"]) for row in candidates), default=0))
    out = io.StringIO("\ufeff")
    out.seek(0, io.SEEK_END)
    writer = csv.writer(out)
    writer.writerow(["task", "prompt", *(f"answer{n}" for n in numbers), *(f"rank{n}" for n in numbers)])
    for row in candidates:
        prompt, texts = _texts(row)
        cells = [f"'{cell}" if cell.startswith(FORMULA) else cell for cell in (row["task"], prompt, *texts)]
        writer.writerow(cells + [""] * (2 * len(numbers) - len(texts)))
    return out.getvalue()
