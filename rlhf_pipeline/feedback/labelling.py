"""Label the candidates of stage=collect: send tasks to people, bring their labels back, or label by a reward.

This module does not load torch, because people run `labels=pull` often.
"""

import dataclasses
import itertools
import math
import random
import statistics
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.data.agreement import combine_judgements
from rlhf_pipeline.data.judgements import read_judgements
from rlhf_pipeline.data.records import Judgement
from rlhf_pipeline.data.sheets import label_studio_tasks, sheet
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.feedback.label_studio import connect, labeling_config, pull, push, serve
from rlhf_pipeline.files import read_json, read_jsonl, write_atomic, write_json, write_jsonl
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.progress import parts
from rlhf_pipeline.runs.directory import CANDIDATES, LABELS, PROJECT, RunDir
from rlhf_pipeline.settings import Collection, Settings

_REJECTED, _SKIPPED, _EXPORT = "rejected.jsonl", "skipped.jsonl", "export.json"


def write_label_files(out: RunDir, rows: Sequence[dict[str, Any]], lang: str) -> None:
    """Write the files for labelling: tasks for Label Studio with their page, and a sheet."""
    tasks = label_studio_tasks(rows)
    write_json(out.path / "tasks.json", tasks)
    most = max(len(row["answers"]) for row in rows)
    write_atomic(out.path / "labeling_config.xml", labeling_config(most, lang))
    out.offer_sheet(sheet(tasks))


def handle_labels(settings: Settings, out: RunDir) -> None:
    """Do what `labels=` asks for: read labels, or send the tasks to Label Studio."""
    if not (out.path / CANDIDATES).exists():
        raise NotFinishedError(f"{out.path} has no {CANDIDATES} yet; run stage=collect without labels= first.")
    # The collection keeps its settings, except these two if they are set now.
    now, default = settings.collect, Collection()
    new = {key: getattr(now, key) for key in ("annotators", "enough") if getattr(now, key) != getattr(default, key)}
    collect = Collection(**{**out.config().get("collect", {}), **new})
    if settings.labels == "serve":
        try:
            serve(out.path, out.name, out.runs, collect.annotators)
        except KeyboardInterrupt:  # this is how the user stops it
            print("\nLabel Studio has stopped; its labels are kept.", flush=True)
        return
    if settings.labels == "push":
        print(f"tasks    {push(connect(out.runs), out.path, out.name, collect.annotators)}", flush=True)
        print("labels=pull fetches the labels", flush=True)
        return
    if settings.labels == "pull":
        pull_labels(out)
    else:
        path = Path(str(settings.labels)).expanduser()
        source = str(path.resolve())
        _replace(out, source, *_read(out, path, source))
    out.reopen(dataclasses.replace(settings, collect=collect))
    note_progress(collect, out)


def pull_labels(out: RunDir) -> None:
    """Replace the run's labels from Label Studio by the labels that are there now."""
    tasks = pull(out.path, out.runs)
    write_json(out.path / _EXPORT, tasks)
    known = read_json(out.path / PROJECT)
    # Our own server may listen on another port the next time, with the same labels.
    source = f"{'label_studio' if known.get('local') else known['url']}/projects/{known['project']}"
    notes = [(task["data"].get("task"), note) for task in tasks for note in task["annotations"]]
    skips = [
        {"task": task, "annotator": str(note.get("completed_by")), "source": source}
        for task, note in notes
        if note.get("was_cancelled")
    ]
    labels, rejected = _read(out, out.path / _EXPORT, source) if len(skips) < len(notes) else ([], [])
    _replace(out, source, labels, rejected, skips)


_Rows = list[dict[str, Any]]


def _read(out: RunDir, path: Path, source: str) -> tuple[_Rows, _Rows]:
    """Return a file's labels as rows of `labels.jsonl`, and rows set aside: unusable or for no candidate of the run."""
    found = read_judgements(path)
    candidates = {row["task"]: row for row in read_jsonl(out.path / CANDIDATES)}
    # All annotators' sheets are called sheet.csv.
    others = {row["annotator"] for row in read_jsonl(out.path / LABELS) if row.get("source") != source}
    unnamed = path.stem if path.stem not in others else f"{path.resolve().parent.name}/{path.stem}"
    new, rejected = [], [{**row, "source": source} for row in found.rejected]
    for judgement in found.judgements:
        annotator, candidate = judgement.annotator or unnamed, candidates.get(judgement.task or "")
        if candidate and (label := label_row(candidate, judgement)):
            new.append({**label, "annotator": annotator, "source": source})
            continue
        why = "its answers are not those of the task" if candidate else "no candidate of this run has that task"
        row = {"answers": judgement.answers, "ranks": judgement.ranks}
        place = {"file": str(path), "where": None, "task": judgement.task, "annotator": annotator}
        rejected.append({**place, "why": why, "row": row, "source": source})
    if not new:
        whys = "; ".join(sorted({row["why"] for row in rejected})[:3])
        raise UserError(f"{path} labels none of the tasks in {out.path / CANDIDATES} ({whys}).")
    return new, rejected


def _replace(out: RunDir, source: str, labels: _Rows, rejected: _Rows, skips: Sequence[dict[str, Any]] = ()) -> None:
    """Replace all rows from the same source, and labels of the same tasks by the same annotators."""
    judged = {(row["task"], row["annotator"]) for row in labels}
    for name, rows in ((LABELS, labels), (_REJECTED, rejected), (_SKIPPED, skips)):
        kept = [row for row in read_jsonl(out.path / name) if row.get("source") != source]
        if name == LABELS:
            kept = [row for row in kept if (row["task"], row["annotator"]) not in judged]
        if kept or rows:
            write_jsonl(out.path / name, [*kept, *rows])
        else:
            (out.path / name).unlink(missing_ok=True)


def label_row(row: dict[str, Any], judgement: Judgement) -> dict[str, Any] | None:
    """Return a judgement as a row of `labels.jsonl`, with the answers as sampled; None if it judges other answers.

    White space may differ, because spreadsheets change it. One answer may differ (007 becomes 7) if all others match.
    """
    data = label_studio_tasks([row])[0]["data"]
    names = [" ".join(data[answer["id"]].split()) for answer in row["answers"]]
    given = [" ".join(answer.split()) for answer in judgement.answers]
    if not set(given) <= set(names):
        if len(given) != len(names) or sum(a != b for a, b in zip(given, names, strict=True)) > 1:
            return None
        given = names
    ranks = dict(zip(given, judgement.ranks, strict=True))
    kept = [(answer["text"], ranks[name]) for answer, name in zip(row["answers"], names, strict=True) if name in ranks]
    texts, places = zip(*kept, strict=True)
    return {"task": row["task"], "prompt": row["prompt"], "responses": list(texts), "ranks": list(places)}


def note_progress(collect: Collection, out: RunDir) -> None:
    """Record how many candidates are labelled. The stage is done if `collect.enough` is reached, else waiting."""
    tasks = {row["task"] for row in read_jsonl(out.path / CANDIDATES)}
    rows = read_jsonl(out.path / LABELS)
    annotators: dict[str, set[str]] = defaultdict(set)  # of each task
    for row in rows + read_jsonl(out.path / _SKIPPED):
        annotators[row["task"]].add(row["annotator"])
    by_reward = rows and not any(row.get("source") for row in rows)
    through = {task for task in tasks if len(annotators[task]) >= (1 if by_reward else collect.annotators)}
    labelled = through & {row["task"] for row in rows}
    results: dict[str, Any] = {"prompts": len(tasks), "labelled": len(labelled), "skipped": len(through - labelled)}
    if rows:
        results |= combine_judgements(read_judgements(out.path / LABELS).judgements)[1]
    results["rejected"] = len(read_jsonl(out.path / _REJECTED))
    enough = labelled and len(through) >= collect.enough * len(tasks)
    out.finish(results, status="done" if enough else "waiting")


def rank_by_reward(
    rows: Sequence[dict[str, Any]], reward: Reward, noise: float, seed: str
) -> tuple[list[dict[str, Any]], float]:
    """Return a reward's labels of candidates, and the share of pairs that it ranks as it would without `noise`.

    `noise` is the scale of Gumbel noise on each score, in standard deviations of all scores. A better answer comes
    first with the probability of Bradley and Terry (1952): close pairs are often swapped, clear pairs rarely.
    """
    asked = [(row, answer["text"]) for row in rows for answer in row["answers"]]
    names = {name for row in rows for name in row.get("columns", {})}
    scores: list[float] = []
    for part in parts(asked, 128, "label", "answer"):
        columns = {name: [row.get("columns", {}).get(name) for row, _ in part] for name in names}
        scores += reward([row["shown_prompt"] for row, _ in part], [text for _, text in part], **columns)
    scale, draw, left = noise * statistics.pstdev(scores), random.Random(f"labeler {seed}"), iter(scores)
    found, same = [], []
    for row in rows:
        own = list(itertools.islice(left, len(row["answers"])))
        seen = [score - scale * math.log(-math.log(draw.uniform(1e-12, 1 - 1e-12))) for score in own] if scale else own
        pairs = itertools.combinations(zip(own, seen, strict=True), 2)
        same += [(a > b) == (noisy_a > noisy_b) for (a, noisy_a), (b, noisy_b) in pairs if a != b]
        responses, ranks = [a["text"] for a in row["answers"]], [1 + sum(o > score for o in seen) for score in seen]
        label = {"task": row["task"], "prompt": row["prompt"], "responses": responses, "ranks": ranks}
        found.append({**label, "annotator": reward.name, "scores": own})
    if not same:
        raise UserError(
            f"labeler={reward.name} gives all answers to each prompt the same score, so it prefers none; use another "
            "labeler=, or a policy that is trained more."
        )
    return found, statistics.mean(same)
