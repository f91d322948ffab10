"""A network that is not there: its parameters, and what it keeps for the backward pass, counted without its weights.

It is built from its configuration on the meta device, and run under PyTorch's FakeTensorMode, where tensors have
shapes and no storage: a model of 7 B parameters takes seconds, of whatever family transformers knows.
"""

import copy
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

from rlhf_pipeline.adapters import store_in_bf16
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.networks import cache_argument, language_model, trunk
from rlhf_pipeline.precision import fuse_gelu

_FP32 = 4  # bytes


@dataclass(frozen=True)
class Network:
    """What a network's parts count. Numbers are of parameters, unless they say bytes."""

    parameters: int
    trained: int
    layers: int
    width: int  # of its hidden states
    vocabulary: int
    head: int  # of the output head, as it is multiplied; 0 of a critic
    head_trained: bool
    tied: bool  # the output head is the input embeddings
    matrices: int  # those that each token is multiplied by, the head apart
    matrices_trained: int
    halved: int  # those that are kept in bf16, under an adapter
    attention: int  # layers x heads x width of a head
    largest: int  # of its largest layer, or its embeddings
    cache: int  # bytes of keys and values a token, in fp32
    kept: int  # bytes that a row of the counted length keeps for the backward pass of everything but the head
    copies: int  # bytes kept whatever the rows: under autocast the weights in bf16


def count_policy(config: Any, tokens: int, bf16: bool, lora: Any = None) -> Network:
    """A causal language model of a configuration, with an adapter where `lora` (peft's LoraConfig) is given.

    `tokens` is the width of a forward pass. A configuration of something else is a `UserError`.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping or not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"{type(config).__name__} is not the configuration of a causal language model with attention, and no other "
            "is counted; give policy.path= another."
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        if lora is not None:
            model = get_peft_model(model, copy.deepcopy(lora))
    return _count(model, tokens, bf16, lora is not None)


def count_critic(config: Any, tokens: int, bf16: bool, lora: Any = None) -> Network:
    """A critic of its own: the trunk of such a model under a head of one number, with an adapter if the policy has one.

    As `rlhf_pipeline.ppo.actor_critic.separate_critic` makes it.
    """
    config = copy.deepcopy(config)
    config.num_labels = 1
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
        if lora is not None:
            own = copy.deepcopy(lora)
            own.task_type, own.modules_to_save = "SEQ_CLS", ["score"]
            model = get_peft_model(model, own)
    return _count(model, tokens, bf16, lora is not None)


def count_classifier(config: Any) -> int:
    """The parameters of a classifier, as rewards are."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    return _size(model.parameters())


def _count(model: Any, tokens: int, bf16: bool, adapted: bool) -> Network:
    inner, body = language_model(model), trunk(model)
    config = inner.config.get_text_config()
    head, embeddings = inner.get_output_embeddings(), inner.get_input_embeddings().weight
    modules = [m for m in body.modules() if isinstance(m, nn.Linear | Conv1D)]
    matrices = [m.weight for m in modules]
    layers = int(config.num_hidden_layers)
    heads, width = int(config.num_attention_heads), int(config.hidden_size)
    sizes = [_size(block.parameters()) for block in _blocks(body, layers)]
    numbers = {
        "parameters": _size(model.parameters()),
        "trained": _size(p for p in model.parameters() if p.requires_grad),
        "head": 0 if head is None else head.weight.numel(),
        "head_trained": head is not None and head.weight.requires_grad,
        "tied": head is not None and head.weight is embeddings,
        "matrices": _size(matrices),
        "matrices_trained": _size(m for m in matrices if m.requires_grad),
        "attention": layers * heads * (getattr(config, "head_dim", None) or width // heads),
        "largest": max([embeddings.numel(), *sizes]),
    }
    fuse_gelu(model)
    model.eval()  # the trainer switches dropout off
    if bf16 and adapted:
        store_in_bf16(model)
    numbers["halved"] = _size(p for p in model.parameters() if p.dtype == torch.bfloat16)
    with FakeTensorMode():
        _give_fake_weights(model)
        one, two = (_kept(body, rows, tokens, bf16) for rows in (1, 2))
        cache = _cache(body, tokens)
    return Network(
        layers=layers, width=width, vocabulary=embeddings.shape[0], cache=cache // tokens,
        kept=two - one, copies=2 * one - two, **numbers,
    )  # fmt: skip


def _size(parameters: Any) -> int:
    return sum(p.numel() for p in parameters)


def _blocks(body: nn.Module, layers: int) -> list[nn.Module]:
    """The layers of a trunk: the list of modules that is as long as the configuration says."""
    lists = [m for m in body.modules() if isinstance(m, nn.ModuleList) and len(m) == layers]
    return list(lists[0]) if lists else [body]


def _give_fake_weights(model: nn.Module) -> None:
    """Move a model from the meta device to a CPU of which only shapes are known; tied weights stay tied."""
    seen: dict[int, Any] = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, tensor in table.items():
                if tensor is None:
                    continue
                if id(tensor) not in seen:
                    fake = torch.empty(tensor.shape, dtype=tensor.dtype)
                    own = isinstance(tensor, nn.Parameter)
                    seen[id(tensor)] = tensor, nn.Parameter(fake, tensor.requires_grad) if own else fake
                table[name] = seen[id(tensor)][1]


def _kept(body: nn.Module, rows: int, tokens: int, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward pass over (rows, tokens), the weights themselves apart."""
    own = {p.untyped_storage()._cdata for p in body.parameters()}
    found: dict[int, Any] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage  # held, or its number would be given to another
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        # Held until it is counted: what is kept dies with the graph.
        states = body(input_ids=torch.zeros(rows, tokens, dtype=torch.long), use_cache=False).last_hidden_state
    return sum(storage.nbytes() for storage in found.values()) + 0 * states.dim()


@torch.no_grad()
def _cache(body: Any, tokens: int) -> int:
    """Bytes of keys and values after one row of tokens."""
    cache = DynamicCache(config=body.config)
    body(input_ids=torch.zeros(1, tokens, dtype=torch.long), use_cache=True, **{cache_argument(body): cache})
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
