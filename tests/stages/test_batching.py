"""The order of the rows: of like length, by seed and epoch alone; and what a resumed run makes of it."""

import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from tiny_rewards import tiny_config
from transformers import GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl import SFTConfig
from two_trainers import make

from rlhf_pipeline.models.policies import train_tokenizer
from rlhf_pipeline.training.batching import EpochSampler, OrderedSFTTrainer, row_lengths


def lengths_like_reviews(count: int) -> list[int]:
    """A long tail: the median 200, one in a hundred beyond 1000."""
    generator = torch.Generator().manual_seed(1)
    return [int(x) for x in torch.empty(count).log_normal_(5.3, 0.7, generator=generator)]


def order(lengths: list[int], seed: int, epoch: int, batch: int = 8) -> list[int]:
    return list(EpochSampler(lengths, batch, seed, lambda: epoch))


@pytest.mark.parametrize("count", [1, 7, 8, 77, 1000])
def test_an_epoch_has_every_row_once(count: int) -> None:
    lengths = lengths_like_reviews(count)
    found = order(lengths, 0, 0)
    assert sorted(found) == list(range(count))
    assert len(EpochSampler(lengths, 8, 0, lambda: 0)) == count


def test_the_order_depends_on_seed_and_epoch_alone() -> None:
    lengths = lengths_like_reviews(200)
    first = order(lengths, 0, 0)
    torch.rand(3)  # another state of the global generator
    assert order(lengths, 0, 0) == first
    others = [order(lengths, 0, 1), order(lengths, 1, 0), order(lengths, 1, 1)]
    assert len({tuple(found) for found in (first, *others)}) == 4
    epochs = [{frozenset(found[i : i + 8]) for i in range(0, 200, 8)} for found in (first, others[0])]
    assert len(epochs[0] & epochs[1]) < 5, "the same rows meet again and again"


def test_batches_hold_little_padding_and_come_in_no_order_of_length() -> None:
    lengths = lengths_like_reviews(1000)
    found = order(lengths, 0, 0)
    longest = [max(lengths[row] for row in found[i : i + 8]) for i in range(0, 1000, 8)]
    assert 8 * sum(longest) < 1.15 * sum(lengths)
    rises = sum(a < b for a, b in itertools.pairwise(longest))
    assert 45 < rises < 80
    shuffled = order([0] * 1000, 0, 0)
    assert 8 * sum(max(lengths[row] for row in shuffled[i : i + 8]) for i in range(0, 1000, 8)) > 1.5 * sum(lengths)


def test_a_pair_is_as_long_as_its_longer_side() -> None:
    pairs = Dataset.from_dict({"chosen_ids": [[1], [1, 2, 3], [1] * 9], "rejected_ids": [[1, 2], [1, 2], [1]]})
    assert row_lengths(pairs) == [2, 3, 9]
    assert row_lengths(pairs.filter(lambda row: len(row["chosen_ids"]) != 3)) == [2, 9]
    assert row_lengths(Dataset.from_dict({"input_ids": [[1], [1, 2]], "labels": [[1], [1, 2]]})) == [1, 2]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return train_tokenizer(["a film of a few words"], 260, 64)


def gpt2() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(tiny_config(initializer_range=0.3, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0))


def sft_trainer(
    folder: Path, model: Any, tokenizer: PreTrainedTokenizerBase, rows: dict[str, Any], **options: Any
) -> OrderedSFTTrainer:
    settings = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True} | options
    args = SFTConfig(output_dir=str(folder), gradient_checkpointing=False, **settings)
    data = Dataset.from_dict(rows)
    return OrderedSFTTrainer(model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer)


@pytest.mark.parametrize("strategy", ["group_by_length", "random"])
@pytest.mark.parametrize("kind", ["sft", "language", "comparisons"])
def test_a_run_cut_off_in_any_epoch_ends_as_one_never_cut_off(kind: str, strategy: str, tmp_path: Path) -> None:
    """Three epochs of 4 steps each, with dropout, and with evaluations between."""
    options: dict[str, Any] = {
        "num_train_epochs": 3, "train_sampling_strategy": strategy, "optim": "adamw_torch", "learning_rate": 1e-2,
        "save_strategy": "steps", "save_steps": 1, "eval_steps": 3,
        "eval_strategy": "steps" if strategy == "random" else "epoch",  # the latter comes after the epoch's checkpoint
    }  # fmt: skip
    whole = make(kind, tmp_path / "whole", 2, 2, 4, dropout=0.1, **options)
    assert {module.p for module in whole.model.modules() if isinstance(module, torch.nn.Dropout)} == {0.1}
    whole.train()
    expected = {name: value.clone() for name, value in whole.model.state_dict().items()}
    # At the end of the second epoch, and in the third.
    for step in (8, 10):
        torch.manual_seed(99)
        resumed = make(kind, tmp_path / "resumed", 2, 2, 4, dropout=0.1, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert resumed.state.global_step == 12
        for name, value in resumed.model.state_dict().items():
            assert torch.equal(value, expected[name]), f"resumed from step {step}: {name}"


@pytest.mark.parametrize("family", ["GPT-2", "Llama"])
def test_a_language_models_loss_is_a_mean_over_the_tokens_that_are_predicted(
    family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """By hand: the sum of -log p of every token but a row's first, divided by their number."""
    torch.manual_seed(0)
    if family == "GPT-2":
        model: Any = gpt2()
    else:
        sizes = {"vocab_size": 260, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=2))
    ids = [[5, 9, 11], [7, 8], [20, 21, 22, 23, 24, 25, 26, 27]]
    total, count = 0.0, 0
    for row in ids:
        with torch.no_grad():
            log_p = model(torch.tensor([row])).logits[0, :-1].log_softmax(-1)
        total -= float(log_p.gather(-1, torch.tensor(row[1:])[:, None]).sum())
        count += len(row) - 1
    trainer = sft_trainer(
        tmp_path, model, tokenizer, {"input_ids": ids}, max_steps=1, per_device_train_batch_size=1,
        gradient_accumulation_steps=3, per_device_eval_batch_size=2, logging_steps=1, learning_rate=1e-9,
    )  # fmt: skip
    assert trainer.evaluate()["eval_loss"] == pytest.approx(total / count, rel=1e-5)
    trainer.train()
    assert trainer.state.log_history[0]["loss"] == pytest.approx(total / count, rel=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_a_language_models_loss_gradient_and_figures_are_trls(
    adapted: bool, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    torch.manual_seed(0)
    model: Any = gpt2()
    if adapted:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False, fan_in_fan_out=True))
    rows = {"input_ids": [[5, 9, 11], [20, 21, 22, 23, 24, 25]], "completion_mask": [[0, 1, 1], [0, 0, 0, 1, 1, 1]]}
    trainer = sft_trainer(tmp_path, model, tokenizer, rows)
    found = []
    for fused in (True, False):
        trainer.fused = fused
        batch = trainer.data_collator([trainer.train_dataset[i] for i in range(2)])
        loss = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(5))
        trainer.model.zero_grad()
        loss.backward()
        gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
        figures = {name: trainer._metrics["train"].pop(name) for name in ("entropy", "mean_token_accuracy")}
        found.append((loss.detach(), gradient, figures))
    (mine, slope, figures), (theirs, expected, others) = found
    torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(slope, expected, atol=1e-6, rtol=1e-4)
    assert slope.abs().max() > 0.01
    for name, value in figures.items():
        assert value == pytest.approx(others[name], rel=1e-4), name


@pytest.mark.parametrize("option", [{"loss_type": "dft"}, {"label_smoothing_factor": 0.1}])
def test_other_losses_of_trls_are_still_its_own(
    option: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # TRL 1.16 gives label smoothing up
        trainer = sft_trainer(tmp_path, gpt2(), tokenizer, {"input_ids": [[5, 9, 11]]}, **option)
        assert not trainer.fused
        batch = trainer.data_collator([trainer.train_dataset[0]])
        assert torch.isfinite(trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(2)))
