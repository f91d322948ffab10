"""Runs a program in a terminal, and reads what the terminal shows."""

import os
import pty
import re
import subprocess
import sys
import termios
from pathlib import Path

from conftest import ROOT


def at_a_terminal(command: list[str], folder: Path) -> tuple[int, str]:
    """Run a Python program in a terminal of 150 columns; returns its exit status and its output."""
    terminal, inside = pty.openpty()
    termios.tcsetwinsize(terminal, (40, 150))
    with subprocess.Popen(
        [sys.executable, *command], stdin=subprocess.DEVNULL, stdout=inside, stderr=inside, cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    ) as process:  # fmt: skip
        os.close(inside)
        shown = b""
        while part := _read(terminal):
            shown += part
    os.close(terminal)
    return process.returncode, shown.decode()


def left_standing(shown: str) -> list[str]:
    """Return each line's final state, without escape codes such as colours."""
    lines = re.sub(r"\x1b\[[0-9;]*[A-Za-z]", "", shown).split("\r\n")
    return [next((state for state in reversed(line.split("\r")) if state.strip()), "") for line in lines]


def _read(terminal: int) -> bytes:
    try:
        return os.read(terminal, 65_536)
    except OSError:  # the end of the output, on Linux
        return b""
