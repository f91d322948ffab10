"""What each policy of stage=evaluate says to the same prompts, and how likely that and held-out texts are."""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch

from rlhf_pipeline import metrics
from rlhf_pipeline.data.records import Preference, Ranking, Row
from rlhf_pipeline.data.templates import written
from rlhf_pipeline.data.tokenization import Question, documents, lesson
from rlhf_pipeline.launch import rank
from rlhf_pipeline.likelihood import log_probs
from rlhf_pipeline.networks import positions
from rlhf_pipeline.policies import Policy
from rlhf_pipeline.processes import gathered, mine
from rlhf_pipeline.rewards import Reward
from rlhf_pipeline.sampling import Batch, Sampling, join, make_batch, sample, uniform_draws
from rlhf_pipeline.stages.contestants import Contestant, asked_of, same_vocabulary

_ROWS = 16  # held-out rows tokenized at once: a file of code may be all that is needed


class Answers(NamedTuple):
    """What one policy said to all prompts, what that was worth to each reward, and the figures of the text."""

    responses: list[str]
    rewards: dict[str, list[float]]
    figures: dict[str, float | None]


@dataclass
class Speed:
    """How fast answers were drawn, all policies together."""

    seconds: float = 0.0
    tokens: int = 0
    prompts: int = 0

    def add(self, seconds: float, batch: Batch) -> None:
        """Count one batch."""
        self.seconds += seconds
        self.tokens += int(batch.response_lengths.sum())
        self.prompts += len(batch.response_lengths)

    def figures(self) -> dict[str, float]:
        """By the second, of all processes together."""
        every = gathered({rank(): self})
        seconds = max(one.seconds for one in every)
        per_second = {"tokens_per_second": "tokens", "prompts_per_second": "prompts"}
        return {name: round(sum(getattr(one, count) for one in every) / max(seconds, 1e-9), 1)
                for name, count in per_second.items()}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """What all policies are asked, and what their answers are held against."""

    questions: Sequence[Question]  # in the tokens of the first policy
    limits: torch.Tensor  # (prompts,): tokens of each response
    rewards: dict[str, Reward]  # by name, the main one first
    first: Policy  # under which the answers are more or less surprising
    reference: Contestant
    batch_size: int
    seed: int
    tick: Callable[[int], Any] = lambda _: None
    speed: Speed = field(default_factory=Speed)

    @cached_property
    def prompts(self) -> list[str]:
        """The prompts as rewards and people see them, the same for all policies."""
        ids = [question.ids for question in self.questions]
        return list(self.first.tokenizer.batch_decode(ids, skip_special_tokens=True)) if ids else []

    @property
    def parts(self) -> list[slice]:
        """The batches."""
        return [slice(at, at + self.batch_size) for at in range(0, len(self.questions), self.batch_size)]


def draw(who: Contestant, trial: Trial, n: int = 1) -> Iterator[tuple[int, slice, Batch, list[str]]]:
    """By batches, a policy's answers to all prompts, of `n` to each the one that the main reward values most.

    Every policy draws with the same random numbers, the best of several with others. Of several processes each has
    some of the batches, which are told by their numbers, and draws in them what one alone would.
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
                tries.append(sample(who.policy.model, asked[part], limits, who.sampling, draws))
                trial.speed.add(time.monotonic() - start, tries[-1])
            trial.tick(len(limits))
        if not tries:
            continue
        said = [batch.texts(who.policy.tokenizer)[1] for batch in tries]
        if n == 1:
            yield number, part, tries[0], said[0]
            continue
        chosen = np.array([main(prompts[part], answers) for answers in said]).argmax(0)
        rows = torch.from_numpy(chosen * len(limits) + np.arange(len(limits))).to(device)
        yield number, part, join(tries).rows(rows), [said[which][row] for row, which in enumerate(chosen)]


class Measured(NamedTuple):
    """A batch of answers, and what sums over it come to."""

    responses: list[str]
    rewards: dict[str, list[float]]
    length: int
    kl: float = 0.0
    surprise: float = 0.0
    tokens: int = 0  # that were read to be surprised


@torch.no_grad()
def measure(who: Contestant, trial: Trial, n: int = 1) -> Answers:
    """A policy's answers with all that is measured of them; what cannot be is None.

    The KL of the best of several to the policy itself is at most log n - (n - 1) / n (Stiennon et al. 2020, app. G.3).
    """
    for model in (who.policy.model, trial.reference.policy.model, trial.first.model):
        model.eval()
    comparable = same_vocabulary(who.policy, trial.reference.policy)
    readable = same_vocabulary(who.policy, trial.first)
    prompts, own = trial.prompts, dict[int, Measured]()
    for number, part, batch, answers in draw(who, trial, n):
        kl, surprise, tokens = 0.0, 0.0, 0
        if comparable and n == 1:
            theirs = log_probs(trial.reference.policy.model, batch, trial.reference.sampling)
            kl = float((log_probs(who.policy.model, batch, who.sampling) - theirs).sum())
        read = batch if readable else reread(trial.first, trial.questions[part], answers, _stopped(batch, who.sampling))
        if read is not None:
            surprise = -float(log_probs(trial.first.model, read, Sampling()).sum())
            tokens = int(read.response_lengths.sum())
        rewards = {name: list(reward(prompts[part], answers)) for name, reward in trial.rewards.items()}
        own[number] = Measured(answers, rewards, int(batch.response_lengths.sum()), kl, surprise, tokens)
    every = gathered(own)
    responses = [text for found in every for text in found.responses]
    rewards = {name: [value for found in every for value in found.rewards[name]] for name in trial.rewards}
    kl, surprise, tokens, length = (
        sum(getattr(f, name) for f in every) for name in ("kl", "surprise", "tokens", "length")
    )
    own_kl = math.log(n) - (n - 1) / n if n > 1 else kl / len(responses) if comparable else None
    perplexity = math.exp(surprise / tokens) if tokens else None
    return Answers(responses, rewards, {"kl": own_kl, "perplexity": perplexity, **of_texts(responses),
                                        "length": length / len(responses)})  # fmt: skip


def of_texts(texts: list[str]) -> dict[str, float | None]:
    """How much a policy has to say: distinct n-grams, repeated answers, how alike they are."""
    found: dict[str, float | None] = {}
    for n in (1, 2, 3):
        found |= metrics.Distinct().compute(predictions=texts, references=texts, n=n)
    found |= metrics.Repeated().compute(predictions=texts)
    found |= metrics.SelfBleu().compute(predictions=texts)
    return found


def _stopped(batch: Batch, sampling: Sampling) -> list[bool]:
    """Which answers ended by themselves."""
    stops = torch.tensor(sampling.stop_ids, device=batch.tokens.device, dtype=torch.long)
    return list(torch.isin(batch.last_tokens, stops).tolist())


def reread(
    policy: Policy, questions: Sequence[Question], answers: Sequence[str], ended: Sequence[bool]
) -> Batch | None:
    """Answers of a policy with another vocabulary in the tokens of this one, as far as its positions go."""
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
    """The first held-out rows that come to `tokens` tokens of the first policy, and how many of each all can read.

    A policy may have positions that no text of its pretraining reached: there it would guess. Comparisons of answers
    are no texts: of such there are none.
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
    """A policy's perplexity a token of its own on texts, each up to `window` tokens; None where there are none."""
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
