"""One batch of experience: sampled, scored, and seen by policy, reference and critic."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_pipeline.sampling import Batch, Sampling, hidden_states, log_probs, sample, token_log_probs

TextReward = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


class Rollout(NamedTuple):
    """What the policy did and how it was judged. `time` is the response's width."""

    batch: Batch
    log_probs: Tensor  # (batch, time), of the policy that sampled
    ref_log_probs: Tensor  # (batch, time)
    values: Tensor  # (batch, time)
    scores: Tensor  # (batch,), the reward's own numbers
    prompts: list[str]
    responses: list[str]


class PolicyWithValueHead(nn.Module):
    """A policy and one linear value head on its trunk: the critic shares all else."""

    def __init__(self, policy: PreTrainedModel) -> None:
        super().__init__()
        self.policy = policy
        self.value_head = nn.Linear(policy.config.hidden_size, 1)
        # The critic starts by expecting nothing, whatever the trunk says.
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)

    def forward(self, batch: Batch, sampling: Sampling) -> tuple[Tensor, Tensor]:
        """log p of the response's tokens, and their values: both (batch, time)."""
        states = hidden_states(self.policy, batch)
        return token_log_probs(self.policy, states, batch, sampling), self.value_head(states).squeeze(-1).float()


@torch.no_grad()
def roll_out(
    model: PolicyWithValueHead,
    reference: PreTrainedModel,
    reward: TextReward,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    limits: Tensor,
    sampling: Sampling,
    generator: torch.Generator,
    rows_at_once: int,
) -> Rollout:
    """Sample a response of at most `limits` (batch,) tokens to each prompt, and have it judged."""
    batch = sample(model.policy, prompts, limits, sampling, generator)
    width, device = batch.responses.shape[1], batch.tokens.device
    found = torch.zeros(3, len(prompts), width, device=device)
    for index in torch.split(torch.arange(len(prompts), device=device), rows_at_once):
        part = batch.rows(index)
        mask = part.response_mask
        mine, values = model(part, sampling)
        seen = (mine, log_probs(reference, part, sampling), values)
        for kind, tensor in enumerate(seen):
            found[kind, index, : mask.shape[1]] = tensor.masked_fill(~mask, 0.0)
    asked, answers = batch.texts(tokenizer)
    scores = torch.tensor(list(reward(asked, answers)), dtype=torch.float32, device=device)
    return Rollout(batch, found[0], found[1], found[2], scores, asked, answers)
