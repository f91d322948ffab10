"""Compare policies on the same prompts: answers, rewards, KL, perplexities, gains, examples."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from rlhf_pipeline.data.records import Preference, Ranking, Row
from rlhf_pipeline.data.tokenization import Question, columns_of, documents
from rlhf_pipeline.evaluation import metrics
from rlhf_pipeline.evaluation.lineup import Sampler, prompt_ids_for, same_vocabulary
from rlhf_pipeline.models.likelihood import log_probs
from rlhf_pipeline.models.networks import positions
from rlhf_pipeline.models.policies import Policy
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.models.sampling import Sampling, make_batch, sample, uniform_draws
from rlhf_pipeline.processes import gather_parts, is_own_part
from rlhf_pipeline.progress import progress

_TEXTS = 16  # held-out rows tokenized at once; few, because one code file may have enough tokens
_WINDOW = 128  # tokens read of a held-out text; a policy trained from scratch may not have learnt later positions
T = TypeVar("T")
Ids = Sequence[list[int]]


class Answers(NamedTuple):
    """One policy's answers to all prompts: texts, scores by reward, figures, and token ids."""

    responses: list[str]
    rewards: dict[str, list[float]]
    figures: dict[str, float | None]
    ids: Ids = ()  # by the policy's own tokenizer


@dataclass(frozen=True)
class Task:
    """The prompts for all policies, and what their answers are measured with."""

    questions: Sequence[Question]  # tokenized by the first policy's tokenizer
    limits: torch.Tensor  # (prompts,): the response length of each prompt, in tokens
    rewards: dict[str, Reward]  # by name, the main one first
    first: Policy  # the policy that measures every answer's perplexity
    reference: Sampler
    batch_size: int
    seed: int
    held_out: Ids = ()  # texts tokenized by the first policy's tokenizer, for the held-out perplexity
    tick: Callable[[int], Any] = lambda _: None  # called with the number of prompts answered since the last call

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts as text, for rewards and people; the same for all policies."""
        ids = [question.ids for question in self.questions]
        return list(self.first.tokenizer.batch_decode(ids, skip_special_tokens=True)) if ids else []

    def score(self, part: slice, answers: Sequence[str]) -> list[list[float]]:
        """Return the scores of each reward for answers to a part of the prompts: (rewards, answers)."""
        columns = {name: column[part] for name, column in self.columns.items()}
        return [reward(self.prompts[part], answers, **columns) for reward in self.rewards.values()]

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The other columns of the prompts' rows."""
        return columns_of(self.questions)


def map_batches(
    count: int, size: int, work: Callable[[slice], T], tick: Callable[[int], Any] = lambda _: None
) -> list[T]:
    """Apply `work` to each batch of `count` rows. Every process does its share, and returns all results."""
    own: dict[int, T] = {}
    for number, start in enumerate(range(0, count, size)):
        if is_own_part(number):
            own[number] = work(slice(start, start + size))
        tick(min(size, count - start))
    return gather_parts(own)


def sample_answers(who: Sampler, task: Task, number: int = 0) -> Answers:
    """Sample a policy's answer to each prompt. Draw `number` uses the same random numbers for every policy."""
    asked = prompt_ids_for(who.policy, task.first, task.questions)
    generator = torch.Generator().manual_seed(task.seed + number)
    uniforms = [uniform_draws(limits, generator) for limits in task.limits.split(task.batch_size)]

    def sampled(part: slice) -> list[tuple[str, list[int], list[float]]]:
        draws = uniforms[part.start // task.batch_size]
        batch = sample(who.policy.model, asked[part], task.limits[part], who.sampling, draws)
        texts = batch.texts(who.policy.tokenizer)[1]
        ids = [row[:n] for row, n in zip(batch.responses.tolist(), batch.response_lengths.tolist(), strict=True)]
        judged = zip(*task.score(part, texts), strict=True)
        return list(zip(texts, ids, map(list, judged), strict=True))

    rows = [row for batch in map_batches(len(asked), task.batch_size, sampled, task.tick) for row in batch]
    rewards = {name: [row[2][at] for row in rows] for at, name in enumerate(task.rewards)}
    return Answers([row[0] for row in rows], rewards, {}, [row[1] for row in rows])


def measure_policy(who: Sampler, task: Task, drawn: Sequence[Answers] = ()) -> Answers:
    """Return a policy's answers, or the best of n `drawn`, with figures. Figures are None if vocabularies differ.

    The KL of the best of n to the policy itself is at most log n - (n - 1) / n (Stiennon et al. 2020, app. G.3).
    """
    reference, size = task.reference, task.batch_size
    tries = drawn or [sample_answers(who, task)]
    n = len(tries)
    best = np.argmax([one.rewards[next(iter(task.rewards))] for one in tries], axis=0)  # (prompts,): the best try
    texts, ids = ([tries[at][part][row] for row, at in enumerate(best)] for part in (0, 3))
    rewards = {name: [tries[at].rewards[name][row] for row, at in enumerate(best)] for name in task.rewards}

    asked = prompt_ids_for(who.policy, task.first, task.questions)
    kl = math.log(n) - (n - 1) / n if n > 1 else None
    if n == 1 and same_vocabulary(who.policy, reference.policy):
        theirs = log_p(reference.policy, reference.sampling, asked, ids, size)
        kl = (log_p(who.policy, who.sampling, asked, ids, size) - theirs) / len(asked)
    figures: dict[str, float | None] = {"kl": kl, "perplexity": None, "held_out_perplexity": None}
    if same_vocabulary(who.policy, task.first):
        figures["perplexity"] = perplexity(task.first, asked, ids, size)
        heads, tails = [text[:1] for text in task.held_out], [text[1:] for text in task.held_out]
        with progress(len(heads), "held-out", "text", delay=1.0, leave=False) as bar:
            figures["held_out_perplexity"] = perplexity(who.policy, heads, tails, size, bar.update)
    figures |= {**metrics.variety(texts), "length": sum(map(len, ids)) / len(ids)}
    return Answers(texts, rewards, figures, ids)


def log_p(
    policy: Policy, sampling: Sampling, prompts: Ids, responses: Ids, batch_size: int,
    tick: Callable[[int], Any] = lambda _: None,
) -> float:  # fmt: skip
    """Return log p of all responses together under a policy's sampling distribution, in nats."""

    def summed(part: slice) -> float:
        batch = make_batch(prompts[part], responses[part]).to(policy.model.device)
        return float(log_probs(policy.model, batch, sampling).sum())

    return sum(map_batches(len(responses), batch_size, summed, tick))


def perplexity(
    policy: Policy, prompts: Ids, responses: Ids, batch_size: int, tick: Callable[[int], Any] = lambda _: None
) -> float | None:
    """Return a policy's perplexity per response token; None if there are no tokens."""
    tokens = sum(map(len, responses))
    return math.exp(-log_p(policy, Sampling(), prompts, responses, batch_size, tick) / tokens) if tokens else None


def held_out_texts(rows: Sequence[Row], policies: Sequence[Sampler], tokens: int) -> list[list[int]]:
    """Return token ids of the starts of held-out texts, about `tokens` in all; [] if the rows are comparisons."""
    window = min(_WINDOW, *(positions(each.policy.model) for each in policies))
    found: list[list[int]] = []
    for start in range(0, 0 if isinstance(rows[0], Preference | Ranking) else len(rows), _TEXTS):
        if sum(map(len, found)) >= tokens:
            break
        found += [ids[:window] for ids in documents(rows[start : start + _TEXTS], policies[0].policy.tokenizer)]
    return sorted((ids for ids in found if len(ids) > 1), key=len)  # sorted by length, for less padding


def figures_by_reward(
    values: Mapping[str, Sequence[float]], reward: Reward, reference: str, bootstrap: int, seed: int
) -> dict[str, Any]:
    """Return the figures of every policy by one reward. `values` has its scores by policy, on the same prompts.

    Gains are paired: every policy over the first one and over the reference. `moved` is the difference of a policy's
    mean from the reference's, in standard deviations of the reference's scores; None if these do not vary.
    """
    scores = {name: np.asarray(own, float) for name, own in values.items()}
    first, start = next(iter(scores)), scores[reference]
    spread = float(start.std(ddof=1)) if len(start) > 1 else 0.0
    pairs = [(after, before) for after in scores for before in dict.fromkeys((first, reference)) if after != before]
    return {
        "reward": reward.name,
        "metrics": {
            name: {
                "reward_mean": float(own.mean()),
                "reward_median": float(np.median(own)),
                "reward_stderr": metrics.standard_error(own),
                "positive": float((own > reward.neutral).mean()),
            }
            for name, own in scores.items()
        },
        "paired_gain": {
            f"{after} - {before}": metrics.paired_gain(scores[before], scores[after], bootstrap, seed)
            for after, before in pairs
            if (after, before) != (first, reference)  # the same pair in reverse
        },
        "moved": {name: float(own.mean() - start.mean()) / spread if spread else None for name, own in scores.items()},
    }


def hacking_warnings(judged: Mapping[str, dict[str, Any]], trained: str, reference: str) -> list[str]:
    """Return a warning for each policy whose `trained` reward rose over the reference while another reward fell.

    Both changes are significant: one 95 % interval is above 0, the other below.
    """

    def amount(reward: str, name: str) -> str:
        move = judged[reward]["moved"][name]
        gain = judged[reward]["paired_gain"][f"{name} - {reference}"]["mean"]
        return f"{abs(gain):.3g}" if move is None else f"{abs(move):.2f} s.d. of {reference}'s answers"

    gains = {key: own["paired_gain"] for key, own in judged.items()}
    return [
        f"{name}: {trained} rose by {amount(trained, name)} while {other} fell by {amount(other, name)}: "
        "possible reward hacking"
        for name in judged[trained]["moved"]
        for other in judged
        if (pair := f"{name} - {reference}") in gains[other]
        and gains[trained][pair]["low"] > 0 > gains[other][pair]["high"]
    ]


def sample_rows(prompts: Sequence[str], answers: Mapping[str, Answers], main: str) -> list[dict[str, Any]]:
    """Return each prompt with every policy's answer and its main reward."""
    return [
        {
            "prompt": prompt,
            "responses": {name: own.responses[at] for name, own in answers.items()},
            "rewards": {name: own.rewards[main][at] for name, own in answers.items()},
        }
        for at, prompt in enumerate(prompts)
    ]


def evaluation_figures(
    answers: Mapping[str, Answers], last: str, reference: str, rewards: Mapping[str, Reward], trained: str,
    prompts: Sequence[str], *, examples: int, bootstrap: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the figures of `evaluation.json` from all answers. The first of `rewards` is the main reward.

    `trained` is the reward that PPO learnt from; `bootstrap` is the number of resamplings of an interval. `examples` of
    each kind are chosen by the main reward of `last` and its change from the first policy; typical: near the median.
    """
    main, *others = rewards
    judged = {
        key: figures_by_reward(
            {name: own.rewards[key] for name, own in answers.items()}, reward, reference, bootstrap, seed
        )
        for key, reward in rewards.items()
    }
    samples = sample_rows(prompts, answers, main)
    after = np.asarray(answers[last].rewards[main])
    change = after - next(iter(answers.values())).rewards[main]
    orders = {
        "typical": np.abs(change - np.median(change)),
        "best": -after,
        "worst": after,
        "most changed": -np.abs(change),
    }
    shown = {kind: [samples[at] for at in order.argsort(kind="stable")[:examples]] for kind, order in orders.items()}
    return {
        "metrics": {name: {**own, **answers[name].figures} for name, own in judged[main]["metrics"].items()},
        "paired_gain": judged[main]["paired_gain"],
        "moved": {key: own["moved"] for key, own in judged.items()},
        "rewards": {key: {part: judged[key][part] for part in ("reward", "metrics", "paired_gain")} for key in others},
        "warnings": hacking_warnings(judged, trained, reference),
        "samples": samples,
        "examples": shown.pop("typical"),
        "extremes": shown,
    }
