"""Several runs on one page: the same measures over each other, results and answers side by side."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report.charts import COLOURS, curves
from rlhf_pipeline.report.figures import Table, evaluation_tables
from rlhf_pipeline.report.files import as_number, columns, config, flat, items, members, only, read, stages_below
from rlhf_pipeline.report.page import render, write_page
from rlhf_pipeline.report.words import Words

ORDER = ("pretrain", "sft", "collect", "reward", "ppo", "evaluate", "frontier")
DIFFERENCES = 60  # settings that are listed
_OWN = ("name", "runs", "stage", "hydra", "defaults", "overwrite", "report", "hub", "stages")  # not about the work


class Stage(NamedTuple):
    """One stage of one run, as its files have it."""

    run: dict[str, Any]
    settings: dict[str, object]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]


Stages = dict[str, Stage]  # by run


def compare(folders: Sequence[Path], target: Path, lang: str = "en") -> Path:
    """Write one page of several runs; each folder is a run, a round of one or a stage of one."""
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)) or len(folders) > COLOURS:
        raise UserError(f"a comparison takes 2 to {COLOURS} different runs: compare=[run1,run2].")
    words, notes, stages = Words(lang), list[str](), dict[str, Stages]()
    short = len({folder.name for folder in folders}) == len(folders)
    names = {folder.name if short else str(folder): folder for folder in folders}
    for name, folder in names.items():
        if not (found := stages_below(folder)):
            raise UserError(f"{folder} holds no stage that has run; compare= takes names or folders of runs.")
        for path in found:
            stage = str(path.relative_to(folder)) if path != folder else path.name
            stages.setdefault(stage, {})[name] = _load(path, notes)
    ordered = sorted(stages, key=lambda name: [*map(name.endswith, ORDER), True].index(True))
    stages = {stage: stages[stage] for stage in ordered}
    content = render(
        "compare", words, title=f"{words('Comparison')}: {', '.join(names)}", notes=notes,
        results={stage: _results(found, words) for stage, found in stages.items()},
        evaluations=_evaluations(stages.get("evaluate", {})), answers=_answers(stages.get("evaluate", {})),
        curved={stage: curves({name: found[name].metrics if name in found else [] for name in names}, words)
                for stage, found in stages.items()},
        differences={stage: _differences(found) for stage, found in stages.items()},
    )  # fmt: skip
    return write_page(target, content)


def _load(folder: Path, notes: list[str]) -> Stage:
    evaluation = only(folder / "evaluation.json", notes)
    asked = dict(flat(config(folder)))
    return Stage(only(folder / "run.json", notes), asked, read(folder / "metrics.jsonl", notes), evaluation)


def _results(stages: Stages, words: Words) -> dict[str, dict[str, Any]]:
    rows = {}
    for name, one in stages.items():
        numbers = {key: value for key, value in members(one.run.get("results")).items() if as_number(value) is not None}
        rows[name] = {"status": words(str(one.run.get("status"))), **numbers, "time": one.run.get("seconds")}
    return rows


def _evaluations(stages: Stages) -> list[Table]:
    """Every run's policies in one table, and their gains in another."""
    return evaluation_tables({
        kind: {f"{name} · {key}": row for name, one in stages.items()
               for key, row in members(one.evaluation.get(kind)).items()}
        for kind in ("metrics", "paired_gain")
    })  # fmt: skip


def _answers(stages: Stages) -> list[dict[str, Any]]:
    """The answers of each run's last policy to prompts that several runs were asked."""
    rows: dict[str, dict[str, Any]] = {}
    for name, one in stages.items():
        last = [key for key in members(one.evaluation.get("metrics")) if not key.startswith("best of")][-1:]
        for sample in items(one.evaluation.get("samples")) if last else []:
            prompt = sample.get("prompt")
            row = rows.setdefault(str(prompt), {"prompt": prompt, "responses": {}, "rewards": {}})
            for kind in ("responses", "rewards"):
                row[kind].setdefault(name, members(sample.get(kind)).get(last[0]))
    return [row for row in rows.values() if len(row["responses"]) > 1]


def _differences(stages: Stages) -> dict[str, dict[str, Any]]:
    """The settings of a stage that are not the same in all runs."""
    keys = [key for key in columns(one.settings for one in stages.values()) if key.split(".")[0] not in _OWN]
    rows = {key: {name: one.settings.get(key) for name, one in stages.items()} for key in keys}
    differ = {key: row for key, row in rows.items() if len({repr(value) for value in row.values()}) > 1}
    return dict(list(differ.items())[:DIFFERENCES])
