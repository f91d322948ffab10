"""log p and entropy of chosen tokens, against their definition."""

import pytest
import torch
from tiny import tiny_policy, tiny_tokenizer
from torch import Tensor

from rlhf_pipeline.models import likelihood
from rlhf_pipeline.models.likelihood import log_probs, response_states, token_likelihood
from rlhf_pipeline.models.networks import trunk
from rlhf_pipeline.models.sampling import Sampling, make_batch

SAMPLINGS = [Sampling(), Sampling(0.7, stop_ids=(0, 3), min_length=2, suppressed_ids=(5, 6))]
BATCH = make_batch([[5, 9, 11], [7], [20, 21]], [[30, 8, 0], [12], [9, 13]])


def defined(logits: Tensor, sampling: Sampling) -> Tensor:
    """The log-distribution of the first row of BATCH at its response tokens, written out: (time, vocabulary)."""
    logits = logits / sampling.temperature
    for token in sampling.suppressed_ids:
        logits[:, token] = -1e30
    for token in sampling.stop_ids:
        logits[: sampling.min_length, token] = -1e30
    return logits.log_softmax(-1)


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_values_and_gradients_are_those_of_the_definition(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_PIECE", 700)  # so that the vocabulary is worked on in several pieces
    monkeypatch.setattr(likelihood, "_SCRATCH", 700)
    policy = tiny_policy(tiny_tokenizer()).double()
    weight = torch.linspace(-1, 1, 9, dtype=torch.float64).reshape(3, 3)

    def gradient(loss: Tensor) -> Tensor:
        policy.zero_grad()
        loss.backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    found, entropy = token_likelihood(policy, response_states(trunk(policy), BATCH), BATCH, sampling)
    mine = gradient((found * weight).sum() + (entropy * weight.t()).sum())
    plain = torch.zeros(3, 3, dtype=torch.float64)
    spread = torch.zeros(3, 3, dtype=torch.float64)
    for row in range(3):
        start, count = int(BATCH.prompt_lengths[row]), int(BATCH.response_lengths[row])
        alone = BATCH.rows(torch.tensor([row])).tokens
        assert alone.shape == (1, start + count), "a part of a batch is no wider than its longest row"
        logits = policy(alone).logits[0, start - 1 : -1].clone()
        every = defined(logits, sampling)
        plain[row, :count] = every.gather(1, BATCH.responses[row, :count, None])[:, 0]
        spread[row, :count] = -(every.exp() * every.clamp(min=-1e20)).sum(-1)
    torch.testing.assert_close(found, plain, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(entropy, spread, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        mine, gradient((plain * weight).sum() + (spread * weight.t()).sum()), rtol=1e-9, atol=1e-11
    )
    torch.testing.assert_close(log_probs(policy, BATCH, sampling), plain.detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("biased", [False, True])
def test_a_language_models_losses_are_those_of_the_definition(biased: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(likelihood, "_AT_ONCE", 7)
    generator = torch.Generator().manual_seed(0)
    states, weight, bias = (
        torch.randn(*shape, generator=generator, dtype=torch.double, requires_grad=True)
        for shape in ((20, 5), (11, 5), (11,))
    )
    targets = torch.randint(11, (20,), generator=generator)
    used = bias if biased else None
    found = likelihood.summed_losses(states, weight, used, targets)
    logits = torch.nn.functional.linear(states, weight, used)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    torch.testing.assert_close(found.loss, expected)
    entropy = torch.distributions.Categorical(logits=logits.detach()).entropy().sum()
    torch.testing.assert_close(found.entropy, entropy)
    assert (found.right, found.tokens) == ((logits.argmax(-1) == targets).sum(), 20)
    wanted = [states, weight, *([bias] if biased else [])]
    mine, theirs = (torch.autograd.grad(0.3 * loss, wanted) for loss in (found.loss, expected))
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_language_models_loss_of_nothing_is_zero_and_has_a_gradient() -> None:
    states, weight = torch.zeros(0, 4, requires_grad=True), torch.ones(9, 4, requires_grad=True)
    found = likelihood.summed_losses(states, weight, None, torch.zeros(0, dtype=torch.long))
    found.loss.backward()
    assert (float(found.loss.detach()), float(weight.grad.abs().sum())) == (0.0, 0.0)  # type: ignore[union-attr]


def test_a_head_that_is_not_one_matrix_goes_the_plain_way() -> None:
    policy = tiny_policy(tiny_tokenizer())
    policy.config.final_logit_softcapping = 5.0
    found = log_probs(policy, BATCH, Sampling())
    logits = policy(BATCH.tokens[:1]).logits[0, 2:-1]
    expected = (5 * torch.tanh(logits / 5)).log_softmax(-1).gather(1, BATCH.responses[0, :, None])[:, 0]
    torch.testing.assert_close(found[0], expected.detach(), rtol=1e-4, atol=1e-5)


def test_bf16_differs_from_fp32_by_rounding_only() -> None:
    policy = tiny_policy(tiny_tokenizer())
    exact = log_probs(policy, BATCH, Sampling())
    with torch.autocast("cpu", torch.bfloat16):
        states = response_states(trunk(policy), BATCH)
        rough, _ = token_likelihood(policy, states, BATCH, Sampling())
        with torch.no_grad():
            calm, _ = token_likelihood(policy, states, BATCH, Sampling())
    assert rough.dtype == torch.float32
    assert torch.equal(rough.detach(), calm), "with and without gradients it is one function"
    assert 0 < (rough - exact).abs().max() < 0.3
    rough.sum().backward()
    assert policy.transformer.wte.weight.grad.dtype == torch.float32


def test_a_confident_token_keeps_its_gradient_in_bf16() -> None:
    """1 - p is not taken from a p that bf16 has rounded to 1."""
    states, weight = torch.ones(4, 8), torch.zeros(20, 8)
    weight[3] = 1.2  # p is about 0.999
    weight.requires_grad_()
    targets, times = torch.full((4,), 3), torch.zeros(4, dtype=torch.long)

    def gradient(bf16: bool) -> Tensor:
        weight.grad = None
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = likelihood._TokenLikelihood.apply(states, weight, None, targets, times, Sampling())
        found[0].sum().backward()
        assert weight.grad is not None
        return weight.grad.clone()

    exact = gradient(False)
    assert float((gradient(True) - exact).norm() / exact.norm()) < 0.1


def test_logits_far_from_zero_keep_their_digits_in_bf16() -> None:
    """GPT-2's lie near -70, where bf16 has steps of 0.5: a head in bf16 is wrong by 0.1 and more."""
    generator = torch.Generator().manual_seed(0)
    states, weight = torch.randn(64, 9, generator=generator), torch.randn(50, 9, generator=generator)
    states[:, 0], weight[:, 0] = 1.0, -70.0
    targets, times = torch.randint(50, (64,), generator=generator), torch.zeros(64, dtype=torch.long)
    exact = (states.double() @ weight.double().t()).log_softmax(-1).gather(1, targets[:, None])[:, 0]
    with torch.autocast("cpu", torch.bfloat16):
        assert (states @ weight.t()).dtype == torch.bfloat16, "autocast is on"
        found = likelihood._TokenLikelihood.apply(states, weight, None, targets, times, Sampling())[0]
        calm = likelihood._likelihood(states, weight, None, targets, times, Sampling(), keep=False)[0]
        loss = likelihood.summed_losses(states, weight, None, targets).loss
    assert float((found - exact).abs().max()) < 1e-4
    assert torch.equal(found, calm)
    assert float(loss.detach()) == pytest.approx(-float(exact.sum()), rel=1e-6)
