"""Labels of what stage=collect has asked for: to where people give them, and back again.

Loads no torch: people wait for it again and again.
"""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.data.agreement import settle
from rlhf_pipeline.data.judgements import read_judgements
from rlhf_pipeline.data.records import Judgement, Prompt, Turn
from rlhf_pipeline.data.sheets import label_studio_tasks, sheet
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.feedback.label_studio import connect, pull, push, serve
from rlhf_pipeline.feedback.page import labeling_config
from rlhf_pipeline.files import read_jsonl, write_atomic, write_json, write_jsonl
from rlhf_pipeline.runs.directory import CANDIDATES, LABELS, PROJECT, RunDir
from rlhf_pipeline.settings import Collection, Settings

REJECTED, SKIPPED, EXPORT = "rejected.jsonl", "skipped.jsonl", "export.json"


def prompt_of(row: dict[str, Any]) -> Prompt:
    """The prompt of a row of `candidates.jsonl`."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else tuple(Turn(turn["role"], turn["content"]) for turn in prompt)


def offer(out: RunDir, rows: Sequence[dict[str, Any]], lang: str) -> None:
    """Write what people label: tasks for Label Studio with their layout and its language, and a sheet."""
    prompts = [prompt_of(row) for row in rows]
    write_json(out.path / "tasks.json", label_studio_tasks(rows, prompts))
    most = max(len(row["answers"]) for row in rows)
    write_atomic(out.path / "labeling_config.xml", labeling_config(most, lang))
    out.offer_sheet(sheet(rows, prompts))


def take(settings: Settings, out: RunDir) -> None:
    """What `labels=` asks for: bring labels in, or the tasks to where people label them."""
    if not (out.path / CANDIDATES).exists():
        raise NotFinishedError(f"{out.path} has no {CANDIDATES} yet; run stage=collect without labels= first.")
    collect = recorded(settings.collect, out)
    if settings.labels == "serve":
        try:
            serve(out.path, out.name, out.runs, collect.annotators)
        except KeyboardInterrupt:  # the way to end it
            print("\nLabel Studio has ended; its labels are kept.", flush=True)
    elif settings.labels == "push":
        print(f"tasks    {push(connect(out.runs), out.path, out.name, collect.annotators)}", flush=True)
        print("labels=pull fetches what is labelled", flush=True)
    else:
        if settings.labels == "pull":
            bring_pulled(out)
        else:
            path = Path(str(settings.labels)).expanduser()
            _bring(out, path, str(path.resolve()))
        out.reopen(dataclasses.replace(settings, collect=collect))
        note_progress(collect, out)


def recorded(now: Collection, out: RunDir) -> Collection:
    """The collection as it was made, with `annotators` and `enough` as they are now if they are set."""
    known = out.config().get("collect") or {}
    new = {
        key: getattr(now, key) for key in ("annotators", "enough") if getattr(now, key) != getattr(Collection(), key)
    }
    return Collection(**{**known, **new})


def bring_pulled(out: RunDir) -> None:
    """Add what has been labelled in Label Studio so far; what has been taken back there is dropped."""
    tasks, path = pull(out.path, out.runs), out.path / EXPORT
    known = json.loads((out.path / PROJECT).read_text(encoding="utf-8"))
    # Our own server may be at another port the next time, with the same labels.
    source = f"{'label_studio' if known.get('local') else known['url']}/projects/{known['project']}"
    notes = [(task, note) for task in tasks for note in task.get("annotations") or []]
    skips = [
        {"task": (task.get("data") or {}).get("task"), "annotator": str(note.get("completed_by")), "source": source}
        for task, note in notes
        if note.get("was_cancelled")
    ]
    write_jsonl(out.path / SKIPPED, [row for row in read_jsonl(out.path / SKIPPED) if row["source"] != source] + skips)
    write_json(path, tasks)
    if len(skips) < len(notes):
        _bring(out, path, source)
    else:
        _replace(out, path, source, [], [])


def _bring(out: RunDir, path: Path, source: str) -> None:
    """Add a file's labels to `labels.jsonl`; those that are not of this run's candidates are set aside."""
    found = read_judgements(path)
    tasks = {row["task"]: row for row in read_jsonl(out.path / CANDIDATES)}
    others = {row["annotator"] for row in read_jsonl(out.path / LABELS) if row.get("source") != source}
    # Everybody's sheet is called sheet.csv.
    unnamed = path.stem if path.stem not in others else f"{path.resolve().parent.name}/{path.stem}"
    new, rejected = [], list(found.rejected)
    for judgement in found.judgements:
        annotator = judgement.annotator or unnamed
        candidate = tasks.get(judgement.task or "")
        label = label_row(candidate, judgement) if candidate else None
        if label:
            new.append({**label, "annotator": annotator, "source": source})
        else:
            why = "its answers are not those of the task" if candidate else "no candidate of this run has that task"
            place = {"file": str(path), "where": None, "task": judgement.task, "annotator": annotator}
            rejected.append({**place, "why": why, "row": {"answers": judgement.answers, "ranks": judgement.ranks}})
    if not new:
        whys = "; ".join(sorted({row["why"] for row in rejected})[:3])
        raise UserError(f"{path} labels none of the tasks in {out.path / CANDIDATES} ({whys}).")
    _replace(out, path, source, new, rejected)


def _replace(out: RunDir, path: Path, source: str, new: list[dict[str, Any]], rejected: list[dict[str, Any]]) -> None:
    """Put new labels in the place of those from the same source, and of the same annotator's on the same task."""
    said = {(row["task"], row["annotator"]) for row in new}
    labels = [row for row in read_jsonl(out.path / LABELS) if row.get("source") != source]
    kept = [row for row in labels if (row["task"], row["annotator"]) not in said]
    set_aside = [row for row in read_jsonl(out.path / REJECTED) if row["file"] != str(path)]
    for name, rows in ((LABELS, kept + new), (REJECTED, set_aside + rejected)):
        if rows:
            write_jsonl(out.path / name, rows)
        else:
            (out.path / name).unlink(missing_ok=True)


def label_row(row: dict[str, Any], judgement: Judgement) -> dict[str, Any] | None:
    """A judgement as a row of `labels.jsonl`, with the answers as they were sampled.

    None if it has an answer that the candidates have not. Spreadsheets change blanks, which do not count, and numbers
    ("007" to "7"): then all other answers must stand in their places.
    """
    shown = label_studio_tasks([row], [prompt_of(row)])[0]["data"]
    names = [_blanks(shown[answer["id"]]) for answer in row["answers"]]
    given = [_blanks(answer) for answer in judgement.answers]
    if not set(given) <= set(names):
        same = {one == other for one, other in zip(names, given, strict=False) if one in given or other in names}
        if len(given) != len(names) or same != {True}:
            return None
        given = names
    ranks = dict(zip(given, judgement.ranks, strict=True))
    answers = [(a["text"], ranks[name]) for a, name in zip(row["answers"], names, strict=True) if name in ranks]
    return {
        "task": row["task"],
        "prompt": row["prompt"],
        "responses": [text for text, _ in answers],
        "ranks": [rank for _, rank in answers],
    }


def _blanks(text: str) -> str:
    return " ".join(text.split())


def note_progress(collect: Collection, out: RunDir) -> None:
    """Finish the stage with how far the candidates are labelled: done if that is enough to go on, else waiting."""
    tasks = {row["task"] for row in read_jsonl(out.path / CANDIDATES)}
    rows = read_jsonl(out.path / LABELS)
    people: dict[str, set[str]] = defaultdict(set)
    for row in rows + read_jsonl(out.path / SKIPPED):  # a skip is an answer too
        people[row["task"]].add(row["annotator"])
    by_people = any(row.get("source") for row in rows)
    through = {task for task in tasks if len(people[task]) >= (collect.annotators if by_people or not rows else 1)}
    labelled = through & {row["task"] for row in rows}
    results: dict[str, Any] = {"prompts": len(tasks), "labelled": len(labelled), "skipped": len(through - labelled)}
    if rows:
        results |= settle(read_judgements(out.path / LABELS).judgements)[1]
    results["rejected"] = len(read_jsonl(out.path / REJECTED))
    enough = labelled and len(through) >= collect.enough * len(tasks)
    out.finish(results, status="done" if enough else "waiting")
