"""Runs with several processes, started by torchrun or accelerate launch: how they share work and how they exit.

torch and accelerate are imported only where processes communicate, so that the command line starts fast.
"""

import atexit
import contextlib
import functools
import importlib.util
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn, ParamSpec, TypeVar

from rlhf_pipeline.errors import LostProcessError, UserError
from rlhf_pipeline.stages import STAGES

T = TypeVar("T")
P = ParamSpec("P")

# These fields and the number of processes give the rows per step. transformers' defaults are 8 and 1.
BATCH_FIELDS = ("per_device_train_batch_size", "gradient_accumulation_steps")
ONE_PROCESS_ONLY = ("stage=chat", "stage=plan", "stage=compare", "compare=", "labels=", "sweep=")
# DeepSpeed's buffer sizes in parameters. Its defaults are ten times larger, and would never shard a GPT-2.
ZERO = {
    "reduce_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 100_000_000,
}


# -- how this process was started


def _number(variable: str, default: int) -> int:
    """Return a number that torchrun puts into the environment."""
    text = os.environ.get(variable) or str(default)
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{variable}={text} in the environment is not a whole number; unset it, or start by torchrun.")
    return int(text)


def rank() -> int:
    """Return this process's rank, from 0."""
    return _number("RANK", 0)


def processes() -> int:
    """Return the number of processes of this launch."""
    return _number("WORLD_SIZE", 1)


def sharding() -> str | None:
    """Return how accelerate launch shards: zero2, zero3 or fsdp; None if each process holds the whole model."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else None


def checkpoints_of(stage: str) -> str | None:
    """Return the only launch that can resume a stage's checkpoints; None if any can, as with PPO."""
    kind = None if stage == "ppo" else sharding()
    return f"{kind} on {processes()} processes" if kind and kind != "fsdp" else kind


def check_gpus(visible: int, start: str) -> None:
    """Refuse several GPUs in one process, because transformers would use nn.DataParallel.

    `start` is the command that starts one process per GPU.
    """
    if visible > 1:
        raise UserError(
            f"{visible} GPUs are visible, and one process trains on one GPU. Start a process for each: {start}; or "
            "show it a single GPU: put CUDA_VISIBLE_DEVICES=0 before the command."
        )


def check_launch(said: str) -> None:
    """Refuse what this launch cannot run. `said` is the stage with its settings, as on the command line."""
    alone = next((word for word in ONE_PROCESS_ONLY if word in said.split()), None)
    if processes() > 1 and alone:
        raise UserError(f"{said} runs in one process; start it with python -m rlhf_pipeline.")
    if (local := _number("LOCAL_WORLD_SIZE", 1)) > 1:
        import torch

        if 0 < (gpus := torch.cuda.device_count()) < local:
            raise UserError(f"{local} processes were started, but there are {gpus} GPUs; set PROCS={gpus}.")
    if (kind := sharding()) is None:
        return
    # After training, transformers' trainers can only save a sharded model; our PPO gathers ZeRO's shards to sample.
    stages = [f"stage={name}" for name, stage in STAGES.items() if kind in stage.sharded]
    if said not in stages and not (said == "stage=ppo policy.lora=" and "stage=ppo" in stages):
        fits = f" ({kind} is for {', '.join(stages)}; with an adapter, only stage=ppo.)" if stages else ""
        raise UserError(f"{said} does not run under {kind}; launch it with ddp.{fits}")
    import torch

    if not torch.cuda.is_available() and (kind == "fsdp" or os.environ.get("DS_ACCELERATOR") != "cpu"):
        raise UserError(f"{kind} needs GPUs; launch the stage with ddp.")
    if kind != "fsdp" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{kind} needs DeepSpeed: pip install 'rlhf_pipeline[gpu]'.")


def rows_per_step(trainer: Mapping[str, Any], count: int) -> int:
    """Return the rows per optimizer step, or per PPO batch, with `count` processes."""
    size, steps = (trainer.get(name) or default for name, default in zip(BATCH_FIELDS, (8, 1), strict=True))
    return int(size) * int(steps) * count


def same_step(before: Mapping[str, Any], count: int, asked: Mapping[str, Any]) -> dict[str, int] | None:
    """Return the BATCH_FIELDS with which this launch keeps the rows per step of a run of `count` processes, or None.

    If the user changed neither field, the rows per process change.
    """
    rows, now = rows_per_step(before, count), processes()
    size = int(asked.get(BATCH_FIELDS[0]) or 8)
    if rows_per_step(asked, now) != rows:
        if any(before.get(name) != asked.get(name) for name in BATCH_FIELDS) or rows % now:
            return None
        size = math.gcd(size, rows // now)
    return {BATCH_FIELDS[0]: size, BATCH_FIELDS[1]: rows // (size * now)}


# -- working together


def connect() -> None:
    """Connect to the other processes, if there are any."""
    if processes() == 1:
        return
    import torch
    from accelerate import PartialState

    if not PartialState._shared_state:
        # On a CPU accelerate needs cpu=True, or it treats each process as a separate run. The timeout is long because
        # processes may wait while one works alone. A process that dies is noticed at once.
        PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))
        atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())


def agree(decide: Callable[[], T]) -> T:
    """Return rank 0's decision in all processes. If rank 0 raises `UserError`, all processes raise it."""
    if processes() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    connect()
    found: list[Any] = [None]
    if rank() == 0:
        try:
            found = [decide()]
        except UserError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]


def is_own_part(number: int) -> bool:
    """Whether this process does part `number` of the work."""
    return number % processes() == rank()


def gather_parts(own: Mapping[int, T]) -> list[T]:
    """Return the results of all processes in the order of their parts."""
    if processes() == 1:
        return list(own.values())
    from accelerate.utils import gather_object

    connect()
    return [found for _, found in sorted(gather_object(list(own.items())), key=lambda pair: pair[0])]


def by_rank_0(write: Callable[P, None]) -> Callable[P, None]:
    """Make a function run on rank 0 only."""

    @functools.wraps(write)
    def guarded(*args: P.args, **options: P.kwargs) -> None:
        if rank() == 0:
            write(*args, **options)

    return guarded


# -- printing and ending


@contextlib.contextmanager
def rank_output(folder: Path | None = None) -> Iterator[None]:
    """Let only rank 0 print to the screen. Others write `rank<n>.log` in `folder`; without a folder, nothing."""
    if rank() == 0:
        yield
        return
    path = folder / f"rank{rank()}.log" if folder else Path(os.devnull)
    path.parent.mkdir(parents=True, exist_ok=True)
    log = path.open("a", encoding="utf-8", buffering=1)
    with log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        yield


@contextlib.contextmanager
def ending_together() -> Iterator[None]:
    """Leave the block when all processes do. Raises LostProcessError if another process exits earlier."""
    try:
        yield
        agree(lambda: None)  # rank 0 may still be writing what the others will read
    except RuntimeError as error:
        from torch.distributed import DistError

        if isinstance(error, DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by")):
            cause = str(error).strip().splitlines()[0][:300]
            raise LostProcessError(f"another process has exited ({cause}). Run the command again to resume.") from error
        raise


def exit_with(message: str, status: int, shared: bool = True) -> NoReturn:
    """Print a message and exit, on any rank. If all ranks may raise it (`shared`), rank 0 prints it first."""
    if rank():
        message = f"process {rank()}: {message}"
        time.sleep(3 if shared else 0)  # by then rank 0 has exited, and the launcher has stopped this process
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows it at the end of its own report
        Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    print(message, file=sys.__stderr__ if rank() else sys.stderr, flush=True)
    sys.exit(status)


def end_at_once(run: Callable[[], None]) -> NoReturn:
    """Run, then exit without the interpreter's shutdown, which gloo's threads (kept alive by DDP) would abort."""
    status = 0
    try:
        run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # the reader has closed the pipe
            stream.flush()
    os._exit(status)
