"""Charts as inline SVG: one `plot` for all of them. A line never goes through what is no finite number."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_pipeline.report.files import items, members, number
from rlhf_pipeline.report.page import ENGLISH, Block, note, plain
from rlhf_pipeline.report.words import OTHER, Words, grouped
from rlhf_pipeline.report.words import table as words_of

CHARTS, BUCKETS = 32, 150  # the most charts that one page shows; stretches a line is thinned to
CLOCKS = ("epoch", "seconds", "episode", "num_tokens", "eps")  # they only say how far a run is
COLOURS, RUNS = 8, 24  # c0 to c7 in page.css; runs that a frontier draws
BARS, LONGEST = 40, 28  # rows that a sweep draws, and characters of a row's name
TOP, RIGHT = 8, 16  # margins in a chart's viewBox
Point = tuple[float, float]
Tick = tuple[float, str]


class Line(NamedTuple):
    """One line of a chart: its label in the key, its classes in page.css, its points, and dots as (x, y, radius)."""

    label: str
    kind: str
    points: Sequence[Point]
    dots: Sequence[tuple[float, float, float]] = ()
    lost: str = ""


def plot(
    title: str, lines: Sequence[Line], x_ticks: Sequence[Tick], y_ticks: Sequence[Tick], about: str,
    x_label: str = "", y_label: str = "", *, size: tuple[int, int, int] = (52, 350, 220), style: str = "wide",
    scale: Callable[[float], float] = float, grid: str = "y", key: str = "", note: str = "",
) -> Block:  # fmt: skip
    """Lines and dots over two axes, which span all points and ticks.

    `size` is the left margin, width and height of the plot; `scale` is that of x; a small chart (no `style`) has its
    x label on the row of the ticks.
    """
    left, wide, high = size
    bottom = TOP + high
    points = [point for line in lines for point in (*line.points, *(dot[:2] for dot in line.dots))]
    xs = [scale(x) for x in (*(x for x, _ in points), *(x for x, _ in x_ticks))]
    ys = [*(y for _, y in points), *(y for y, _ in y_ticks)]

    def fraction(value: float, values: Sequence[float]) -> float:
        low, span = min(values) / 2, max(values) / 2 - min(values) / 2  # halves, so that no float overflows
        return (value / 2 - low) / (span or 1.0)

    def across(x: float) -> str:
        return f"{left + wide * fraction(scale(x), xs):.1f}"

    def down(y: float) -> str:
        return f"{bottom - high * fraction(y, ys):.1f}"

    ways = [f"M{left} {TOP}v{high}h{wide}"] if style else []
    ways += [f"M{across(x)} {TOP}v{high}" for x, _ in x_ticks] if grid == "x" else []
    ways += [f"M{left} {down(y)}h{wide}" for y, _ in y_ticks] if grid == "y" else []
    anchors = ["middle"] * len(x_ticks) if style else ["start", "end"]
    ticks = [(across(x), str(bottom + 16), at, text) for (x, text), at in zip(x_ticks, anchors, strict=False)]
    ticks += [(str(left - 6), f"{float(down(y)) + 3.5:.1f}", "end", text) for y, text in y_ticks if text]
    low = 33 if style and x_label else 16
    ticks += [(f"{left + wide / 2:g}", str(bottom + low), "middle", x_label)] if x_label else []
    drawn = [
        {
            "label": line.label, "kind": line.kind, "lost": line.lost,
            "points": " ".join(f"{across(x)},{down(y)}" for x, y in line.points),
            "dots": [(across(x), down(y), f"{r:.1f}") for x, y, r in line.dots],
        }
        for line in lines
    ]  # fmt: skip
    return {
        "kind": "chart", "title": title, "key": key, "note": note, "style": style, "about": about, "grid": ways,
        "width": left + wide + RIGHT, "height": bottom + low + 6, "middle": TOP + high / 2,
        "lines": drawn, "ticks": ticks, "y_label": y_label,
    }  # fmt: skip


def gather(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, list[Point]]]:
    """Numeric series by measure, then by train or eval; a row without a step follows on."""
    groups: dict[str, dict[str, list[Point]]] = {}
    same, at = words_of("measures")["same"], -1.0
    for row in rows:
        step = number(row.get("step"))
        at = step if step is not None and math.isfinite(step) else at + 1
        for key, value in row.items():
            if key != "step" and (y := number(value)) is not None:
                name, kind = (key[5:], "eval") if key.startswith(("eval_", "eval/")) else (same.get(key, key), "train")
                groups.setdefault(name, {}).setdefault(kind, []).append((at, y))
    return groups


def thin(points: Sequence[Point]) -> list[Point]:
    """The finite points by step; of a long line both ends and the extremes of each stretch, so that spikes stay."""
    kept = sorted((point for point in points if math.isfinite(point[1])), key=lambda point: point[0])
    size = math.ceil(len(kept) / BUCKETS) if len(kept) > 2 * BUCKETS else 1
    parts = ([(y, x) for x, y in kept[i : i + size]] for i in range(0, len(kept), size))
    return kept[:1] + [p for part in parts for p in sorted({min(part)[::-1], max(part)[::-1]})] + kept[-1:]


def chart(name: str, lines: Sequence[Line], words: Words = ENGLISH, key: str = "", unit: str = "step") -> Block:
    """One measure as a small chart, with the last value of each line, and only the ends of both axes marked."""
    drawn = []
    for line in lines:
        kept = thin(line.points)
        n = sum(not math.isfinite(y) for _, y in line.points)
        label = f"{line.label} {plain(kept[-1][1] if kept else None)}"
        lost = f"{n} {words('not finite')}" if n else ""
        drawn.append(Line(label, line.kind, kept, [(*point, 2.6) for point in kept[-1:]], lost))
    xs, ys = zip(*(point for line in drawn for point in line.points), strict=True)
    ends = [sorted({min(values), max(values)}) for values in (xs, ys)]
    across, up = ([(value, plain(value)) for value in values] for values in ends)
    about = words("steps {} to {}, from {} to {}", *map(plain, (min(xs), max(xs), min(ys), max(ys))))
    own = key if key != name else ""
    return plot(name, drawn, across, up, f"{name}, {about}", words(unit), size=(62, 250, 104), style="", key=own)


def charts(measures: Mapping[str, Sequence[Line]], words: Words) -> list[Block]:
    """Charts of the measures that change, in groups, and the names of those that are not drawn."""

    def moves(lines: Iterable[Line]) -> bool:
        return any(len({y for _, y in line.points if math.isfinite(y)}) > 1 for line in lines)

    moving = grouped([key for key, lines in measures.items() if key not in CLOCKS and moves(lines)])
    order = [key for keys in moving.values() for key in keys][:CHARTS]
    out: list[Block] = []
    for group, keys in moving.items():
        drawn = [chart(words.measure(key), measures[key], words, key) for key in keys if key in order]
        folded = group == OTHER and len(moving) > 1
        out += [{"kind": "charts", "label": words(group), "folded": folded, "charts": drawn}] if drawn else []
    rest = ", ".join(key for key in measures if key not in order and key not in CLOCKS)
    return out + note(f"{words('Not drawn (constant, not finite, or too many)')}: {rest}." if rest else "")


def curves(rows: Sequence[Mapping[str, Any]], words: Words) -> list[Block]:
    """The charts of one stage: what was measured in training against what was measured on held-out data."""
    kinds = {"train": "train", "eval": "eval dashed"}
    measures = {
        name: [Line(words(kind), kinds[kind], points) for kind, points in sorted(lines.items(), reverse=True)]
        for name, lines in gather(rows).items()
    }
    return charts(measures, words)


def calibration(value: object, words: Words) -> list[Block]:
    """How often a reward is right against how sure it is: a dot per bin, the larger the more it holds."""
    bins = [[number(row.get(key)) for key in ("predicted", "observed", "count")] for row in items(value)]
    dots = [(p, o, n or 0.0) for p, o, n in bins if p is not None and o is not None and 0 <= p <= 1 and 0 <= o <= 1]
    if not dots:
        return []
    most = max(n for _, _, n in dots) or 1.0
    sized = [(p, o, 3 + 7 * math.sqrt(max(n, 0.0) / most)) for p, o, n in dots]
    lines = [Line("", "soft dashed", [(0, 0), (1, 1)]), Line("", "train", sorted((p, o) for p, o, _ in dots), sized)]
    ends, axes = [(0.0, "0"), (1.0, "1")], (words("how sure it is"), words("how often it is right"))
    title, about = words("Calibration"), words("Dashed line: perfect calibration. Larger dots: more pairs.")
    return [plot(title, lines, ends, ends, title, *axes, size=(44, 240, 240), style="square", note=about)]


def frontier_charts(found: Mapping[str, Any], words: Words) -> list[Block]:
    """Reward against KL of a sweep's policies, one chart per reward: a line per run, and best of n."""
    starts, rows = items(found.get("starts")), items(found.get("points"))
    others = dict.fromkeys(name for row in rows for name in members(row.get("rewards")))
    runs = list(dict.fromkeys(str(row.get("run")) for row in rows))[:RUNS]
    out = []
    for reward in (None, *others):

        def place(row: Mapping[str, Any], reward: str | None = reward) -> list[Point]:
            own = row if reward is None else members(members(row.get("rewards")).get(reward))
            kl, mean = number(row.get("kl")), number(own.get("reward_mean"))
            return [(max(kl, 0.0), mean)] if kl is not None and mean is not None and math.isfinite(kl + mean) else []

        begun = {str(start.get("key")): place(start) for start in starts}
        ways = [(words("best of n"), "soft dashed", [p for row in items(start.get("best_of")) for p in place(row)])
                for start in starts]  # fmt: skip
        for at, run in enumerate(runs):
            own = [row for row in rows if str(row.get("run")) == run]
            way = [p for row in own if row.get("step") is not None for p in place(row)]
            ways.append((run, f"c{at % COLOURS}", begun.get(str(own[0].get("start")), []) + way))
        lines = [Line(name, kind, way, [(*p, 2.4) for p in way]) for name, kind, way in ways if way]
        if not lines:
            continue
        ys = [y for line in lines for _, y in line.points]
        far = max(x for line in lines for x, _ in line.points) or 1.0
        title = reward or words("Reward")
        about = words("{}: from {} to {}, at a KL of up to {}", title, *map(plain, (min(ys), max(ys), far)))
        x_ticks = [(far * share, f"{far * share:.2g}") for share in (0, 1 / 16, 1 / 4, 9 / 16, 1)]
        out.append(plot(title, lines, x_ticks, round_ticks(min(ys), max(ys)), about, "KL", scale=math.sqrt))
    return out


def sweep_chart(rows: Sequence[Mapping[str, Any]], words: Words) -> list[Block]:
    """The objective with its standard error and seeds: against the one number that was swept, else by row."""
    drawn = [row for row in rows if (mean := number(row.get("objective"))) is not None and math.isfinite(mean)]
    seeds = [[y for value in row["values"] if (y := number(value)) is not None]
             if isinstance(row.get("values"), list) else [] for row in drawn]  # fmt: skip
    if sum(map(len, seeds)) < 2:
        return []
    settings = [members(row.get("settings")) for row in drawn]
    keys = {key for own in settings for key in own}
    at = [_finite(next(iter(own.values()), None)) for own in settings]
    by_value = len(keys) == 1 and len(drawn) > 1 and None not in at
    if not by_value:
        drawn = drawn[:BARS]
    xs = [x or 0.0 for x in at] if by_value else [-float(place) for place in range(len(drawn))]

    def point(x: float, y: float) -> Point:
        return (x, y) if by_value else (y, x)  # by row, the objective goes across

    lines, ends = [], []
    for x, row, values in zip(xs, drawn, seeds, strict=False):
        mean, error = float(row["objective"]), number(row.get("stderr")) or 0.0
        ends += [mean - error, mean + error, *values]
        bar = [point(x, mean - error), point(x, mean + error)] if error else []
        lines.append(Line("", "soft", [], [(*point(x, y), 1.6) for y in values]))
        lines.append(Line("", "c0", bar, [(*point(x, mean), 3.0)]))
    low, high = min(ends), max(ends)
    title, about = words("objective"), words("objective: from {} to {}", plain(low), plain(high))
    if not by_value:
        names = [(x, name if len(name := short(row)) <= LONGEST else f"…{name[1 - LONGEST :]}")
                 for x, row in zip(xs, drawn, strict=True)]  # fmt: skip
        names += [(0.5, ""), (0.5 - len(drawn), "")]
        size = (190, 215, 24 * len(drawn))
        return [plot(title, lines, round_ticks(low, high, 4), names, about, size=size, grid="x")]
    means = sorted((x, float(row["objective"])) for x, row in zip(xs, drawn, strict=True))
    wide = min(xs) > 0 and max(xs) / min(xs) >= 10
    name = f"{keys.pop()} ({words('logarithmic')})" if wide else keys.pop()
    x_ticks = [(x, f"{x:g}") for x in sorted(set(xs))]
    lines = [Line("", "c0", means), *lines]
    return [plot(title, lines, x_ticks, round_ticks(low, high), about, name, scale=math.log if wide else float)]


def short(row: Mapping[str, Any]) -> str:
    """What sets a row of a sweep apart, by the last word of each setting: kl_coef=0.05."""
    return ", ".join(f"{key.split('.')[-1]}={value}" for key, value in members(row.get("settings")).items()) or "all"


def _finite(value: object) -> float | None:
    try:
        found = float(str(value))
    except ValueError:
        return None
    return found if math.isfinite(found) else None


def round_ticks(low: float, high: float, about: int = 5) -> list[Tick]:
    """Round numbers between two, about so many."""
    span = (high - low) / about
    if not span > 0 or not math.isfinite(span):
        return [(low, f"{low:g}")]
    power = 10 ** math.floor(math.log10(span))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= span)
    marks = [round(step * place, 12) for place in range(math.ceil(low / step), math.floor(high / step) + 1)]
    return [(mark, f"{mark:g}") for mark in marks]
