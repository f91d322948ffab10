"""The pipeline in miniature, by the real command: what each stage leaves, and that doing it again does nothing."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from conftest import MINIATURE, CommandLine
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.runs.lineage import content_hash

STAGES = ("pretrain", "sft", "reward", "ppo", "evaluate")


def record(run: Path, stage: str) -> dict:
    return json.loads((run / stage / "run.json").read_text())


def test_every_stage_leaves_the_contracts_files(miniature: Path) -> None:
    for stage in STAGES:
        assert record(miniature, stage)["status"] == "done"
        names = {path.name for path in (miniature / stage).iterdir()}
        assert {"config.yaml", "run.json", "report.html"} <= names
        if stage != "evaluate":
            assert {"metrics.jsonl", "checkpoints", "model"} <= names
            assert (miniature / stage / "model" / "model.safetensors").exists()
        assert not [name for name in names if name.startswith(".")], "a temporary file was left"
    assert (miniature / "ppo" / "samples.jsonl").exists()
    assert (miniature / "evaluate" / "evaluation.json").exists()


def test_models_open_with_auto_classes(miniature: Path) -> None:
    for stage in ("pretrain", "sft", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(miniature / stage / "model")
        tokenizer = AutoTokenizer.from_pretrained(miniature / stage / "model")
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.decode(tokenizer("A film, from Oslo.")["input_ids"]) == "A film, from Oslo."
    classifier = AutoModelForSequenceClassification.from_pretrained(miniature / "reward" / "model")
    assert classifier.config.id2label == {0: "negative", 1: "positive"}


def test_training_lowers_the_loss(miniature: Path) -> None:
    losses = [row["loss"] for row in read_jsonl(miniature / "pretrain" / "metrics.jsonl") if "loss" in row]
    held_out = record(miniature, "pretrain")["results"]["eval_loss"]
    assert held_out < math.log(400)  # that of guessing
    results = record(miniature, "sft")["results"]
    assert results["eval_loss"] < results["eval_loss_before"]
    assert losses == sorted(losses, reverse=True) or losses[-1] < losses[0] or len(losses) < 2


def test_lineage_names_parents_by_content(miniature: Path) -> None:
    parents = record(miniature, "ppo")["parents"]
    assert parents["policy"]["path"] == "runs/demo/sft/model"
    assert parents["policy"]["sha256"] == content_hash(miniature / "sft" / "model")
    assert parents["reward"]["sha256"] == content_hash(miniature / "reward" / "model")
    data = [record(miniature, stage)["data"] for stage in STAGES]
    assert data[0]["sha256"] == data[2]["sha256"] == data[3]["sha256"] != data[1]["sha256"]  # sft has its own limit
    assert data[0]["train"] == 300


def test_the_evaluation_holds_what_the_table_shows(miniature: Path) -> None:
    evaluation = json.loads((miniature / "evaluate" / "evaluation.json").read_text())
    assert list(evaluation["metrics"]) == ["base", "sft", "ppo"]
    assert evaluation["reference"] == "sft"
    assert 0 < evaluation["prompts_in_training"] <= 24  # a few words of a grammar
    assert evaluation["metrics"]["sft"]["kl"] == pytest.approx(0, abs=1e-4)
    for name, row in evaluation["metrics"].items():
        rewards = [sample["rewards"][name] for sample in evaluation["samples"]]
        assert len(rewards) == evaluation["prompts"] == 24
        assert row["reward_mean"] == pytest.approx(sum(rewards) / 24)
        assert 0 <= row["positive"] <= 1
        assert row["perplexity"] > 1
        assert 0 < row["distinct_2"] <= 1
    gain = evaluation["paired_gain"]["ppo - sft"]
    assert gain["low"] <= gain["mean"] <= gain["high"]
    held_out = {sample["prompt"] for sample in evaluation["samples"]}
    assert len(held_out) > 12


def test_the_rewards_quality_is_of_held_out_rows(miniature: Path) -> None:
    quality = json.loads((miniature / "reward" / "quality.json").read_text())
    assert quality["rows"] == 300 == record(miniature, "reward")["data"]["test"]
    assert {"accuracy", "margin", "calibration_error", "length_correlation", "score_mean", "score_std"} <= set(quality)
    assert sum(row["count"] for row in quality["calibration"]) == 300


def test_ppo_logs_every_update_and_its_samples(miniature: Path) -> None:
    rows = read_jsonl(miniature / "ppo" / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    samples = read_jsonl(miniature / "ppo" / "samples.jsonl")
    assert len(samples) == 6 * 4
    assert {"step", "prompt", "response", "reward"} == set(samples[0])


def test_a_second_pipeline_finds_everything_done(
    run: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content_hash(run)
    assert command_line("stage=pipeline", *MINIATURE) == 0
    assert capsys.readouterr().out.count("is done already") == 5
    assert content_hash(run) == before


def test_other_settings_do_not_overwrite_a_run(
    run: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content_hash(run)
    assert command_line("stage=sft", "data.limit=100") == 2
    assert "data.limit is 200 there and 100 here" in capsys.readouterr().err
    assert content_hash(run) == before


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_the_same_command_gives_the_same_metrics_and_a_cut_off_run_resumes_to_them(
    stage: str, run: Path, workplace: Path, command_line: CommandLine
) -> None:
    folder = run / stage
    metrics = (folder / "metrics.jsonl").read_text().splitlines()
    expected = [{k: v for k, v in json.loads(line).items() if k != "seconds"} for line in metrics]
    weights = content_hash(folder / "model")

    # As a kill would leave it: between two checkpoints, the newest of them half-written, rows beyond it logged.
    shutil.rmtree(folder / "model")
    checkpoints = sorted(folder.glob("checkpoints/checkpoint-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    assert len(checkpoints) == 2
    (checkpoints[-1] / "complete").unlink()
    unfinished = json.loads((folder / "run.json").read_text())
    (folder / "run.json").write_text(json.dumps({**unfinished, "status": "running"}))
    threads = unfinished["hardware"]["threads"]
    torch.set_num_threads(threads + 1)  # with which sums would round otherwise
    assert command_line(f"stage={stage}", *(o for o in MINIATURE if stage in o or "stages" not in o)) == 0
    found = [{k: v for k, v in row.items() if k != "seconds"} for row in read_jsonl(folder / "metrics.jsonl")]
    assert found == expected
    assert content_hash(folder / "model") == weights
    assert record(run, stage)["resumed"]
    assert torch.get_num_threads() == threads

    # And from nothing.
    assert command_line(f"stage={stage}", "name=fresh", *source(stage), *MINIATURE) == 0
    fresh = read_jsonl(workplace / "runs" / "fresh" / stage / "metrics.jsonl")
    assert [{k: v for k, v in row.items() if k != "seconds"} for row in fresh] == expected


def source(stage: str) -> list[str]:
    """Where a run of another name finds what the demo's stage took."""
    policy = {"sft": "pretrain", "reward": "sft", "ppo": "sft"}.get(stage)
    given = [f"policy.path=runs/demo/{policy}"] if policy and stage != "reward" else []
    if stage == "reward":
        given.append("reward.path=runs/demo/sft")
    return [*given, "reward.path=runs/demo/reward"] if stage == "ppo" else given


def test_a_runs_config_can_be_run_again(miniature: Path, workplace: Path, command_line: CommandLine) -> None:
    config = miniature / "sft"
    args = ["--config-path", str(config), "--config-name", "config", "name=again", "data.limit=50"]
    assert command_line(*args, f"policy.path={miniature}/pretrain") == 0
    assert record(workplace / "runs" / "again", "sft")["data"]["train"] == 50


def test_a_missing_reward_names_the_stage_that_makes_it(
    workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("stage=ppo", "name=new") == 2
    assert "run stage=reward first" in capsys.readouterr().err
    assert command_line("stage=evaluate", "name=new") == 2
    assert "runs/new has no policy to evaluate; 'make ppo NAME=new' makes one" in capsys.readouterr().err


def test_an_evaluation_that_does_not_fit_the_positions_is_refused(
    run: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(run / "evaluate")
    args = [o for o in MINIATURE if "stages" not in o and "evaluate" not in o]
    assert command_line("stage=evaluate", "evaluate.response_length=100", *args) == 2
    assert "and the policy has 64 positions" in capsys.readouterr().err


def test_ppo_with_a_users_own_reward(miniature: Path, workplace: Path, command_line: CommandLine) -> None:
    (workplace / "mine.py").write_text(
        "def brevity(prompts, completions):\n    return [-float(len(text)) for text in completions]\n"
    )
    args = ["reward=python", "reward.path=mine.py:brevity", "experiment=demo", "name=brief", *MINIATURE[1:2]]
    args += ["data.limit=100", f"policy.path={miniature}/sft", "trainer.total_episodes=16"]
    args += ["trainer.per_device_train_batch_size=8", "trainer.gradient_accumulation_steps=1"]
    assert command_line("stage=ppo", *args) == 0
    rows = read_jsonl(workplace / "runs" / "brief" / "ppo" / "samples.jsonl")
    assert all(row["reward"] == -len(row["response"]) for row in rows)


def test_a_preference_model_is_trained_from_pairs(miniature: Path, workplace: Path, command_line: CommandLine) -> None:
    rows = [{"prompt": f"Question {i}:", "chosen": " yes, gladly and well", "rejected": " no"} for i in range(60)]
    (workplace / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    args = ["data=preferences", "data.path=pairs.jsonl", "data.test_share=0.3", "reward=preference_model", "name=pairs"]
    args += [f"policy.path={miniature}/sft", "trainer.learning_rate=1e-3", "trainer.num_train_epochs=10"]
    assert command_line("stage=reward", *args) == 0
    quality = json.loads((workplace / "runs" / "pairs" / "reward" / "quality.json").read_text())
    assert quality["accuracy"] == 1.0
    model = AutoModelForSequenceClassification.from_pretrained(workplace / "runs" / "pairs" / "reward" / "model")
    assert model.config.num_labels == 1
    with torch.no_grad():
        assert torch.isfinite(model(torch.tensor([[5, 6, 7]])).logits).all()


def test_texts_longer_than_the_positions_are_cut(miniature: Path, workplace: Path, command_line: CommandLine) -> None:
    (workplace / "long.jsonl").write_text(json.dumps({"prompt": "I saw", "completion": " a film" * 200}) + "\n")
    text = (workplace / "long.jsonl").read_text()
    (workplace / "long.jsonl").write_text("".join(text.replace("I saw", f"I saw {i}") for i in range(40)))
    args = ["data=instructions", "data.path=long.jsonl", "data.test_share=0.3", f"policy.path={miniature}/sft"]
    assert command_line("stage=sft", "name=long", *args) == 0
