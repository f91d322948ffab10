"""One batch of experience: responses, their scores, and the outputs of policy, reference and critic."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.networks import trunk
from rlhf_pipeline.models.sampling import Batch, join_batches, length_mask
from rlhf_pipeline.models.user_function import accepted_arguments

TextReward = Callable[..., Sequence[float]]
BatchReward = Callable[[Batch, list[str], list[str], dict[str, list[Any]]], Tensor]
_PER_TOKEN = ("log_probs", "ref_log_probs", "values", "entropy")


class Rollout(NamedTuple):
    """Sampled responses and their scores. `time` is the length of the longest response."""

    batch: Batch
    log_probs: Tensor  # (batch, time), under the policy that sampled
    ref_log_probs: Tensor  # (batch, time)
    values: Tensor  # (batch, time)
    entropy: Tensor  # (batch, time), of the sampling distribution
    scores: Tensor  # (batch,), as the reward returned them
    prompts: list[str]
    responses: list[str]

    def to(self, device: torch.device | str) -> "Rollout":
        """Return a copy on another device."""
        moved: list[Any] = [part.to(device) if hasattr(part, "to") else part for part in self]
        return Rollout(*moved)

    def rows(self, index: Tensor) -> "Rollout":
        """Return the rows at `index`, cut to the longest response among them."""
        batch = self.batch.rows(index)
        width = int(batch.response_lengths.max())
        parts: dict[str, Any] = {name: getattr(self, name)[index, :width] for name in _PER_TOKEN}
        parts |= {name: [getattr(self, name)[i] for i in index.tolist()] for name in ("prompts", "responses")}
        return Rollout(batch=batch, scores=self.scores[index], **parts)


def merge(parts: Sequence[Rollout]) -> Rollout:
    """Merge the equally large rollouts of n processes. Row i is row i // n of process i % n."""
    whole: dict[str, Any] = {
        name: pad_sequence([row for part in parts for row in getattr(part, name)], batch_first=True)
        for name in _PER_TOKEN
    }
    whole |= {name: [text for part in parts for text in getattr(part, name)] for name in ("prompts", "responses")}
    scores = torch.cat([part.scores for part in parts])
    stacked = Rollout(batch=join_batches([part.batch for part in parts]), scores=scores, **whole)
    return stacked.rows(torch.arange(len(scores)).view(len(parts), -1).t().flatten())


def make_batch_reward(reward: nn.Module | TextReward, vocabulary: int, rows_at_once: int) -> BatchReward:
    """Return a function that scores a batch, (batch,), by a text reward or a model that reads the policy's tokens.

    A text reward gets prompts and completions, and the other columns of the data set that its parameters name.
    """
    if isinstance(reward, nn.Module):
        return _model_reward(reward, vocabulary, rows_at_once)

    def batch_reward(batch: Batch, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> Tensor:
        return torch.tensor(
            [float(score) for score in reward(prompts, responses, **accepted_arguments(reward, columns))]
        )

    return batch_reward


def _model_reward(model: nn.Module, vocabulary: int, rows_at_once: int) -> BatchReward:
    """Score as TRL does: by the `score` head at the response's last token. Other classifiers score by their logit."""
    config: Any = getattr(model, "config", None)
    if getattr(config, "vocab_size", vocabulary) < vocabulary:
        raise UserError(
            f"the reward model knows {config.vocab_size} tokens, but the policy's tokenizer has {vocabulary}; "
            "pass a function of texts (prompts, completions) as reward_model, which may use any tokenizer."
        )
    model.eval().requires_grad_(False)
    head: Any = getattr(model, "score", None)

    def score(batch: Batch) -> Tensor:
        lengths = batch.prompt_lengths + batch.response_lengths
        inputs = {"input_ids": batch.tokens, "attention_mask": length_mask(lengths, batch.tokens.shape[1]).long()}
        if head is None:
            found: Tensor = model(**inputs).logits
        else:
            states = trunk(model)(**inputs, use_cache=False).last_hidden_state
            found = head(states[torch.arange(len(lengths), device=lengths.device), lengths - 1])
        if found.shape[-1] != 1:
            raise UserError(
                f"the reward model gives {found.shape[-1]} numbers per text, but PPO needs one; pass a function of "
                "texts that picks a class."
            )
        return found[:, 0].to(torch.promote_types(found.dtype, torch.float32))

    @torch.no_grad()
    def batch_reward(batch: Batch, prompts: list[str], responses: list[str], columns: dict[str, list[Any]]) -> Tensor:
        rows = torch.arange(len(prompts), device=batch.tokens.device)
        return torch.cat([score(batch.rows(part)) for part in rows.split(rows_at_once)])

    return batch_reward
