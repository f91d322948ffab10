"""Sequence classifiers of any family. They score text; as reward models they can have other heads and poolings."""

from collections.abc import Callable, Sequence
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import model_folder, open_pretrained
from rlhf_pipeline.models.networks import positions, text_config
from rlhf_pipeline.registry import Range, check_settings, check_value, prefix_errors

Side = Literal["left", "right"]
Head = Literal["linear", "mlp"]
Pooling = Literal["last", "mean"]


class RewardModelConfig(PreTrainedConfig):
    """The trunk's own configuration, with the head and the pooling."""

    model_type = "rlhf_reward_model"
    sub_configs: ClassVar = {"trunk": AutoConfig}

    def __init__(self, trunk: Any = None, head: Head = "linear", pooling: Pooling = "last", **options: Any) -> None:
        values = {"model_type": "gpt2"} if trunk is None else trunk  # transformers compares with a default one
        self.trunk: Any = AutoConfig.for_model(**values) if isinstance(values, dict) else values
        self.head, self.pooling = head, pooling
        super().__init__(**{"num_labels": 1, **options})

    @property
    def max_position_embeddings(self) -> int | None:
        return getattr(self.trunk, "max_position_embeddings", None)


class RewardModel(PreTrainedModel):
    """Any trunk, pooled at the last token or by a mean, with a linear head or an MLP of one hidden layer.

    The mean weighs token t of T by t / (1 + ... + T), because later tokens of a causal trunk have read more
    (Muennighoff 2022, arXiv 2202.08904, section 3.1).
    """

    config_class = RewardModelConfig
    base_model_prefix = "trunk"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config)
        width = config.trunk.hidden_size
        hidden = [nn.Linear(width, width), nn.GELU()] if config.head == "mlp" else []
        self.trunk = AutoModel.from_config(config.trunk, trust_remote_code=False)
        self.score = nn.Sequential(*hidden, nn.Linear(width, 1))
        self.num_labels = 1
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Score ids (batch, time), padded on either side; `.logits` is (batch, 1). Without a mask every token counts.

        Each row is shifted to begin at position 0, because a trunk counts positions from the left, padding included.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        order = mask.argsort(dim=1, descending=True, stable=True)
        ids, mask = input_ids.gather(1, order), mask.gather(1, order)
        options.pop("return_dict", None)
        states = self.trunk(input_ids=ids, attention_mask=mask, **options).last_hidden_state
        return SequenceClassifierOutput(logits=self.score(self._pooled(states, mask)))

    def _pooled(self, states: Tensor, mask: Tensor) -> Tensor:
        """(batch, time, width) to (batch, width)."""
        if self.config.pooling == "last":
            return states[torch.arange(len(states), device=states.device), mask.sum(1).clamp(min=1) - 1]
        weight = mask.cumsum(1) * mask
        weight = weight.to(states.dtype) / weight.sum(1, keepdim=True).clamp(min=1)
        return (weight[:, None] @ states)[:, 0]


def register() -> None:
    """Let AutoModelForSequenceClassification open folders that hold a `RewardModel`."""
    AutoConfig.register(RewardModelConfig.model_type, RewardModelConfig, exist_ok=True)
    AutoModelForSequenceClassification.register(RewardModelConfig, RewardModel, exist_ok=True)


def with_head(model: PreTrainedModel, head: Head, pooling: Pooling) -> PreTrainedModel:
    """Return a sequence classifier of one label with this head and this pooling.

    With a linear head on the last token, it stays the plain class of its family, which any program can open (an
    encoder's class has its own pooling). Otherwise its trunk gets a new head.
    """
    if isinstance(model, RewardModel):
        own = (model.config.head, model.config.pooling)
        if own == (head, pooling):
            return model
        raise UserError(
            f"{model.name_or_path} is a reward model with reward.head={own[0]} and reward.pooling={own[1]}, "
            f"not {head} and {pooling}; change these settings, or start from a language model."
        )
    if (head, pooling) == ("linear", "last"):
        return model
    trunk = model.base_model
    made = RewardModel(RewardModelConfig(trunk.config, head, pooling, pad_token_id=model.config.pad_token_id))
    made.trunk = trunk
    made.name_or_path = model.name_or_path
    return made


def score_offset(model: PreTrainedModel) -> float:
    """Return the number subtracted from a reward model's logits, so that demonstrations score 0 on average."""
    return float(getattr(model.config, "score_offset", 0.0)) if model.config.num_labels == 1 else 0.0


def shift_scores(model: PreTrainedModel, by: float) -> None:
    """Add a number to all scores of a reward model. The number is saved in the model's configuration."""
    model.config.score_offset = score_offset(model) - by


def open_classifier(path: str, **options: Any) -> tuple[Any, Any]:
    """A sequence classifier from a folder or the hub, and its tokenizer."""
    register()
    where = model_folder(path)
    tokenizer = open_pretrained(AutoTokenizer, where, "reward.path")
    model = open_pretrained(AutoModelForSequenceClassification, where, "reward.path", **options)
    with prefix_errors(f"reward.path={where}, config.json"):  # fields that stage=reward adds
        check_value("score_offset", getattr(model.config, "score_offset", 0.0), float)
        cut = getattr(model.config, "trained_cut", {})
        check_value("trained_cut", cut, dict)
        check_settings("trained_cut.", cut, {"max_length": Annotated[int, Range(1)], "truncation_side": Side | None})
    return model, tokenizer


def settle_padding(model: Any, tokenizer: Any, reads_eos: bool = True) -> None:
    """Make model and tokenizer agree on a pad token. With `reads_eos` it is not EOS.

    transformers' classes read a text at its last token that is not the pad token. If EOS were the pad token, they would
    not read the EOS at the end of a text.
    """
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    eos = tokenizer.eos_token_id
    if reads_eos and eos is not None and tokenizer.pad_token_id == eos and not isinstance(model, RewardModel):
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        if len(tokenizer) > model.get_input_embeddings().num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    text_config(model).pad_token_id = tokenizer.pad_token_id


class Scorer:
    """A sequence classifier of any family, with its own tokenizer: texts in, scores out.

    A text longer than `max_length` tokens is cut on the `truncation_side`. None: as in training by stage=reward; other
    models read the last 512 tokens. With `append_eos` every text ends with EOS, as in TRL's RewardTrainer.
    """

    def __init__(
        self, model: Any, tokenizer: Any, batch_size: int, max_length: int | None = None,
        truncation_side: Side | None = None, append_eos: bool = False,
    ) -> None:  # fmt: skip
        settle_padding(model, tokenizer, append_eos)
        trained = getattr(model.config, "trained_cut", {})
        max_length = max_length or trained.get("max_length", 512)
        tokenizer.truncation_side = truncation_side or trained.get("truncation_side") or "left"
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        self.ending = [tokenizer.eos_token_id] if append_eos and tokenizer.eos_token_id is not None else []
        self.where = str(model.name_or_path)
        self.max_length, self.labels = min(max_length, positions(model)), int(model.config.num_labels)

    @classmethod
    def open(cls, path: str, *options: Any, **more: Any) -> "Scorer":
        """Open a classifier from a folder or the hub, on the GPU if there is one."""
        model, tokenizer = open_classifier(path)
        return cls(model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, *options, **more)

    @torch.no_grad()
    def logits(self, texts: Sequence[str], tick: Callable[[int], Any] = lambda _: None) -> Tensor:
        """Return logits (len(texts), classes), minus a reward model's `score_offset`.

        Texts of similar length share a batch. `tick` is called with the number of texts in each finished batch.
        """
        room = self.max_length - len(self.ending)
        ids = self.tokenizer(list(texts), truncation=True, max_length=room)["input_ids"] if texts else []
        # A text without tokens is scored as an end token alone.
        eos, sep = self.tokenizer.eos_token_id, self.tokenizer.sep_token_id
        ids = [row + self.ending or [sep if eos is None else eos] for row in ids]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = torch.zeros(len(ids), self.labels)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in part]}, padding_side="right", return_tensors="pt")
            given = {name: batch[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
            found[part] = self.model(**given).logits.float().cpu()
            tick(len(part))
        return found - score_offset(self.model)

    def pairs(self, prompts: Sequence[str], answers: Sequence[str]) -> Tensor:
        """Logits of each prompt with its answer."""
        return self.logits([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])
