"""Sampling from a policy. Rollout, update and evaluation use the same distribution.

A GPU works off a queue, and reading a number or a shape from it waits until the queue is empty. So this module avoids
such reads per token and per micro-batch.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.networks import cache_argument, head_logits, positions, trunk


@dataclass(frozen=True)
class Sampling:
    """The distribution that tokens are drawn from, given a policy's logits."""

    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()  # a response ends with the first of these
    min_length: int = 0  # in tokens; no stop before it
    suppressed_ids: tuple[int, ...] = ()  # never sampled

    def adjust_(self, logits: Tensor, times: Tensor) -> Tensor:
        """Turn logits (tokens, vocabulary) into those of the sampling distribution, in place; at least fp32.

        `times` (tokens,) is the place of each token in its response, from 0. Rollout, update and reference all use this
        function; otherwise the ratio would not start at 1, nor the KL at 0. A token that cannot be drawn gets a finite
        number so low that its probability is 0: then 0 x log 0 is 0.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.temperature != 1:
            logits.div_(self.temperature)
        never = torch.finfo(logits.dtype).min / 4
        if self.suppressed_ids:
            logits.index_fill_(1, ids_on(logits.device, self.suppressed_ids), never)
        if self.stop_ids and self.min_length:
            stops = ids_on(logits.device, self.stop_ids)
            early = (times < self.min_length)[:, None]
            logits.index_copy_(1, stops, logits.index_select(1, stops).masked_fill(early, never))
        return logits

    def ended(self, tokens: Tensor) -> Tensor:
        """Whether each token (batch,) ends its response."""
        return (tokens[:, None] == ids_on(tokens.device, self.stop_ids)).any(1)


@lru_cache(maxsize=16)
def ids_on(device: torch.device, ids: tuple[int, ...]) -> Tensor:
    """Token ids as a tensor, copied to a device once."""
    return torch.tensor(ids, dtype=torch.long, device=device)


@dataclass(frozen=True)
class Batch:
    """Prompts and responses as one rectangle. Masks come from lengths, never from comparing ids with a pad.

    A row is its prompt, its response, then padding. Under causal attention no token that counts sees the padding, so a
    forward pass over a batch needs no attention mask.
    """

    tokens: Tensor  # (batch, width)
    prompt_lengths: Tensor  # (batch,)
    response_lengths: Tensor  # (batch,), the stop token counted

    @cached_property
    def response_mask(self) -> Tensor:
        """(batch, longest response): True on tokens that the policy chose."""
        return length_mask(self.response_lengths, int(self.response_lengths.max()))

    @cached_property
    def places(self) -> tuple[Tensor, Tensor]:
        """Row and time of each token that the policy chose, row after row: (tokens,) and (tokens,)."""
        row, time = self.response_mask.nonzero(as_tuple=True)
        return row, time

    @property
    def chosen(self) -> Tensor:
        """The tokens that the policy chose, row after row: (tokens,)."""
        row, time = self.places
        return self.tokens[row, self.prompt_lengths[row] + time]

    @property
    def responses(self) -> Tensor:
        """(batch, longest response); beyond a response's end the ids mean nothing."""
        times = torch.arange(self.response_mask.shape[1], device=self.tokens.device)
        places = self.prompt_lengths[:, None] + times
        return self.tokens.gather(1, places.clamp(max=self.tokens.shape[1] - 1))

    @property
    def last_tokens(self) -> Tensor:
        """(batch,): the last token of each response."""
        return self.tokens.gather(1, (self.prompt_lengths + self.response_lengths - 1)[:, None])[:, 0]

    def rows(self, index: Tensor) -> "Batch":
        """Some rows, without the columns that none of them uses."""
        prompts, responses = self.prompt_lengths[index], self.response_lengths[index]
        return Batch(self.tokens[index, : int((prompts + responses).max())], prompts, responses)

    def to(self, device: torch.device | str) -> "Batch":
        """Copy the batch to another device, with its mask and places: computing them on a GPU would stall it."""
        wait = torch.device(device).type == "cpu"  # otherwise the CPU could read it before the copy is done
        parts = (self.tokens, self.prompt_lengths, self.response_lengths, self.response_mask, *self.places)
        tokens, prompts, responses, mask, row, time = (part.to(device, non_blocking=not wait) for part in parts)
        batch = Batch(tokens, prompts, responses)
        vars(batch).update(response_mask=mask, places=(row, time))
        return batch

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
        """Prompts and responses as text, without special tokens.

        A response is decoded with its prompt, because some tokenizers drop the leading space of a text.
        """
        starts = self.prompt_lengths.tolist()
        ends = (self.prompt_lengths + self.response_lengths).tolist()
        rows = list(zip(self.tokens.tolist(), starts, ends, strict=True))
        slices = ([r[:a] for r, a, _ in rows], [r[:b] for r, _, b in rows], [r[a:b] for r, a, b in rows])
        prompts, wholes, alone = (tokenizer.batch_decode(ids, skip_special_tokens=True) for ids in slices)
        every = zip(prompts, wholes, alone, strict=True)
        return prompts, [whole[len(p) :] if whole.startswith(p) else answer for p, whole, answer in every]


def make_batch(prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]]) -> Batch:
    """Rows of token ids as a `Batch` on the CPU."""
    rows = [[*prompt, *response] for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return Batch(tokens, torch.tensor([len(p) for p in prompts]), torch.tensor([len(r) for r in responses]))


def join_batches(batches: Sequence[Batch]) -> Batch:
    """The rows of several batches as one."""
    width = max(batch.tokens.shape[1] for batch in batches)
    tokens = [torch.nn.functional.pad(batch.tokens, (0, width - batch.tokens.shape[1])) for batch in batches]
    lengths = [torch.cat([getattr(b, name) for b in batches]) for name in ("prompt_lengths", "response_lengths")]
    return Batch(torch.cat(tokens), *lengths)


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(batch,) lengths to a (batch, width) mask: True before each length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def room_for_prompts(model: PreTrainedModel, response_length: int) -> int:
    """Return how many prompt tokens a model has positions for, before a response."""
    places = positions(model)
    if places <= response_length:
        raise UserError(
            f"a response takes up to {response_length} tokens, and the policy has {places} positions; lower "
            "response_length."
        )
    return places - response_length


def check_positions(model: PreTrainedModel, prompts: Sequence[Sequence[int]], response_length: int) -> None:
    """Refuse empty prompts, and those that leave no room for a response."""
    if not all(map(len, prompts)):
        raise UserError("a prompt is empty; every prompt takes at least one token.")
    longest = max(map(len, prompts)) + response_length
    if longest > (places := positions(model)):
        raise UserError(
            f"a prompt and its response take up to {longest} tokens, and the policy has {places} positions; "
            "lower response_length or the prompts' length (data.prompt_tokens)."
        )


def uniform_draws(limits: Tensor, generator: torch.Generator) -> Tensor:
    """The random numbers of a batch, (longest limit, batch): one per token and row, so that rows do not interfere."""
    return torch.rand(int(limits.max()), len(limits), generator=generator)


@torch.no_grad()
def sample(
    model: PreTrainedModel, prompts: Sequence[Sequence[int]], limits: Tensor, sampling: Sampling, uniforms: Tensor,
    tell: Callable[[Tensor], None] | None = None,
) -> Batch:  # fmt: skip
    """Draw one response to each prompt, of at most `limits` (batch,) tokens, from `uniforms` (time, batch) in [0, 1).

    Tokens are drawn by inverting the cumulative distribution, with the model's own key-value cache. Rows that have
    ended leave the cache once they are a quarter of it. `tell` is called with each step's tokens, (rows in the cache,).
    """
    device = next(model.parameters()).device
    count, width, longest = len(prompts), max(map(len, prompts)), int(limits.max())
    inputs = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts], device=device)
    prompt_lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    if min(map(len, prompts)) < width:  # padded left, so that all rows continue at the same column
        mask = length_mask(prompt_lengths, width).flip(1).long()
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    limits, uniforms = limits.to(device), uniforms.to(device)
    pause = steps_between_checks(device, tell)
    drawn = torch.zeros(count, len(uniforms), dtype=torch.long, device=device)
    lengths = limits.clone()
    rows = torch.arange(count, device=device)  # those still in the cache
    running = torch.ones_like(rows, dtype=torch.bool)
    body, cache = trunk(model), DynamicCache(config=model.config)
    cached = {cache_argument(body): cache, "use_cache": True}
    mass = torch.zeros((), device=device)  # the sum of all probabilities: not finite if one of them is not
    for time in range(longest):
        output = body(input_ids=inputs, attention_mask=mask, position_ids=position_ids, **cached)
        logits = head_logits(model, output.last_hidden_state[:, -1])
        logits = sampling.adjust_(logits, torch.full_like(rows, time))
        tokens, totals = draw_tokens(logits, uniforms[time, rows])
        mass = mass + totals.sum()
        drawn[rows, time] = tokens
        if tell is not None:
            tell(tokens)
        stopped = running & sampling.ended(tokens)
        lengths[rows] = torch.where(stopped, time + 1, lengths[rows])
        running = running & ~stopped & (time + 1 < limits[rows])
        if mask is not None and position_ids is not None:
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            position_ids = position_ids[:, -1:] + 1
        if (time + 1) % pause == 0:
            left = int(running.sum())
            check_mass(model, mass)
            if not left:
                break
            if left <= 0.75 * len(rows):
                cache.batch_select_indices(running.nonzero()[:, 0])
                rows, tokens = rows[running], tokens[running]
                if mask is not None and position_ids is not None:
                    mask, position_ids = mask[running], position_ids[running]
                running = running[running]
        inputs = tokens[:, None]
    check_mass(model, mass)
    answers = [row[:length] for row, length in zip(drawn.tolist(), lengths.tolist(), strict=True)]
    return make_batch(prompts, answers).to(device)


def check_mass(model: PreTrainedModel, mass: Tensor) -> None:
    """Refuse to sample if `mass`, a sum of probabilities, is not finite."""
    if not math.isfinite(float(mass)):
        raise UserError(
            f"the probabilities of {model.name_or_path or 'the policy'} are not finite numbers, so nothing can be "
            "sampled; its weights may be damaged: train it again, or choose another."
        )


def steps_between_checks(device: torch.device, tell: object) -> int:
    """Return after how many tokens to check for ended rows. The check stalls a GPU; it does not change the samples."""
    return 8 if device.type == "cuda" and tell is None else 1


def draw_tokens(logits: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Draw one token per row from logits (batch, vocabulary), by inverting the cumulative distribution: (batch,).

    Also return the sums of the probabilities, (batch, 1): 1 up to rounding, or not finite if a logit is not.
    """
    probabilities = logits.softmax(-1)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    # Staying below the total keeps a token of probability 0 from being drawn.
    height = torch.minimum(uniforms[:, None] * total, total.nextafter(torch.zeros_like(total)))
    found = torch.searchsorted(cumulative, height.to(cumulative.dtype), right=True)
    found.clamp_(max=logits.shape[1] - 1)  # it is beyond the end if the total is not finite
    # A parallel cumsum, as on CUDA, may decrease between terms. Even then, a token of probability 0 is not drawn.
    possible = probabilities.gather(-1, found) > 0
    return torch.where(possible, found, probabilities.argmax(-1, keepdim=True))[:, 0], total
