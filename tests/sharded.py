"""Runs the command line in one of several processes that shard a model on a CPU.

On a CPU accelerate would replace FSDP with DDP, although gloo supports both. DeepSpeed has its own CPU accelerator.
"""

import os

import pytest
from accelerate import PartialState
from accelerate.utils import DistributedType

from rlhf_pipeline import cli, processes


def main() -> None:
    """Act as `python -m rlhf_pipeline`, with the CPU as the accelerator."""
    start = PartialState.__init__
    patch = pytest.MonkeyPatch()
    patch.setattr(PartialState, "__init__", lambda self, cpu=False, **options: start(self, cpu=False, **options))
    patch.setattr(PartialState, "_prepare_backend", lambda *_, **__: ("gloo", DistributedType.MULTI_GPU))
    if os.environ.get("ACCELERATE_USE_FSDP") == "true":
        patch.setattr(processes, "check_launch", lambda said: None)
    os.environ.update(ACCELERATE_TORCH_DEVICE="cpu", DS_ACCELERATOR="cpu")
    cli.main()


if __name__ == "__main__":
    processes.end_at_once(main)
