"""Bytes that a process holds while PPO runs, by part and by moment: arithmetic on the counts of networks.py.

The moments are those of `rlhf_pipeline.ppo.trainer`: the rollout with its cache, log p of what was said, and of the
update's backward pass the three that can be the fullest. What is sharded follows ZeRO (arXiv 1910.02054, sec. 5).
"""

from dataclasses import dataclass

from rlhf_pipeline.launch import ZERO
from rlhf_pipeline.plan.networks import Network

Parts = dict[str, float]  # bytes
_FP32, _BF16, _ADAM = 4, 2, 8  # bytes a number; Adam's two moments are fp32
_SCRATCH = 2**24  # logits at a time where no gradient is taken, as in rlhf_pipeline.likelihood
# A process that has trained the smallest network: on a CPU as tests/benchmarks/plan.py measures it, on a GPU an
# allowance for a CUDA context and its libraries, which is not measured.
BASE_CPU, BASE_GPU = 0.52 * 2**30, 0.75 * 2**30
# What glibc's malloc holds on top of what is in use, as freed blocks below 32 MiB leave holes: 9 to 27 % of it in the
# shapes of tests/benchmarks/plan.py, from run to run.
SLACK_CPU = 0.15


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
    keeps_whole: bool = False  # beside what is kept in bf16 its last digits, where main memory is what counts

    @property
    def width(self) -> int:
        """Tokens of the longest row as a forward pass sees it: nothing is predicted from the last."""
        return self.prompt + self.response - 1

    @property
    def accumulates(self) -> bool:
        """Whether an optimizer step takes several backward passes."""
        return self.rows // self.minibatches > self.micro


@dataclass(frozen=True)
class Roles:
    """The networks of PPO: the policy, the critic where it has a network of its own, the parameters of the reward."""

    policy: Network
    critic: Network | None
    reference: int  # parameters of its own; 0 where it is the policy with its adapter off
    reward: int

    @property
    def value_head(self) -> int:
        """Of a shared critic: one row of weights, and a bias."""
        return 0 if self.critic else self.policy.width + 1

    @property
    def trained(self) -> int:
        """Parameters that the optimizer moves."""
        return self.policy.trained + self.value_head + (self.critic.trained if self.critic else 0)


@dataclass(frozen=True)
class Sharding:
    """By how many processes a launch divides what is held; 1 where each holds all of it."""

    processes: int = 1
    weights: int = 1
    gradients: int = 1
    adam: int = 1
    buckets: bool = False  # DDP's copy of the gradients


def peak(roles: Roles, work: Work, how: Sharding, base: float = 0, slack: float = 0) -> tuple[str, Parts]:
    """The fullest moment of a process, by its name, and its bytes by part.

    `base` are the bytes of a process without networks; `slack` is the share that the allocator holds on top of these.
    """
    every = moments(roles, work, how, base)
    name = max(every, key=lambda moment: sum(every[moment].values()))
    parts = every[name]
    holes = {"allocator": slack * (sum(parts.values()) - base)} if slack else {}
    return name, {**parts, **holes}


def moments(roles: Roles, work: Work, how: Sharding, base: float = 0) -> dict[str, Parts]:
    """Bytes by part at each moment that can be the fullest, once Adam's states are there."""
    held, (gathered, some) = _held(roles, work, how, base), _gathered(roles, how)
    sampling = {"rollout": _rollout(roles, work, how), "log p": _look_back(roles, work, how)}
    found = {name: {**parts, "gathered": gathered} for name, parts in sampling.items()}
    learning = _update(roles, work, how)
    found |= {f"update: {name}": {**parts, "gathered": some} for name, parts in learning.items()}
    return {name: {**held, **{k: v for k, v in parts.items() if v}} for name, parts in found.items()}


def _held(roles: Roles, work: Work, how: Sharding, base: float) -> Parts:
    """What is there at every moment."""
    policy, critic = roles.policy, roles.critic
    parts = {
        "process": base,
        "weights": _FP32 * (policy.parameters + roles.value_head) / how.weights - _saved(policy, work, how),
        "critic": _FP32 * critic.parameters / how.weights - _saved(critic, work, how) if critic else 0,
        "reference": reference_bytes(roles, work.bf16),
        "reward": _FP32 * roles.reward,
        "Adam": _ADAM * roles.trained / how.adam,
        # ZeRO-2 moves a copy of its share, and then the weights by it.
        "master": _FP32 * roles.trained / how.adam if how.adam > how.weights else 0,
        "buckets": _buckets(roles, how),
    }
    return {name: size for name, size in parts.items() if size}


def _saved(network: Network, work: Work, how: Sharding) -> float:
    """What weights under an adapter take less for being kept in bf16, which under ZeRO they are not."""
    return (_FP32 * (not work.keeps_whole) - _BF16) * network.halved if how.adam == 1 else 0


def reference_bytes(roles: Roles, bf16: bool) -> float:
    """A frozen copy; under autocast its matrices are kept in bf16 (`adapters.store_in_bf16`)."""
    if not roles.reference:
        return 0
    return _FP32 * roles.reference - (_FP32 - _BF16) * roles.policy.matrices * bf16


def _buckets(roles: Roles, how: Sharding) -> float:
    """Gradients on their way: all of them under DDP, under ZeRO what DeepSpeed sends at a time."""
    if how.buckets:
        return _FP32 * roles.trained
    return _FP32 * ZERO["reduce_bucket_size"] if how.adam > 1 else 0


def _gathered(roles: Roles, how: Sharding) -> tuple[float, float]:
    """Of sharded weights what is there whole: while sampling the rest of all, while learning what is at work."""
    if how.weights == 1:
        return 0, 0
    networks = [network for network in (roles.policy, roles.critic) if network]
    every = sum(network.parameters for network in networks) + roles.value_head
    some = min(every, max(ZERO["stage3_max_live_parameters"], 2 * max(network.largest for network in networks)))
    return _FP32 * every * (1 - 1 / how.weights), _FP32 * some


def _rollout(roles: Roles, work: Work, how: Sharding) -> Parts:
    """The last step of decoding: the whole cache, one layer of it twice, and three tensors of probabilities."""
    policy, rows = roles.policy, min(work.at_once, work.rows)
    size = _BF16 if work.bf16 else _FP32
    cache = policy.cache * size / _FP32 * rows * (work.prompt + work.response)
    return {
        "KV cache": cache * (1 + 1 / policy.layers),
        "logits": rows * policy.vocabulary * (3 * _FP32 + _BF16 * work.bf16),
        "bf16 copies": _cached_copies(policy, work, how),
    }


def _look_back(roles: Roles, work: Work, how: Sharding) -> Parts:
    """log p and values of what was said, without gradients: one layer's states, and a piece of the logits."""
    policy, rows = roles.policy, min(work.at_once, work.rows)
    size = _BF16 if work.bf16 else _FP32
    layer = max(n.kept / n.layers for n in (policy, roles.critic) if n)
    tokens = min(rows * work.response, max(_SCRATCH // policy.vocabulary, 1))
    return {
        "activations": rows * (layer + work.response * policy.width * _FP32),
        "logits": tokens * policy.vocabulary * size + policy.head * _BF16 * work.bf16,
        "bf16 copies": _cached_copies(policy, work, how)
        + (_cached_copies(roles.critic, work, how) if roles.critic else 0),
    }


def _cached_copies(network: Network, work: Work, how: Sharding) -> float:
    """What autocast keeps of weights that are trained; of sharded ones it keeps none beyond their layer."""
    if not work.bf16 or how.weights > 1:
        return 0
    return _BF16 * (network.matrices_trained + network.head * network.head_trained)


def _update(roles: Roles, work: Work, how: Sharding) -> dict[str, Parts]:
    """The backward pass as the critic's begins, as the head's is done, and at its end, where the gradients are whole.

    The last layer's come first, each as its activations go, so the fullest is an end of the way and no place between.
    """
    policy, critic, rows = roles.policy, roles.critic, work.micro
    size = _BF16 if work.bf16 else _FP32
    states = _activations(policy, work)
    others = _activations(critic, work) if critic else 0
    copies, other_copies = (_saved_copies(n, work, how) if n else 0 for n in (policy, critic))
    logits = rows * work.response * policy.vocabulary * size
    all_gradients = _FP32 * roles.trained / how.gradients
    before = all_gradients if work.accumulates else 0
    # Tied weights get a gradient from the head, then one from the embeddings, and both are there before they are added.
    of_head = _FP32 * policy.head * policy.head_trained
    of_critic = 0 if before or not critic else _FP32 * critic.trained / how.gradients
    in_bf16 = (_BF16 + _BF16 * policy.head_trained) * policy.head * work.bf16
    end = before + 2 * of_head if before else all_gradients + of_head
    found = {
        "head": {
            "gradients": before + of_critic + of_head, "activations": states, "bf16 copies": copies + in_bf16,
            "logits": logits,
        },
        "end": {"gradients": end if policy.tied else max(before + of_head, all_gradients)},
    }  # fmt: skip
    forward = 0 if not work.checkpointing else _cached_copies(policy, work, how)
    if critic or forward:
        found["begin"] = {
            "gradients": before, "activations": states + others, "logits": logits,
            "bf16 copies": max(copies + other_copies, forward),
        }  # fmt: skip
    return found


def _activations(network: Network, work: Work) -> float:
    """What the forward pass of a micro-batch keeps. Checkpointing keeps each layer's input, and one layer whole."""
    rows = work.micro
    head = rows * work.response * network.width * _FP32
    whole = rows * network.kept
    if not work.checkpointing:
        return whole + head
    return rows * work.width * network.layers * network.width * _FP32 + whole / network.layers + head


def _saved_copies(network: Network, work: Work, how: Sharding) -> float:
    """Weights in bf16 that the backward pass will need; with checkpointing, or sharded, those of one layer."""
    share = network.layers if work.checkpointing or how.weights > 1 else 1
    return network.copies / share
