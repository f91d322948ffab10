"""Sequence classifiers of any family as scorers of text: texts in, logits out; classes by their names."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import explained, model_folder, open_pretrained

if TYPE_CHECKING:
    from torch import Tensor

Side = Literal["left", "right"]


class Scorer:
    """A sequence classifier of any family, with its own tokenizer: texts in, logits out.

    A text longer than `max_length` tokens is cut on the `truncation_side`. None: as stage=reward trained the model;
    other models read the last 512 tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int,
        max_length: int | None = None,
        truncation_side: Side | None = None,
        append_eos: bool = False,
    ) -> None:
        from rlhf_pipeline.models.networks import positions, text_config

        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        if append_eos:
            settle_padding(model, tokenizer)
        text_config(model).pad_token_id = tokenizer.pad_token_id  # by which a GPT-2 finds the last token of a row
        trained = getattr(model.config, "trained_cut", {})
        max_length = max_length or trained.get("max_length", 512)
        tokenizer.truncation_side = truncation_side or trained.get("truncation_side") or "left"
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        # TRL's RewardTrainer ends every text with EOS, and the head learns to read it there.
        self.ending = [tokenizer.eos_token_id] if append_eos and tokenizer.eos_token_id is not None else []
        self.where = str(model.name_or_path)
        self.max_length, self.labels = min(max_length, positions(model) or max_length), int(model.config.num_labels)

    @classmethod
    def open(
        cls, path: str, batch_size: int, max_length: int | None = None, truncation_side: Side | None = None,
        append_eos: bool = False,
    ) -> "Scorer":  # fmt: skip
        """Open a classifier from a folder or the hub, on the GPU where there is one."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from rlhf_pipeline.models.reward_model import register

        where = model_folder(path)
        with explained(where, "reward.path"):
            tokenizer = AutoTokenizer.from_pretrained(where)
        register()
        model = open_pretrained(AutoModelForSequenceClassification, where, "reward.path")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        return cls(model.to(device), tokenizer, batch_size, max_length, truncation_side, append_eos)

    def logits(self, texts: Sequence[str], tick: Callable[[int], Any] = lambda _: None) -> "Tensor":
        """(len(texts), classes). Sorted by length inside, so that little is padded; a long text is cut at one end.

        `tick` is told how many of a batch are done.
        """
        import torch

        room = self.max_length - len(self.ending)
        ids = self.tokenizer(list(texts), truncation=True, max_length=room)["input_ids"] if texts else []
        # A text of no tokens still gets a score: that of the token that ends one.
        empty = [
            self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
        ]
        ids = [row + self.ending or empty for row in ids]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = torch.zeros(len(ids), self.labels)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in part]}, padding_side="right", return_tensors="pt")
            with torch.no_grad():
                out = self.model(
                    **{k: v.to(self.model.device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
                )
            found[part] = out.logits.float().cpu()
            tick(len(part))
        return found

    def pairs(self, prompts: Sequence[str], answers: Sequence[str]) -> "Tensor":
        """Logits of each prompt with its answer."""
        return self.logits([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])


def settle_padding(model: Any, tokenizer: Any) -> None:
    """Give a model that reads an EOS at the end of each text a pad token of its own.

    transformers' classes read a text at its last token that is not the pad token: where EOS pads, never at its EOS.
    """
    from rlhf_pipeline.models.networks import text_config

    eos = tokenizer.eos_token_id
    if eos is not None and tokenizer.pad_token_id in (None, eos) and not hasattr(model.config, "trunk"):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text_config(model).pad_token_id = tokenizer.pad_token_id


def class_named(labels: dict[int, str], wanted: str, where: str) -> int:
    """The index of the class with a name, case ignored; the usual short forms count."""
    short = {"pos": "positive", "neg": "negative"}
    names = {index: short.get(str(name).lower(), str(name).lower()) for index, name in labels.items()}
    found = [index for index, name in names.items() if name == short.get(wanted.lower(), wanted.lower())]
    if len(found) != 1:
        raise UserError(
            f"{where} has no class named '{wanted}'; reward.label= takes one of: {', '.join(labels.values())}."
        )
    return int(found[0])
