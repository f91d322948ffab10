"""An adapter on frozen weights in bf16: half their memory, and not a number that differs."""

from pathlib import Path

import pytest
import torch
from peft import get_peft_model
from tiny import PROMPTS, lora, tiny_policy, tiny_tokenizer, trainer

from rlhf_pipeline.models.policies import Policy, merged, open_policy
from rlhf_pipeline.models.precision import store_in_bf16
from rlhf_pipeline.ppo import PPOTrainer


def in_bf16(model: torch.nn.Module) -> list[str]:
    return [name for name, p in model.named_parameters() if p.dtype == torch.bfloat16]


# The name that all the versions of transformers which are allowed know.
@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable` is deprecated:FutureWarning")
@pytest.mark.parametrize("options", [{}, {"critic": "separate"}, {"gradient_checkpointing": True}])
def test_ppo_learns_the_same_number_by_number(
    options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tiny_tokenizer()

    def trained(name: str) -> PPOTrainer:
        given = {"peft_config": lora(), "eval_dataset": PROMPTS, "ptx_dataset": [[5, 9, 11, 30]] * 8}
        ppo = trainer(
            tokenizer, tmp_path / name, given=given, bf16=True, ptx_coef=0.1, eval_steps=2, total_episodes=32,
            learning_rate=1e-2, ratio_threshold=1e9, **options,
        )  # fmt: skip
        held = in_bf16(ppo.model)
        ppo.train()
        assert in_bf16(ppo.model) == held, "training has changed what the weights are stored in"
        return ppo

    half = trained("half")
    assert {name.split(".")[-1] for name in in_bf16(half.model)} == {"weight", "bias"}
    # Of two layers c_attn, c_proj and both of the MLP, weights and biases, in each network.
    assert len(in_bf16(half.model)) == 16 * (2 if "critic" in options else 1)
    assert not any("lora_" in name or "wte" in name or "ln_" in name for name in in_bf16(half.model))
    monkeypatch.setattr("rlhf_pipeline.ppo.actor_critic.store_in_bf16", lambda model: None)
    whole = trained("whole")
    assert not in_bf16(whole.model)
    for mine, other in zip(half.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(mine, other.to(mine.dtype))
    for one, other in zip(half.state.log_history, whole.state.log_history, strict=True):
        assert {k: v for k, v in one.items() if k != "eps"} == {k: v for k, v in other.items() if k != "eps"}


def test_in_fp32_nothing_is_stored_otherwise(tmp_path: Path) -> None:
    assert not in_bf16(trainer(tiny_tokenizer(), tmp_path, given={"peft_config": lora()}).model)


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_merged_model_has_all_the_digits_that_its_base_has_on_disk(on_disk: bool, tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    Policy(tiny_policy(tokenizer), tokenizer).save(tmp_path)
    model, whole = (
        get_peft_model(open_policy(str(tmp_path)).model if on_disk else tiny_policy(tokenizer), lora())
        for _ in range(2)
    )
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=1e-3)
    whole.load_state_dict(model.state_dict())
    store_in_bf16(model)
    assert len(in_bf16(model)) == 16
    before = {name: p.clone() for name, p in model.named_parameters()}
    found, expected = merged(model), whole.merge_and_unload()
    assert found.get_output_embeddings().weight is found.get_input_embeddings().weight
    for name, p in expected.named_parameters():
        torch.testing.assert_close(found.get_parameter(name), p, rtol=0, atol=0.0 if on_disk else 5e-3)
    assert all(torch.equal(p, before[name]) and p.dtype == before[name].dtype for name, p in model.named_parameters())
