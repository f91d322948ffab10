"""How threads wait for each other: it is said before torch is loaded, and what the user says stands."""

import os
import subprocess
import sys

import pytest


@pytest.mark.parametrize(
    ("said", "found"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")]
)
def test_threads_that_wait_soon_sleep_unless_the_user_says_otherwise(said: dict[str, str], found: str) -> None:
    code = "import os, sys, rlhf_pipeline; print('torch' in sys.modules, os.environ.get('GOMP_SPINCOUNT'))"
    clean = {key: value for key, value in os.environ.items() if key not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run(
        [sys.executable, "-c", code], env={**clean, **said}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", found]
