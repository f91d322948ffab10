"""Several runs on one page: the same measures over each other, results and answers side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report.charts import COLOURS, Line, charts, gather
from rlhf_pipeline.report.files import config, flat, items, members, number, only, read
from rlhf_pipeline.report.page import Block, assemble, by_row, write_page
from rlhf_pipeline.report.samples import judged
from rlhf_pipeline.report.stage import compared
from rlhf_pipeline.report.words import Words

STAGES = ("pretrain", "sft", "collect", "reward", "ppo", "evaluate")
DIFFERENCES = 60  # settings that are listed
_OWN = ("name", "runs", "stage", "hydra", "defaults", "overwrite", "report", "hub", "stages")  # not about the work


class Stage(NamedTuple):
    """One stage of one run, as its files have it."""

    run: dict[str, Any]
    asked: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]


Runs = Mapping[str, Mapping[str, Stage]]


def stages_of(folder: Path) -> dict[str, Path]:
    """The stages of a run, those it lacks from the newest of its rounds; or the one stage that the folder is."""
    if (folder / "run.json").is_file():
        return {folder.name: folder}
    rounds = [path for path in folder.glob("round*") if path.name[5:].isdecimal()]
    newest = max(rounds, key=lambda path: int(path.name[5:]), default=folder)
    places = {stage: [at / stage for at in (folder, newest) if (at / stage / "run.json").is_file()] for stage in STAGES}
    return {stage: found[0] for stage, found in places.items() if found}


def compare(folders: Sequence[Path], target: Path, lang: str = "en") -> Path:
    """Write one page of several runs; each folder is a run, a round of one or a stage of one."""
    if not 2 <= len({folder.resolve() for folder in folders}) <= COLOURS or len(folders) > COLOURS:
        raise UserError(f"a comparison takes 2 to {COLOURS} different runs: compare=[run1,run2].")
    words, notes = Words(lang), list[str]()
    short = len({folder.name for folder in folders}) == len(folders)
    runs: dict[str, dict[str, Stage]] = {}
    for folder in folders:
        found = stages_of(folder)
        if not found:
            raise UserError(f"{folder} holds no stage that has run; compare= takes names or folders of runs.")
        runs[folder.name if short else str(folder)] = {name: _load(path, notes) for name, path in found.items()}
    order = [stage for stage in STAGES if any(stage in run for run in runs.values())]
    order += sorted({stage for run in runs.values() for stage in run} - set(order))
    answers = _answers(runs, words)
    parts: dict[str, list[Block]] = {
        "Results": [block for stage in order for block in _results(stage, runs, words)] + _evaluations(runs, words),
        "Curves": [block for stage in order for block in _curves(stage, runs, words)],
        "Samples": [{"kind": "search"}, *answers] if answers else [],
        "What differs": [block for stage in order for block in _differences(stage, runs, words)],
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    return write_page(target, assemble(f"{words('Comparison')}: {', '.join(runs)}", "", parts, notes, words))


def _load(folder: Path, notes: list[str]) -> Stage:
    evaluation = only(folder / "evaluation.json", notes)
    return Stage(only(folder / "run.json", notes), config(folder), read(folder / "metrics.jsonl", notes), evaluation)


def _having(stage: str, runs: Runs) -> dict[str, Stage]:
    return {name: run[stage] for name, run in runs.items() if stage in run}


def _results(stage: str, runs: Runs, words: Words) -> list[Block]:
    rows = {}
    for name, one in _having(stage, runs).items():
        numbers = {k: v for k, v in members(one.run.get("results")).items() if number(v) is not None}
        rows[name] = {"status": words(str(one.run.get("status"))), **numbers, "time": one.run.get("seconds")}
    return by_row(stage, "Run", rows, words=words)


def _evaluations(runs: Runs, words: Words) -> list[Block]:
    """Every run's policies in one table, and their gains in another."""
    together: dict[str, dict[str, Any]] = {"metrics": {}, "paired_gain": {}}
    for name, one in _having("evaluate", runs).items():
        for kind, rows in together.items():
            rows |= {f"{name} · {key}": row for key, row in members(one.evaluation.get(kind)).items()}
    return compared(together, words)


def _curves(stage: str, runs: Runs, words: Words) -> list[Block]:
    """A colour per run; what was measured on held-out data is dashed."""
    measures: dict[str, list[Line]] = {}
    for place, (name, run) in enumerate(runs.items()):
        for key, kinds in gather(run[stage].metrics if stage in run else []).items():
            for kind, points in sorted(kinds.items(), reverse=True):
                label = f"{name} {words(kind)}" if len(kinds) > 1 or kind == "eval" else name
                dashed = " dashed" if kind == "eval" else ""
                measures.setdefault(key, []).append(Line(label, f"c{place}{dashed}", points))
    drawn = charts(measures, words)
    return [{"kind": "heading", "text": stage}, *drawn] if drawn else []


def _answers(runs: Runs, words: Words) -> list[Block]:
    """The answers of each run's last policy to prompts that several runs were asked."""
    rows: dict[str, dict[str, Any]] = {}
    for name, one in _having("evaluate", runs).items():
        policies = [key for key in members(one.evaluation.get("metrics")) if not key.startswith("best of")]
        for sample in items(one.evaluation.get("samples")) if policies else []:
            prompt = sample.get("prompt")
            row = rows.setdefault(str(prompt), {"prompt": prompt, "responses": {}, "rewards": {}})
            for kind in ("responses", "rewards"):
                row[kind].setdefault(name, members(sample.get(kind)).get(policies[-1]))
    shared = [row for row in rows.values() if len(row["responses"]) > 1]
    return judged("What each run's last policy said to the same prompts", shared, words)


def _differences(stage: str, runs: Runs, words: Words) -> list[Block]:
    """The settings of a stage that are not the same in all runs."""
    asked = {name: dict(flat(one.asked)) for name, one in _having(stage, runs).items()}
    keys = dict.fromkeys(key for values in asked.values() for key in values if key.split(".")[0] not in _OWN)
    differ = [key for key in keys if len({repr(values.get(key)) for values in asked.values()}) > 1][:DIFFERENCES]
    rows = {key: {name: values.get(key) for name, values in asked.items()} for key in differ}
    return by_row(stage, "Setting", rows, "keys", words)
