"""Curves as inline SVG: thinned so that a page stays small, and never drawn through what is no number."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from rlhf_pipeline.report.files import items, number
from rlhf_pipeline.report.markup import ENGLISH, show, text
from rlhf_pipeline.report.words import OTHER, SAME, Words, grouped

CHARTS, BUCKETS = 32, 150  # the most charts that one page shows; stretches a line is thinned to
CLOCKS = ("epoch", "seconds", "episode", "num_tokens", "eps")  # they only say how far a run is
LEFT, TOP, WIDE, HIGH = 62, 8, 250, 104  # the plot inside a chart's viewBox of 320 x 134
Points = list[tuple[float, float]]  # (step, value)


class Line(NamedTuple):
    """One line of a chart: what it is called, its classes in the style sheet, and its points."""

    label: str
    kind: str
    points: Points


def gather(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Points]]:
    """Numeric series by measure, then by train or eval; a row without a step follows on."""
    groups: dict[str, dict[str, Points]] = {}
    at = -1.0
    for row in rows:
        step = number(row.get("step"))
        at = step if step is not None and math.isfinite(step) else at + 1
        for key, value in row.items():
            if key != "step" and (y := number(value)) is not None:
                name, kind = (key[5:], "eval") if key.startswith(("eval_", "eval/")) else (SAME.get(key, key), "train")
                groups.setdefault(name, {}).setdefault(kind, []).append((at, y))
    return groups


def thin(points: Points) -> Points:
    """The finite points by step; of a long line both ends and the extremes of each stretch, so that spikes stay."""
    kept = sorted((point for point in points if math.isfinite(point[1])), key=lambda point: point[0])
    size = math.ceil(len(kept) / BUCKETS) if len(kept) > 2 * BUCKETS else 1
    parts = ([(y, x) for x, y in kept[i : i + size]] for i in range(0, len(kept), size))
    return kept[:1] + [p for part in parts for p in sorted({min(part)[::-1], max(part)[::-1]})] + kept[-1:]


def chart(name: str, lines: Sequence[Line], words: Words = ENGLISH, key: str = "", unit: str = "step") -> str:
    """One measure as a small chart: its name, last values, the lines, and the ends of both axes."""
    thinned = [thin(line.points) for line in lines]
    xs, ys = zip(*(point for points in thinned for point in points), strict=True)
    x0, x1, y0, y1, right, low = min(xs), max(xs), min(ys), max(ys), LEFT + WIDE, TOP + HIGH
    across, up = (x1 / 2 - x0 / 2) or 1.0, (y1 / 2 - y0 / 2) or 1.0  # halves, so that no float overflows
    keys, drawn = "", "".join(f'<path class="axis" d="M{LEFT} {y}h{WIDE}"/>' for y in (TOP, low))
    for line, kept in zip(lines, thinned, strict=True):
        n = sum(not math.isfinite(y) for _, y in line.points)
        lost = f' <span class="bad">{n} {words("not finite")}</span>' if n else ""
        keys += f'<span class="{line.kind}">{text(line.label)} {show(kept[-1][1] if kept else None)}{lost}</span>'
        part = [((x / 2 - x0 / 2) / across, (y / 2 - y0 / 2) / up) for x, y in kept]
        dots = [(LEFT + WIDE * x, low - HIGH * y) for x, y in part]
        drawn += f'<polyline class="{line.kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in dots)}"/>'
        drawn += "".join(f'<circle class="{line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots[-1:])
    for x, y, end, value in ((LEFT - 6, TOP + 4, "end", y1), (LEFT - 6, low + 3, "end", y0),
                             (LEFT, low + 17, "start", x0), (right, low + 17, "end", x1)):  # fmt: skip
        drawn += f'<text x="{x}" y="{y}" text-anchor="{end}">{show(value)}</text>'
    drawn += f'<text x="{LEFT + WIDE // 2}" y="{low + 17}" text-anchor="middle">{words(unit)}</text>'
    ends = words("steps {} to {}, from {} to {}", *map(show, (x0, x1, y0, y1)))
    image = f'<svg viewBox="0 0 320 134" role="img" aria-label="{text(name)}, {ends}">{drawn}</svg>'
    own = f"<code>{text(key)}</code>" if key and key != name else ""
    return f"<figure><figcaption><div><b>{text(name)}</b>{own}</div><div>{keys}</div></figcaption>{image}</figure>\n"


def _moves(lines: Iterable[Line]) -> bool:
    return any(len({y for _, y in line.points if math.isfinite(y)}) > 1 for line in lines)


def draw(measures: Mapping[str, Sequence[Line]], words: Words) -> str:
    """Charts of the measures that change, in groups, and the names of those that are not drawn."""
    moving = grouped([key for key, lines in measures.items() if key not in CLOCKS and _moves(lines)])
    order = [key for keys in moving.values() for key in keys][:CHARTS]
    out = ""
    for group, keys in moving.items():
        charts = "".join(chart(words.measure(k), measures[k], words, k) for k in keys if k in order)
        grid = f'<div class="grid">\n{charts}</div>\n'
        if charts and group == OTHER and len(moving) > 1:
            out += f"<details><summary>{words(group)}</summary>\n{grid}</details>\n"
        elif charts:
            out += f"<h3>{words(group)}</h3>\n{grid}"
    rest = ", ".join(key for key in measures if key not in order and key not in CLOCKS)
    about = words("Not drawn (constant, not finite, or too many)")
    return out + (f'<p class="soft">{about}: {text(rest)}.</p>\n' if rest else "")


def curves(rows: Sequence[Mapping[str, Any]], words: Words) -> str:
    """The charts of one stage: what was measured in training against what was measured on held-out data."""
    kinds = {"train": "train", "eval": "eval dashed"}
    return draw(
        {
            name: [Line(words(kind), kinds[kind], points) for kind, points in sorted(lines.items(), reverse=True)]
            for name, lines in gather(rows).items()
        },
        words,
    )


def calibration(value: object, words: Words) -> str:
    """How often a reward is right against how sure it is: a dot a bin, the larger the more it holds."""
    bins = [[number(row.get(key)) for key in ("predicted", "observed", "count")] for row in items(value)]
    dots = [(p, o, n or 0.0) for p, o, n in bins if p is not None and o is not None and 0 <= p <= 1 and 0 <= o <= 1]
    if not dots:
        return ""
    most = max(n for _, _, n in dots) or 1.0
    places = [(44 + 240 * p, 250 - 240 * o, 3 + 7 * math.sqrt(max(n, 0.0) / most)) for p, o, n in dots]
    drawn = '<path class="axis" fill="none" d="M44 10h240v240h-240z"/><path class="axis dashed" d="M44 250 284 10"/>'
    drawn += f'<polyline class="train" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y, _ in sorted(places))}"/>'
    drawn += "".join(f'<circle class="train" cx="{x:.1f}" cy="{y:.1f}" r="{r:.1f}"/>' for x, y, r in places)
    for x, y, end, mark in (
        (38, 14, "end", "1"),
        (38, 253, "end", "0"),
        (44, 266, "start", "0"),
        (284, 266, "end", "1"),
    ):
        drawn += f'<text x="{x}" y="{y}" text-anchor="{end}">{mark}</text>'
    across, up = words("how sure it is"), words("how often it is right")
    drawn += f'<text x="164" y="266" text-anchor="middle">{across}</text>'
    drawn += f'<text transform="translate(30 130) rotate(-90)" text-anchor="middle">{up}</text>'
    image = f'<svg viewBox="0 0 300 274" role="img" aria-label="{words("Calibration")}">{drawn}</svg>'
    about = words("On the dashed line it is as right as it is sure.")
    head = f'<figcaption><b>{words("Calibration")}</b><div class="soft">{about}</div></figcaption>'
    return f'<div class="block"><figure class="square">{head}{image}</figure></div>\n'
