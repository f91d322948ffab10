"""Sampling from a policy: one distribution, used alike to roll out, to learn and to measure."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import DynamicCache

from rlhf_pipeline.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """What turns a policy's logits into the distribution that tokens are drawn from."""

    temperature: float = 1.0
    stop_ids: tuple[int, ...] = ()  # a response ends with the first of these
    min_length: int = 0  # in tokens; no stop before it
    suppressed_ids: tuple[int, ...] = field(default=())  # never sampled

    def adjust(self, logits: Tensor) -> Tensor:
        """Logits of the sampling distribution at every position of a response.

        `logits`: (batch, time, vocabulary), time from the first response token on. The same function serves
        the rollout, the update and the reference, or the ratio would not start at 1 nor the KL at 0.
        """
        return self.adjust_from(logits, 0)

    def adjust_from(self, logits: Tensor, start: int) -> Tensor:
        """`adjust` for logits (batch, time, vocabulary) whose first position is the response's token `start`."""
        logits = logits.float() / self.temperature
        if self.suppressed_ids:
            logits[..., list(self.suppressed_ids)] = float("-inf")
        early = self.min_length - start
        if self.stop_ids and early > 0:
            logits[:, :early, list(self.stop_ids)] = float("-inf")
        return logits


@dataclass(frozen=True)
class Batch:
    """Prompts and responses as one rectangle. Masks come from lengths, never from comparing ids with a pad."""

    tokens: Tensor  # (batch, prompt width + response width); prompts padded left, responses right
    prompt_lengths: Tensor  # (batch,)
    response_lengths: Tensor  # (batch,), the stop token counted
    prompt_width: int

    @property
    def responses(self) -> Tensor:
        """(batch, response width)."""
        return self.tokens[:, self.prompt_width :]

    @property
    def response_mask(self) -> Tensor:
        """(batch, response width): True on tokens that the policy chose."""
        return length_mask(self.response_lengths, self.tokens.shape[1] - self.prompt_width)

    @property
    def attention_mask(self) -> Tensor:
        """(batch, width): True on prompt and response tokens."""
        prompt = length_mask(self.prompt_lengths, self.prompt_width).flip(1)
        return torch.cat([prompt, self.response_mask], 1)

    def rows(self, index: Tensor) -> "Batch":
        """Some of the rows, without the columns that none of them uses."""
        prompts, responses = self.prompt_lengths[index], self.response_lengths[index]
        narrow, longest = int(prompts.max()), max(int(responses.max()), 1)
        columns = slice(self.prompt_width - narrow, self.prompt_width + longest)
        return Batch(self.tokens[index, columns], prompts, responses, narrow)

    def texts(self, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], list[str]]:
        """Prompts and responses as text, special tokens left out."""
        rows = range(len(self.tokens))
        ids = self.tokens.tolist()
        starts, ends = (self.prompt_width - self.prompt_lengths).tolist(), self.response_lengths.tolist()
        prompts = [ids[i][starts[i] : self.prompt_width] for i in rows]
        responses = [ids[i][self.prompt_width : self.prompt_width + ends[i]] for i in rows]
        both: tuple[list[str], list[str]] = (
            tokenizer.batch_decode(prompts, skip_special_tokens=True),
            tokenizer.batch_decode(responses, skip_special_tokens=True),
        )
        return both


def length_mask(lengths: Tensor, width: int) -> Tensor:
    """(batch,) lengths to a (batch, width) mask: True before each length."""
    return torch.arange(width, device=lengths.device) < lengths[:, None]


def check_positions(model: PreTrainedModel, prompts: Sequence[Sequence[int]], response_length: int) -> None:
    """Refuse prompts that leave no room for a response."""
    positions = getattr(model.config, "max_position_embeddings", None)
    longest = max(map(len, prompts)) + response_length
    if positions is not None and longest > positions:
        raise UserError(
            f"a prompt and its response take up to {longest} tokens, and the policy has {positions} positions; "
            "lower response_length or the prompts' length (data.prompt_tokens)."
        )


def pad_left(prompts: Sequence[Sequence[int]], fill: int) -> tuple[Tensor, Tensor]:
    """Prompts of token ids to a (batch, longest) rectangle padded left, and their lengths (batch,)."""
    width = max(len(prompt) for prompt in prompts)
    rows = [[fill] * (width - len(prompt)) + list(prompt) for prompt in prompts]
    return torch.tensor(rows), torch.tensor([len(prompt) for prompt in prompts])


def hidden_states(model: PreTrainedModel, batch: Batch) -> Tensor:
    """The trunk's last hidden states (batch, response width, hidden) that predict the response's tokens."""
    mask = batch.attention_mask
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    trunk = getattr(model, model.base_model_prefix)
    out = trunk(input_ids=batch.tokens, attention_mask=mask.long(), position_ids=positions, use_cache=False)
    states: Tensor = out.last_hidden_state[:, batch.prompt_width - 1 : -1]
    return states


def token_log_probs(model: PreTrainedModel, states: Tensor, batch: Batch, sampling: Sampling) -> Tensor:
    """log p of each response token under the sampling distribution: (batch, response width)."""
    logits = sampling.adjust(model.get_output_embeddings()(states))
    return logits.gather(-1, batch.responses[..., None]).squeeze(-1) - logits.logsumexp(-1)


@torch.no_grad()
def log_probs(model: PreTrainedModel, batch: Batch, sampling: Sampling) -> Tensor:
    """`token_log_probs` from the tokens alone, zero beyond each response's end."""
    found = token_log_probs(model, hidden_states(model, batch), batch, sampling)
    return found.masked_fill(~batch.response_mask, 0.0)


@torch.no_grad()
def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    limits: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
) -> Batch:
    """Draw one response to each prompt, of at most `limits` (batch,) tokens.

    A loop over the model's own forward with a key-value cache; tokens are drawn by inverting the
    cumulative distribution, one uniform number a row and step, so that a row's draw is `generator`'s alone.
    """
    device = next(model.parameters()).device
    fill = sampling.stop_ids[0] if sampling.stop_ids else 0
    tokens, prompt_lengths = (t.to(device) for t in pad_left(prompts, fill))
    limits = limits.to(device)
    width, longest = tokens.shape[1], int(limits.max())
    mask = length_mask(prompt_lengths, width).flip(1).long()
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    uniforms = torch.rand(longest, len(tokens), generator=generator).to(device)
    stops = torch.tensor(sampling.stop_ids, dtype=torch.long, device=device)
    drawn = torch.full((len(tokens), longest), fill, dtype=torch.long, device=device)
    lengths = limits.clone()
    running = torch.ones(len(tokens), dtype=torch.bool, device=device)
    cache, inputs = DynamicCache(config=model.config), tokens
    for step in range(longest):
        out = model(
            input_ids=inputs, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        probabilities = sampling.adjust_from(out.logits[:, -1:], step)[:, 0].softmax(-1)
        cumulative = probabilities.cumsum(-1)
        # The total is 1 but for rounding; staying below it keeps a token of probability 0 from being drawn.
        total = cumulative[:, -1:]
        height = torch.minimum(uniforms[step][:, None] * total, total.nextafter(torch.zeros_like(total)))
        inputs = torch.searchsorted(cumulative, height, right=True)
        drawn[:, step] = torch.where(running, inputs[:, 0], drawn[:, step])
        stopped = running & torch.isin(inputs[:, 0], stops)
        lengths[stopped] = step + 1
        running = running & ~stopped & (step + 1 < limits)
        if not running.any():
            break
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        positions = positions[:, -1:] + 1
    return Batch(torch.cat([tokens, drawn[:, : max(int(lengths.max()), 1)]], 1), prompt_lengths, lengths, width)
