"""Reward against KL over the jobs of a sweep and their checkpoints, beside the best of n answers without training.

python -m rlhf_pipeline stage=evaluate sweep=<a multirun>

As Gao et al. 2022 (arXiv 2210.10760) judge a policy: by the reward that it reaches at a distance from where it began.
"""

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_pipeline import metrics
from rlhf_pipeline.atomic import read_jsonl, write_json, write_jsonl
from rlhf_pipeline.checkpoints import fault_of, sealed, step_of
from rlhf_pipeline.data import fingerprint, load_data, texts
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.lineage import parent
from rlhf_pipeline.made import ppo_jobs
from rlhf_pipeline.policies import Policy, load_policy, lora_config
from rlhf_pipeline.ppo.actor_critic import with_master_weights
from rlhf_pipeline.ppo.storage import WEIGHTS, load_policy_weights
from rlhf_pipeline.progress import progress
from rlhf_pipeline.rewards import Reward
from rlhf_pipeline.rundir import FRONTIER, POINTS, RunDir
from rlhf_pipeline.settings import SAMPLING, Settings
from rlhf_pipeline.stages.answers import Answers, Trial, draw, measure
from rlhf_pipeline.stages.common import (
    check_languages,
    judges,
    quiet,
    sampling_as,
    say_taken,
)
from rlhf_pipeline.stages.contestants import Contestant
from rlhf_pipeline.stages.evaluate import load_rewards, prompts_for, response_limits
from rlhf_pipeline.stages.standings import figures
from rlhf_pipeline.tables import frontier_table

_BEST_OF = 16  # answers to a prompt that the best of n are estimated from, where evaluate.best_of does not say
_SHOWN = 8  # prompts whose answers are kept to be looked at
# What of PPO's settings says how answers are drawn.
_SAMPLING_OF_PPO = (*SAMPLING, "min_response_length", "temperature")


class Point(NamedTuple):
    """A policy on its way: the result of a job, or one of its checkpoints."""

    run: str
    step: int | None  # None: a result that is not the last step's
    where: Path
    job: RunDir


Keys = dict[Point | None, str]  # of the policies that began at one; None is that one, with the best of n of it


@dataclass(frozen=True)
class Start:
    """What jobs have in common that began at one policy and are asked the same: one line of the best of n."""

    path: str
    data: str  # as JSON
    seed: int
    sampling: tuple[tuple[str, str], ...]  # what of PPO's settings says how answers are drawn, as JSON

    def key(self, point: Point | None = None) -> str:
        """What the figures of a policy that began here hang on: its weights, and what it is asked and held against."""
        where = point.where if point else Path(self.path)
        weights = where / WEIGHTS if (where / WEIGHTS).exists() else where
        hashes = [parent(str(place))["sha256"] or str(place) for place in (weights, self.path)]
        return hashlib.sha256(json.dumps([*hashes, dataclasses.astuple(self)]).encode()).hexdigest()


def run(settings: Settings, out: RunDir) -> None:
    """Measure every policy of the sweep that is not measured yet, and the best of n of where each began."""
    quiet()
    folder = Path(settings.sweep or "")
    starts = by_start(points_of(folder), settings)
    jobs = [point.job for points in starts.values() for point in points]
    rewards = load_rewards(settings, jobs[0])
    check_judge(settings, jobs, rewards)
    say_taken("sweep", f"{folder}: {len(jobs)} policies of {len({job.path for job in jobs})} runs")
    lineage: dict[str, str] = {}
    for number, (name, reward) in enumerate(rewards.items()):
        say_taken("reward" if not number else name, reward.name)
        lineage |= judges(reward, reward.name, f"evaluate.rewards[{number - 1}]" if number else "reward")
    about = {"sweep": str(folder), "reward": next(iter(rewards.values())).name}
    first = _as_begun(settings, next(iter(starts)))
    rows = load_data(first.data, first.seed)
    out.begin(settings, lineage, fingerprint(first.data, rows))
    known = {row["key"]: row for row in read_jsonl(out.path / POINTS)}
    write_jsonl(out.path / POINTS, list(known.values()))  # without a row that was cut off, to be added to
    keys = {start: {who: start.key(who) for who in (None, *points)} for start, points in starts.items()}
    for start, points in starts.items():
        left = {who: key for who, key in keys[start].items() if key not in known}
        for row in measured(start, left, points[0].job, rewards, settings) if left else ():
            known[row["key"]] = row
            out.add(POINTS, [row])
            write_json(out.path / FRONTIER, {**about, **laid_out(keys, known)})
            out.draw()
    found = {**about, **laid_out(keys, known)}
    write_json(out.path / FRONTIER, found)
    best = max(found["points"], key=lambda row: row["reward_mean"])
    results = {"policies": len(found["points"]), "reward_mean": best["reward_mean"], "kl": best["kl"]}
    out.trackers.evaluation(out.config(), _as_evaluation(found["points"]))
    out.finish(results, objective=best["reward_mean"])
    frontier_table(found)


def _as_evaluation(points: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The policies' figures as stage=evaluate has them, for the trackers."""
    rows = {f"{row['run']} {row['step'] or 'result'}": row for row in points}
    numbers = {
        name: {key: value for key, value in row.items() if isinstance(value, float)} for name, row in rows.items()
    }
    gains = {name: row["gain"] for name, row in rows.items()}
    return {"metrics": numbers, "paired_gain": gains, "rewards": {}, "extremes": {}, "examples": [], "shown": []}


def points_of(folder: Path) -> list[Point]:
    """The policies of every PPO run below a folder: whole checkpoints in order, then the result."""
    found: list[Point] = []
    for job in ppo_jobs(folder):
        name = str(job.path.parent.relative_to(folder)) if job.path.parent != folder else folder.name
        record, config = job.record, job.config()
        last = _last_step(job) if record.get("status") == "done" and job.model.is_dir() else None
        best = bool(config["trainer"].get("load_best_model_at_end"))
        own = []
        for checkpoint in sealed(job.checkpoints):
            if fault := fault_of(checkpoint):
                print(f"warning: {checkpoint} is damaged ({fault}), and is left out", flush=True)
            elif best or step_of(checkpoint) != last:  # else it is the result
                own.append(Point(name, step_of(checkpoint), checkpoint, job))
        if last is not None:
            own.append(Point(name, None if best else last, job.model, job))
        if not own:
            print(f"warning: {name} is {record['status']} and has left no checkpoint, so it is left out", flush=True)
        found += own
    if not found:
        raise NotFinishedError(f"no job of {folder} has come to a checkpoint or a result yet.")
    return found


def _last_step(job: RunDir) -> int:
    rows = (job.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return max(int(json.loads(row)["step"]) for row in rows)


def by_start(points: Sequence[Point], settings: Settings) -> dict[Start, list[Point]]:
    """The policies by where they began and what they are asked: data that were said of all, else those of the job."""
    found: dict[Start, list[Point]] = {}
    said = settings.data if settings.data != points[0].job.config()["data"] else None
    for point in points:
        config, path = point.job.config(), point.job.record["parents"]["policy"]["path"]
        if path.endswith(", untrained"):
            print(f"warning: {point.run} began at a policy that had learnt nothing, so it is left out", flush=True)
            continue
        sampling = {key: value for key, value in config["trainer"].items() if key in _SAMPLING_OF_PPO}
        sampling |= {key: getattr(settings.evaluate, key) for key in ("response_length", "temperature")
                     if getattr(settings.evaluate, key) is not None}  # fmt: skip
        data = json.dumps(said or config["data"], sort_keys=True)
        start = Start(path, data, config["seed"], tuple(sorted((k, json.dumps(v)) for k, v in sampling.items())))
        found.setdefault(start, []).append(point)
    if not found:
        raise UserError(f"no job of {settings.sweep} began at a policy that can be measured against.")
    return found


def check_judge(settings: Settings, jobs: Sequence[RunDir], rewards: dict[str, Reward]) -> None:
    """Refuse to judge by the reward of one job what others learnt from another; one that was chosen may judge all."""
    if settings.labelling_reward or settings.reward != jobs[0].config()["reward"]:
        return
    theirs = sorted({str(job.record["parents"].get("reward", {}).get("path")) for job in jobs})
    if len(theirs) > 1:
        raise UserError(
            f"the jobs of {settings.sweep} learnt from different rewards ({', '.join(theirs[:3])}); say which judges "
            "all of them: reward=, or reward.path= with one of these."
        )


def measured(
    start: Start, left: Keys, job: RunDir, rewards: dict[str, Reward], settings: Settings
) -> Iterator[dict[str, Any]]:
    """A row for each policy of those that began at one."""
    most, draws = settings.evaluate.best_of or _BEST_OF, settings.evaluate.bootstrap
    trial = trial_of(start, job, rewards, _as_begun(settings, start))
    with progress((1 + len(left) + (most - 1) * (None in left)) * len(trial.questions), "frontier", "prompt") as bar:
        trial = dataclasses.replace(trial, tick=bar.update)
        own = measure(trial.reference, trial)
        for who, key in left.items():
            row = start_row(trial, own, most) if who is None else point_row(who, trial, own, start, draws)
            yield {"key": key, **row}


def laid_out(keys: dict[Start, Keys], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is known so far of where the jobs began, and of their policies in order."""
    begun, points = [], []
    for start, own in keys.items():
        for who, key in own.items():
            if key in known and who is None:
                begun.append({"path": start.path, "seed": start.seed, **known[key]})
            elif key in known and who is not None:
                about = {"run": who.run, "step": who.step, "path": str(who.where), "start": own[None]}
                points.append({**about, **known[key]})
    compare_points(points, {row["key"]: row["best_of"] for row in begun})
    return {"starts": begun, "points": points}


def _as_begun(settings: Settings, start: Start) -> Settings:
    """The settings of an evaluation of the jobs that began there."""
    return dataclasses.replace(settings, data=json.loads(start.data), seed=start.seed)


def trial_of(start: Start, job: RunDir, rewards: dict[str, Reward], settings: Settings) -> Trial:
    """What the jobs that began at one policy are asked, with that policy as their reference."""
    policy = _opened(job, start.path, start.seed)
    asked = {key: json.loads(value) for key, value in start.sampling}
    sampling, longest, shortest = sampling_as(asked, policy)
    reference = Contestant("start", policy, sampling)
    rows = load_data(settings.data, start.seed)
    check_languages(next(iter(rewards.values())), policy.tokenizer, texts(rows.test))
    questions = prompts_for([reference], rows.test, longest, settings)
    limits = response_limits(shortest, longest, len(questions), start.seed)
    return Trial(questions, limits, rewards, policy, reference, settings.evaluate.batch_size, start.seed)


def start_row(trial: Trial, own: Answers, most: int) -> dict[str, Any]:
    """Where jobs began: its figures, and those of the best of up to `most` of its answers."""
    values: dict[str, list[list[float]]] = {name: [] for name in trial.rewards}
    for number in range(1, most + 1):
        again = dataclasses.replace(trial, seed=trial.seed + number)
        said = [text for _, _, _, part in draw(trial.reference, again) for text in part]
        for name, reward in trial.rewards.items():
            values[name].append([value for part in trial.parts for value in reward(trial.prompts[part], said[part])])
    best = best_of_n({name: np.array(rows).T for name, rows in values.items()}, next(iter(trial.rewards)))
    asked = {"prompts": len(trial.questions), "asked": trial.prompts[:_SHOWN]}
    return {**asked, **_row(own, trial.rewards), "best_of": best}


def point_row(point: Point, trial: Trial, own: Answers, start: Start, draws: int) -> dict[str, Any]:
    """What a policy came to, and what it gained over where it began; `draws` are those of the bootstrap."""
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
    said = zip(answers.responses[:_SHOWN], answers.rewards[main], strict=False)
    return {
        **by_reward[main],
        **answers.figures,
        "rewards": {name: by_reward[name] for name in others},
        "answers": [{"response": text, "reward": value} for text, value in said],
    }


def open_point(point: Point, start: Start) -> Policy:
    """A job's result as it lies there; of a checkpoint the weights that were trained, in the policy it began with."""
    if point.where == point.job.model:
        return _opened(point.job, str(point.where), start.seed)
    policy = _opened(point.job, start.path, start.seed)
    model: Any = policy.model
    adapter = lora_config(point.job.config()["policy"])
    if adapter:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    with_master_weights(model)
    load_policy_weights(model, point.where / WEIGHTS)
    return Policy(model.merge_and_unload() if adapter else model, policy.tokenizer)


def _opened(job: RunDir, where: str, seed: int) -> Policy:
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
    prompts, most = order.shape
    found = []
    for n in range(1, most + 1):
        # The answer of rank i is the best of n where the others are among the i - 1 below it.
        weights = np.array([math.comb(i, n - 1) / math.comb(most, n) for i in range(most)])
        worth = {name: own @ weights for name, own in ranked.items()}
        by_reward = {
            name: {"reward_mean": float(own.mean()), "reward_stderr": float(own.std(ddof=1) / math.sqrt(prompts))}
            for name, own in worth.items()
        }
        others = {name: row for name, row in by_reward.items() if name != main}
        found.append({"n": n, "kl": math.log(n) - (n - 1) / n, **by_reward[main], "rewards": others})
    return found


def compare_points(points: Sequence[dict[str, Any]], best_of: Mapping[str, Sequence[dict[str, Any]]]) -> None:
    """Mark the policies that none beats in reward at no more KL, and say the best of how many each of them is worth."""
    for row in points:
        reward, kl = row["reward_mean"], row["kl"]
        theirs = [(other["reward_mean"], other["kl"]) for other in points]
        row["frontier"] = not any(r >= reward and k <= kl and (r, k) != (reward, kl) for r, k in theirs)
        enough = (best["n"] for best in best_of[row["start"]] if best["reward_mean"] >= reward)
        row["best_of"] = next(enough, None)
