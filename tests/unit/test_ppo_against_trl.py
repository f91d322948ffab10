"""Our trainer beside TRL's own: equal where TRL is right, and not where it is not.

TRL's loop cannot be stepped, so it is run whole, its optimizer steps and rollouts are recorded, and our trainer is fed
the same rollouts.
"""

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import trl.experimental.ppo.ppo_trainer as trl_ppo
from datasets import Dataset
from tiny import tiny_policy, tiny_tokenizer
from transformers import GPT2ForSequenceClassification, PreTrainedTokenizerBase
from trl.experimental.ppo import PPOConfig as TRLConfig
from trl.experimental.ppo import PPOTrainer as TRLTrainer

import rlhf_pipeline.ppo.rollout as our_rollout
from rlhf_pipeline.ppo import PPOConfig, PPOTrainer
from rlhf_pipeline.sampling import Batch, make_batch

PROMPTS = [[i + 2, 2 * i + 2, 3 * i + 2] for i in range(1, 17)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


def classifier(tokenizer: PreTrainedTokenizerBase, seed: int) -> GPT2ForSequenceClassification:
    """What TRL takes as a reward or value model."""
    config = copy.deepcopy(tiny_policy(tokenizer).config)
    config.num_labels = 1
    torch.manual_seed(seed)
    return GPT2ForSequenceClassification(config).eval()


def parts(tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype = torch.float32, same: bool = False) -> dict[str, Any]:
    """Policy, reference (another network, unless `same`), reward and value model."""
    found = {
        "model": tiny_policy(tokenizer),
        "ref_model": tiny_policy(tokenizer, seed=0 if same else 1),
        "reward_model": classifier(tokenizer, 2),
        "value_model": classifier(tokenizer, 3),
    }
    if not same:  # near, or the ratios and KLs are astronomical
        with torch.no_grad():
            pairs = zip(found["model"].parameters(), found["ref_model"].parameters(), strict=True)
            for mine, other in pairs:
                other.copy_(mine + 0.02 * other)
    return {name: model.to(dtype) for name, model in found.items()}


OPTIONS: dict[str, Any] = {
    "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4, "total_episodes": 24, "num_ppo_epochs": 2,
    "learning_rate": 1e-3, "response_length": 6, "report_to": "none", "disable_tqdm": True, "save_strategy": "no",
    "num_sample_generations": 0, "use_cpu": True, "gradient_checkpointing": False, "bf16": False, "max_grad_norm": 0,
    "logging_steps": 1,
}  # fmt: skip


@contextmanager
def quietly() -> Iterator[None]:
    """TRL's own warnings are not ours to mend."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def dataset(prompts: list[list[int]] = PROMPTS) -> Dataset:
    """Prompts as TRL takes them."""
    return Dataset.from_dict({"input_ids": prompts})


def trl_trainer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, models: dict[str, Any], prompts: Any = None, **options: Any
) -> TRLTrainer:
    """TRL's trainer as a script builds it."""
    with quietly():
        args = TRLConfig(output_dir=str(folder), **{**OPTIONS, **options})
        data = dataset(prompts or PROMPTS)
        return TRLTrainer(args, tokenizer, train_dataset=data, eval_dataset=data, **models)


def our_trainer(
    tokenizer: PreTrainedTokenizerBase, folder: Path, models: dict[str, Any], prompts: Any = None, **options: Any
) -> PPOTrainer:
    """Ours, built by the same call."""
    args = PPOConfig(output_dir=str(folder), **{**OPTIONS, **options})
    data = dataset(prompts or PROMPTS)
    return PPOTrainer(args, tokenizer, train_dataset=data, eval_dataset=data, **models)


class Record:
    """What a trainer did at each of its optimizer steps."""

    def __init__(self) -> None:
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def attach(self, optimizer: Any, model: Any) -> None:
        """Note gradients before, and weights after, each step."""
        step = optimizer.step

        def recorded(*args: Any, **kwargs: Any) -> Any:
            named = dict(model.named_parameters())
            self.gradients.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
            found = step(*args, **kwargs)
            self.weights.append({n: p.detach().clone() for n, p in named.items()})
            return found

        optimizer.step = recorded


def largest_difference(first: Any, second: Any) -> float:
    """The largest difference over the largest number: of tensors, or of every tensor of two dicts."""
    if isinstance(first, dict):
        assert first.keys() == second.keys()
        return max(largest_difference(first[name], second[name]) for name in first)
    scale = max(float(first.abs().max()), float(second.abs().max()), 1e-30)
    return float((first - second).abs().max()) / scale


# In fp32 Adam would blow the rounding of gradients that are 0 (those of the keys' biases) up to whole steps.
@pytest.mark.parametrize(("dtype", "limit", "epsilon"), [(torch.float64, 1e-6, 1e-8), (torch.float32, 1e-4, 1e-2)])
def test_every_step_equals_trls(
    dtype: torch.dtype, limit: float, epsilon: float, tokenizer: PreTrainedTokenizerBase, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Three updates of two epochs: losses, KL, advantages, values, gradients and weights."""
    rolled, advantages, values = [], [], []
    generation, whiten, get_reward = trl_ppo.batch_generation, trl_ppo.masked_whiten, trl_ppo.get_reward

    def recorded_generation(model: Any, queries: torch.Tensor, *args: Any) -> Any:
        """Its tokens, and the logits of one forward pass: generate() rounds its own to fp32."""
        tokens, _ = generation(model, queries, *args)
        rolled.append((queries.clone(), tokens.clone()))
        logits = model(tokens).logits[:, queries.shape[1] - 1 : -1]
        return tokens, logits / 0.7

    def recorded_whiten(found: torch.Tensor, mask: torch.Tensor, *args: Any) -> torch.Tensor:
        advantages.append(found.clone())
        return whiten(found, mask, *args)

    def recorded_values(model: Any, tokens: torch.Tensor, pad: int, context: int) -> Any:
        found = get_reward(model, tokens, pad, context)
        if model is theirs.model.value_model:
            values.append(found[0][:, context - 1 : -1].squeeze(-1).clone())
        return found

    monkeypatch.setattr(trl_ppo, "batch_generation", recorded_generation)
    monkeypatch.setattr(trl_ppo, "masked_whiten", recorded_whiten)
    monkeypatch.setattr(trl_ppo, "get_reward", recorded_values)
    models = parts(tokenizer, dtype)
    mine = copy.deepcopy(models)
    # TRL adds 1e-7 to the temperature; pads and stops are out of play, since it scores a stopped answer elsewhere.
    theirs = trl_trainer(tokenizer, tmp_path, models, temperature=0.7 - 1e-7, adam_epsilon=epsilon)
    their_steps = Record()
    their_steps.attach(theirs.optimizer, theirs.model)
    with quietly():
        theirs.train()

    fed = iter(rolled)

    def same_rollout(*_: Any) -> Batch:
        queries, tokens = next(fed)
        width = queries.shape[1]
        return make_batch(queries.tolist(), tokens[:, width:].tolist())

    monkeypatch.setattr(our_rollout, "sample", same_rollout)
    ours = our_trainer(tokenizer, tmp_path, mine, temperature=0.7, adam_epsilon=epsilon)
    our_steps, experiences = Record(), []
    estimate = ours._estimate
    ours._estimate = lambda rollout: (experiences.append(estimate(rollout)), experiences[-1])[1]  # type: ignore[method-assign]
    begin = ours.begin

    def begin_and_record(resume: Any) -> None:
        begin(resume)
        our_steps.attach(ours.optimizer, ours.model)

    ours.begin = begin_and_record  # type: ignore[method-assign]
    ours.train()

    assert len(rolled) == 3
    assert not any((tokens == tokenizer.pad_token_id).any() for _, tokens in rolled), "a pad among the answers"
    assert len(our_steps.gradients) == len(their_steps.gradients) == 6
    worst = {"gradients": 0.0, "weights": 0.0, "advantages": 0.0, "values": 0.0}
    for a, b in zip(our_steps.gradients, their_steps.gradients, strict=True):
        worst["gradients"] = max(worst["gradients"], largest_difference(a, b))
    for a, b in zip(our_steps.weights, their_steps.weights, strict=True):
        worst["weights"] = max(worst["weights"], largest_difference(a, b))
    for a, value, advantage in zip(experiences, values, advantages, strict=True):
        worst["values"] = max(worst["values"], largest_difference(a.rollout.values, value))
        worst["advantages"] = max(worst["advantages"], largest_difference(a.returns - a.rollout.values, advantage))
        assert largest_difference(a.advantages, whiten(advantage, torch.ones_like(advantage))) < limit
    logged = ["loss/policy_avg", "loss/value_avg", "objective/kl", "objective/rlhf_reward", "objective/scores",
              "objective/entropy", "objective/non_score_reward", "policy/approxkl_avg", "policy/clipfrac_avg",
              "val/clipfrac_avg", "val/ratio", "lr", "episode"]  # fmt: skip
    for mine_row, their_row in zip(_updates(ours), _updates(theirs), strict=True):
        for name in logged:
            # TRL logs through fp32 tensors, so rounding of that size is theirs.
            assert mine_row[name] == pytest.approx(their_row[name], rel=max(limit, 1e-5), abs=1e-6), name
    print(f"largest relative differences, {dtype}: {worst}")
    assert max(worst.values()) < limit


def _updates(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss/policy_avg" in row]
