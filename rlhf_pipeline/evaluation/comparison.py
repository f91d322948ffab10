"""What policies answer to the same prompts, and what that comes to: rewards, KL, perplexities, gains, examples."""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf_pipeline.data.records import Preference, Ranking, Row
from rlhf_pipeline.data.templates import written
from rlhf_pipeline.data.tokenization import Question, documents, lesson
from rlhf_pipeline.evaluation import metrics
from rlhf_pipeline.evaluation.lineup import Contestant, asked_of, same_vocabulary
from rlhf_pipeline.models.likelihood import log_probs
from rlhf_pipeline.models.networks import positions
from rlhf_pipeline.models.policies import Policy
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.models.sampling import Batch, Sampling, join, make_batch, sample, uniform_draws
from rlhf_pipeline.processes import gathered, mine, rank

_ROWS = 16  # held-out rows tokenized at once: a file of code may be all that is needed
Gains = dict[str, dict[str, float]]  # by pair of policies, "ppo - sft"


class Answers(NamedTuple):
    """One policy's answers to all prompts, their rewards by reward, and the figures of the texts."""

    responses: list[str]
    rewards: dict[str, list[float]]
    figures: dict[str, float | None]


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
    tick: Callable[[int], Any] = lambda _: None
    drawn: list[tuple[float, int, int]] = field(default_factory=list)  # seconds, tokens and prompts of each batch

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts as rewards and people see them, the same for all policies."""
        ids = [question.ids for question in self.questions]
        return list(self.first.tokenizer.batch_decode(ids, skip_special_tokens=True)) if ids else []

    @property
    def parts(self) -> list[slice]:
        """The batches."""
        return [slice(at, at + self.batch_size) for at in range(0, len(self.questions), self.batch_size)]

    def speed(self) -> dict[str, float]:
        """How fast answers were drawn, by all processes together."""
        every = gathered({rank(): [sum(column) for column in zip((0.0, 0, 0), *self.drawn, strict=True)]})
        seconds = max(*(own[0] for own in every), 1e-9)
        tokens, prompts = (sum(own[place] for own in every) / seconds for place in (1, 2))
        return {"tokens_per_second": round(tokens, 1), "prompts_per_second": round(prompts, 1)}


def draw(who: Contestant, trial: Trial, n: int = 1) -> Iterator[tuple[int, slice, Batch, list[str]]]:
    """A policy's answers to all prompts by batches: number, place, tokens and texts.

    Of `n` answers to a prompt the main reward's best is kept. Every policy draws with the same random numbers, the
    best of n with others. Batches are shared out among processes, and drawn as a single process would.
    """
    device = next(who.policy.model.parameters()).device
    generator = torch.Generator().manual_seed(trial.seed + (n > 1))
    asked, prompts = asked_of(who.policy, trial.first, trial.questions), trial.prompts
    main = next(iter(trial.rewards.values()))
    for number, part in enumerate(trial.parts):
        tries, limits = [], trial.limits[part]
        for draws in [uniform_draws(limits, generator) for _ in range(n)]:
            if mine(number):
                start = time.monotonic()
                batch = sample(who.policy.model, asked[part], limits, who.sampling, draws)
                trial.drawn.append((time.monotonic() - start, int(batch.response_lengths.sum()), len(limits)))
                tries.append(batch)
            trial.tick(len(limits))
        if not tries:
            continue
        texts = [batch.texts(who.policy.tokenizer)[1] for batch in tries]
        if n == 1:
            yield number, part, tries[0], texts[0]
            continue
        best = np.array([main(prompts[part], answers) for answers in texts]).argmax(0)
        rows = torch.from_numpy(best * len(limits) + np.arange(len(limits))).to(device)
        yield number, part, join(tries).rows(rows), [texts[which][row] for row, which in enumerate(best)]


@torch.no_grad()
def measure(who: Contestant, trial: Trial, n: int = 1) -> Answers:
    """A policy's answers with all that is measured of them; None where something cannot be measured.

    The KL of the best of n to the policy itself is at most log n - (n - 1) / n (Stiennon et al. 2020, app. G.3).
    """
    for model in (who.policy.model, trial.reference.policy.model, trial.first.model):
        model.eval()
    comparable = same_vocabulary(who.policy, trial.reference.policy)
    readable = same_vocabulary(who.policy, trial.first)
    own: dict[int, tuple[list[str], dict[str, list[float]], tuple[float, ...]]] = {}
    for number, part, batch, answers in draw(who, trial, n):
        kl, surprise, tokens = 0.0, 0.0, 0
        if comparable and n == 1:
            theirs = log_probs(trial.reference.policy.model, batch, trial.reference.sampling)
            kl = float((log_probs(who.policy.model, batch, who.sampling) - theirs).sum())
        read: Batch | None = batch
        if not readable:
            read = reread(trial.first, trial.questions[part], answers, who.sampling.ended(batch.last_tokens).tolist())
        if read is not None:
            surprise = -float(log_probs(trial.first.model, read, Sampling()).sum())
            tokens = int(read.response_lengths.sum())
        rewards = {name: reward(trial.prompts[part], answers) for name, reward in trial.rewards.items()}
        own[number] = answers, rewards, (kl, surprise, tokens, int(batch.response_lengths.sum()))
    every = gathered(own)
    texts = [text for answers, _, _ in every for text in answers]
    rewards = {name: [value for _, found, _ in every for value in found[name]] for name in trial.rewards}
    kl, surprise, tokens, length = (sum(column) for column in zip(*(sums for _, _, sums in every), strict=True))
    figures = {
        "kl": math.log(n) - (n - 1) / n if n > 1 else kl / len(texts) if comparable else None,
        "perplexity": math.exp(surprise / tokens) if tokens else None,
        **of_texts(texts),
        "length": length / len(texts),
    }
    return Answers(texts, rewards, figures)


def of_texts(texts: list[str]) -> dict[str, float | None]:
    """How varied a policy's answers are: distinct n-grams, repeated answers, how alike they are."""
    distinct: dict[str, float | None] = {f"distinct_{n}": metrics.distinct(texts, n) for n in (1, 2, 3)}
    return {**distinct, "repeated": metrics.repeated(texts), "self_bleu": metrics.self_bleu(texts)}


def reread(
    policy: Policy, questions: Sequence[Question], answers: Sequence[str], ended: Sequence[bool]
) -> Batch | None:
    """Answers of a policy with another vocabulary in the tokens of this one, up to its positions; None if none is left.

    `ended` says which answers ended with a stop token.
    """
    tokenizer = policy.tokenizer
    places = positions(policy.model)
    prompts, responses = [], []
    for question, answer, end in zip(questions, answers, ended, strict=True):
        ids = lesson(tokenizer, [(written(tokenizer, question.prompt), False), (answer, True)]) if answer else None
        asked = [*ids.ids[: ids.learnt.index(1)]] if ids and 1 in ids.learnt else question.ids
        said = (ids.ids[len(asked) :] if ids else []) + [int(tokenizer.eos_token_id)] * end
        room = len(said) if places is None else places - len(asked)
        if asked and said[: max(room, 0)]:
            prompts.append(asked)
            responses.append(said[:room])
    return make_batch(prompts, responses).to(policy.model.device) if prompts else None


def held_out_texts(rows: Sequence[Row], policies: Sequence[Contestant], tokens: int) -> tuple[list[Row], int]:
    """The first held-out rows with `tokens` tokens of the first policy in all, and how many tokens of each are read.

    As many as every policy has positions that texts of its pretraining reached. Comparisons of answers are not texts,
    so of those there are none.
    """
    places = [positions(each.policy.model) or 1024 for each in policies]
    window = min(1024, *places, *(each.taught for each in policies if each.taught))
    found: list[Row] = []
    if not rows or isinstance(rows[0], Preference | Ranking):
        return found, window
    for start in range(0, len(rows), _ROWS):
        for row, ids in zip(
            part := rows[start : start + _ROWS], documents(part, policies[0].policy.tokenizer), strict=True
        ):
            if tokens <= 0:
                return found, window
            found.append(row)
            tokens -= min(len(ids), window)
    return found, window


@torch.no_grad()
def held_out_perplexity(policy: Policy, rows: Sequence[Row], window: int, batch_size: int) -> float | None:
    """A policy's perplexity per token of its own on texts, each up to `window` tokens; None without texts."""
    ids = [row[:window] for row in documents(rows, policy.tokenizer)] if rows else []
    ids = sorted((row for row in ids if len(row) > 1), key=len)  # of like length, so that little is padding
    own: dict[int, tuple[float, int]] = {}
    for number, start in enumerate(range(0, len(ids), batch_size)):
        if mine(number):
            part = ids[start : start + batch_size]
            batch = make_batch([row[:1] for row in part], [row[1:] for row in part]).to(policy.model.device)
            surprise = -float(log_probs(policy.model, batch, Sampling()).sum())
            own[number] = surprise, int(batch.response_lengths.sum())
    every = gathered(own)
    tokens = sum(count for _, count in every)
    return math.exp(sum(surprise for surprise, _ in every) / tokens) if tokens else None


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
    """The paired gain of every policy over the first one and over the reference, always of the later over the earlier.

    `values` are rewards of the same prompts by policy.
    """
    names = list(values)
    pairs = [
        (after, before)
        for after in names
        for before in dict.fromkeys((names[0], reference))
        if after != before and not (before == reference and after == names[0])
    ]
    return {
        f"{after} - {before}": metrics.paired_gain(values[before], values[after], draws, seed)
        for after, before in pairs
    }


def moved(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, float | None]:
    """How far each policy's mean reward is from the reference's, in standard deviations of the reference's answers."""
    there = np.asarray(values[reference], float)
    spread = float(there.std(ddof=1)) if len(there) > 1 else 0.0
    return {name: float(np.mean(own) - there.mean()) / spread if spread else None for name, own in values.items()}


def traded(
    trained: str, reference: str, gained: Mapping[str, Gains], moves: Mapping[str, Mapping[str, float | None]]
) -> list[str]:
    """A warning for each policy after the reference that gained of the `trained` reward and lost of another.

    Both by more than chance: the 95 % intervals are on either side of 0. `gained` and `moves` are by reward.
    """
    lines = []
    names = list(moves[trained])
    for name in names[names.index(reference) + 1 :]:
        pair = f"{name} - {reference}"
        if pair not in gained[trained] or gained[trained][pair]["low"] <= 0:
            continue
        for other, theirs in gained.items():
            if other != trained and theirs[pair]["high"] < 0:
                up, down = (_amount(moves[key][name], gained[key][pair]["mean"], reference) for key in (trained, other))
                lines.append(f"{name}: {trained} rose by {up} while {other} fell by {down}: possible reward hacking")
    return lines


def _amount(move: float | None, mean: float, reference: str) -> str:
    return f"{abs(mean):.3g}" if move is None else f"{abs(move):.2f} s.d. of {reference}'s answers"


def sample_row(prompts: Sequence[str], answers: Mapping[str, Answers], main: str, index: int) -> dict[str, Any]:
    """One prompt with every policy's answer and main reward."""
    return {
        "prompt": prompts[index],
        "responses": {name: answer.responses[index] for name, answer in answers.items()},
        "rewards": {name: answer.rewards[main][index] for name, answer in answers.items()},
    }


def chosen(first: Sequence[float], last: Sequence[float], count: int) -> dict[str, list[int]]:
    """Which prompts are shown: `count` of each kind, by the first and the last policy's rewards.

    Typical are those whose reward changed as the median did; best and worst are by the last policy's reward.
    """
    after = np.asarray(last, float)
    change = after - np.asarray(first, float)
    orders = {
        "typical": np.abs(change - np.median(change)),
        "best": -after,
        "worst": after,
        "most changed": -np.abs(change),
    }
    return {kind: np.argsort(order, kind="stable")[:count].tolist() for kind, order in orders.items()}


def compare(
    answers: Mapping[str, Answers], last: str, reference: str, rewards: Mapping[str, Reward], trained: str,
    prompts: Sequence[str], *, examples: int, bootstrap: int, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The figures of `evaluation.json` from all answers; of `rewards` the main one is first.

    `last` is the policy that examples are chosen by, `trained` the reward that PPO learnt from, `examples` their
    number, and `bootstrap` the resamplings of an interval.
    """
    main, *others = rewards
    values = {key: {name: answer.rewards[key] for name, answer in answers.items()} for key in rewards}
    by_policy = {
        key: {name: figures(scores, rewards[key].neutral) for name, scores in values[key].items()} for key in rewards
    }
    gained = {key: gains(values[key], reference, bootstrap, seed) for key in rewards}
    moves = {key: moved(values[key], reference) for key in rewards}
    first = next(iter(answers))
    shown = {
        kind: [sample_row(prompts, answers, main, index) for index in indices]
        for kind, indices in chosen(values[main][first], values[main][last], examples).items()
    }
    return {
        "metrics": {name: {**by_policy[main][name], **answer.figures} for name, answer in answers.items()},
        "paired_gain": gained[main],
        "rewards": {
            key: {"reward": rewards[key].name, "metrics": by_policy[key], "paired_gain": gained[key]} for key in others
        },
        "moved": moves,
        "warnings": traded(trained, reference, gained, moves),
        "samples": [sample_row(prompts, answers, main, index) for index in range(len(prompts))],
        "examples": shown.pop("typical"),
        "extremes": shown,
    }
