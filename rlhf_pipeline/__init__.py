"""InstructGPT's three steps around a GPT-2, as a thin layer over Hugging Face TRL."""

__version__ = "0.1.0"
