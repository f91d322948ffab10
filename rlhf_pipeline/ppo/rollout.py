"""One batch of experience: sampled, judged, and seen by policy, reference and critic."""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.networks import trunk
from rlhf_pipeline.models.precision import autocast
from rlhf_pipeline.models.sampling import Batch, Sampling, join, length_mask, sample
from rlhf_pipeline.ppo.actor_critic import ActorCritic, Reference
from rlhf_pipeline.ppo.prompts import Prompts

TextReward = Callable[..., Sequence[float]]
Judge = Callable[[Batch, list[str], list[str], dict[str, list[Any]]], Tensor]


class Rollout(NamedTuple):
    """What the policy did and how it was judged. `time` is the longest response."""

    batch: Batch
    log_probs: Tensor  # (batch, time), of the policy that sampled
    ref_log_probs: Tensor  # (batch, time)
    values: Tensor  # (batch, time)
    entropy: Tensor  # (batch, time), of the sampling distribution
    scores: Tensor  # (batch,), the reward's own numbers
    prompts: list[str]
    responses: list[str]

    def to(self, device: torch.device | str) -> "Rollout":
        """The same on another device."""
        moved: list[Any] = [part.to(device) if hasattr(part, "to") else part for part in self]
        return Rollout(*moved)

    def first(self, count: int) -> "Rollout":
        """The first rows alone."""
        batch = self.batch.rows(torch.arange(count, device=self.scores.device))
        width = int(batch.response_lengths.max())
        cut: dict[str, Any] = {name: getattr(self, name)[:count] for name in ("scores", "prompts", "responses")}
        cut |= {n: getattr(self, n)[:count, :width] for n in ("log_probs", "ref_log_probs", "values", "entropy")}
        return Rollout(batch=batch, **cut)


@torch.no_grad()
def roll_out(
    actor: ActorCritic,
    reference: Reference,
    judge: Judge,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Prompts,
    limits: Tensor,
    sampling: Sampling,
    uniforms: Tensor,
    rows_at_once: int,
) -> Rollout:
    """Sample a response of at most `limits` (batch,) tokens to each prompt, from `uniforms` (time, batch); judge it."""
    device = next(actor.parameters()).device
    with autocast(actor.bf16, device):
        batch = join(
            [
                sample(actor.policy, prompts.ids[part], limits[part], sampling, uniforms[:, part])
                for part in _slices(len(prompts.ids), rows_at_once)
            ]
        )
    texts = batch.texts(tokenizer)
    scores = judge(batch, *texts, prompts.columns).to(device)
    return observe(actor, reference, batch, *texts, scores, sampling, rows_at_once)


@torch.no_grad()
def observe(
    actor: ActorCritic,
    reference: Reference,
    batch: Batch,
    asked: list[str],
    answers: list[str],
    scores: Tensor,
    sampling: Sampling,
    rows_at_once: int,
) -> Rollout:
    """Sampled and scored (batch,) responses, with what policy, reference and critic make of them."""
    if scores.shape != (len(asked),):
        raise UserError(f"the reward gave {tuple(scores.shape)} numbers for {len(asked)} responses; it takes one each.")
    for score, question, answer in zip(scores.tolist(), asked, answers, strict=True):
        if not math.isfinite(score):
            raise UserError(f"the reward of {answer[:80]!r} (to {question[:80]!r}) is {score}, which is no number.")
    mask = batch.response_mask
    # Rows of like length together: a forward pass is as wide as its longest row.
    by_length = (batch.prompt_lengths + batch.response_lengths).argsort(stable=True)
    found: list[Tensor] = []
    for index in by_length.split(rows_at_once):
        part = batch.rows(index)
        seen = actor(part, sampling)
        kinds = torch.stack([seen.log_probs, reference.log_probs(part, sampling), seen.values, seen.entropy])
        if not found:
            found = list(torch.zeros(4, *mask.shape, dtype=kinds.dtype, device=kinds.device))
        for whole, piece in zip(found, kinds, strict=True):
            whole[index, : piece.shape[1]] = piece
    return Rollout(batch, found[0], found[1], found[2], found[3], scores, asked, answers)


def _slices(count: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, count)) for start in range(0, count, size)]


def merge(parts: Sequence[Rollout]) -> Rollout:
    """The rollouts of all processes as one; row i of the whole is row i // n of process i % n."""
    if len(parts) == 1:
        return parts[0]
    count = sum(len(part.scores) for part in parts)

    def rows(tensors: Sequence[Tensor]) -> Tensor:
        shape = (count, *([max(t.shape[1] for t in tensors)] if tensors[0].dim() > 1 else []))
        whole = torch.zeros(shape, dtype=tensors[0].dtype)
        for rank, tensor in enumerate(tensors):
            place = whole[rank :: len(parts)]
            (place[:, : tensor.shape[1]] if tensor.dim() > 1 else place).copy_(tensor)
        return whole

    def texts(lists: Sequence[list[str]]) -> list[str]:
        whole = [""] * count
        for rank, each in enumerate(lists):
            whole[rank :: len(parts)] = each
        return whole

    batch = Batch(*(rows([getattr(p.batch, name) for p in parts]) for name in Batch.__dataclass_fields__))
    tensors = ("log_probs", "ref_log_probs", "values", "entropy", "scores")
    whole: dict[str, Any] = {name: rows([getattr(p, name) for p in parts]) for name in tensors}
    whole |= {name: texts([getattr(p, name) for p in parts]) for name in ("prompts", "responses")}
    return Rollout(batch=batch, **whole)


def make_judge(reward: nn.Module | TextReward, vocabulary: int, rows_at_once: int) -> Judge:
    """Scores (batch,) from a reward that reads text, or from a model that reads the policy's own tokens.

    A text reward gets prompts and completions, and those other columns of the data set that it names.
    """
    if isinstance(reward, nn.Module):
        return _model_judge(reward, vocabulary, rows_at_once)
    taken = inspect.signature(reward).parameters
    any_column = any(p.kind is p.VAR_KEYWORD for p in taken.values())

    def judge(batch: Batch, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> Tensor:
        more = {name: column for name, column in columns.items() if any_column or name in taken}
        return torch.tensor([float(score) for score in reward(prompts, responses, **more)])

    return judge


def _model_judge(model: nn.Module, vocabulary: int, rows_at_once: int) -> Judge:
    """TRL's way: the model's `score` head at the response's last token. Other classifiers give their one logit."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "vocab_size", vocabulary) < vocabulary:
        raise UserError(
            f"the reward model knows {config.vocab_size} tokens and the policy's tokenizer has {vocabulary}; "
            "pass a function of texts (prompts, completions) as reward_model, and it reads what it likes."
        )
    model.eval().requires_grad_(False)
    score: Any = getattr(model, "score", None)

    def judge(batch: Batch, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> Tensor:
        rows = torch.arange(len(prompts), device=batch.tokens.device)
        return torch.cat([some(batch.rows(part)) for part in rows.split(rows_at_once)])

    @torch.no_grad()
    def some(batch: Batch) -> Tensor:
        lengths = batch.prompt_lengths + batch.response_lengths
        mask = length_mask(lengths, batch.tokens.shape[1])
        rows = torch.arange(len(lengths), device=lengths.device)
        if score is not None:
            states = trunk(model)(input_ids=batch.tokens, attention_mask=mask.long(), use_cache=False)
            found: Tensor = score(states.last_hidden_state[rows, lengths - 1])
        else:
            found = model(input_ids=batch.tokens, attention_mask=mask.long()).logits
        if found.shape[-1] != 1:
            raise UserError(
                f"the reward model gives {found.shape[-1]} numbers a text and PPO takes one; pass a function of texts "
                "that picks the class by name."
            )
        return found[:, 0].to(torch.promote_types(found.dtype, torch.float32))

    return judge
