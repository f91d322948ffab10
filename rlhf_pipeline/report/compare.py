"""The page that compares several runs: shared charts, and results and answers side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report.charts import COLOURS, curves
from rlhf_pipeline.report.figures import evaluation_tables
from rlhf_pipeline.report.files import (
    as_dict,
    as_number,
    columns,
    dicts_in,
    flatten,
    read_config,
    read_object,
    read_objects,
    stages_below,
)
from rlhf_pipeline.report.page import lasted, write_page
from rlhf_pipeline.report.words import Words
from rlhf_pipeline.stages import FOLDERS

# Settings that do not affect the work.
_OWN = ("name", "runs", "stage", "hydra", "defaults", "overwrite", "report", "hub", "stages")
Row = dict[str, Any]


def write_comparison(folders: Sequence[Path], target: Path, lang: str = "en") -> Path:
    """Write the page of several runs. Each folder is a run, a round or a stage."""
    if len({folder.resolve() for folder in folders}) < max(2, len(folders)) or len(folders) > COLOURS:
        raise UserError(f"a comparison takes 2 to {COLOURS} different runs: compare=[run1,run2].")
    words, notes, stages = Words(lang), list[str](), dict[str, dict[str, Path]]()
    short = len({folder.name for folder in folders}) == len(folders)
    names = {folder.name if short else str(folder): folder for folder in folders}
    for name, folder in names.items():
        if not (found := stages_below(folder)):
            raise UserError(f"{folder} holds no stage that has run; compare= takes names or folders of runs.")
        for path in found:
            stage = str(path.relative_to(folder)) if path != folder else path.name
            stages.setdefault(stage, {})[name] = path
    results, drawn, differences = {}, {}, {}
    for stage in sorted(stages, key=lambda name: [*map(name.endswith, FOLDERS), True].index(True)):
        records = {name: read_object(path / "run.json", notes) for name, path in stages[stage].items()}
        results[stage] = {name: _result(run, words) for name, run in records.items()}
        logs = {name: read_objects(path / "metrics.jsonl", notes) for name, path in stages[stage].items()}
        drawn[stage] = curves({name: logs.get(name, []) for name in names}, words)
        differences[stage] = _differences(
            {name: dict(flatten(read_config(path))) for name, path in stages[stage].items()}
        )
    judged = {name: read_object(path / "evaluation.json", notes) for name, path in stages.get("evaluate", {}).items()}
    every = {kind: {f"{name} · {key}": row for name in judged for key, row in as_dict(judged[name].get(kind)).items()}
             for kind in ("metrics", "paired_gain")}  # fmt: skip
    return write_page(
        target, "compare", words, title=f"{words('Comparison')}: {', '.join(names)}", notes=notes, results=results,
        evaluations=evaluation_tables(every), answers=_answers(judged), curved=drawn, differences=differences,
    )  # fmt: skip


def _result(run: Row, words: Words) -> Row:
    numbers = {key: value for key, value in as_dict(run.get("results")).items() if as_number(value) is not None}
    return {"status": words(str(run.get("status"))), **numbers, "time": lasted(run.get("seconds"), words)}


def _answers(judged: Mapping[str, Row]) -> list[Row]:
    """Return the answers of each run's last policy to the prompts that several runs share."""
    rows: dict[str, Row] = {}
    for name, evaluation in judged.items():
        last = [key for key in as_dict(evaluation.get("metrics")) if not key.startswith("best of")][-1:]
        for sample in dicts_in(evaluation.get("samples")) if last else []:
            prompt = sample.get("prompt")
            row = rows.setdefault(str(prompt), {"prompt": prompt, "responses": {}, "rewards": {}})
            for kind in ("responses", "rewards"):
                row[kind].setdefault(name, as_dict(sample.get(kind)).get(last[0]))
    return [row for row in rows.values() if len(row["responses"]) > 1]


def _differences(settings: Mapping[str, Row]) -> dict[str, Row]:
    """Return the settings of a stage that differ between runs."""
    keys = [key for key in columns(settings.values()) if key.split(".")[0] not in _OWN]
    rows = {key: {name: own.get(key) for name, own in settings.items()} for key in keys}
    return {key: row for key, row in rows.items() if len({repr(value) for value in row.values()}) > 1}
