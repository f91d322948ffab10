"""Attention in bf16 on a CPU: computed in fp32, with the numbers and gradients of its definition."""

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import rlhf_pipeline.models.precision  # noqa: F401  (registers it)


@pytest.mark.parametrize("mask", [None, "true where seen", "added"])
def test_attention_in_bf16_is_exact_but_for_the_rounding_of_its_inputs(mask: str | None) -> None:
    torch.manual_seed(0)
    layer = nn.Module()
    layer.is_causal = True
    inputs = [torch.randn(2, 3, 9, 8).bfloat16().requires_grad_() for _ in range(3)]
    seen = torch.ones(9, 9).tril().bool()
    added = torch.zeros(9, 9).masked_fill(~seen, -1e9)
    given = {"true where seen": seen[None, None], "added": added.bfloat16()[None, None]}.get(mask or "")
    with torch.autocast("cpu", torch.bfloat16):
        found, _ = ALL_ATTENTION_FUNCTIONS["sdpa"](layer, *inputs, given, scaling=8**-0.5)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    scores = exact[0] @ exact[1].transpose(-1, -2) * 8**-0.5 + added.double()
    expected = (scores.softmax(-1) @ exact[2]).transpose(1, 2)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), expected, rtol=2**-8, atol=1e-6)  # one rounding
    slope = torch.randn_like(expected).bfloat16()
    by_own = torch.autograd.grad(found, inputs, slope)
    by_definition = torch.autograd.grad(expected, exact, slope.double())
    for own, definition in zip(by_own, by_definition, strict=True):
        torch.testing.assert_close(own.double(), definition, rtol=2**-8, atol=1e-5)


def test_models_take_it_and_a_single_token_stays_in_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []
    plain = nn.functional.scaled_dot_product_attention

    def watched(query: torch.Tensor, *args: object, **options: object) -> torch.Tensor:
        autocast = torch.is_autocast_enabled("cpu")
        kinds.append((query.shape[2], torch.get_autocast_dtype("cpu") if autocast else query.dtype))
        return plain(query, *args, **options)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", watched)
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 20}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=2, do_sample=False, eos_token_id=None)
    assert kinds == [(3, torch.float32), (1, torch.bfloat16)]
