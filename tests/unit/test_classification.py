"""Classifiers with GPT-1's second loss."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tiny_rewards import distilbert, llama, reward_args, tiny_model
from transformers import (
    DataCollatorWithPadding,
    GPT2LMHeadModel,
    PreTrainedTokenizerBase,
)

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.policies import train_tokenizer
from rlhf_pipeline.training.classifier import ClassifierTrainer, check_language_model


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = train_tokenizer(["which film was good, the bad one or the other? yes it was"], 300, 64)
    made.truncation_side = "left"
    return made


def classifier_rows(count: int = 8) -> Dataset:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(2, 300, (4 + i % 5,), generator=generator).tolist() for i in range(count)]
    return Dataset.from_dict({"input_ids": ids, "labels": [i % 2 for i in range(count)]})


def test_the_auxiliary_loss_is_that_of_the_language_model_with_tied_head(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    rows = classifier_rows()
    trainer = ClassifierTrainer(
        tiny_model(num_labels=2), reward_args(tmp_path), DataCollatorWithPadding(tokenizer), rows,
        processing_class=tokenizer, lm_coef=0.5,
    )  # fmt: skip
    trainer.model.eval()  # no dropout
    batch = trainer.data_collator(list(rows))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()
    # By hand: cross-entropy of the classes, and transformers' own language model around the same trunk.
    language = GPT2LMHeadModel(trainer.model.config).eval()
    language.transformer = trainer.model.transformer
    language.tie_weights()
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    logits = trainer.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    parts = (
        torch.nn.functional.cross_entropy(logits, batch["labels"]),
        language(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss,
    )
    (parts[0] + 0.5 * parts[1]).backward()
    assert loss.item() == pytest.approx((parts[0] + 0.5 * parts[1]).item(), rel=1e-5)
    logged = {name.removeprefix("eval_"): (v[0][0] / v[0][1]).item() for name, v in trainer.noted.items()}
    right = (logits.argmax(-1) == batch["labels"]).float().mean()
    expected = dict(zip(("classification_loss", "lm_loss", "accuracy"), (*parts, right), strict=True))
    assert logged == pytest.approx({name: value.item() for name, value in expected.items()})
    for name, p in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, atol=1e-6, rtol=1e-4)


def test_a_short_last_batch_counts_by_its_rows(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = classifier_rows(5)
    args = reward_args(tmp_path, per_device_eval_batch_size=4)
    trainer = ClassifierTrainer(tiny_model(num_labels=2), args, DataCollatorWithPadding(tokenizer), rows, rows,
                                processing_class=tokenizer)  # fmt: skip
    batch = trainer.data_collator(list(rows))
    logits = trainer.model.eval()(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    right = (logits.argmax(-1) == batch["labels"]).float()
    assert right[:4].mean() != right.mean()
    assert trainer.evaluate()["eval_accuracy"] == pytest.approx(float(right.mean()))


def test_lm_coef_is_refused_without_a_language_model_with_tied_head() -> None:
    check_language_model(tiny_model())
    for other in (llama(), distilbert()):
        with pytest.raises(UserError, match=f"{type(other).__name__} is not one"):
            check_language_model(other)
