"""Charts as inline SVG, all made by `plot`. Values that are not finite are left out of a line."""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_pipeline.report.files import as_dict, as_number, columns, dicts_in, finite
from rlhf_pipeline.report.page import ENGLISH, display
from rlhf_pipeline.report.words import OTHER, Words, grouped
from rlhf_pipeline.report.words import load_yaml as words_of

CHARTS, BUCKETS = 32, 150  # the most charts on one page; the parts that a long line is divided into
CLOCKS = ("epoch", "seconds", "episode", "num_tokens", "eps")  # measures of progress only, not drawn
COLOURS, RUNS, ROWS = 8, 24, 40  # c0 to c7 in chart.css; the most runs of a frontier and rows of a sweep that are drawn
FITTED = 24  # points of a fitted curve
TOP, BELOW, RIGHT = 8, 39, 16  # margins in a chart's viewBox
SMALL, WIDE, SQUARE = (62, 250, 104), (52, 350, 220), (44, 240, 240)  # left margin, width and height of the plot
Coordinates = tuple[float, float]
Tick = tuple[float, str]
Chart = dict[str, Any]
Row = Mapping[str, Any]


class Line(NamedTuple):
    """One line of a chart: label in the legend, CSS classes of chart.css, points, and dots as (x, y, radius)."""

    label: str
    kind: str
    points: Sequence[Coordinates]
    dots: Sequence[tuple[float, float, float]] = ()
    lost: int = 0  # points that are not finite


def plot(
    title: str, lines: Sequence[Line], x_ticks: Sequence[Tick], y_ticks: Sequence[Tick], *,
    size: tuple[int, int, int] = WIDE, scale: Callable[[float], float] = float, **labels: str,
) -> Chart:  # fmt: skip
    """Return a chart whose axes span all points and ticks. `scale` applies to x; macros.html draws `labels`."""
    left, wide, high = size
    points = [dot[:2] for line in lines for dot in (*line.points, *line.dots)]
    xs = [scale(x) for x in (*(x for x, _ in points), *(x for x, _ in x_ticks))]
    ys = [*(y for _, y in points), *(y for y, _ in y_ticks)]

    def fraction(value: float, values: Sequence[float]) -> float:
        low, span = min(values) / 2, max(values) / 2 - min(values) / 2  # halved, so that the difference cannot overflow
        return (value / 2 - low) / (span or 1.0)

    def across(x: float) -> str:
        return f"{left + wide * fraction(scale(x), xs):.1f}"

    def down(y: float) -> str:
        return f"{TOP + high * (1 - fraction(y, ys)):.1f}"

    drawn = [
        {**line._asdict(), "points": " ".join(f"{across(x)},{down(y)}" for x, y in line.points),
         "dots": [(across(x), down(y), f"{r:.1f}") for x, y, r in line.dots]}
        for line in lines
    ]  # fmt: skip
    return {
        "title": title, "lines": drawn, "left": left, "wide": wide, "top": TOP, "high": high, "bottom": TOP + high,
        "x_ticks": [(across(x), text) for x, text in x_ticks], "y_ticks": [(down(y), text) for y, text in y_ticks],
        "width": left + wide + RIGHT, "height": TOP + high + BELOW, "style": "wide", **labels,
    }  # fmt: skip


def gather(rows: Iterable[Row]) -> dict[str, dict[str, list[Coordinates]]]:
    """Return numeric series by measure, then by train or eval. A row without a step gets the next step."""
    groups: dict[str, dict[str, list[Coordinates]]] = {}
    same, at = words_of("measures")["same"], -1.0
    for row in rows:
        step = finite(row.get("step"))
        at = at + 1 if step is None else step
        for key, value in row.items():
            if key != "step" and (y := as_number(value)) is not None:
                name, kind = (key[5:], "eval") if key.startswith(("eval_", "eval/")) else (same.get(key, key), "train")
                groups.setdefault(name, {}).setdefault(kind, []).append((at, y))
    return groups


def thin(points: Sequence[Coordinates]) -> list[Coordinates]:
    """Return the finite points by step. A long line keeps both ends and each part's extremes, so that spikes stay."""
    kept = sorted((point for point in points if math.isfinite(point[1])), key=lambda point: point[0])
    if len(kept) <= 2 * BUCKETS:
        return kept
    size = math.ceil(len(kept) / BUCKETS)
    parts = ([(y, x) for x, y in kept[i : i + size]] for i in range(0, len(kept), size))
    return kept[:1] + [p for part in parts for p in sorted({min(part)[::-1], max(part)[::-1]})] + kept[-1:]


def small_chart(name: str, lines: Sequence[Line], words: Words = ENGLISH, key: str = "", unit: str = "step") -> Chart:
    """Return a small chart of one measure, with the last value of each line and the ends of both axes."""
    drawn = []
    for line in lines:
        kept = thin(line.points)
        label = f"{line.label} {display(kept[-1][1] if kept else None)}"
        lost = sum(not math.isfinite(y) for _, y in line.points)
        drawn.append(Line(label, line.kind, kept, [(*point, 2.6) for point in kept[-1:]], lost))
    xs, ys = zip(*(point for line in drawn for point in line.points), strict=True)
    x_ticks, y_ticks = ([(value, display(value)) for value in sorted({min(each), max(each)})] for each in (xs, ys))
    own = key if key != name else ""
    return plot(name, drawn, x_ticks, y_ticks, size=SMALL, style="", key=own, x_label=words(unit))


def curves(runs: Mapping[str, Iterable[Row]], words: Words) -> dict[str, Any]:
    """Return small charts of the measures that change, in groups, and the names of the measures that are not drawn.

    Each run has a colour. If there is one run, training and held-out data have one each. Held-out data is dashed.
    """
    measures: dict[str, list[Line]] = {}
    for place, (run, rows) in enumerate(runs.items()):
        for name, found in gather(rows).items():
            for kind, points in sorted(found.items(), reverse=True):
                colour = f"{f'c{place}' if len(runs) > 1 else kind}{' dashed' if kind == 'eval' else ''}"
                measures.setdefault(name, []).append(Line(f"{run} {words(kind)}".strip(), colour, points))
    drawn = {name: lines for name, lines in measures.items() if name not in CLOCKS}
    moving = [name for name, lines in drawn.items()
              if any(len({y for _, y in line.points if math.isfinite(y)}) > 1 for line in lines)]  # fmt: skip
    groups = grouped(moving)
    order = [key for keys in groups.values() for key in keys][:CHARTS]
    charts = {group: [small_chart(words.measure(key), drawn[key], words, key) for key in keys if key in order]
              for group, keys in groups.items()}  # fmt: skip
    rest = [key for key in drawn if key not in order]
    return {"groups": charts, "folded": [OTHER] if len(groups) > 1 else [], "rest": rest}


def calibration_chart(value: object, words: Words) -> Chart | None:
    """Return a chart of the observed frequency against the predicted probability, with a dot per bin."""
    bins = [(as_number(row.get("predicted")), as_number(row.get("observed"))) for row in dicts_in(value)]
    points = sorted((p, o) for p, o in bins if p is not None and o is not None and 0 <= p <= 1 and 0 <= o <= 1)
    if not points:
        return None
    lines = [Line("", "soft dashed", [(0, 0), (1, 1)]), Line("", "train", points, [(*point, 4.0) for point in points])]
    ends, note = [(0.0, "0"), (1.0, "1")], words("Dashed line: perfect calibration.")
    return plot(words("Calibration"), lines, ends, ends, size=SQUARE, style="square", note=note,
                x_label=words("predicted probability"), y_label=words("observed frequency"))  # fmt: skip


def frontier_charts(found: Row, words: Words) -> list[Chart]:
    """Return charts of reward against KL, one per reward, with a line per run, best of n, and the fitted curves."""
    starts, rows = dicts_in(found.get("starts")), dicts_in(found.get("points"))
    runs: dict[str, list[Row]] = {}
    for row in rows:
        runs.setdefault(str(row.get("run")), []).append(row)
    ways: list[tuple[str, str, list[Row]]]
    ways = [(words("best of n"), "soft dashed", [*dicts_in(start.get("best_of"))]) for start in starts]
    for at, (run, own) in enumerate(list(runs.items())[:RUNS]):
        begun = [start for start in starts if start.get("key") == own[0].get("start")]
        ways.append((run, f"c{at % COLOURS}", begun + [row for row in own if row.get("step") is not None]))
    kinds = {name: kind for name, kind, _ in ways[len(starts) :]}
    rewards = ["", *columns(row.get("rewards") for row in rows)]
    fitted = {reward: [line for fit in dicts_in(found.get("fits")) if fit.get("reward") == reward
                       for line in _fitted(fit, starts, kinds)] for reward in rewards}  # fmt: skip
    charts = (_against_kl(reward, ways, fitted[reward], words) for reward in rewards)
    return [chart for chart in charts if chart]


def _fitted(fit: Row, starts: Sequence[Row], kinds: Mapping[str, str]) -> Iterator[Line]:
    """Yield a fitted curve: dashed in the colour of its run, or solid for best of n, whose own line is dashed."""
    start = next((start for start in starts if start.get("key") == fit.get("start")), {})
    own = as_dict(as_dict(start.get("rewards")).get(str(fit.get("reward")))) if fit.get("reward") else start
    numbers = [finite(value) for value in (own.get("reward_mean"), *map(fit.get, ("alpha", "beta", "to")))]
    known = [value for value in numbers if value is not None]
    kind = "soft" if fit.get("way") == "best of n" else f"{kinds.get(str(fit.get('way')), '')} dashed"
    if len(known) == len(numbers) and known[-1] > 0 and kind != " dashed":
        base, alpha, beta, to = known
        distances = [to * step / FITTED for step in range(1, FITTED + 1)]
        bend = float if kind == "soft" else math.log
        yield Line("", kind, [(0.0, base), *((d * d, base + d * (alpha - beta * bend(d))) for d in distances)])


def _against_kl(
    reward: str, ways: Sequence[tuple[str, str, list[Row]]], fitted: Sequence[Line], words: Words
) -> Chart | None:
    """Return the chart of one reward. The main reward has the name ''."""
    lines = []
    for name, kind, rows in ways:
        points = []
        for row in rows:
            own = as_dict(as_dict(row.get("rewards")).get(reward)) if reward else row
            if (kl := finite(row.get("kl"))) is not None and (mean := finite(own.get("reward_mean"))) is not None:
                points.append((max(kl, 0.0), mean))
        lines += [Line(name, kind, points, [(*point, 2.4) for point in points])] if points else []
    if not lines:
        return None
    lines += fitted
    xs, ys = zip(*(point for line in lines for point in line.points), strict=True)
    ticks = [((max(xs) or 1.0) * share) for share in (0, 1 / 16, 1 / 4, 9 / 16, 1)]
    x_ticks, title = [(value, f"{value:.2g}") for value in ticks], reward or words("Reward")
    return plot(title, lines, x_ticks, even_ticks(ys), scale=math.sqrt, x_label="KL")


def sweep_chart(rows: Sequence[Row], words: Words) -> Chart | None:
    """Return a chart of each row's objective, the best at the top: its mean, standard error and single seeds."""
    known = [row for row in rows if finite(row.get("objective")) is not None][:ROWS]
    if len(known) < 2:
        return None
    lines, names = list[Line](), [(0.5, ""), (0.5 - len(known), "")]
    for place, row in enumerate(known):
        mean, error, y = float(row["objective"]), as_number(row.get("stderr")) or 0.0, -float(place)
        lines.append(Line("", "soft", [], [(value, y, 1.6) for value in row.get("values") or []]))
        lines.append(Line("", "c0", [(mean - error, y), (mean + error, y)], [(mean, y, 3.0)]))
        names.append((y, name if len(name := settings_text(row)) <= 28 else f"…{name[-27:]}"))
    xs = [point[0] for line in lines for point in (*line.points, *line.dots)]
    return plot(words("objective"), lines, even_ticks(xs), names, size=(190, 215, 24 * len(known)))


def settings_text(row: Row) -> str:
    """Return the settings of a sweep's row, each by the last part of its name: kl_coef=0.05."""
    return ", ".join(f"{key.split('.')[-1]}={value}" for key, value in as_dict(row.get("settings")).items()) or "all"


def even_ticks(values: Sequence[float]) -> list[Tick]:
    """Return five evenly spaced ticks from the least to the greatest value."""
    low, span = min(values), max(values) - min(values)
    return [(low + span * part / 4, f"{low + span * part / 4:.3g}") for part in range(5)]
