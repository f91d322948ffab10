"""bf16 in every stage: as on a machine that multiplies it natively, here emulated."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MINIATURE, CommandLine
from safetensors.torch import load_file

from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.models import precision
from rlhf_pipeline.models.precision import store_in_bf16


def test_every_stage_computes_in_bf16_where_it_is_native(
    miniature: Path, command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The weights stay fp32, and what is learnt differs from the fp32 run's by little."""
    monkeypatch.setattr(precision, "native_bf16", lambda: True)
    words = [word for word in MINIATURE if "bf16" not in word and "total_episodes" not in word]
    words.append("++stages.ppo.trainer.total_episodes=16")  # two updates: emulated products are slow
    for stage in ("pretrain", "sft", "reward", "ppo"):
        assert command_line(f"stage={stage}", *words) == 0
    assert capsys.readouterr().out.count("computing in bf16 with fp32 master weights") == 4
    mine = Path("runs/demo")
    for stage in ("pretrain", "sft", "reward", "ppo"):
        weights = load_file(mine / stage / "model" / "model.safetensors")
        exact = load_file(miniature / stage / "model" / "model.safetensors")
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
        assert any(not torch.equal(weights[name], exact[name]) for name in weights), f"{stage} was not in bf16"
    losses = [json.loads((run / "sft" / "run.json").read_text())["results"]["eval_loss"] for run in (mine, miniature)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    first = read_jsonl(mine / "ppo" / "metrics.jsonl")[0]
    assert first["objective/kl"] == 0


def test_an_adapter_on_frozen_weights_in_bf16_learns_as_on_whole_ones(
    miniature: Path, command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And SFT merges it into all their digits."""
    asked = [
        "stage=sft", "experiment=demo", f"policy.path={miniature / 'pretrain'}", "data.limit=40", "trainer.bf16=true",
        "policy.lora.r=4", "policy.lora.target_modules=[c_attn]", "trainer.learning_rate=1e-2", "trainer.max_steps=2",
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
    base = load_file(miniature / "pretrain" / "model" / "model.safetensors")
    assert any(not torch.equal(half[name], base[name]) for name in base)
    for name, tensor in half.items():
        assert tensor.dtype == torch.float32
        assert torch.equal(tensor, whole[name]), name
