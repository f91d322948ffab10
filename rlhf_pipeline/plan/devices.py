"""Accelerators by name: what they hold, multiply and move; from their makers' data sheets."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import suggest

GIB = 2**30
LAUNCHES = ("single", "ddp", "zero2", "zero3")  # of PPO, the simplest first
NODE = 8  # GPUs with fast links among them; beyond, one 400 Gb/s network card each
NETWORK = 50e9  # bytes a second of such a card, one way


@dataclass(frozen=True)
class Device:
    """One accelerator, or this machine's processor."""

    memory: float  # bytes
    bf16: float  # FLOP/s of dense matrix products, summed up in fp32
    fp32: float  # FLOP/s of fp32 products without TF32, as PyTorch does them unless told otherwise
    bandwidth: float  # bytes/s of its memory
    link: float  # bytes/s to another one of the same machine, one way
    base: float = 0.75 * GIB  # bytes of a process before the networks: on a GPU an allowance for CUDA, not measured
    slack: float = 0.0  # the share that the allocator holds on top of what is in use


DEVICES = {
    "h100": Device(80 * GIB, 989e12, 67e12, 3.35e12, 450e9),  # SXM
    "h200": Device(131 * GIB, 989e12, 67e12, 4.8e12, 450e9),
    "a100": Device(80 * GIB, 312e12, 19.5e12, 2.04e12, 300e9),  # SXM
    "a100_40": Device(40 * GIB, 312e12, 19.5e12, 1.56e12, 300e9),
    "l40s": Device(48 * GIB, 362e12, 91.6e12, 0.864e12, 32e9),
    "rtx4090": Device(24 * GIB, 165e12, 82.6e12, 1.01e12, 32e9),
    "rtx3090": Device(24 * GIB, 71e12, 35.6e12, 0.936e12, 32e9),
    "l4": Device(24 * GIB, 121e12, 30.3e12, 0.3e12, 32e9),
    # A core of a server, fp32 by AVX2. Base and slack (glibc's malloc) as tests/benchmarks/plan.py measures them.
    "cpu": Device(16 * GIB, 0.06e12, 0.06e12, 10e9, 5e9, base=0.52 * GIB, slack=0.15),
}


def check_machine(asked: Mapping[str, Any]) -> None:
    """Refuse a section `plan.*` that names a device or launch that is not known, or that does not fit."""
    for key, known in {"gpu": list(DEVICES), "launch": list(LAUNCHES)}.items():
        value = asked[key]
        if value is not None and value not in known:
            raise UserError(f"plan.{key} is '{value}'. {suggest(value, known)}Known: {', '.join(known)}.")
    if (asked["launch"] == "single") != (asked["gpus"] == 1) and asked["launch"] is not None:
        raise UserError("plan.launch=single goes with plan.gpus=1, and every other launch with more.")
