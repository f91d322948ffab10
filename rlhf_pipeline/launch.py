"""How this process was started: alone, or as one of several by torchrun or accelerate launch."""

import math
import os
from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.errors import UserError

# How a step's rows are cut; together with the number of processes it says how many there are.
CUT = ("per_device_train_batch_size", "gradient_accumulation_steps")
# What has one screen, or writes all by itself.
_ALONE = ("stage=chat", "compare=", "labels=", "sweep=")
# What accelerate launch can shard by.
_SHARDED = {"ACCELERATE_USE_DEEPSPEED": "DeepSpeed (zero2, zero3)", "ACCELERATE_USE_FSDP": "FSDP (fsdp)"}


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


def check_launch(said: str) -> None:
    """Refuse what would be done otherwise than it was asked for. `said` is the stage, as on the command line."""
    alone = next((word for word in _ALONE if word in said.split()), None)
    if processes() > 1 and alone:
        raise UserError(f"{said} runs in one process; start it by python -m rlhf_pipeline.")
    for name, what in _SHARDED.items():
        if os.environ.get(name, "").lower() in ("1", "true"):
            raise UserError(f"{said} does not run under {what} yet; launch it by ddp, or cpu where there is no GPU.")
