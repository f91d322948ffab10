"""A policy small enough for a test, with its tokenizer, reward and trainer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerBase

from rlhf_pipeline.models.policies import train_tokenizer
from rlhf_pipeline.models.sampling import Batch, Sampling, sample, uniform_draws
from rlhf_pipeline.ppo import PPOConfig, PPOTrainer
from rlhf_pipeline.ppo.trainer import Experience

TEXTS = ["the film was good and the cast was fine", "the plot was bad and nobody liked it"] * 20


def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """A byte-level BPE of 300 tokens: 0 ends a text, 1 pads."""
    return train_tokenizer(TEXTS, 300, 64)


def tiny_policy(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> GPT2LMHeadModel:
    """A policy far from uniform, so that distributions can differ."""
    torch.manual_seed(seed)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=64, n_layer=2, n_embd=32, n_head=2, initializer_range=0.3,
        bos_token_id=0, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def tiny_scorer(tokenizer: PreTrainedTokenizerBase, seed: int = 1) -> GPT2ForSequenceClassification:
    """A classifier over the policy's tokens with one score: what TRL takes as a reward or value model."""
    config = tiny_policy(tokenizer).config
    config.num_labels = 1
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(config).eval()


def lora(**options: Any) -> LoraConfig:
    """An adapter on the attention's matrices, always with the same first weights."""
    torch.manual_seed(5)
    return LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True, **options)


def tiny_gguf(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Write an 8-bit Llama of one layer with the tokens of `tiny_tokenizer`; returns its fp32 weights by GGUF's names.

    Needs the package gguf.
    """
    import gguf

    bpe = json.loads(tiny_tokenizer().backend_tokenizer.to_str())["model"]
    tokens, width, inner = sorted(bpe["vocab"], key=bpe["vocab"].get), 32, 64
    writer = gguf.GGUFWriter(path, "llama")
    for name, value in {
        "context_length": 64, "embedding_length": width, "block_count": 1, "feed_forward_length": inner,
        "head_count": 2, "head_count_kv": 2, "layer_norm_rms_eps": 1e-5, "rope_freq_base": 1e4,
        "vocab_size": len(tokens), "tokenizer_model": "gpt2", "token_list": tokens,
        "token_types": [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokens) - 2),
        "token_merges": [" ".join(pair) for pair in bpe["merges"]],
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 1,
    }.items():  # fmt: skip
        getattr(writer, f"add_{name}")(value)
    shapes = {"token_embd": (len(tokens), width), "output_norm": (width,)}
    shapes |= dict.fromkeys(("blk.0.attn_norm", "blk.0.ffn_norm"), (width,))
    shapes |= {f"blk.0.attn_{name}": (width, width) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_gate": (inner, width), "blk.0.ffn_up": (inner, width), "blk.0.ffn_down": (width, inner)}
    draw = np.random.default_rng(0)
    weights = {name: draw.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    for name, weight in weights.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if weight.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


PROMPTS = [[5, 9, 11], [7], [20, 21, 22, 23, 24], [30, 8]]


def answers(
    policy: GPT2LMHeadModel, prompts: list[list[int]], limits: list[int], sampling: Sampling, seed: int = 0
) -> Batch:
    """Sample responses with a seed."""
    wanted = torch.tensor(limits)
    draws = uniform_draws(wanted, torch.Generator().manual_seed(seed))
    return sample(policy, prompts, wanted, sampling, draws)


def good_share(prompts: object, responses: list[str]) -> list[float]:
    """A reward that is easy to learn: the share of the letter o."""
    return [text.count("o") / max(len(text), 1) for text in responses]


def trainer(
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    dtype: torch.dtype = torch.float32,
    given: dict[str, Any] | None = None,
    **options: object,
) -> PPOTrainer:
    """Make a trainer of a tiny policy with the reward `good_share`; `given` are other constructor arguments."""
    values: dict[str, object] = {
        "total_episodes": 64, "per_device_train_batch_size": 8, "num_ppo_epochs": 2, "learning_rate": 1e-3,
        "response_length": 6, "temperature": 1.0, "stop_token": "eos", "disable_tqdm": True, "report_to": "none",
        "save_steps": 100, "num_sample_generations": 0, "bf16": False,
    }  # fmt: skip
    args = PPOConfig(output_dir=str(folder), **{**values, **options})
    more = {
        "model": tiny_policy(tokenizer).to(dtype), "ref_model": None, "reward_model": good_share,
        "train_dataset": PROMPTS * 8, **(given or {}),
    }  # fmt: skip
    return PPOTrainer(args, tokenizer, **more)


def first_experience(ppo: PPOTrainer) -> Experience:
    """Sample and estimate the first update, before any step."""
    ppo.begin(None)
    return ppo._estimate(ppo._roll_out(0))


def stats_of_first_update(ppo: PPOTrainer) -> dict[str, float]:
    """Do one update as `train` does; returns its statistics."""
    experience = first_experience(ppo)
    return {**ppo._describe(experience), **ppo._optimise(experience, 0)}


def weights(ppo: PPOTrainer) -> torch.Tensor:
    """All of the policy's and the value head's weights in one vector."""
    return torch.cat([p.detach().flatten() for p in ppo.model.parameters()])
