"""Each process of a test under torchrun runs this: it trains with each of our trainers on a few rows."""

import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from tiny_rewards import reward_args, tiny_config
from transformers import DataCollatorWithPadding, GPT2ForSequenceClassification, GPT2LMHeadModel
from trl import SFTConfig

from rlhf_pipeline.models.policies import train_tokenizer
from rlhf_pipeline.processes import agree, connect, end_at_once, processes, rank
from rlhf_pipeline.training.batching import OrderedSFTTrainer
from rlhf_pipeline.training.classifier import ClassifierTrainer
from rlhf_pipeline.training.preferences import Comparison, ComparisonTrainer

KINDS = ("sft", "classifier", "language", "comparisons")
# Steps of 4 rows: the last step of an epoch has one row, so the second process has none.
ROWS, STEP = 13, 4


def results(folder: Path, processes: int, accumulated: int = 1) -> dict[str, dict[str, Any]]:
    """Return each trainer's weights after two epochs, and its log."""
    return {kind: trained(kind, folder / kind, processes, accumulated) for kind in KINDS}


def trained(kind: str, folder: Path, processes: int, accumulated: int) -> dict[str, Any]:
    """Train with one trainer, without dropout, which would differ by process."""
    # Two losses, averaged over rows and over tokens: their mean over batches depends on the batches.
    held_out_batch = 6 // processes if kind == "language" else 5
    trainer = make(kind, folder, STEP // processes // accumulated, accumulated, held_out_batch)
    trainer.train()
    held_out = trainer.evaluate()["eval_loss"]
    weights = {name: value.detach().clone() for name, value in trainer.model.state_dict().items()}
    rows = [{**row, "epoch": 0.0} for row in trainer.state.log_history if "train_loss" not in row]
    return {"weights": weights, "rows": rows, "held_out": held_out}


def make(
    kind: str, folder: Path, batch: int, accumulated: int, held_out_batch: int, dropout: float = 0.0, **options: Any
) -> Any:  # fmt: skip
    """Make a new trainer; `options` are more fields of its configuration."""
    torch.manual_seed(0)
    sizes = [3 + 7 * i % 17 for i in range(ROWS)]
    ids = [torch.randint(2, 258, (size,)).tolist() for size in sizes]
    given: dict[str, Any] = {
        "per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "num_train_epochs": 2,
        "per_device_eval_batch_size": held_out_batch, "logging_steps": 1, "learning_rate": 0.1, "seed": 3,
        "optim": "sgd",  # where there is no gradient (biases of keys), Adam would make steps of rounding errors
        **options,
    }  # fmt: skip
    args = reward_args(folder, disable_dropout=not dropout, **given)
    labels = 1 if kind == "comparisons" else 2
    rates = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), dropout)
    config = tiny_config(num_labels=labels, initializer_range=0.2, **rates)
    tokenizer = train_tokenizer(["a film of a few words"], 260, 64)
    if kind == "sft":
        rows = Dataset.from_dict({"input_ids": ids})
        values = {name: value for name, value in args.to_dict().items() if name in _SHARED} | given
        sft = SFTConfig(output_dir=str(folder), **values)
        return OrderedSFTTrainer(
            GPT2LMHeadModel(config), sft, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
        )
    model = GPT2ForSequenceClassification(config)
    if kind == "comparisons":
        pairs = ((0, 1, 0.0), (0, 2, 0.0), (1, 2, 0.5))
        texts = ["a film", "a few", "words of a film", "of a", "few few words"]
        every = [
            Comparison("", tuple(texts[(i + k) % 5] + " a" * (i % 4) for k in range(3)), pairs[: 1 + i % 3])
            for i in range(ROWS)
        ]
        return ComparisonTrainer(model, args, tokenizer, every, every)
    rows = Dataset.from_dict({"input_ids": ids, "labels": [i % 2 for i in range(ROWS)]})
    built = (model, args, DataCollatorWithPadding(tokenizer), rows, rows)
    return ClassifierTrainer(*built, processing_class=tokenizer, lm_coef=0.5 if kind == "language" else 0.0)


_SHARED = ("gradient_checkpointing", "dataloader_pin_memory", "bf16", "report_to", "disable_tqdm", "save_strategy",
           "train_sampling_strategy", "use_cpu")  # fmt: skip


def main() -> None:
    """Train; process 0 writes the results to the folder."""
    folder = Path(sys.argv[1])
    connect()
    found = results(folder, processes())
    if rank() == 0:
        torch.save(found, folder / "results.pt")
    agree(lambda: None)


if __name__ == "__main__":
    end_at_once(main)
