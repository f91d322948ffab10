"""PPO's networks: the policy with its critic, and the reference of the KL penalty."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.classifiers import score_offset
from rlhf_pipeline.models.likelihood import response_states, token_likelihood
from rlhf_pipeline.models.networks import language_model, looks_ahead, text_config, trunk
from rlhf_pipeline.models.precision import autocast, fuse_gelu, store_in_bf16
from rlhf_pipeline.models.sampling import Batch, Sampling
from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.processes import sharding


class Outputs(NamedTuple):
    """Outputs of policy and critic for a batch. Each is (batch, longest response), and 0 after a response's end."""

    log_probs: Tensor  # of the sampled tokens, under the sampling distribution
    entropy: Tensor  # of the sampling distribution
    values: Tensor  # the expected return before each token


class ActorCritic(nn.Module):
    """A policy and its critic: a value head on the policy's trunk, a separate `value_model`, or none."""

    def __init__(
        self, policy: PreTrainedModel, value_model: nn.Module | None = None, bf16: bool = False, critic: bool = True
    ) -> None:  # fmt: skip
        super().__init__()
        self.policy: Any = policy
        self.bf16 = bf16
        self.config = policy.config
        self.value_model: Any = value_model
        self.value_head: Any = None
        if critic and value_model is None:
            some = next(p for p in policy.parameters() if p.is_floating_point())
            self.value_head = nn.Linear(text_config(policy).hidden_size, 1, device=some.device)
            # With weights of zero the critic first predicts 0 everywhere.
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            if some.dtype == torch.float64:
                self.value_head.double()

    @property
    def has_critic(self) -> bool:
        """Whether there is a critic. Without one all values are 0."""
        return self.value_head is not None or self.value_model is not None

    def forward(self, batch: Batch, sampling: Sampling, values: bool = True) -> Outputs:
        """Run the policy on a batch's responses, and also the critic if there is one and `values` is True."""
        with autocast(self.bf16, batch.tokens.device):
            states = response_states(trunk(self.policy), batch)
            log_probs, entropy = token_likelihood(self.policy, states, batch, sampling)
            found = torch.zeros_like(log_probs)
            if values and self.has_critic:
                flat = self._values(states, batch).squeeze(-1)
                found = found.index_put(batch.places, flat.to(found.dtype))
        return Outputs(log_probs, entropy, found)

    def _values(self, states: Tensor, batch: Batch) -> Tensor:
        if self.value_model is not None:
            states = response_states(trunk(self.value_model), batch)
        head = self.value_head if self.value_model is None else value_head_of(self.value_model)
        # In the head's own precision: the rounding error of bf16 is as large as the reward of a token.
        with autocast(False, states.device):
            return head(states.to(next(head.parameters()).dtype))


def value_head_of(model: nn.Module) -> nn.Module:
    """Return the linear layer that maps a classifier's states to one number. Its name depends on the model family."""
    for name in ("score", "v_head", "value_head"):
        head: nn.Module | None = getattr(language_model(model), name, None)
        if head is not None:
            return head
    raise UserError(f"{type(model).__name__} has no `score` head, so it cannot be a critic; leave value_model out.")


def prepare_networks(
    args: PPOConfig,
    model: Any,
    ref_model: Any,
    reward_model: Any,
    value_model: Any,
    peft_config: PeftConfig | None,
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Any, Any, Any]:
    """Return policy, reference (None: the policy with its adapter off) and separate critic (None: no separate one)."""
    if ref_model is model:
        raise UserError("model and ref_model are one object; pass a copy, or ref_model=None to have one made.")
    if value_model is not None and value_model is reward_model:
        raise UserError("value_model and reward_model are one object, but only value_model is trained; pass a copy.")
    if peft_config is not None:
        if isinstance(model, PeftModel):
            raise UserError("the model has an adapter already; pass it without a peft_config, or merge it first.")
        model = get_peft_model(model, peft_config)
    if value_model is None and args.critic == "separate":
        value_model = _critic_of_reward(reward_model, tokenizer) if args.critic_init == "reward" else _new_critic(model)
        if peft_config is not None:
            own: Any = copy.deepcopy(peft_config)
            own.task_type, own.modules_to_save = "SEQ_CLS", ["score"]  # the head is trained in full
            value_model = get_peft_model(value_model, own)
    if ref_model is None and not isinstance(model, PeftModel):
        ref_model = copy.deepcopy(model).requires_grad_(False)
    for network in (model, ref_model, value_model, reward_model):
        if isinstance(network, nn.Module):
            _without_dropout(network)
            fuse_gelu(network)
    if with_master_weights(model, ref_model, value_model):
        print("weights stored in 16 bits are trained as fp32", flush=True)
    if args.bf16 and sharding() is None:
        for network in (model, value_model):
            if isinstance(network, PeftModel):
                store_in_bf16(network)
    return model, ref_model, value_model


def _new_critic(policy: PreTrainedModel) -> PreTrainedModel:
    """Return a separate critic: a copy of the policy's trunk with a head of zeros, which predicts 0."""
    inner = language_model(policy)
    config = copy.deepcopy(inner.config)
    config.num_labels = 1
    some = next(inner.parameters())
    critic: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    critic.to(some.device, some.dtype)
    weights = trunk(policy).state_dict().items()  # without those of an adapter
    trunk(critic).load_state_dict({k.replace(".base_layer.", "."): v for k, v in weights if "lora_" not in k})
    nn.init.zeros_(value_head_of(critic).weight)  # type: ignore[arg-type]
    return critic


def _critic_of_reward(reward: Any, tokenizer: PreTrainedTokenizerBase) -> Any:
    """Copy the reward model as critic: a token's value is the score of the text up to it (InstructGPT, app. C.4).

    `reward` is a model with a `score` head, or a text reward that has a `scorer`. If its score is not linear in the
    classifier's logits (for example, a probability), the critic's head starts at zero.
    """
    scorer = getattr(reward, "scorer", None)
    model: Any = reward if scorer is None else scorer.model
    fault = None
    if not isinstance(model, nn.Module) or not hasattr(model, "score"):
        fault = "this one has none"
    elif scorer is not None and not tokenizer.get_vocab().items() <= scorer.tokenizer.get_vocab().items():
        fault = f"{scorer.where} has another vocabulary"
    elif looks_ahead(model):
        fault = "this one does not read from left to right, so it would see the tokens whose value it predicts"
    if fault:
        raise UserError(
            "trainer.critic_init=reward needs a reward model over the policy's own tokens with a `score` head, but "
            f"{fault}; use trainer.critic_init=policy."
        )
    critic: Any = copy.deepcopy(model).requires_grad_(True)
    if model.num_labels != 1:
        head, readout = model.score, torch.tensor(reward.readout or [0.0] * model.num_labels)
        score = nn.Linear(head.in_features, 1, bias=head.bias is not None, device=head.weight.device)
        with torch.no_grad():
            for new, old in zip(score.parameters(), head.parameters(), strict=True):
                new.copy_(readout.to(old) @ old)
        critic.score, critic.num_labels, critic.config.num_labels = score, 1, 1
    elif offset := score_offset(critic):  # the head alone makes the values, so it takes over the offset
        last = [module for module in critic.score.modules() if isinstance(module, nn.Linear)][-1]
        bias = last.weight.new_zeros(1) if last.bias is None else last.bias.detach()
        last.bias = nn.Parameter(bias - offset)
        critic.config.score_offset = 0.0
    return critic


def _without_dropout(model: nn.Module) -> None:
    """Switch dropout off: with it, the ratio of new to old probabilities would compare two random networks."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout", "activation_dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def with_master_weights(*models: nn.Module | None) -> bool:
    """If any trained weight has 16 bits, convert all models to fp32 and return True."""
    there = [model for model in models if model is not None]
    halves = (torch.float16, torch.bfloat16)
    if not any(p.requires_grad and p.dtype in halves for model in there for p in model.parameters()):
        return False
    for model in there:  # frozen weights too, except for quantised ones
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.dtype in halves:
                tensor.data = tensor.data.float()
    return True


class Reference:
    """The reference of the KL penalty: a frozen model, or the policy itself with another adapter or none."""

    def __init__(self, model: PreTrainedModel | None, actor: ActorCritic, adapter: str | None, own: str | None) -> None:
        self.model, self.actor, self.adapter, self.own = model, actor, adapter, own or "default"
        if model is not None:
            model.eval().requires_grad_(False)
            mine, other = actor.policy.state_dict(), model.state_dict()
            same = mine.keys() == other.keys() and all(torch.equal(mine[k], other[k].to(mine[k])) for k in mine)
            if actor.bf16:
                store_in_bf16(model)
        else:  # an adapter that has not been trained adds 0
            trained = [(name, p) for name, p in actor.policy.named_parameters() if p.requires_grad]
            adds_nothing = all("lora_A" in name or ("lora_B" in name and not p.any()) for name, p in trained)
            same = adapter is None and adds_nothing
        self.same = same  # whether policy and reference still compute the same

    @torch.no_grad()
    def log_probs(self, batch: Batch, sampling: Sampling) -> Tensor:
        """Return the responses' log-probabilities, (batch, longest response), in the policy's precision."""
        with self._opened() as model, autocast(self.actor.bf16, batch.tokens.device):
            return token_likelihood(model, response_states(trunk(model), batch), batch, sampling)[0]

    @contextmanager
    def _opened(self) -> Iterator[Any]:
        policy: Any = self.actor.policy
        if self.model is not None:
            yield self.model
        elif self.adapter is None:
            with policy.disable_adapter() if isinstance(policy, PeftModel) else nullcontext():
                yield policy
        else:
            policy.set_adapter(self.adapter)
            try:
                yield policy
            finally:
                policy.set_adapter(self.own)
