"""Runs the command line in forks of this process, which has loaded the libraries, so that a start takes no time."""

import atexit
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import MINIATURE as MINIATURE  # sets the environment, so it comes before the libraries

from rlhf_pipeline import cli
from rlhf_pipeline.processes import end_at_once
from rlhf_pipeline.stages import evaluate, ppo, reward, sft  # noqa: F401 (loaded for the forks)


def fork(words: Sequence[str], folder: Path, log: Path, first: Callable[[], object] = lambda: None) -> int:
    """Start a command in `folder` and in a session of its own, after `first`; returns its process id."""
    sys.stdout.flush()
    if process := os.fork():
        return process
    os.setsid()
    os.chdir(folder)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for stream in (1, 2):
        os.dup2(output, stream)
    sys.stdin, sys.stdout, sys.stderr = os.fdopen(0), os.fdopen(1, "w"), os.fdopen(2, "w")
    sys.__stderr__ = sys.stderr  # type: ignore[misc]
    sys.argv = ["rlhf_pipeline", *words]
    atexit._clear()  # the handlers belong to the parent and would delete its folders
    first()
    end_at_once(cli.main)
