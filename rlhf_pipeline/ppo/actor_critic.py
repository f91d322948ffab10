"""The networks of PPO: a policy with its critic, and the reference that it is kept near."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.classifiers import score_offset
from rlhf_pipeline.models.likelihood import response_states, token_likelihood
from rlhf_pipeline.models.networks import language_model, looks_ahead, text_config, trunk
from rlhf_pipeline.models.precision import autocast, store_in_bf16
from rlhf_pipeline.models.sampling import Batch, Sampling


class Seen(NamedTuple):
    """What policy and critic make of a batch; all (batch, longest response), 0 beyond a response's end."""

    log_probs: Tensor  # of the tokens, under the sampling distribution
    entropy: Tensor  # of that distribution
    values: Tensor  # expected return before each token


class ActorCritic(nn.Module):
    """A policy, and a critic that is one linear head on the policy's trunk or a network of its own."""

    def __init__(self, policy: PreTrainedModel, value_model: nn.Module | None = None, bf16: bool = False) -> None:
        super().__init__()
        self.policy: Any = policy
        self.bf16 = bf16
        self.config = policy.config
        self.value_model: Any = value_model
        if value_model is None:
            some = next(p for p in policy.parameters() if p.is_floating_point())
            self.value_head = nn.Linear(text_config(policy).hidden_size, 1, device=some.device)
            # The critic starts by expecting nothing, whatever the trunk says.
            nn.init.zeros_(self.value_head.weight)
            nn.init.zeros_(self.value_head.bias)
            if some.dtype == torch.float64:
                self.value_head.double()

    def forward(self, batch: Batch, sampling: Sampling, values: bool = True) -> Seen:
        """See a batch's responses with the policy and, unless `values` is off, with the critic."""
        with autocast(self.bf16, batch.tokens.device):
            states = response_states(trunk(self.policy), batch)
            log_probs, entropy = token_likelihood(self.policy, states, batch, sampling)
            found = torch.zeros_like(log_probs)
            if values:
                flat = self._values(states, batch).squeeze(-1)
                found = found.index_put(batch.places, flat.to(found.dtype))
        return Seen(log_probs, entropy, found)

    def _values(self, states: Tensor, batch: Batch) -> Tensor:
        if self.value_model is not None:
            states = response_states(trunk(self.value_model), batch)
        head = self.value_head if self.value_model is None else value_head_of(self.value_model)
        # In the head's own precision: bf16 would round the values to steps as large as the rewards of a token.
        with autocast(False, states.device):
            return head(states.to(next(head.parameters()).dtype))

    def save_critic(self, folder: Path) -> None:
        """Write the critic beside a saved policy."""
        if self.value_model is None:
            save_file(self.value_head.state_dict(), folder / "value_head.safetensors")
        else:
            self.value_model.save_pretrained(folder / "critic")


def value_head_of(model: nn.Module) -> nn.Module:
    """The linear layer that makes a classifier's states one number, by the names that families give it."""
    for name in ("score", "v_head", "value_head"):
        head: nn.Module | None = getattr(language_model(model), name, None)
        if head is not None:
            return head
    raise UserError(f"{type(model).__name__} has no `score` head, so it cannot be a critic; leave value_model out.")


def separate_critic(
    init: str, policy: PreTrainedModel, reward: Any, tokenizer: Any, peft_config: PeftConfig | None
) -> nn.Module:
    """A critic of its own that starts as the policy or as the reward model, with an adapter if the policy has one."""
    critic: Any = make_critic(policy) if init == "policy" else critic_of_reward(reward, tokenizer)
    if peft_config is None:
        return critic
    own: Any = copy.deepcopy(peft_config)
    own.task_type, own.modules_to_save = "SEQ_CLS", ["score"]  # the head is trained whole
    adapted: nn.Module = get_peft_model(critic, own)
    return adapted


def critic_of_reward(reward: Any, tokenizer: Any) -> nn.Module:
    """A copy of the reward's network that gives the score after every token (InstructGPT, app. C.4).

    `reward` is a model with a `score` head, or a reward of texts that has a `scorer`. A score that is not linear in the
    classifier's logits, as a probability, gives a head that expects nothing on the classifier's trunk.
    """
    scorer = getattr(reward, "scorer", None)
    model: Any = reward if scorer is None else scorer.model
    if not isinstance(model, nn.Module) or not hasattr(model, "score"):
        raise UserError(
            "trainer.critic_init=reward needs a reward model over the policy's own tokens with a `score` head; "
            "use trainer.critic_init=policy."
        )
    if scorer is not None and not tokenizer.get_vocab().items() <= scorer.tokenizer.get_vocab().items():
        raise UserError(
            f"trainer.critic_init=reward needs a reward model over the policy's own tokens, and {scorer.where} has "
            "another vocabulary; use trainer.critic_init=policy."
        )
    if looks_ahead(model):
        raise UserError(
            "trainer.critic_init=reward needs a reward model that reads from left to right; this one sees the tokens "
            "whose value it would foresee. Use trainer.critic_init=policy."
        )
    critic: Any = copy.deepcopy(model).requires_grad_(True)
    if critic.num_labels != 1:
        head, readout = critic.score, torch.tensor(reward.readout or [0.0] * critic.num_labels)
        critic.score = nn.Linear(head.in_features, 1, bias=head.bias is not None, device=head.weight.device)
        with torch.no_grad():
            critic.score.weight.copy_(readout.to(head.weight) @ head.weight)
            if head.bias is not None:
                critic.score.bias.copy_(readout.to(head.bias) @ head.bias)
        critic.num_labels = critic.config.num_labels = 1
    if offset := score_offset(critic):  # a value has no configuration to keep it
        last = [module for module in critic.score.modules() if isinstance(module, nn.Linear)][-1]
        bias = last.weight.new_zeros(1) if last.bias is None else last.bias.detach()
        last.bias = nn.Parameter(bias - offset)
        critic.config.score_offset = 0.0
    found: nn.Module = critic
    return found


def make_critic(policy: PreTrainedModel) -> PreTrainedModel:
    """A critic of its own that starts as the policy's trunk under a head that expects nothing."""
    inner = language_model(policy)
    config = copy.deepcopy(inner.config)
    config.num_labels = 1
    critic: PreTrainedModel = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    some = next(inner.parameters())
    critic.to(some.device, some.dtype)
    body = {_without_adapter(k): v for k, v in trunk(policy).state_dict().items() if "lora_" not in k}
    trunk(critic).load_state_dict(body)
    nn.init.zeros_(value_head_of(critic).weight)  # type: ignore[arg-type]
    return critic


def _without_adapter(name: str) -> str:
    """A weight's name in the model that an adapter was put into."""
    return re.sub(r"\.base_layer\.", ".", name)


def without_dropout(*models: nn.Module | None) -> None:
    """Switch dropout off for good: a ratio of probabilities means something only if both are of one function."""
    for model in models:
        for module in model.modules() if model is not None else ():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            for name in ("attention_dropout", "dropout", "activation_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.0)


def with_master_weights(*models: nn.Module | None) -> bool:
    """Make what is trained fp32 where it was stored in fewer bits; whether anything was."""
    changed = False
    for model in models:
        for parameter in model.parameters() if model is not None else ():
            if parameter.requires_grad and parameter.dtype in (torch.float16, torch.bfloat16):
                parameter.data, changed = parameter.data.float(), True
    if changed:  # what is not trained must be of a kind with it, quantised weights apart
        for model in models:
            for tensor in [*model.parameters(), *model.buffers()] if model is not None else ():
                if tensor.dtype in (torch.float16, torch.bfloat16):
                    tensor.data = tensor.data.float()
    return changed


class Reference:
    """What the policy is kept near: a frozen model, or the policy itself with its adapter off."""

    def __init__(self, model: PreTrainedModel | None, actor: ActorCritic, adapter: str | None, own: str | None) -> None:
        self.model, self.actor, self.adapter, self.own = model, actor, adapter, own or "default"
        # Whether both are one function as yet: an adapter that has not been trained adds 0.
        self.same = model is None and adapter is None and _adds_nothing(actor.policy)
        if model is not None:
            model.eval().requires_grad_(False)
            mine, other = actor.policy.state_dict(), model.state_dict()
            self.same = mine.keys() == other.keys() and all(torch.equal(mine[k], other[k].to(mine[k])) for k in mine)
            if actor.bf16:
                store_in_bf16(model)

    @torch.no_grad()
    def log_probs(self, batch: Batch, sampling: Sampling) -> Tensor:
        """log p of the responses' tokens, (batch, longest response), in the precision of the policy."""
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


def _adds_nothing(policy: Any) -> bool:
    """Whether a policy's adapter changes none of its numbers."""
    trained = [(name, p) for name, p in policy.named_parameters() if p.requires_grad]
    return all("lora_A" in name or ("lora_B" in name and not p.any()) for name, p in trained)
