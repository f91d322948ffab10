"""The parts of a language model: its trunk, its head, and the logits that the head computes from hidden states."""

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def language_model(model: Any) -> PreTrainedModel:
    """Return the model inside an adapter's wrapper, if there is one. LoRA's layers stay in it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def trunk(model: Any) -> nn.Module:
    """Return a language model or classifier without its head."""
    inner = language_model(model)
    body: nn.Module = getattr(inner, inner.base_model_prefix)
    return body


def text_config(model: Any) -> Any:
    """Return the configuration of a model's language part, which a multimodal model keeps separate."""
    return language_model(model).config.get_text_config()


def positions(model: Any) -> int:
    """Return how many tokens a model has positions for, or `sys.maxsize` if it sets no limit."""
    return getattr(text_config(model), "max_position_embeddings", None) or sys.maxsize


def cache_argument(body: nn.Module) -> str:
    """Return the name of a trunk's argument for the key-value cache, which transformers 5.24 renamed."""
    return "cache" if "cache" in inspect.signature(body.forward).parameters else "past_key_values"


@torch.no_grad()
def looks_ahead(model: Any) -> bool:
    """Return whether the first token's hidden state depends on the second token, as in an encoder."""
    training = model.training
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
    states = trunk(model.eval())(input_ids=ids).last_hidden_state[:, 0]
    model.train(training)
    return not torch.allclose(states[0], states[1], atol=1e-6)


def matrix_head(model: Any) -> nn.Linear | None:
    """Return a language model's head if it is one matrix and its output is the logits, else None."""
    head = language_model(model).get_output_embeddings()
    return head if type(head) is nn.Linear and _logit_scaling(model) == (1, 1, 0) else None


def _logit_scaling(model: Any) -> tuple[float, float, float]:
    """Return the factor, divisor and soft cap that a family applies to its head's output; a cap of 0 is none."""
    config = text_config(model)
    usual = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": 0.0}
    factor, divisor, cap = (getattr(config, name, None) or value for name, value in usual.items())
    return factor, divisor, cap


def head_logits(model: Any, states: Tensor) -> Tensor:
    """Return logits (tokens, vocabulary) of the trunk's hidden states (tokens, hidden), in fp32 or wider."""
    logits = head_output(language_model(model).get_output_embeddings(), states)
    factor, divisor, cap = _logit_scaling(model)
    if factor != 1 or divisor != 1:
        logits = logits * factor / divisor
    return cap * torch.tanh(logits / cap) if cap else logits


def head_output(head: Any, states: Tensor) -> Tensor:
    """Return the output of the head alone for hidden states (tokens, hidden), in fp32 or wider."""
    if type(head) is nn.Linear:
        return project(states, head.weight, head.bias)
    with torch.autocast(states.device.type, enabled=False):
        logits: Tensor = head.forward(states.to(next(head.parameters()).dtype))
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def project(states: Tensor, weight: Tensor, bias: Tensor | None, out: Tensor | None = None) -> Tensor:
    """Return a linear head's output (tokens, features) in fp32 or wider, even under autocast; write to `out` if given.

    GPT-2's logits are -35 to -110, where bf16 has steps of 0.25 to 0.5. With such rounding PPO's ratios would be noise
    (arXiv 2506.13585). On a GPU the factors may be bf16, because the sums are kept in fp32.
    """
    kind, wide = states.device.type, torch.promote_types(states.dtype, torch.float32)
    narrow = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else wide
    with torch.autocast(kind, enabled=False):
        if kind == "cuda" and narrow != wide and not torch.is_grad_enabled():
            found = torch.mm(states.to(narrow), weight.to(narrow).t(), out_dtype=wide)
            return found if bias is None else found.add_(bias)
        states, weight = states.to(wide), weight.to(wide)
        if bias is None:
            return torch.mm(states, weight.t(), out=out)
        return torch.addmm(bias.to(wide), states, weight.t(), out=out)
