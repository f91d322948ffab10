"""Estimate what a PPO process needs under each launch, within about 15 %: bytes, FLOPs and seconds per update.

A network is built from its configuration without storage, so a model of 7 B parameters takes seconds. Sharding follows
ZeRO (arXiv 1910.02054). A token's forward pass takes 2 FLOPs per parameter, and 4 x layers x width x length for
attention. Its backward pass takes twice as many (PaLM, arXiv 2204.02311, app. B). Decoding is memory-bound: each token
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
from rlhf_pipeline.processes import ZERO

GIB = 2**30
_FP32, _BF16 = 4, 2  # bytes per number
# Seconds to launch a layer's kernels from Python, which limit the decoding of small models. Published figures for the
# 12 layers of GPT-2 in transformers are 3.8 ms per token (RTX 5090) to 12 ms (V100).
_KERNELS = 0.6e-3
_USABLE = 0.92  # share of a device's memory; the allocator's blocks leave gaps
_NODE, _NETWORK = 8, 50e9  # GPUs per machine; 400 Gb/s per GPU between machines, as bytes/s one way


class Device(NamedTuple):
    """One accelerator, from its data sheet, or one core of this machine's CPU."""

    memory: float  # bytes
    bf16: float  # FLOP/s of dense matrix products, accumulated in fp32
    fp32: float  # FLOP/s of fp32 products without TF32, PyTorch's default
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to another device of the same machine, one way
    base: float = 0.75 * GIB  # bytes of a process without networks; on a GPU an estimate for CUDA, not measured
    slack: float = 0.0  # share that the allocator holds in addition to the bytes in use


DEVICES = {
    "h100": Device(80 * GIB, 989e12, 67e12, 3.35e12, 450e9),  # SXM
    "h200": Device(131 * GIB, 989e12, 67e12, 4.8e12, 450e9),
    "a100": Device(80 * GIB, 312e12, 19.5e12, 2.04e12, 300e9),  # SXM
    "a100_40": Device(40 * GIB, 312e12, 19.5e12, 1.56e12, 300e9),
    "l40s": Device(48 * GIB, 362e12, 91.6e12, 0.864e12, 32e9),
    "rtx4090": Device(24 * GIB, 165e12, 82.6e12, 1.01e12, 32e9),
    "rtx3090": Device(24 * GIB, 71e12, 35.6e12, 0.936e12, 32e9),
    "l4": Device(24 * GIB, 121e12, 30.3e12, 0.3e12, 32e9),
    # fp32 by AVX2. tests/benchmarks/plan.py measures base and slack (glibc's malloc).
    "cpu": Device(16 * GIB, 0.06e12, 0.06e12, 10e9, 5e9, base=0.52 * GIB, slack=0.15),
}


@dataclass(frozen=True)
class Networks:
    """Counts for policy and critic: numbers of parameters, unless a comment says otherwise."""

    policy: int
    critic: int  # a separate network, or a value head (a row of weights and a bias)
    trunks: int  # number of trained trunks: 2 if the critic has its own
    adapter: bool  # if so, the reference is the policy with its adapter off
    trained: int  # updated by the optimizer
    stored: int  # bytes of all parameters; an adapter's base is stored in bf16 if the run computes in bf16
    layers: int
    width: int  # of the hidden states
    vocabulary: int
    head: int  # the policy's output head, which may be tied to the input embeddings
    matrices: int  # of one trunk, those that multiply each token
    cache: int  # numbers in the key-value cache per token
    kept: int  # bytes that a trunk keeps per row for the backward pass

    def forward(self, length: float) -> float:
        """Return the FLOPs of a trunk per token, in a text of `length` tokens."""
        return 2 * self.matrices + 4 * self.layers * self.width * length


@dataclass(frozen=True)
class Work:
    """The work of one process in an update."""

    rows: int  # responses
    micro: int  # rows per training forward pass
    minibatches: int  # optimizer steps per epoch
    epochs: int
    at_once: int  # rows rolled out together
    prompt: int  # tokens of the longest prompt
    response: int  # tokens of the longest response
    length: float  # mean tokens of a prompt with its response
    bf16: bool
    checkpointing: bool


class Job(NamedTuple):
    """PPO's networks and its work."""

    net: Networks
    reward: int  # parameters
    work: Work

    @property
    def reference_bytes(self) -> int:
        """Bytes of the frozen copy of the policy; its matrices are bf16 under autocast."""
        return 0 if self.net.adapter else _FP32 * self.net.policy - _BF16 * self.net.matrices * self.work.bf16


def count(config: Any, tokens: int, bf16: bool, lora: Any = None, separate: bool = False) -> Networks:
    """Count the policy and critic that PPO builds from a configuration. `separate`: the critic has its own network.

    `tokens`: tokens per row of a forward pass. `lora`: peft's LoraConfig, or None. Raises `UserError` if the
    configuration is not that of a causal language model with attention.
    """
    if type(config) not in AutoModelForCausalLM._model_mapping or not hasattr(config, "num_attention_heads"):
        raise UserError(
            f"{type(config).__name__} is not the configuration of a causal language model with attention, and only "
            "those can be planned; give another policy.path=."
        )
    config, lora = copy.deepcopy((config, lora))
    model = _without_weights(AutoModelForCausalLM, config)
    if lora is not None:
        with torch.device("meta"):
            model = get_peft_model(model, lora)
    fuse_gelu(model)
    model.eval()  # PPO trains without dropout
    if bf16 and lora is not None:
        store_in_bf16(model)
    body, text, head = trunk(model), text_config(model), language_model(model).get_output_embeddings().weight
    matrices = [module.weight for module in body.modules() if isinstance(module, nn.Linear | Conv1D)]
    copies = _BF16 * _parameters(m for m in matrices if m.dtype == torch.float32) if bf16 else 0  # made by autocast
    layers, heads, width = int(text.num_hidden_layers), int(text.num_attention_heads), int(text.hidden_size)
    head_width = getattr(text, "head_dim", None) or width // heads
    value = width + (not separate)
    every = [*model.parameters(), *(body.parameters() if separate else ())]
    return Networks(
        policy=_parameters(model.parameters()),
        critic=_parameters(body.parameters()) * separate + value,
        trunks=1 + separate,
        adapter=lora is not None,
        trained=_parameters(p for p in every if p.requires_grad) + value,
        stored=sum(p.numel() * p.element_size() for p in every) + _FP32 * value,
        layers=layers,
        width=width,
        vocabulary=language_model(model).get_input_embeddings().weight.shape[0],
        head=head.numel(),
        matrices=_parameters(matrices),
        cache=2 * layers * (getattr(text, "num_key_value_heads", None) or heads) * head_width,
        kept=_kept(body, tokens, bf16) - copies,  # autocast's copies do not grow with the rows
    )


def count_classifier(config: Any) -> int:
    """Return the number of parameters of a reward classifier."""
    return _parameters(_without_weights(AutoModelForSequenceClassification, config).parameters())


def _without_weights(kind: Any, config: Any) -> Any:
    with torch.device("meta"):
        return kind.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _parameters(parameters: Iterable[Tensor]) -> int:
    return sum(p.numel() for p in parameters)


def _kept(body: nn.Module, tokens: int, bf16: bool) -> int:
    """Return the bytes that autograd keeps from a forward pass over one row, without the weights."""
    found: dict[int, Any] = {}  # keeps the storages alive, so that no id is used twice

    def note(tensor: Tensor) -> Tensor:
        found[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode():
        every = [*body.named_parameters(), *body.named_buffers()]
        weights = {name: torch.empty(w.shape, dtype=w.dtype, requires_grad=w.requires_grad) for name, w in every}
        given = {"input_ids": torch.zeros(1, tokens, dtype=torch.long), "use_cache": False}
        hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
        with hooks, torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            functional_call(body, weights, (), given)
    for weight in weights.values():
        found.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in found.values())


def launches(processes: int, job: Job, device: Device, mfu: float) -> list[dict[str, Any]]:
    """Return the needs of every launch on `processes` devices, the simplest first."""
    names = ("ddp", "zero2", "zero3") if processes > 1 else ("single",)
    return [needs(name, processes, job, device, mfu) for name in names]


def needs(launch: str, processes: int, job: Job, device: Device, mfu: float) -> dict[str, Any]:
    """Return what a process needs under one launch: peak bytes, and seconds and FLOPs of an update, by part.

    `mfu`: the share of the device's FLOP/s that a forward and backward pass reaches.
    """
    every = moments(launch, processes, job)
    moment = max(every, key=lambda name: sum(every[name].values()))
    parts = {"process": device.base, **every[moment], "allocator": device.slack * sum(every[moment].values())}
    total, taken = sum(parts.values()), seconds(launch, processes, job, device, mfu)
    return {
        "launch": launch, "processes": processes, "moment": moment, "bytes": total,
        "parts": {part: size for part, size in parts.items() if size}, "fits": total <= _USABLE * device.memory,
        "seconds": {part: value for part, value in taken.items() if value}, "update_seconds": sum(taken.values()),
        "update_flops": sum(flops(job).values()),
    }  # fmt: skip


def moments(launch: str, processes: int, job: Job) -> dict[str, dict[str, float]]:
    """Return bytes by part at each moment that can be the peak, after Adam's states exist."""
    net, _, work = job
    number, zero, zero3 = _BF16 if work.bf16 else _FP32, launch in ("zero2", "zero3"), launch == "zero3"
    every = net.policy + net.critic
    learnt = _FP32 * net.trained / (processes if zero else 1)  # bytes of the gradients, or of a copy of the weights
    rows, several = min(work.at_once, work.rows), work.rows // work.minibatches > work.micro
    copies = 0 if net.adapter else _BF16 * work.bf16 * net.trunks * net.matrices / (net.layers if zero3 else 1)
    gathered = _FP32 * min(every, ZERO["stage3_max_live_parameters"]) * zero3
    head = 0 if net.adapter else _FP32 * net.head  # its gradient, in addition to the tied embeddings'
    width, kept = work.prompt + work.response, float(net.kept)
    if work.checkpointing:  # keeps the input of each layer, and one layer's activations
        kept = kept / net.layers + _FP32 * width * net.layers * net.width
    always = {
        "weights": _FP32 * every / (processes if zero3 else 1) if zero else net.stored,
        "reference": job.reference_bytes,
        "reward": _FP32 * job.reward,
        "Adam": 2 * learnt,
        "master": learnt * (launch == "zero2"),  # the optimizer updates a copy of its shard, then the weights
        "buckets": _FP32 * (ZERO["reduce_bucket_size"] if zero else net.trained * (launch == "ddp")),
    }
    return {
        "rollout": {  # the last step: the cache, a copy of one layer of it, three tensors of probabilities
            **always,
            "KV cache": net.cache * number * rows * width * (1 + 1 / net.layers),
            "logits": rows * net.vocabulary * (3 * _FP32 + _BF16 * work.bf16),
            "bf16 copies": copies,
            "gathered": _FP32 * every * (1 - 1 / processes) * zero3,
        },
        "update: begin": {
            **always,
            "gradients": head + learnt * several,
            "activations": work.micro * net.trunks * (kept + _FP32 * work.response * net.width),
            "logits": work.micro * work.response * net.vocabulary * number,
            "bf16 copies": copies + 2 * _BF16 * net.head * work.bf16,
            "gathered": gathered,
        },
        "update: end": {**always, "gradients": learnt + head * (1 + several), "gathered": gathered},
    }


def flops(job: Job) -> dict[str, float]:
    """Return the FLOPs of an update in one process, by part. The head computes only the response's positions."""
    net, _, work = job
    tokens, head = work.rows * work.length, 2.0 * net.head * work.rows * work.response
    asked = tokens * net.forward(work.length) + head
    every = tokens * net.forward(work.length) * net.trunks + head
    backward = 1 if net.adapter else 2  # a frozen matrix has no gradient of its own
    return {
        "rollout": asked,
        "scores": every + asked + 2.0 * job.reward * tokens,  # log p and values, reference, reward
        "update": work.epochs * every * (1 + work.checkpointing + backward),
    }


def seconds(launch: str, processes: int, job: Job, device: Device, mfu: float) -> dict[str, float]:
    """Return the seconds of an update, by part. Communication does not overlap with compute."""
    (net, _, work), counted = job, flops(job)
    number, rate = (_BF16, mfu * device.bf16) if work.bf16 else (_FP32, mfu * device.fp32)
    # A decoding step takes the longest of memory traffic, matrix products and kernel launches. Attention reads the
    # cache once. Adding a token copies the cache: one more read and one write.
    rows, forward = min(work.at_once, work.rows), net.forward(work.length)
    moved = number * (net.matrices + net.head + 3 * net.cache * rows * (work.prompt + work.response / 2))
    step = max(moved / device.bandwidth, rows * (forward + 2 * net.head) / rate, net.layers * _KERNELS)
    drawn = math.ceil(work.rows / work.at_once) * work.response
    steps = work.epochs * work.minibatches
    passes = steps * math.ceil(work.rows / work.minibatches / work.micro)
    sent = {  # numbers per update
        "single": 0,
        "ddp": 2 * net.trained * steps,  # gradients are reduced, then gathered
        "zero2": net.trained * (passes + steps),  # gradients are reduced in each pass, updated weights gathered
        # The weights are gathered once for sampling, and in each training pass.
        "zero3": net.trained * passes + (net.policy + net.critic) * (1 + passes * (2 + work.checkpointing)),
    }[launch]
    link = device.link if processes <= _NODE else min(device.link, _NETWORK)
    return {
        "rollout": forward * work.rows * work.prompt / rate + drawn * step,
        "log p, reference, reward": counted["scores"] / rate,
        "update": counted["update"] / rate,
        "between processes": _FP32 * sent * (processes - 1) / processes / link,
    }
