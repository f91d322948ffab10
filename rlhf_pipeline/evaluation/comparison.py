"""What policies answer to the same prompts, and what that comes to: rewards, KL, perplexities, gains, examples."""

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch

from rlhf_pipeline.data.records import Preference, Ranking, Row
from rlhf_pipeline.data.templates import written
from rlhf_pipeline.data.tokenization import Question, documents, lesson
from rlhf_pipeline.evaluation import metrics
from rlhf_pipeline.evaluation.lineup import Contestant, asked_of, same_vocabulary
from rlhf_pipeline.launch import processes
from rlhf_pipeline.models.likelihood import log_probs
from rlhf_pipeline.models.networks import positions
from rlhf_pipeline.models.policies import Policy
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.models.sampling import Batch, Sampling, make_batch, sample, uniform_draws
from rlhf_pipeline.processes import gathered, mine

_ROWS = 16  # held-out rows tokenized at once: a file of code may be all that is needed
_WINDOW = 128  # tokens of a held-out text that are read: a policy from scratch may have learnt no later positions
T = TypeVar("T")
Gains = dict[str, dict[str, float]]  # by pair of policies, "ppo - sft"


class Answers(NamedTuple):
    """One policy's answers to all prompts: texts, rewards by reward, what was measured of them, and their tokens."""

    responses: list[str]
    rewards: dict[str, list[float]]
    figures: dict[str, float | None]
    ids: Sequence[list[int]] = ()  # in the policy's own tokens


@dataclass(frozen=True)
class Trial:
    """What all policies are asked, and what their answers are compared with."""

    questions: Sequence[Question]  # in the tokens of the first policy
    limits: torch.Tensor  # (prompts,): tokens of each response
    rewards: dict[str, Reward]  # by name, the main one first
    first: Policy  # the policy under which every answer's perplexity is measured
    reference: Contestant
    batch_size: int
    seed: int
    held_out: Sequence[list[int]] = ()  # texts in the first policy's tokens, for the held-out perplexity
    tick: Callable[[int], Any] = lambda _: None

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts as rewards and people see them, the same for all policies."""
        ids = [question.ids for question in self.questions]
        return list(self.first.tokenizer.batch_decode(ids, skip_special_tokens=True)) if ids else []


def shared_out(count: int, size: int, work: Callable[[slice], T]) -> list[T]:
    """What `work` makes of each batch of `count` rows; every process takes its share, and gets all results."""
    batches = [slice(at, at + size) for at in range(0, count, size)]
    return gathered({number: work(batch) for number, batch in enumerate(batches) if mine(number)})


def draw(who: Contestant, trial: Trial, number: int = 0) -> Answers:
    """A policy's answer to each prompt; draw `number` is from the same random numbers for every policy."""
    asked = asked_of(who.policy, trial.first, trial.questions)
    generator = torch.Generator().manual_seed(trial.seed + number)
    uniforms = [uniform_draws(limits, generator) for limits in trial.limits.split(trial.batch_size)]

    def sampled(part: slice) -> tuple[list[str], list[list[int]], list[list[float]]]:
        limits = trial.limits[part]
        batch = sample(who.policy.model, asked[part], limits, who.sampling, uniforms[part.start // trial.batch_size])
        trial.tick(len(limits) * processes())
        texts = batch.texts(who.policy.tokenizer)[1]
        ids = [row[:n] for row, n in zip(batch.responses.tolist(), batch.response_lengths.tolist(), strict=True)]
        return texts, ids, [reward(trial.prompts[part], texts) for reward in trial.rewards.values()]

    found = shared_out(len(asked), trial.batch_size, sampled)
    texts, ids = [text for batch in found for text in batch[0]], [row for batch in found for row in batch[1]]
    rewards = {name: [x for batch in found for x in batch[2][at]] for at, name in enumerate(trial.rewards)}
    return Answers(texts, rewards, {}, ids)


def best(tries: Sequence[Answers], main: str) -> Answers:
    """Of several answers to each prompt the one with the highest main reward."""
    picks = list(enumerate(np.argmax([one.rewards[main] for one in tries], axis=0)))
    rewards = {name: [tries[which].rewards[name][row] for row, which in picks] for name in tries[0].rewards}
    texts, ids = [tries[which].responses[row] for row, which in picks], [tries[which].ids[row] for row, which in picks]
    return Answers(texts, rewards, {}, ids)


def measure(who: Contestant, trial: Trial, n: int = 1) -> Answers:
    """A policy's answers, or the best of `n`, with their figures; None for what cannot be measured.

    The KL of the best of n to the policy itself is at most log n - (n - 1) / n (Stiennon et al. 2020, app. G.3).
    """
    main, first, reference = next(iter(trial.rewards)), trial.first, trial.reference
    comparable, readable = same_vocabulary(who.policy, reference.policy), same_vocabulary(who.policy, first)
    asked = asked_of(who.policy, first, trial.questions)
    answers = best([draw(who, trial, number) for number in range(1, n + 1)], main) if n > 1 else draw(who, trial)

    def measured(part: slice) -> tuple[float, float, int]:
        batch = make_batch(asked[part], answers.ids[part]).to(who.policy.model.device)
        kl = 0.0
        if comparable and n == 1:
            own = log_probs(who.policy.model, batch, who.sampling)
            kl = float((own - log_probs(reference.policy.model, batch, reference.sampling)).sum())
        ended = who.sampling.ended(batch.last_tokens).tolist()
        read = batch if readable else reread(first, trial.questions[part], answers.responses[part], ended)
        return kl, *(negative_log_likelihood(first, read) if read else (0.0, 0))

    sums = shared_out(len(asked), trial.batch_size, measured)
    kl, nats, tokens = (sum(column) for column in zip(*sums, strict=True))
    figures: dict[str, float | None] = {
        "kl": math.log(n) - (n - 1) / n if n > 1 else kl / len(asked) if comparable else None,
        "perplexity": math.exp(nats / tokens) if tokens else None,
        "held_out_perplexity": perplexity(who.policy, trial.held_out, trial.batch_size) if readable else None,
        **of_texts(answers.responses),
        "length": sum(map(len, answers.ids)) / len(asked),
    }
    return answers._replace(figures=figures)


def negative_log_likelihood(policy: Policy, batch: Batch) -> tuple[float, int]:
    """-log p of a batch's responses under a policy in nats, and how many tokens they have."""
    return -float(log_probs(policy.model, batch, Sampling()).sum()), int(batch.response_lengths.sum())


def perplexity(policy: Policy, texts: Sequence[list[int]], batch_size: int) -> float | None:
    """A policy's perplexity per token on texts in its tokens; None without texts."""
    texts = sorted((ids for ids in texts if len(ids) > 1), key=len)  # of like length, so that little is padding

    def measured(part: slice) -> tuple[float, int]:
        batch = make_batch([ids[:1] for ids in texts[part]], [ids[1:] for ids in texts[part]])
        return negative_log_likelihood(policy, batch.to(policy.model.device))

    sums = shared_out(len(texts), batch_size, measured)
    return math.exp(sum(nats for nats, _ in sums) / sum(tokens for _, tokens in sums)) if sums else None


def of_texts(texts: Sequence[str]) -> dict[str, float | None]:
    """How varied a policy's answers are: distinct n-grams, repeated answers, how alike they are."""
    distinct: dict[str, float | None] = {f"distinct_{n}": metrics.distinct(texts, n) for n in (1, 2, 3)}
    return {**distinct, "repeated": metrics.repeated(texts), "self_bleu": metrics.self_bleu(texts)}


def reread(
    policy: Policy, questions: Sequence[Question], answers: Sequence[str], ended: Sequence[bool]
) -> Batch | None:
    """Answers of a policy with another vocabulary in this one's tokens, as far as its positions go; None if none fits.

    `ended` says which answers ended with a stop token.
    """
    tokenizer, room = policy.tokenizer, positions(policy.model) or sys.maxsize
    prompts, responses = [], []
    for question, answer, end in zip(questions, answers, ended, strict=True):
        ids, learnt = lesson(tokenizer, [(written(tokenizer, question.prompt), False), (answer, True)])
        start = learnt.index(1) if 1 in learnt else len(ids)
        response = [*ids[start:], *[int(tokenizer.eos_token_id)] * end][: max(room - start, 0)]
        if start and response:
            prompts.append(ids[:start])
            responses.append(response)
    return make_batch(prompts, responses).to(policy.model.device) if prompts else None


def held_out_texts(rows: Sequence[Row], policies: Sequence[Contestant], tokens: int) -> list[list[int]]:
    """The beginnings of held-out texts in the first policy's tokens, about `tokens` in all; of comparisons none."""
    window = min(_WINDOW, *(positions(each.policy.model) or _WINDOW for each in policies))
    found: list[list[int]] = []
    for start in range(0, 0 if isinstance(rows[0], Preference | Ranking) else len(rows), _ROWS):
        if sum(map(len, found)) >= tokens:
            break
        found += [ids[:window] for ids in documents(rows[start : start + _ROWS], policies[0].policy.tokenizer)]
    return found


def figures(values: Sequence[float], neutral: float) -> dict[str, float]:
    """Mean, median, standard error and share above `neutral` of a policy's rewards."""
    scores = np.asarray(values, float)
    return {
        "reward_mean": float(scores.mean()),
        "reward_median": float(np.median(scores)),
        "reward_stderr": metrics.standard_error(scores),
        "positive": float((scores > neutral).mean()),
    }


def gains(values: Mapping[str, Sequence[float]], reference: str, draws: int, seed: int) -> Gains:
    """The paired gain of every policy over the first one and over the reference, from rewards of the same prompts."""
    first = next(iter(values))
    pairs = [(after, before) for after in values for before in dict.fromkeys((first, reference)) if after != before]
    return {
        f"{after} - {before}": metrics.paired_gain(values[before], values[after], draws, seed)
        for after, before in pairs
        if (after, before) != (first, reference)  # the same pair, the other way round
    }


def moved(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, float | None]:
    """How far each policy's mean reward is from the reference's, in standard deviations of the reference's answers."""
    there = np.asarray(values[reference], float)
    spread = float(there.std(ddof=1)) if len(there) > 1 else 0.0
    return {name: float(np.mean(own) - there.mean()) / spread if spread else None for name, own in values.items()}


def traded(
    trained: str, reference: str, gained: Mapping[str, Gains], moves: Mapping[str, Mapping[str, float | None]]
) -> list[str]:
    """A warning for each policy that gained of the `trained` reward over the reference and lost of another.

    Both by more than chance: the 95 % intervals are on either side of 0. `gained` and `moves` are by reward.
    """
    lines = []
    for name in moves[trained]:
        over = {reward: own[pair] for reward, own in gained.items() if (pair := f"{name} - {reference}") in own}
        by = {
            reward: f"{abs(gain['mean']):.3g}" if (move := moves[reward][name]) is None
            else f"{abs(move):.2f} s.d. of {reference}'s answers" for reward, gain in over.items()
        }  # fmt: skip
        for other, gain in over.items():
            if over[trained]["low"] > 0 > gain["high"]:
                said = f"{trained} rose by {by[trained]} while {other} fell by {by[other]}"
                lines.append(f"{name}: {said}: possible reward hacking")
    return lines


def sample_rows(prompts: Sequence[str], answers: Mapping[str, Answers], main: str) -> list[dict[str, Any]]:
    """Each prompt with every policy's answer and main reward."""
    return [
        {
            "prompt": prompt,
            "responses": {name: own.responses[at] for name, own in answers.items()},
            "rewards": {name: own.rewards[main][at] for name, own in answers.items()},
        }
        for at, prompt in enumerate(prompts)
    ]


def compare(
    answers: Mapping[str, Answers], last: str, reference: str, rewards: Mapping[str, Reward], trained: str,
    prompts: Sequence[str], *, examples: int, bootstrap: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The figures of `evaluation.json` from all answers; of `rewards` the main one is first.

    `trained` is the reward that PPO learnt from, `bootstrap` the resamplings of an interval. So many `examples` of each
    kind are chosen by how the main reward changed from the first policy to `last`; typical ones changed as the median.
    """
    main, *others = rewards
    values = {key: {name: own.rewards[key] for name, own in answers.items()} for key in rewards}
    by_policy = {
        key: {name: figures(scores, rewards[key].neutral) for name, scores in values[key].items()} for key in rewards
    }
    gained = {key: gains(values[key], reference, bootstrap, seed) for key in rewards}
    moves = {key: moved(values[key], reference) for key in rewards}
    samples = sample_rows(prompts, answers, main)
    first, after = next(iter(values[main].values())), np.asarray(values[main][last])
    change = after - first
    orders = {
        "typical": np.abs(change - np.median(change)),
        "best": -after,
        "worst": after,
        "most changed": -np.abs(change),
    }
    shown = {kind: [samples[at] for at in order.argsort(kind="stable")[:examples]] for kind, order in orders.items()}
    return {
        "metrics": {name: {**own, **answers[name].figures} for name, own in by_policy[main].items()},
        "paired_gain": gained[main],
        "rewards": {
            key: {"reward": rewards[key].name, "metrics": by_policy[key], "paired_gain": gained[key]} for key in others
        },
        "moved": moves,
        "warnings": traded(trained, reference, gained, moves),
        "samples": samples,
        "examples": shown.pop("typical"),
        "extremes": shown,
    }
