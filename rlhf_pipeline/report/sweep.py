"""What a sweep came to: the page of its settings and jobs, and the frontier of its policies, reward against KL."""

import math
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

from rlhf_pipeline.report.charts import RUNS, frontier_charts, sweep_chart
from rlhf_pipeline.report.files import items, members, number
from rlhf_pipeline.report.page import Block, Cell, assemble, by_row, note, plain, table
from rlhf_pipeline.report.samples import judged
from rlhf_pipeline.report.words import Words

_SEEDS = "Means over seeds, with their standard error."
_KEYS = ("reward_mean", "reward_stderr", "kl")
Row = Mapping[str, Any]


def sweep_page(found: Row, words: Words) -> str:
    """The whole page of what sweep.json holds."""
    rows, jobs = items(found.get("rows")), items(found.get("jobs"))
    objective = words(str(found.get("objective"))) if found.get("objective") else ""
    if (budget := number(found.get("kl_budget"))) is not None:
        objective += f" (KL ≤ {budget:g})"
    about = note(f"{words('Objective: {}.', objective)} {words(_SEEDS)}" if objective else "")
    by_settings = {_name(row): _figures(row) for row in rows}
    parts = {
        "Results": about + sweep_chart(rows, words) + by_row("By settings", "Settings", by_settings, words=words),
        "Jobs": _jobs(jobs, words),
    }
    failed = sum(job.get("status") == "failed" for job in jobs)
    notes = [words("{} of {} jobs failed.", failed, len(jobs))] if failed else []
    if rows and number(rows[0].get("over_budget")):
        notes.append(words("No settings keep within the KL budget; nearest: {}.", _name(rows[0])))
    return assemble(f"{found.get('sweep')} · {found.get('stage')}", "", parts, notes, words)


def _name(row: Row) -> str:
    return ", ".join(f"{key}={value}" for key, value in members(row.get("settings")).items()) or "all"


def _figures(row: Row) -> dict[str, Any]:
    whole = {"objective": row.get("objective"), "± s.e.": row.get("stderr"), "seeds": row.get("seeds")}
    ended = {key: row.get(key) for key in ("failed", "left")}
    if number(row.get("over_budget")):
        ended["over KL budget by"] = row["over_budget"]
    return {**whole, **ended, "time": row.get("seconds"), **members(row.get("results"))}


def _jobs(jobs: list[dict[str, Any]], words: Words) -> list[Block]:
    """Every job with a link to its own page, and why it failed."""
    rows = []
    for job in jobs:
        page, status = job.get("report"), str(job.get("status"))
        link = quote(str(page)) if page else ""
        rows.append(
            [
                Cell(str(job.get("job")), "row", link=link),
                Cell(words(status), "bad" if status == "failed" else ""),
                Cell(plain(job.get("objective"))),
                Cell(str(job.get("error") or "")),
            ]
        )
    return table(words("Every job"), [words(head) for head in ("Run", "status", "objective", "error")], rows, "keys")


def frontier(found: Row, words: Words) -> list[Block]:
    """The charts and tables of what frontier.json holds."""
    starts, points = items(found.get("starts")), items(found.get("points"))
    if not points:
        return []
    rows = {f"{row.get('run')} · {_step(row, words)}": _point(row, words) for row in points}
    best = {}
    for start in starts:
        place = f" · {start.get('path')} · {start.get('seed')}" if len(starts) > 1 else ""
        for row in items(start.get("best_of")):
            if (n := number(row.get("n"))) and math.log2(max(n, 1)).is_integer():
                best[f"{words('best of')} {plain(n)}{place}"] = {key: row.get(key) for key in _KEYS}
    return [
        *note(words("Reward: {}. KL in nats, on a square-root scale.", plain(found.get("reward")))),
        *frontier_charts(found, words),
        *by_row("Policies of the sweep", "Run", rows, words=words),
        *by_row("Best of n, without training", "", best, words=words),
    ]


def _step(row: Row, words: Words) -> str:
    return words("result") if row.get("step") is None else plain(row.get("step"))


def _point(row: Row, words: Words) -> dict[str, Any]:
    gain, best = members(row.get("gain")), row.get("best_of")
    return {
        **{key: row.get(key) for key in _KEYS},
        "gain": gain.get("mean"), "95 % from": gain.get("low"), "95 % to": gain.get("high"),
        "as good as best of": best if best is not None else words("more"),
        **{str(name): members(other).get("reward_mean") for name, other in members(row.get("rewards")).items()},
        **{key: row.get(key) for key in ("perplexity", "distinct_2", "length")},
        "frontier": bool(row.get("frontier")),
    }  # fmt: skip


def frontier_answers(found: Row, words: Words) -> list[Block]:
    """What the last policy of each run said to the same prompts, for every place that runs began at."""
    out = []
    for start in items(found.get("starts")):
        own = [row for row in items(found.get("points")) if row.get("start") == start.get("key")]
        last = {words("before"): start, **{str(row.get("run")): row for row in own}}
        asked: Any = start.get("asked") if isinstance(start.get("asked"), list) else []
        said = {name: items(row.get("answers")) for name, row in list(last.items())[:RUNS]}
        rows = []
        for at, prompt in enumerate(asked):
            given = {name: answers[at] for name, answers in said.items() if at < len(answers)}
            responses, rewards = ({name: a.get(key) for name, a in given.items()} for key in ("response", "reward"))
            rows.append({"prompt": prompt, "responses": responses, "rewards": rewards})
        out += judged("Answers of each run's last policy", rows, words)
    return out
