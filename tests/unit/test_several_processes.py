"""What must change nothing: for how many processes a step's rows are cut, and into how many micro-batches."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.commands.config.config_args import load_config_from_file
from conftest import ROOT, Refused
from launched import environment, run, torchrun
from tiny import tiny_tokenizer, trainer
from torch.utils.data import SequentialSampler
from two_trainers import KINDS, results

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.processes import check_launch, checkpoints_of, same_step
from rlhf_pipeline.training.batching import RankBatchSampler


@pytest.mark.parametrize("rows", [1, 7, 8, 9, 31])
@pytest.mark.parametrize("processes", [2, 3, 5])
def test_each_row_goes_to_one_process(rows: int, processes: int) -> None:
    """In as many steps as one process takes, whose rows they are."""
    shares = [RankBatchSampler(SequentialSampler(range(rows)), 8, False, rank, processes) for rank in range(processes)]
    steps = list(zip(*shares, strict=True))
    assert len(steps) == len(shares[0]) == -(-rows // 8)
    for number, step in enumerate(steps):
        assert sorted(row for own in step for row in own) == list(range(rows))[8 * number : 8 * number + 8]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What each trainer comes to in one process, whole steps at once."""
    return results(tmp_path_factory.mktemp("one"), 1)


@pytest.fixture(scope="module")
def others(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, dict[str, Any]]]:
    """The same in two processes, and in one by micro-batches."""
    folder = tmp_path_factory.mktemp("two")
    done = run(torchrun(2, str(ROOT / "tests" / "two_trainers.py"), str(folder)))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return {"processes": torch.load(folder / "results.pt"), "micro-batches": results(folder, 1, accumulated=2)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["processes", "micro-batches"])
def test_how_a_step_is_cut_changes_nothing(kind: str, cut: str, one: dict[str, Any], others: dict[str, Any]) -> None:
    """Weights, held-out loss and log, with a last step of one row: a second process has none of it."""
    found, expected = others[cut][kind], one[kind]
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, atol=1e-5, rtol=0, msg=name)
    assert found["held_out"] == pytest.approx(expected["held_out"], abs=1e-5)
    assert len(found["rows"]) == len(expected["rows"]) == 9
    logged = ("loss", "grad_norm", "accuracy", "lm_loss", "classification_loss", "margin", "mean_reward", "min_reward")
    whole = logged if cut == "processes" or kind in ("classifier", "language") else logged[:2]
    for a, b in zip(expected["rows"][:-1], found["rows"][:-1], strict=True):
        for name in a.keys() & set(whole):
            assert b[name] == pytest.approx(a[name], abs=2e-5, rel=1e-5), name


@pytest.mark.parametrize(
    ("ends", "status"),
    [("pass", 0), ("sys.exit()", 0), ("sys.exit(2)", 2), ("raise ValueError('odd')", 1)],
)
def test_a_process_of_several_ends_before_its_interpreter(ends: str, status: int) -> None:
    """What was to be done at its end is done, and nothing is left for a thread of gloo's to stumble over."""
    code = f"""
import atexit, os, sys
from rlhf_pipeline.processes import end_at_once

class Left:
    def __del__(self):
        os.write(1, b"taken down")

left = Left()
atexit.register(print, "at its end")

def run():
    print("said", end=" ")
    {ends}

end_at_once(run)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment())
    assert done.returncode == status, done.stderr
    assert done.stdout == "said at its end\n"
    assert ("ValueError: odd" in done.stderr) == ("odd" in ends)


def test_a_resumed_run_takes_as_many_rows_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """The launch may change, or how the rows are cut, or both; not how many they are."""

    def cut(processes: int, size: int, steps: int = 1) -> dict[str, int] | None:
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        asked = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        before = {"per_device_train_batch_size": 16, "gradient_accumulation_steps": 1}
        found = same_step(before, 2, asked)
        return found and {"size": found[next(iter(asked))], "steps": found["gradient_accumulation_steps"]}  # type: ignore

    assert cut(2, 16) == {"size": 16, "steps": 1}
    assert cut(1, 16) == {"size": 16, "steps": 2}  # the same command, on one process
    assert cut(4, 16) == {"size": 8, "steps": 1}
    assert cut(1, 8, 4) == {"size": 8, "steps": 4}
    assert cut(1, 32) == {"size": 32, "steps": 1}
    assert cut(3, 16) is None
    assert cut(1, 24) is None


def test_what_cannot_be_sharded_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """accelerate would run DDP in its place, or the trainer would see a part for the whole."""
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    for said in ("stage=ppo", "stage=reward", "stage=evaluate", "stage=sft policy.lora="):
        with pytest.raises(UserError, match=r"does not run under fsdp; launch it with ddp.*stage=pretrain, stage=sft"):
            check_launch(said)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(UserError, match="fsdp needs GPUs"):
        check_launch("stage=sft")
    monkeypatch.delenv("ACCELERATE_USE_FSDP")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    with pytest.raises(UserError, match=r"stage=sft policy\.lora= does not run under zero2.*only stage=ppo"):
        check_launch("stage=sft policy.lora=")
    for said in ("stage=reward", "stage=ppo policy.lora="):
        with pytest.raises(UserError, match="zero2 needs GPUs"):
            check_launch(said)
    assert [checkpoints_of(stage) for stage in ("sft", "ppo")] == ["zero2 on 1 processes", None]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    check_launch("stage=sft")  # without any they are the CPU's
    monkeypatch.setattr("torch.cuda.device_count", lambda: 1)
    with pytest.raises(UserError, match="2 processes were started, but there are 1 GPUs"):
        check_launch("stage=sft")


@pytest.mark.parametrize("stage", ["sft", "ppo"])
def test_several_gpus_in_one_process_are_refused(
    stage: str, refused: Refused, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on Kaggle, with its two T4."""
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    reward = "reward=toy_sentiment" if stage == "ppo" else ""  # one that needs no model
    told = refused(f"stage={stage} experiment=demo {reward}")
    assert f"2 GPUs are visible, and one process trains on one GPU. Start a process for each: make {stage}" in told
    assert f"make {stage} LAUNCH=ddp PROCS=2" in told
    assert "CUDA_VISIBLE_DEVICES=0" in told
    assert not list(workplace.glob("runs/*/*/model"))


def test_several_gpus_in_a_script_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transformers.TrainingArguments.n_gpu", 2)
    with pytest.raises(UserError, match="accelerate launch --num_processes 2"):
        trainer(tiny_tokenizer(), tmp_path)


def test_tokens_weigh_the_same_in_every_process(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a mean of each process's own, one without rows would have none."""
    monkeypatch.setattr("rlhf_pipeline.training.setup.processes", lambda: 2)
    told = refused("stage=sft experiment=demo trainer.average_tokens_across_devices=false")
    assert "would weigh tokens differently on each process" in told


def test_a_pipeline_that_cannot_be_sharded_does_not_begin(
    refused: Refused, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_ZERO_STAGE", "3")
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    found = SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: name))
    monkeypatch.setattr("rlhf_pipeline.processes.importlib", found)  # as if DeepSpeed were there
    assert "stage=reward does not run under zero3" in refused("stage=pipeline experiment=demo")
    assert not list(workplace.iterdir())


def test_every_launch_of_make_is_a_configuration_of_accelerates() -> None:
    """make takes the files' names; of several processes on a CPU accelerate would start one."""
    files = sorted((ROOT / "conf" / "accelerate").glob("*.yaml"))
    assert [path.stem for path in files] == ["cpu", "ddp", "fsdp", "zero2", "zero3"]
    kinds = {path.stem: str(load_config_from_file(str(path)).distributed_type.value) for path in files}
    assert kinds == {"cpu": "NO", "ddp": "MULTI_GPU", "fsdp": "FSDP", "zero2": "DEEPSPEED", "zero3": "DEEPSPEED"}

    def make(*asked: str) -> str:
        done = run(["make", "-C", str(ROOT), "-n", "sft", *asked])
        return done.stdout + done.stderr

    assert "accelerate launch --config_file conf/accelerate/ddp.yaml --num_processes 4 -m rlhf_pipeline stage=sft" in (
        make("LAUNCH=ddp", "PROCS=4")
    )
    assert "torchrun --standalone --nproc_per_node 3 -m rlhf_pipeline stage=sft" in make("LAUNCH=cpu", "PROCS=3")
    planned = run(["make", "-C", str(ROOT), "-n", "plan", "LAUNCH=zero3", "PROCS=8"]).stdout
    assert "python -m rlhf_pipeline stage=plan plan.launch=zero3 plan.gpus=8" in " ".join(planned.split())
    assert "LAUNCH=dpp is none of: cpu ddp fsdp zero2 zero3" in make("LAUNCH=dpp")
