"""An adapter on frozen weights in bf16: half their memory, and not a number that differs."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tiny import PROMPTS, tiny_policy, tiny_tokenizer, trainer
from transformers import GPT2LMHeadModel, PreTrainedTokenizerBase

from rlhf_pipeline.models.adapters import freeze_in_bf16, merged
from rlhf_pipeline.ppo import PPOTrainer


def lora() -> LoraConfig:
    return LoraConfig(r=4, target_modules=["c_attn"], task_type="CAUSAL_LM", fan_in_fan_out=True)


def rounded(tokenizer: PreTrainedTokenizerBase, seed: int = 0) -> GPT2LMHeadModel:
    """A policy as it comes from a checkpoint in bf16."""
    return tiny_policy(tokenizer, seed).bfloat16().float()


def in_bf16(model: torch.nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.dtype == torch.bfloat16]


# The name that all the versions of transformers which are allowed know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("checkpoint", "options"),
    [
        ("bf16", {}),
        ("fp32", {"critic": "separate"}),
        ("fp32", {"gradient_checkpointing": True}),
    ],
    ids=["shared", "separate", "checkpointing"],
)
def test_ppo_learns_the_same_number_by_number(
    checkpoint: str, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()
    if checkpoint == "bf16":
        monkeypatch.setattr("tiny.tiny_policy", rounded)

    def trained(name: str) -> PPOTrainer:
        given = {"peft_config": lora(), "eval_dataset": PROMPTS, "ptx_dataset": [[5, 9, 11, 30]] * 8}
        ppo = trainer(
            tokenizer, tmp_path / name, given=given, bf16=True, ptx_coef=0.1, eval_steps=2, total_episodes=32,
            learning_rate=1e-2, ratio_threshold=1e9, **options,
        )  # fmt: skip
        held = in_bf16(ppo.model)
        ppo.train()
        assert in_bf16(ppo.model) == held, "training has changed what the weights are stored in"
        ppo.save_model(str(tmp_path / name / "merged"), merge=True)
        return ppo

    half = trained("half")
    assert {name.split(".")[-1] for name in in_bf16(half.model)} == {"weight", "bias"}
    # Of two layers c_attn, c_proj and both of the MLP, weights and biases, in each network.
    assert len(in_bf16(half.model)) == 16 * (2 if "critic" in options else 1)
    assert not any("lora_" in name or "wte" in name or "ln_" in name for name in in_bf16(half.model))
    monkeypatch.setattr("rlhf_pipeline.ppo.actor_critic.freeze_in_bf16", lambda model, keep: None)
    whole = trained("whole")
    assert not in_bf16(whole.model)
    for mine, other in zip(half.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other.to(mine.dtype))
    for one, other in zip(half.state.log_history, whole.state.log_history, strict=True):
        assert {k: v for k, v in one.items() if k != "eps"} == {k: v for k, v in other.items() if k != "eps"}
    files = [load_file(tmp_path / name / "merged" / "model.safetensors") for name in ("half", "whole")]
    for name, tensor in files[0].items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, files[1][name]), name


@pytest.mark.parametrize(
    ("make", "keep", "digits"), [(rounded, True, 0), (tiny_policy, True, 8), (tiny_policy, False, 0)]
)
def test_last_digits_stay_where_they_are_needed(make: Callable[..., Any], keep: bool, digits: int) -> None:
    """A checkpoint in bf16 has none (and biases that are still 0), and a process that saves nothing needs none."""
    model = get_peft_model(make(tiny_tokenizer()), lora())
    freeze_in_bf16(model, keep)
    assert len(in_bf16(model)) == 16
    assert len(model.whole_weights) == digits
    assert all(whole.dtype == torch.float32 for whole in model.whole_weights.values())


def test_in_fp32_nothing_is_stored_otherwise(tmp_path: Path) -> None:
    assert not in_bf16(trainer(tiny_tokenizer(), tmp_path, given={"peft_config": lora()}).model)


def test_a_merged_copy_has_all_digits_and_leaves_the_model_alone() -> None:
    model, same = (get_peft_model(tiny_policy(tiny_tokenizer()), lora()) for _ in range(2))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=1e-3)
    same.load_state_dict(model.state_dict())
    freeze_in_bf16(model, keep=True)
    before = {name: p.clone() for name, p in model.named_parameters()}
    found, expected = merged(model), same.merge_and_unload()
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    for name, p in expected.named_parameters():
        assert torch.equal(found.get_parameter(name), p), name
    assert all(torch.equal(p, before[name]) and p.dtype == before[name].dtype for name, p in model.named_parameters())
    assert len(model.whole_weights) == 8
