"""Before and after: every policy of the run on the same held-out prompts, by the same rewards.

python -m rlhf_pipeline stage=evaluate
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch

from rlhf_pipeline.atomic import write_json
from rlhf_pipeline.data import Splits, begun_by, fingerprint, texts
from rlhf_pipeline.data.records import Prompt, Row, Turn
from rlhf_pipeline.data.templates import written
from rlhf_pipeline.data.tokenization import Question, conversational, encode, fitting, questions
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.made import run_of
from rlhf_pipeline.policies import Policy
from rlhf_pipeline.processes import gathered
from rlhf_pipeline.progress import progress
from rlhf_pipeline.rewards import Reward, load_reward, trained_part
from rlhf_pipeline.rundir import RunDir
from rlhf_pipeline.sampling import check_positions, room_for_prompts
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages.answers import Answers, Trial, draw, held_out_perplexity, held_out_texts, measure
from rlhf_pipeline.stages.common import check_languages, judges, quiet, say_taken, take_data
from rlhf_pipeline.stages.contestants import Contestant, asked_of, lineup, open_all, same_place, same_vocabulary
from rlhf_pipeline.stages.standings import sample_row, standing
from rlhf_pipeline.tables import evaluation_table


def run(settings: Settings, out: RunDir) -> None:
    """Sample from each policy, then rewards, KL to the reference, perplexity, and what the texts are like."""
    quiet()
    paths, reference = lineup(out, settings)
    rewards = load_rewards(settings, out)
    main = next(iter(rewards))
    rows = take_data(settings.data, settings.seed)
    policies, longest, shortest = open_all(paths, out, settings)
    for name, path in paths.items():
        say_taken(name, path)
    roles = ["reward", *(f"evaluate.rewards[{number}]" for number in range(len(rewards) - 1))]
    lineage: dict[str, str] = {}
    for role, reward in zip(roles, rewards.values(), strict=True):
        say_taken(role.partition(".")[2] or role, reward.name)
        lineage |= judges(reward, reward.name, role)
    out.begin(settings, {**paths, **lineage}, fingerprint(settings.data, rows))

    first = policies[0].policy
    check_languages(rewards[main], first.tokenizer, texts(rows.test))
    for name, reward in [*rewards.items()][1:]:
        if reason := reward.unfit(texts(rows.test)):
            print(f"warning: {name}: {reason}", flush=True)
    asked = prompts_for(policies, rows.test, longest, settings)
    limits = response_limits(shortest, longest, len(asked), settings.seed)
    own = own_questions(settings.evaluate.show, rows.test, first)
    for each in policies:
        check_positions(each.policy.model, asked_of(each.policy, first, [*asked, *own]), int(limits.max()))
    start = next(each for each in policies if each.name == reference)
    trial = Trial(asked, limits, rewards, first, start, settings.evaluate.batch_size, settings.seed)
    answers, shown = ask(policies, trial, own, rows, settings)
    speed = trial.speed.figures()
    if not out.leads:
        return

    judged = {name: (reward.name, reward.neutral) for name, reward in rewards.items()}
    last, trained = policies[-1].name, learnt_from(list(paths.values()), rewards)
    evaluation = {
        "prompts": len(asked),
        "prompts_in_training": begun_by([question.prompt for question in asked], rows.train),
        "reward": rewards[main].name,
        "reference": reference,
        "sampling": dataclasses.asdict(policies[0].sampling),
        **standing(answers, last, reference, judged, trained, trial.prompts, settings.evaluate, settings.seed),
        "shown": shown,
    }
    write_json(out.path / "evaluation.json", evaluation)
    after = evaluation["metrics"][last]
    results = {"reward_mean": after["reward_mean"], "kl": after["kl"]}
    if gain := evaluation["paired_gain"].get(f"{last} - {policies[0].name}"):
        results |= {"gain": gain["mean"], "gain_low": gain["low"], "gain_high": gain["high"]}
    out.trackers.evaluation(out.config(), evaluation)
    out.finish({**results, "speed": speed}, objective=after["reward_mean"])
    evaluation_table(evaluation)


def load_rewards(settings: Settings, out: RunDir) -> dict[str, Reward]:
    """The reward that judges and those beside it, by name, and by its fields where that is not enough.

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


def learnt_from(paths: Sequence[str], rewards: dict[str, Reward]) -> str:
    """The reward that the newest of PPO's policies learnt from, where it is one of these; else the main one."""
    homes = [home for path in reversed(paths) if (home := run_of(path)) and home.stage == "ppo"]
    where = homes[0].record["parents"].get("reward", {}).get("path") if homes else None
    return next((name for name, reward in rewards.items() if same_place(reward.name, str(where))), next(iter(rewards)))


def prompts_for(
    policies: Sequence[Contestant], rows: Sequence[Row], longest: int, settings: Settings
) -> list[Question]:
    """The held-out prompts that every policy has room for, in the tokens of the first."""
    first, every = policies[0].policy, [each.policy for each in policies]
    room = min(room_for_prompts(policy.model, longest) for policy in every)
    asked = fitting(questions(rows, first.tokenizer, settings.data, settings.seed), room)
    kept = [all(1 <= len(ids) <= room for ids in each)
            for each in zip(*(asked_of(policy, first, asked) for policy in every), strict=True)]  # fmt: skip
    if not any(kept):
        raise UserError(
            f"no held-out prompt leaves room for an answer of {longest} tokens in the policies' positions; lower "
            "evaluate.response_length, or data.prompt_tokens."
        )
    if not all(kept):
        left_out = f"{kept.count(False)} of {len(kept)} prompts are"
        print(f"warning: {left_out} nothing or too long in another policy's tokens, and are left out", flush=True)
    return [question for question, fits in zip(asked, kept, strict=True) if fits][: settings.evaluate.prompts]


def own_questions(strings: Sequence[str], rows: Sequence[Row], first: Policy) -> list[Question]:
    """The user's own prompts: turns of a conversation where the data holds such, else as they stand."""
    talks = conversational(rows)
    asked: list[Prompt] = [(Turn("user", string),) if talks else string for string in strings]
    ids = encode(first.tokenizer, [written(first.tokenizer, prompt) for prompt in asked])
    return [Question(prompt, row) for prompt, row in zip(asked, ids, strict=True)]


def response_limits(shortest: int, longest: int, count: int, seed: int) -> torch.Tensor:
    """(count,): how many tokens each response may have."""
    return torch.randint(shortest, longest + 1, (count,), generator=torch.Generator().manual_seed(seed))


def ask(
    policies: Sequence[Contestant], trial: Trial, own: list[Question], rows: Splits[Row], settings: Settings
) -> tuple[dict[str, Answers], list[dict[str, Any]]]:
    """Every policy's answers, the best of several beside the reference's; and rows of those to the user's own prompts.

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
                own_said = gathered({number: part for number, _, _, part in draw(each, own_trial)})
                said = [text for part in own_said for text in part]
                rewards = {name: reward(own_trial.prompts, said) for name, reward in trial.rewards.items()}
                shown[each.name] = Answers(said, rewards, {})
            if n and each is trial.reference:
                answers[f"best of {n}"] = measure(each, trial, n)
            if not any(model is other for other in stay):
                model.to("cpu")
    main, prompts = next(iter(trial.rewards)), own_trial.prompts
    return answers, [sample_row(prompts, shown, main, index) for index in range(len(own))]
