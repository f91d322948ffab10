"""Number formats: where bf16 pays, the context that computes in it, and GELU in one kernel."""

from contextlib import AbstractContextManager

import torch
from torch import nn
from transformers.activations import ACT2FN, NewGELUActivation


def native_bf16() -> bool:
    """Whether this machine multiplies bf16 itself: CUDA from Ampere on, CPUs with AMX or AVX512-BF16.

    Elsewhere bf16 is emulated, and slower than fp32.
    """
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    cpu = torch.cpu
    return bool(cpu._is_amx_tile_supported() or cpu._is_avx512_bf16_supported())


def choose_bf16(asked: bool | str | None) -> tuple[bool, str]:
    """`True`, `False` or `auto` (also None) to whether bf16 is used, and a line that says so."""
    native = native_bf16()
    chosen = native if asked in ("auto", None) else bool(asked)
    form = "bf16 with fp32 master weights" if chosen else "fp32"
    if asked in ("auto", None):
        why = "this machine multiplies bf16 natively" if native else "this machine has no native bf16"
    else:
        why = "as asked" + ("; this machine only emulates it, so it is slow" if chosen and not native else "")
    return chosen, f"{form} ({why})"


def autocast(bf16: bool, device: torch.device) -> AbstractContextManager[None]:
    """A context that multiplies matrices in bf16 and keeps the weights as they are; with `bf16` off, nothing."""
    context: AbstractContextManager[None] = torch.autocast(device.type, torch.bfloat16, enabled=bf16)
    return context


def fuse_gelu(model: nn.Module) -> int:
    """Put GPT-2's GELU in the place of its op-by-op twin; gives how many were replaced.

    `gelu_new` and `gelu_pytorch_tanh` are one formula, the second in a single kernel that keeps one activation
    for the backward pass in place of six. The configuration is left as it is.
    """
    count = 0
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, ACT2FN["gelu_pytorch_tanh"])
                count += 1
    return count
