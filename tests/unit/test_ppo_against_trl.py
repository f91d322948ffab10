"""Our trainer beside TRL's own: equal where TRL is right, and not where it is not.

TRL's loop cannot be stepped, so it is run whole, its optimizer steps and rollouts are recorded, and our trainer is fed
the same rollouts.
"""

import copy
import json
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from tiny import tiny_policy, tiny_scorer, tiny_tokenizer, weights
from transformers import DistilBertConfig, DistilBertForSequenceClassification, TrainerCallback

from rlhf_pipeline.models.sampling import Batch, make_batch
from rlhf_pipeline.ppo import PPOConfig, PPOTrainer

trl_ppo = pytest.importorskip(
    "trl.experimental.ppo.ppo_trainer", reason="TRL 1.13 removed its PPO; make test-oldest compares with TRL 1.12's"
)
TRLConfig, TRLTrainer = trl_ppo.PPOConfig, trl_ppo.PPOTrainer

TOKENIZER, PAD_IS_EOS = tiny_tokenizer(), tiny_tokenizer()
PAD_IS_EOS.pad_token = PAD_IS_EOS.eos_token
PROMPTS = [[i + 2, 2 * i + 2, 3 * i + 2] for i in range(1, 17)]


def parts(dtype: torch.dtype = torch.float32, same: bool = False) -> dict[str, Any]:
    """Policy, reference (another network, unless `same`), reward and value model."""
    found = {
        "model": tiny_policy(TOKENIZER),
        "ref_model": tiny_policy(TOKENIZER, seed=0 if same else 1),
        "reward_model": tiny_scorer(TOKENIZER, 2),
        "value_model": tiny_scorer(TOKENIZER, 3),
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
    folder: Path, models: dict[str, Any], prompts: Any = None, tokenizer: Any = TOKENIZER, **options: Any
) -> Any:
    """TRL's trainer as a script builds it."""
    with quietly():
        args = TRLConfig(output_dir=str(folder), **{**OPTIONS, **options})
        data = dataset(prompts or PROMPTS)
        return TRLTrainer(args, tokenizer, train_dataset=data, eval_dataset=data, **models)


def our_trainer(
    folder: Path, models: dict[str, Any], prompts: Any = None, tokenizer: Any = TOKENIZER, **options: Any
) -> PPOTrainer:
    """Ours, built by the same call."""
    args = PPOConfig(output_dir=str(folder), **{**OPTIONS, **options})
    data = dataset(prompts or PROMPTS)
    return PPOTrainer(args, tokenizer, train_dataset=data, eval_dataset=data, **models)


def recorded(optimizer: Any, model: Any) -> tuple[list[dict[str, torch.Tensor]], list[dict[str, torch.Tensor]]]:
    """Lists that get the gradients before, and the weights after, each step."""
    named, gradients, after = dict(model.named_parameters()), [], []
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.register_step_pre_hook(
        lambda *_: gradients.append({n: p.grad.clone() for n, p in named.items() if p.grad is not None})
    )
    inner.register_step_post_hook(lambda *_: after.append({n: p.detach().clone() for n, p in named.items()}))
    return gradients, after


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
    dtype: torch.dtype, limit: float, epsilon: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    models = parts(dtype)
    mine = copy.deepcopy(models)
    # TRL adds 1e-7 to the temperature; pads and stops are out of play, since it scores a stopped answer elsewhere.
    theirs = trl_trainer(tmp_path, models, temperature=0.7 - 1e-7, adam_epsilon=epsilon)
    their_steps = recorded(theirs.optimizer, theirs.model)
    with quietly():
        theirs.train()

    fed = iter(rolled)

    def same_rollout(*_: Any) -> Batch:
        queries, tokens = next(fed)
        width = queries.shape[1]
        return make_batch(queries.tolist(), tokens[:, width:].tolist())

    ours = our_trainer(tmp_path, mine, temperature=0.7, adam_epsilon=epsilon)
    monkeypatch.setattr("rlhf_pipeline.ppo.lifecycle.sample", same_rollout)
    experiences, estimate = [], ours._estimate
    ours._estimate = lambda rollout: (experiences.append(estimate(rollout)), experiences[-1])[1]
    ours.create_optimizer_and_scheduler(num_training_steps=3)
    our_steps = recorded(ours.optimizer, ours.model)
    ours.train()

    assert len(rolled) == len(experiences) == len(values) == len(advantages) == 3
    assert not any((tokens == TOKENIZER.pad_token_id).any() for _, tokens in rolled), "a pad among the answers"
    worst = {}
    for name, mine_steps, their in zip(("gradients", "weights"), our_steps, their_steps, strict=True):
        assert len(mine_steps) == len(their) == 6
        worst[name] = max(map(largest_difference, mine_steps, their))
    found = [each.rollout.values for each in experiences]
    worst["values"] = max(map(largest_difference, found, values))
    plain = [each.returns - each.rollout.values for each in experiences]
    worst["advantages"] = max(map(largest_difference, plain, advantages))
    whitened = [whiten(advantage, torch.ones_like(advantage)) for advantage in advantages]
    worst["whitened"] = max(map(largest_difference, [each.advantages for each in experiences], whitened))
    assert max(worst.values()) < limit, worst
    logged = ["loss/policy_avg", "loss/value_avg", "objective/kl", "objective/rlhf_reward", "objective/scores",
              "objective/entropy", "objective/non_score_reward", "policy/approxkl_avg", "policy/clipfrac_avg",
              "val/clipfrac_avg", "val/ratio", "lr", "episode"]  # fmt: skip
    for mine_row, their_row in zip(_updates(ours), _updates(theirs), strict=True):
        for name in logged:
            # TRL logs through fp32 tensors, so rounding of that size is theirs.
            assert mine_row[name] == pytest.approx(their_row[name], rel=max(limit, 1e-5), abs=1e-6), name


def _updates(trainer: Any) -> list[dict[str, float]]:
    return [row for row in trainer.state.log_history if "loss/policy_avg" in row]


# -- what must hold, and does not in TRL 1.12: the rows of the README's table. Where a run of TRL's own trainer is
# -- cheap, the test shows that it fails.


def real_steps(trainer: Any, optimizer: Any) -> list[int]:
    """Train; returns the optimizer steps of each update."""
    counts: list[int] = [0]
    inner = getattr(optimizer, "optimizer", optimizer)
    inner.register_step_post_hook(lambda *_: counts.__setitem__(-1, counts[-1] + 1))

    class NewUpdate(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            counts.append(0)

    trainer.add_callback(NewUpdate)
    with quietly():
        trainer.train()
    return counts[:-1]


@pytest.mark.parametrize(
    ("options", "of_trl", "of_ours"),
    [
        ({"num_mini_batches": 4, "num_ppo_epochs": 4, "total_episodes": 8}, [4], [16]),
        ({"num_ppo_epochs": 1, "total_episodes": 32}, [1, 4, 1, 4], [1, 1, 1, 1]),
    ],
    ids=["every minibatch is a step", "at the end of the data, too"],
)
def test_an_update_has_as_many_optimizer_steps_as_minibatches(
    options: dict[str, int], of_trl: list[int], of_ours: list[int], tmp_path: Path
) -> None:
    """TRL takes a step only every so many micro-batches, and more at the end of a pass over the prompts."""
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4, **options}
    theirs = trl_trainer(tmp_path, parts(), **options)
    assert real_steps(theirs, theirs.optimizer) == of_trl
    ours = our_trainer(tmp_path, parts(), **options)
    ours.create_optimizer_and_scheduler(num_training_steps=len(of_ours))
    assert real_steps(ours, ours.optimizer) == of_ours


def test_an_answer_that_ends_at_once_has_numbers(tmp_path: Path) -> None:
    """Pad == EOS, and the response is EOS alone: the EOS is an action. TRL masks out all there is."""
    models = parts(same=True)
    others = [token for token in range(len(TOKENIZER)) if token != TOKENIZER.eos_token_id]
    models["model"].generation_config.suppress_tokens = others
    theirs = trl_trainer(tmp_path, models, stop_token="eos", total_episodes=8, tokenizer=PAD_IS_EOS)
    with quietly(), pytest.raises(ValueError, match="sum of the mask is zero"):
        theirs.train()
    words = TOKENIZER.convert_ids_to_tokens(others)
    options = {"stop_token": "eos", "total_episodes": 8, "suppress_tokens": words}
    ours = our_trainer(tmp_path, parts(same=True), tokenizer=PAD_IS_EOS, **options)
    ours.train()
    row = _updates(ours)[0]
    assert all(np.isfinite(value) for value in row.values() if isinstance(value, float))
    assert row["val/response_length"] == 1
    assert row["val/num_eos_tokens"] == 8


def test_an_eos_inside_a_prompt_is_no_padding(tmp_path: Path) -> None:
    """Pad == EOS, and prompts that hold one: log-probabilities are those of all tokens. TRL hides it."""
    policy = tiny_policy(TOKENIZER)
    tokens = torch.tensor([[5, 0, 9, 30, 31]])
    with torch.no_grad():
        expected = policy(tokens).logits[0, 2:-1].log_softmax(-1)
        hidden = trl_ppo.forward(policy, tokens, PAD_IS_EOS.pad_token_id).logits[0, 2:-1].log_softmax(-1)
    assert (hidden - expected).abs().max() > 0.1
    ours = our_trainer(tmp_path, parts(), [[5, 0, 9]] * 8, temperature=1.0, tokenizer=PAD_IS_EOS)
    batch = make_batch([[5, 0, 9]], [[30, 31]])
    with torch.no_grad():
        found = ours.model(batch, ours.sampling).log_probs[0]
    torch.testing.assert_close(found, expected[[0, 1], [30, 31]], rtol=1e-5, atol=1e-5)


def test_what_is_set_is_done(tmp_path: Path) -> None:
    """Norm limit, checkpointing, logging, saving, a callback's stop, `evaluate()`, resuming. TRL does none of it."""

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> Any:
            control.should_training_stop = state.global_step >= 3
            return control

    options = {"max_grad_norm": 1e-9, "adam_epsilon": 1.0, "logging_steps": 2, "save_strategy": "epoch",
               "total_episodes": 64, "num_ppo_epochs": 1, "gradient_checkpointing": True}  # fmt: skip

    def run(trainer: Any) -> tuple[float, bool, list[int], list[str]]:
        before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
        trainer.add_callback(Stop)
        with quietly():
            trainer.train()
        moved = max(float((p.detach() - before[n]).abs().max()) for n, p in trainer.model.named_parameters())
        checkpoints = any(getattr(module, "gradient_checkpointing", False) for module in trainer.model.policy.modules())
        steps = [row["step"] for row in _updates(trainer)]
        return moved, checkpoints, steps, [p.name for p in Path(trainer.args.output_dir).glob("checkpoint-*")]

    theirs = trl_trainer(tmp_path / "theirs", parts(), **options)
    moved, checkpoints, steps, saved = run(theirs)
    assert moved > 1e-8
    assert (checkpoints, len(steps), saved) == (False, 8, [])
    with pytest.raises(Exception, match=r"\w"), quietly():
        theirs.evaluate()
    with pytest.raises(TypeError):
        theirs.train(resume_from_checkpoint=True)
    with quietly():
        ours = our_trainer(tmp_path / "ours", parts(), **options)
    moved, *found = run(ours)
    assert moved < 1e-10
    assert found == [True, [2], ["checkpoint-2"]]
    assert ours.evaluate()["eval_length"] == 6


def test_gradient_checkpointing_changes_no_number(tmp_path: Path) -> None:
    found = []
    for checkpointed in (False, True):
        with quietly():
            ours = our_trainer(tmp_path, parts(), gradient_checkpointing=checkpointed, total_episodes=8)
        ours.train()
        found.append(weights(ours))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-6)


def test_the_seed_decides_the_minibatches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same seed gives the same minibatches, whatever was drawn before. TRL draws from NumPy's global state."""
    orders: list[list[int]] = []
    permutation = np.random.permutation
    monkeypatch.setattr(np.random, "permutation", lambda n: (orders.append(permutation(n).tolist()), orders[-1])[1])
    ours = []
    for seed in (1, 2):
        np.random.seed(seed)
        theirs = trl_trainer(tmp_path, parts(), total_episodes=8, num_ppo_epochs=1, seed=7)
        np.random.seed(seed)  # as a script's own use of NumPy would
        with quietly():
            theirs.train()
        np.random.seed(seed)
        trainer = our_trainer(tmp_path, parts(), total_episodes=8, num_mini_batches=4, seed=7)
        trainer.train()
        ours.append(weights(trainer))
    assert orders[0] != orders[1]
    assert torch.equal(ours[0], ours[1])


def test_padded_prompts_are_taken_for_what_they_are(tmp_path: Path) -> None:
    """Padding on either side is taken off; TRL takes right-padded prompts as they are, and its ratios are off."""
    plain = [[5, 9, 11], [7, 8]] * 4
    right = [[5, 9, 11, 1], [7, 8, 1, 1]] * 4
    left = [[1, 5, 9, 11], [1, 1, 7, 8]] * 4
    masked = Dataset.from_dict({"input_ids": right, "attention_mask": [[int(i != 1) for i in row] for row in right]})
    for data in (dataset(right), dataset(left), masked):
        args = PPOConfig(output_dir=str(tmp_path), **OPTIONS)
        ours = PPOTrainer(args, TOKENIZER, train_dataset=data, **parts())
        assert ours.prompts.ids == plain
    policy, tokens = tiny_policy(TOKENIZER), torch.tensor([[7, 8, 1, 1, 30, 31]])
    with torch.no_grad():
        theirs = trl_ppo.forward(policy, tokens, 1).logits[0, 3].log_softmax(-1)
        right_one = policy(torch.tensor([[7, 8]])).logits[0, -1].log_softmax(-1)
    assert (theirs - right_one).abs().max() > 0.1


def test_the_logged_numbers_are_those_of_one_distribution_and_of_the_reward_itself(tmp_path: Path) -> None:
    """TRL's rollout reads `generation_config`, its other passes do not; its scores hold the penalty of a missing EOS.

    Its speed is an integer, and it saves a policy without a stop token as one without EOS.
    """
    models = parts(same=True)
    banned = list(range(100, 290))
    for name in ("model", "ref_model"):
        models[name].generation_config.suppress_tokens = banned
    mine = copy.deepcopy(models)
    options = {"learning_rate": 0.0, "total_episodes": 8, "missing_eos_penalty": 50.0, "stop_token": "eos"}
    theirs = trl_trainer(tmp_path, models, **options)
    with quietly():
        theirs.train()
    row = _updates(theirs)[0]
    assert row["val/ratio"] < 0.9
    assert row["objective/kl"] > 1
    assert row["objective/scores"] < -20
    assert isinstance(row["eps"], int)
    words = TOKENIZER.convert_ids_to_tokens(banned)
    ours = our_trainer(tmp_path, mine, suppress_tokens=words, min_new_tokens=3, **options)
    ours.train()
    row = _updates(ours)[0]
    assert row["val/ratio"] == pytest.approx(1, abs=1e-6)
    assert row["objective/kl"] == 0
    assert abs(row["objective/scores"]) < 20
    assert row["objective/rlhf_reward"] < -20
    assert isinstance(row["eps"], float)
    for make, end in ((trl_trainer, None), (our_trainer, 0)):
        with quietly():
            make(tmp_path, parts()).save_model(str(tmp_path / "saved"))
        assert json.loads((tmp_path / "saved" / "generation_config.json").read_text()).get("eos_token_id") == end


def test_any_classifier_can_judge(tmp_path: Path) -> None:
    """A reward without `score` head. TRL fails."""
    config = DistilBertConfig(
        vocab_size=len(TOKENIZER), dim=32, hidden_dim=64, n_layers=1, n_heads=2, num_labels=1, pad_token_id=1
    )
    torch.manual_seed(0)
    bert = DistilBertForSequenceClassification(config)
    theirs = trl_trainer(tmp_path, {**parts(), "reward_model": bert}, total_episodes=8)
    with pytest.raises(AttributeError), quietly():
        theirs.train()
    ours = our_trainer(tmp_path, {**parts(), "reward_model": bert}, total_episodes=8)
    ours.train()
    with torch.no_grad():
        batch = ours.last_rollout.batch
        expected = bert(batch.tokens[:1, : int(batch.prompt_lengths[0] + batch.response_lengths[0])]).logits[0, 0]
    assert float(ours.last_rollout.scores[0]) == pytest.approx(float(expected), rel=1e-4, abs=1e-5)


def test_the_defaults_work_without_a_gpu_and_outputs_are_no_inputs(tmp_path: Path) -> None:
    """`PPOConfig()` alone works anywhere; a field that is computed cannot be set. TRL's raises, or overwrites."""
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="bf16"), quietly():
            TRLConfig(output_dir=str(tmp_path))
    assert PPOConfig(output_dir=str(tmp_path)).bf16 in (True, False)
    theirs = trl_trainer(tmp_path, parts(), batch_size=999)
    assert theirs.args.batch_size == 8
    with pytest.raises(Exception, match="batch_size cannot be set"):
        our_trainer(tmp_path, parts(), batch_size=999)
