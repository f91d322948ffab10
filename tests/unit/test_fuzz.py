"""Odd and hostile inputs by the real command: a hundred of those that `make fuzz` tries by the thousand."""

import subprocess
import sys
from pathlib import Path

from conftest import ROOT


def test_a_hundred_odd_inputs_neither_crash_nor_hang_nor_run_nor_lose_anything(tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "tests" / "benchmarks" / "fuzz.py"), "--count", "100", "--keep", str(tmp_path)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert "100 inputs in" in done.stdout
