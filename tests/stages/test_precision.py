"""bf16 in every stage: as on a machine that multiplies it natively, here emulated."""

import json
from pathlib import Path

import pytest
import torch
from conftest import MINIATURE, CommandLine
from safetensors.torch import load_file

from rlhf_pipeline import precision
from rlhf_pipeline.atomic import read_jsonl


def test_every_stage_computes_in_bf16_where_it_is_native(
    miniature: Path, command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The weights stay fp32, and what is learnt differs from the fp32 run's by little."""
    monkeypatch.setattr(precision, "native_bf16", lambda: True)
    assert command_line("stage=pipeline", *MINIATURE) == 0
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
