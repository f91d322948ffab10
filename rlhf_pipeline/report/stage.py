"""The page of one stage: what ran, from which models, results, curves, samples, and how to reproduce it."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from rlhf_pipeline.report.charts import RUNS, calibration_chart, curves, frontier_charts
from rlhf_pipeline.report.figures import comparison_tables, evaluation_tables, frontier_tables
from rlhf_pipeline.report.files import as_dict, as_number, dicts_in, read_config, read_object, read_objects
from rlhf_pipeline.report.page import display, lasted, write_page
from rlhf_pipeline.report.words import Words

TILES, SAMPLES = 12, 100  # the most figures at the top; the most samples from the start and from the end of training
Row = dict[str, Any]


def write_report(folder: Path, lang: str | None = None) -> Path:
    """Write folder/report.html from the files that exist. The default language is that of the stage's settings."""
    words, notes = Words(lang or as_dict(read_config(folder).get("report")).get("lang")), list[str]()
    logs = ("metrics", "samples", "warnings", "candidates", "labels")
    metrics, samples, warnings, asked, labels = (read_objects(folder / f"{name}.jsonl", notes) for name in logs)
    objects = ("run", "evaluation", "quality", "frontier", "comparison")
    run, evaluation, quality, frontier, comparison = (read_object(folder / f"{name}.json", notes) for name in objects)
    results = dict(as_dict(run.get("results")))
    results |= as_dict(results.pop("speed", None))
    pairs = start_and_end(samples)
    tiles = dict([(key, value) for key, value in results.items() if as_number(value) is not None][:TILES])
    judged = evaluation.get("warnings")
    warned = [row.get("warning") for row in warnings] + (judged if isinstance(judged, list) else [])
    return write_page(
        folder / "report.html", "stage", words,
        title=" · ".join(str(run[key]) for key in ("name", "stage") if run.get(key)) or folder.resolve().name,
        status=display(run.get("status") or ""), notes=notes, run=run, evaluation=evaluation, frontier=frontier,
        warned=list(filter(None, warned)), tree=list(lineage(folder.resolve(), run, {})),
        time=lasted(run.get("seconds"), words), last_step=metrics[-1].get("step") if metrics else None,
        data={key: value for key, value in as_dict(run.get("data")).items() if value is not None and key != "sha256"},
        tiles=tiles, others={key: value for key, value in results.items() if key not in tiles},
        evaluation_tables=evaluation_tables(evaluation),
        quality={key: value for key, value in quality.items() if key not in ("calibration", "examples", *results)},
        calibration=calibration_chart(quality.get("calibration"), words),
        bins={str(number): row for number, row in enumerate(dicts_in(quality.get("calibration")), 1)},
        frontier_tables=comparison_tables(comparison) + frontier_tables(frontier),
        frontier_charts=frontier_charts(comparison or frontier, words),
        frontier_answers=[_last_answers(start, frontier, words) for start in dicts_in(frontier.get("starts"))],
        samples=pairs, sampled=words("{} of {}", sum(row is not None for pair in pairs for row in pair), len(samples)),
        candidates=_ranked(asked, labels),
        curved=curves({"": metrics}, words),
        parents={role: as_dict(made) or {"path": made} for role, made in as_dict(run.get("parents")).items()},
    )  # fmt: skip


def lineage(folder: Path, run: Mapping[str, Any], known: dict[Path, bool]) -> Iterator[tuple[str, str, str, list[str]]]:
    """Yield (stage, run, data, parents as text) for a stage's ancestors, oldest first, then for the stage itself."""
    known[folder] = True
    depth = len(Path(str(run.get("name") or "")).parts)
    starts = [Path(), *(path.parent for path in folder.parents[depth : depth + 1])]  # as recorded; next to this `runs`
    taken = []
    for role, made in as_dict(run.get("parents")).items():
        where = as_dict(made).get("path", made)
        paths = [start / where for start in starts] if isinstance(where, str) and where else []
        stages = [place.resolve() for path in paths for place in (path, path.parent) if (place / "run.json").is_file()]
        taken.append(f"{role} {stages[0].parent.name}/{stages[0].name}" if stages else f"{role} {display(where)}")
        if stages and stages[0] not in known:
            yield from lineage(stages[0], read_object(stages[0] / "run.json"), known)
    yield (
        display(run.get("stage")),
        Path(display(run.get("name"))).name,
        display(as_dict(run.get("data")).get("name")),
        taken,
    )


def start_and_end(samples: Sequence[Row]) -> list[tuple[Row | None, Row | None]]:
    """Return pairs of an early and a late sample of a training. No sample appears twice."""
    half = min(SAMPLES, -(-len(samples) // 2))
    return list(zip_longest(samples[:half], samples[half:][::-1][:SAMPLES]))


def _ranked(candidates: Sequence[Row], labels: Sequence[Row]) -> list[Row]:
    """Return the answers that people compare, as displayed, each with the ranks people gave it."""
    ranks: dict[tuple[str, str], list[Any]] = {}
    for row in labels:
        answers, given = (row[key] if isinstance(row.get(key), list) else [] for key in ("responses", "ranks"))
        for answer, rank in zip(answers, given, strict=False):
            ranks.setdefault((str(row.get("task")), str(answer)), []).append(rank)
    rows = []
    for row in candidates:
        texts = [answer.get("text") for answer in dicts_in(row.get("answers"))]
        answers = [(text, ranks.get((str(row.get("task")), str(text)))) for text in texts]
        rows.append({"prompt": row.get("shown_prompt"), "answers": answers})
    return rows


def _last_answers(start: Row, frontier: Row, words: Words) -> list[Row]:
    """Return the answers, to the same prompts, of a start and of the last policy of each run from it."""
    own = [row for row in dicts_in(frontier.get("points")) if row.get("start") == start.get("key")]
    last = {words("before"): start, **{str(row.get("run")): row for row in own}}
    said = {name: dicts_in(row.get("answers")) for name, row in list(last.items())[:RUNS]}
    rows = []
    for at, prompt in enumerate(start["asked"] if isinstance(start.get("asked"), list) else []):
        given = {name: answers[at] for name, answers in said.items() if at < len(answers)}
        responses, rewards = ({name: a.get(key) for name, a in given.items()} for key in ("response", "reward"))
        rows.append({"prompt": prompt, "responses": responses, "rewards": rewards})
    return rows
