"""Before and after: every policy of the run on the same held-out prompts, by the same reward.

python -m rlhf_pipeline stage=evaluate
"""

import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline import metrics
from rlhf_pipeline.atomic import write_json
from rlhf_pipeline.data import fingerprint, load_data, texts
from rlhf_pipeline.encoding import conversational, encode, fitting, prompts
from rlhf_pipeline.errors import NotFinishedError
from rlhf_pipeline.hub import model_folder
from rlhf_pipeline.likelihood import log_probs
from rlhf_pipeline.policies import Policy, load_policy
from rlhf_pipeline.records import Row, Turn
from rlhf_pipeline.rewards import Reward, load_reward, trained_part
from rlhf_pipeline.rundir import RunDir
from rlhf_pipeline.sampling import Batch, Sampling, check_positions, room_for_prompts, sample, uniform_draws
from rlhf_pipeline.settings import Evaluation, Settings
from rlhf_pipeline.stages.common import (
    Clock,
    check_languages,
    judges,
    progress,
    quiet,
    sampling_as,
    say_done,
    say_taken,
)
from rlhf_pipeline.tables import evaluation_table
from rlhf_pipeline.templates import written


class Answers(NamedTuple):
    """What one policy said to all prompts, and what that was worth."""

    responses: list[str]
    rewards: list[float]
    metrics: dict[str, float]


class Judged(NamedTuple):
    """What all policies are asked, how they sample, and what their answers are held against."""

    asked: Sequence[Sequence[int]]
    limits: torch.Tensor  # (prompts,): tokens of each response
    sampling: Sampling
    reward: Reward
    base: Policy
    reference: Policy

    def parts(self, size: int) -> Iterator[tuple[Sequence[Sequence[int]], torch.Tensor]]:
        """Prompts and limits by batches."""
        for start in range(0, len(self.asked), size):
            yield self.asked[start : start + size], self.limits[start : start + size]


def run(settings: Settings, out: RunDir) -> None:
    """Sample from each policy, then reward, KL to the reference, perplexity under the base model, diversity."""
    quiet()
    clock = Clock()
    paths, reference = policies_of(out, settings.policy)
    # Where a reward labels in the place of people, it judges: it is what they would say.
    choice = settings.labelling_reward or settings.reward
    reward, judge = load_reward(choice, out.upstream("reward", reward=trained_part(choice)))
    rows = load_data(settings.data, settings.seed)
    opened = {name: load_policy({**settings.policy, "path": path}, None, texts(rows.train), settings.seed)[0]
              for name, path in paths.items()}  # fmt: skip
    for name, path in paths.items():
        say_taken(name, path)
    say_taken("reward", judge)
    out.begin(settings, {**paths, **judges(reward, judge)}, fingerprint(settings.data, rows))

    base = opened[next(iter(opened))]
    check_languages(reward, base.tokenizer, texts(rows.test))
    asked = prompts(rows.test, base.tokenizer, settings.data, settings.seed)
    own = own_prompts(settings.evaluate.show, rows.test, base.tokenizer)
    sampling, longest, shortest = sampling_of(out, settings.evaluate, base)
    room = min(room_for_prompts(policy.model, longest) for policy in opened.values())
    asked = fitting(asked, room)[: settings.evaluate.prompts]
    limits = response_limits(shortest, longest, len(asked), settings.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for policy in opened.values():
        check_positions(policy.model, asked + own, int(limits.max()))
        policy.model.to(device)
    judged = Judged(asked, limits, sampling, reward, base, opened[reference])
    shown = judged._replace(asked=own, limits=torch.full((len(own),), int(limits.max())))
    answers, own_answers = ask(opened, reference, judged, shown, settings)
    said = [base.tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in (asked, own)]
    last = list(opened)[-1]
    # From the first policy to the last, and from PPO's reference to PPO, where they are two.
    pairs = {f"{last} - {name}": name for name in (next(iter(opened)), reference) if name != last}
    gains = {
        pair: metrics.paired_gain(
            answers[before].rewards, answers[last].rewards, settings.evaluate.bootstrap, settings.seed
        )
        for pair, before in pairs.items()
    }
    evaluation = {
        "prompts": len(asked),
        "reward": judge,
        "reference": reference,
        "sampling": dataclasses.asdict(sampling),
        "metrics": {name: answer.metrics for name, answer in answers.items()},
        "paired_gain": gains,
        "samples": [sample_row(said[0], answers, index) for index in range(len(asked))],
        "examples": typical(said[0], answers, last, settings.evaluate.examples),
        "shown": [sample_row(said[1], own_answers, index) for index in range(len(own))],
    }
    write_json(out.path / "evaluation.json", evaluation)
    after = answers[last].metrics
    results = {"reward_mean": after["reward_mean"], "kl": after["kl"]}
    if gains:
        gain = next(iter(gains.values()))
        results |= {"gain": gain["mean"], "gain_low": gain["low"], "gain_high": gain["high"]}
    out.finish(results, objective=after["reward_mean"])
    evaluation_table(evaluation)
    say_done(out, f"{len(opened)} policies on {len(asked)} held-out prompts", clock)


def ask(
    policies: dict[str, Policy], reference: str, judged: Judged, shown: Judged, settings: Settings
) -> tuple[dict[str, Answers], dict[str, Answers]]:
    """Every policy's answers to the held-out prompts, the best of several beside the reference's, and to one's own."""
    answers: dict[str, Answers] = {}
    own: dict[str, Answers] = {}
    n = settings.evaluate.best_of
    with progress((len(policies) + (n or 0)) * len(judged.asked), "evaluate") as bar:
        for name, policy in policies.items():
            answers[name] = measure(policy, judged, settings, bar.update)
            if shown.asked:
                own[name] = measure(policy, shown, settings, lambda _: None)
            if n and name == reference:
                answers[f"best of {n}"] = best_of(policy, n, judged, settings, bar.update)
    return answers, own


def own_prompts(strings: Sequence[str], rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Token ids of the user's own prompts: turns of a conversation where the data holds such, else as they stand."""
    talks = conversational(rows)
    return encode(tokenizer, [written(tokenizer, (Turn("user", s),) if talks else s) for s in strings])


def policies_of(out: RunDir, policy: dict[str, Any]) -> tuple[dict[str, str], str]:
    """The run's policies from first to last by name, and the name of PPO's reference."""
    trained = {"base": "pretrain", "sft": "sft", "ppo": "ppo"}
    if policy.get("path"):  # chosen by hand: it stands for what came before PPO
        trained = {"ppo": "ppo"}
    paths = {name: str(found) for name, stage in trained.items() if (found := out.upstream(stage, policy=policy))}
    if policy.get("path"):
        paths = {"base": model_folder(policy["path"]), **paths}
    if not paths:
        raise NotFinishedError(
            f"{out.runs / out.name} has no policy to evaluate; 'make ppo NAME={out.name}' makes one."
        )
    ppo = out.upstream("ppo", policy=policy)
    record = json.loads((ppo.parent / "run.json").read_text(encoding="utf-8")) if ppo else {}
    parent = record["parents"]["policy"]["path"] if record else None
    if parent and parent not in paths.values() and not parent.endswith(", untrained"):
        paths = {"base": parent, **{name: path for name, path in paths.items() if name == "ppo"}}
    reference = next((name for name, path in paths.items() if path == parent), list(paths)[-1 if not ppo else 0])
    return paths, reference


def sampling_of(out: RunDir, asked: Evaluation, policy: Policy) -> tuple[Sampling, int, int]:
    """How to sample: as the run's PPO did, but for what `evaluate.*` sets; and the longest and shortest limit."""
    ppo = out.upstream("ppo")
    config = yaml.safe_load((ppo.parent / "config.yaml").read_text(encoding="utf-8"))["trainer"] if ppo else {}
    return sampling_as(config, policy, response_length=asked.response_length, temperature=asked.temperature)


def response_limits(shortest: int, longest: int, count: int, seed: int) -> torch.Tensor:
    """(count,): how many tokens each response may have."""
    return torch.randint(shortest, longest + 1, (count,), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def measure(policy: Policy, judged: Judged, settings: Settings, tick: Any) -> Answers:
    """One policy's answers to all prompts. Every policy draws with the same random numbers."""
    for each in (policy, judged.reference, judged.base):
        each.model.eval()
    generator = torch.Generator().manual_seed(settings.seed)
    responses: list[str] = []
    rewards: list[float] = []
    kl = surprise = length = 0.0
    for asked, limits in judged.parts(settings.evaluate.batch_size):
        batch = sample(policy.model, asked, limits, judged.sampling, uniform_draws(limits, generator))
        said, answered = batch.texts(policy.tokenizer)
        rewards += judged.reward(said, answered)
        responses += answered
        mine = log_probs(policy.model, batch, judged.sampling)
        kl += float((mine - log_probs(judged.reference.model, batch, judged.sampling)).sum())
        surprise -= float(_plain_log_probs(judged.base, batch).sum())
        length += float(batch.response_lengths.sum())
        tick(len(answered))
    return summary(responses, rewards, judged.reward, kl / len(rewards), surprise, length)


@torch.no_grad()
def best_of(policy: Policy, n: int, judged: Judged, settings: Settings, tick: Any) -> Answers:
    """Of several answers of one policy to each prompt the one with the highest reward: what no training has to bring.

    Its KL to the policy is at most log n - (n - 1) / n, whatever the policy (Stiennon et al. 2020, app. G.3).
    """
    generator = torch.Generator().manual_seed(settings.seed + 1)
    responses: list[str] = []
    rewards: list[float] = []
    surprise = length = 0.0
    for asked, limits in judged.parts(settings.evaluate.batch_size):
        tries = []
        for _ in range(n):
            batch = sample(policy.model, asked, limits, judged.sampling, uniform_draws(limits, generator))
            said, answered = batch.texts(policy.tokenizer)
            tries.append((judged.reward(said, answered), answered, batch))
            tick(len(answered))
        scores = np.array([scores for scores, _, _ in tries])
        chosen = scores.argmax(0)
        rewards += scores.max(0).tolist()
        responses += [tries[which][1][row] for row, which in enumerate(chosen)]
        for which, (_, _, batch) in enumerate(tries):
            rows = torch.from_numpy(np.flatnonzero(chosen == which)).to(batch.tokens.device)
            if len(rows):
                part = batch.rows(rows)
                surprise -= float(_plain_log_probs(judged.base, part).sum())
                length += float(part.response_lengths.sum())
    return summary(responses, rewards, judged.reward, math.log(n) - (n - 1) / n, surprise, length)


def summary(
    responses: list[str], rewards: list[float], reward: Reward, kl: float, surprise: float, length: float
) -> Answers:
    """Answers and rewards with the figures of the table; `surprise` and `length` are totals over all answers."""
    values = np.array(rewards)
    found = metrics.Distinct().compute(predictions=responses, references=responses, n=2)
    return Answers(
        responses,
        rewards,
        {
            "reward_mean": float(values.mean()),
            "reward_median": float(np.median(values)),
            "reward_stderr": float(values.std(ddof=1) / math.sqrt(len(values))) if len(values) > 1 else 0.0,
            "positive": float((values > reward.neutral).mean()),
            "kl": kl,
            "perplexity": math.exp(surprise / length),
            "distinct_2": found["distinct_2"],
            "length": length / len(values),
        },
    )


def _plain_log_probs(base: Policy, batch: Batch) -> torch.Tensor:
    """The base model's own surprise at the answers, whatever distribution they were drawn from."""
    return log_probs(base.model, batch, Sampling())


def sample_row(seen: Sequence[str], answers: dict[str, Answers], index: int) -> dict[str, Any]:
    """One prompt with every policy's answer and reward."""
    return {
        "prompt": seen[index],
        "responses": {name: answer.responses[index] for name, answer in answers.items()},
        "rewards": {name: answer.rewards[index] for name, answer in answers.items()},
    }


def typical(seen: Sequence[str], answers: dict[str, Answers], last: str, count: int) -> list[dict[str, Any]]:
    """Prompts whose reward changed, from the first policy to the last, as the median did: typical, not the best."""
    gain = np.array(answers[last].rewards) - np.array(next(iter(answers.values())).rewards)
    near = np.argsort(np.abs(gain - np.median(gain)), kind="stable")[:count]
    return [sample_row(seen, answers, int(index)) for index in near]
