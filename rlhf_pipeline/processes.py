"""Several processes on one run: agreeing, sharing out what there is to do, and leaving together."""

import atexit
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, gather_object

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.launch import processes, rank

T = TypeVar("T")

# Who waits for a process that works alone waits this long; one that has died is noticed at once.
_PATIENCE = timedelta(hours=6)


def join() -> None:
    """Meet the other processes; in vain where there are none."""
    if processes() > 1 and not PartialState._shared_state:
        # Without an accelerator accelerate must be told so, or it takes each process for one of its own.
        PartialState(cpu=not torch.accelerator.is_available(), timeout=_PATIENCE)
        atexit.register(_leave)


def agree(decide: Callable[[], T]) -> T:
    """What the first process decides, in all of them. Its `UserError` is everyone's."""
    if processes() == 1:
        return decide()
    join()
    found: list[T | UserError | None] = [None]
    if rank() == 0:
        try:
            found = [decide()]
        except UserError as error:
            found = [error]
    broadcast_object_list(found)
    if isinstance(found[0], UserError):
        raise found[0]
    return found[0]  # type: ignore[return-value]


def mine(number: int) -> bool:
    """Whether part `number` of what is shared out is this process's."""
    return number % processes() == rank()


def gathered(own: Mapping[int, T]) -> list[T]:
    """The results of all processes in the order of their parts."""
    if processes() == 1:
        return list(own.values())
    join()
    return [found for _, found in sorted(gather_object(list(own.items())), key=lambda pair: pair[0])]


def lost(error: BaseException) -> bool:
    """Whether a collective failed, as it does when another process has ended."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or any(word in str(error) for word in ("gloo", "NCCL", "Connection closed by"))


def _leave() -> None:
    """Take leave of the other processes, or the connections would be found open when all is torn down."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
