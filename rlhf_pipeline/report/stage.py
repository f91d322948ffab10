"""The page of one stage: what ran and from what, its results, curves and samples, and how to repeat it."""

import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.report.curves import calibration, curves
from rlhf_pipeline.report.files import config, items, members, number, only, read
from rlhf_pipeline.report.frontier import answers, frontier
from rlhf_pipeline.report.markup import assemble, by_name, by_row, facts, search_box, show, text, tiles, write_page
from rlhf_pipeline.report.parents import lineage
from rlhf_pipeline.report.texts import candidates, judged, over_time, warned
from rlhf_pipeline.report.words import LANGUAGES, Words

# Of each log, at the end and while training goes: what a drawing costs does not grow with the run.
BYTES, LIVE_BYTES = 32 << 20, 1 << 19
SECONDS, SHARE = 5.0, 50.0  # between two drawings: at least so long, and so many times what the last one took
TILES = 12
_EXTREMES = ("best", "worst", "most changed")
_CLOCK = re.compile(r"^(\d{4}-\d\d-\d\d)T(\d\d:\d\d):\d\d\+00:00$")
_GAIN = {"mean": "gain", "low": "95 % from", "high": "95 % to"}


def ran(folder: Path, run: Mapping[str, Any], last: object, words: Words) -> str:
    """What ran and what became of it, and the stages before it."""
    values = {key: run[key] for key in ("experiment", "error", "started", "finished") if run.get(key) is not None}
    told = {words(key): _CLOCK.sub(r"\1 \2 UTC", show(value, words)) for key, value in values.items()}
    if (seconds := number(run.get("seconds"))) is not None:
        told[words("time")] = show(run["seconds"]) + (f" s ({seconds / 60:.1f} min)" if seconds >= 120 else " s")
    if last is not None:
        told[words("last step")] = show(last)
    data = {key: value for key, value in members(run.get("data")).items() if value is not None and key != "sha256"}
    if data:
        told[words("data")] = " · ".join(
            show(v, words) if k == "name" else show({k: v}, words) for k, v in data.items()
        )
    return lineage(folder, run, words) + facts(told)


def results(run: Mapping[str, Any], evaluation: Mapping[str, Any], quality: Mapping[str, Any], words: Words) -> str:
    """The numbers that a stage ended with: its own, those of each policy and those of the reward model."""
    own = dict(members(run.get("results")))
    own |= members(own.pop("speed", None))
    first = {key: value for key, value in own.items() if number(value) is not None}
    first = dict(list(first.items())[:TILES])
    out = tiles(first, words) + by_name("This stage", {k: v for k, v in own.items() if k not in first}, words)
    out += compared(evaluation, words)
    numbers = {key: value for key, value in quality.items() if key not in ("calibration", "examples", *own)}
    bins = {str(i): row for i, row in enumerate(items(quality.get("calibration")), 1)}
    out += calibration(quality.get("calibration"), words) + by_name("Reward model quality", numbers, words)
    return out + by_row("Calibration", "Bin", bins, words=words)


def compared(evaluation: Mapping[str, Any], words: Words) -> str:
    """Before and after: what each policy came to and what was gained, by the reward that judges and by the others."""
    policies = evaluation.get("metrics")
    asked = [evaluation.get(key) for key in ("prompts", "reward", "reference")]
    about = words("{} held-out prompts; reward: {}; KL to {}.", *(show(value, words) for value in asked))
    out = f'<p class="soft">{about}</p>\n' if policies and None not in asked else ""
    out += _by_policy("Before and after", "Paired gain", evaluation, words)
    for name, judge in members(evaluation.get("rewards")).items():
        titles = words("By another reward: {}", name), words("Paired gain by {}", name)
        out += _by_policy(*titles, members(judge), words)
    label = "Away from the reference, in standard deviations of its rewards"
    rows = {name: members(row) for name, row in members(evaluation.get("moved")).items()}
    return out + by_row(label, "Judge", rows, words=words)


def _by_policy(label: str, gained: str, judged: Mapping[str, Any], words: Words) -> str:
    """What each policy came to by one reward, and what was gained by pair of policies."""
    policies = {name: members(row) for name, row in members(judged.get("metrics")).items()}
    gain = members(judged.get("paired_gain"))
    pairs = {name: row for name, row in gain.items() if isinstance(row, dict)} or ({"": gain} if gain else {})
    named = {name: {_GAIN.get(str(key), str(key)): value for key, value in row.items()} for name, row in pairs.items()}
    return by_row(label, "Policy", policies, words=words) + by_row(gained, "Pair", named, words=words)


def again(run: Mapping[str, Any], words: Words) -> str:
    """The command that repeats the stage, and what it depends on."""
    command = f"<pre>{show(run['command'])}</pre>\n" if run.get("command") else ""
    made = {role: members(made) or {"path": made} for role, made in members(run.get("parents")).items()}
    told = {
        words(key): show(run[key], words)
        for key in ("seed", "data", "git", "hardware", "versions")
        if run.get(key) is not None
    }
    return command + by_row("Made from", "Role", made, "files", words) + facts(told)


def page(folder: Path, lang: str | None = None, most: int = BYTES) -> str:
    """The whole page of one stage's folder; of each log at most so many bytes."""
    lang = lang or members(config(folder).get("report")).get("lang")
    words = Words(lang if lang in LANGUAGES else "en")
    notes: list[str] = []
    logs = ("metrics", "samples", "warnings", "candidates", "labels")
    files = [folder / f"{name}.jsonl" for name in logs]
    if most == BYTES:  # a page drawn on the way says so by its status
        long = [path.name for path in files if path.is_file() and path.stat().st_size > most]
        notes += [f"{name} is long: of its rows, {most >> 20} MiB from all over it are shown." for name in long]
    metrics, written, warnings, asked, labels = (read(path, notes, most) for path in files)
    named = ("run", "evaluation", "quality", "frontier")
    run, evaluation, quality, swept = (only(folder / f"{name}.json", notes) for name in named)
    extremes = members(evaluation.get("extremes"))
    texts = (
        judged("Answers to your own prompts", items(evaluation.get("shown")), words)
        + "".join(judged(f"{kind.capitalize()} answers", items(extremes.get(kind)), words) for kind in _EXTREMES)
        + judged("Evaluation, side by side", items(evaluation.get("samples")), words)
        + answers(swept, words)
        + over_time(written, words)
        + candidates(asked, labels, words)
    )
    also = evaluation.get("warnings")
    told = warned([row.get("warning") for row in warnings] + (also if isinstance(also, list) else []))
    last = metrics[-1].get("step") if metrics else None
    parts = {"Warnings": told} if told else {}
    parts |= {
        "What ran": ran(folder, run, last, words),
        "Results": results(run, evaluation, quality, words) + frontier(swept, words),
        "Curves": curves(metrics, words),
        "Samples": texts and search_box(words) + texts,
        "To repeat it": again(run, words),
    }
    title = text(" · ".join(str(run[key]) for key in ("name", "stage") if run.get(key)) or folder.resolve().name)
    return assemble(title, str(run.get("status") or ""), parts, notes, words)


def write_report(folder: Path, lang: str | None = None, most: int = BYTES) -> Path:
    """Write folder/report.html from whatever files the stage has left, by default in the language it was made in."""
    return write_page(folder / "report.html", page(folder, lang, most))


class LivePage:
    """A stage's page, drawn while the stage goes: now and then, at little cost, and never in the way of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._next, self._told = folder, 0.0, False

    def draw(self, whole: bool = False) -> None:
        """Draw the page where it is time to, or, at the end, of all there is."""
        began = time.monotonic()
        if not whole and began < self._next:
            return
        try:
            for left in self.folder.glob(".report.html.*") if not self._next else ():  # by a process that was killed
                left.unlink()
            write_report(self.folder, most=BYTES if whole else LIVE_BYTES)
        except Exception as error:  # whatever it is, what was being made is worth more than its page
            if not self._told:
                print(f"warning: {self.folder / 'report.html'} could not be drawn: {error}", flush=True)
            self._told = True
        now = time.monotonic()
        self._next = now + max(SECONDS, SHARE * (now - began))
