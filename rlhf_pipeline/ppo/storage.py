"""Where a PPO run's state goes: checkpoints to resume from, and the policy as others open it."""

import os
import shutil
from pathlib import Path
from typing import Any

from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedTokenizerBase

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.networks import language_model
from rlhf_pipeline.models.policies import merged
from rlhf_pipeline.models.sampling import Sampling
from rlhf_pipeline.ppo.actor_critic import ActorCritic

WEIGHTS = "actor_critic.safetensors"  # of a checkpoint: what is trained, policy and critic


def trained_state(actor: ActorCritic) -> dict[str, Tensor]:
    """The weights that training changes, by name; shared ones once."""
    return {name: p.detach() for name, p in actor.named_parameters() if p.requires_grad}


def save_weights(actor: ActorCritic, path: Path) -> None:
    """Write `trained_state` as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in trained_state(actor).items()}, path)


def load_weights(actor: ActorCritic, path: Path) -> None:
    """Read what `save_weights` wrote, into the same tensors."""
    _copy(load_file(path), trained_state(actor), path)


def load_policy_weights(policy: nn.Module, path: Path) -> None:
    """Read the policy's share of what `save_weights` wrote, into a policy that is set up as the trained one was."""
    found = {name.removeprefix("policy."): t for name, t in load_file(path).items() if name.startswith("policy.")}
    _copy(found, {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}, path)


def _copy(found: dict[str, Tensor], own: dict[str, Tensor], path: Path) -> None:
    if found.keys() != own.keys():
        odd = ", ".join(sorted(found.keys() ^ own.keys())[:3])
        raise UserError(f"{path} holds the weights of another set-up: {odd} are in one only. Resume with its settings.")
    for name, tensor in own.items():
        tensor.copy_(found[name])


def save_policy(
    actor: ActorCritic, tokenizer: PreTrainedTokenizerBase, folder: Path, generation: GenerationConfig, merge: bool
) -> None:
    """Write the policy so that AutoModelForCausalLM opens it, with its tokenizer; the critic beside it.

    A policy with an adapter is written as the adapter, as peft does, or with `merge` as one model.
    """
    policy: Any = actor.policy
    if isinstance(policy, PeftModel) and merge:
        policy = merged(policy)
    inner = language_model(policy)
    before, inner.generation_config = inner.generation_config, generation
    try:
        policy.save_pretrained(folder)
        if isinstance(policy, PeftModel):
            generation.save_pretrained(folder)
    finally:
        inner.generation_config = before
    tokenizer.save_pretrained(folder)
    actor.save_critic(folder)


def generation_config(sampling: Sampling, response_length: int, tokenizer: PreTrainedTokenizerBase) -> GenerationConfig:
    """What makes `generate` draw from the distribution that was trained. EOS always ends a text."""
    stops = list(sampling.stop_ids)
    if tokenizer.eos_token_id is not None and tokenizer.eos_token_id not in stops:
        stops.append(int(tokenizer.eos_token_id))
    return GenerationConfig(
        do_sample=True,
        temperature=sampling.temperature,
        top_k=0,
        top_p=1.0,
        max_new_tokens=response_length,
        min_new_tokens=sampling.min_length or None,
        suppress_tokens=list(sampling.suppressed_ids) or None,
        eos_token_id=stops[0] if len(stops) == 1 else (stops or None),
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def fresh_folder(folder: Path) -> Path:
    """An empty hidden folder beside `folder`, to be renamed to it once it is full."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    for leftover in folder.parent.glob(f".{folder.name}.*"):
        shutil.rmtree(leftover)
    temporary.mkdir(parents=True)
    return temporary
