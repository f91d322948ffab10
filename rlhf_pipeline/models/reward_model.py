"""Scalar reward models: which ones are plain sequence classifiers, and the class for all others."""

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput

from rlhf_pipeline.errors import UserError

Head = Literal["linear", "mlp"]
Pooling = Literal["last", "mean"]


class RewardModelConfig(PreTrainedConfig):
    """The trunk's own configuration, and what stands on it."""

    model_type = "rlhf_reward_model"
    sub_configs: ClassVar = {"trunk": AutoConfig}

    def __init__(
        self,
        trunk: PreTrainedConfig | dict[str, Any] | None = None,
        head: Head = "linear",
        pooling: Pooling = "last",
        **options: Any,
    ) -> None:
        values = {"model_type": "gpt2"} if trunk is None else trunk  # transformers makes a default one to compare with
        self.trunk = AutoConfig.for_model(**values) if isinstance(values, dict) else values
        self.head, self.pooling = head, pooling
        super().__init__(**{"num_labels": 1, **options})

    @property
    def max_position_embeddings(self) -> int:
        """The trunk's; an AttributeError where it knows no such limit."""
        return int(self.trunk.max_position_embeddings)


class RewardModel(PreTrainedModel):
    """Any trunk, the last token or the mean over a text, and a linear head or one with a hidden layer.

    The mean weighs token t of T by t / (1 + ... + T) (Muennighoff 2022, arXiv 2202.08904, section 3.1): the later ones
    of a causal trunk have read more.
    """

    config_class = RewardModelConfig
    base_model_prefix = "trunk"
    supports_gradient_checkpointing = True
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(self, config: RewardModelConfig) -> None:
        super().__init__(config)
        width = config.trunk.hidden_size
        hidden = [nn.Linear(width, width), nn.GELU()] if config.head == "mlp" else []
        self.trunk = AutoModel.from_config(config.trunk)
        self.score = nn.Sequential(*hidden, nn.Linear(width, 1))
        self.num_labels = 1
        self.post_init()

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """Scores (batch, 1) as `.logits`, of ids (batch, time) padded on either side; without a mask all of it counts.

        Each row is moved to begin at the first position: a trunk counts positions from the left, padding and all.
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
    """A sequence classifier of one label as the reward model that is asked for.

    With a linear head on the last token (an encoder's class has its own pooling) it stays the plain class of its
    family, which opens anywhere. Otherwise, and where that class has no bias that could take up a shift of all scores
    (Llama's, Qwen's), its trunk gets a new head.
    """
    if isinstance(model, RewardModel):
        own = (model.config.head, model.config.pooling)
        if own != (head, pooling):
            raise UserError(
                f"{model.name_or_path} is a reward model with reward.head={own[0]} and reward.pooling={own[1]}, "
                f"not {head} and {pooling}; say so, or start from a language model."
            )
        return model
    if (head, pooling) == ("linear", "last") and _last_bias(model) is not None:
        return model
    trunk = model.base_model
    made = RewardModel(RewardModelConfig(trunk.config, head, pooling, pad_token_id=model.config.pad_token_id))
    made.trunk = trunk
    made.name_or_path = model.name_or_path
    return made


@torch.no_grad()
def shift_scores(model: PreTrainedModel, by: float) -> None:
    """Add a number to all scores of a model that `with_head` made, by a bias that it has."""
    found = _last_bias(model)
    if found is None:
        raise TypeError(f"{type(model).__name__} has no bias that moves its scores alone")
    bias, weight = found
    # A norm's bias b adds w b to the score: of all changes that add `by`, the one along w is the smallest.
    bias += by if weight is None else by * weight / weight.square().sum()


@torch.no_grad()
def _last_bias(model: PreTrainedModel) -> tuple[Tensor, Tensor | None] | None:
    """The bias of the head, and None; else that of the norm whose output the head reads, and the head's weights.

    Which norm that is, a run over two tokens shows: families differ in where it stands.
    """
    head = [module for module in model.modules() if isinstance(module, nn.Linear) and module.out_features == 1][-1]
    if head.bias is not None:
        return head.bias, None
    norms = [m for m in model.modules() if getattr(m, "bias", None) is not None and isinstance(m, nn.LayerNorm)]
    written: dict[nn.Module, Tensor] = {}
    read: list[Tensor] = []
    hooks = [norm.register_forward_hook(lambda norm, _, output: written.update({norm: output})) for norm in norms]
    hooks.append(head.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0])))
    training = model.training
    model.eval()(input_ids=torch.zeros(1, 2, dtype=torch.long, device=model.device))
    model.train(training)
    for hook in hooks:
        hook.remove()
    for norm, output in written.items():
        if output.shape == read[0].shape and torch.equal(output, read[0]):
            return norm.bias, head.weight[0]
    return None
