"""PPO under DeepSpeed, in two processes on the CPU: what one process makes of the same batch, saved and resumed.

DeepSpeed is not among the development packages: pip install -e '.[gpu]'. It compiles an operation at its first start.
"""

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from test_ppo_invariance import HALF, OPTIONS, launch
from torch import Tensor

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed"),
]


def variables(stage: int) -> dict[str, str]:
    """What accelerate launch sets for ZeRO."""
    names = {"USE_DEEPSPEED": "true", "DEEPSPEED_ZERO_STAGE": str(stage), "DEEPSPEED_ZERO3_INIT": "false"}
    return {"DS_ACCELERATOR": "cpu", **{f"ACCELERATE_{name}": value for name, value in names.items()}}


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Of gradients that are rounding errors Adam makes steps, so each of the 12 steps may be a learning rate off."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=0, atol=1e-3, msg=name)
        assert float((one[name] - other[name]).abs().mean()) < 1e-5 or "c_attn.bias" in name, name


@pytest.mark.parametrize(("stage", "lora"), [(2, False), (3, False), (3, True)])
def test_shards_are_as_good_as_one_process(stage: int, lora: bool, tmp_path: Path) -> None:
    """The same metrics and weights; a checkpoint goes on in as many processes, in one, and from one of theirs."""
    asked: dict[str, Any] = {"ptx": True, "evaluate": True, "lora": lora, "dtype": "float32"}
    zero = {**asked, "options": HALF, "variables": variables(stage)}
    one, log_of_one = launch(tmp_path / "one", 1, options=OPTIONS, **asked)
    sharded, log = launch(tmp_path / "sharded", 2, **zero)
    close(one, sharded)
    assert len(log) == len(log_of_one) == 6
    for a, b in zip(log_of_one, log, strict=True):
        for name in a.keys() - {"eps"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), name
    checkpoint = "checkpoint-2"
    again, _ = launch(tmp_path / "again", 2, resume=str(tmp_path / "sharded" / checkpoint), **zero)
    close(sharded, again)
    alone, _ = launch(tmp_path / "alone", 1, options=OPTIONS, resume=str(tmp_path / "sharded" / checkpoint), **asked)
    close(sharded, alone)
    other, _ = launch(tmp_path / "other", 2, resume=str(tmp_path / "one" / checkpoint), **zero)
    close(sharded, other)


def test_the_best_weights_come_back_into_shards(tmp_path: Path) -> None:
    asked: dict[str, Any] = {"evaluate": True, "dtype": "float32"}
    best = {"load_best_model_at_end": True, "ptx_coef": 0.0, "total_episodes": 16, "seed": 3}
    one, log = launch(tmp_path / "one", 1, options={**OPTIONS, **best}, **asked)
    scores = [row["eval_score"] for row in log if "eval_score" in row]
    assert scores.index(max(scores)) < len(scores) - 1  # or the last would do
    sharded, _ = launch(tmp_path / "sharded", 2, options={**HALF, **best}, variables=variables(3), **asked)
    close(one, sharded)
