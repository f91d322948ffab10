"""Reward against KL of a sweep's policies: a line a run from where it began, and the best of n beside them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rlhf_pipeline.report.curves import Line
from rlhf_pipeline.report.files import items, members, number
from rlhf_pipeline.report.markup import by_row, show, text
from rlhf_pipeline.report.texts import judged
from rlhf_pipeline.report.words import Words

LEFT, TOP, WIDE, HIGH = 46, 10, 360, 230  # the plot inside a viewBox of 420 x 286
COLOURS, RUNS = 8, 24  # classes of the style sheet; lines that are drawn
Row = Mapping[str, Any]


def frontier(found: Row, words: Words) -> str:
    """The charts, one a reward, and the tables of what frontier.json holds."""
    starts, points = items(found.get("starts")), items(found.get("points"))
    if not points:
        return ""
    others = dict.fromkeys(name for row in points for name in members(row.get("rewards")))
    drawn = "".join(_drawn(name, starts, points, words) for name in (None, *others))
    rows = {f"{row.get('run')} · {_step(row, words)}": _figures(row, words) for row in points}
    best = {
        " · ".join([f"{words('best of')} {show(row.get('n'))}", *_place(start, starts)]): {
            key: row.get(key) for key in ("reward_mean", "reward_stderr", "kl")
        }
        for start in starts
        for row in items(start.get("best_of"))
        if (n := number(row.get("n"))) and math.log2(max(n, 1)).is_integer()
    }
    return (
        f'<p class="soft">{words("Reward: {}. KL in nats, on a square-root scale.", show(found.get("reward")))}</p>\n'
        + drawn
        + by_row("Policies of the sweep", "Run", rows, words=words)
        + by_row("Best of n, without training", "", best, words=words)
    )


def _place(start: Row, starts: Sequence[Row]) -> list[str]:
    """Where a policy lies, with its seed, where there is more than one."""
    return [f"{start.get('path')} · {start.get('seed')}"] if len(starts) > 1 else []


def answers(found: Row, words: Words) -> str:
    """What the last policy of each run said to the same prompts, for every place that runs began at."""
    out = ""
    for start in items(found.get("starts")):
        own = [row for row in items(found.get("points")) if row.get("start") == start.get("key")]
        last = {words("before"): start, **{str(row.get("run")): row for row in own}}
        asked: Any = start.get("asked") if isinstance(start.get("asked"), list) else []
        said = {name: items(row.get("answers")) for name, row in list(last.items())[:RUNS]}
        rows = [
            {"prompt": prompt, **{f"{kind}s": {name: row[at].get(kind) for name, row in said.items() if at < len(row)}
                                  for kind in ("response", "reward")}}
            for at, prompt in enumerate(asked)
        ]  # fmt: skip
        out += judged("Answers of each run's last policy", rows, words)
    return out


def _step(row: Row, words: Words) -> str:
    return words("result") if row.get("step") is None else show(row.get("step"))


def _figures(row: Row, words: Words) -> dict[str, Any]:
    gain, best = members(row.get("gain")), row.get("best_of")
    return {
        **{key: row.get(key) for key in ("reward_mean", "reward_stderr", "kl")},
        "gain": gain.get("mean"), "95 % from": gain.get("low"), "95 % to": gain.get("high"),
        "as good as best of": best if best is not None else words("more"),
        **{str(name): members(other).get("reward_mean") for name, other in members(row.get("rewards")).items()},
        **{key: row.get(key) for key in ("perplexity", "distinct_2", "length")},
        "frontier": bool(row.get("frontier")),
    }  # fmt: skip


def _drawn(reward: str | None, starts: Sequence[Row], points: Sequence[Row], words: Words) -> str:
    """The chart of one reward; None is the main one."""

    def at(row: Row) -> tuple[float, float] | None:
        own = row if reward is None else members(members(row.get("rewards")).get(reward))
        kl, mean = number(row.get("kl")), number(own.get("reward_mean"))
        return (max(kl, 0.0), mean) if kl is not None and mean is not None and math.isfinite(kl + mean) else None

    begun = {str(start.get("key")): at(start) for start in starts}
    lines = [Line(words("best of n"), "soft dashed", _places(at(row) for row in items(start.get("best_of"))))
             for start in starts]  # fmt: skip
    for place, run in enumerate(list(dict.fromkeys(str(row.get("run")) for row in points))[:RUNS]):
        own = [row for row in points if str(row.get("run")) == run]
        way = [at(row) for row in own if row.get("step") is not None]
        lines.append(Line(run, f"c{place % COLOURS}", _places([begun.get(str(own[0].get("start"))), *way])))
    return _chart(reward or words("Reward"), [line for line in lines if line.points], words)


def _places(found: Iterable[tuple[float, float] | None]) -> list[tuple[float, float]]:
    return [place for place in found if place is not None]


def _chart(title: str, lines: Sequence[Line], words: Words) -> str:
    """Lines in the order of their points, a dot each; both axes with round marks."""
    if not lines:
        return ""
    ys = [y for line in lines for _, y in line.points]
    low, high, far = min(ys), max(ys), max(x for line in lines for x, _ in line.points) or 1.0
    up, root = (high - low) or 1.0, math.sqrt(far)
    bottom = TOP + HIGH
    drawn = f'<path class="axis" fill="none" d="M{LEFT} {TOP}v{HIGH}h{WIDE}"/>'
    for mark in round_marks(low, high):
        y = bottom - HIGH * (mark - low) / up
        drawn += f'<path class="axis" d="M{LEFT} {y:.1f}h{WIDE}"/>'
        drawn += f'<text x="{LEFT - 6}" y="{y + 3.5:.1f}" text-anchor="end">{mark:g}</text>'
    for mark in [0.0, *(far * share for share in (1 / 16, 1 / 4, 9 / 16, 1.0))]:
        x = LEFT + WIDE * math.sqrt(mark) / root
        drawn += f'<text x="{x:.1f}" y="{bottom + 16}" text-anchor="middle">{mark:.2g}</text>'
    drawn += f'<text x="{LEFT + WIDE / 2}" y="{bottom + 33}" text-anchor="middle">KL</text>'
    keys = ""
    for line in lines:
        dots = [(LEFT + WIDE * math.sqrt(x) / root, bottom - HIGH * (y - low) / up) for x, y in line.points]
        drawn += f'<polyline class="{line.kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in dots)}"/>'
        drawn += "".join(f'<circle class="{line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.4"/>' for x, y in dots)
        keys += f'<span class="{line.kind}">{text(line.label)}</span>'
    about = words("{}: from {} to {}, at a KL of up to {}", text(title), show(low), show(high), show(far))
    image = f'<svg viewBox="0 0 420 286" role="img" aria-label="{about}">{drawn}</svg>'
    head = f"<figcaption><div><b>{text(title)}</b></div><div>{keys}</div></figcaption>"
    return f'<div class="block"><figure class="wide">{head}{image}</figure></div>\n'


def round_marks(low: float, high: float, about: int = 5) -> list[float]:
    """Round numbers between two, some `about` of them."""
    span = (high - low) / about
    if not span > 0 or not math.isfinite(span):
        return [low]
    power = 10 ** math.floor(math.log10(span))
    step = power * next(factor for factor in (1, 2, 5, 10) if factor * power >= span)
    first = math.ceil(low / step)
    return [round(step * place, 12) for place in range(first, math.floor(high / step) + 1)]
