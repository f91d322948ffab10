"""RLOO, GRPO and Dr. GRPO: against a naive second implementation and TRL's own losses."""

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

from rlhf_pipeline.ppo import PPOTrainer

TOKENIZER = tiny_tokenizer()
trainer = functools.partial(tiny.trainer, TOKENIZER)
KINDS = ["rloo", "grpo", "dr_grpo"]
COEFFICIENT, CLIP, LONGEST = 0.3, 0.1, 6


def group_trainer(folder: Path, kind: str, **options: Any) -> PPOTrainer:
    """In float64, with four responses of unequal lengths to each prompt."""
    data = {"train_dataset": options.pop("prompts", PROMPTS * 8)}
    return trainer(
        folder, torch.float64, data, advantage=kind, max_grad_norm=0, samples_per_prompt=4, min_response_length=2,
        kl_coef=COEFFICIENT, cliprange=CLIP, **options,
    )  # fmt: skip


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
    ppo = group_trainer(tmp_path, kind, kl_in=kl_in)
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
    ppo = group_trainer(tmp_path, kind, prompts=[[5, 9, 11], [7, 20, 21], [30, 8, 6]] * 8)
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


def test_a_prompt_whose_responses_are_equally_good_teaches_nothing(tmp_path: Path) -> None:
    given = {"reward_model": lambda prompts, texts: [0.5] * len(texts)}
    ppo = trainer(tmp_path, advantage="grpo", kl_coef=0.0, weight_decay=0.0, given=given)
    start = weights(ppo)
    assert stats_of_first_update(ppo)["frac_reward_zero_std"] == 1
    assert torch.equal(weights(ppo), start)


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
