"""The sampling distribution, batches of unequal length, and the PPO trainer."""

import copy
import functools
import json
from pathlib import Path

import pytest
import tiny
import torch
from tiny import PROMPTS, answers, stats_of_first_update, tiny_policy, tiny_tokenizer, weights

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.likelihood import log_probs
from rlhf_pipeline.models.sampling import Sampling
from rlhf_pipeline.ppo import PPOConfig, PPOTrainer
from rlhf_pipeline.ppo.config import make_sampling
from rlhf_pipeline.ppo.prompts import prompts_of_update

TOKENIZER = tiny_tokenizer()
trainer = functools.partial(tiny.trainer, TOKENIZER)


def test_sampled_tokens_obey_the_distribution() -> None:
    policy = tiny_policy(TOKENIZER)
    banned = tuple(range(100, 290))
    sampling = Sampling(0.7, stop_ids=(0, 3), min_length=4, suppressed_ids=banned)
    batch = answers(policy, PROMPTS * 50, [9] * 200, sampling)
    said = batch.responses[batch.response_mask]
    assert not torch.isin(said, torch.tensor(banned)).any()
    stops = torch.isin(batch.responses, torch.tensor([0, 3])) & batch.response_mask
    assert not stops[:, :3].any()
    last = torch.arange(batch.responses.shape[1]) == (batch.response_lengths - 1)[:, None]
    assert (stops <= last).all(), "a response goes on after its stop"
    assert ((batch.response_lengths == 9) | stops.any(1)).all(), "a response ends before limit and stop"


def test_frequencies_of_drawn_tokens_are_the_models_probabilities() -> None:
    policy = tiny_policy(TOKENIZER)
    sampling = Sampling(1.0)
    batch = answers(policy, [PROMPTS[0]] * 4000, [1] * 4000, sampling)
    counts = torch.bincount(batch.responses[:, 0], minlength=len(TOKENIZER)) / 4000
    with torch.no_grad():
        expected = policy(torch.tensor([PROMPTS[0]])).logits[0, -1].softmax(-1)
    assert (counts - expected).abs().max() < 0.015
    assert expected.max() > 0.03


def test_a_padded_batch_equals_its_rows_alone() -> None:
    policy, sampling = tiny_policy(TOKENIZER), Sampling(0.8, stop_ids=(0,), min_length=2)
    batch = answers(policy, PROMPTS, [8, 3, 5, 1], sampling, seed=1)
    together = log_probs(policy, batch, sampling)
    for row in range(4):
        alone = batch.rows(torch.tensor([row]))
        assert alone.tokens.shape[1] == len(PROMPTS[row]) + int(batch.response_lengths[row])
        length = int(batch.response_lengths[row])
        torch.testing.assert_close(log_probs(policy, alone, sampling)[0], together[row, :length], rtol=1e-4, atol=1e-5)


def test_log_probs_are_of_the_distribution_that_is_sampled() -> None:
    policy, sampling = tiny_policy(TOKENIZER), Sampling(0.5, stop_ids=(0,), min_length=3, suppressed_ids=(4, 5, 6))
    batch = answers(policy, [PROMPTS[0]], [5], sampling, seed=2)
    ids, expected = PROMPTS[0].copy(), []
    for step, token in enumerate(batch.responses[0].tolist()):
        with torch.no_grad():
            logits = policy(torch.tensor([ids])).logits[0, -1] / 0.5
        logits[[4, 5, 6]] = float("-inf")
        if step < 3:
            logits[0] = float("-inf")
        expected.append(logits.log_softmax(-1)[token].item())
        ids.append(token)
    torch.testing.assert_close(log_probs(policy, batch, sampling)[0], torch.tensor(expected), rtol=1e-4, atol=1e-5)


def test_ratio_is_one_and_kl_zero_at_first_whatever_the_sampling(tmp_path: Path) -> None:
    word = TOKENIZER.convert_ids_to_tokens(40)
    ppo = trainer(tmp_path, learning_rate=0.0, suppress_tokens=[word], min_new_tokens=3, temperature=0.6)
    stats = stats_of_first_update(ppo)
    assert stats["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert stats["objective/kl"] == 0
    assert stats["policy/approxkl_avg"] == pytest.approx(0, abs=1e-12)


def test_the_gradient_norm_is_limited(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, max_grad_norm=1e-12, adam_epsilon=1e-3)
    ppo.begin(None)
    experience = ppo._estimate(ppo._roll_out(0))
    start = weights(ppo)
    ppo._optimise(experience, 0)
    assert (weights(ppo) - start).norm() < 1e-6


def test_the_policy_learns_to_stop_when_pad_is_eos(tmp_path: Path) -> None:
    same = copy.deepcopy(TOKENIZER)
    same.pad_token = same.eos_token

    def shortness(prompts: object, responses: list[str]) -> list[float]:
        return [-float(len(text)) for text in responses]

    args = PPOConfig(
        output_dir=str(tmp_path), total_episodes=32 * 25, per_device_train_batch_size=32, num_ppo_epochs=4,
        learning_rate=3e-3, response_length=6, temperature=1.0, stop_token="eos", kl_coef=0.0, report_to="none",
        disable_tqdm=True, save_steps=1000, bf16=False,
    )  # fmt: skip
    policy = tiny_policy(same)
    ppo = PPOTrainer(args, same, policy, copy.deepcopy(policy), shortness, PROMPTS * 8)
    before = ppo._roll_out(0).batch.response_lengths.float().mean()
    ppo.train()
    after = ppo._roll_out(99).batch.response_lengths.float().mean()
    assert before > 4
    assert after < 2


def test_the_reward_rises(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, total_episodes=8 * 60, learning_rate=3e-3, kl_coef=0.0)
    before = float(ppo._roll_out(500).scores.mean() + ppo._roll_out(501).scores.mean())
    ppo.train()
    after = float(ppo._roll_out(500).scores.mean() + ppo._roll_out(501).scores.mean())
    assert after > before + 0.2


def test_a_resumed_run_ends_with_the_very_weights_of_an_unbroken_one(tmp_path: Path) -> None:
    options = {"kl_target": 1.0, "lr_scheduler_type": "linear", "num_mini_batches": 2}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    cut = trainer(tmp_path / "cut", save_steps=3, **options)
    cut.train()
    again = trainer(tmp_path / "again", **options)
    again.train(str(tmp_path / "cut" / "checkpoint-3"))
    assert again.state.global_step == 8
    assert torch.equal(weights(whole), weights(again))
    assert whole.kl_coef == again.kl_coef


def test_a_missing_end_costs_its_penalty(tmp_path: Path) -> None:
    plain = stats_of_first_update(trainer(tmp_path, kl_coef=0.0))
    fined = trainer(tmp_path, kl_coef=0.0, missing_eos_penalty=2.0)
    stats = stats_of_first_update(fined)
    batch = fined._roll_out(0).batch
    missing = batch.last_tokens != 0
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


def test_the_saved_policy_opens_and_keeps_its_end(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    ppo = trainer(tmp_path, stop_token=None)
    ppo.save_model(str(tmp_path / "model"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(model.transformer.wte.weight, ppo.model.policy.transformer.wte.weight)
    assert json.loads((tmp_path / "model" / "generation_config.json").read_text())["eos_token_id"] == 0
    assert (tmp_path / "model" / "value_head.safetensors").exists()


REFUSED = {
    "min_response_length is 9": {"min_response_length": 9},
    "does not divide into trainer.num_mini_batches=3": {"num_mini_batches": 3},
    "fp16 is not possible": {"fp16": True},
    "has '\\[UNK\\]', which is no token": {"suppress_tokens": ["[UNK]"]},
    "prompts do not fill one batch of 800": {"per_device_train_batch_size": 800},
    "temperature is 0": {"temperature": 0.0},
    "exclude each other": {"stop_token_id": 3},
    "stop_token_id is 9999": {"stop_token": None, "stop_token_id": 9999},
    "needs a trainer.stop_token": {"stop_token": None, "missing_eos_penalty": 1.0},
    "num_mini_batches is 0": {"num_mini_batches": 0},
    "kl_target is 0": {"kl_target": 0.0},
}


@pytest.mark.parametrize("message", list(REFUSED))
def test_settings_that_do_not_go_together_are_refused(message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **REFUSED[message])


def test_prompts_too_long_for_the_policy_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="up to 205 tokens, and the policy has 64 positions"):
        trainer(tmp_path, response_length=200)


def test_stop_tokens_add_up_and_none_may_be_suppressed(tmp_path: Path) -> None:
    words = TOKENIZER.convert_ids_to_tokens([40, 41])
    args = PPOConfig(output_dir=str(tmp_path), report_to="none", stop_token="eos")
    assert make_sampling(args, TOKENIZER) == Sampling(0.7, stop_ids=(0,)), "nothing is suppressed unasked"
    args.stop_tokens, args.suppress_tokens = words, []
    assert make_sampling(args, TOKENIZER).stop_ids == (0, 40, 41)
    args.suppress_tokens = words[:1]
    with pytest.raises(UserError, match="suppress_tokens and the stop tokens share"):
        make_sampling(args, TOKENIZER)
