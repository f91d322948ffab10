"""Adapters (LoRA, arXiv 2106.09685) and the frozen weights beneath them."""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from peft import PeftModel
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

_AT_ONCE = 1024  # rows of a matrix that are compared at a time


def store_in_bf16(model: Any) -> dict[str, Tensor]:
    """Keep in bf16 the frozen weights that autocast would round to it for each product anyway: half the memory.

    What is computed under autocast stays the same number by number. Gives the weights that bf16 does not hold to the
    last digit, by name, where they lay.
    """
    # The output head is multiplied on its own, a critic's in its own precision.
    heads = {model.get_output_embeddings()}
    for module in model.modules():
        if isinstance(module, ModulesToSaveWrapper):
            heads |= set(module.modules())
    whole: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear | Conv1D) or module in heads:
            continue
        own = dict(module.named_parameters(name, recurse=False))
        if any(p.dtype != torch.float32 or p.requires_grad for p in own.values()):
            continue
        whole |= {each: p.data for each, p in own.items() if _loses_digits(p)}
        for p in own.values():
            p.data = p.data.to(torch.bfloat16)
    return whole


def _loses_digits(tensor: Tensor) -> bool:
    if tensor.is_meta:
        return False
    return any(not torch.equal(part, part.to(torch.bfloat16).float()) for part in tensor.split(_AT_ONCE))


def freeze_in_bf16(model: Any, keep: bool) -> None:
    """Store what lies under an adapter in bf16. With `keep`, `merged` will still find its last digits."""
    whole = store_in_bf16(model)
    model.whole_weights = whole if keep else {}  # in a dict, so that they stay in main memory


def merged(model: PeftModel) -> PreTrainedModel:
    """A copy in fp32 and in main memory with the adapter merged in; the model itself goes on as it is.

    In bf16 most of what an adapter adds would be rounded away, and its device may have no room for a second model.
    """
    whole: Mapping[str, Tensor] = getattr(model, "whole_weights", {})
    known: dict[int, Any] = {id(p): _copied(p, whole.get(name, p)) for name, p in model.named_parameters()}
    known |= {id(buffer): _copied(buffer, buffer) for buffer in model.buffers()}
    found: PreTrainedModel = copy.deepcopy(model, {**known, id(whole): {}}).merge_and_unload()
    return found


def _copied(tensor: Tensor, source: Tensor) -> Tensor:
    small = source.is_floating_point() and source.element_size() < 4
    data = source.detach().to("cpu", torch.float32 if small else source.dtype, copy=True)
    return nn.Parameter(data, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else data
