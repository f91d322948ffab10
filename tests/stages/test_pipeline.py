"""The pipeline in miniature, by the real command: what each stage leaves, and that doing it again does nothing."""

from pathlib import Path

import pytest
import torch
from conftest import MINIATURE, CommandLine, cut_off, logged
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_pipeline.files import read_json, read_jsonl
from rlhf_pipeline.runs.lineage import content_hash


def test_models_open_with_auto_classes(miniature: Path) -> None:
    for stage in ("pretrain", "sft", "ppo"):
        model = AutoModelForCausalLM.from_pretrained(miniature / stage / "model")
        tokenizer = AutoTokenizer.from_pretrained(miniature / stage / "model")
        assert model.config.vocab_size == len(tokenizer)
        assert model.generation_config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id
        assert tokenizer.decode(tokenizer("A film, from Oslo.")["input_ids"]) == "A film, from Oslo."
    classifier = AutoModelForSequenceClassification.from_pretrained(miniature / "reward" / "model")
    assert classifier.config.id2label == {0: "negative", 1: "positive"}


def test_stages_record_what_they_were_made_of_and_what_they_did(miniature: Path) -> None:
    records = {path.parent.name: read_json(path) for path in miniature.glob("*/run.json")}
    parents, data = records["ppo"]["parents"], {stage: record["data"] for stage, record in records.items()}
    assert parents["policy"]["path"] == "runs/demo/sft/model"
    assert parents["policy"]["sha256"] == content_hash(miniature / "sft" / "model")
    assert parents["reward"]["sha256"] == content_hash(miniature / "reward" / "model")
    assert data["pretrain"]["sha256"] == data["reward"]["sha256"] == data["ppo"]["sha256"]
    assert data["pretrain"]["sha256"] != data["sft"]["sha256"]  # sft has its own limit
    assert data["pretrain"]["train"] == 300

    quality = read_json(miniature / "reward" / "quality.json")
    assert quality["rows"] == 300 == data["reward"]["test"]
    assert {"accuracy", "margin", "calibration_error", "length_correlation", "score_mean", "score_std"} <= set(quality)
    assert sum(row["count"] for row in quality["calibration"]) == 300

    rows = logged(miniature / "ppo")
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    samples = read_jsonl(miniature / "ppo" / "samples.jsonl")
    assert len(samples) == 6 * 4
    assert {"step", "prompt", "response", "reward"} == set(samples[0])


def test_what_is_done_is_neither_done_again_nor_overwritten(
    run: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert not [*run.glob("*/.*")], "a temporary file was left"
    before = content_hash(run)
    assert command_line("stage=pipeline", *MINIATURE) == 0
    assert capsys.readouterr().out.count("is done already") == 5
    assert command_line("stage=sft", "data.limit=100") == 2
    assert "data.limit is 200 there and 100 here" in capsys.readouterr().err
    assert content_hash(run) == before


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "ppo"])
def test_the_same_command_gives_the_same_metrics_and_a_cut_off_run_resumes_to_them(
    stage: str, run: Path, workplace: Path, command_line: CommandLine
) -> None:
    folder = run / stage
    expected, weights = logged(folder), content_hash(folder / "model")
    cut_off(folder)
    threads = read_json(folder / "run.json")["hardware"]["threads"]
    torch.set_num_threads(threads + 1)  # with which sums would round otherwise
    assert command_line(f"stage={stage}", *(o for o in MINIATURE if stage in o or "stages" not in o)) == 0
    assert logged(folder) == expected
    assert content_hash(folder / "model") == weights
    assert read_json(folder / "run.json")["resumed"]
    assert torch.get_num_threads() == threads

    # And from nothing, by the settings that were recorded, where the models lie that it took.
    recorded = ("--config-path", f"runs/demo/{stage}", "--config-name", "config")
    taken = {"sft": ["policy.path=runs/demo/pretrain"], "reward": ["reward.path=runs/demo/sft"],
             "ppo": ["policy.path=runs/demo/sft", "reward.path=runs/demo/reward"]}  # fmt: skip
    assert command_line(*recorded, "name=fresh", *taken.get(stage, [])) == 0
    assert logged(workplace / "runs" / "fresh" / stage) == expected
