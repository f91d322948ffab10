"""Several runs on one page: the same measures over each other, results and answers side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report.charts import COLOURS, Line, curves, gather
from rlhf_pipeline.report.figures import Table, evaluation_tables
from rlhf_pipeline.report.files import as_number, columns, config, flat, items, members, only, read
from rlhf_pipeline.report.page import render, write_page
from rlhf_pipeline.report.words import Words

STAGES = ("pretrain", "sft", "collect", "reward", "ppo", "evaluate")
DIFFERENCES = 60  # settings that are listed
_OWN = ("name", "runs", "stage", "hydra", "defaults", "overwrite", "report", "hub", "stages")  # not about the work


class Stage(NamedTuple):
    """One stage of one run, as its files have it."""

    run: dict[str, Any]
    settings: dict[str, object]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]


Runs = dict[str, dict[str, Stage]]


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
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)) or len(folders) > COLOURS:
        raise UserError(f"a comparison takes 2 to {COLOURS} different runs: compare=[run1,run2].")
    notes, runs = list[str](), Runs()
    short = len({folder.name for folder in folders}) == len(folders)
    for folder in folders:
        found = stages_of(folder)
        if not found:
            raise UserError(f"{folder} holds no stage that has run; compare= takes names or folders of runs.")
        runs[folder.name if short else str(folder)] = {name: _load(path, notes) for name, path in found.items()}
    words, order = Words(lang), [stage for stage in STAGES if any(stage in run for run in runs.values())]
    content = render(
        "compare", words, title=f"{words('Comparison')}: {', '.join(runs)}", notes=notes,
        results={stage: _results(_having(stage, runs), words) for stage in order},
        evaluations=_evaluations(_having("evaluate", runs)),
        curved={stage: _curves(stage, runs, words) for stage in order},
        answers=_answers(_having("evaluate", runs)),
        differences={stage: _differences(_having(stage, runs)) for stage in order},
    )  # fmt: skip
    return write_page(target, content)


def _load(folder: Path, notes: list[str]) -> Stage:
    evaluation = only(folder / "evaluation.json", notes)
    asked = dict(flat(config(folder)))
    return Stage(only(folder / "run.json", notes), asked, read(folder / "metrics.jsonl", notes), evaluation)


def _having(stage: str, runs: Runs) -> dict[str, Stage]:
    return {name: run[stage] for name, run in runs.items() if stage in run}


def _results(stages: dict[str, Stage], words: Words) -> dict[str, dict[str, Any]]:
    rows = {}
    for name, one in stages.items():
        numbers = {k: v for k, v in members(one.run.get("results")).items() if as_number(v) is not None}
        rows[name] = {"status": words(str(one.run.get("status"))), **numbers, "time": one.run.get("seconds")}
    return rows


def _evaluations(stages: dict[str, Stage]) -> list[Table]:
    """Every run's policies in one table, and their gains in another."""
    found: dict[str, dict[str, Any]] = {"metrics": {}, "paired_gain": {}}
    for name, one in stages.items():
        for kind, rows in found.items():
            rows |= {f"{name} · {key}": row for key, row in members(one.evaluation.get(kind)).items()}
    return evaluation_tables(found)


def _curves(stage: str, runs: Runs, words: Words) -> dict[str, Any]:
    """A colour per run; what was measured on held-out data is dashed."""
    measures: dict[str, list[Line]] = {}
    for place, (name, run) in enumerate(runs.items()):
        for key, kinds in gather(run[stage].metrics if stage in run else []).items():
            for kind, points in sorted(kinds.items(), reverse=True):
                dashed = " dashed" if kind == "eval" else ""
                measures.setdefault(key, []).append(Line(f"{name} {words(kind)}", f"c{place}{dashed}", points))
    return curves(measures, words)


def _answers(stages: dict[str, Stage]) -> list[dict[str, Any]]:
    """The answers of each run's last policy to prompts that several runs were asked."""
    rows: dict[str, dict[str, Any]] = {}
    for name, one in stages.items():
        policies = [key for key in members(one.evaluation.get("metrics")) if not key.startswith("best of")]
        for sample in items(one.evaluation.get("samples")) if policies else []:
            prompt = sample.get("prompt")
            row = rows.setdefault(str(prompt), {"prompt": prompt, "responses": {}, "rewards": {}})
            for kind in ("responses", "rewards"):
                row[kind].setdefault(name, members(sample.get(kind)).get(policies[-1]))
    return [row for row in rows.values() if len(row["responses"]) > 1]


def _differences(stages: dict[str, Stage]) -> dict[str, dict[str, Any]]:
    """The settings of a stage that are not the same in all runs."""
    keys = [key for key in columns(one.settings for one in stages.values()) if key.split(".")[0] not in _OWN]
    rows = {key: {name: one.settings.get(key) for name, one in stages.items()} for key in keys}
    differ = {key: row for key, row in rows.items() if len({repr(value) for value in row.values()}) > 1}
    return dict(list(differ.items())[:DIFFERENCES])
