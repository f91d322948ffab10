"""The page of one stage: what ran and from what, its results, curves and samples, and how to repeat it."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.report.charts import calibration, curves
from rlhf_pipeline.report.evaluation import evaluation_tables
from rlhf_pipeline.report.files import config, items, members, number, only, read
from rlhf_pipeline.report.page import Block, assemble, by_name, by_row, facts, note, plain, tiles, write_page
from rlhf_pipeline.report.samples import candidates, judged, over_time
from rlhf_pipeline.report.sweep import frontier, frontier_answers
from rlhf_pipeline.report.words import LANGUAGES, Words

SECONDS, SHARE = 5.0, 50.0  # between two drawings: at least so long, and so many times what the last one took
TILES, DEEPEST = 12, 9  # numbers that are seen first; levels by which a stage of the lineage is set in
_EXTREMES = ("best", "worst", "most changed")
_CLOCK = re.compile(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d\+00:00$")
_LOGS = ("metrics", "samples", "warnings", "candidates", "labels")


def lineage(folder: Path, run: Mapping[str, Any], words: Words) -> list[Block]:
    """A small tree: each stage after those it was made from, set in by how far it is from the first."""
    lines: list[tuple[int, str, bool, str]] = []
    levels: dict[Path, int] = {}
    above, depth = folder.resolve().parents, len(Path(str(run.get("name") or "")).parts)
    starts = [Path(), *(path.parent for path in above[depth : depth + 1])]  # as it was written, and beside this run

    def stage_of(where: object) -> Path | None:
        """The folder of the stage that a parent (its model, its labels) lies in."""
        paths = [start / where for start in starts] if isinstance(where, str) and where else []
        folders = (place for path in paths for place in (path, path.parent))
        return next((place.resolve() for place in folders if (place / "run.json").is_file()), None)

    def visit(place: Path, record: Mapping[str, Any]) -> int:
        if place in levels:
            return levels[place]
        levels[place], level, taken = 0, 0, []
        for role, made in members(record.get("parents")).items():
            where = members(made).get("path", made)
            before = stage_of(where)
            if before and before != place:
                level = max(level, visit(before, only(before / "run.json", [])) + 1)
            taken.append(f"{role} {before.parent.name}/{before.name}" if before else f"{role} {plain(where)}")
        levels[place] = level
        about = [Path(str(record.get("name") or "")).name]
        about += [plain(data["name"])] if "name" in (data := members(record.get("data"))) else []
        about += [f"{words('from')} {', '.join(taken)}"] if taken else []
        here = place == folder.resolve()
        lines.append((min(level, DEEPEST), plain(record.get("stage")), here, " · ".join(about)))
        return level

    visit(folder.resolve(), run)
    return [{"kind": "tree", "rows": lines}] if len(lines) > 1 else []


def ran(run: Mapping[str, Any], last: object, words: Words) -> list[Block]:
    """What ran, and how it ended."""
    values = {key: run[key] for key in ("experiment", "error", "started", "finished") if run.get(key) is not None}
    told = {words(key): _CLOCK.sub(r"\1 \2 UTC", plain(value, words)) for key, value in values.items()}
    if (seconds := number(run.get("seconds"))) is not None:
        told[words("time")] = plain(run["seconds"]) + (f" s ({seconds / 60:.1f} min)" if seconds >= 120 else " s")
    if last is not None:
        told[words("last step")] = plain(last)
    data = {key: value for key, value in members(run.get("data")).items() if value is not None and key != "sha256"}
    if data:
        parts = [plain(v, words) if k == "name" else plain({k: v}, words) for k, v in data.items()]
        told[words("data")] = " · ".join(parts)
    return facts(told)


def results(
    run: Mapping[str, Any], evaluation: Mapping[str, Any], quality: Mapping[str, Any], words: Words
) -> list[Block]:
    """The numbers that a stage ended with: its own, those of each policy and those of the reward model."""
    own = dict(members(run.get("results")))
    own |= members(own.pop("speed", None))
    first = dict([(key, value) for key, value in own.items() if number(value) is not None][:TILES])
    out = tiles(first, words) + by_name("This stage", {k: v for k, v in own.items() if k not in first}, words)
    out += compared(evaluation, words)
    numbers = {key: value for key, value in quality.items() if key not in ("calibration", "examples", *own)}
    bins = {str(i): row for i, row in enumerate(items(quality.get("calibration")), 1)}
    out += calibration(quality.get("calibration"), words) + by_name("Reward model quality", numbers, words)
    return out + by_row("Calibration", "Bin", bins, words=words)


def compared(evaluation: Mapping[str, Any], words: Words) -> list[Block]:
    """The tables of an evaluation."""
    asked = [evaluation.get(key) for key in ("prompts", "reward", "reference")]
    about = words("{} held-out prompts; reward: {}; KL to {}.", *(plain(value, words) for value in asked))
    out = note(about if evaluation.get("metrics") and None not in asked else "")
    return out + [block for table in evaluation_tables(evaluation) for block in by_row(*table, words=words)]


def again(run: Mapping[str, Any], words: Words) -> list[Block]:
    """The command that repeats the stage, and what it depends on."""
    command: list[Block] = [{"kind": "command", "text": plain(run["command"])}] if run.get("command") else []
    made = {role: members(made) or {"path": made} for role, made in members(run.get("parents")).items()}
    keys = ("seed", "data", "git", "hardware", "versions")
    told = {words(key): plain(run[key], words) for key in keys if run.get(key) is not None}
    return command + by_row("Made from", "Role", made, "files", words) + facts(told)


def page(folder: Path, lang: str | None = None) -> str:
    """The whole page of one stage's folder."""
    lang = lang or members(config(folder).get("report")).get("lang")
    words = Words(lang if lang in LANGUAGES else "en")
    notes: list[str] = []
    metrics, written, warnings, asked, labels = (read(folder / f"{name}.jsonl", notes) for name in _LOGS)
    named = ("run", "evaluation", "quality", "frontier")
    run, evaluation, quality, swept = (only(folder / f"{name}.json", notes) for name in named)
    extremes = members(evaluation.get("extremes"))
    texts = judged("Answers to your own prompts", items(evaluation.get("shown")), words)
    for kind in _EXTREMES:
        texts += judged(f"{kind.capitalize()} answers", items(extremes.get(kind)), words)
    texts += judged("Evaluation, side by side", items(evaluation.get("samples")), words)
    texts += frontier_answers(swept, words) + over_time(written, words) + candidates(asked, labels, words)
    also = evaluation.get("warnings")
    told = [row.get("warning") for row in warnings] + (also if isinstance(also, list) else [])
    warned = [line for line in told if line]
    parts: dict[str, list[Block]] = {
        "Warnings": [{"kind": "warnings", "rows": warned}] if warned else [],
        "What ran": lineage(folder, run, words) + ran(run, metrics[-1].get("step") if metrics else None, words),
        "Results": results(run, evaluation, quality, words) + frontier(swept, words),
        "Curves": curves(metrics, words),
        "Samples": [{"kind": "search"}, *texts] if texts else [],
        "To repeat it": again(run, words),
    }
    title = " · ".join(str(run[key]) for key in ("name", "stage") if run.get(key)) or folder.resolve().name
    return assemble(title, str(run.get("status") or ""), parts, notes, words)


def write_report(folder: Path, lang: str | None = None) -> Path:
    """Write folder/report.html from whatever files the stage has left, by default in the language it was made in."""
    return write_page(folder / "report.html", page(folder, lang))


class LivePage:
    """A stage's page while the stage goes: drawn seldom, and a page that cannot be drawn stops nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._next, self._told = folder, 0.0, False

    def draw(self, whole: bool = False) -> None:
        """Draw the page where it is time to, or, at the end, in any case."""
        began = time.monotonic()
        if not whole and began < self._next:
            return
        try:
            for left in self.folder.glob(".report.html.*") if not self._next else ():  # by a process that was killed
                left.unlink()
            write_report(self.folder)
        except Exception as error:  # whatever it is, what was being made is worth more than its page
            if not self._told:
                print(f"warning: {self.folder / 'report.html'} could not be drawn: {error}", flush=True)
            self._told = True
        now = time.monotonic()
        self._next = now + max(SECONDS, SHARE * (now - began))
