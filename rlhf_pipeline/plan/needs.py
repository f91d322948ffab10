"""What a process of PPO needs under each launch: bytes by part, FLOPs and seconds of an update.

A network is built from its configuration without storage, so a model of 7 B parameters takes seconds. What is sharded
follows ZeRO (arXiv 1910.02054). A token's forward pass takes 2 FLOPs a parameter and 4 x layers x width x length for
attention, its backward pass twice as many (PaLM, arXiv 2204.02311, app. B). Decoding is bound by memory: each token
reads the weights and the cache (arXiv 2211.05102, sec. 2).
"""

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.networks import language_model, text_config, trunk
from rlhf_pipeline.models.precision import fuse_gelu, store_in_bf16
from rlhf_pipeline.plan.devices import LAUNCHES, NETWORK, NODE, Device
from rlhf_pipeline.processes import ZERO

_FP32, _BF16 = 4, 2  # bytes a number
# Seconds to launch a layer's kernels from Python, below which no small model's decoding falls. Published figures of
# GPT-2's 12 layers in transformers are 3.8 ms a token (RTX 5090) to 12 (V100).
_KERNELS = 0.6e-3
_USABLE = 0.92  # of a device's memory: the allocator's blocks leave gaps


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
    frozen: int  # of the matrices, those under an adapter: stored in bf16 where that is computed in
    attention: int  # layers x heads x width of a head
    cache: int  # numbers that the key-value cache holds a token
    kept: int  # bytes that a row keeps for the backward pass, without the head


@dataclass(frozen=True)
class Work:
    """What one process does in an update."""

    rows: int  # responses
    micro: int  # rows of a forward pass that learns
    minibatches: int  # optimizer steps an epoch
    epochs: int
    at_once: int  # rows rolled out together
    prompt: int  # tokens, the longest
    response: int  # tokens, the longest
    length: float  # tokens of a prompt with its response, on average
    bf16: bool
    checkpointing: bool


class Job(NamedTuple):
    """PPO's networks and its work."""

    policy: Network
    critic: Network | None  # None: a value head on the policy's trunk
    adapter: bool  # so that the reference is the policy with its adapter off
    reward: int  # parameters
    work: Work

    @property
    def networks(self) -> list[Network]:
        """The networks that learn."""
        return [self.policy, self.critic] if self.critic else [self.policy]

    @property
    def value_head(self) -> int:
        """Parameters of a shared critic: a row of weights and a bias."""
        return 0 if self.critic else self.policy.width + 1

    @property
    def trained(self) -> int:
        """Parameters that the optimizer moves."""
        return self.value_head + sum(network.trained for network in self.networks)

    @property
    def reference_bytes(self) -> int:
        """A frozen copy of the policy, its matrices in bf16 under autocast."""
        return 0 if self.adapter else _FP32 * self.policy.parameters - _BF16 * self.policy.matrices * self.work.bf16


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
    copies = _BF16 * _size(m for m in matrices if m.dtype == torch.float32) if bf16 else 0  # autocast's
    layers, heads, width = int(text.num_hidden_layers), int(text.num_attention_heads), int(text.hidden_size)
    head_width = getattr(text, "head_dim", None) or width // heads
    return Network(
        parameters=_size(model.parameters()),
        trained=_size(p for p in model.parameters() if p.requires_grad),
        layers=layers,
        width=width,
        vocabulary=language_model(model).get_input_embeddings().weight.shape[0],
        head=0 if head is None else head.weight.numel(),
        head_trained=head is not None and head.weight.requires_grad,
        matrices=_size(matrices),
        frozen=_size(m for m in matrices if not m.requires_grad),
        attention=layers * heads * head_width,
        cache=2 * layers * (getattr(text, "num_key_value_heads", None) or heads) * head_width,
        kept=_kept(body, tokens, bf16) - copies,  # of which there is one, whatever the rows
    )


def count_classifier(config: Any) -> int:
    """The number of parameters of a classifier that serves as the reward."""
    with torch.device("meta"):
        model = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32, trust_remote_code=False)
    return _size(model.parameters())


def _size(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _kept(body: nn.Module, tokens: int, bf16: bool) -> int:
    """Bytes that autograd keeps of a forward pass over one row, without the weights themselves."""
    found: dict[int, Any] = {}  # holds the storages, or their numbers would be given away again

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        every = [*body.named_parameters(), *body.named_buffers()]
        weights = {name: torch.empty(w.shape, dtype=w.dtype, requires_grad=w.requires_grad) for name, w in every}
        given = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "use_cache": False}
        with (
            torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            functional_call(body, weights, (), given)
    for weight in weights.values():
        found.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in found.values())


def launches(processes: int, job: Job, device: Device, mfu: float) -> list[dict[str, Any]]:
    """The needs of every launch on so many devices, the simplest first."""
    names = LAUNCHES[1:] if processes > 1 else LAUNCHES[:1]
    return [needs(name, processes, job, device, mfu) for name in names]


def needs(launch: str, processes: int, job: Job, device: Device, mfu: float) -> dict[str, Any]:
    """What a process takes under one launch: bytes at its fullest moment, seconds and FLOPs of an update, by part.

    `mfu`: the share of the device's FLOP/s that a forward and backward pass reaches.
    """
    every = moments(launch, processes, job)
    moment = max(every, key=lambda name: sum(every[name].values()))
    parts = {"process": device.base, **every[moment], "allocator": device.slack * sum(every[moment].values())}
    total, taken, counted = sum(parts.values()), seconds(launch, processes, job, device, mfu), sum(flops(job).values())
    return {
        "launch": launch, "processes": processes, "moment": moment, "bytes": total,
        "parts": {part: size for part, size in parts.items() if size}, "fits": total <= _USABLE * device.memory,
        "seconds": {part: value for part, value in taken.items() if value}, "update_seconds": sum(taken.values()),
        "update_flops": counted,
    }  # fmt: skip


def moments(launch: str, processes: int, job: Job) -> dict[str, dict[str, float]]:
    """Bytes by part at the moments that can be the fullest, once Adam's states are there."""
    work, policy, networks = job.work, job.policy, job.networks
    number, zero2, zero3 = _BF16 if work.bf16 else _FP32, launch == "zero2", launch == "zero3"
    every = job.value_head + sum(network.parameters for network in networks)
    halved = sum(network.frozen for network in networks) if work.bf16 and not (zero2 or zero3) else 0
    learnt = _FP32 * job.trained / (processes if zero2 or zero3 else 1)  # of the gradients, or a copy of the weights
    always = {
        "weights": (_FP32 * every - _BF16 * halved) / (processes if zero3 else 1),
        "reference": job.reference_bytes,
        "reward": _FP32 * job.reward,
        "Adam": 2 * learnt,
        "master": learnt * zero2,  # it moves a copy of its share, then the weights by it
        "buckets": _FP32 * (ZERO["reduce_bucket_size"] if zero2 or zero3 else job.trained * (launch == "ddp")),
    }
    rows, several = min(work.at_once, work.rows), work.rows // work.minibatches > work.micro
    copies = work.bf16 * sum(_BF16 * (n.matrices - n.frozen) / (n.layers if zero3 else 1) for n in networks)
    gathered = _FP32 * min(every, ZERO["stage3_max_live_parameters"]) * zero3
    head = _FP32 * policy.head * policy.head_trained  # its gradient, beside that of the embeddings that it is tied to
    kept: float = sum(network.kept + _FP32 * work.response * network.width for network in networks)
    if work.checkpointing:  # it keeps each layer's input, and one layer
        kept -= sum(network.kept * (1 - 1 / network.layers) for network in networks)
        kept += sum(_FP32 * (work.prompt + work.response) * network.layers * network.width for network in networks)
    return {
        "rollout": {  # its last step: the cache and one layer of it again, three tensors of probabilities
            **always,
            "KV cache": policy.cache * number * rows * (work.prompt + work.response) * (1 + 1 / policy.layers),
            "logits": rows * policy.vocabulary * (3 * _FP32 + _BF16 * work.bf16),
            "bf16 copies": copies,
            "gathered": _FP32 * every * (1 - 1 / processes) * zero3,
        },
        "update: begin": {
            **always,
            "gradients": head + learnt * several,
            "activations": work.micro * kept,
            "logits": work.micro * work.response * policy.vocabulary * number,
            "bf16 copies": copies + 2 * _BF16 * policy.head * work.bf16,
            "gathered": gathered,
        },
        "update: end": {**always, "gradients": learnt + head * (1 + several), "gathered": gathered},
    }


def flops(job: Job) -> dict[str, float]:
    """FLOPs of an update in one process, by what they are for. The head sees only what predicts a response."""
    work, policy = job.work, job.policy
    tokens, head = work.rows * work.length, 2.0 * policy.head * work.rows * work.response
    asked = tokens * _forward(policy, work) + head
    every = tokens * sum(_forward(network, work) for network in job.networks) + head
    # A frozen matrix has no gradient of its own.
    backward = 2 * every - tokens * 2 * sum(n.frozen for n in job.networks) - head * (not policy.head_trained)
    return {
        "rollout": asked,
        "scores": every + asked + 2.0 * job.reward * tokens,  # log p and values, reference, reward
        "update": work.epochs * (every * (1 + work.checkpointing) + backward),
    }


def _forward(network: Network, work: Work) -> float:
    """FLOPs a token, without the head."""
    return 2 * network.matrices + 4 * network.attention * work.length


def seconds(launch: str, processes: int, job: Job, device: Device, mfu: float) -> dict[str, float]:
    """Seconds of an update by what they are for; nothing of what is sent is hidden behind the compute."""
    work, policy, counted = job.work, job.policy, flops(job)
    number, rate = (_BF16, mfu * device.bf16) if work.bf16 else (_FP32, mfu * device.fp32)
    # A token's step lasts as long as its bytes take, its products, or the launch of its kernels. Attention reads the
    # cache, which is read and written as it grows.
    rows = min(work.at_once, work.rows)
    moved = number * (policy.matrices + policy.head + 3 * policy.cache * rows * (work.prompt + work.response / 2))
    products = rows * (_forward(policy, work) + 2 * policy.head)
    step = max(moved / device.bandwidth, products / rate, policy.layers * _KERNELS)
    prompts = _forward(policy, work) * work.rows * work.prompt / rate
    every = job.value_head + sum(network.parameters for network in job.networks)
    steps = work.epochs * work.minibatches
    passes = steps * math.ceil(work.rows / work.minibatches / work.micro)
    sent = {  # numbers
        "single": 0,
        "ddp": 2 * job.trained * steps,  # reduced, and gathered
        "zero2": job.trained * (passes + steps),  # reduced in each pass; the weights that were moved, gathered
        # The weights are gathered once to sample, and in each pass that learns.
        "zero3": job.trained * passes + every * (1 + passes * (2 + work.checkpointing)),
    }[launch]
    link = device.link if processes <= NODE else min(device.link, NETWORK)
    return {
        "rollout": prompts + math.ceil(work.rows / work.at_once) * work.response * step,
        "log p, reference, reward": counted["scores"] / rate,
        "update": counted["update"] / rate,
        "between processes": _FP32 * sent * (processes - 1) / processes / link,
    }
