"""Reward against KL over the jobs of a sweep and their checkpoints, next to the best of n answers without training.

As Gao et al. 2022 (arXiv 2210.10760) judge a policy: by the reward that it reaches at a distance from where it started.
"""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.evaluation import metrics
from rlhf_pipeline.evaluation.comparison import Answers, Trial, draw, figures, measure
from rlhf_pipeline.evaluation.lineup import PPO_SAMPLING, Contestant
from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.models.policies import Policy, load_policy, lora_config
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.ppo.actor_critic import with_master_weights
from rlhf_pipeline.ppo.storage import WEIGHTS, load_policy_weights
from rlhf_pipeline.progress import progress
from rlhf_pipeline.runs.checkpoints import fault_of, sealed, step_of
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.lineage import parent
from rlhf_pipeline.runs.models import ppo_jobs

_SHOWN = 8  # prompts whose answers are kept to be looked at


class Point(NamedTuple):
    """A policy on its way: the result of a job, or one of its checkpoints."""

    run: str
    step: int | None  # None: a result that is not the last step's
    where: Path
    job: RunDir
    began: str  # when the job started, which tells it from another job in the same place


class Start(NamedTuple):
    """Where jobs started and what they are asked: those that share it share one line of the best of n."""

    path: str
    seed: int
    sampling: tuple[tuple[str, str], ...]  # PPO's settings that say how answers are drawn, as JSON

    @property
    def settings(self) -> dict[str, Any]:
        """PPO's settings that say how answers are drawn."""
        return {key: json.loads(value) for key, value in self.sampling}

    def key(self, point: Point | None = None) -> str:
        """A hash of all that a policy's figures depend on: its weights, and what it is asked and compared with."""
        where = point.where if point else Path(self.path)
        weights = where / WEIGHTS if (where / WEIGHTS).exists() else where
        hashes = [parent(str(place))["sha256"] or str(place) for place in (weights, self.path)]
        return hashlib.sha256(json.dumps([*hashes, self]).encode()).hexdigest()


Keys = dict[Point | None, str]  # of the policies with one start; None is the start itself, with its best of n
Rows = dict[str, dict[str, Any]]  # what was measured, by key


def points_of(folder: Path) -> list[Point]:
    """The policies of every PPO run below a folder: whole checkpoints in order, then the result."""
    found: list[Point] = []
    for job in ppo_jobs(folder):
        below = os.path.relpath(job.path.parent.resolve(), folder.resolve())
        name = folder.resolve().name if below == "." else below
        record, config = job.record, job.config()
        steps = [int(row["step"]) for row in read_jsonl(job.path / "metrics.jsonl")]
        last = max(steps, default=0) if record.get("status") == "done" and job.model.is_dir() else None
        best = bool(config["trainer"].get("load_best_model_at_end"))
        own = []
        for checkpoint in sealed(job.checkpoints):
            if fault := fault_of(checkpoint):
                print(f"warning: {checkpoint} is damaged ({fault}), and is left out", flush=True)
            elif best or step_of(checkpoint) != last:  # else it is the result
                own.append(Point(name, step_of(checkpoint), checkpoint, job, record["started"]))
        if last is not None:
            own.append(Point(name, None if best else last, job.model, job, record["started"]))
        if not own:
            print(f"warning: {name} is {record['status']} and has left no checkpoint, so it is left out", flush=True)
        found += own
    if not found:
        raise NotFinishedError(f"no job of {folder} has a checkpoint or a result yet.")
    return found


def by_start(points: Sequence[Point], data: dict[str, Any], asked: dict[str, Any]) -> dict[Start, list[Point]]:
    """The policies by where they started, how their answers are drawn, and the seed that held out their prompts.

    `asked` goes over how a job's PPO sampled. A line warns of jobs that learnt from other `data`.
    """
    found: dict[Start, list[Point]] = {}
    other = set()
    for point in points:
        config, path = point.job.config(), point.job.record["parents"]["policy"]["path"]
        if path.endswith(", untrained"):
            print(f"warning: {point.run} started from an untrained policy, so it is left out", flush=True)
            continue
        if config["data"] != data:
            other.add(point.run)
        sampling = {key: value for key, value in config["trainer"].items() if key in PPO_SAMPLING} | asked
        start = Start(path, config["seed"], tuple(sorted((k, json.dumps(v)) for k, v in sampling.items())))
        found.setdefault(start, []).append(point)
    if not found:
        raise UserError("no job of the sweep started from a policy that can be measured against.")
    if other:
        print(
            f"warning: {', '.join(sorted(other))} learnt from other data settings, and may know the prompts asked here"
        )
    return found


def check_judge(reward: dict[str, Any], jobs: Sequence[RunDir]) -> None:
    """Refuse to judge by the reward of one job what others learnt from another; a reward that no job has may judge."""
    theirs = {
        f"{job.record['parents'].get('reward', {}).get('path')} {json.dumps(job.config()['reward'])}" for job in jobs
    }
    if len(theirs) > 1 and any(job.config()["reward"] == reward for job in jobs):
        raise UserError(
            f"the jobs of the sweep learnt from different rewards ({'; '.join(sorted(theirs)[:3])}); say which "
            "judges all of them: another reward=, or reward.path= with one of these."
        )


def measured(start: Start, left: Keys, trial: Trial, most: int, draws: int) -> Iterator[dict[str, Any]]:
    """A row for each policy of those `left` with one start, which is the trial's reference.

    `most` is the largest n of the best of n, `draws` are the resamplings of an interval.
    """
    with progress((1 + len(left) + (most - 1) * (None in left)) * len(trial.questions), "frontier", "prompt") as bar:
        trial = dataclasses.replace(trial, tick=bar.update)
        own = measure(trial.reference, trial)
        for who, key in left.items():
            if who is None:
                about = {"path": start.path, "seed": start.seed}
                yield {"key": key, **about, **start_row(trial, own, most)}
                continue
            try:
                row = point_row(who, trial, own, start, draws)
            except FileNotFoundError:  # a job that goes on keeps only its newest
                print(f"warning: {who.where} has been deleted by now, and is left out", flush=True)
                continue
            about = {"run": who.run, "step": who.step, "path": str(who.where), "began": who.began}
            yield {"key": key, **about, "start": start.key(), **row}


def laid_out(keys: dict[Start, Keys], known: Rows) -> dict[str, Any]:
    """`starts` and `points` of frontier.json: what is known so far, in the order of the jobs.

    A checkpoint that was measured and has been deleted since still counts for its job.
    """
    begun = [known[own[None]] for own in keys.values() if own[None] in known]
    there = {(who.run, who.step): (who, key) for own in keys.values() for who, key in own.items() if who}
    places: dict[tuple[str, str], int] = {}
    for who, _ in there.values():
        places.setdefault((who.run, who.began), len(places))
    points = [
        {**known[key], "run": who.run, "step": who.step, "path": str(who.where), "began": who.began}
        for who, key in there.values()
        if key in known
    ]
    firsts = {row["key"] for row in begun}
    points += [row for row in known.values() if (row.get("run"), row.get("began")) in places
               and (row["run"], row["step"]) not in there and row["start"] in firsts]  # fmt: skip
    points.sort(key=lambda row: (places[row["run"], row["began"]], row["step"] or math.inf))
    compare_points(points, {row["key"]: row["best_of"] for row in begun})
    return {"starts": begun, "points": points}


def as_evaluation(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The policies' figures as stage=evaluate has them, for the trackers."""
    rows = {f"{row['run']} {row['step'] or 'result'}": row for row in points}
    floats = {name: {key: x for key, x in row.items() if isinstance(x, float)} for name, row in rows.items()}
    gains = {name: row["gain"] for name, row in rows.items()}
    return {"metrics": floats, "paired_gain": gains, "rewards": {}, "extremes": {}, "examples": [], "shown": []}


def start_row(trial: Trial, own: Answers, most: int) -> dict[str, Any]:
    """Where jobs started: its figures, and those of the best of up to `most` of its answers."""
    values: dict[str, list[list[float]]] = {name: [] for name in trial.rewards}
    for number in range(1, most + 1):
        again = dataclasses.replace(trial, seed=trial.seed + number)
        answers = [text for _, _, _, part in draw(trial.reference, again) for text in part]
        for name, reward in trial.rewards.items():
            values[name].append([value for part in trial.parts for value in reward(trial.prompts[part], answers[part])])
    best = best_of_n({name: np.array(rows).T for name, rows in values.items()}, next(iter(trial.rewards)))
    asked = {"prompts": len(trial.questions), "asked": trial.prompts[:_SHOWN]}
    return {**asked, **_row(own, trial.rewards), "best_of": best}


def point_row(point: Point, trial: Trial, own: Answers, start: Start, draws: int) -> dict[str, Any]:
    """A policy's figures and its gain over where it started; `draws` are the resamplings of an interval."""
    policy = open_point(point, start)
    policy.model.to(trial.first.model.device)
    answers = measure(Contestant(point.run, policy, trial.reference.sampling), trial)
    gains = {name: metrics.paired_gain(own.rewards[name], answers.rewards[name], draws, start.seed)
             for name in trial.rewards}  # fmt: skip
    row = _row(answers, trial.rewards)
    for name in row["rewards"]:
        row["rewards"][name]["gain"] = gains[name]
    return {**row, "gain": gains[next(iter(gains))]}


def _row(answers: Answers, rewards: dict[str, Reward]) -> dict[str, Any]:
    main, *others = rewards
    by_reward = {name: figures(answers.rewards[name], rewards[name].neutral) for name in rewards}
    shown = zip(answers.responses[:_SHOWN], answers.rewards[main], strict=False)
    return {
        **by_reward[main],
        **answers.figures,
        "rewards": {name: by_reward[name] for name in others},
        "answers": [{"response": text, "reward": value} for text, value in shown],
    }


def open_point(point: Point, start: Start) -> Policy:
    """A job's result as it lies there; of a checkpoint the weights that were trained, in the policy it started from."""
    if point.where == point.job.model:
        return open_policy(point.job, str(point.where), start.seed)
    policy = open_policy(point.job, start.path, start.seed)
    model: Any = policy.model
    adapter = lora_config(point.job.config()["policy"])
    if adapter:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    with_master_weights(model)
    load_policy_weights(model, point.where / WEIGHTS)
    return Policy(model.merge_and_unload() if adapter else model, policy.tokenizer)


def open_policy(job: RunDir, where: str, seed: int) -> Policy:
    """A model of a job, opened with the job's settings, on the accelerator."""
    policy, _ = load_policy({**job.config()["policy"], "lora": None, "quantize": None, "path": where}, None, [], seed)
    policy.model.to("cuda" if torch.cuda.is_available() else "cpu")
    return policy


def best_of_n(values: dict[str, NDArray[Any]], main: str) -> list[dict[str, Any]]:
    """What the best of n = 1, 2, ... N answers by the main reward is worth to each reward; `values` are (prompts, N).

    Over all choices of n among the N, not one of them: an unbiased estimate of less variance (Nakano et al. 2021, app.
    I). Its KL to where it was drawn from is at most log n - (n - 1) / n, and just that where no two answers tie.
    """
    order = values[main].argsort(1, kind="stable")
    ranked = {name: np.take_along_axis(own, order, 1) for name, own in values.items()}
    most = order.shape[1]
    found = []
    for n in range(1, most + 1):
        # The answer of rank i is the best of n where the others are among the i - 1 below it.
        weights = np.array([math.comb(i, n - 1) / math.comb(most, n) for i in range(most)])
        worth = {name: own @ weights for name, own in ranked.items()}
        by_reward = {
            name: {"reward_mean": float(own.mean()), "reward_stderr": metrics.standard_error(own)}
            for name, own in worth.items()
        }
        others = {name: row for name, row in by_reward.items() if name != main}
        found.append({"n": n, "kl": math.log(n) - (n - 1) / n, **by_reward[main], "rewards": others})
    return found


def compare_points(points: Sequence[dict[str, Any]], best_of: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Mark the policies that no policy with the same start beats in reward at no more KL, and find each one's best_of.

    `best_of` is the smallest n whose best of n answers of the start is worth as much.
    """
    for row in points:
        reward, kl = row["reward_mean"], row["kl"]
        theirs = [(other["reward_mean"], other["kl"]) for other in points if other["start"] == row["start"]]
        row["frontier"] = not any(r >= reward and k <= kl and (r, k) != (reward, kl) for r, k in theirs)
        enough = (best["n"] for best in best_of[row["start"]] if best["reward_mean"] >= reward)
        row["best_of"] = next(enough, None)
