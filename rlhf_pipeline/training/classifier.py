"""Train classifiers on labelled texts, optionally with a language-model loss, as in GPT-1."""

from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from rlhf_pipeline.data.records import Labelled
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.likelihood import summed_losses
from rlhf_pipeline.models.networks import looks_ahead
from rlhf_pipeline.progress import parts
from rlhf_pipeline.training.batching import SumLossTrainer


def tokenize_labelled(rows: Sequence[Labelled], tokenizer: Any, longest: int) -> Dataset:
    """Return the token ids (at most `longest`) and the class of each row."""
    ids: list[list[int]] = []
    for part in parts([row.text for row in rows], 200, "tokenize", "text"):
        ids += tokenizer(part, truncation=True, max_length=longest)["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": [row.label for row in rows]})


class ClassifierTrainer(SumLossTrainer):
    """Trains a classifier and logs its accuracy, as TRL's RewardTrainer does.

    With `lm_coef` λ its trunk also learns language (Radford et al. 2018, section 3.2, L3 = L2 + λ L1). L1 is the mean
    over a step's tokens, each predicted from those before it; the head is the input embedding.
    """

    def __init__(self, *args: Any, lm_coef: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lm_coef = lm_coef

    def _counts(self, batch: dict[str, Any]) -> Tensor:
        counted = batch["labels"].ne(-100)
        return torch.stack([counted.sum(), predicted_tokens(batch["attention_mask"][counted]).sum()])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Return the mean cross-entropy over rows, plus the language-model loss from the same forward pass."""
        labels, smoothing = inputs["labels"], self.args.label_smoothing_factor
        given = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**given, output_hidden_states=bool(self.lm_coef))
        rows, tokens = self._counts_of(inputs, num_items_in_batch)
        own_rows, own_tokens = self._counts(inputs)
        loss = cross_entropy(outputs.logits, labels, reduction="sum", label_smoothing=smoothing) / rows
        figures = {"accuracy": ((outputs.logits.argmax(-1) == labels).sum(), own_rows)}
        if self.lm_coef:
            head = self.accelerator.unwrap_model(model).get_input_embeddings().weight
            counted = predicted_tokens(inputs["attention_mask"] * labels.ne(-100)[:, None])
            states, targets = outputs.hidden_states[-1][:, :-1][counted], inputs["input_ids"][:, 1:][counted]
            language = summed_losses(states, head, None, targets).loss
            figures |= {"classification_loss": (loss * rows, own_rows), "lm_loss": (language, own_tokens)}
            loss = loss + self.lm_coef * language / tokens
        self.note(figures)
        return (loss, outputs) if return_outputs else loss


def predicted_tokens(mask: Tensor) -> Tensor:
    """Return which tokens are predicted from the token before: (batch, time) to (batch, time - 1)."""
    return mask[:, 1:].bool() & mask[:, :-1].bool()


def check_language_model(model: Any) -> None:
    """Refuse `lm_coef` unless the model is a causal language model whose head is its input embedding."""
    if looks_ahead(model) or not model.config.tie_word_embeddings:
        raise UserError(
            "reward.lm_coef needs a causal language model whose head is its input embedding, such as GPT-2; "
            f"{model.name_or_path or type(model).__name__} is not one. Use another policy= or reward.path=, or "
            "reward.lm_coef=0."
        )
