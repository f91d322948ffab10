"""Step 2, first half: answers to compare, and the labels that people, or a reward in their place, give them.

python -m rlhf_pipeline stage=collect
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline import labels
from rlhf_pipeline.data import fingerprint, load_data, texts
from rlhf_pipeline.encoding import Question, fitting, questions
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.formats import read_judgements
from rlhf_pipeline.formats.tasks import label_studio_tasks, sheet
from rlhf_pipeline.label_studio import labeling_config, pull, push, serve
from rlhf_pipeline.policies import Policy, load_policy
from rlhf_pipeline.ppo.config import PPOConfig, make_sampling
from rlhf_pipeline.records import Judgement, Prompt, Row, Turn
from rlhf_pipeline.rewards import load_reward, trained_part
from rlhf_pipeline.rundir import (
    CANDIDATES,
    CANDIDATES_SO_FAR,
    LABELS,
    RunDir,
    read_jsonl,
    write_atomic,
    write_json,
    write_jsonl,
)
from rlhf_pipeline.sampling import room_for_prompts
from rlhf_pipeline.settings import SAMPLING, STAGES, Collection, Settings
from rlhf_pipeline.stages.candidates import Asker
from rlhf_pipeline.stages.common import Clock, progress, quiet, say_done, say_taken
from rlhf_pipeline.stages.labeler import rank

REJECTED, SKIPPED, EXPORT = "rejected.jsonl", "skipped.jsonl", "export.json"


def run(settings: Settings, out: RunDir) -> None:
    """Draw the candidates, unless they are there, then see how far they are labelled."""
    quiet()
    if settings.labels:
        _take(settings, out)
        return
    clock = Clock()
    reward, judge = None, None
    if settings.labeler:
        choice = {key: value for key, value in settings.labeler.items() if key != "noise"}
        reward, judge = load_reward(choice, out.upstream("reward", reward=trained_part(choice)))
    if (out.path / CANDIDATES).exists():
        out.reopen()
    else:
        _ask(settings, out, {"labeler": judge} if judge else {})
    rows = read_jsonl(out.path / CANDIDATES)
    if reward is not None:
        found, agreement = rank(
            rows, reward, (settings.labeler or {}).get("noise", 0.0), f"{settings.seed} {out.round}"
        )
        write_jsonl(out.path / LABELS, found)
        print(f"{judge} ranked the answers; {agreement:.1%} of the pairs as it would without noise", flush=True)
    elif (out.path / "project.json").exists():
        _pull_again(settings, out)
    _settle(settings, out, rows, clock)


def _ask(settings: Settings, out: RunDir, judge: dict[str, str]) -> None:
    """Draw the candidates; a batch of prompts that is finished stays, should the rest be cut off."""
    rows = load_data(settings.data, settings.seed)
    policies = _policies(settings, out, texts(rows.train))
    for where in policies:
        say_taken("policy", where)
    parents = {f"policy[{n}]" if n else "policy": where for n, where in enumerate(policies)}
    out.begin(settings, {**parents, **judge}, fingerprint(settings.data, rows))
    asker, asked = _asker(settings, out, policies, rows.train)
    kept = _drawn(asker, asked, out)
    if not kept:
        raise UserError(
            f"none of {len(asked)} prompts brought two answers that differ; raise collect.temperatures, or "
            "collect.similarity."
        )
    if len(kept) < len(asked):
        print(f"{len(asked) - len(kept)} of {len(asked)} prompts brought no two answers that differ", flush=True)
    _offer(out.path, kept)
    os.replace(out.path / CANDIDATES_SO_FAR, out.path / CANDIDATES)


def _asker(
    settings: Settings, out: RunDir, policies: dict[str, Policy], rows: Sequence[Row]
) -> tuple[Asker, list[Question]]:
    """What draws the answers, and the prompts to ask, which are in the words of the first policy."""
    collect, first = settings.collect, next(iter(policies.values()))
    room = min(room_for_prompts(policy.model, collect.response_length) for policy in policies.values())
    every = fitting(questions(rows, first.tokenizer, settings.data, settings.seed), room)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for policy in policies.values():
        policy.model.to(device).eval()
    given = {key: getattr(collect, key) for key in SAMPLING}
    args = PPOConfig(output_dir=str(out.checkpoints), temperature=1.0, bf16=False, **given)
    sampling = {
        where: make_sampling(args, policy.tokenizer, policy.model.get_input_embeddings().num_embeddings)
        for where, policy in policies.items()
    }
    number = out.round or 1
    return Asker(policies, sampling, collect, f"{settings.seed} {number}"), choose(every, collect.prompts, number)


def _drawn(asker: Asker, asked: Sequence[Question], out: RunDir) -> list[dict[str, Any]]:
    """All candidates; what an earlier run has finished of them is not drawn again."""
    size = asker.collect.batch_size
    kept = read_jsonl(out.path / CANDIDATES_SO_FAR)
    begun = max((row["number"] for row in kept), default=0) // size * size  # the last batch may have been cut off
    kept = [row for row in kept if row["number"] < begun]
    write_jsonl(out.path / CANDIDATES_SO_FAR, kept)
    with progress(len(asked), "collect", begun) as bar:
        for part in asker.rows(asked, begun):
            out.add(CANDIDATES_SO_FAR, part)
            kept += part
            bar.update(min(size, len(asked) - bar.n))
    return kept


def _policies(settings: Settings, out: RunDir, strings: Sequence[str]) -> dict[str, Policy]:
    """Who answers, by where each came from: those of `collect.policies`, else the newest that the run has made."""
    found: dict[str, Policy] = {}
    for name in settings.collect.policies or [""]:
        choice, upstream = settings.policy, None
        if not name:
            upstream = _newest(out, settings.policy)
        elif name in STAGES:
            before = out.in_round((out.round or 1) - 1) if out.round and name == "ppo" else out
            upstream = before.upstream(name, policy=settings.policy)
            if upstream is None:
                raise NotFinishedError(f"collect.policies names {name}, and {out.runs / out.name} has none; make it.")
        else:
            choice = {**settings.policy, "path": name}
        policy, where = load_policy(choice, upstream, strings, settings.seed)
        if where.endswith(", untrained"):
            raise NotFinishedError("there is no policy to answer yet; run stage=sft first, or give policy.path=.")
        found[where] = policy
    return found


def _newest(out: RunDir, policy: dict[str, Any]) -> Path | None:
    """In a round after the first, what the round before made by PPO; else the run's SFT policy."""
    if out.round and out.round > 1 and (found := out.in_round(out.round - 1).upstream("ppo", policy=policy)):
        return found
    return out.upstream("sft", "pretrain", policy=policy)


def choose(every: Sequence[Question], count: int, number: int) -> list[Question]:
    """`count` prompts for round `number`, which goes on where the one before ended; those that are alike once.

    Where there are fewer, the first ones are asked again, for other answers.
    """
    different = list({repr(question.prompt): question for question in every}.values())
    first = (number - 1) * count
    if len(different) < first + count:
        print(
            f"the data has {len(different)} different prompts, so some are asked again, for other answers", flush=True
        )
    return [different[place % len(different)] for place in range(first, first + count)]


def prompt_of(row: dict[str, Any]) -> Prompt:
    """The prompt of a row of `candidates.jsonl`."""
    prompt = row["prompt"]
    return prompt if isinstance(prompt, str) else tuple(Turn(turn["role"], turn["content"]) for turn in prompt)


def _offer(folder: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write what people label: tasks for Label Studio with their layout, and a sheet."""
    prompts = [prompt_of(row) for row in rows]
    write_json(folder / "tasks.json", label_studio_tasks(rows, prompts))
    write_atomic(folder / "labeling_config.xml", labeling_config(max(len(row["answers"]) for row in rows)))
    write_atomic(folder / "sheet.csv", sheet(rows, prompts))


def _take(settings: Settings, out: RunDir) -> None:
    """Bring labels in, or the tasks to where people label them."""
    clock = Clock()
    if not (out.path / CANDIDATES).exists():
        raise NotFinishedError(
            f"{out.path} has no {CANDIDATES} to be labelled; run stage=collect without labels= first."
        )
    out.reopen()
    if known := out.config().get("collect"):  # as it was collected, whatever is said now
        settings = dataclasses.replace(settings, collect=Collection(**known))
    annotators = settings.collect.annotators
    if settings.labels == "serve":
        serve(out.path, out.name, out.runs, annotators)
        return
    if settings.labels == "push":
        print(
            f"{push(out.path, out.name, out.runs, annotators)} holds the tasks; labels=pull fetches what is labelled",
            flush=True,
        )
        return
    rows = read_jsonl(out.path / CANDIDATES)
    if settings.labels == "pull":
        _pull(out)
    else:
        _bring(out, rows, Path(str(settings.labels)).expanduser())
    _settle(settings, out, rows, clock)


def _pull_again(settings: Settings, out: RunDir) -> None:
    """Where tasks have been given to Label Studio, what has been labelled since; if it is not running, never mind."""
    try:
        _pull(out)
    except UserError as error:
        print(f"note: nothing new from Label Studio: {error}", flush=True)


def _pull(out: RunDir) -> None:
    rows = read_jsonl(out.path / CANDIDATES)
    tasks = pull(out.path, out.runs)
    if not any(task.get("annotations") for task in tasks):
        print("nothing has been labelled in Label Studio yet", flush=True)
        return
    write_json(out.path / EXPORT, tasks)
    # A skip is a word too: nobody need be asked again.
    skipped = [task for task in tasks if all(note.get("was_cancelled") for note in task.get("annotations", []))]
    write_jsonl(out.path / SKIPPED, [{"task": (task.get("data") or {}).get("task")} for task in skipped])
    _bring(out, rows, out.path / EXPORT)


def _bring(out: RunDir, rows: Sequence[dict[str, Any]], path: Path) -> None:
    """Add a file's labels to `labels.jsonl`, in the place of those that came from the same file before."""
    found = read_judgements(path)
    tasks = {row["task"]: row for row in rows}
    source = path.name
    new, rejected = [], list(found.rejected)
    for judgement in found.judgements:
        annotator = judgement.annotator or path.stem
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
    kept = [row for row in read_jsonl(out.path / LABELS) if row.get("source") != source]
    set_aside = [row for row in read_jsonl(out.path / REJECTED) if Path(row["file"]).name != source]
    write_jsonl(out.path / LABELS, kept + new)
    write_jsonl(out.path / REJECTED, set_aside + rejected)


def label_row(row: dict[str, Any], judgement: Judgement) -> dict[str, Any] | None:
    """A judgement as a row of `labels.jsonl`: the answers are the candidates' own, as they were sampled.

    None where an answer is none of them; blanks do not count, which a spreadsheet may change.
    """
    ranks = {_blanks(text): rank for text, rank in zip(judgement.answers, judgement.ranks, strict=True)}
    shown = label_studio_tasks([row], [prompt_of(row)])[0]["data"]
    names = {_blanks(shown[answer["id"]]): answer["text"] for answer in row["answers"]}
    if not set(ranks) <= set(names):
        return None
    return {
        "task": row["task"],
        "prompt": row["prompt"],
        "responses": [text for name, text in names.items() if name in ranks],
        "ranks": [ranks[name] for name in names if name in ranks],
    }


def _blanks(text: str) -> str:
    return " ".join(text.split())


def _settle(settings: Settings, out: RunDir, rows: Sequence[dict[str, Any]], clock: Clock) -> None:
    """Say how far the candidates are labelled, and whether that is enough to go on."""
    skipped = len({row["task"] for row in read_jsonl(out.path / SKIPPED)})
    results: dict[str, Any] = {"prompts": len(rows), "labelled": 0, "skipped": skipped}
    path = out.path / LABELS
    if path.exists() and path.stat().st_size:
        read = read_judgements(path)
        _, summary = labels.settle(read.judgements)
        people = Counter(task for task, _ in {(one.task, one.annotator) for one in read.judgements})
        least = 1 if settings.labeler else settings.collect.annotators
        results |= {"labelled": sum(count >= least for count in people.values()), **summary}
    set_aside = len(read_jsonl(out.path / REJECTED))
    done = results["labelled"] + skipped
    enough = results["labelled"] > 0 and done >= settings.collect.enough * len(rows)
    out.finish(results | {"rejected": set_aside}, objective=None, status="done" if enough else "waiting")
    figures = [how_far(results)]
    if results.get("agreement") is not None:
        figures.append(f"{results['annotators']} annotators agree on {results['agreement']:.1%} of pairs")
    if set_aside:
        figures.append(f"{set_aside} labels set aside, see {out.path / REJECTED}")
    if not enough:
        _say_how(out)
    say_done(out, ", ".join(figures), clock)


def how_far(results: dict[str, Any]) -> str:
    """How many tasks people are through with."""
    skipped = f" ({results['skipped']} skipped)" if results["skipped"] else ""
    return f"{results['labelled'] + results['skipped']} of {results['prompts']} labelled{skipped}"


def _say_how(out: RunDir) -> None:
    """How people label, from here."""
    print(
        f"to label in the browser: make label-studio NAME={out.name}, then "
        f"python -m rlhf_pipeline stage=collect name={out.name} labels=pull\n"
        f"or in a spreadsheet: fill in {out.path / 'sheet.csv'}, then "
        f"python -m rlhf_pipeline stage=collect name={out.name} labels={out.path / 'sheet.csv'}",
        flush=True,
    )
