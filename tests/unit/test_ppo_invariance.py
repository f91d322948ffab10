"""What must change nothing: how a batch is cut into micro-batches, padded, or shared out over processes."""

import functools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from conftest import ROOT
from launched import environment, torchrun
from tiny import stats_of_first_update, tiny_tokenizer
from torch import Tensor

TOKENIZER = tiny_tokenizer()
trainer = functools.partial(tiny.trainer, TOKENIZER)


def gradients(folder: Path, **options: Any) -> tuple[list[Tensor], dict[str, float]]:
    """The gradient of each optimizer step of one update in float64, and its statistics.

    Responses are of unequal lengths, and all terms of the loss are on.
    """
    given = {"ptx_dataset": [[i, i + 1, i + 2, i + 3][: 2 + i % 3] for i in range(2, 40)]}
    same = {"min_response_length": 2, "ptx_coef": 0.3, "entropy_coef": 0.1, "max_grad_norm": 0, "kl_coef": 0.2}
    ppo = trainer(folder, torch.float64, given, **{**same, **options})
    ppo.create_optimizer_and_scheduler(num_training_steps=8)
    found: list[Tensor] = []

    def note(*_: Any) -> None:
        found.append(torch.cat([p.grad.flatten() for p in ppo.model.parameters() if p.grad is not None]))

    ppo.optimizer.register_step_pre_hook(note)
    return found, stats_of_first_update(ppo)


CUTS = [
    {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 8},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4},
    {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "local_rollout_forward_batch_size": 3},
]


@pytest.mark.parametrize(
    ("minibatches", "advantage"), [(1, "gae"), (2, "gae"), (2, "rloo"), (2, "grpo"), (1, "dr_grpo")]
)
def test_how_a_batch_is_cut_changes_nothing(minibatches: int, advantage: str, tmp_path: Path) -> None:
    """Batch 1 x accumulation 8 is batch 8, also where the rows' lengths differ and there are several minibatches."""
    whole, stats = gradients(tmp_path, num_mini_batches=minibatches, advantage=advantage)
    assert min(float(gradient.norm()) for gradient in whole) > 1e-3
    for cut in CUTS:
        parts, others = gradients(tmp_path, num_mini_batches=minibatches, advantage=advantage, **cut)
        assert len(whole) == len(parts) == 2 * minibatches
        for a, b in zip(whole, parts, strict=True):
            assert float((a - b).norm() / a.norm()) < 1e-9, cut
        for name, value in stats.items():
            assert others[name] == pytest.approx(value, rel=1e-6, abs=1e-9), (cut, name)


OPTIONS: dict[str, Any] = {
    "total_episodes": 24, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "num_mini_batches": 2,
    "min_response_length": 2, "ptx_coef": 0.2, "kl_target": 1.0, "eval_steps": 1, "save_steps": 2,
    "use_score_scaling": True, "max_grad_norm": 0.5,
}  # fmt: skip
HALF = {**OPTIONS, "gradient_accumulation_steps": 1}  # for each of two processes


def launch(
    folder: Path, processes: int, variables: dict[str, str] | None = None, **asked: Any
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Train in so many processes; the weights and the log."""
    folder.mkdir(parents=True, exist_ok=True)
    told = [str(ROOT / "tests" / "two_processes.py"), json.dumps({"folder": str(folder), **asked})]
    command = torchrun(processes, *told) if processes > 1 else [sys.executable, *told]
    mine = environment() | (variables or {})
    done = subprocess.run(command, env=mine, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return torch.load(folder / "weights.pt"), json.loads((folder / "log.json").read_text())


@pytest.mark.parametrize(("lora", "advantage"), [(False, "gae"), (True, "gae"), (False, "rloo"), (True, "grpo")])
def test_two_processes_are_as_good_as_one(lora: bool, advantage: str, tmp_path: Path) -> None:
    """The same global batch; ptx, minibatches, held-out prompts that do not divide by two; saved and resumed."""
    options, shared = ({**each, "advantage": advantage} for each in (OPTIONS, HALF))
    asked: dict[str, Any] = {"ptx": True, "evaluate": True, "lora": lora}
    one, log_of_one = launch(tmp_path / "one", 1, options=options, **asked)
    two, log_of_two = launch(tmp_path / "two", 2, options=shared, **asked)
    assert one.keys() == two.keys()
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-6, atol=1e-8, msg=name)
    assert len(log_of_one) == len(log_of_two) == 6
    for a, b in zip(log_of_one, log_of_two, strict=True):
        for name in a.keys() - {"eps"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5, abs=1e-7), name
    checkpoint = tmp_path / "two" / "checkpoint-2"
    assert (tmp_path / "two" / "model" / "value_head.safetensors").exists() == (advantage == "gae")
    for processes, options_again in ((2, shared), (1, options)) if not lora else ((2, shared),):
        again, _ = launch(
            tmp_path / f"again{processes}", processes, options=options_again, resume=str(checkpoint), **asked
        )
        for name in two:
            torch.testing.assert_close(again[name], two[name], rtol=1e-6, atol=1e-8, msg=name)
            assert processes == 1 or torch.equal(again[name], two[name])
