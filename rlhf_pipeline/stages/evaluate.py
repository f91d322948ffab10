"""Evaluate every policy of the run on the same held-out prompts, with the same rewards.

python -m rlhf_pipeline stage=evaluate
python -m rlhf_pipeline stage=evaluate sweep=<a multirun>   (reward against KL for all of its policies)
"""

import dataclasses
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline.data import Splits, count_known_prompts, fingerprint, load_data, texts
from rlhf_pipeline.data.records import Demonstration, Row, Turn
from rlhf_pipeline.data.tokenization import columns_of, conversational, questions
from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.evaluation import comparison, frontier, lineup
from rlhf_pipeline.evaluation.comparison import Task
from rlhf_pipeline.evaluation.lineup import Sampler
from rlhf_pipeline.files import read_json, write_json
from rlhf_pipeline.models.rewards import Reward, load_reward, trained_part
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.progress import progress
from rlhf_pipeline.report.tables import evaluation_table, frontier_table
from rlhf_pipeline.runs.directory import FRONTIER, RunDir
from rlhf_pipeline.runs.models import run_of
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.training.setup import check_languages, print_input, quiet, read_data, reward_origins

_BEST_OF = 16  # answers per prompt to estimate a sweep's best of n, unless evaluate.best_of is set


def run(settings: Settings, out: RunDir) -> None:
    """Sample from each policy, then measure rewards, KL to the reference, perplexity, and statistics of the texts."""
    quiet()
    if settings.sweep:
        measure_sweep(settings, out, Path(settings.sweep))
        return
    asked = settings.evaluate
    paths, reference = lineup.lineup(out, asked.policies, settings.policy)
    rewards, judged_by = load_rewards(settings, out)
    rows = read_data(settings.data, settings.seed)
    policies = lineup.open_all([*paths.items()], out, settings.policy, **asked_sampling(settings))
    for name, path in paths.items():
        print_input(name, path)
    out.begin(settings, {**paths, **judged_by}, fingerprint(settings.data, rows))

    start = next(each for each in policies if each.name == reference)
    task = make_task(settings, policies, start, rows, rewards)
    longest, talks = int(task.limits.max()), conversational(rows.test)
    typed = [Demonstration((Turn("user", text),) if talks else text, "") for text in asked.show]
    for reward in rewards.values() if typed else ():
        reward.check_columns([], "evaluate.show")
    shows = questions(typed, task.first.tokenizer, settings.data, settings.seed) if typed else []
    shows = lineup.with_room(shows, [each.policy for each in policies], longest) if typed else []
    own = dataclasses.replace(task, questions=shows, limits=torch.full((len(shows),), longest))
    n, answers, shown, begun = asked.best_of or 0, {}, {}, time.monotonic()
    tries: list[comparison.Answers] = []
    drawn = (len(policies) + n) * len(task.questions)
    with progress(drawn, "evaluate", "prompt") as bar:
        task = dataclasses.replace(task, tick=bar.update)
        for each in policies:
            answers[each.name] = comparison.measure_policy(each, task)
            if n and each is start:
                tries = [comparison.sample_answers(each, task, number) for number in range(1, n + 1)]
                answers[f"best of {n}"] = comparison.measure_policy(each, task, tries)
            if asked.show:
                shown[each.name] = comparison.sample_answers(each, own)
    if not out.leads:
        return
    seconds = time.monotonic() - begun
    tokens = sum(len(ids) for one in (*(answers[each.name] for each in policies), *tries) for ids in one.ids)
    speed = {"tokens_per_second": round(tokens / seconds, 1), "prompts_per_second": round(drawn / seconds, 1)}
    last, trained = policies[-1].name, learnt_from([*paths.values()], rewards)
    evaluation = {
        "prompts": len(task.questions),
        "prompts_in_training": count_known_prompts([question.prompt for question in task.questions], rows.train),
        "reward": next(iter(rewards.values())).name,
        "reference": reference,
        "sampling": dataclasses.asdict(policies[0].sampling),
        **comparison.evaluation_figures(answers, last, reference, rewards, trained, task.prompts,
                  examples=asked.examples, bootstrap=asked.bootstrap, seed=settings.seed),
        "shown": comparison.sample_rows(own.prompts, shown, next(iter(rewards))),
    }  # fmt: skip
    write_json(out.path / "evaluation.json", evaluation)
    after = evaluation["metrics"][last]
    results = {"reward_mean": after["reward_mean"], "kl": after["kl"]}
    if gain := evaluation["paired_gain"].get(f"{last} - {policies[0].name}"):
        results |= {"gain": gain["mean"], "gain_low": gain["low"], "gain_high": gain["high"]}
    out.observer.evaluated(out.config(), evaluation)
    out.finish({**results, "speed": speed}, objective=after["reward_mean"])
    evaluation_table(evaluation)


def asked_sampling(settings: Settings) -> dict[str, Any]:
    """Return the sampling settings of stage=evaluate. None means PPO's value."""
    return {"response_length": settings.evaluate.response_length, "temperature": settings.evaluate.temperature}


def measure_sweep(settings: Settings, out: RunDir, folder: Path) -> None:
    """Measure every policy of a sweep that is not measured yet, and best of n of the policies that they start from."""
    points = frontier.points_of(folder, asked_sampling(settings))
    jobs = list({point.job.path: point.job for point in points}.values())
    frontier.check_jobs(jobs, settings.labelling_reward or settings.reward, settings.data)
    rewards, judged_by = load_rewards(settings, jobs[0])
    print_input("sweep", f"{folder}: {len(points)} policies of {len(jobs)} runs")
    whole, news = measure_points(settings, out, points, rewards, judged_by, folder)
    if not news:
        return frontier_table(whole)
    if not whole["points"]:
        raise NotFinishedError(f"all checkpoints of {folder} were deleted before they were measured; run this again.")
    coef = jobs[0].config()["trainer"].get("selection_kl_coef", PPOConfig.selection_kl_coef)
    top = max(whole["points"], key=lambda row: row["reward_mean"] - coef * row["kl"])
    results = {"policies": len(whole["points"]), "reward_mean": top["reward_mean"], "kl": top["kl"]}
    out.finish(results, objective=top["reward_mean"])
    frontier_table(whole)


def measure_points(
    settings: Settings, out: RunDir, points: Sequence[frontier.Point], rewards: dict[str, Reward],
    parents: dict[str, str], folder: Path,
) -> tuple[dict[str, Any], bool]:  # fmt: skip
    """Measure `points`, and write each to `frontier.json` at once. Return its content, and whether any of it is new."""
    place = out.path / FRONTIER
    before = read_json(place)
    known = [*before.get("starts", []), *before.get("points", [])]
    left = [point for point in points if not frontier.is_known(point, known)]

    def found() -> dict[str, Any]:
        reward = next(iter(rewards.values())).name
        return {"sweep": str(folder), "reward": reward, **frontier.frontier_content(known, points)}

    if out.record.get("status") == "done" and not left and before == found():
        return before, False
    out.begin(settings, parents, fingerprint(settings.data, read_data(settings.data, settings.seed)))
    for row in frontier_rows(settings, left, known, rewards):
        known.append(row)
        write_json(place, found())
        out.observer.added()
    whole = found()
    write_json(place, whole)
    return whole, True


def frontier_rows(
    settings: Settings, left: Sequence[frontier.Point], known: Sequence[frontier.Row], rewards: dict[str, Reward]
) -> Iterator[frontier.Row]:
    """Yield a row for each point in `left`; before them, one for the policy that they started from, if not `known`."""
    most = settings.evaluate.best_of or _BEST_OF
    for start in dict.fromkeys(point.start for point in left):
        points, about = [point for point in left if point.start == start], json.loads(start)
        policy = lineup.policy_at(points[0].job.config()["policy"], about["path"])
        who = lineup.make_sampler("start", policy, about["sampling"])
        of_start = dataclasses.replace(settings, seed=about["seed"])
        rows = load_data(settings.data, about["seed"])
        task = make_task(of_start, [who], who, rows, rewards)
        new = all(row.get("key") != start for row in known)
        with progress((1 + len(points) + most * new) * len(task.questions), "frontier", "prompt") as bar:
            task = dataclasses.replace(task, tick=bar.update)
            own = comparison.measure_policy(who, task)
            if new:
                known_before = count_known_prompts([question.prompt for question in task.questions], rows.train)
                counts = {"prompts": len(task.questions), "prompts_in_training": known_before}
                yield frontier.start_row(start, own, task, most, settings.evaluate.bootstrap) | counts
            for point in points:
                try:
                    yield frontier.point_row(point, own, task, settings.evaluate.bootstrap)
                except FileNotFoundError:  # a job that still runs keeps only its newest checkpoints
                    print(f"warning: {point.where} has been deleted by now, and is left out", flush=True)


def load_rewards(settings: Settings, out: RunDir) -> tuple[dict[str, Reward], dict[str, str]]:
    """Return the main reward, first, and those of `evaluate.rewards`, by name; and their origins, by role.

    Rewards with the same name get their fields in the name. A reward that labels in place of people is the main one,
    because it stands for their judgement.
    """
    choices = [settings.labelling_reward or settings.reward, *settings.evaluate.rewards]
    names = [choice["name"] for choice in choices]
    found: dict[str, Reward] = {}
    lineage: dict[str, str] = {}
    for number, choice in enumerate(choices):
        role = f"evaluate.rewards[{number - 1}]" if number else "reward"
        fields = ", ".join(f"{key}={value}" for key, value in choice.items() if key != "name" and value is not None)
        name = f"{choice['name']} ({fields})" if fields and names.count(choice["name"]) > 1 else choice["name"]
        if name in found:
            raise UserError(f"{role} is {name}, which judges already; leave it out.")
        made = (each.upstream("reward", reward=trained_part(choice)) for each in (out, *out.rounds()))
        try:
            found[name], where = load_reward(choice, next(filter(None, made), None))
        except UserError as error:
            raise type(error)(f"{role}: {error}" if number else str(error)) from error
        print_input(name if number else role, where)
        lineage |= reward_origins(found[name], where, role)
    return found, lineage


def learnt_from(paths: Sequence[str], rewards: dict[str, Reward]) -> str:
    """Return the reward that the newest PPO policy learned from, if it is one of these; else the main one."""
    homes = [home for path in paths if (home := run_of(path)) and home.stage == "ppo"]
    where = str(homes[-1].record["parents"].get("reward", {}).get("path")) if homes else ""
    own = (name for name, reward in rewards.items() if lineup.same_place(reward.name, where))
    return next(own, next(iter(rewards)))


def make_task(
    settings: Settings, policies: Sequence[Sampler], reference: Sampler, rows: Splits[Row], rewards: dict[str, Reward]
) -> Task:
    """Return the held-out prompts that every policy has room for, in the first one's tokens, with the rewards."""
    asked, first, (main, *others) = settings.evaluate, policies[0].policy, rewards.items()
    check_languages(main[1], first.tokenizer, texts(rows.test))
    for name, reward in others:
        if reason := reward.unfit(texts(rows.test)):
            print(f"warning: {name}: {reason}", flush=True)
    longest, shortest = min(each.longest for each in policies), min(each.shortest for each in policies)
    every = questions(rows.test, first.tokenizer, settings.data, settings.seed)
    for reward in rewards.values():
        reward.check_columns(columns_of(every))
    kept = lineup.with_room(every, [each.policy for each in policies], longest)[: asked.prompts]
    limits = torch.randint(shortest, longest + 1, (len(kept),), generator=torch.Generator().manual_seed(settings.seed))
    held_out = comparison.held_out_texts(rows.test, policies, 0 if settings.sweep else asked.held_out_tokens)
    return Task(kept, limits, rewards, first, reference, asked.batch_size, settings.seed, held_out)
