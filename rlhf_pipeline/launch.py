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
# What accelerate launch can shard by, each with the stages that are right with it. Of a model in shards transformers'
# trainers ask nothing after training but its weights; our PPO puts it together to sample, FSDP's apart; stage=evaluate
# and collect train nothing.
_SHARDED = {
    "zero2": ("pretrain", "sft", "reward", "ppo"), "zero3": ("pretrain", "sft", "ppo"), "fsdp": ("pretrain", "sft"),
}  # fmt: skip
# What DeepSpeed has in hand, in parameters, where its configuration does not say. By its own defaults, ten times as
# much, a GPT-2 would never be in shards.
ZERO = {
    "reduce_bucket_size": 50_000_000, "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 100_000_000,
}  # fmt: skip


def rank() -> int:
    """This process's number among those that were started together."""
    return int(os.environ.get("RANK", "0"))


def processes() -> int:
    """How many were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def check_gpus(visible: int, start: str) -> None:
    """Refuse several GPUs in one process: transformers would split batches over them by nn.DataParallel.

    `start` is the command that starts a process on each.
    """
    if visible > 1:
        raise UserError(
            f"{visible} GPUs are visible, and one process trains on one GPU. Start a process for each: {start}; or "
            "show it a single GPU: put CUDA_VISIBLE_DEVICES=0 before the command."
        )


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


def checkpoints_of(stage: str) -> str | None:
    """By what launch checkpoints made now can be read: DeepSpeed's on as many processes. Our PPO's are read by any."""
    kind = sharding() if stage != "ppo" else None
    return f"{kind} on {processes()} processes" if kind and kind != "fsdp" else kind


def check_launch(said: str) -> None:
    """Refuse what would be done otherwise than it was asked for. `said` is the stage, as on the command line."""
    alone = next((word for word in _ALONE if word in said.split()), None)
    if processes() > 1 and alone:
        raise UserError(f"{said} runs in one process; start it by python -m rlhf_pipeline.")
    if (local := int(os.environ.get("LOCAL_WORLD_SIZE", "1"))) > 1:
        import torch

        if 0 < (there := torch.cuda.device_count()) < local:
            raise UserError(f"{local} processes were started and there are {there} GPUs; start as many, PROCS={there}.")
    if (kind := sharding()) is None:
        return
    stages = [f"stage={name}" for name in _SHARDED.get(kind, ())]
    if said not in stages and not (said == "stage=ppo policy.lora=" and "stage=ppo" in stages):
        fits = f"{kind} is for {', '.join(stages)}; an adapter goes with stage=ppo alone" if stages else ""
        raise UserError(f"{said} does not run under {kind}; launch it by ddp.{fits and f' ({fits}.)'}")
    import torch

    if not torch.cuda.is_available() and (kind == "fsdp" or os.environ.get("DS_ACCELERATOR") != "cpu"):
        raise UserError(f"{kind} needs GPUs; launch it by ddp.")
    if kind != "fsdp" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{kind} needs DeepSpeed: pip install 'rlhf_pipeline[gpu]'.")
