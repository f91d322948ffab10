"""The PPO trainer learns, resumes, limits its steps, refuses what cannot work, and saves what it trained."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import first_experience, lora, stats_of_first_update, tiny_policy, tiny_scorer, tiny_tokenizer, weights
from transformers import AutoModelForCausalLM

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.sampling import Sampling, make_batch
from rlhf_pipeline.ppo import PPOConfig
from rlhf_pipeline.ppo.config import make_sampling
from rlhf_pipeline.ppo.prompts import prompts_of_update

TOKENIZER = tiny_tokenizer()
WORD = TOKENIZER.convert_ids_to_tokens(40)
trainer = functools.partial(tiny.trainer, TOKENIZER)


@pytest.mark.parametrize("advantage", ["gae", "rloo", "grpo", "dr_grpo"])
def test_ratio_is_one_and_kl_zero_at_first_whatever_the_sampling(advantage: str, tmp_path: Path) -> None:
    options = {"learning_rate": 0.0, "suppress_tokens": [WORD], "min_new_tokens": 3, "temperature": 0.6}
    stats = stats_of_first_update(trainer(tmp_path, advantage=advantage, **options))
    assert stats["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert stats["objective/kl"] == 0
    assert stats["policy/approxkl_avg"] == pytest.approx(0, abs=1e-12)


def test_the_gradient_norm_is_limited(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, max_grad_norm=1e-12, adam_epsilon=1e-3)
    experience = first_experience(ppo)
    start = weights(ppo)
    ppo._optimise(experience, 0)
    assert (weights(ppo) - start).norm() < 1e-6


def test_the_policy_learns_to_stop_when_pad_is_eos(tmp_path: Path) -> None:
    same = copy.deepcopy(TOKENIZER)
    same.pad_token = same.eos_token
    given = {"reward_model": lambda prompts, responses: [-float(len(text)) for text in responses]}
    ppo = tiny.trainer(
        same, tmp_path, given=given, total_episodes=32 * 25, per_device_train_batch_size=32, num_ppo_epochs=4,
        learning_rate=3e-3, kl_coef=0.0,
    )  # fmt: skip
    before = ppo._roll_out(0).batch.response_lengths.float().mean()
    ppo.train()
    after = ppo._roll_out(99).batch.response_lengths.float().mean()
    assert before > 4
    assert after < 2


LARGE = {"per_device_train_batch_size": 32, "total_episodes": 32 * 30}  # of 8 rows a batch, it is left to chance
LEARNING: dict[str, dict[str, Any]] = {
    "gae": {**LARGE, "kl_target": 1.0, "num_mini_batches": 2},
    "bf16": {**LARGE, "bf16": True},
    "lora": {},  # a few numbers beside random weights: it resumes, and learns little
    "rloo": {"advantage": "rloo"},
    "grpo": {"advantage": "grpo"},
    "dr_grpo": {"advantage": "dr_grpo"},
}


@pytest.mark.parametrize("kind", LEARNING)
def test_the_reward_rises_and_a_resumed_run_ends_with_the_same_weights(kind: str, tmp_path: Path) -> None:
    def build(folder: str, **options: Any) -> Any:
        options = {"total_episodes": 8 * 30, "learning_rate": 3e-3, "kl_coef": 0.01, **LEARNING[kind], **options}
        return trainer(tmp_path / folder, given={"peft_config": lora()} if kind == "lora" else None, **options)

    whole, again = build("whole", save_steps=20), build("again")
    whole.train()
    log = [row for row in whole.state.log_history if "objective/scores" in row]
    scores = [row["objective/scores"] for row in log]
    assert kind == "lora" or sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.1
    assert ("val/explained_variance" in log[0]) == whole.model.has_critic
    assert len({row["policy/optimizer_steps"] for row in log}) == 1, "every update takes the same number of steps"
    again.train(str(tmp_path / "whole" / "checkpoint-20"))
    assert again.state.global_step == 30
    assert torch.equal(weights(whole), weights(again))
    assert whole.kl_coef == again.kl_coef


def test_a_missing_end_costs_its_penalty(tmp_path: Path) -> None:
    plain = stats_of_first_update(trainer(tmp_path, kl_coef=0.0))
    fined = trainer(tmp_path, kl_coef=0.0, missing_eos_penalty=2.0)
    stats = stats_of_first_update(fined)
    missing = fined._roll_out(0).batch.last_tokens != 0
    assert stats["objective/scores"] == plain["objective/scores"]
    assert plain["objective/rlhf_reward"] - stats["objective/rlhf_reward"] == pytest.approx(2 * missing.float().mean())


def test_steps_below_one_are_shares_and_the_last_update_is_logged(tmp_path: Path) -> None:
    for asked, expected in ((0.25, [2, 4, 6, 8]), (100, [8]), (3, [3, 6, 8])):
        ppo = trainer(tmp_path, logging_steps=asked)
        ppo.train()
        assert [row["step"] for row in ppo.state.log_history] == expected


def test_every_prompt_is_used_once_a_pass() -> None:
    used = [i for update in range(5) for i in prompts_of_update(10, 4, update, seed=3)]
    assert sorted(used[:10]) == sorted(used[10:20]) == list(range(10))
    assert used[:10] != used[10:20]


def test_the_saved_policy_generates_as_it_was_trained(tmp_path: Path) -> None:
    """`generate` on the saved folder draws from the trained distribution: temperature, ends, suppressed tokens."""
    ppo = trainer(tmp_path, temperature=0.5, min_new_tokens=2, suppress_tokens=[WORD], total_episodes=16)
    ppo.train()
    ppo.save_model(str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    prompt = torch.tensor([[5, 9, 11]])
    torch.manual_seed(0)
    out = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), output_scores=True, return_dict_in_generate=True
    )
    said = out.sequences[0, 3:]
    assert len(said) <= 6
    with torch.no_grad():
        mine = ppo.model(make_batch(prompt.tolist(), [said.tolist()]), ppo.sampling).log_probs[0]
    theirs = torch.stack([s[0].log_softmax(-1)[token] for s, token in zip(out.scores, said, strict=True)])
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    assert out.scores[0][0, 40] == float("-inf")
    assert out.scores[1][0, 0] == float("-inf"), "no end before two tokens"


def test_a_policy_trained_without_a_stop_token_keeps_its_end(tmp_path: Path) -> None:
    trainer(tmp_path, stop_token=None).save_model(str(tmp_path / "model"))
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == 0
    assert (tmp_path / "model" / "value_head.safetensors").exists()


ONE_MODEL = tiny_scorer(TOKENIZER)
OTHER_WEIGHTS = torch.optim.AdamW([torch.zeros(1, requires_grad=True)])
# Settings that PPO never reads but transformers does. test_every_field_has_an_effect_or_is_refused would not notice if
# they were no longer refused.
NO_EFFECT: dict[str, Any] = {
    "auto_find_batch_size": True, "data_seed": 7, "dataloader_drop_last": True, "dataloader_num_workers": 2,
    "ddp_find_unused_parameters": True, "include_num_input_tokens_seen": "all", "label_smoothing_factor": 0.1,
    "neftune_noise_alpha": 5.0, "resume_from_checkpoint": "somewhere", "save_only_model": True,
    "skip_memory_metrics": False, "torch_compile": True, "train_sampling_strategy": "group_by_length",
    "use_liger_kernel": True,
}  # fmt: skip
REFUSED: list[tuple[str, dict[str, Any], dict[str, Any]]] = [  # message, settings, constructor arguments
    ("min_response_length is 9", {"min_response_length": 9}, {}),
    ("min_new_tokens is 9", {"min_new_tokens": 9}, {}),
    ("does not divide into trainer.num_mini_batches=3", {"num_mini_batches": 3}, {}),
    ("num_mini_batches is 0", {"num_mini_batches": 0}, {}),
    ("fp16 is not possible", {"fp16": True}, {}),
    ("has '\\[UNK\\]', which is no token", {"suppress_tokens": ["[UNK]"]}, {}),
    ("prompts do not fill one batch of 800", {"per_device_train_batch_size": 800}, {}),
    ("up to 205 tokens, and the policy has 64 positions", {"response_length": 200}, {}),
    ("temperature is 0", {"temperature": 0.0}, {}),
    ("exclude each other", {"stop_token_id": 3}, {}),
    ("stop_token_id is 9999", {"stop_token": None, "stop_token_id": 9999}, {}),
    ("needs a trainer.stop_token", {"stop_token": None, "missing_eos_penalty": 1.0}, {}),
    ("kl_target is 0", {"kl_target": 0.0}, {}),
    ("raise kl_horizon", {"kl_target": 1.0, "kl_horizon": 1}, {}),
    ("samples_per_prompt takes 2 or more", {"advantage": "rloo", "samples_per_prompt": 1}, {}),
    ("a batch of 8 responses does not divide", {"advantage": "grpo", "samples_per_prompt": 3}, {}),
    ("advantage=grpo has no critic, so trainer.critic has no", {"advantage": "grpo", "critic": "separate"}, {}),
    ("trainer.lam has no effect", {"advantage": "rloo", "lam": 0.9}, {}),
    ("advantage is 'ppo'; it takes gae or rloo or grpo or dr_grpo", {"advantage": "ppo"}, {}),
    ("trainer.kl_in is 'both'", {"kl_in": "both"}, {}),
    ("trainer.samples_per_prompt is 0", {"samples_per_prompt": 0}, {}),
    ("critic_init=reward needs a reward model", {"critic": "separate", "critic_init": "reward"}, {}),
    ("ptx_coef needs pretraining texts", {"ptx_coef": 0.5}, {}),
    ("token id 9999", {"ptx_coef": 1.0}, {"ptx_dataset": [[1, 9999]]}),
    ("value_model and reward_model are one object", {}, {"reward_model": ONE_MODEL, "value_model": ONE_MODEL}),
    ("token id 299 and the policy knows ids below 299", {}, {"train_dataset": [[299, 2]] * 8}),
    ("batch_size cannot be set", {"batch_size": 999}, {}),
    *((f"trainer.{name} has no effect in PPO", {name: value}, {}) for name, value in NO_EFFECT.items()),
    (r"does not hold policy\.transformer", {}, {"optimizers": (OTHER_WEIGHTS, None)}),
]


@pytest.mark.parametrize(("message", "options", "given"), REFUSED, ids=[message for message, *_ in REFUSED])
def test_what_cannot_work_is_refused(
    message: str, options: dict[str, Any], given: dict[str, Any], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, given=given, **options)


def test_a_horizon_is_refused_only_where_one_update_could_end_the_kl_penalty(tmp_path: Path) -> None:
    """The controller's factor is 1 - 0.2 x episodes / horizon at the least: 0.2 for a horizon of 2."""
    trainer(tmp_path, kl_target=1.0, kl_horizon=2)
    trainer(tmp_path, kl_horizon=1)  # nothing adapts


def test_a_pad_token_beyond_the_policys_embeddings_does_no_harm(tmp_path: Path) -> None:
    wider = copy.deepcopy(TOKENIZER)
    wider.add_special_tokens({"pad_token": "[PAD]"})
    assert wider.pad_token_id == len(TOKENIZER)
    tiny.trainer(wider, tmp_path, given={"model": tiny_policy(TOKENIZER)}, total_episodes=8).train()


def test_stop_tokens_add_up_and_none_may_be_suppressed(tmp_path: Path) -> None:
    words = TOKENIZER.convert_ids_to_tokens([40, 41])
    args = PPOConfig(output_dir=str(tmp_path), report_to="none", stop_token="eos")
    assert make_sampling(args, TOKENIZER) == Sampling(0.7, stop_ids=(0,)), "nothing is suppressed unasked"
    args.stop_tokens, args.suppress_tokens = words, []
    assert make_sampling(args, TOKENIZER).stop_ids == (0, 40, 41)
    args.suppress_tokens = words[:1]
    with pytest.raises(UserError, match="suppress_tokens and the stop tokens share"):
        make_sampling(args, TOKENIZER)
