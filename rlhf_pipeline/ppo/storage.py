"""Saves and loads a PPO run's weights: checkpoints to resume from, and the policy for other programs."""

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

WEIGHTS = "actor_critic.safetensors"  # in a checkpoint: the trained weights of policy and critic


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """Return the trained weights by name; shared weights appear once."""
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def save_weights(actor: ActorCritic, path: Path) -> None:
    """Write the trained weights as safetensors."""
    save_file({name: tensor.contiguous() for name, tensor in _trained(actor).items()}, path)


def load_weights(model: nn.Module, path: Path, part: str = "") -> None:
    """Load weights of `save_weights` in place. `part`: a prefix of names; only these are loaded, without the prefix."""
    found = {name.removeprefix(part): t for name, t in load_file(path).items() if name.startswith(part)}
    own = _trained(model)
    if found.keys() != own.keys():
        odd = ", ".join(sorted(found.keys() ^ own.keys())[:3])
        raise UserError(f"{path} is from another set-up: only it, or only the model, has {odd}. Use its settings.")
    for name, tensor in own.items():
        tensor.copy_(found[name])


def load_policy_weights(policy: nn.Module, path: Path) -> None:
    """Load a checkpoint's policy weights into a policy with the same architecture and adapter."""
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

    An adapter is saved as peft does; with `merge` it is merged into its base model. The generation config makes
    `generate` sample from the distribution that was trained. EOS always ends a text.
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
    generation.save_pretrained(folder)  # for an adapter peft does not save it
    tokenizer.save_pretrained(folder)
    if actor.value_head is not None:
        save_file(actor.value_head.state_dict(), folder / "value_head.safetensors")
    if actor.value_model is not None:
        actor.value_model.save_pretrained(folder / "critic")
