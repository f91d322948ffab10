"""PPO's options from the command line, on the miniature run's models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MINIATURE, CommandLine
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_pipeline.data import count_known_prompts, load_data
from rlhf_pipeline.data.tokenization import Question
from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.ppo import PPOTrainer
from rlhf_pipeline.stages.ppo import hold_back


def ppo(command_line: CommandLine, miniature: Path, name: str, *more: str) -> Path:
    """A PPO run of its own, from the miniature's policy and reward."""
    small = [m for m in MINIATURE if "ppo" in m or "data" in m]
    asked = {word.partition("=")[0]: word for word in (*small, *more)}  # the later one, where a setting is there twice
    status = command_line(
        "stage=ppo", "experiment=demo", f"name={name}", f"policy.path={miniature / 'sft'}",
        f"reward.path={miniature / 'reward'}", *asked.values(),
    )  # fmt: skip
    assert status == 0
    return Path("runs") / name / "ppo"


def test_an_adapter_with_held_out_prompts_and_pretraining_texts(
    miniature: Path, command_line: CommandLine, workplace: Path
) -> None:
    """LoRA, evaluation while training, the best model, PPO-ptx on texts of one's own: `model/` stands alone."""
    lines = [f"a quiet film about the sea, number {number}\n" for number in range(40)]
    (workplace / "texts.txt").write_text("".join(lines))
    folder = ppo(
        command_line, miniature, "adapter", "policy.lora.r=4", "policy.lora.target_modules=[c_attn]",
        "trainer.eval_steps=2", "trainer.eval_samples=6", "trainer.load_best_model_at_end=true",
        "trainer.ptx_coef=0.1", "trainer.learning_rate=1e-2", "trainer.num_mini_batches=1",
        "ptx.name=text", "ptx.path=texts.txt",
    )  # fmt: skip
    rows = read_jsonl(folder / "metrics.jsonl")
    evaluated = {row["step"]: row for row in rows if "eval_score" in row}
    assert sorted(evaluated) == [2, 4, 6]
    for row in evaluated.values():
        assert row["eval_score"] == pytest.approx(row["eval_reward"] - 0.05 * row["eval_kl"])
    results = json.loads((folder / "run.json").read_text())["results"]
    assert results["best_eval_score"] == max(row["eval_score"] for row in evaluated.values())
    assert results["validation_score"] == pytest.approx(results["best_eval_score"])  # the best model is the result
    held = load_file(folder / "model" / "model.safetensors")
    before = load_file(miniature / "sft" / "model" / "model.safetensors")
    assert held.keys() == before.keys()
    changed = {name for name in held if not torch.equal(held[name], before[name])}
    assert changed == {name for name in held if "attn.c_attn.weight" in name}
    assert (folder / "model" / "value_head.safetensors").exists()
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    assert model.generation_config.eos_token_id == 0
    assert model.generation_config.do_sample


def test_other_pretraining_texts_are_other_work(
    miniature: Path, command_line: CommandLine, workplace: Path, capsys: Any
) -> None:
    """Whether they have another name, or the same name and other content."""
    texts = workplace / "texts.txt"
    texts.write_text("".join(f"a quiet film about the sea, number {number}\n" for number in range(40)))
    (workplace / "other.txt").write_text(texts.read_text())
    asked = [
        "stage=ppo", "experiment=demo", "name=ptx", f"policy.path={miniature / 'sft'}",
        f"reward.path={miniature / 'reward'}", *(m for m in MINIATURE if "ppo" in m or "data" in m),
        "trainer.ptx_coef=0.1", "ptx.name=text",
    ]  # fmt: skip
    assert command_line(*asked, "ptx.path=texts.txt") == 0
    record = json.loads(Path("runs/ptx/ppo/run.json").read_text())
    assert record["data"]["ptx"]["train"] + record["data"]["ptx"]["test"] == 40
    assert command_line(*asked, "ptx.path=other.txt") == 2
    assert "ptx.path is 'texts.txt' there and 'other.txt' here" in capsys.readouterr().err
    texts.write_text(texts.read_text().replace("quiet", "loud"))
    assert command_line(*asked, "ptx.path=texts.txt") == 2
    assert "texts.txt has changed since" in capsys.readouterr().err


def test_the_critic_starts_as_the_reward_model_of_the_run(
    miniature: Path, command_line: CommandLine, workplace: Path, capsys: Any
) -> None:
    """As a classifier by its logit: before the first step the value at the end is the score (InstructGPT, app. C.4)."""
    more = ("trainer.critic=separate", "trainer.critic_init=reward", "reward.scale=logit")
    folder = ppo(command_line, miniature, "critic", *more, "trainer.critic_learning_rate=1e-9", "trainer.bf16=false")
    critic = load_file(folder / "model" / "critic" / "model.safetensors")
    reward = load_file(miniature / "reward" / "model" / "model.safetensors")
    torch.testing.assert_close(critic["score.weight"], reward["score.weight"][1:2], rtol=0, atol=1e-6)
    trunk = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(critic[trunk], reward[trunk], rtol=0, atol=1e-6)
    assert command_line(
        "stage=ppo", "experiment=demo", "name=refused", f"policy.path={miniature / 'sft'}", "reward=length",
        *more[:2], *(m for m in MINIATURE if "ppo" in m or "data" in m),
    ) == 2  # fmt: skip
    assert "trainer.critic_init=reward needs a reward model" in capsys.readouterr().err


def test_policies_are_chosen_by_prompts_that_neither_ppo_nor_evaluate_uses(
    miniature: Path, command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[PPOTrainer] = []
    monkeypatch.setattr(
        "rlhf_pipeline.stages.ppo.PPOTrainer", lambda *a, **k: made.append(PPOTrainer(*a, **k)) or made[0]
    )
    folder = ppo(command_line, miniature, "chosen", "trainer.selection_kl_coef=0.5", "trainer.eval_samples=20")
    (trainer,) = made
    assert trainer.eval_prompts is not None
    learnt, validation = ({tuple(ids) for ids in prompts.ids} for prompts in (trainer.prompts, trainer.eval_prompts))
    assert len(trainer.eval_prompts.ids) == 20
    assert not learnt & validation
    rows = load_data({"name": "toy_reviews", "limit": 300}, seed=0)
    texts = [trainer.processing_class.decode(ids) for ids in validation]
    assert count_known_prompts(texts, rows.train) == len(texts)  # cut from the training split
    record = json.loads((folder / "run.json").read_text())
    results = record["results"]
    assert record["objective"] == results["validation_score"]
    assert record["objective"] == pytest.approx(results["validation_reward"] - 0.5 * results["validation_kl"])


def test_validation_prompts_are_held_back_from_training() -> None:
    asked = [Question("", [n % 50, 7]) for n in range(1000)]  # 50 prompts, each 20 times
    learnt, validation = hold_back(asked, 60, 900, seed=0)
    assert len(validation) == 60
    assert len(learnt) == 940
    assert not {tuple(q.ids) for q in learnt} & {tuple(q.ids) for q in validation}
    assert hold_back(asked, 60, 900, seed=0) == (learnt, validation)
    assert hold_back(asked, 60, 900, seed=1)[1] != validation
    assert len(hold_back(asked, None, 900, seed=0)[1]) == 100  # a tenth
    assert len(hold_back(asked, 5, 900, seed=0)[1]) == 20  # a prompt is on one side
    assert hold_back(asked, 60, 19, seed=0) == (asked, [])  # the others would not fill a batch
    assert hold_back([Question("", [n]) for n in range(3)], 60, 1, seed=0)[1]
    assert hold_back(asked[:1] * 9, 60, 8, seed=0) == (asked[:1] * 9, [])


def test_without_validation_prompts_the_run_says_what_it_is_judged_by(
    miniature: Path, command_line: CommandLine, workplace: Path, capsys: Any
) -> None:
    asked = ["data.limit=16", "trainer.total_episodes=16"]
    folder = ppo(command_line, miniature, "few", *asked)
    assert "a batch of 16 takes all 16 prompts, so none are held back as validation prompts" in capsys.readouterr().out
    record = json.loads((folder / "run.json").read_text())
    assert record["objective"] == pytest.approx(record["results"]["scores"] - 0.05 * record["results"]["kl"])
    given = [f"policy.path={miniature / 'sft'}", f"reward.path={miniature / 'reward'}", *MINIATURE[1:]]
    assert command_line("stage=ppo", "experiment=demo", "name=none", *given, *asked, "trainer.eval_steps=1") == 2
    assert "trainer.eval_strategy needs some: a batch of 16 takes all 16 prompts" in capsys.readouterr().err


def test_a_run_that_was_begun_before_its_selection_is_not_gone_on_with(
    miniature: Path, command_line: CommandLine, workplace: Path, capsys: Any
) -> None:
    folder = ppo(command_line, miniature, "before")
    path = folder / "config.yaml"
    path.write_text(path.read_text().replace("  selection_kl_coef: 0.05\n", ""))
    given = [f"policy.path={miniature / 'sft'}", f"reward.path={miniature / 'reward'}"]
    assert command_line("stage=ppo", "experiment=demo", "name=before", *given, *MINIATURE) == 2
    assert "trainer.selection_kl_coef is None there and 0.05 here" in capsys.readouterr().err


def test_sft_trains_an_adapter_too(miniature: Path, command_line: CommandLine, workplace: Path) -> None:
    """Its model stands alone: the adapter is merged, and nothing else has changed."""
    asked = ["stage=sft", "experiment=demo", "name=adapter", f"policy.path={miniature / 'pretrain'}"]
    lora = ["policy.lora.r=4", "policy.lora.target_modules=[c_attn]", "trainer.learning_rate=1e-2"]
    assert command_line(*asked, *lora, "data.limit=200", "trainer.save_steps=2") == 0
    held = load_file(Path("runs/adapter/sft/model/model.safetensors"))
    before = load_file(miniature / "pretrain" / "model" / "model.safetensors")
    assert held.keys() == before.keys()
    changed = {name for name in held if not torch.equal(held[name], before[name])}
    assert changed == {name for name in held if "attn.c_attn.weight" in name}
    results = json.loads(Path("runs/adapter/sft/run.json").read_text())["results"]
    assert results["eval_loss"] < results["eval_loss_before"]


def test_what_lora_does_not_take_is_refused(command_line: CommandLine, workplace: Path, capsys: Any) -> None:
    assert command_line("stage=ppo", "policy.lora.rank=4") == 2
    assert "there is no setting 'policy.lora.rank'" in capsys.readouterr().err
    assert command_line("stage=pretrain", "policy.lora.r=4") == 2
    assert "stages.ppo.policy.lora" in capsys.readouterr().err
    assert not (workplace / "runs").exists()
