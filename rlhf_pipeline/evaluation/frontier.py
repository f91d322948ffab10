"""Reward against KL for the checkpoints of a sweep's jobs, and for best of n without training.

Gao et al. 2022 (arXiv 2210.10760) judge a policy by its reward at a KL distance from its start. If a reward that no
model learnt from falls while the trained reward still rises, the policies over-optimise.
"""

import itertools
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.evaluation import metrics
from rlhf_pipeline.evaluation.comparison import Answers, Task, evaluation_figures, measure_policy, sample_answers
from rlhf_pipeline.evaluation.lineup import PPO_SAMPLING, Sampler, policy_at, started_from
from rlhf_pipeline.files import read_log
from rlhf_pipeline.models.policies import Policy, lora_config
from rlhf_pipeline.ppo.actor_critic import with_master_weights
from rlhf_pipeline.ppo.storage import WEIGHTS, load_policy_weights
from rlhf_pipeline.runs.checkpoints import fault_of, sealed, step_of
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.models import ppo_jobs

_SHOWN = 8  # prompts whose answers are kept for the page
_FEW = 4  # answers of the best of this n are measured, too, not only those of the largest n
_ENOUGH = 4  # the fewest policies of a run to fit two parameters to
Row = dict[str, Any]


class Point(NamedTuple):
    """A policy of a sweep: the result of a job, or one of its checkpoints."""

    run: str
    step: int | None  # None: a final model that is not the last step's
    began: str  # when the job was started; distinguishes jobs of the same name
    start: str  # JSON of initial policy, seed and sampling; points with the same start are compared
    where: Path
    job: RunDir


def points_of(folder: Path, asked: Mapping[str, Any]) -> list[Point]:
    """Return the policies of every PPO run below a folder: complete checkpoints in order, then the result.

    They sample with the settings of their PPO. `asked` overrides these.
    """
    found: list[Point] = []
    for job in ppo_jobs(folder):
        record, config = job.record, job.made_with()
        below = os.path.relpath(job.path.parent.resolve(), folder.resolve())
        name = folder.resolve().name if below == "." else below
        places = policies_by_step(job)
        if not places or started_from(str(job.model)) is None:
            why = "started from an untrained policy" if places else "has no complete checkpoint"
            print(f"warning: {name} {why}, so it is left out", flush=True)
            continue
        start = start_key(record["parents"]["policy"], config["seed"], config["trainer"], asked)
        found += [Point(name, step, record["started"], start, place, job) for step, place in places.items()]
    if not found:
        raise NotFinishedError(f"{folder} has no checkpoint and no result yet that can be measured.")
    return found


def start_key(parent: Mapping[str, Any], seed: int, trainer: Mapping[str, Any], asked: Mapping[str, Any]) -> str:
    """Return a `Point.start`: a policy as recorded in run.json, a seed, and the sampling settings of `trainer`.

    Values of `asked` that are not None override the settings.
    """
    sampling = {key: value for key, value in trainer.items() if key in PPO_SAMPLING}
    sampling |= {key: value for key, value in asked.items() if value is not None}
    return json.dumps({**parent, "seed": seed, "sampling": sampling}, sort_keys=True)


def policies_by_step(job: RunDir) -> dict[int | None, Path]:
    """Return a job's policies by step: complete checkpoints, then the result (None if it is not the last step's)."""
    found: dict[int | None, Path] = {}
    for checkpoint in sealed(job.checkpoints) if job.stage == "ppo" else ():
        if fault := fault_of(checkpoint):
            print(f"warning: {checkpoint} is damaged ({fault}) and is left out", flush=True)
        else:
            found[step_of(checkpoint)] = checkpoint
    if job.record["status"] == "done" and job.model.is_dir():
        last = max((int(row["step"]) for row in read_log(job.path / "metrics.jsonl")), default=0)
        found[None if job.config()["trainer"].get("load_best_model_at_end") else last] = job.model
    return found


def check_jobs(jobs: Sequence[RunDir], reward: dict[str, Any], data: dict[str, Any]) -> None:
    """Refuse `reward` if some jobs learnt from it and others from another reward; warn of jobs with other data.

    A reward that no job learnt from can judge all jobs.
    """
    configs = {job.name: job.config() for job in jobs}
    paths = (str(job.record["parents"].get("reward", {}).get("path")) for job in jobs)
    rewards = {f"{path} {json.dumps(own['reward'])}" for path, own in zip(paths, configs.values(), strict=True)}
    if len(rewards) > 1 and any(own["reward"] == reward for own in configs.values()):
        raise UserError(
            f"the jobs of the sweep learnt from different rewards ({'; '.join(sorted(rewards)[:3])}); choose one that "
            "judges all of them: another reward=, or reward.path= with one of these."
        )
    if other := sorted(name for name, own in configs.items() if own["data"] != data):
        print(f"warning: {', '.join(other)} learnt with other data settings and may have trained on these prompts")


def is_known(point: Point, known: Sequence[Row]) -> bool:
    """Return whether a policy is among the measured rows."""
    return any(point[:4] == tuple(row.get(key) for key in Point._fields[:4]) for row in known)


def start_row(start: str, own: Answers, task: Task, most: int, draws: int) -> Row:
    """Return the figures of an initial policy, and of the best of n of its answers, for n up to `most`.

    For two values of n, _FEW and `most`, the best answers are also measured like a policy's, under `drawn`.
    """
    tries = [sample_answers(task.reference, task, number) for number in range(1, most + 1)]
    rewards = {name: np.array([one.rewards[name] for one in tries]).T for name in own.rewards}
    best = best_of_n(rewards, next(iter(rewards)))
    for n in {min(_FEW, most), most}:
        answers = measure_policy(task.reference, task, tries[:n])
        best[n - 1]["drawn"] = _figures({"start": own, "best": answers}, task, draws)
    about = {"key": start, "path": json.loads(start)["path"], "seed": task.seed, "asked": task.prompts[:_SHOWN]}
    return {**about, **_figures({"start": own}, task, 1), "best_of": best}


def point_row(point: Point, own: Answers, task: Task, draws: int) -> Row:
    """Return a policy's figures and its gain over its start. `draws` is the number of resamplings of an interval."""
    answers = measure_policy(Sampler("point", open_point(point), task.reference.sampling), task)
    about = {"run": point.run, "step": point.step, "began": point.began, "start": point.start, "path": str(point.where)}
    return {**about, **_figures({"start": own, "point": answers}, task, draws)}


def _figures(answers: Mapping[str, Answers], task: Task, draws: int) -> Row:
    """Return the figures of the last of one or two policies, computed as in stage=evaluate."""
    name, main = [*answers][-1], next(iter(task.rewards))
    found = evaluation_figures(
        answers, name, "start", task.rewards, main, task.prompts, examples=0, bootstrap=draws, seed=task.seed
    )

    def judged(by: Row) -> Row:
        return by["metrics"][name] | dict(zip(["gain"], by["paired_gain"].values(), strict=False))

    shown = [{"response": row["responses"][name], "reward": row["rewards"][name]} for row in found["samples"][:_SHOWN]]
    values = {key: np.round(own, 6).tolist() for key, own in answers[name].rewards.items()}
    rewards = {key: judged(by) for key, by in found["rewards"].items()}
    return {**judged(found), "rewards": rewards, "answers": shown, "values": values}


def frontier_content(known: Sequence[Row], points: Sequence[Point]) -> dict[str, list[Row]]:
    """Return `starts`, `points` and `fits` of frontier.json: the figures measured so far, in the order of the jobs.

    A checkpoint that was deleted after it was measured still counts.
    """
    jobs = list(dict.fromkeys((point.run, point.began, point.start) for point in points))

    def job_of(row: Row) -> tuple[Any, ...]:
        return row.get("run"), row.get("began"), row.get("start")

    starts = [row for row in known if row.get("key") in {start for _, _, start in jobs}]
    rows = [dict(row) for row in known if job_of(row) in jobs]
    compare_points(rows, {row["key"]: row["best_of"] for row in starts})
    rows.sort(key=lambda row: (jobs.index(job_of(row)), row["step"] or math.inf))
    return {"starts": starts, "points": rows, "fits": fit_curves(starts, rows)}


def open_point(point: Point) -> Policy:
    """Open a job's final model, or its initial policy with the trained weights of a checkpoint."""
    choice, whole = point.job.config()["policy"], point.where == point.job.model
    policy = policy_at(choice, str(point.where) if whole else json.loads(point.start)["path"])
    if whole:
        return policy
    model: Any = policy.model
    adapter = lora_config(choice)
    if adapter:
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    with_master_weights(model)
    load_policy_weights(model, point.where / WEIGHTS)
    return Policy((model.merge_and_unload() if adapter else model).eval(), policy.tokenizer)


def best_of_n(values: Mapping[str, NDArray[Any]], main: str) -> list[Row]:
    """Return each reward of the best of n answers by the main reward, for n = 1 ... N; `values` are (prompts, N).

    It averages over all choices of n among the N: unbiased, and with less variance than one choice (Nakano et al. 2021,
    app. I). The KL to the sampled policy is at most log n - (n - 1) / n, with equality if no two answers tie.
    """
    order = values[main].argsort(1, kind="stable")
    most, found = order.shape[1], []
    for n in range(1, most + 1):
        # The answer of index i is the best of n if the other n - 1 are among the i answers below it.
        weights = np.array([math.comb(i, n - 1) / math.comb(most, n) for i in range(most)])
        rewards = {}
        for name, own in values.items():
            worth = np.take_along_axis(own, order, 1) @ weights
            rewards[name] = {"reward_mean": float(worth.mean()), "reward_stderr": metrics.standard_error(worth)}
        found.append({"n": n, "kl": math.log(n) - (n - 1) / n, **rewards.pop(main), "rewards": rewards})
    return found


def fit_curves(starts: Sequence[Row], points: Sequence[Row]) -> list[Row]:
    """Fit Gao et al.'s curves to each reward of best of n and of each run that has enough policies.

    With d = sqrt(KL), the gain in reward over the start is d (alpha - beta d) for best of n and d (alpha - beta log d)
    for RL. alpha and beta are fitted by least squares. `to` is the greatest d.
    """
    found = []
    for start in starts:
        runs = dict.fromkeys(row["run"] for row in points if row["start"] == start["key"])
        own = {run: [row for row in points if (row["run"], row["start"]) == (run, start["key"])] for run in runs}
        ways = [("best of n", lambda d: d, start["best_of"]), *((run, np.log, rows) for run, rows in own.items())]
        for (way, bend, rows), reward in itertools.product(ways, ["", *start["rewards"]]):
            of = [row["rewards"][reward] if reward else row for row in (start, *rows)]
            kl, gain = (np.array(each) for each in ([row["kl"] for row in rows], [x["reward_mean"] for x in of[1:]]))
            d, gain = np.sqrt(kl[kl > 0]), (gain - of[0]["reward_mean"])[kl > 0]
            if len(set(d)) >= _ENOUGH:
                (alpha, beta), *_ = np.linalg.lstsq(np.stack([d, -d * bend(d)], 1), gain, rcond=None)
                about = {"way": way, "start": start["key"], "reward": reward, "points": len(d), "to": float(d.max())}
                found.append({**about, "alpha": float(alpha), "beta": float(beta)})
    return found


def compare_points(points: Sequence[Row], best_of: Mapping[str, Sequence[Row]]) -> None:
    """Set each policy's `frontier` (no policy with its start has as much reward at no more KL) and `best_of`.

    `best_of` is the smallest n for which best of n of the start's answers reaches its reward; None if no n does.
    """
    for row in points:
        reward, kl = row["reward_mean"], row["kl"]
        theirs = [(other["reward_mean"], other["kl"]) for other in points if other["start"] == row["start"]]
        row["frontier"] = not any(r >= reward and k <= kl and (r, k) != (reward, kl) for r, k in theirs)
        row["best_of"] = next((best["n"] for best in best_of[row["start"]] if best["reward_mean"] >= reward), None)
