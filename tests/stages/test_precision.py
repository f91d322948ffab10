"""bf16 in every stage: as on a machine that multiplies it natively, here emulated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine
from safetensors.torch import load_file

from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.models import precision
from rlhf_pipeline.models.precision import store_in_bf16

STAGES = ("pretrain", "sft", "reward", "ppo")
# Two steps a stage: emulated products are slow.
SHORT = (
    "experiment=demo", "data.limit=60", "data.test_limit=8", "++stages.sft.data.limit=60", "policy.vocabulary=400",
    *(f"++stages.{stage}.trainer.max_steps=2" for stage in STAGES[:3]),
    *(f"++stages.{stage}.trainer.per_device_train_batch_size=4" for stage in STAGES[:3]),
    "++stages.ppo.trainer.total_episodes=16", "++stages.ppo.trainer.per_device_train_batch_size=8",
    "++stages.ppo.trainer.gradient_accumulation_steps=1", "++stages.ppo.trainer.response_length=8",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Path:
    """Runs called fp32 and bf16: of a machine without native bf16 and of one that has it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("precision"))
        for name in ("fp32", "bf16"):
            patch.setattr(precision, "native_bf16", lambda name=name: name == "bf16")
            for stage in STAGES:
                assert command_line(f"stage={stage}", f"name={name}", *SHORT) == 0
        return Path("runs").absolute()


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_computes_in_bf16_where_it_is_native(stage: str, runs: Path) -> None:
    """The weights stay fp32, and what is learnt differs from the fp32 run's by little."""
    exact, weights = (load_file(runs / name / stage / "model" / "model.safetensors") for name in ("fp32", "bf16"))
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    assert any(not torch.equal(weights[name], exact[name]) for name in weights), "was not in bf16"
    if stage == "ppo":
        assert read_jsonl(runs / "bf16" / "ppo" / "metrics.jsonl")[0]["objective/kl"] == 0
    if stage in ("pretrain", "sft"):
        records = [json.loads((runs / name / stage / "run.json").read_text()) for name in ("fp32", "bf16")]
        losses = [record["results"]["eval_loss"] for record in records]
        assert losses[1] == pytest.approx(losses[0], rel=0.02)


def test_an_adapter_on_frozen_weights_in_bf16_learns_as_on_whole_ones(
    runs: Path, command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And SFT merges it into all their digits: its model stands alone, and nothing else has changed."""
    base = runs / "fp32" / "pretrain" / "model"
    asked = [
        "stage=sft", "experiment=demo", f"policy.path={base}", "data.limit=20", "data.test_limit=4",
        "policy.lora.r=4", "policy.lora.target_modules=[c_attn]", "trainer.learning_rate=1e-2", "trainer.max_steps=2",
        "trainer.per_device_train_batch_size=4", "trainer.bf16=true",
    ]  # fmt: skip
    stored: list[int] = []

    def store(model: Any) -> None:
        store_in_bf16(model)
        stored.append(sum(p.dtype == torch.bfloat16 for p in model.parameters()))

    monkeypatch.setattr("rlhf_pipeline.stages.sft.store_in_bf16", store)
    assert command_line(*asked, "name=half") == 0
    assert stored == [32]  # weights and biases of four matrices in each of four layers
    monkeypatch.setattr("rlhf_pipeline.stages.sft.store_in_bf16", lambda model: None)
    assert command_line(*asked, "name=whole") == 0
    half, whole = (load_file(f"runs/{name}/sft/model/model.safetensors") for name in ("half", "whole"))
    before = load_file(base / "model.safetensors")
    assert half.keys() == before.keys()
    changed = {name for name in half if not torch.equal(half[name], before[name])}
    assert changed == {name for name in half if "attn.c_attn.weight" in name}
    results = json.loads(Path("runs/half/sft/run.json").read_text())["results"]
    assert results["eval_loss"] < results["eval_loss_before"]
    for name, tensor in half.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole[name]), name
