"""One page a stage: what ran, its results, curves and samples, in a file that asks nothing of the network."""

import contextlib
import html
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.scripts import shown

CHARTS, SAMPLES, PAIRS, BUCKETS = 16, 40, 20, 300  # the most that one page shows; BUCKETS a line of a chart
DRAWN_LAST = {"epoch", "seconds", "episode", "num_tokens", "eps", "lr", "learning_rate", "grad_norm"}
LEFT, TOP, WIDE, HIGH = 62, 8, 250, 104  # the plot inside a chart's viewBox of 320 x 134
STYLE = """
:root{color-scheme:light dark;--page:#fbfbfa;--card:#fff;--ink:#1d2126;--soft:#626a74;--line:#e3e5e8;--faint:#f1f2f4;
--train:#2563c9;--eval:#b4530a;--good:#1a7a48;--bad:#b3261e}
@media screen and (prefers-color-scheme:dark){:root{--page:#121417;--card:#1a1d21;--ink:#e4e7eb;--soft:#98a1ac;
--line:#2c3138;--faint:#22262b;--train:#7fb0ff;--eval:#f2a65a;--good:#5fce94;--bad:#ff8a80}}
*{box-sizing:border-box} body{margin:0 auto;max-width:72rem;padding:3rem 1.5rem 4rem;background:var(--page);
color:var(--ink);font:1rem/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;font-variant-numeric:tabular-nums}
h1{margin:0;font-size:1.9rem;line-height:1.2;overflow-wrap:anywhere} h2{margin:3.25rem 0 1rem;font-size:1.25rem}
h3{margin:2rem 0 .6rem;font-size:.95rem;font-weight:600} a{color:var(--train);text-decoration:none}
nav{display:flex;flex-wrap:wrap;gap:.3rem 1.4rem;margin-top:1rem;font-size:.9rem} a:hover{text-decoration:underline}
.soft,dt,th{color:var(--soft)} .soft{font-size:.88rem;overflow-wrap:anywhere} .status,.train{color:var(--train)}
.status{display:inline-block;margin-top:.75rem;padding:0 .7rem;border:1px solid;border-radius:1rem;font-size:.85rem}
.bad{color:var(--bad)} .good{color:var(--good)} dl{display:grid;grid-template-columns:max-content 1fr;gap:.35rem 2rem}
dl,dd{margin:0;overflow-wrap:anywhere} pre,.t{white-space:pre-wrap;overflow-wrap:anywhere}
.files td,pre{font:.86em/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"DejaVu Sans Mono",monospace}
pre{margin:0;padding:.9rem 1.1rem;background:var(--faint);border-radius:.6rem} .t{display:block;min-width:15rem}
.block{display:inline-block;vertical-align:top;max-width:100%;margin:0 2.5rem 1rem 0} .block h3{margin-top:1rem}
.block:last-child{margin-right:0} .scroll{overflow-x:auto;width:fit-content;max-width:100%}
table{border-collapse:collapse;font-size:.9rem} .axis{stroke:var(--line)}
.scroll,figure{border:1px solid var(--line);border-radius:.6rem;background:var(--card)}
th,td{padding:.55rem 1rem;text-align:left;vertical-align:top} th{font-weight:500;white-space:nowrap}
.numbers td,.numbers th+th{text-align:right;white-space:nowrap} tbody tr{border-top:1px solid var(--line)}
th[scope=row]{color:var(--ink)} figcaption b{margin-right:auto;font-weight:600} .grid{display:grid;gap:1rem}
.grid{grid-template-columns:repeat(auto-fill,minmax(min(17rem,100%),1fr))} .eval{color:var(--eval)}
figure{display:flex;flex-direction:column;margin:0;padding:.9rem 1rem .6rem;break-inside:avoid}
figcaption{display:flex;flex-wrap:wrap;gap:.1rem .9rem;margin-bottom:.5rem;font-size:.88rem;overflow-wrap:anywhere}
svg{display:block;width:100%;margin-top:auto} svg text{fill:var(--soft);font-size:10.5px} circle{fill:currentColor}
polyline{fill:none;stroke:currentColor;stroke-width:1.6;stroke-linejoin:round} polyline.eval{stroke-dasharray:4 3}
@media(max-width:36rem){body{padding:1.75rem 1rem 3rem} dl{grid-template-columns:1fr;gap:0} dd{margin-bottom:.6rem}
h2{margin-top:2.5rem} th,td{padding:.5rem .75rem} .t{min-width:9rem}}
@media print{:root{color-scheme:light} body{max-width:none;padding:0;font-size:10pt} nav{display:none}
.scroll{overflow:visible} .t{min-width:0} td{overflow-wrap:anywhere} tr{break-inside:avoid}
h2,h3{break-after:avoid} .grid{grid-template-columns:repeat(3,1fr)}}
"""
HEAD = """<!DOCTYPE html>
<html lang="en">
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
"""
Lines = dict[str, list[tuple[float, float]]]  # of one metric: train or eval, and its points (step, value)


def text(value: object) -> str:
    """Escape for content and attributes alike, with characters that hide shown as escapes such as \\u202e."""
    return html.escape(shown(str(value)))


def show(value: object) -> str:
    """One JSON value as escaped text: whole numbers whole, others to four digits, a dash for null."""
    if isinstance(value, dict):
        return " · ".join(f"{text(key)} {show(inner)}" for key, inner in value.items()) or "–"
    if isinstance(value, list):
        return ", ".join(show(inner) for inner in value) or "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) < 1e15 and (value.is_integer() or abs(value) >= 1e4) else f"{value:.4g}"
    return "–" if value is None else ("yes" if value else "no") if isinstance(value, bool) else text(value)


def number(value: object) -> float | None:
    """The float of a JSON number, infinite where it is too large for one, and None for anything else."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return math.inf


def members(value: object) -> dict[str, Any]:
    """The object itself, or an empty one where a file holds something else."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[dict[str, Any]]:
    """The objects in a list, whatever else the file holds there."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def read(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line where it is .jsonl; what cannot be read is counted in the notes."""
    content = path.read_bytes().decode("utf-8-sig", "replace") if path.is_file() else ""
    pieces = [piece for piece in (content.split("\n") if path.suffix == ".jsonl" else [content]) if piece.strip()]
    rows: list[dict[str, Any]] = []
    for piece in pieces:
        with contextlib.suppress(ValueError, RecursionError):
            rows += items([json.loads(piece)])
    if len(rows) < len(pieces):
        notes.append(f"{path.name}: {len(pieces) - len(rows)} of {len(pieces)} JSON objects could not be read.")
    return rows


def table(label: str, head: Sequence[str], rows: Sequence[str], kind: str = "") -> str:
    """A titled table in a box of its own that scrolls, or nothing; rows are the finished inside of each row."""
    heads = "".join(f'<th scope="col">{text(name)}</th>' for name in head)
    body = f"<thead><tr>{heads}</tr></thead>\n<tbody>" + "".join(f"<tr>{row}</tr>\n" for row in rows) + "</tbody>"
    box = f'<div class="scroll" tabindex="0" role="region" aria-label="{label}">'
    whole = f'{box}<table class="{kind}">{body}</table></div>'
    return f'<div class="block"><h3>{label}</h3>\n{whole}</div>\n' if rows else ""


def by_row(label: str, corner: str, rows: dict[str, dict[str, Any]], kind: str = "numbers") -> str:
    """A table with one row a name and one column for every key of any row."""
    keys = list(dict.fromkeys(key for row in rows.values() for key in row))
    cells = {name: "".join(f"<td>{show(row.get(key))}</td>" for key in keys) for name, row in rows.items()}
    return table(label, [corner, *keys], [f'<th scope="row">{text(n)}</th>{row}' for n, row in cells.items()], kind)


def by_name(label: str, values: object) -> str:
    """A table of names and values."""
    return by_row(label, "Name", {key: {"Value": value} for key, value in members(values).items()})


def ran(run: dict[str, Any]) -> str:
    """What ran: the facts, where its models came from and the command that repeats it."""
    facts = {key: show(run[key]) for key in ("experiment", "error", "started", "finished") if run.get(key) is not None}
    if (seconds := number(run.get("seconds"))) is not None:
        facts["time"] = show(run["seconds"]) + (f" s ({seconds / 60:.1f} min)" if seconds >= 120 else " s")
    facts |= {k: show(run[k]) for k in ("seed", "data", "git", "hardware", "versions") if run.get(k) is not None}
    shown = "".join(f"<dt>{key.capitalize()}</dt><dd>{value}</dd>\n" for key, value in facts.items())
    lineage = {role: members(made) or {"path": made} for role, made in members(run.get("parents")).items()}
    again = f"<h3>To repeat it</h3>\n<pre>{show(run['command'])}</pre>\n" if run.get("command") else ""
    return (f"<dl>{shown}</dl>\n" if shown else "") + by_row("Made from", "Role", lineage, "files") + again


def results(run: dict[str, Any], evaluation: dict[str, Any], quality: dict[str, Any]) -> str:
    """The numbers that a stage ended with: its own, those of each policy and those of the reward model."""
    policies = {name: members(row) for name, row in members(evaluation.get("metrics")).items()}
    bins = {str(i): row for i, row in enumerate(items(quality.get("calibration")), 1)}
    lines = evaluation.get("warnings")
    return (
        "".join(f'<p class="soft bad">{text(line)}</p>\n' for line in (lines if isinstance(lines, list) else []))
        + by_name("This stage", run.get("results"))
        + by_row("Evaluation by policy", "Policy", policies)
        + by_name("Paired gain", evaluation.get("paired_gain"))
        + by_name("How far each reward moved, in s.d. of the reference's answers", evaluation.get("moved"))
        + "".join(
            by_row(f"By another reward: {text(name)}", "Policy", members(members(judged).get("metrics")))
            for name, judged in members(evaluation.get("rewards")).items()
        )
        + by_name("Reward model quality", {key: value for key, value in quality.items() if key != "calibration"})
        + by_row("Calibration", "Bin", bins)
    )


def gather(rows: list[dict[str, Any]]) -> dict[str, Lines]:
    """Numeric series by metric, then by train or eval, as the file has them; a row without a step follows on."""
    groups: dict[str, Lines] = {}
    at = -1.0
    for row in rows:
        step = number(row.get("step"))
        at = step if step is not None and math.isfinite(step) else at + 1
        for key, value in row.items():
            if key != "step" and (y := number(value)) is not None:
                name, kind = (key[5:], "eval") if key.startswith(("eval_", "eval/")) else (key, "train")
                groups.setdefault(name, {}).setdefault(kind, []).append((at, y))
    return dict(sorted(groups.items(), key=lambda group: group[0] in DRAWN_LAST))


def thin(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """The finite points by step; of a long line both ends and the extremes of each stretch, so that spikes stay."""
    kept = sorted((point for point in points if math.isfinite(point[1])), key=lambda point: point[0])
    size = math.ceil(len(kept) / BUCKETS) if len(kept) > 2 * BUCKETS else 1
    parts = ([(y, x) for x, y in kept[i : i + size]] for i in range(0, len(kept), size))
    return kept[:1] + [p for part in parts for p in sorted({min(part)[::-1], max(part)[::-1]})] + kept[-1:]


def chart(name: str, lines: Lines) -> str:
    """One metric as a small chart: its name, last values, the lines, and the ends of both axes."""
    xs, ys = zip(*(point for points in lines.values() for point in thin(points)), strict=True)
    x0, x1, y0, y1, right, low = min(xs), max(xs), min(ys), max(ys), LEFT + WIDE, TOP + HIGH
    across, up = (x1 / 2 - x0 / 2) or 1.0, (y1 / 2 - y0 / 2) or 1.0  # halves, so that no float overflows
    keys, drawn = "", "".join(f'<path class="axis" d="M{LEFT} {y}h{WIDE}"/>' for y in (TOP, low))
    for kind, points in sorted(lines.items(), reverse=True):
        kept, n = thin(points), sum(not math.isfinite(y) for _, y in points)
        lost = f' <span class="bad">{n} not finite</span>' if n else ""
        keys += f'<span class="{kind}">{kind} {show(kept[-1][1] if kept else None)}{lost}</span>'
        part = [((x / 2 - x0 / 2) / across, (y / 2 - y0 / 2) / up) for x, y in kept]
        dots = [(LEFT + WIDE * x, low - HIGH * y) for x, y in part]
        drawn += f'<polyline class="{kind}" points="{" ".join(f"{x:.1f},{y:.1f}" for x, y in dots)}"/>'
        drawn += "".join(f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="2.6"/>' for x, y in dots[-1:])
    for x, y, end, value in ((LEFT - 6, TOP + 4, "end", y1), (LEFT - 6, low + 3, "end", y0),
                             (LEFT, low + 17, "start", x0), (right, low + 17, "end", x1)):  # fmt: skip
        drawn += f'<text x="{x}" y="{y}" text-anchor="{end}">{show(value)}</text>'
    label = f"{text(name)}, steps {show(x0)} to {show(x1)}, from {show(y0)} to {show(y1)}"
    image = f'<svg viewBox="0 0 320 134" role="img" aria-label="{label}">{drawn}</svg>'
    return f"<figure><figcaption><b>{text(name)}</b>{keys}</figcaption>{image}</figure>\n"


def curves(rows: list[dict[str, Any]]) -> str:
    """The charts of the metrics that change, and the names of those that are not drawn."""
    groups = gather(rows)
    moving = [k for k, lines in groups.items() if any(len({y for _, y in thin(li)}) > 1 for li in lines.values())]
    grid = "".join(chart(name, groups[name]) for name in moving[:CHARTS])
    rest = ", ".join(name for name in groups if name not in moving[:CHARTS])
    left = f'<p class="soft">Not drawn (constant, not finite, or too many): {text(rest)}.</p>\n' if rest else ""
    return (f'<div class="grid">\n{grid}</div>\n' if grid else "") + left


def said(value: object, above: str = "") -> str:
    """A cell of what a model wrote, line breaks kept; nothing at all is said in so many words."""
    return f'<td>{above}<span class="t{" soft" if value == "" else ""}">{show(value) or "(empty)"}</span></td>'


def samples(rows: list[dict[str, Any]], evaluation: dict[str, Any]) -> str:
    """What the models wrote: during training, latest first, and in the evaluation, side by side."""
    latest = sorted(rows, key=lambda row: -(number(row.get("step")) or 0.0))[:SAMPLES]
    shown = [[row.get(key) for key in ("step", "prompt", "response", "reward")] for row in latest]
    lines = [f"<td>{show(at)}</td>{said(ask)}{said(answer)}<td>{show(got)}</td>" for at, ask, answer, got in shown]
    judged, sides = items(evaluation.get("samples")), []
    names = list(dict.fromkeys(name for row in judged for name in members(row.get("responses"))))
    for row in judged[:PAIRS]:
        answers, rewards = members(row.get("responses")), members(row.get("rewards"))
        cells = (said(answers.get(n), f'<span class="soft">reward {show(rewards.get(n))}</span>') for n in names)
        sides.append(said(row.get("prompt")) + "".join(cells))
    first = f"During training, latest first ({len(lines)} of {len(rows)})"
    second = f"Evaluation, side by side ({len(sides)} of {len(judged)})"
    return table(first, ["Step", "Prompt", "Response", "Reward"], lines) + table(second, ["Prompt", *names], sides)


def candidates(rows: list[dict[str, Any]], labels: list[dict[str, Any]]) -> str:
    """The answers that people compare, side by side as they are shown, each with the ranks it was given."""
    ranks: dict[tuple[Any, ...], list[Any]] = {}
    for judged in labels:
        answers, given = (judged[key] if isinstance(judged.get(key), list) else [] for key in ("responses", "ranks"))
        for answer, rank in zip(answers, given, strict=False):
            ranks.setdefault((str(judged.get("task")), str(answer)), []).append(rank)
    lines = []
    for row in rows[:PAIRS]:
        texts = [answer.get("text") for answer in items(row.get("answers"))]
        own = [ranks.get((str(row.get("task")), str(answer))) for answer in texts]
        notes = [f'<span class="soft">rank {show(given)}</span>' if given else "" for given in own]
        lines.append(said(row.get("shown_prompt")) + "".join(said(a, n) for a, n in zip(texts, notes, strict=True)))
    most = max((len(items(row.get("answers"))) for row in rows[:PAIRS]), default=0)
    label = f"Answers to compare ({len(lines)} of {len(rows)})"
    return table(label, ["Prompt", *(f"Answer {n}" for n in range(1, most + 1))], lines)


def page(folder: Path) -> str:
    """The whole page of one stage's folder."""
    notes: list[str] = []
    metrics, written = (read(folder / name, notes) for name in ("metrics.jsonl", "samples.jsonl"))
    single = [read(folder / name, notes) or [{}] for name in ("run.json", "evaluation.json", "quality.json")]
    run, evaluation, quality = (objects[0] for objects in single)
    parts = {"What ran": ran(run), "Results": results(run, evaluation, quality)}
    asked, labels = (read(folder / name, notes) for name in ("candidates.jsonl", "labels.jsonl"))
    parts |= {"Curves": curves(metrics), "Samples": samples(written, evaluation) + candidates(asked, labels)}
    title = text(" · ".join(str(run[key]) for key in ("name", "stage") if run.get(key)) or folder.resolve().name)
    return assemble(title, str(run.get("status") or ""), parts, notes)


def assemble(title: str, state: str, parts: dict[str, str], notes: Sequence[str] = ()) -> str:
    """A page of named parts, each finished; the title is escaped already."""
    status = show(state)
    tone = {"done": " good", "failed": " bad"}.get(status, "")
    badge = f'<span class="status{tone}">{status}</span>\n' if status else ""
    warnings = "".join(f'<p class="soft bad">{text(note)}</p>\n' for note in notes)
    none, links, body = '<p class="soft">Nothing recorded.</p>\n', "", ""
    for name, inner in parts.items():
        key = name.lower().replace(" ", "-")
        links += f'<a href="#{key}">{name}</a>'
        body += f'<section id="{key}">\n<h2>{name}</h2>\n{inner or none}</section>\n'
    head = f"{HEAD}<title>{title}</title>\n<style>{STYLE}</style>\n<body>\n<header><h1>{title}</h1>\n"
    return f"{head}{badge}<nav>{links}</nav>\n{warnings}</header>\n<main>\n{body}</main>\n</body></html>\n"


def write_report(folder: Path) -> Path:
    """Write folder/report.html from whatever files the stage has left."""
    return write_page(folder, page(folder))


def write_page(folder: Path, content: str) -> Path:
    """Write folder/report.html, whole or not at all."""
    target, temporary = folder / "report.html", folder / f".report.{os.getpid()}.tmp"
    try:
        temporary.write_text(content, encoding="utf-8", newline="\n")
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
