"""How the tests start several processes, as a user does."""

import os
import subprocess
import sys
from collections.abc import Sequence

from conftest import ROOT


def torchrun(processes: int, *asked: str) -> list[str]:
    """A command that starts a module (`-m name`) or a file in so many processes."""
    return [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes), *asked,
    ]  # fmt: skip


def accelerate(launch: str, processes: int, *asked: str) -> list[str]:
    """The same by accelerate, as a file of conf/accelerate says."""
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(ROOT / "conf" / "accelerate" / f"{launch}.yaml"), "--num_processes", str(processes), *asked,
    ]  # fmt: skip


def environment() -> dict[str, str]:
    """With our own modules and those of the tests."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    return {**os.environ, "PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"}


def run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    """Its exit status and what it said."""
    return subprocess.run(command, env=environment(), capture_output=True, text=True, check=False, timeout=300)
