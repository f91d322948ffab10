"""Labelled texts, as classifiers learn them; with the language-model loss beside, as GPT-1 has it."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.progress import parts
from rlhf_pipeline.records import Labelled
from rlhf_pipeline.stages.batching import OrderedTrainer


def tokenized(rows: Sequence[Labelled], tokenizer: Any, longest: int) -> Dataset:
    """Token ids and class of each row, at most `longest` tokens."""
    ids: list[list[int]] = []
    for part in parts([row.text for row in rows], 200, "tokenize", "text"):
        ids += tokenizer(part, truncation=True, max_length=longest)["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": [row.label for row in rows]})


class ClassifierTrainer(OrderedTrainer):
    """A classifier's trainer that logs how often it is right, as TRL's RewardTrainer does."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        # Figures of batches, (sum, rows), by the name they are logged under.
        self.parts: dict[str, list[Tensor]] = defaultdict(list)

    @property
    def _mode(self) -> str:
        return "" if self.model.training else "eval_"

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Any:
        """As Trainer's."""
        labels = inputs["labels"]
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **options)
        self.note("accuracy", (outputs.logits.argmax(-1) == labels).float().mean(), len(labels))
        return (loss, outputs) if return_outputs else loss

    def note(self, name: str, mean: Tensor, rows: int) -> None:
        """Keep a figure of a batch, which counts by its rows."""
        self.parts[self._mode + name].append(torch.stack([mean.detach() * rows, torch.full_like(mean, rows)]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the figures, over the rows since the last log."""
        for name in [name for name in self.parts if name.startswith("eval_") == bool(self._mode)]:
            total, rows = self.accelerator.gather(torch.stack(self.parts.pop(name)).sum(0)[None]).sum(0)
            logs[name] = float(total / rows)
        super().log(logs, start_time)


class LanguageClassifierTrainer(ClassifierTrainer):
    """A classifier's trainer whose trunk goes on learning language (Radford et al. 2018, section 3.2, L3 = L2 + λ L1).

    L1 is the mean over a batch's tokens, each told from those before it, by the input embedding as the head.
    """

    def __init__(self, *args: Any, lm_coef: float, **options: Any) -> None:
        super().__init__(*args, **options)
        self.lm_coef = lm_coef

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, **options: Any
    ) -> Any:
        """Both losses from one pass."""
        asked = {**inputs, "output_hidden_states": True}
        loss, outputs = super().compute_loss(model, asked, return_outputs=True, **options)
        head = self.accelerator.unwrap_model(model).get_input_embeddings().weight
        language = language_loss(outputs.hidden_states[-1], inputs["input_ids"], inputs["attention_mask"], head)
        for name, value in (("classification_loss", loss), ("lm_loss", language)):
            self.note(name, value, len(inputs["labels"]))
        loss = loss + self.lm_coef * language
        return (loss, outputs) if return_outputs else loss


def language_loss(states: Tensor, ids: Tensor, mask: Tensor, head: Tensor) -> Tensor:
    """Mean -log p of the tokens `ids`, each told from the last hidden state (batch, time, width) before it."""
    told = mask[:, 1:].bool() & mask[:, :-1].bool()
    return nn.functional.cross_entropy(nn.functional.linear(states[:, :-1][told], head), ids[:, 1:][told])


def check_language_model(model: Any) -> None:
    """Refuse `lm_coef` for what is no language model whose head is its input embedding."""
    name = model.name_or_path or type(model).__name__
    if _looks_ahead(model):
        raise UserError(
            f"reward.lm_coef weighs the loss of a language model, and {name} sees the words that it would have to "
            "tell; use reward.base=policy with no encoder in reward.path, or reward.lm_coef=0."
        )
    if not model.config.tie_word_embeddings:
        raise UserError(
            f"reward.lm_coef needs a language model whose head is its input embedding, as GPT-2's; {name} has a head "
            "of its own, which a classifier does not hold. Use another policy=, or reward.lm_coef=0."
        )


@torch.no_grad()
def _looks_ahead(model: Any) -> bool:
    """Whether the first of two tokens is another to the trunk when the second changes."""
    training = model.training
    ids = torch.tensor([[0, 1], [0, 2]], device=model.device)
    states = model.eval().base_model(input_ids=ids).last_hidden_state[:, 0]
    model.train(training)
    return not torch.allclose(states[0], states[1], atol=1e-6)
