"""Labelled texts, as classifiers learn them; with the language-model loss beside, as GPT-1 has it."""

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
from rlhf_pipeline.training.batching import Counted


def tokenized(rows: Sequence[Labelled], tokenizer: Any, longest: int) -> Dataset:
    """Token ids and class of each row, at most `longest` tokens."""
    ids: list[list[int]] = []
    for part in parts([row.text for row in rows], 200, "tokenize", "text"):
        ids += tokenizer(part, truncation=True, max_length=longest)["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": [row.label for row in rows]})


class ClassifierTrainer(Counted):
    """A classifier's trainer that logs how often it is right, as TRL's RewardTrainer does.

    With `lm_coef` λ its trunk goes on learning language (Radford et al. 2018, section 3.2, L3 = L2 + λ L1). L1 is the
    mean over a step's tokens, each told from those before it, by the input embedding as the head.
    """

    def __init__(self, *args: Any, lm_coef: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lm_coef = lm_coef

    def _counts(self, batch: dict[str, Any]) -> Tensor:
        counted = batch["labels"].ne(-100)
        return torch.stack([counted.sum(), told(batch["attention_mask"][counted]).sum()])

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """The mean over rows of the classes' cross-entropy; the second loss from the same pass."""
        labels, smoothing = inputs["labels"], self.args.label_smoothing_factor
        given = {name: value for name, value in inputs.items() if name != "labels"}
        outputs = model(**given, output_hidden_states=bool(self.lm_coef))
        rows, tokens = self._counts_of(inputs, num_items_in_batch)
        own_rows, own_tokens = self._counts(inputs)
        loss = cross_entropy(outputs.logits, labels, reduction="sum", label_smoothing=smoothing) / rows
        figures = {"accuracy": ((outputs.logits.argmax(-1) == labels).sum(), own_rows)}
        if self.lm_coef:
            head = self.accelerator.unwrap_model(model).get_input_embeddings().weight
            counted = told(inputs["attention_mask"] * labels.ne(-100)[:, None])
            states, targets = outputs.hidden_states[-1][:, :-1][counted], inputs["input_ids"][:, 1:][counted]
            language = summed_losses(states, head, None, targets).loss
            figures |= {"classification_loss": (loss * rows, own_rows), "lm_loss": (language, own_tokens)}
            loss = loss + self.lm_coef * language / tokens
        self.note(figures)
        return (loss, outputs) if return_outputs else loss


def told(mask: Tensor) -> Tensor:
    """Which tokens are told from one before them: (batch, time) to (batch, time - 1)."""
    return mask[:, 1:].bool() & mask[:, :-1].bool()


def check_language_model(model: Any) -> None:
    """Refuse `lm_coef` for what is no language model whose head is its input embedding."""
    if looks_ahead(model) or not model.config.tie_word_embeddings:
        raise UserError(
            "reward.lm_coef needs a language model that reads from left to right and whose head is its input "
            f"embedding, as GPT-2's; {model.name_or_path or type(model).__name__} is none. Use another policy= or "
            "reward.path=, or reward.lm_coef=0."
        )
