"""How this process was started: alone, or as one of several by torchrun or accelerate launch."""

import importlib.util
import math
import os
from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.errors import UserError

# How a step's rows are cut; together with the number of processes it says how many there are.
CUT = ("per_device_train_batch_size", "gradient_accumulation_steps")
# What has one screen, or writes all by itself.
_ALONE = ("stage=chat", "stage=plan", "compare=", "labels=", "sweep=")
# What accelerate launch can shard by, each with the stages that are right with it: their trainers are transformers'
# own, and of ZeRO-3 and FSDP nothing is asked of the model after training but its weights. Our PPO samples between its
# steps, and stage=evaluate and collect train nothing.
_SHARDED = {"zero2": ("pretrain", "sft", "reward"), "zero3": ("pretrain", "sft"), "fsdp": ("pretrain", "sft")}


def rank() -> int:
    """This process's number among those that were started together."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def rows_a_step(trainer: Mapping[str, Any], count: int) -> int:
    """Rows of an optimizer step, or of a batch of PPO, of `count` processes. transformers' defaults are 8 and 1."""
    size, steps = (trainer.get(name) or default for name, default in zip(CUT, (8, 1), strict=True))
    return int(size) * int(steps) * count


def same_step(before: Mapping[str, Any], count: int, asked: Mapping[str, Any]) -> dict[str, int] | None:
    """How a run of `count` processes goes on with as many rows a step on those that there are now.

    As asked, where that comes to as many. Where nothing else was asked than then, the launch alone has changed: each
    process takes more or fewer. None where it cannot be.
    """
    rows, now = rows_a_step(before, count), processes()
    size = int(asked.get(CUT[0]) or 8)
    if rows_a_step(asked, now) == rows:
        return {CUT[0]: size, CUT[1]: rows // (size * now)}
    if any(before.get(name) != asked.get(name) for name in CUT) or rows % now:
        return None
    size = math.gcd(size, rows // now)
    return {CUT[0]: size, CUT[1]: rows // (size * now)}


def sharding() -> str | None:
    """What accelerate launch was told to shard by: zero2, zero3 or fsdp; None where each process has the whole."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else None


def checkpoints_of() -> str | None:
    """By what launch checkpoints made now can be read: DeepSpeed's only on as many processes."""
    kind = sharding()
    return f"{kind} on {processes()} processes" if kind and kind != "fsdp" else kind


def check_launch(said: str) -> None:
    """Refuse what would be done otherwise than it was asked for. `said` is the stage, as on the command line."""
    alone = next((word for word in _ALONE if word in said.split()), None)
    if processes() > 1 and alone:
        raise UserError(f"{said} runs in one process; start it by python -m rlhf_pipeline.")
    if (kind := sharding()) is None:
        return
    stages = _SHARDED.get(kind, ())
    if said.removeprefix("stage=") not in stages:
        fits = f"{kind} is for {', '.join(f'stage={name}' for name in stages)} without an adapter" if stages else ""
        raise UserError(f"{said} does not run under {kind}; launch it by ddp.{fits and f' ({fits}.)'}")
    import torch

    if not torch.cuda.is_available():
        raise UserError(f"{kind} needs GPUs: on a CPU accelerate would run DDP in its place; launch it by ddp.")
    if kind != "fsdp" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{kind} needs DeepSpeed: pip install 'rlhf_pipeline[gpu]'.")
