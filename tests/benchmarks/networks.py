"""Shared by the benchmarks that train: an untrained GPT-2, a small tokenizer, and this process's device and memory."""

from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, PreTrainedTokenizerBase

from rlhf_pipeline.models.policies import train_tokenizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
GPT2_SMALL = {"layers": 12, "width": 768, "heads": 12, "vocabulary": 50257}
SMALL = {"layers": 6, "width": 256, "heads": 4, "vocabulary": 8192}
QUICK = {"layers": 2, "width": 64, "heads": 2, "vocabulary": 1000}


def gpt2_config(*, layers: int, width: int, heads: int, vocabulary: int, **more: Any) -> GPT2Config:
    """The configuration of a GPT-2 without dropout, for a language model or a scorer."""
    shape = {"n_layer": layers, "n_embd": width, "n_head": heads, "vocab_size": vocabulary, "num_labels": 1}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0)
    return GPT2Config(**{**shape, **dropout, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1, **more})


def small_tokenizer() -> PreTrainedTokenizerBase:
    """A tokenizer of 300 tokens, with 1024 positions."""
    return train_tokenizer(["A film that nobody needed, and that everybody saw."], 300, 1024)


def synchronize() -> None:
    """Wait until the GPU has finished its queue."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def resident(what: str) -> int:
    """Return bytes of this process: VmRSS, the current memory, or VmHWM, the peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(what))


def peak_memory() -> int:
    """Return this process's peak memory in bytes: on the GPU if there is one."""
    return torch.cuda.max_memory_allocated() if DEVICE == "cuda" else resident("VmHWM")
