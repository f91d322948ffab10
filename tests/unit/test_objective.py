"""PPO's arithmetic against written-out definitions."""

import math

import pytest
import torch
from torch import Tensor

from rlhf_pipeline.models.sampling import length_mask
from rlhf_pipeline.ppo.objective import (
    Moments,
    add_moments,
    explained_variance,
    gae,
    kl_estimate,
    masked_mean,
    next_kl_coef,
    policy_loss,
    token_rewards,
    value_loss,
    whiten,
)


def example(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rewards, values, mask and lengths of four responses of up to six tokens."""
    torch.manual_seed(seed)
    lengths = torch.tensor([6, 3, 1, 5])
    return torch.randn(4, 6).double(), torch.randn(4, 6).double(), length_mask(lengths, 6), lengths


def test_gae_equals_the_sum_that_defines_it() -> None:
    rewards, values, mask, lengths = example()
    found = gae(rewards, values, mask, gamma=0.97, lam=0.9)
    for row, length in enumerate(lengths.tolist()):
        v = [*values[row, :length].tolist(), 0.0]
        deltas = [rewards[row, t].item() + 0.97 * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((0.97 * 0.9) ** (k - t) * deltas[k] for k in range(t, length))
            assert math.isclose(found[row, t].item(), expected, rel_tol=1e-12)
        assert (found[row, length:] == 0).all()


def test_the_score_falls_on_the_last_token_and_the_kl_on_each() -> None:
    kl = torch.tensor([[0.5, 1.0, 0.0], [0.2, 0.0, 0.0]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, torch.tensor([2, 1]), kl_coef=0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.05, 1.9, 0.0], [-1.02, 0.0, 0.0]]))


def test_kl_estimators_agree_in_the_mean() -> None:
    torch.manual_seed(0)
    policy, reference = (torch.randn(8).double().log_softmax(-1) for _ in range(2))
    exact = (policy.exp() * (policy - reference)).sum()
    for estimator in ("k1", "k3"):
        estimate = (policy.exp() * kl_estimate(policy, reference, estimator)).sum()
        torch.testing.assert_close(estimate, exact)
    assert (kl_estimate(policy, reference, "k3") >= 0).all()


def test_whitening_counts_only_what_is_valid() -> None:
    values, _, mask, _ = example()
    values[~mask] = 1e6
    whitened = whiten(values, mask)
    assert abs(masked_mean(whitened, mask).item()) < 1e-12
    assert abs(whitened[mask].var().item() - 1) < 1e-6
    assert (whitened[~mask] == 0).all()


def test_the_policy_losss_gradient_is_that_of_the_written_out_loss() -> None:
    old, advantages, mask, _ = example()
    new = (old + 0.3 * torch.randn(4, 6)).requires_grad_()
    count = mask.sum()
    policy_loss(new, old, advantages, mask, 0.2, count, mask / count).loss.backward()
    again = new.detach().clone().requires_grad_()
    ratio = (again - old).exp()
    surrogate = torch.min(ratio * advantages, ratio.clamp(0.8, 1.2) * advantages)
    (-surrogate[mask].mean()).backward()
    assert new.grad is not None
    torch.testing.assert_close(new.grad, again.grad)


def test_the_value_loss_takes_the_worse_of_clipped_and_plain() -> None:
    values, old, returns = torch.tensor([[2.0]]), torch.tensor([[0.0]]), torch.tensor([[3.0]])
    loss = value_loss(values, old, returns, torch.tensor([[True]]), 0.2, torch.tensor(1))
    assert math.isclose(loss.loss.item(), 0.5 * (0.2 - 3.0) ** 2, rel_tol=1e-6)


def test_the_kl_controller_steers_to_its_target() -> None:
    assert next_kl_coef(0.2, kl=6, target=6, episodes=256, horizon=10_000) == 0.2
    assert math.isclose(next_kl_coef(0.2, 60, 6, 256, 10_000), 0.2 * (1 + 0.2 * 0.0256))
    assert math.isclose(next_kl_coef(0.2, 0, 6, 256, 10_000), 0.2 * (1 - 0.2 * 0.0256))
    assert next_kl_coef(0.1, 0, 6, 4999, 1000) > 0
    assert next_kl_coef(0.1, 0, 6, 5000, 1000) == pytest.approx(0), "refused: check_config"


def test_moments_need_no_64_bits_on_the_device() -> None:
    """Apple's GPUs have none: what is added goes to main memory first."""

    class OnDevice:
        def cpu(self) -> torch.Tensor:
            return torch.tensor([1.0, 3.0])

        def double(self) -> torch.Tensor:
            raise TypeError("Cannot convert a MPS Tensor to float64 dtype")

        def __len__(self) -> int:
            return 2

    assert add_moments(Moments(), OnDevice()) == Moments(2, 2.0, 2.0)  # type: ignore[arg-type]


def test_a_value_within_the_clip_is_not_counted_as_clipped() -> None:
    """0.1 + (0.3 - 0.1) is not 0.3 in binary, so the clipped value may lie a rounding error off the plain one."""
    old = torch.full((1, 50), 0.1, dtype=torch.float64)
    values = torch.linspace(0.0, 0.25, 50, dtype=torch.float64)[None]
    mask = torch.ones(1, 50, dtype=torch.bool)
    found = value_loss(values, old, torch.zeros_like(old), mask, 0.2, torch.tensor(50))
    assert found.clipped == 0


def test_explained_variance_is_that_of_the_returns() -> None:
    returns = torch.tensor([0.0, 1.0, 2.0, 3.0])
    assert explained_variance(returns + 5, returns) == 1
    assert explained_variance(torch.full((4,), 7.0), returns) == 0
    assert explained_variance(-returns, returns) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(4)) == 0
