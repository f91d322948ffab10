"""PPO's options from the command line, on the miniature run's models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MINIATURE, CommandLine, Refused
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rlhf_pipeline.data import count_known_prompts, load_data
from rlhf_pipeline.data.tokenization import Question
from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.ppo import PPOTrainer
from rlhf_pipeline.stages.ppo import hold_back

Begun = Callable[..., int]
TEXTS = "".join(f"a quiet film about the sea, number {number}\n" for number in range(40))


@pytest.fixture
def begun(miniature: Path, command_line: CommandLine, workplace: Path) -> Begun:
    """Run PPO from the miniature's policy and reward, under a name; returns the exit status."""

    def call(name: str, *more: str) -> int:
        small = [m for m in MINIATURE if "ppo" in m or "data" in m]
        given = [f"policy.path={miniature / 'sft'}", f"reward.path={miniature / 'reward'}", *small, *more]
        words = {word.partition("=")[0]: word for word in given}  # the later one, where a setting is there twice
        return command_line("stage=ppo", "experiment=demo", f"name={name}", *words.values())

    return call


def record_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def test_an_adapter_with_held_out_prompts_and_pretraining_texts(miniature: Path, begun: Begun) -> None:
    """LoRA, evaluation while training, the best model, PPO-ptx on texts of one's own: `model/` stands alone."""
    Path("texts.txt").write_text(TEXTS)
    status = begun(
        "adapter", "policy.lora.r=4", "policy.lora.target_modules=[c_attn]",
        "trainer.eval_steps=2", "trainer.eval_samples=6", "trainer.load_best_model_at_end=true",
        "trainer.ptx_coef=0.1", "trainer.learning_rate=1e-2", "trainer.num_mini_batches=1",
        "ptx.name=text", "ptx.path=texts.txt",
    )  # fmt: skip
    assert status == 0
    folder = Path("runs/adapter/ppo")
    rows = read_jsonl(folder / "metrics.jsonl")
    evaluated = {row["step"]: row for row in rows if "eval_score" in row}
    assert sorted(evaluated) == [2, 4, 6]
    for row in evaluated.values():
        assert row["eval_score"] == pytest.approx(row["eval_reward"] - 0.05 * row["eval_kl"])
    results = record_of(folder)["results"]
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


def test_other_pretraining_texts_are_other_work(begun: Begun, capsys: Any) -> None:
    """Whether they have another name, or the same name and other content."""
    for name in ("texts.txt", "other.txt"):
        Path(name).write_text(TEXTS)
    asked = ["ptx", "trainer.ptx_coef=0.1", "ptx.name=text"]
    assert begun(*asked, "ptx.path=texts.txt") == 0
    split = record_of(Path("runs/ptx/ppo"))["data"]["ptx"]
    assert split["train"] + split["test"] == 40
    assert begun(*asked, "ptx.path=other.txt") == 2
    assert "ptx.path is 'texts.txt' there and 'other.txt' here" in capsys.readouterr().err
    Path("texts.txt").write_text(TEXTS.replace("quiet", "loud"))
    assert begun(*asked, "ptx.path=texts.txt") == 2
    assert "texts.txt has changed since" in capsys.readouterr().err


def test_the_critic_starts_as_the_reward_model_of_the_run(miniature: Path, begun: Begun) -> None:
    """As a classifier by its logit: before the first step the value at the end is the score (InstructGPT, app. C.4)."""
    more = ("trainer.critic=separate", "trainer.critic_init=reward", "reward.scale=logit")
    assert begun("critic", *more, "trainer.critic_learning_rate=1e-9", "trainer.bf16=false") == 0
    critic = load_file("runs/critic/ppo/model/critic/model.safetensors")
    reward = load_file(miniature / "reward" / "model" / "model.safetensors")
    torch.testing.assert_close(critic["score.weight"], reward["score.weight"][1:2], rtol=0, atol=1e-6)
    trunk = "transformer.h.0.attn.c_attn.weight"
    torch.testing.assert_close(critic[trunk], reward[trunk], rtol=0, atol=1e-6)


def test_what_the_trainer_refuses_is_said_in_its_own_words(begun: Begun, capsys: Any) -> None:
    assert begun("refused", 'trainer.suppress_tokens=["[UNK]"]') == 2
    told = capsys.readouterr().err
    assert "trainer.suppress_tokens has '[UNK]'" in told
    assert "cannot be built" not in told


def test_policies_are_chosen_by_prompts_that_neither_ppo_nor_evaluate_uses(
    begun: Begun, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """And a run that was begun before there was a selection is not gone on with."""
    made: list[PPOTrainer] = []
    monkeypatch.setattr(
        "rlhf_pipeline.stages.ppo.PPOTrainer", lambda *a, **k: made.append(PPOTrainer(*a, **k)) or made[0]
    )
    asked = ("chosen", "trainer.selection_kl_coef=0.5", "trainer.eval_samples=20")
    assert begun(*asked) == 0
    (trainer,) = made
    assert trainer.eval_prompts is not None
    learnt, validation = ({tuple(ids) for ids in prompts.ids} for prompts in (trainer.prompts, trainer.eval_prompts))
    assert len(trainer.eval_prompts.ids) == 20
    assert not learnt & validation
    rows = load_data({"name": "toy_reviews", "limit": 300}, seed=0)
    texts = [trainer.processing_class.decode(ids) for ids in validation]
    assert count_known_prompts(texts, rows.train) == len(texts)  # cut from the training split
    record = record_of(Path("runs/chosen/ppo"))
    results = record["results"]
    assert record["objective"] == results["validation_score"]
    assert record["objective"] == pytest.approx(results["validation_reward"] - 0.5 * results["validation_kl"])
    path = Path("runs/chosen/ppo/config.yaml")
    path.write_text(path.read_text().replace("  selection_kl_coef: 0.5\n", ""))
    assert begun(*asked) == 2
    assert "trainer.selection_kl_coef is None there and 0.5 here" in capsys.readouterr().err


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


def test_without_validation_prompts_the_run_says_what_it_is_judged_by(begun: Begun, capsys: Any) -> None:
    asked = ["data.limit=16", "trainer.total_episodes=16"]
    assert begun("few", *asked) == 0
    assert "a batch of 16 takes all 16 prompts, so none are held back as validation prompts" in capsys.readouterr().out
    record = record_of(Path("runs/few/ppo"))
    assert record["objective"] == pytest.approx(record["results"]["scores"] - 0.05 * record["results"]["kl"])
    assert begun("none", *asked, "trainer.eval_steps=1") == 2
    assert "trainer.eval_strategy needs some: a batch of 16 takes all 16 prompts" in capsys.readouterr().err


def test_what_lora_does_not_take_is_refused(refused: Refused, workplace: Path) -> None:
    assert "there is no setting 'policy.lora.rank'" in refused("stage=ppo policy.lora.rank=4")
    assert "stages.ppo.policy.lora" in refused("stage=pretrain policy.lora.r=4")
    assert not (workplace / "runs").exists()
