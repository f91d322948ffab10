"""Tasks for people to label: Label Studio's import format, and a sheet for a spreadsheet."""

import csv
import io
from collections.abc import Sequence
from typing import Any

# A spreadsheet reads a cell that begins with one of these as a formula. The sheet marks such a cell with a leading
# apostrophe, and `unmarked` removes it. A cell with an apostrophe of its own gets the mark too.
FORMULA = ("=", "+", "-", "@", "＝", "＋", "－", "＠", "\t", "\r", "\n", "'")


def label_studio_tasks(candidates: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of `candidates.jsonl` as tasks to import. They do not show which policy gave an answer."""
    found = []
    for row in candidates:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            turns = [f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt]
            prompt = prompt[0]["content"] if len(prompt) == 1 else "\n\n".join(turns)
        # An annotator would overlook an empty answer.
        texts = [answer["text"] if answer["text"].strip() else "(empty)" for answer in row["answers"]]
        named = {f"answer{n}": text for n, text in enumerate(texts, 1)}
        items = [{"id": name, "title": name.removeprefix("answer"), "body": text} for name, text in named.items()]
        found.append({"data": {"task": row["task"], "prompt": prompt, "items": items, **named}})
    return found


def sheet(tasks: Sequence[dict[str, Any]]) -> str:
    """Return the tasks as CSV, with empty columns for ranks: 1 is best, equal numbers tie.

    It begins with a byte order mark, because without one Excel does not read it as UTF-8.
    """
    most = max((len(task["data"]["items"]) for task in tasks), default=0)
    answers, ranks = ([f"{name}{n}" for n in range(1, most + 1)] for name in ("answer", "rank"))
    out = io.StringIO("\ufeff")
    out.seek(0, io.SEEK_END)
    writer = csv.DictWriter(out, ["task", "prompt", *answers, *ranks], extrasaction="ignore", quoting=csv.QUOTE_ALL)
    writer.writeheader()  # all cells are quoted, because some spreadsheets split at ; or tabs
    for task in tasks:
        cells = {name: cell for name, cell in task["data"].items() if isinstance(cell, str)}
        writer.writerow({name: f"'{cell}" if cell.startswith(FORMULA) else cell for name, cell in cells.items()})
    return out.getvalue()


def unmarked(cell: str) -> str:
    """Return a cell without the mark that `sheet` puts before a formula."""
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(FORMULA) else cell
