"""Several runs on one page: the same measures over each other, results and answers side by side."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.report.curves import Line, draw, gather
from rlhf_pipeline.report.files import config, flat, items, members, number, only, read
from rlhf_pipeline.report.markup import assemble, by_row, search_box, text, write_page
from rlhf_pipeline.report.stage import compared
from rlhf_pipeline.report.texts import judged
from rlhf_pipeline.report.words import Words

STAGES = ("pretrain", "sft", "collect", "reward", "ppo", "evaluate")
MOST, DIFFERENCES = 8, 60  # runs on a page, for there are as many colours; settings that are listed
_OWN = ("name", "runs", "stage", "hydra", "defaults", "overwrite", "report", "hub", "stages")  # of no work


class Stage(NamedTuple):
    """One stage of one run, as its files have it."""

    run: dict[str, Any]
    asked: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]


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
    if not 2 <= len({folder.resolve() for folder in folders}) <= MOST or len(folders) > MOST:
        raise UserError(f"a comparison takes 2 to {MOST} different runs, as in compare=[run1,run2].")
    words, notes = Words(lang), list[str]()
    short = len({folder.name for folder in folders}) == len(folders)
    runs: dict[str, dict[str, Stage]] = {}
    for folder in folders:
        found = stages_of(folder)
        if not found:
            raise UserError(f"{folder} holds no stage that has run; compare= takes names of runs, or their folders.")
        runs[folder.name if short else str(folder)] = {name: _load(path, notes) for name, path in found.items()}
    order = [stage for stage in STAGES if any(stage in run for run in runs.values())]
    order += sorted({stage for run in runs.values() for stage in run} - set(order))
    answers = _answers(runs, words)
    parts = {
        "Results": "".join(_results(stage, runs, words) for stage in order) + _evaluations(runs, words),
        "Curves": "".join(_curves(stage, runs, words) for stage in order),
        "Samples": answers and search_box(words) + answers,
        "What differs": _differences(order, runs, words),
    }
    target.parent.mkdir(parents=True, exist_ok=True)
    title = f"{words('Comparison')}: {', '.join(runs)}"
    return write_page(target, assemble(text(title), "", parts, notes, words))


def _load(folder: Path, notes: list[str]) -> Stage:
    evaluation = only(folder / "evaluation.json", notes)
    return Stage(only(folder / "run.json", notes), config(folder), read(folder / "metrics.jsonl", notes), evaluation)


def _having(stage: str, runs: Mapping[str, Mapping[str, Stage]]) -> dict[str, Stage]:
    return {name: run[stage] for name, run in runs.items() if stage in run}


def _results(stage: str, runs: Mapping[str, Mapping[str, Stage]], words: Words) -> str:
    rows = {}
    for name, one in _having(stage, runs).items():
        numbers = {k: v for k, v in members(one.run.get("results")).items() if number(v) is not None}
        rows[name] = {"status": words(str(one.run.get("status"))), **numbers, "time": one.run.get("seconds")}
    return by_row(stage, "Run", rows, words=words)


def _evaluations(runs: Mapping[str, Mapping[str, Stage]], words: Words) -> str:
    """Every run's policies in one table, and their gains in another."""
    together: dict[str, dict[str, Any]] = {"metrics": {}, "paired_gain": {}}
    for name, one in _having("evaluate", runs).items():
        for kind, rows in together.items():
            rows |= {f"{name} · {key}": row for key, row in members(one.evaluation.get(kind)).items()}
    return compared(together, words)


def _curves(stage: str, runs: Mapping[str, Mapping[str, Stage]], words: Words) -> str:
    """A colour a run; what was measured on held-out data is dashed."""
    measures: dict[str, list[Line]] = {}
    for place, (name, run) in enumerate(runs.items()):
        for key, kinds in gather(run[stage].metrics if stage in run else []).items():
            for kind, points in sorted(kinds.items(), reverse=True):
                label = f"{name} {words(kind)}" if len(kinds) > 1 or kind == "eval" else name
                dashed = " dashed" if kind == "eval" else ""
                measures.setdefault(key, []).append(Line(label, f"c{place}{dashed}", points))
    drawn = draw(measures, words)
    return f'<h3 class="stage">{text(stage)}</h3>\n{drawn}' if drawn else ""


def _answers(runs: Mapping[str, Mapping[str, Stage]], words: Words) -> str:
    """What the last policy of each run said to prompts that more than one of them was asked."""
    rows: dict[str, dict[str, Any]] = {}
    for name, one in _having("evaluate", runs).items():
        policies = [key for key in members(one.evaluation.get("metrics")) if not key.startswith("best of")]
        for sample in items(one.evaluation.get("samples")) if policies else []:
            row = rows.setdefault(
                str(sample.get("prompt")), {"prompt": sample.get("prompt"), "responses": {}, "rewards": {}}
            )
            for kind in ("responses", "rewards"):
                row[kind].setdefault(name, members(sample.get(kind)).get(policies[-1]))
    shared = [row for row in rows.values() if len(row["responses"]) > 1]
    return judged("What each run's last policy said to the same prompts", shared, words)


def _differences(order: Sequence[str], runs: Mapping[str, Mapping[str, Stage]], words: Words) -> str:
    """The settings of each stage that are not the same in all runs."""
    out = ""
    for stage in order:
        asked = {name: dict(flat(one.asked)) for name, one in _having(stage, runs).items()}
        keys = dict.fromkeys(key for values in asked.values() for key in values if key.split(".")[0] not in _OWN)
        differ = [key for key in keys if len({repr(values.get(key)) for values in asked.values()}) > 1][:DIFFERENCES]
        out += by_row(
            stage,
            "Setting",
            {key: {n: values.get(key) for n, values in asked.items()} for key in differ},
            "keys",
            words,
        )
    return out
