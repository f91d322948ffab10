"""What models wrote, side by side: over time, by policy, and as people compared it."""

from collections.abc import Sequence
from typing import Any

from rlhf_pipeline.report.files import items, members, number
from rlhf_pipeline.report.page import Block, Cell, plain, said, table
from rlhf_pipeline.report.words import Words

STRETCHES, SAMPLES, ROWS = 4, 50, 200  # columns over time, samples of each; rows of the other tables
Row = dict[str, Any]


def over_time(rows: Sequence[Row], words: Words) -> list[Block]:
    """Samples by stretch of the training: the first stretch begins with the start, the others with their newest.

    A prompt that was asked in several stretches stands in one row.
    """
    steps = [number(row.get("step")) or 0.0 for row in rows]
    first, last = min(steps, default=0.0), max(steps, default=0.0)
    columns: list[list[tuple[float, Row]]] = [[] for _ in range(STRETCHES)]
    for step, row in zip(steps, rows, strict=True):
        place = int(STRETCHES * (step / 2 - first / 2) / ((last / 2 - first / 2) or 1.0)) if last < float("inf") else 0
        columns[min(place, STRETCHES - 1)].append((step, row))
    columns = [sorted(column, key=lambda pair: pair[0], reverse=n > 0) for n, column in enumerate(columns) if column]
    kept = [column[:: -(-len(column) // SAMPLES)] for column in columns]
    ends = [(min(step for step, _ in column), max(step for step, _ in column)) for column in kept]
    heads = [words("Steps {} to {}", *map(plain, pair)) for pair in ends]
    lines = [[_sample(cell, words) for cell in cells] for cells in _aligned([[row for _, row in c] for c in kept])]
    count = words("{} of {}", sum(map(len, kept)), len(rows))
    return table(f"{words('During training, side by side')} ({count})", heads, lines)


def _sample(row: Row | None, words: Words) -> Cell:
    if row is None:
        return Cell("")
    about = f"{words('step')} {plain(row.get('step'))} · {words('reward')} {plain(row.get('reward'))}"
    return said(row.get("response"), words, about, row.get("prompt"), "one")


def _aligned(columns: Sequence[list[Row]]) -> list[list[Row | None]]:
    """Rows of one sample per column: first the prompts that several columns have, then the rest in order."""
    left = [list(column) for column in columns]
    asked: dict[str, int] = {}
    for column in left:
        for prompt in dict.fromkeys(str(row.get("prompt")) for row in column):
            asked[prompt] = asked.get(prompt, 0) + 1
    rows: list[list[Row | None]] = []
    for prompt in sorted((p for p, n in asked.items() if n > 1), key=lambda p: -asked[p]):
        found = [next((row for row in column if str(row.get("prompt")) == prompt), None) for column in left]
        for column, row in zip(left, found, strict=True):
            if row is not None:
                column.remove(row)
        rows.append(found)
    longest = max(map(len, left), default=0)
    return rows + [[column[n] if n < len(column) else None for column in left] for n in range(longest)]


def judged(label: str, rows: Sequence[Row], words: Words) -> list[Block]:
    """Prompts with every policy's answer and its reward, which may be several."""
    names = list(dict.fromkeys(name for row in rows for name in members(row.get("responses"))))
    sides = []
    for row in rows[:ROWS]:
        answers, rewards = members(row.get("responses")), members(row.get("rewards"))
        cells = [said(answers.get(name), words, f"{words('reward')} {plain(rewards.get(name))}") for name in names]
        sides.append([said(row.get("prompt"), words), *cells])
    return table(f"{words(label)} ({words('{} of {}', len(sides), len(rows))})", [words("Prompt"), *names], sides)


def candidates(rows: Sequence[Row], labels: Sequence[Row], words: Words) -> list[Block]:
    """The answers that people compare, side by side as they are shown, each with the ranks it was given."""
    ranks: dict[tuple[str, str], list[Any]] = {}
    for row in labels:
        answers, given = (row[key] if isinstance(row.get(key), list) else [] for key in ("responses", "ranks"))
        for answer, rank in zip(answers, given, strict=False):
            ranks.setdefault((str(row.get("task")), str(answer)), []).append(rank)
    lines = []
    for row in rows[:ROWS]:
        cells = [said(row.get("shown_prompt"), words)]
        for answer in items(row.get("answers")):
            own = ranks.get((str(row.get("task")), str(answer.get("text"))))
            cells.append(said(answer.get("text"), words, f"{words('rank')} {plain(own)}" if own else ""))
        lines.append(cells)
    heads = [words("Prompt"), *(words("Answer {}", n) for n in range(1, max(map(len, lines), default=1)))]
    return table(f"{words('Answers to compare')} ({words('{} of {}', len(lines), len(rows))})", heads, lines)
