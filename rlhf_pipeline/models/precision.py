"""Number formats: when bf16 is faster, and what is computed and stored in it. Fast kernels for attention and GELU."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.activations import ACT2FN, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.pytorch_utils import Conv1D


def native_bf16() -> bool:
    """Return whether this machine multiplies bf16 natively: CUDA from Ampere on, CPUs with AMX or AVX512-BF16.

    Elsewhere bf16 is emulated, and slower than fp32.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())


def choose_bf16(asked: bool | str | None) -> tuple[bool, str]:
    """Turn `True`, `False` or `auto` (also None) into whether bf16 is used, and a line that says why."""
    native = native_bf16()
    if asked in ("auto", None):
        chosen, why = native, f"this machine {'multiplies bf16 natively' if native else 'has no native bf16'}"
    else:
        chosen = bool(asked)
        why = "as asked" + ("; this machine only emulates it, so it is slow" if chosen and not native else "")
    return chosen, f"{'bf16 with fp32 master weights' if chosen else 'fp32'} ({why})"


def autocast(bf16: bool, device: torch.device) -> AbstractContextManager[None]:
    """A context that multiplies matrices in bf16 and keeps the weights as they are; without `bf16` it does nothing."""
    context: AbstractContextManager[None] = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    return context


def store_in_bf16(model: Any) -> None:
    """Store frozen weights in bf16 if autocast would round them for each product anyway. This halves their memory.

    Results under autocast stay exactly the same.
    """
    # Heads are left out: they are multiplied outside autocast or in their own precision.
    heads = {model.get_output_embeddings()}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            heads |= set(module.modules())
    for module in model.modules():
        own = list(module.parameters(recurse=False))
        matrix = isinstance(module, nn.Linear | Conv1D) and module not in heads
        if matrix and all(p.dtype == torch.float32 and not p.requires_grad for p in own):
            for p in own:
                p.data = p.data.to(torch.bfloat16)


def fuse_gelu(model: nn.Module) -> None:
    """Replace GPT-2's op-by-op GELU, `gelu_new`, by `gelu_pytorch_tanh`.

    Both compute the same formula. The second is a single kernel, which keeps one activation for the backward pass
    instead of six. The configuration does not change.
    """
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *more: Any,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' sdpa attention, except that whole sequences in bf16 on a CPU are computed in fp32.

    On a CPU with AMX, the backward pass of torch's flash attention took four times as long in bf16 as in fp32. `query`,
    `key` and `value` are (batch, heads, time, features). A single token of a generation stays in bf16: fp32 would
    convert the whole cache for it.
    """
    kind = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
    if query.device.type != "cpu" or kind != torch.bfloat16 or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *more, **options)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.float()
    with torch.autocast("cpu", enabled=False):  # autocast would convert to bf16 again
        found, _ = sdpa_attention_forward(
            module, query.float(), key.float(), value.float(), attention_mask, *more, **options
        )
    return found.to(kind), None


AttentionInterface.register("sdpa", attention)  # for all models, because it is not known here which are trained
