"""FLOPs and seconds of a PPO update, in one of the processes that share it.

A token's forward pass takes 2 FLOPs a parameter that it is multiplied by, a backward pass twice as many; attention
adds 4 x layers x width x length forward, 12 with backward (PaLM, arXiv 2204.02311, app. B). The head sees only what
predicts a response. Decoding is bound by memory: each token reads the weights and the cache (arXiv 2211.05102, sec. 2).
Processes send what ZeRO counts (arXiv 1910.02054, sec. 7), and nothing of it is taken to be hidden behind the compute.
"""

import math

from rlhf_pipeline.plan.devices import NETWORK, NODE, Device
from rlhf_pipeline.plan.memory import Roles, Sharding, Work
from rlhf_pipeline.plan.networks import Network

_FP32, _BF16 = 4, 2  # bytes
# Seconds in which Python launches a layer's kernels, which no small model's decoding falls below. Not measured here:
# published figures of GPT-2's 12 layers in transformers are 3.8 ms a token (RTX 5090) to 12 (V100).
_LAUNCH = 0.6e-3


def flops(roles: Roles, work: Work) -> dict[str, float]:
    """FLOPs an update by what they are for, of one process."""
    policy, critic, rows = roles.policy, roles.critic, work.rows
    length = work.mean_prompt + work.mean_response
    tokens, said = rows * length, rows * work.mean_response
    body, head = _forward(policy, tokens, length), 2.0 * policy.head * said
    of_critic = _forward(critic, tokens, length) if critic else 0.0
    backward = _backward(policy, tokens, length) + head * (1 + policy.head_trained)
    if critic:
        backward += _backward(critic, tokens, length)
    again = body + of_critic if work.checkpointing else 0.0
    return {
        "rollout": body + head,
        "log p": body + head + of_critic,
        "reference": body + head,
        "reward": 2.0 * roles.reward * tokens,
        "update": work.epochs * (body + head + of_critic + backward + again),
    }


def _forward(network: Network, tokens: float, length: float) -> float:
    return (2 * network.matrices + 4 * network.attention * length) * tokens


def _backward(network: Network, tokens: float, length: float) -> float:
    """Gradients of the states, and of the weights that are trained."""
    return (2 * (network.matrices + network.matrices_trained) + 8 * network.attention * length) * tokens


def seconds(roles: Roles, work: Work, how: Sharding, device: Device, mfu: float) -> dict[str, float]:
    """Seconds an update by what they are for: products at `mfu` of the device's rate, decoding by bytes moved."""
    count = flops(roles, work)
    rate = mfu * (device.bf16 if work.bf16 else device.fp32)
    sent = _sent(roles, work, how)
    link = device.link if how.processes <= NODE else min(device.link, NETWORK)
    found = {
        "rollout": _decoding(roles.policy, work, device, rate),
        "log p, reference, reward": (count["log p"] + count["reference"] + count["reward"]) / rate,
        "update": count["update"] / rate,
        "between processes": sent / link,
    }
    return {name: value for name, value in found.items() if value}


def _decoding(policy: Network, work: Work, device: Device, rate: float) -> float:
    """The prompts at once, then a step a token: as long as its bytes take, its products, or to launch its kernels."""
    length = work.mean_prompt + work.mean_response
    prefill = _forward(policy, work.rows * work.mean_prompt, length) / rate
    total = 0.0
    for start in range(0, work.rows, work.at_once):
        rows = min(work.at_once, work.rows - start)
        cache = policy.cache * (_BF16 / _FP32 if work.bf16 else 1) * rows * (work.mean_prompt + work.mean_response / 2)
        moved = _weights_read(policy, work.bf16) + 3 * cache  # read by attention; read and written as it grows
        products = (2 * (policy.matrices + policy.head) + 4 * policy.attention * length) * rows
        total += work.response * max(moved / device.bandwidth, products / rate, policy.layers * _LAUNCH)
    return prefill + total


def _weights_read(policy: Network, bf16: bool) -> float:
    """Bytes a step. Autocast keeps trained weights in bf16; frozen ones are read in fp32, written and read in bf16."""
    trained = policy.matrices_trained + policy.head * policy.head_trained
    frozen = policy.matrices + policy.head - trained
    return trained * _BF16 + frozen * (_FP32 + 2 * _BF16) if bf16 else (trained + frozen) * _FP32


def _sent(roles: Roles, work: Work, how: Sharding) -> float:
    """Bytes that a process sends an update: the gradients once a step, and sharded weights whenever they are used."""
    n = how.processes
    if n == 1:
        return 0.0
    steps = work.epochs * work.minibatches
    parts = math.ceil(work.rows / work.minibatches / work.micro)
    if how.gradients == 1:
        sent = 2 * roles.trained * steps  # reduced, and gathered
    elif how.weights == 1:
        sent = roles.trained * steps * (parts + 1)  # reduced in each pass; the weights that were moved, gathered
    else:  # put together once to sample, and in each pass that learns
        every = roles.policy.parameters + roles.value_head + (roles.critic.parameters if roles.critic else 0)
        sent = roles.trained * steps * parts + every * (1 + steps * parts * (2 + work.checkpointing))
    return _FP32 * float(sent) * (n - 1) / n
