"""Several processes on one run: agreeing on what to do, and leaving together."""

from collections.abc import Callable

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from rlhf_pipeline.errors import UserError


def agree(decide: Callable[[], bool]) -> bool:
    """What the first process decides, in all of them. Its `UserError` is everyone's."""
    # Without an accelerator accelerate must be told so, or it takes each process for one of its own.
    state = PartialState(cpu=not torch.accelerator.is_available())
    found: list[bool | str] = [False]
    if state.is_main_process:
        try:
            found = [decide()]
        except UserError as error:
            found = [str(error)]
    broadcast_object_list(found)
    if isinstance(found[0], str):
        raise UserError(found[0])
    return found[0]


def leave() -> None:
    """Take leave of the other processes."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
