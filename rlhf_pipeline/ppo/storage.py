"""Where a PPO run's weights go: checkpoints to resume from, and the policy as others open it."""

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


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """The weights that training changes, by name; shared ones once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_weights(actor: ActorCritic, path: Path) -> None:
    """Write what is trained as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in _trained(actor).items()}, path)


def load_weights(model: nn.Module, path: Path, part: str = "") -> None:
    """Read what `save_weights` wrote into the same tensors; with `part`, those whose names begin so into that part."""
    found = {name.removeprefix(part): t for name, t in load_file(path).items() if name.startswith(part)}
    own = _trained(model)
    if found.keys() != own.keys():
        odd = ", ".join(sorted(found.keys() ^ own.keys())[:3])
        raise UserError(f"{path} holds the weights of another set-up: {odd} are in one only. Resume with its settings.")
    for name, tensor in own.items():
        tensor.copy_(found[name])


def load_policy_weights(policy: nn.Module, path: Path) -> None:
    """Read the policy's share of a checkpoint into a policy that is set up as the trained one was."""
    load_weights(policy, path, "policy.")


def save_policy(
    actor: ActorCritic,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    sampling: Sampling,
    response_length: int,
    merge: bool,
) -> None:
    """Write the policy so that AutoModelForCausalLM opens it, with its tokenizer and the critic.

    A policy with an adapter is written as the adapter, as peft does, or with `merge` as one model. The generation
    config makes `generate` draw from the distribution that was trained. EOS always ends a text.
    """
    policy: Any = actor.policy
    if isinstance(policy, PeftModel) and merge:
        policy = merged(policy)
    stops = [i for i in dict.fromkeys([*sampling.stop_ids, tokenizer.eos_token_id]) if i is not None]
    generation = GenerationConfig(
        do_sample=True, temperature=sampling.temperature, top_k=0, top_p=1.0, max_new_tokens=response_length,
        min_new_tokens=sampling.min_length or None, suppress_tokens=list(sampling.suppressed_ids) or None,
        eos_token_id=stops[0] if len(stops) == 1 else (stops or None), bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    inner = language_model(policy)
    before, inner.generation_config = inner.generation_config, generation
    try:
        policy.save_pretrained(folder)
    finally:
        inner.generation_config = before
    generation.save_pretrained(folder)  # with an adapter peft does not
    tokenizer.save_pretrained(folder)
    if actor.value_head is not None:
        save_file(actor.value_head.state_dict(), folder / "value_head.safetensors")
    if actor.value_model is not None:
        actor.value_model.save_pretrained(folder / "critic")
