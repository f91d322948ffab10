"""InstructGPT's three steps around a GPT-2, as a thin layer over Hugging Face TRL."""

import os

# How long a thread of libgomp, torch's on Linux, spins before it sleeps while it waits for the others, read when torch
# is loaded. Its own default is milliseconds: beside another busy process that made an update of PPO ten times as long
# and more. Shorter than this, a quiet machine would be slower. It changes no result.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__version__ = "0.1.0"
