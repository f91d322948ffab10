"""InstructGPT's three steps for a GPT-2, as a thin layer over Hugging Face TRL."""

import os

# A waiting thread spins before it sleeps. libgomp, which torch uses on Linux, spins for milliseconds by default. Next
# to other busy processes, this made a PPO update more than ten times slower. The variable is read when torch is loaded.
# It changes how threads wait, not the results.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
