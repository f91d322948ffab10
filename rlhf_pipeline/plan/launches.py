"""What each way to launch PPO needs of a process: bytes by part, FLOPs and seconds of an update.

Memory is that of the two fullest moments of `ppo.trainer`, the rollout with its cache and the update's backward pass;
what is sharded follows ZeRO (arXiv 1910.02054). A token's forward pass takes 2 FLOPs a parameter and its backward pass
twice as many; attention adds 4 x layers x width x length and 8 (PaLM, arXiv 2204.02311, app. B). Decoding is bound by
memory: each token reads the weights and the cache (arXiv 2211.05102, sec. 2).
"""

import math
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.plan.devices import LAUNCHES, NETWORK, NODE, Device
from rlhf_pipeline.plan.networks import Network
from rlhf_pipeline.processes import ZERO

Parts = dict[str, float]
_FP32, _BF16, _ADAM = 4, 2, 8  # bytes a number; Adam's two moments are fp32
# Seconds in which Python launches a layer's kernels, which no small model's decoding falls below. Not measured here:
# published figures of GPT-2's 12 layers in transformers are 3.8 ms a token (RTX 5090) to 12 (V100).
_LAUNCH = 0.6e-3
_USABLE = 0.92  # of a device's memory: the allocator's blocks leave gaps


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
    mean_prompt: float
    mean_response: float
    bf16: bool
    checkpointing: bool

    @property
    def width(self) -> int:
        """Tokens of the longest row as a forward pass sees it: nothing is predicted from the last."""
        return self.prompt + self.response - 1


@dataclass(frozen=True)
class Job:
    """PPO's networks and its work."""

    policy: Network
    critic: Network | None  # None: a value head on the policy's trunk
    reference: int  # parameters of its own; 0: it is the policy with its adapter off
    reward: int  # parameters
    work: Work

    @property
    def networks(self) -> list[Network]:
        """Those that learn."""
        return [network for network in (self.policy, self.critic) if network]

    @property
    def value_head(self) -> int:
        """Parameters of a shared critic: a row of weights and a bias."""
        return 0 if self.critic else self.policy.width + 1

    @property
    def trained(self) -> int:
        """Parameters that the optimizer moves."""
        return self.value_head + sum(network.trained for network in self.networks)

    @property
    def reference_bytes(self) -> float:
        """A frozen copy of the policy, its matrices in bf16 under autocast (`adapters.store_in_bf16`)."""
        saved = (_FP32 - _BF16) * self.policy.matrices if self.work.bf16 else 0
        return _FP32 * self.reference - saved if self.reference else 0


def needs(launch: str, processes: int, job: Job, device: Device, mfu: float) -> dict[str, Any]:
    """What a process takes under one launch: bytes at its fullest moment, seconds and FLOPs of an update, by part.

    `mfu`: the share of the device's FLOP/s that a forward and backward pass reaches.
    """
    every = moments(launch, processes, job)
    moment = max(every, key=lambda name: sum(every[name].values()))
    holes = device.slack * sum(every[moment].values())
    parts = {"process": device.base, **every[moment], **({"allocator": holes} if holes else {})}
    taken = {part: value for part, value in seconds(launch, processes, job, device, mfu).items() if value}
    total, counted = sum(parts.values()), flops(job)
    return {
        "launch": launch, "processes": processes, "moment": moment, "parts": parts, "bytes": total,
        "fits": total <= _USABLE * device.memory, "seconds": taken, "update_seconds": sum(taken.values()),
        "flops": counted, "update_flops": sum(counted.values()),
    }  # fmt: skip


def launches(processes: int, job: Job, device: Device, mfu: float) -> list[dict[str, Any]]:
    """The needs of every launch on so many devices, the simplest first."""
    names = LAUNCHES[1:] if processes > 1 else LAUNCHES[:1]
    return [needs(name, processes, job, device, mfu) for name in names]


def fewest(most: int, job: Job, device: Device, mfu: float) -> dict[str, Any] | None:
    """The needs of the simplest launch that fits on the fewest devices."""
    every = (found for number in range(1, most + 1) for found in launches(number, job, device, mfu))
    return next((found for found in every if found["fits"]), None)


def moments(launch: str, processes: int, job: Job) -> dict[str, Parts]:
    """Bytes by part at each moment that can be the fullest, once Adam's states are there."""
    work, policy, critic, bf16 = job.work, job.policy, job.critic, job.work.bf16
    number, zero3 = _BF16 if bf16 else _FP32, launch == "zero3"
    zero = zero3 or launch == "zero2"
    learnt = _FP32 * job.trained / (processes if zero else 1)  # bytes of the gradients, and of a copy of the weights

    def weights(network: Network, more: int = 0) -> float:
        whole = _FP32 * (network.parameters + more) / (processes if zero3 else 1)
        return whole if zero else whole - (_FP32 - _BF16) * network.halved

    every = sum(network.parameters for network in job.networks) + job.value_head
    at_work = min(every, ZERO["stage3_max_live_parameters"])
    always = {
        "weights": weights(policy, job.value_head),
        "critic": weights(critic) if critic else 0,
        "reference": job.reference_bytes,
        "reward": _FP32 * job.reward,
        "Adam": learnt * _ADAM / _FP32,
        "master": learnt if launch == "zero2" else 0,  # it moves a copy of its share, then the weights by it
        "buckets": _FP32 * (ZERO["reduce_bucket_size"] if zero else job.trained * (launch == "ddp")),
    }
    rows = min(work.at_once, work.rows)
    copies = sum(network.copies / (network.layers if zero3 else 1) for network in job.networks) if bf16 else 0
    head = _FP32 * policy.head * policy.head_trained  # beside the gradient of the embeddings that it is tied to
    several = work.rows // work.minibatches > work.micro
    found: dict[str, Parts] = {
        "rollout": {  # its last step: the cache and one layer of it again, three tensors of probabilities
            "KV cache": policy.cache * number / _FP32 * rows * (work.prompt + work.response) * (1 + 1 / policy.layers),
            "logits": rows * policy.vocabulary * (3 * _FP32 + _BF16 * bf16),
            "bf16 copies": copies,
            "gathered": _FP32 * every * (1 - 1 / processes) * zero3,
        },
        "update: begin": {
            "gradients": head + learnt * several,
            "activations": sum(_activations(network, work) for network in job.networks),
            "logits": work.micro * work.response * policy.vocabulary * number,
            "bf16 copies": copies + 2 * _BF16 * policy.head * bf16,
            "gathered": _FP32 * at_work * zero3,
        },
        "update: end": {"gradients": learnt + head * (1 + several), "gathered": _FP32 * at_work * zero3},
    }
    return {name: {k: v for k, v in {**always, **parts}.items() if v} for name, parts in found.items()}


def _activations(network: Network, work: Work) -> float:
    """Bytes that a micro-batch keeps for the backward pass. Checkpointing keeps each layer's input, and one layer."""
    kept: float = network.kept + _FP32 * work.response * network.width
    if work.checkpointing:
        kept += _FP32 * work.width * network.layers * network.width - network.kept * (1 - 1 / network.layers)
    return work.micro * kept


def flops(job: Job) -> Parts:
    """FLOPs of an update in one process, by what they are for. The head sees only what predicts a response."""
    work, policy = job.work, job.policy
    tokens, head = work.rows * _length(work), 2.0 * policy.head * work.rows * work.mean_response
    body = tokens * _forward(policy, work)
    every = tokens * sum(_forward(network, work) for network in job.networks) + head
    backward = head * (1 + policy.head_trained) + tokens * sum(
        2 * (network.matrices + network.matrices_trained) + 8 * network.attention * _length(work)
        for network in job.networks
    )
    again = every - head if work.checkpointing else 0
    return {
        "rollout": body + head,
        "log p": every,
        "reference": body + head,
        "reward": 2.0 * job.reward * tokens,
        "update": work.epochs * (every + backward + again),
    }


def _length(work: Work) -> float:
    return work.mean_prompt + work.mean_response


def _forward(network: Network, work: Work) -> float:
    """FLOPs a token."""
    return 2 * network.matrices + 4 * network.attention * _length(work)


def seconds(launch: str, processes: int, job: Job, device: Device, mfu: float) -> Parts:
    """Seconds of an update by what they are for; nothing of what is sent is hidden behind the compute."""
    counted, rate = flops(job), mfu * (device.bf16 if job.work.bf16 else device.fp32)
    link = device.link if processes <= NODE else min(device.link, NETWORK)
    return {
        "rollout": _decoding(job.policy, job.work, device, rate),
        "log p, reference, reward": (counted["log p"] + counted["reference"] + counted["reward"]) / rate,
        "update": counted["update"] / rate,
        "between processes": _sent(launch, processes, job) / link,
    }


def _decoding(policy: Network, work: Work, device: Device, rate: float) -> float:
    """The prompts at once, then a step a token: as long as its bytes take, its products, or to launch its kernels."""
    number, rows = _BF16 if work.bf16 else _FP32, min(work.at_once, work.rows)
    cache = policy.cache * number / _FP32 * rows * (work.mean_prompt + work.mean_response / 2)
    moved = number * (policy.matrices + policy.head) + 3 * cache  # read by attention; read and written as it grows
    products = rows * (_forward(policy, work) + 2 * policy.head)
    step = max(moved / device.bandwidth, products / rate, policy.layers * _LAUNCH)
    prompts = _forward(policy, work) * work.rows * work.mean_prompt / rate
    return prompts + math.ceil(work.rows / work.at_once) * work.response * step


def _sent(launch: str, processes: int, job: Job) -> float:
    """Bytes that a process sends in an update: gradients, and sharded weights whenever they are used."""
    work = job.work
    steps = work.epochs * work.minibatches
    passes = steps * math.ceil(work.rows / work.minibatches / work.micro)
    every = sum(network.parameters for network in job.networks) + job.value_head
    numbers = {
        "single": 0,
        "ddp": 2 * job.trained * steps,  # reduced, and gathered
        "zero2": job.trained * (passes + steps),  # reduced in each pass; the weights that were moved, gathered
        # Put together once to sample, and in each pass that learns.
        "zero3": job.trained * passes + every * (1 + passes * (2 + work.checkpointing)),
    }
    return _FP32 * numbers[launch] * (processes - 1) / processes
