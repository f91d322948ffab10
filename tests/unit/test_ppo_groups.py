"""RLOO, GRPO and Dr. GRPO: against a naive second implementation, TRL's own losses, and what holds for PPO."""

import copy
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from tiny import PROMPTS, stats_of_first_update, tiny_tokenizer, weights
from torch import Tensor

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.ppo import PPOTrainer

TOKENIZER = tiny_tokenizer()
trainer = functools.partial(tiny.trainer, TOKENIZER)
KINDS = ["rloo", "grpo", "dr_grpo"]
COEFFICIENT, CLIP, LONGEST = 0.3, 0.1, 6


def group_trainer(folder: Path, kind: str, **options: Any) -> PPOTrainer:
    """In float64, with responses of unequal lengths, two to each prompt unless told otherwise."""
    given = {"samples_per_prompt": 2, "min_response_length": 2, "kl_coef": COEFFICIENT, "cliprange": CLIP}
    data = {"train_dataset": options.pop("prompts", PROMPTS * 8)}
    return trainer(folder, torch.float64, data, advantage=kind, max_grad_norm=0, **{**given, **options})


def experienced(ppo: PPOTrainer) -> Any:
    """An experience whose policy has since changed, so that ratios, clipping and KL are none of them trivial."""
    ppo.begin(None)
    with torch.no_grad():
        for parameter in ppo.reference.model.parameters():  # type: ignore[union-attr]
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    ppo.reference.same = False
    experience = ppo._estimate(ppo._roll_out(0))
    with torch.no_grad():
        for parameter in ppo.policy_model.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)))
    return experience


def gradient_of_ours(ppo: PPOTrainer, experience: Any) -> Tensor:
    """The policy's gradient of one step on the whole batch."""
    ppo.model.train()
    ppo._backward(experience, experience.rollout.batch.to("cpu"), torch.arange(ppo.batch_rows), 0, 0)
    return torch.cat([p.grad.flatten() for p in ppo.policy_model.parameters()])  # type: ignore[union-attr]


def log_p(policy: Any, prompt: list[int], answer: list[int]) -> Tensor:
    """log p of an answer's tokens, one row alone."""
    logits = policy(torch.tensor([prompt + answer])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0]


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_is_the_papers(kind: str, kl_in: str, tmp_path: Path) -> None:
    """Row by row, with plain numbers for advantages, by autograd through the whole model."""
    ppo = group_trainer(tmp_path, kind, kl_in=kl_in, samples_per_prompt=4)
    experience = experienced(ppo)
    rollout, batch = experience.rollout, experience.rollout.batch
    rows = [
        (tokens[:p], tokens[p : p + r])
        for tokens, p, r in zip(
            batch.tokens.tolist(), batch.prompt_lengths.tolist(), batch.response_lengths.tolist(), strict=True
        )
    ]
    returns = []
    for number, (_, answer) in enumerate(rows):
        n = len(answer)
        kl = float((rollout.log_probs - rollout.ref_log_probs)[number, :n].sum())
        returns.append(float(rollout.scores[number]) - (COEFFICIENT * kl if kl_in == "reward" else 0))
    loss = torch.zeros((), dtype=torch.float64)
    policy = copy.deepcopy(ppo.policy_model).eval()
    for number, (prompt, answer) in enumerate(rows):
        assert rows[number - number % 4][0] == prompt, "a group answers one prompt"
        group = returns[number - number % 4 :][:4]
        mean = sum(group) / 4
        others = (sum(group) - returns[number]) / 3
        advantage = returns[number] - (others if kind == "rloo" else mean)
        if kind == "grpo":
            advantage /= math.sqrt(sum((r - mean) ** 2 for r in group) / 3) + 1e-4
        n = len(answer)
        new, old, ref = log_p(policy, prompt, answer), rollout.log_probs[number, :n], rollout.ref_log_probs[number, :n]
        log_ratio = (new - old).sum() if kind == "rloo" else new - old
        ratio = log_ratio.exp()
        surrogate = torch.min(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage)
        kl = torch.exp(ref - new) - (ref - new) - 1
        per_token = -surrogate + (COEFFICIENT * kl if kl_in == "loss" else 0) + 0 * new
        loss = loss + (per_token.sum() / LONGEST if kind == "dr_grpo" else per_token.mean()) / len(rows)
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    found = gradient_of_ours(ppo, experience)
    assert float((found - expected).norm() / expected.norm()) < 1e-9
    assert float(expected.norm()) > 1e-3


def trl_trainer(kind: str, policy: Any, folder: Path) -> Any:
    """TRL's trainer for the same algorithm, with our figures."""
    import trl
    from datasets import Dataset

    name = "RLOO" if kind == "rloo" else "GRPO"
    own = {} if kind == "rloo" else {"loss_type": kind, "use_bias_correction_kl": False}  # as in the paper
    config = getattr(trl, f"{name}Config")(
        output_dir=str(folder), per_device_train_batch_size=8, num_generations=4, max_completion_length=LONGEST,
        beta=COEFFICIENT, epsilon=CLIP, report_to="none", bf16=False, use_cpu=True, temperature=1.0, **own,
    )  # fmt: skip
    data = Dataset.from_list([{"prompt": "the film"}] * 8)
    return getattr(trl, f"{name}Trainer")(
        policy, lambda completions, **_: [0.0] * len(completions), config, data, processing_class=TOKENIZER
    )


@pytest.mark.parametrize("kind", KINDS)
def test_on_the_same_rollouts_the_gradient_is_that_of_trls_trainer(kind: str, tmp_path: Path) -> None:
    # Of one length: TRL gives padded prompts to GPT-2 without their positions.
    ppo = group_trainer(tmp_path, kind, samples_per_prompt=4, prompts=[[5, 9, 11], [7, 20, 21], [30, 8, 6]] * 8)
    experience = experienced(ppo)
    rollout, batch, mask = experience.rollout, experience.rollout.batch, experience.rollout.batch.response_mask
    prompts = batch.tokens[:, :3]
    advantages = experience.advantages[:, 0]  # one number a response; checked above
    policy = copy.deepcopy(ppo.policy_model)
    policy.save_pretrained(tmp_path / "policy")  # from which TRL loads a reference
    policy.config._name_or_path = str(tmp_path / "policy")
    theirs = trl_trainer(kind, policy, tmp_path / "trl")
    policy.eval()
    loss = theirs._compute_loss(
        policy,
        {
            "prompt_ids": prompts, "prompt_mask": torch.ones_like(prompts), "completion_ids": batch.responses * mask,
            "completion_mask": mask.long(), "advantages": advantages, "old_per_token_logps": rollout.log_probs,
            "ref_per_token_logps": rollout.ref_log_probs, "old_logps": (rollout.log_probs * mask).sum(1),
        },
    )  # fmt: skip
    loss.backward()
    expected = torch.cat([p.grad.flatten() for p in policy.parameters()])
    found = gradient_of_ours(ppo, experience)
    assert float((found - expected).norm() / expected.norm()) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_the_reward_rises_and_a_resumed_run_ends_with_the_same_weights(kind: str, tmp_path: Path) -> None:
    options = {"total_episodes": 8 * 30, "learning_rate": 3e-3, "kl_coef": 0.01, "save_steps": 20}
    whole = trainer(tmp_path / "whole", advantage=kind, **options)
    whole.train()
    scores = [row["objective/scores"] for row in whole.state.log_history if "objective/scores" in row]
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.1
    assert "val/explained_variance" not in whole.state.log_history[0]
    again = trainer(tmp_path / "again", advantage=kind, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-20"))
    assert torch.equal(weights(again), weights(whole))


@pytest.mark.parametrize("kind", KINDS)
def test_at_first_the_ratio_is_one_whatever_the_sampling(kind: str, tmp_path: Path) -> None:
    word = TOKENIZER.convert_ids_to_tokens(40)
    options = {"learning_rate": 0.0, "suppress_tokens": [word], "min_new_tokens": 3, "temperature": 0.6}
    stats = stats_of_first_update(trainer(tmp_path, advantage=kind, **options))
    assert stats["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert stats["objective/kl"] == 0


def test_a_prompt_whose_responses_are_equally_good_teaches_nothing(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, advantage="grpo", given={"reward_model": lambda prompts, texts: [0.5] * len(texts)})
    start = weights(ppo)
    stats = stats_of_first_update(ppo)
    assert stats["frac_reward_zero_std"] == 1
    ppo_without_kl = trainer(tmp_path, advantage="grpo", kl_coef=0.0, weight_decay=0.0,
                             given={"reward_model": lambda prompts, texts: [0.5] * len(texts)})  # fmt: skip
    stats_of_first_update(ppo_without_kl)
    assert torch.equal(weights(ppo_without_kl), start)


def test_ppo_takes_several_responses_to_a_prompt(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, samples_per_prompt=4)
    ppo.begin(None)
    rollout = ppo._roll_out(0)
    assert rollout.prompts == [prompt for prompt in rollout.prompts[::4] for _ in range(4)]
    assert len(set(rollout.responses)) > 4
    assert ppo.model.has_critic
    assert ppo.state.max_steps == 8
    epochs = trainer(tmp_path, samples_per_prompt=4, total_episodes=None, num_train_epochs=1)
    epochs.begin(None)
    assert epochs.state.max_steps == len(PROMPTS) * 8 * 4 / 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"advantage": "rloo", "samples_per_prompt": 1}, "samples_per_prompt takes 2 or more"),
        ({"advantage": "grpo", "samples_per_prompt": 3}, "a batch of 8 responses does not divide"),
        ({"advantage": "grpo", "critic": "separate"}, "trainer.advantage=grpo has no critic, so trainer.critic has no"),
        ({"advantage": "rloo", "lam": 0.9}, "trainer.lam has no effect"),
        ({"advantage": "ppo"}, "trainer.advantage is 'ppo'; it takes gae or rloo or grpo or dr_grpo"),
        ({"kl_in": "both"}, "trainer.kl_in is 'both'"),
        ({"samples_per_prompt": 0}, "trainer.samples_per_prompt is 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **options)
