"""Sequence classifiers small enough for a test, and how they are trained."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
)
from trl import RewardConfig


def tiny_config(**options: Any) -> GPT2Config:
    sizes: dict[str, Any] = {"vocab_size": 300, "n_positions": 64, "n_embd": 16, "n_layer": 2, "n_head": 2}
    return GPT2Config(**{**sizes, "pad_token_id": 1, "eos_token_id": 0, "num_labels": 1, **options})


def tiny_model(**options: Any) -> GPT2ForSequenceClassification:
    torch.manual_seed(0)
    return GPT2ForSequenceClassification(tiny_config(initializer_range=0.2, **options))


def reward_args(folder: Path, **options: Any) -> RewardConfig:
    values: dict[str, Any] = {
        "per_device_train_batch_size": 4, "num_train_epochs": 1, "learning_rate": 1e-2, "max_length": 32,
        "gradient_checkpointing": False, "dataloader_pin_memory": False, "bf16": False, "report_to": "none",
        "disable_tqdm": True, "save_strategy": "no", "train_sampling_strategy": "group_by_length", "use_cpu": True,
    }  # fmt: skip
    return RewardConfig(output_dir=str(folder), **{**values, **options})


def loss_and_gradient(trainer: Any) -> tuple[float, torch.Tensor]:
    """Loss and gradient of one batch with all rows."""
    loss = trainer.compute_loss(trainer.model.train(), trainer.data_collator(list(trainer.train_dataset)))
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])


def llama() -> LlamaForSequenceClassification:
    return LlamaForSequenceClassification(
        LlamaConfig(vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                    num_labels=1, pad_token_id=1)
    )  # fmt: skip


def distilbert() -> DistilBertForSequenceClassification:
    config = DistilBertConfig(vocab_size=300, dim=16, hidden_dim=16, n_layers=1, n_heads=2, num_labels=1)
    return DistilBertForSequenceClassification(config)


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)
