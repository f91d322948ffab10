"""Several processes on one run, started by torchrun or accelerate launch: what they share, and how they end.

torch and accelerate are imported only where processes meet, so that the command line starts fast.
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

# The fields that, with the number of processes, make the rows of a step. transformers' defaults are 8 and 1.
CUT = ("per_device_train_batch_size", "gradient_accumulation_steps")
ONE_PROCESS_ONLY = ("stage=chat", "stage=plan", "stage=compare", "compare=", "labels=", "sweep=")
# DeepSpeed's buffers in parameters, a tenth of its own defaults: with those, a GPT-2 would never be sharded.
ZERO = {
    "reduce_bucket_size": 50_000_000,
    "stage3_max_live_parameters": 100_000_000,
    "stage3_max_reuse_distance": 100_000_000,
}


# -- how this process was started


def _number(variable: str, default: int) -> int:
    """What torchrun put into the environment."""
    text = os.environ.get(variable) or str(default)
    if not text.isascii() or not text.isdigit():
        raise UserError(f"{variable}={text} in the environment is no whole number; torchrun sets it, or unset it.")
    return int(text)


def rank() -> int:
    """This process's number among those that were started together."""
    return _number("RANK", 0)


def processes() -> int:
    """How many were started together."""
    return _number("WORLD_SIZE", 1)


def sharding() -> str | None:
    """What accelerate launch shards by: zero2, zero3 or fsdp; None where each process holds the whole model."""
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        return f"zero{os.environ.get('ACCELERATE_DEEPSPEED_ZERO_STAGE', '2')}"
    return "fsdp" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else None


def checkpoints_of(stage: str) -> str | None:
    """The launch that alone can resume a stage's checkpoints; PPO's are resumed by any."""
    kind = None if stage == "ppo" else sharding()
    return f"{kind} on {processes()} processes" if kind and kind != "fsdp" else kind


def check_gpus(visible: int, start: str) -> None:
    """Refuse several GPUs in one process, over which transformers would split batches by nn.DataParallel.

    `start` is the command that starts a process on each.
    """
    if visible > 1:
        raise UserError(
            f"{visible} GPUs are visible, and one process trains on one GPU. Start a process for each: {start}; or "
            "show it a single GPU: put CUDA_VISIBLE_DEVICES=0 before the command."
        )


def check_launch(said: str) -> None:
    """Refuse what this launch cannot run. `said` is the stage, as on the command line."""
    alone = next((word for word in ONE_PROCESS_ONLY if word in said.split()), None)
    if processes() > 1 and alone:
        raise UserError(f"{said} runs in one process; start it by python -m rlhf_pipeline.")
    if (local := _number("LOCAL_WORLD_SIZE", 1)) > 1:
        import torch

        if 0 < (gpus := torch.cuda.device_count()) < local:
            raise UserError(f"{local} processes were started and there are {gpus} GPUs; start as many, PROCS={gpus}.")
    if (kind := sharding()) is None:
        return
    # After training, transformers' trainers can only save a sharded model; our PPO gathers ZeRO's shards to sample.
    stages = [f"stage={name}" for name, stage in STAGES.items() if kind in stage.sharded]
    if said not in stages and not (said == "stage=ppo policy.lora=" and "stage=ppo" in stages):
        fits = f" ({kind} is for {', '.join(stages)}; an adapter goes with stage=ppo alone.)" if stages else ""
        raise UserError(f"{said} does not run under {kind}; launch it by ddp.{fits}")
    import torch

    if not torch.cuda.is_available() and (kind == "fsdp" or os.environ.get("DS_ACCELERATOR") != "cpu"):
        raise UserError(f"{kind} needs GPUs; launch it by ddp.")
    if kind != "fsdp" and importlib.util.find_spec("deepspeed") is None:
        raise UserError(f"{kind} needs DeepSpeed: pip install 'rlhf_pipeline[gpu]'.")


def rows_a_step(trainer: Mapping[str, Any], count: int) -> int:
    """Rows of an optimizer step, or of a batch of PPO, with `count` processes."""
    size, steps = (trainer.get(name) or default for name, default in zip(CUT, (8, 1), strict=True))
    return int(size) * int(steps) * count


def same_step(before: Mapping[str, Any], count: int, asked: Mapping[str, Any]) -> dict[str, int] | None:
    """The fields of CUT with which a run of `count` processes takes as many rows a step on today's; None: it cannot.

    Where the user changed neither field, each process takes more or fewer rows.
    """
    rows, now = rows_a_step(before, count), processes()
    size = int(asked.get(CUT[0]) or 8)
    if rows_a_step(asked, now) != rows:
        if any(before.get(name) != asked.get(name) for name in CUT) or rows % now:
            return None
        size = math.gcd(size, rows // now)
    return {CUT[0]: size, CUT[1]: rows // (size * now)}


# -- working together


def join() -> None:
    """Meet the other processes, if there are any."""
    if processes() == 1:
        return
    import torch
    from accelerate import PartialState

    if not PartialState._shared_state:
        # Without an accelerator accelerate must be told so, or it takes each process for one of its own. Who waits
        # for a process that works alone waits for hours; one that has died is noticed at once.
        PartialState(cpu=not torch.accelerator.is_available(), timeout=timedelta(hours=6))
        atexit.register(lambda: torch.distributed.is_initialized() and torch.distributed.destroy_process_group())


def agree(decide: Callable[[], T]) -> T:
    """What rank 0 decides, in all processes. Its `UserError` is raised in all of them."""
    if processes() == 1:
        return decide()
    from accelerate.utils import broadcast_object_list

    join()
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


def mine(number: int) -> bool:
    """Whether part `number` of the work is this process's."""
    return number % processes() == rank()


def gathered(own: Mapping[int, T]) -> list[T]:
    """The results of all processes in the order of their parts."""
    if processes() == 1:
        return list(own.values())
    from accelerate.utils import gather_object

    join()
    return [found for _, found in sorted(gather_object(list(own.items())), key=lambda pair: pair[0])]


def by_rank_0(write: Callable[P, None]) -> Callable[P, None]:
    """Let rank 0 alone do what the function does."""

    @functools.wraps(write)
    def guarded(*args: P.args, **options: P.kwargs) -> None:
        if rank() == 0:
            write(*args, **options)

    return guarded


# -- printing and ending


@contextlib.contextmanager
def rank_output(folder: Path | None = None) -> Iterator[None]:
    """Leave the screen to rank 0. The others print to `rank<n>.log` of a stage's folder; without one, nowhere."""
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
    """Leave the block when all processes do. A collective that failed since another one exited: LostProcessError."""
    try:
        yield
        agree(lambda: None)  # rank 0 may still be writing what the others would read
    except RuntimeError as error:
        from torch.distributed import DistError

        if isinstance(error, DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by")):
            cause = str(error).strip().splitlines()[0][:300]
            raise LostProcessError(f"another process has ended ({cause}). The same command resumes the run.") from error
        raise


def leave(message: str, status: int, shared: bool = True) -> NoReturn:
    """Print a message, whoever has the screen, and exit. A `shared` one is likely found by all: rank 0 is first."""
    if rank():
        message = f"process {rank()}: {message}"
        time.sleep(3 if shared else 0)  # then rank 0 has left, and the launcher has ended this process
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # torchrun shows it at the end of its own report
        Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    print(message, file=sys.__stderr__ if rank() else sys.stderr, flush=True)
    sys.exit(status)


def end_at_once(run: Callable[[], None]) -> NoReturn:
    """Run, then exit without taking the interpreter down: gloo's threads, which DDP keeps alive, would abort it."""
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
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)
