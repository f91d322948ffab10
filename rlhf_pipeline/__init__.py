"""InstructGPT's three steps around a GPT-2, as a thin layer over Hugging Face TRL."""

import os

# A thread that waits for the others spins before it sleeps. libgomp, which torch uses on Linux, spins for milliseconds
# by default; beside other busy processes that made an update of PPO more than ten times as long. The variable is read
# when torch is loaded. It changes how threads wait, and no result.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
