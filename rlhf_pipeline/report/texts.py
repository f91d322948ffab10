"""What models wrote, side by side: over time, by policy, and as people compared it."""

from collections.abc import Sequence
from typing import Any

from rlhf_pipeline.report.files import items, members, number
from rlhf_pipeline.report.markup import said, show, table, text
from rlhf_pipeline.report.words import Words

STRETCHES, SAMPLES, PAIRS = 4, 50, 200  # columns over time, samples of each; rows of the other tables
Row = dict[str, Any]


def over_time(rows: Sequence[Row], words: Words) -> str:
    """Samples of the training by stretches of it: the first begins with the start, the others with their newest.

    A prompt that was asked in several stretches stands in one row.
    """
    steps = [number(row.get("step")) or 0.0 for row in rows]
    first, last = min(steps, default=0.0), max(steps, default=0.0)
    columns: list[list[tuple[float, Row]]] = [[] for _ in range(STRETCHES)]
    for step, row in zip(steps, rows, strict=True):
        place = int(STRETCHES * (step / 2 - first / 2) / ((last / 2 - first / 2) or 1.0)) if last < float("inf") else 0
        columns[min(place, STRETCHES - 1)].append((step, row))
    columns = [sorted(column, key=lambda pair: pair[0], reverse=n > 0) for n, column in enumerate(columns) if column]
    kept = [_spaced(column, SAMPLES) for column in columns]
    heads = [words("Steps {} to {}", show(min(c)[0]), show(max(c)[0])) for c in [[(s,) for s, _ in c] for c in kept]]
    lines = []
    for cells in _aligned(kept):
        lines.append("".join(_sample(cell, words) if cell else "<td></td>" for cell in cells))
    count = words("{} of {}", sum(map(len, kept)), len(rows))
    return table(f"{words('During training, side by side')} ({count})", heads, lines)


def _sample(row: Row, words: Words) -> str:
    about = f"{words('step')} {show(row['step'])} · {words('reward')} {show(row['reward'])}"
    return said(row["response"], words, f'<span class="soft">{about}</span>', row["prompt"], "one")


def _spaced(column: list[tuple[float, Row]], most: int) -> list[tuple[float, Row]]:
    """At most so many, evenly spaced, the first among them."""
    return [column[len(column) * n // most] for n in range(most)] if len(column) > most else column


def _aligned(columns: Sequence[Sequence[tuple[float, Row]]]) -> list[list[Row | None]]:
    """Rows of one sample a column: first those whose prompt more than one column has, then the rest as they come."""
    left = [[{key: row.get(key) for key in ("step", "prompt", "response", "reward")} for _, row in c] for c in columns]
    asked: dict[str, int] = {}
    for column in left:
        for prompt in dict.fromkeys(str(row["prompt"]) for row in column):
            asked[prompt] = asked.get(prompt, 0) + 1
    rows: list[list[Row | None]] = []
    for prompt in sorted((p for p, n in asked.items() if n > 1), key=lambda p: -asked[p]):
        found = [next((row for row in column if str(row["prompt"]) == prompt), None) for column in left]
        for column, row in zip(left, found, strict=True):
            if row:
                column.remove(row)
        rows.append(found)
    for n in range(max(map(len, left), default=0)):
        rows.append([column[n] if n < len(column) else None for column in left])
    return rows


def judged(label: str, rows: Sequence[Row], words: Words) -> str:
    """Prompts with every policy's answer and its reward, which may be several."""
    names = list(dict.fromkeys(name for row in rows for name in members(row.get("responses"))))
    sides = []
    for row in rows[:PAIRS]:
        answers, rewards = members(row.get("responses")), members(row.get("rewards"))
        cells = (
            said(answers.get(n), words, f'<span class="soft">{words("reward")} {show(rewards.get(n))}</span>')
            for n in names
        )
        sides.append(said(row.get("prompt"), words) + "".join(cells))
    return table(f"{words(label)} ({words('{} of {}', len(sides), len(rows))})", [words("Prompt"), *names], sides)


def candidates(rows: Sequence[Row], labels: Sequence[Row], words: Words) -> str:
    """The answers that people compare, side by side as they are shown, each with the ranks it was given."""
    ranks: dict[tuple[Any, ...], list[Any]] = {}
    for row in labels:
        answers, given = (row[key] if isinstance(row.get(key), list) else [] for key in ("responses", "ranks"))
        for answer, rank in zip(answers, given, strict=False):
            ranks.setdefault((str(row.get("task")), str(answer)), []).append(rank)
    lines = []
    for row in rows[:PAIRS]:
        texts = [answer.get("text") for answer in items(row.get("answers"))]
        own = [ranks.get((str(row.get("task")), str(answer))) for answer in texts]
        notes = [f'<span class="soft">{words("rank")} {show(given)}</span>' if given else "" for given in own]
        line = "".join(said(answer, words, note) for answer, note in zip(texts, notes, strict=True))
        lines.append(said(row.get("shown_prompt"), words) + line)
    most = max((len(items(row.get("answers"))) for row in rows[:PAIRS]), default=0)
    label = f"{words('Answers to compare')} ({words('{} of {}', len(lines), len(rows))})"
    return table(label, [words("Prompt"), *(words("Answer {}", n) for n in range(1, most + 1))], lines)


def warned(lines: Sequence[object]) -> str:
    """What a run was warned of, as a list."""
    told = [text(line) for line in lines if line]
    return f'<ul class="warnings">\n{"".join(f"<li>{line}</li>" for line in told)}</ul>\n' if told else ""
