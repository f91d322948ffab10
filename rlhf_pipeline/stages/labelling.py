"""Labels of what stage=collect has asked for: to where people give them, and back again."""

import dataclasses
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.atomic import read_jsonl, write_atomic, write_json, write_jsonl
from rlhf_pipeline.data import agreement
from rlhf_pipeline.data.formats import read_judgements
from rlhf_pipeline.data.formats.tasks import label_studio_tasks, sheet
from rlhf_pipeline.data.records import Judgement, Prompt, Turn
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.label_studio import labeling_config, pull, push, serve
from rlhf_pipeline.rundir import CANDIDATES, LABELS, PROJECT, RunDir
from rlhf_pipeline.settings import Collection, Settings

REJECTED, SKIPPED, EXPORT = "rejected.jsonl", "skipped.jsonl", "export.json"
# Of a collection, what may be said anew once it is there.
_ANEW = ("annotators", "enough")


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
    """What `labels=` asks for: labels brought in, or the tasks to where people label them."""
    if not (out.path / CANDIDATES).exists():
        raise NotFinishedError(f"{out.path} has no {CANDIDATES} yet; run stage=collect without labels= first.")
    collect = recorded(settings.collect, out)
    if settings.labels == "serve":
        try:
            serve(out.path, out.name, out.runs, collect.annotators)
        except KeyboardInterrupt:  # the way to end it
            print("\nLabel Studio has ended; its labels are kept.", flush=True)
    elif settings.labels == "push":
        print(f"tasks    {push(out.path, out.name, out.runs, collect.annotators)}", flush=True)
        print("labels=pull fetches what is labelled", flush=True)
    else:
        if settings.labels == "pull":
            bring_pulled(out)
        else:
            _bring(out, Path(str(settings.labels)).expanduser())
        out.reopen(dataclasses.replace(settings, collect=collect))
        settle(collect, out)


def recorded(now: Collection, out: RunDir) -> Collection:
    """The collection as it was made, but for what may be said anew and has been."""
    known = out.config().get("collect") or {}
    said = {key: getattr(now, key) for key in _ANEW if getattr(now, key) != getattr(Collection(), key)}
    return Collection(**{**known, **said})


def bring_pulled(out: RunDir) -> None:
    """Add what has been labelled in Label Studio so far."""
    tasks = pull(out.path, out.runs)
    known = json.loads((out.path / PROJECT).read_text(encoding="utf-8"))
    # Our own server may be at another port the next time, with the same labels.
    where = "label_studio" if known.get("local") else known["url"]
    source = f"{where}/projects/{known['project']}"
    notes = [(task, note) for task in tasks for note in task.get("annotations") or []]
    skips = [
        {"task": (task.get("data") or {}).get("task"), "annotator": str(note.get("completed_by")), "source": source}
        for task, note in notes
        if note.get("was_cancelled")
    ]
    write_jsonl(out.path / SKIPPED, [row for row in read_jsonl(out.path / SKIPPED) if row["source"] != source] + skips)
    if len(skips) < len(notes):
        write_json(out.path / EXPORT, tasks)
        _bring(out, out.path / EXPORT, source)
    else:
        _forget(out, source)


def _forget(out: RunDir, source: str) -> None:
    """Drop what was labelled in Label Studio before: there it has been taken back."""
    (out.path / EXPORT).unlink(missing_ok=True)
    for name, key, gone in ((LABELS, "source", source), (REJECTED, "file", str(out.path / EXPORT))):
        kept = [row for row in read_jsonl(out.path / name) if row.get(key) != gone]
        if kept:
            write_jsonl(out.path / name, kept)
        else:
            (out.path / name).unlink(missing_ok=True)


def _bring(out: RunDir, path: Path, source: str = "") -> None:
    """Add a file's labels to `labels.jsonl`.

    They take the place of what came from the same source, and of what the same annotator said of the same task: it is
    all that people said which counts, so nothing else is touched.
    """
    found = read_judgements(path)
    source = source or str(path.resolve())
    tasks = {row["task"]: row for row in read_jsonl(out.path / CANDIDATES)}
    there = read_jsonl(out.path / LABELS)
    others = {row["annotator"] for row in there if row.get("source") != source}
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
            place = {"file": str(path), "line": None, "task": judgement.task, "annotator": annotator}
            rejected.append({**place, "why": why, "row": {"answers": judgement.answers, "ranks": judgement.ranks}})
    if not new:
        whys = "; ".join(sorted({row["why"] for row in rejected})[:3])
        raise UserError(f"{path} labels none of the tasks in {out.path / CANDIDATES} ({whys}).")
    said = {(row["task"], row["annotator"]) for row in new}
    kept = [row for row in there if row.get("source") != source and (row["task"], row["annotator"]) not in said]
    set_aside = [row for row in read_jsonl(out.path / REJECTED) if row["file"] != str(path)]
    write_jsonl(out.path / LABELS, kept + new)
    write_jsonl(out.path / REJECTED, set_aside + rejected)


def label_row(row: dict[str, Any], judgement: Judgement) -> dict[str, Any] | None:
    """A judgement as a row of `labels.jsonl`: the answers are the candidates' own, as they were sampled.

    None where an answer is none of them. Blanks do not count, which a spreadsheet changes; where it changed more of
    some answers ("007" to "7"), the others must stand in their places.
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


def settle(collect: Collection, out: RunDir) -> None:
    """Note how far the candidates are labelled, and whether that is enough to go on. A skip is a word too."""
    tasks = {row["task"] for row in read_jsonl(out.path / CANDIDATES)}
    rows = read_jsonl(out.path / LABELS)
    people: dict[str, set[str]] = defaultdict(set)
    for row in rows + read_jsonl(out.path / SKIPPED):
        people[row["task"]].add(row["annotator"])
    by_people = any(row.get("source") for row in rows)
    through = {task for task in tasks if len(people[task]) >= (collect.annotators if by_people or not rows else 1)}
    labelled = through & {row["task"] for row in rows}
    results: dict[str, Any] = {
        "prompts": len(tasks),
        "labelled": len(labelled),
        "skipped": len(through - labelled),
    }
    if rows:
        results |= agreement.settle(read_judgements(out.path / LABELS).judgements)[1]
    results["rejected"] = len(read_jsonl(out.path / REJECTED))
    enough = labelled and len(through) >= collect.enough * len(tasks)
    out.finish(results, status="done" if enough else "waiting")
