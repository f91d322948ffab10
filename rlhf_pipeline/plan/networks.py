"""Count a network without its weights: its parameters, and what it keeps for the backward pass.

It is built from its configuration on the meta device and run under PyTorch's FakeTensorMode, where tensors have shapes
and no storage: a model of 7 B parameters takes seconds, of whatever family transformers knows.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.cache_utils import DynamicCache
from transformers.pytorch_utils import Conv1D

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.networks import cache_argument, language_model, text_config, trunk
from rlhf_pipeline.models.precision import fuse_gelu, store_in_bf16


@dataclass(frozen=True)
class Network:
    """Counts of a network; numbers of parameters, unless they say bytes."""

    parameters: int
    trained: int
    layers: int
    width: int  # of its hidden states
    vocabulary: int
    head: int  # the output head, which may be the input embeddings; 0 of a critic
    head_trained: bool
    matrices: int  # those that each token is multiplied by, without the head
    matrices_trained: int
    halved: int  # frozen under an adapter, and stored in bf16
    attention: int  # layers x heads x width of a head
    cache: int  # bytes of keys and values a token, in fp32
    kept: int  # bytes that a row of the counted length keeps for the backward pass, without the head
    copies: int  # bytes kept however many the rows: autocast's bf16 copies of the weights


def count(config: Any, tokens: int, bf16: bool, lora: Any = None, critic: bool = False) -> Network:
    """Count a policy, or a critic with a network of its own, as PPO makes them of a configuration.

    `tokens`: the width of a forward pass. `lora`: peft's LoraConfig, or None. Raises `UserError` if the configuration
    is not that of a causal language model with attention.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping or not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"{type(config).__name__} is not the configuration of a causal language model with attention, and only "
            "those can be planned; give another policy.path=."
        )
    config, lora = copy.deepcopy((config, lora))
    if critic:
        config.num_labels = 1
        if lora is not None:
            lora.task_type, lora.modules_to_save = "SEQ_CLS", ["score"]
    kind = AutoModelForSequenceClassification if critic else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(config, dtype=torch.float32, trust_remote_code=False)
        model = model if lora is None else get_peft_model(model, lora)
    fuse_gelu(model)
    model.eval()  # PPO trains without dropout
    if bf16 and lora is not None:
        store_in_bf16(model)
    body, text, head = trunk(model), text_config(model), language_model(model).get_output_embeddings()
    matrices = [module.weight for module in body.modules() if isinstance(module, nn.Linear | Conv1D)]
    layers, heads, width = int(text.num_hidden_layers), int(text.num_attention_heads), int(text.hidden_size)
    with FakeTensorMode():
        every = [*body.named_parameters(), *body.named_buffers()]
        weights = {name: torch.empty(w.shape, dtype=w.dtype, requires_grad=w.requires_grad) for name, w in every}
        one, two = (_kept(body, weights, rows, tokens, bf16) for rows in (1, 2))
        cache = _cache(body, weights, tokens)
    return Network(
        parameters=_size(model.parameters()),
        trained=_size(p for p in model.parameters() if p.requires_grad),
        layers=layers,
        width=width,
        vocabulary=language_model(model).get_input_embeddings().weight.shape[0],
        head=0 if head is None else head.weight.numel(),
        head_trained=head is not None and head.weight.requires_grad,
        matrices=_size(matrices),
        matrices_trained=_size(m for m in matrices if m.requires_grad),
        halved=_size(p for p in model.parameters() if p.dtype == torch.bfloat16),
        attention=layers * heads * (getattr(text, "head_dim", None) or width // heads),
        cache=cache // tokens,
        kept=two - one,
        copies=2 * one - two,
    )


def count_classifier(config: Any) -> int:
    """The number of parameters of a classifier that serves as the reward."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return _size(model.parameters())


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _kept(body: nn.Module, weights: dict[str, Tensor], rows: int, tokens: int, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward pass over (rows, tokens), without the weights themselves."""
    own = {weight.untyped_storage()._cdata for weight in weights.values()}
    found: dict[int, Any] = {}  # holds the storages, or their numbers would be given away again

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            found[storage._cdata] = storage
        return tensor

    given = {"input_ids": torch.zeros(rows, tokens, dtype=torch.long), "use_cache": False}
    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=bf16),
    ):
        functional_call(body, weights, (), given)
    return sum(storage.nbytes() for storage in found.values())


@torch.no_grad()
def _cache(body: Any, weights: dict[str, Tensor], tokens: int) -> int:
    """Bytes of keys and values after one row of tokens."""
    cache = DynamicCache(config=body.config)
    given = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "use_cache": True, cache_argument(body): cache}
    functional_call(body, weights, (), given)
    return sum(part.nbytes for layer in cache.layers for part in (layer.keys, layer.values))
