"""Starts several processes as a user does."""

import os
import subprocess
import sys
from collections.abc import Sequence

from conftest import ROOT


def torchrun(processes: int, *asked: str) -> list[str]:
    """Return the command that starts a module (`-m name`) or a file in `processes` processes."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *asked,
    ]  # fmt: skip


def accelerate(launch: str, processes: int, *asked: str) -> list[str]:
    """The same with accelerate and a file of conf/accelerate."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(ROOT / "conf" / "accelerate" / f"{launch}.yaml"), "--num_processes", str(processes), *asked,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """The environment, in which our modules and those of the tests can be imported."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Run a command; returns its exit status and output."""
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
