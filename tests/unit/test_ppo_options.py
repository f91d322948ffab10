"""Each option of the PPO trainer does what it says."""

import dataclasses
import functools
import inspect
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tiny
import torch
import transformers.trainer_optimizer
from conftest import ROOT
from peft import get_peft_model
from tiny import (
    PROMPTS,
    first_experience,
    good_share,
    lora,
    stats_of_first_update,
    tiny_policy,
    tiny_tokenizer,
    weights,
)
from transformers import (
    AutoModelForCausalLM,
    EarlyStoppingCallback,
    GPT2ForSequenceClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_callback import DefaultFlowCallback

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models import precision
from rlhf_pipeline.models.sampling import Sampling, make_batch
from rlhf_pipeline.ppo import PPOConfig, PPOTrainer, config
from rlhf_pipeline.ppo.watch import CollapseWatch
from rlhf_pipeline.runs.checkpoints import newest_whole

TOKENIZER = tiny_tokenizer()
trainer = functools.partial(tiny.trainer, TOKENIZER)


# -- the critic


def test_a_separate_critic_starts_as_the_policys_trunk(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, critic="separate")
    critic = ppo.value_model
    assert isinstance(critic, GPT2ForSequenceClassification)
    assert torch.equal(critic.transformer.wte.weight, ppo.policy_model.transformer.wte.weight)
    assert critic.transformer.wte.weight is not ppo.policy_model.transformer.wte.weight
    assert not critic.score.weight.any()
    ppo.train()
    assert not torch.equal(critic.transformer.wte.weight, ppo.policy_model.transformer.wte.weight)
    ppo.save_model(str(tmp_path / "model"))
    saved = GPT2ForSequenceClassification.from_pretrained(tmp_path / "model" / "critic")
    assert torch.equal(saved.score.weight, critic.score.weight)


def test_the_critic_learns_to_foresee(tmp_path: Path) -> None:
    given = {"reward_model": lambda prompts, responses: [float(len(prompt) > 4) for prompt in prompts]}
    for critic in ("shared", "separate"):
        ppo = trainer(
            tmp_path / critic, given=given, critic=critic, total_episodes=8 * 40, learning_rate=1e-3,
            vf_coef=1.0, cliprange_value=10.0, kl_coef=0.0, cliprange=1e-9,
        )  # fmt: skip
        ppo.train()
        loss = [row["loss/value_avg"] for row in ppo.state.log_history]
        assert sum(loss[-5:]) < 0.5 * sum(loss[:5]), critic


def test_a_value_head_starts_at_the_mean_score(tmp_path: Path) -> None:
    """And the first advantages are taken from there."""
    given = {"reward_model": lambda prompts, responses: [5.0 + good for good in good_share(prompts, responses)]}
    ppo = trainer(tmp_path, given=given, missing_eos_penalty=2.0)
    experience = first_experience(ppo)
    mask = experience.rollout.batch.response_mask
    mean = float(experience.scores.mean())
    assert ppo.model.value_head.bias.item() == pytest.approx(mean)
    assert 3 < mean < 6
    torch.testing.assert_close(experience.rollout.values, mean * mask.float())
    again = ppo.model(experience.rollout.batch, ppo.sampling).values
    torch.testing.assert_close(again, experience.rollout.values)
    ends = torch.arange(8), experience.rollout.batch.response_lengths - 1
    torch.testing.assert_close(experience.rewards_to_go[ends], experience.scores)
    assert ppo._describe(experience)["val/explained_variance"] == pytest.approx(0, abs=1e-6)
    ppo._optimise(experience, 0)
    ppo.state.global_step = 1
    bias = ppo.model.value_head.bias.item()
    ppo._estimate(ppo._roll_out(1))
    assert ppo.model.value_head.bias.item() == bias, "only once"


@pytest.mark.parametrize(
    ("critic", "rate", "expected"),
    [("shared", None, 30e-3), ("shared", 5e-2, 5e-2), ("separate", None, 1e-3), ("separate", 5e-2, 5e-2)],
)
def test_the_critic_has_a_learning_rate_of_its_own(
    critic: str, rate: float | None, expected: float, tmp_path: Path
) -> None:
    ppo = trainer(
        tmp_path, critic=critic, critic_learning_rate=rate, learning_rate=1e-3, weight_decay=0.1,
        lr_scheduler_type="linear",
    )  # fmt: skip
    ppo.begin(None)
    names = {id(p): name for name, p in ppo.model.named_parameters()}
    rates, decays = {}, {}
    for group in ppo.optimizer.param_groups:
        for p in group["params"]:
            rates[names[id(p)]], decays[names[id(p)]] = group["lr"], group["weight_decay"]
    assert rates.keys() == set(names.values())
    for name, found in rates.items():
        assert found == pytest.approx(1e-3 if name.startswith("policy.") else expected), name
    assert decays["policy.transformer.h.0.attn.c_attn.weight"] == 0.1
    assert decays["policy.transformer.ln_f.bias"] == 0.0
    assert ppo.lr_scheduler.get_last_lr()[0] == pytest.approx(1e-3)


def test_the_critic_may_have_a_lambda_of_its_own(tmp_path: Path) -> None:
    """With 1 it learns the reward-to-go; the advantages keep `lam`."""

    def experience(**options: Any) -> Any:
        ppo = trainer(tmp_path, lam=0.5, **options)
        ppo.begin(None)
        with torch.no_grad():
            ppo.model.value_head.weight.normal_(generator=torch.Generator().manual_seed(0))
        return ppo._estimate(ppo._roll_out(0))

    plain, own = experience(), experience(critic_lam=1.0)
    mask = own.rollout.batch.response_mask
    torch.testing.assert_close(own.returns[mask], own.rewards_to_go[mask])
    assert not torch.allclose(plain.returns[mask], plain.rewards_to_go[mask])
    torch.testing.assert_close(plain.advantages, own.advantages)


# -- what has no effect is refused


def test_a_field_of_scripts_is_refused_on_the_command_line_alone(tmp_path: Path) -> None:
    args = PPOConfig(output_dir=str(tmp_path), dataset_num_proc=4, bf16=False)
    config.check_config(args)  # a script may read it itself
    with pytest.raises(UserError, match="dataset_num_proc has no effect"):
        config.check_config(args, script=False)


def test_every_field_has_an_effect_or_is_refused() -> None:
    """Each field of the configuration is read by us or by the part of transformers that runs, or stands in a list."""
    ours = "".join(path.read_text() for path in (ROOT / "rlhf_pipeline").rglob("*.py") if path.name != "config.py")
    ours += inspect.getsource(config.check_config) + inspect.getsource(config.make_sampling)
    ours += inspect.getsource(PPOConfig.group_size.fget) + inspect.getsource(PPOConfig.kl_in_loss.fget)
    run = (
        Trainer.__init__, Trainer.create_accelerator_and_postprocess, Trainer.create_optimizer,
        Trainer.get_optimizer_cls_and_kwargs, Trainer.create_scheduler, Trainer._determine_best_metric,
        Trainer.log, Trainer.push_to_hub, Trainer.init_hf_repo, Trainer.create_model_card, DefaultFlowCallback,
        TrainingArguments.__post_init__, TrainingArguments._setup_devices.func, transformers.integrations,
        TrainingArguments.get_process_log_level, TrainingArguments.get_warmup_steps, Trainer._build_accelerator_args,
        TrainingArguments.should_log.fget,
        transformers.integrations.integration_utils, transformers.trainer_optimizer,
    )  # fmt: skip
    theirs = "".join(inspect.getsource(part) for part in run)
    listed = {*config._UNREAD, *config._OF_SCRIPTS, *config._OUTPUTS}
    # No column is dropped, and callbacks' states come back, whatever these say; the third is mirrored in the older
    # name, and a launcher sets the last.
    listed |= {"remove_unused_columns", "restore_callback_states_from_checkpoint", "activation_checkpointing_kwargs"}
    listed |= {"local_rank"}
    names = {each.name for each in dataclasses.fields(PPOConfig)}
    read = {n for n in names for owner in ("args", "self") if f"{owner}.{n}" in ours or f"{owner}.{n}" in theirs}
    assert sorted(names - read - listed) == [], "these are read by nothing: refuse them, or carry them out"


# -- the objective


def test_an_entropy_bonus_keeps_the_policy_open(tmp_path: Path) -> None:
    found = []
    for coefficient in (0.5, 0.0):
        ppo = trainer(tmp_path, entropy_coef=coefficient, total_episodes=8 * 20, learning_rate=3e-3)
        ppo.train()
        found.append(ppo.state.log_history[-1]["policy/entropy_avg"])
    assert found[0] > found[1] + 0.3


def test_ptx_adds_its_gradient_and_no_more(tmp_path: Path) -> None:
    """-ptx_coef x mean log p a token, by autograd on the written-out loss."""
    texts = [[10, 11, 12], [20, 21, 22, 23, 24]]
    found = []
    for coefficient in (0.7, 0.0):
        ppo = trainer(
            tmp_path, torch.float64, {"ptx_dataset": texts}, ptx_coef=coefficient, ptx_batch_size=2,
            per_device_train_batch_size=1, gradient_accumulation_steps=8,
        )  # fmt: skip
        experience = first_experience(ppo)
        ppo._backward(experience, experience.rollout.batch, torch.arange(8), 0, 0)
        found.append(ppo.policy_model.transformer.wte.weight.grad.clone())
    ppo.model.zero_grad()
    total = torch.zeros((), dtype=torch.float64)
    for text in texts:
        ids = torch.tensor([text])
        every = ppo.policy_model(ids).logits[0, :-1].log_softmax(-1)
        total = total + every.gather(1, ids[0, 1:, None]).sum()
    (-0.7 * total / 6).backward()
    torch.testing.assert_close(found[0] - found[1], ppo.policy_model.transformer.wte.weight.grad, rtol=1e-7, atol=1e-9)


def test_scores_are_scaled_by_all_that_has_been_seen(tmp_path: Path) -> None:
    given = {"reward_model": lambda prompts, texts: [100 + 10 * score for score in good_share(prompts, texts)]}
    ppo = trainer(tmp_path, given=given, use_score_scaling=True, use_score_norm=True)
    ppo.begin(None)
    experiences = [ppo._estimate(ppo._roll_out(update)) for update in range(3)]
    numbers = torch.cat([each.rollout.scores for each in experiences]).double()
    assert ppo.moments.mean == pytest.approx(float(numbers.mean()))
    assert ppo.moments.deviation == pytest.approx(float(numbers.std()), rel=1e-6)
    last = (numbers[-8:] - numbers.mean()) / numbers.std()
    torch.testing.assert_close(experiences[-1].scores.double(), last, rtol=1e-4, atol=1e-4)


def test_an_update_stops_at_its_kl(tmp_path: Path) -> None:
    wild = {"learning_rate": 3e-2, "num_ppo_epochs": 8, "total_episodes": 8, "ratio_threshold": 1e9}
    free = stats_of_first_update(trainer(tmp_path, **wild))
    held = stats_of_first_update(trainer(tmp_path, max_update_kl=0.01, **wild))
    assert free["policy/optimizer_steps"] == 8
    assert held["policy/optimizer_steps"] < 8
    assert held["policy/approxkl_avg"] <= 0.01 < free["policy/approxkl_avg"]


# -- precision and memory


@pytest.mark.parametrize("asked", ["auto", True, False])
def test_bf16_is_chosen_and_starts_at_ratio_one(asked: bool | str, tmp_path: Path) -> None:
    ppo = trainer(tmp_path, bf16=asked, learning_rate=0.0)
    assert ppo.args.bf16 == (precision.native_bf16() if asked == "auto" else asked)
    assert ("bf16 with fp32" in ppo.args.precision_choice) == ppo.args.bf16
    stats = stats_of_first_update(ppo)
    assert stats["objective/kl"] == 0
    assert stats["val/ratio"] == pytest.approx(1, abs=0.05 if ppo.args.bf16 else 1e-6)
    assert {p.dtype for p in ppo.model.parameters()} == {torch.float32}
    assert {p.grad.dtype for p in ppo.model.parameters() if p.grad is not None} <= {torch.float32}


def test_weights_stored_in_bf16_are_trained_as_fp32(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ppo = trainer(tmp_path, torch.bfloat16)
    assert "trained as fp32" in capsys.readouterr().out
    assert {p.dtype for p in ppo.model.parameters()} == {torch.float32}
    assert stats_of_first_update(ppo)["objective/kl"] == 0


# -- LoRA


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_lora_trains_adapters_and_heads_alone_and_needs_no_second_copy(critic: str, tmp_path: Path) -> None:
    ppo = trainer(tmp_path, given={"peft_config": lora()}, critic=critic, save_steps=2)
    assert ppo.ref_model is None
    trained = {name for name, p in ppo.model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "value_head" in name or "score" in name for name in trained)
    for network in ("policy.", "value_model.") if critic == "separate" else ("policy.",):
        assert any(name.startswith(network) and "lora_" in name for name in trained)
    assert any("score" in name or "value_head" in name for name in trained)
    base = {n: p.detach().clone() for n, p in ppo.model.named_parameters() if n not in trained}
    ppo.train()
    first, *_, last = [row for row in ppo.state.log_history if "objective/kl" in row]
    assert first["objective/kl"] == 0
    assert abs(last["objective/kl"]) > 1e-4
    for name, p in ppo.model.named_parameters():
        assert name in trained or torch.equal(p, base[name]), name
    checkpoint = newest_whole(tmp_path)
    assert checkpoint is not None
    assert (checkpoint / "actor_critic.safetensors").stat().st_size < 0.5 * 4 * weights(ppo).numel()


@pytest.mark.parametrize("initialisation", ["pissa", False])
def test_an_adapter_that_moves_the_start_away_from_the_reference_is_refused(
    initialisation: str | bool, tmp_path: Path
) -> None:
    ppo = trainer(tmp_path, given={"peft_config": lora(init_lora_weights=initialisation)})
    with pytest.raises(UserError, match="init_lora_weights"):
        ppo.train()


@pytest.mark.parametrize("options", [{"init_lora_weights": "gaussian"}, {"use_dora": True}, {"use_rslora": True}])
def test_a_fresh_adapter_that_adds_nothing_is_checked_against_the_reference(
    options: dict[str, Any], tmp_path: Path
) -> None:
    ppo = trainer(tmp_path, given={"peft_config": lora(**options)})
    assert ppo.reference.same
    assert stats_of_first_update(ppo)["objective/kl"] == pytest.approx(0, abs=1e-4)


def test_lora_saves_its_adapter_or_a_model_that_stands_alone(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, given={"peft_config": lora()}, learning_rate=3e-3)
    ppo.train()
    ppo.save_model(str(tmp_path / "adapter"))
    assert (tmp_path / "adapter" / "adapter_config.json").exists()
    ppo.save_model(str(tmp_path / "merged"), merge=True)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    ids = torch.tensor([[5, 9, 11, 30]])
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, ppo.policy_model(ids).logits, rtol=1e-4, atol=1e-4)
        off = tiny_policy(TOKENIZER)(ids).logits
    assert (merged(ids).logits - off).abs().max() > 1e-2


# -- evaluation and callbacks


EVALUATED = {"eval_steps": 2, "total_episodes": 64, "save_steps": 2}


def test_an_evaluation_gives_the_same_numbers_each_time_however_it_is_cut(tmp_path: Path) -> None:
    rows = []
    for size in (1, 3, 8):
        ppo = trainer(
            tmp_path, given={"eval_dataset": PROMPTS * 2}, learning_rate=0.0, per_device_eval_batch_size=size,
            local_rollout_forward_batch_size=size, **EVALUATED,
        )  # fmt: skip
        ppo.train()
        rows += [row for row in ppo.state.log_history if "eval_reward" in row]
        assert len({(row["eval_reward"], row["eval_length"], row["eval_distinct_2"]) for row in rows[-4:]}) == 1
    assert [row["step"] for row in rows] == [2, 4, 6, 8] * 3
    for name in ("reward", "reward_stderr", "length", "distinct_2", "kl"):
        values = [row[f"eval_{name}"] for row in rows]
        assert values == pytest.approx([values[0]] * 12, rel=1e-5, abs=1e-6), name
    assert {row["eval_kl"] for row in rows} == {0.0}


@pytest.mark.parametrize(
    ("metric", "peft_config", "best"),
    [(None, None, 4), (None, lora(), 4), ("eval_reward", None, 8)],
    ids=["by score", "by score, an adapter", "by reward"],
)
def test_the_best_model_is_the_result(metric: str | None, peft_config: Any, best: int, tmp_path: Path) -> None:
    """Where the reward rises with the KL, the best by reward is the last; by reward - c x KL it is an earlier one."""
    measured = {2: (0.6, 1.0), 4: (0.9, 2.0), 6: (0.95, 9.0), 8: (0.96, 12.0)}
    seen: dict[int, torch.Tensor] = {}
    given = {"eval_dataset": PROMPTS, "peft_config": peft_config}
    ppo = trainer(
        tmp_path, given=given, learning_rate=3e-2, ratio_threshold=1e9, load_best_model_at_end=True,
        metric_for_best_model=metric, **EVALUATED,
    )  # fmt: skip

    def measure(_: object) -> dict[str, float]:
        step = ppo.state.global_step
        seen[step] = weights(ppo)
        reward, kl = measured[step]
        return {"score": reward - ppo.args.selection_kl_coef * kl, "reward": reward, "kl": kl}

    ppo.measure = measure
    ppo.train()
    assert ppo.state.best_global_step == best
    assert not torch.equal(seen[4], seen[8])
    assert torch.equal(weights(ppo), seen[best])
    assert (tmp_path / "best" / "value_head.safetensors").exists()


def test_callbacks_stop_training_and_keep_their_patience(tmp_path: Path) -> None:
    def build() -> PPOTrainer:
        patient = EarlyStoppingCallback(early_stopping_patience=2)
        given = {"eval_dataset": PROMPTS, "callbacks": [patient]}
        return trainer(tmp_path, given=given, learning_rate=0.0, load_best_model_at_end=True, **EVALUATED)

    ppo = build()
    ppo.train()
    assert ppo.state.global_step == 6, "best at 2, no better at 4 and 6"
    again = build()
    again.train(str(tmp_path / "checkpoint-4"))
    assert again.state.global_step == 6, "the patience was kept in the checkpoint"


# -- guards


def test_a_reward_that_is_no_number_stops_the_run(tmp_path: Path) -> None:
    calls: list[int] = []

    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        calls.append(1)
        return [float("nan") if len(calls) == 4 else 1.0] + [0.0] * (len(responses) - 1)

    ppo = trainer(tmp_path, given={"reward_model": reward}, save_steps=1)
    with pytest.raises(UserError, match=r"the reward of '.*' \(to '.*'\) is nan"):
        ppo.train()
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-3"
    assert all(p.isfinite().all() for p in ppo.model.parameters())


def test_numbers_that_are_none_stop_the_run(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, save_steps=1)
    backward = ppo._backward

    def spoiled(*given: Any) -> dict[str, torch.Tensor]:
        found = backward(*given)
        spoils = given[-2:] == (3, 1)  # update and step
        return {name: figure * float("nan") for name, figure in found.items()} if spoils else found

    ppo._backward = spoiled
    with pytest.raises(UserError, match=r"diverged in update 4: .* last good checkpoint is .*checkpoint-3"):
        ppo.train()


def test_a_ratio_that_runs_away_stops_the_run(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, learning_rate=1.0, num_ppo_epochs=4, ratio_threshold=2.0)
    with pytest.raises(UserError, match=r"diverged in update \d+: .*There is no checkpoint yet"):
        ppo.train()


def test_a_policy_that_disagrees_with_itself_is_named(tmp_path: Path) -> None:
    """The check of the first ratio, and what it says, for three ways in which it can be off."""

    class Added(torch.nn.Module):
        def __init__(self, inner: torch.nn.Module, change: Callable[[torch.nn.Module, torch.Tensor], torch.Tensor]):
            super().__init__()
            self.inner, self.change = inner, change

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            found = self.inner(x)
            return found + self.change(self, found)

    def noise(_: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        return 0.5 * torch.randn_like(x)

    for change, expected in (
        (noise, "draws at random in eval mode"),
        (lambda block, x: noise(block, x) if block.training else 0 * x, "training mode than in eval mode"),
        (lambda _, x: x.mean(0, keepdim=True), "depend on the other rows"),
    ):
        ppo = trainer(tmp_path, num_mini_batches=2)
        block = ppo.policy_model.transformer.h[0]
        block.mlp = Added(block.mlp, change)
        with pytest.raises(UserError, match=expected):
            ppo.train()


def test_the_collapse_watch_warns_once_of_a_collapse_and_never_of_a_healthy_run() -> None:
    watch = CollapseWatch(window=8)
    found: list[str] = []
    for update in range(24):
        varied = [f"word{i} and word{i + update} go on" for i in range(10)]
        answers, length = (varied, 10.0) if update < 6 else (["yes yes yes"] * 10, 1.0)
        figures, warnings = watch.update(answers, length, 3.0 * update, 1.0)
        found += warnings
    assert len(found) == 4
    for told in ("distinct bigrams fell", "given to more than one prompt", "responses shrank", "KL went from"):
        assert sum(told in warning for warning in found) == 1
    assert figures["watch/repeated"] == 1
    assert figures["watch/kl_slope"] == 3
    again = CollapseWatch(**json.loads(json.dumps(vars(watch))))
    assert again.update(["a b"], 1.0, 30.0, 1.0) == watch.update(["a b"], 1.0, 30.0, 1.0)
    healthy = CollapseWatch(window=8)
    for update in range(30):  # KL rises from 0 to 6 nats, as it does where a policy learns
        varied = [f"word{i} and word{i + update} go on" for i in range(10)]
        assert healthy.update(varied, 9.0, 6.0 * (1 - 0.8**update), 1.0)[1] == []


def test_each_warning_is_told_once_with_its_update(tmp_path: Path) -> None:
    given = {"reward_model": lambda prompts, completions: [0.0] * len(prompts)}
    ppo = trainer(tmp_path, given=given, total_episodes=56, logging_steps=3)
    told: list[tuple[int, str]] = []
    ppo.on_warning = lambda update, warning: told.append((update, warning))
    ppo.train()
    assert [(update, "all responses of 5 updates got the same reward" in said) for update, said in told] == [(5, True)]


# -- checkpoints


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": lambda folder: os.truncate(folder / "actor_critic.safetensors", 1000),
    "missing": lambda folder: (folder / "actor_critic.safetensors").unlink(),
    "unsealed": lambda folder: (folder / "complete").unlink(),
    "seal": lambda folder: (folder / "complete").write_text("{"),
}


@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
    how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = trainer(tmp_path, save_steps=2)
    whole.train()
    DAMAGE[how](tmp_path / "checkpoint-8")
    assert newest_whole(tmp_path) == tmp_path / "checkpoint-6"
    told = capsys.readouterr().out
    assert how == "unsealed" or "checkpoint-8 is damaged" in told
    again = trainer(tmp_path, save_steps=2)
    again.train(resume_from_checkpoint=True)
    assert torch.equal(weights(whole), weights(again))


def test_a_checkpoint_of_another_set_up_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, save_steps=4).train()
    with pytest.raises(UserError, match="another set-up"):
        trainer(tmp_path, critic="separate").train(True)
    shutil.rmtree(tmp_path)
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        trainer(tmp_path).train(True)


# -- as TRL's scripts use it


def test_completions_are_printed_without_their_control_codes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"total_episodes": 16, "num_sample_generations": 2, "per_device_eval_batch_size": 2}
    ppo = trainer(tmp_path, given={"eval_dataset": PROMPTS}, **options)
    ppo.train()
    assert capsys.readouterr().out.count("model response") == 2
    said = SimpleNamespace(prompts=["the film was"], responses=["\x1b[2Jgone"], scores=torch.zeros(1))
    ppo._answers = lambda *_: [said]
    ppo.generate_completions()
    told = capsys.readouterr().out
    assert "model response" in told
    assert "the film was" in told
    assert "gone" in told
    assert "\x1b[2J" not in told, "a policy's answer clears the terminal"


def test_the_configuration_is_read_from_a_scripts_arguments(tmp_path: Path) -> None:
    """TRL's own example begins so."""
    (config,) = HfArgumentParser(PPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--stop_token", "eos", "--stop_tokens", ".", "!", "--bf16", "False"]
    )
    assert config.stop_tokens == [".", "!"]
    assert not config.bf16


def test_a_trained_adapter_is_kept_near_its_base(tmp_path: Path) -> None:
    """A policy that comes with an adapter that is not 0 differs from its reference from the start, and may."""
    policy = get_peft_model(tiny_policy(TOKENIZER), lora())
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.fill_(0.01)
    assert stats_of_first_update(trainer(tmp_path, given={"model": policy}))["objective/kl"] != 0


def test_training_again_begins_anew(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, kl_target=1.0, total_episodes=16)
    ppo.train()
    ppo.train()
    assert [row["step"] for row in ppo.state.log_history] == [1, 2]
    assert [row["lr"] for row in ppo.state.log_history] == [1e-3, 5e-4]
    assert ppo.state.log_history[0]["objective/kl_coef"] == 0.05


def test_a_reward_of_too_few_numbers_is_refused(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, given={"reward_model": lambda prompts, responses: [0.0] * 3})
    with pytest.raises(UserError, match=r"gave \(3,\) numbers for 8 responses"):
        ppo.train()


def test_a_pass_that_is_not_full_ends_too(tmp_path: Path) -> None:
    trainer(tmp_path, total_episodes=24, save_strategy="epoch").train()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_the_values_are_not_rounded_to_bf16(tmp_path: Path) -> None:
    ppo = trainer(tmp_path, bf16=True)
    with torch.no_grad():
        ppo.model.value_head.bias.fill_(5.003)
        values = ppo.model(make_batch([[5, 9]], [[7]]), Sampling()).values
    assert float(values[0, 0]) == pytest.approx(5.003, abs=1e-5)
