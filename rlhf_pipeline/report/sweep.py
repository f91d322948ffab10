"""The page of a sweep: its settings by row, a plot of the objective, and its jobs with what became of each."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple
from urllib.parse import quote

from rlhf_pipeline.report.files import items, members, number
from rlhf_pipeline.report.frontier import round_marks
from rlhf_pipeline.report.markup import assemble, by_row, show, table, text
from rlhf_pipeline.report.words import Words

WIDE, BETWEEN = 420, 24  # of a plot's viewBox, and between two rows
LONGEST, BARS = 28, 40  # characters of a row's name, and rows, that are drawn
_SPREAD = 10  # times the least that the greatest is, from which a scale is logarithmic
Row = Mapping[str, Any]


class Dot(NamedTuple):
    """A row of the plot: its name, mean, standard error and each seed's value."""

    name: str
    mean: float
    error: float
    values: list[float]


def sweep_page(found: Row, words: Words) -> str:
    """The whole page of what sweep.json holds."""
    rows, jobs = items(found.get("rows")), items(found.get("jobs"))
    objective = text(words(str(found.get("objective")))) if found.get("objective") else ""
    if (budget := number(found.get("kl_budget"))) is not None:
        objective += f" (KL ≤ {budget:g})"
    about = f'<p class="soft">{words("Objective: {}.", objective)} {words(_SEEDS)}</p>\n' if objective else ""
    by_settings = {name_of(row): _figures(row, words) for row in rows}
    parts = {
        "Results": about + _plot(rows, words) + by_row("By settings", "Settings", by_settings, words=words),
        "Jobs": _jobs(jobs, words),
    }
    failed = sum(job.get("status") == "failed" for job in jobs)
    notes = [words("{} of {} jobs failed.", failed, len(jobs))] if failed else []
    if rows and number(rows[0].get("over_budget")):
        notes.append(words("No settings keep within the KL budget; nearest: {}.", text(name_of(rows[0]))))
    title = text(f"{found.get('sweep')} · {found.get('stage')}")
    return assemble(title, "", parts, notes, words)


_SEEDS = "Means over seeds, with their standard error."


def name_of(row: Row) -> str:
    """What sets a row apart."""
    return ", ".join(f"{key}={value}" for key, value in members(row.get("settings")).items()) or "all"


def _short(row: Row) -> str:
    """The same by the last word of each setting."""
    return ", ".join(f"{key.split('.')[-1]}={value}" for key, value in members(row.get("settings")).items()) or "all"


def _figures(row: Row, words: Words) -> dict[str, Any]:
    whole = {"objective": row.get("objective"), "± s.e.": row.get("stderr"), "seeds": row.get("seeds")}
    ended = {key: row.get(key) for key in ("failed", "left")}
    if number(row.get("over_budget")):
        ended["over KL budget by"] = row["over_budget"]
    return {**whole, **ended, "time": row.get("seconds"), **members(row.get("results"))}


def _jobs(jobs: Sequence[Row], words: Words) -> str:
    """Every job with a link to its own page; of one that failed, why."""
    rows = []
    for job in jobs:
        name = text(job.get("job"))
        page = job.get("report")
        link = f'<a href="{text(quote(str(page)))}">{name}</a>' if page else name
        status = str(job.get("status"))
        kind = ' class="bad"' if status == "failed" else ""
        cells = f"<td{kind}>{text(words(status))}</td><td>{show(job.get('objective'))}</td>"
        rows.append(f'<th scope="row">{link}</th>{cells}<td>{text(job.get("error") or "")}</td>')
    return table(words("Every job"), [words(head) for head in ("Run", "status", "objective", "error")], rows, "keys")


def _plot(rows: Sequence[Row], words: Words) -> str:
    """The objective against the one number that was swept; else by row."""
    drawn = [row for row in rows if (mean := number(row.get("objective"))) is not None and math.isfinite(mean)]
    dots = [Dot(_short(row), float(row["objective"]), number(row.get("stderr")) or 0.0, _values(row)) for row in drawn]
    if sum(len(dot.values) for dot in dots) < 2:
        return ""
    keys = {key for row in drawn for key in members(row.get("settings"))}
    at = [_float(members(row.get("settings")).get(key)) for row in drawn for key in keys]
    if len(keys) == 1 and len(dots) > 1 and None not in at:
        return _against(keys.pop(), [(x, dot) for x, dot in zip(at, dots, strict=True) if x is not None], words)
    return _by_name(dots[:BARS], words)


def _values(row: Row) -> list[float]:
    values = row.get("values")
    return [x for value in (values if isinstance(values, list) else []) if (x := number(value)) is not None]


def _float(value: object) -> float | None:
    try:
        found = float(str(value))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def _span(dots: Sequence[Dot]) -> tuple[float, float]:
    """From the least that is drawn to the greatest."""
    low = min(min([dot.mean - dot.error, *dot.values]) for dot in dots)
    high = max(max([dot.mean + dot.error, *dot.values]) for dot in dots)
    return low, high


def _against(key: str, found: Sequence[tuple[float, Dot]], words: Words) -> str:
    """A line over the values of a setting, a bar of the standard error at each, and the seeds beside it."""
    left, top, wide, high = 52, 10, 350, 200
    points = sorted(found, key=lambda point: point[0])
    xs = [x for x, _ in points]
    log = xs[0] > 0 and xs[-1] / xs[0] >= _SPREAD
    scale = math.log if log else float
    begin, end = scale(xs[0]), scale(xs[-1])
    low, up = _span([dot for _, dot in points])

    def across(x: float) -> float:
        return left + wide * (scale(x) - begin) / ((end - begin) or 1.0)

    def down(y: float) -> float:
        return top + high - high * (y - low) / ((up - low) or 1.0)

    drawn = f'<path class="axis" fill="none" d="M{left} {top}v{high}h{wide}"/>'
    for mark in round_marks(low, up):
        drawn += f'<path class="axis" d="M{left} {down(mark):.1f}h{wide}"/>'
        drawn += f'<text x="{left - 6}" y="{down(mark) + 3.5:.1f}" text-anchor="end">{mark:g}</text>'
    for x in xs:
        drawn += f'<text x="{across(x):.1f}" y="{top + high + 16}" text-anchor="middle">{x:g}</text>'
    title = f"{key} ({words('logarithmic')})" if log else key
    drawn += f'<text x="{left + wide / 2}" y="{top + high + 33}" text-anchor="middle">{text(title)}</text>'
    line = " ".join(f"{across(x):.1f},{down(dot.mean):.1f}" for x, dot in points)
    drawn += f'<polyline class="c0" points="{line}"/>'
    for x, dot in points:
        at = f"{across(x):.1f}"
        ends = f"{at},{down(dot.mean - dot.error):.1f} {at},{down(dot.mean + dot.error):.1f}"
        drawn += f'<polyline class="c0" points="{ends}"/>' if dot.error else ""
        drawn += "".join(f'<circle class="soft" cx="{at}" cy="{down(y):.1f}"/>' for y in dot.values)
        drawn += f'<circle class="c0" cx="{at}" cy="{down(dot.mean):.1f}" r="3"/>'
    return _figure(drawn, top + high + 42, low, up, words)


def _by_name(dots: Sequence[Dot], words: Words) -> str:
    """A line a row, the best first: its mean, standard error and seeds."""
    left, top, wide = 190, 6, 215
    low, up = _span(dots)
    bottom = top + BETWEEN * len(dots)

    def across(x: float) -> float:
        return left + wide * (x - low) / ((up - low) or 1.0)

    drawn = f'<path class="axis" fill="none" d="M{left} {top}V{bottom}h{wide}"/>'
    for mark in round_marks(low, up, 4):
        drawn += f'<path class="axis" d="M{across(mark):.1f} {top}V{bottom}"/>'
        drawn += f'<text x="{across(mark):.1f}" y="{bottom + 16}" text-anchor="middle">{mark:g}</text>'
    for place, dot in enumerate(dots):
        y = top + BETWEEN * (place + 0.5)
        name = dot.name if len(dot.name) <= LONGEST else f"…{dot.name[1 - LONGEST :]}"
        drawn += f'<text x="{left - 6}" y="{y + 3.5:.1f}" text-anchor="end">{text(name)}</text>'
        ends = f"{across(dot.mean - dot.error):.1f},{y:.1f} {across(dot.mean + dot.error):.1f},{y:.1f}"
        drawn += f'<polyline class="c0" points="{ends}"/>' if dot.error else ""
        drawn += "".join(f'<circle class="soft" cx="{across(x):.1f}" cy="{y:.1f}"/>' for x in dot.values)
        drawn += f'<circle class="c0" cx="{across(dot.mean):.1f}" cy="{y:.1f}" r="3"/>'
    return _figure(drawn, bottom + 26, low, up, words)


def _figure(drawn: str, high: float, low: float, up: float, words: Words) -> str:
    about = text(words("objective: from {} to {}", show(low), show(up)))
    image = f'<svg viewBox="0 0 {WIDE} {high:g}" role="img" aria-label="{about}">{drawn}</svg>'
    head = f"<figcaption><div><b>{text(words('objective'))}</b></div></figcaption>"
    return f'<div class="block"><figure class="wide">{head}{image}</figure></div>\n'
