"""The arithmetic of PPO, RLOO and GRPO as pure functions of tensors. `time` runs over response tokens.

Sources: PPO (arXiv 1707.06347), GAE (arXiv 1506.02438), Ziegler et al. 2019 (arXiv 1909.08593), RLOO (arXiv
2402.14740), GRPO (arXiv 2402.03300), Dr. GRPO (arXiv 2503.20783).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of `values` (batch, time) where `mask` is True; 0 if it is nowhere True."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`values` (batch, time) scaled to variance 1 over `mask`, and with `shift_mean` to mean 0; 0 elsewhere."""
    mean = masked_mean(values, mask)
    count = mask.sum()
    variance = masked_mean((values - mean) ** 2, mask) * count / (count - 1).clamp(min=1)
    whitened = (values - mean) * torch.rsqrt(variance + 1e-8)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def kl_estimate(log_probs: Tensor, ref_log_probs: Tensor, estimator: str) -> Tensor:
    """Per-token estimate of KL(policy || reference), (batch, time): k1 or k3 (joschu.net/blog/kl-approx.html)."""
    log_ratio = ref_log_probs - log_probs
    return -log_ratio if estimator == "k1" else torch.expm1(log_ratio) - log_ratio


def token_rewards(scores: Tensor, kl: Tensor, lengths: Tensor, kl_coef: float) -> Tensor:
    """-kl_coef x KL at every token, and the score (batch,) on the last one: (batch, time)."""
    rewards = -kl_coef * kl
    return rewards.scatter_add(1, (lengths - 1)[:, None], scores[:, None].to(rewards.dtype))


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates. All tensors are (batch, time). After a response's end the value is 0."""
    rewards, values = rewards * mask, values * mask
    advantages = torch.zeros_like(rewards)
    ahead, next_value = torch.zeros_like(rewards[:, 0]), torch.zeros_like(rewards[:, 0])
    for t in reversed(range(rewards.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        ahead = delta + gamma * lam * ahead
        advantages[:, t], next_value = ahead, values[:, t]
    return advantages * mask


def group_advantages(returns: Tensor, size: int, kind: str) -> Tensor:
    """Advantages (batch,) over the other responses to the same prompt. `size` consecutive rows answer one prompt.

    `returns` (batch,) are the scores, minus the KL penalty if it is in the reward. rloo subtracts the mean of the
    other responses; dr_grpo subtracts the mean of all responses; grpo also divides by their standard deviation.
    """
    groups = returns.view(-1, size)
    advantages = groups - groups.mean(1, keepdim=True)
    if kind == "rloo":
        advantages = advantages * size / (size - 1)
    if kind == "grpo":
        advantages = advantages / (groups.std(1, keepdim=True) + 1e-4)  # equal rewards teach nothing
    return advantages.flatten()


def loss_shares(kind: str, mask: Tensor, lengths: Tensor, count: Tensor, rows: int, longest: int) -> Tensor:
    """The weight of each token in a minibatch's loss, (batch, time), for the `mask` (1 or 0) of a micro-batch.

    The minibatch has `count` tokens in `rows` responses. In PPO (gae) all tokens weigh the same. In RLOO and GRPO all
    responses weigh the same. Dr. GRPO divides each response by `longest`, the maximum length, not by its own length.
    """
    if kind == "gae":
        return mask / count
    return mask / (rows * (longest if kind == "dr_grpo" else lengths[:, None]))


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """Share of the variance of `returns` (tokens,) that `values` (tokens,) predict; 0 without variance."""
    variance = float(returns.var()) if len(returns) > 1 else 0.0
    return 1 - float((returns - values).var()) / variance if variance > 0 else 0.0


class PolicyLoss(NamedTuple):
    """The clipped surrogate, and statistics to log, which are means over tokens. All are scalars."""

    loss: Tensor
    ratio: Tensor  # new / old probability
    squared_ratio: Tensor
    approx_kl: Tensor  # k2 estimate of KL(old || new)
    clipped: Tensor  # share of tokens at which the clip is active


def policy_loss(
    log_probs: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, clip: float, count: Tensor, shares: Tensor,
    whole: bool = False,
) -> PolicyLoss:  # fmt: skip
    """PPO's clipped surrogate, eq. 7. Tensors are (batch, time).

    `shares` come from `loss_shares`. Means are over `count`, the tokens of the whole minibatch, so they do not depend
    on how it is split into micro-batches and over processes. With `whole` the clipped ratio is that of the whole
    response, which is the action in RLOO.
    """
    log_ratio = (log_probs - old).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    clipping = log_ratio.sum(1, keepdim=True).exp() if whole else ratio
    plain, clipped = -advantages * clipping, -advantages * clipping.clamp(1 - clip, 1 + clip)
    loss = (torch.max(plain, clipped) * shares).sum()
    with torch.no_grad():
        active = (clipped > plain).to(ratio.dtype)
        watched = [(figure * mask).sum() / count for figure in (ratio, ratio**2, 0.5 * log_ratio**2, active)]
    return PolicyLoss(loss, *watched)


class ValueLoss(NamedTuple):
    """The critic's error; scalars."""

    loss: Tensor
    clipped: Tensor  # share of tokens at which the clip is active


def value_loss(values: Tensor, old: Tensor, returns: Tensor, mask: Tensor, clip: float, count: Tensor) -> ValueLoss:
    """Half the squared error of the value, clipped around its old value (arXiv 2403.17031); divided by `count`."""
    change = values - old
    near = old + change.clamp(-clip, clip)
    plain, clipped = (values - returns) ** 2, (near - returns) ** 2
    active = ((clipped > plain) & (change.abs() > clip) & mask).sum() / count
    return ValueLoss(0.5 * (torch.max(plain, clipped) * mask).sum() / count, active)


def next_kl_coef(coef: float, kl: float, target: float, episodes: int, horizon: int) -> float:
    """Ziegler et al.'s controller (sec. 2.2): proportional in log space, its error clipped to +-20 %."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return coef * (1 + error * episodes / horizon)


class Moments(NamedTuple):
    """Count, mean and sum of squared deviations of all values so far."""

    number: float = 0.0
    mean: float = 0.0
    squares: float = 0.0

    @property
    def deviation(self) -> float:
        """Standard deviation; 1 while it is undefined or 0."""
        found = math.sqrt(self.squares / (self.number - 1)) if self.number > 1 else 0.0
        return found if found > 1e-8 else 1.0


def add_moments(moments: Moments, values: Tensor) -> Moments:
    """Return `moments` updated with `values` (batch,) (Chan et al. 1983, eq. 2.1)."""
    values = values.cpu().double()  # Apple's GPUs have no float64
    count, mean = len(values), float(values.mean())
    total, delta = moments.number + count, mean - moments.mean
    squares = moments.squares + float(((values - mean) ** 2).sum()) + delta**2 * moments.number * count / total
    return Moments(total, moments.mean + delta * count / total, squares)
