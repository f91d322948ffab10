"""Before and after: every policy of the run on the same held-out prompts, by the same rewards.

python -m rlhf_pipeline stage=evaluate
python -m rlhf_pipeline stage=evaluate sweep=<a multirun>   (reward against KL for all of its policies)
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_pipeline.data import Splits, begun_by, fingerprint, load_data, texts
from rlhf_pipeline.data.records import Prompt, Row, Turn
from rlhf_pipeline.data.templates import written
from rlhf_pipeline.data.tokenization import Question, conversational, encode, fitting, questions
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation import frontier
from rlhf_pipeline.evaluation.comparison import (
    Answers,
    Trial,
    compare,
    draw,
    held_out_perplexity,
    held_out_texts,
    measure,
    sample_row,
)
from rlhf_pipeline.evaluation.lineup import (
    Contestant,
    asked_of,
    lineup,
    open_all,
    same_place,
    same_vocabulary,
    sampling_as,
)
from rlhf_pipeline.files import read_jsonl, write_json, write_jsonl
from rlhf_pipeline.models.policies import Policy, load_policy
from rlhf_pipeline.models.rewards import Reward, load_reward, trained_part
from rlhf_pipeline.models.sampling import check_positions, room_for_prompts
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.processes import gathered
from rlhf_pipeline.progress import progress
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.report.tables import evaluation_table, frontier_table
from rlhf_pipeline.runs.directory import FRONTIER, POINTS, RunDir
from rlhf_pipeline.runs.models import run_of
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.training.setup import check_languages, judges, quiet, say_taken, take_data

_BEST_OF = 16  # answers to a prompt that a sweep's best of n is estimated from, unless evaluate.best_of says


def run(settings: Settings, out: RunDir) -> None:
    """Sample from each policy, then measure rewards, KL to the reference, perplexity, and what the texts are like."""
    quiet()
    if settings.sweep:
        measure_sweep(settings, out, Path(settings.sweep))
        return
    asked = settings.evaluate
    paths, reference = lineup(out, asked.policies, settings.policy)
    rewards = load_rewards(settings, out)
    rows = take_data(settings.data, settings.seed)
    policies, longest, shortest = open_all(paths, out, lambda path: open_policy(path, settings), **_sampled(settings))
    for name, path in paths.items():
        say_taken(name, path)
    out.begin(settings, {**paths, **announce(rewards)}, fingerprint(settings.data, rows))

    start = next(each for each in policies if each.name == reference)
    trial = make_trial(settings, policies, start, longest, shortest, rows, rewards)
    own = own_questions(asked.show, rows.test, trial.first)
    for each in policies:
        prompts = asked_of(each.policy, trial.first, [*trial.questions, *own])
        check_positions(each.policy.model, prompts, int(trial.limits.max()))
    answers, shown = ask(policies, trial, own, rows, settings)
    speed = trial.speed()
    if not out.leads:
        return

    last, trained = policies[-1].name, learnt_from(list(paths.values()), rewards)
    evaluation = {
        "prompts": len(trial.questions),
        "prompts_in_training": begun_by([question.prompt for question in trial.questions], rows.train),
        "reward": next(iter(rewards.values())).name,
        "reference": reference,
        "sampling": dataclasses.asdict(policies[0].sampling),
        **compare(answers, last, reference, rewards, trained, trial.prompts,
                  examples=asked.examples, bootstrap=asked.bootstrap, seed=settings.seed),
        "shown": shown,
    }  # fmt: skip
    write_json(out.path / "evaluation.json", evaluation)
    after = evaluation["metrics"][last]
    results = {"reward_mean": after["reward_mean"], "kl": after["kl"]}
    if gain := evaluation["paired_gain"].get(f"{last} - {policies[0].name}"):
        results |= {"gain": gain["mean"], "gain_low": gain["low"], "gain_high": gain["high"]}
    out.trackers.evaluation(out.config(), evaluation)
    out.finish({**results, "speed": speed}, objective=after["reward_mean"])
    evaluation_table(evaluation)


def measure_sweep(settings: Settings, out: RunDir, folder: Path) -> None:
    """Measure every policy of a sweep that is not measured yet, and the best of n of where each started."""
    points = frontier.points_of(folder)
    said = {key: value for key, value in _sampled(settings).items() if value is not None}
    starts = frontier.by_start(points, settings.data, said)
    jobs = list({point.job.path: point.job for own in starts.values() for point in own}.values())
    rewards = load_rewards(settings, jobs[0])
    if not settings.labelling_reward:
        frontier.check_judge(settings.reward, jobs)
    say_taken("sweep", f"{folder}: {sum(map(len, starts.values()))} policies of {len(jobs)} runs")
    lineage = announce(rewards)
    known: frontier.Rows = {row["key"]: row for row in read_jsonl(out.path / POINTS)}
    keys = {start: {who: start.key(who) for who in (None, *own)} for start, own in starts.items()}
    place = out.path / FRONTIER

    def found() -> dict[str, Any]:
        reward = next(iter(rewards.values())).name
        return {"sweep": str(folder), "reward": reward, **frontier.laid_out(keys, known)}

    if out.record.get("status") == "done" and place.exists() and json.loads(place.read_text("utf-8")) == found():
        frontier_table(found())
        return  # nothing has been made since
    out.begin(settings, lineage, fingerprint(settings.data, take_data(settings.data, settings.seed)))
    write_jsonl(out.path / POINTS, known.values())  # without a row that was cut off, to be added to
    for start, own in keys.items():
        left = {who: key for who, key in own.items() if key not in known}
        if not left:
            continue
        policy = frontier.open_policy(starts[start][0].job, start.path, start.seed)
        sampling, longest, shortest = sampling_as(start.settings, policy)
        reference = Contestant("start", policy, sampling)
        of_start = dataclasses.replace(settings, seed=start.seed)
        rows = load_data(settings.data, start.seed)
        trial = make_trial(of_start, [reference], reference, longest, shortest, rows, rewards)
        most = settings.evaluate.best_of or _BEST_OF
        for row in frontier.measured(start, left, trial, most, settings.evaluate.bootstrap):
            known[row["key"]] = row
            out.add(POINTS, [row])
            write_json(place, found())
            out.draw()
    whole = found()
    write_json(place, whole)
    coef = jobs[0].config()["trainer"].get("selection_kl_coef", PPOConfig.selection_kl_coef)
    best = max(whole["points"], key=lambda row: row["reward_mean"] - coef * row["kl"])
    results = {"policies": len(whole["points"]), "reward_mean": best["reward_mean"], "kl": best["kl"]}
    out.trackers.evaluation(out.config(), frontier.as_evaluation(whole["points"]))
    out.finish(results, objective=best["reward_mean"])
    frontier_table(whole)


def _sampled(settings: Settings) -> dict[str, Any]:
    """The sampling settings of stage=evaluate; where one is None, policies sample as PPO did."""
    return {key: getattr(settings.evaluate, key) for key in ("response_length", "temperature")}


def open_policy(path: str, settings: Settings) -> Policy:
    """A policy that is compared, by its folder or hub id."""
    try:
        return load_policy({**settings.policy, "path": path}, None, [], settings.seed)[0]
    except UserError as error:
        if not settings.evaluate.policies:
            raise
        hint = "" if "/" in path else suggest(path, ("pretrain", "sft", "ppo"))  # a word may be a hub id, too
        raise type(error)(f"{error} {hint}".replace("policy.path", "evaluate.policies").rstrip()) from error


def load_rewards(settings: Settings, out: RunDir) -> dict[str, Reward]:
    """The reward that judges, first, and those of `evaluate.rewards`; by name, with its fields if names repeat.

    Where a reward labels in place of people, that one judges, for it is what they would say.
    """
    choices = [settings.labelling_reward or settings.reward, *settings.evaluate.rewards]
    names = [str(choice["name"]) for choice in choices]
    found: dict[str, Reward] = {}
    for number, (choice, name) in enumerate(zip(choices, names, strict=True)):
        fields = ", ".join(f"{key}={value}" for key, value in choice.items() if key != "name" and value is not None)
        full = f"{name} ({fields})" if fields and names.count(name) > 1 else name
        if full in found:
            raise UserError(f"evaluate.rewards[{number - 1}] is {full}, which judges already; leave it out.")
        made = (each.upstream("reward", reward=trained_part(choice)) for each in (out, *out.rounds()))
        try:
            found[full] = load_reward(choice, next((path for path in made if path), None))[0]
        except UserError as error:
            raise type(error)(f"evaluate.rewards[{number - 1}]: {error}" if number else str(error)) from error
    return found


def announce(rewards: dict[str, Reward]) -> dict[str, str]:
    """Print a line for each reward; give their places in the lineage."""
    lineage: dict[str, str] = {}
    for number, (name, reward) in enumerate(rewards.items()):
        say_taken(name if number else "reward", reward.name)
        lineage |= judges(reward, reward.name, f"evaluate.rewards[{number - 1}]" if number else "reward")
    return lineage


def learnt_from(paths: Sequence[str], rewards: dict[str, Reward]) -> str:
    """The reward that the newest of PPO's policies learnt from, if it is one of these; else the main one."""
    homes = [home for path in reversed(paths) if (home := run_of(path)) and home.stage == "ppo"]
    where = homes[0].record["parents"].get("reward", {}).get("path") if homes else None
    return next((name for name, reward in rewards.items() if same_place(reward.name, str(where))), next(iter(rewards)))


def make_trial(
    settings: Settings, policies: Sequence[Contestant], reference: Contestant, longest: int, shortest: int,
    rows: Splits[Row], rewards: dict[str, Reward],
) -> Trial:  # fmt: skip
    """The held-out prompts and what judges the answers; a line warns of a reward that does not fit the texts."""
    first, (main, *others) = policies[0].policy, rewards.items()
    check_languages(main[1], first.tokenizer, texts(rows.test))
    for name, reward in others:
        if reason := reward.unfit(texts(rows.test)):
            print(f"warning: {name}: {reason}", flush=True)
    asked = prompts_for([each.policy for each in policies], rows.test, longest, settings)
    generator = torch.Generator().manual_seed(settings.seed)
    limits = torch.randint(shortest, longest + 1, (len(asked),), generator=generator)
    return Trial(asked, limits, rewards, first, reference, settings.evaluate.batch_size, settings.seed)


def prompts_for(policies: Sequence[Policy], rows: Sequence[Row], longest: int, settings: Settings) -> list[Question]:
    """The held-out prompts that every policy has room for, in the tokens of the first."""
    first, room = policies[0], min(room_for_prompts(policy.model, longest) for policy in policies)
    asked = fitting(questions(rows, first.tokenizer, settings.data, settings.seed), room)
    every = zip(*(asked_of(policy, first, asked) for policy in policies), strict=True)
    kept = [all(1 <= len(ids) <= room for ids in each) for each in every]
    if not any(kept):
        raise UserError(
            f"no held-out prompt leaves room for an answer of {longest} tokens in the policies' positions; lower "
            "evaluate.response_length, or data.prompt_tokens."
        )
    if not all(kept):
        left_out = f"{kept.count(False)} of {len(kept)} prompts are"
        print(f"warning: {left_out} empty or too long in another policy's tokens, and are left out", flush=True)
    return [question for question, fits in zip(asked, kept, strict=True) if fits][: settings.evaluate.prompts]


def own_questions(strings: Sequence[str], rows: Sequence[Row], first: Policy) -> list[Question]:
    """The user's own prompts: as turns of a conversation if the data holds conversations, else as they stand."""
    talks = conversational(rows)
    asked: list[Prompt] = [(Turn("user", string),) if talks else string for string in strings]
    ids = encode(first.tokenizer, [written(first.tokenizer, prompt) for prompt in asked])
    return [Question(prompt, row) for prompt, row in zip(asked, ids, strict=True)]


def ask(
    policies: Sequence[Contestant], trial: Trial, own: list[Question], rows: Splits[Row], settings: Settings
) -> tuple[dict[str, Answers], list[dict[str, Any]]]:
    """Every policy's answers, the best of several next to the reference's; and rows of those to the user's own prompts.

    A policy is on the accelerator while it is measured, the first and the reference all the time.
    """
    answers: dict[str, Answers] = {}
    shown: dict[str, Answers] = {}
    n = settings.evaluate.best_of or 0
    device = "cuda" if torch.cuda.is_available() else "cpu"
    known, window = held_out_texts(rows.test, policies, settings.evaluate.held_out_tokens)
    stay = (trial.first.model, trial.reference.policy.model)
    own_trial = dataclasses.replace(trial, questions=own, limits=torch.full((len(own),), int(trial.limits.max())))
    for model in stay:
        model.to(device)
    with progress((len(policies) + n) * len(trial.questions), "evaluate", "prompt") as bar:
        trial = dataclasses.replace(trial, tick=bar.update)
        for each in policies:
            model = each.policy.model.to(device)
            answers[each.name] = measure(each, trial)
            perplexity = None  # a token of another vocabulary is another measure
            if same_vocabulary(each.policy, trial.first):
                perplexity = held_out_perplexity(each.policy, known, window, settings.evaluate.batch_size)
            answers[each.name].figures["held_out_perplexity"] = perplexity
            if own:
                parts = gathered({number: part for number, _, _, part in draw(each, own_trial)})
                replies = [text for part in parts for text in part]
                rewards = {name: reward(own_trial.prompts, replies) for name, reward in trial.rewards.items()}
                shown[each.name] = Answers(replies, rewards, {})
            if n and each is trial.reference:
                answers[f"best of {n}"] = measure(each, trial, n)
            if not any(model is other for other in stay):
                model.to("cpu")
    main, prompts = next(iter(trial.rewards)), own_trial.prompts
    return answers, [sample_row(prompts, shown, main, index) for index in range(len(own))]
