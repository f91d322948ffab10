"""Stages in two processes on one run: the result of one, a process that is killed, and going on with two or one."""

import shlex
import shutil
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import MINIATURE, ROOT, CommandLine, Refused, cut_off, logged
from launched import accelerate, environment, run, torchrun
from safetensors.torch import load_file

from rlhf_pipeline.files import read_json

HALVES = (
    *(f"++stages.{stage}.trainer.per_device_train_batch_size=16" for stage in ("pretrain", "sft", "reward")),
    "++stages.ppo.trainer.gradient_accumulation_steps=1",
)


def on_two(*asked: str, launch: str | None = None) -> str:
    """Run a command in two processes, which has to succeed; returns its output."""
    sharded = launch and accelerate(launch, 2, str(ROOT / "tests" / "sharded.py"), *asked)
    done = run(sharded or torchrun(2, "-m", "rlhf_pipeline", *asked))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def difference(one: Path, two: Path) -> float:
    """The largest of two models' weights."""
    a, b = (load_file(folder / "model" / "model.safetensors") for folder in (one, two))
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def figures(folder: Path) -> dict[str, float]:
    results = read_json(folder / "run.json")["results"]
    return {name: value for name, value in results.items() if isinstance(value, float)}


def check_logs(one: Path, other: Path, *names: str, **tolerance: float) -> None:
    """Two runs logged these figures, where they have them, at the same steps."""
    logs = logged(one), logged(other)
    assert [row["step"] for row in logs[0]] == [row["step"] for row in logs[1]]
    for a, b in zip(*logs, strict=True):
        for name in a.keys() & {*names}:
            assert b[name] == pytest.approx(a[name], **tolerance), (other, name)


def test_a_pipeline_in_two_processes_ends_as_in_one(
    workplace: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every stage on the one before: the same weights and figures, one log on the screen, one directory."""
    # Adam divides by the size of a gradient. Of the smallest ones it would make whole steps of how sums are rounded,
    # and that differs between kinds of CPU.
    steady = [word.replace("adam_epsilon=1e-5", "adam_epsilon=1e-3") for word in MINIATURE]
    alone = workplace / "alone" / "runs" / "demo"
    alone.mkdir(parents=True)
    with monkeypatch.context() as there:
        there.chdir(workplace / "alone")
        assert command_line("stage=pipeline", *steady) == 0
    said = on_two("stage=pipeline", *steady, *HALVES)
    two = Path("runs/demo")
    for stage in ("pretrain", "sft", "reward", "ppo"):
        assert difference(alone / stage, two / stage) < 1e-5, stage
        compared = ("loss", "grad_norm", "eval_loss", "objective/scores")
        check_logs(alone / stage, two / stage, *compared, abs=1e-5, rel=1e-4)
        # Of 64 rows one may have two classes that are equally likely up to rounding.
        check_logs(alone / stage, two / stage, "accuracy", abs=1 / 64)
        assert read_json(two / stage / "run.json")["processes"] == 2
        assert said.count(f"{stage}:   0%") == 1  # of one process alone; the end may be drawn twice
    for stage in ("pretrain", "sft", "reward"):
        # fp32 holds a perplexity of 155 to 1.5e-5.
        assert figures(two / stage) == pytest.approx(figures(alone / stage), abs=1e-5, rel=1e-6), stage
    assert said.count("training a tokenizer") == 1
    assert "training a tokenizer" in (two / "pretrain" / "rank1.log").read_text()
    log = two / "evaluate" / "rank1.log"
    assert not log.exists() or "0/24" not in log.read_text(), "a bar of its own"


def test_an_evaluation_and_a_collection_are_shared_out(
    miniature: Path, command_line: CommandLine, workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the same models the very same answers; what is finished is known to two processes as well."""
    runs = [workplace / name / "runs" / "demo" for name in ("one", "two")]
    for folder in runs:
        shutil.copytree(miniature, folder)
        shutil.rmtree(folder / "evaluate")
    asked = [
        "stage=pipeline", *MINIATURE, "evaluate.batch_size=5", "evaluate.best_of=2", "evaluate.show=[so this film]",
        "++stages.collect.collect.prompts=7", "++stages.collect.collect.batch_size=2",
        "++stages.collect.labeler.name=length", "++stages.collect.labeler.target=5",
    ]  # fmt: skip
    monkeypatch.chdir(workplace / "one")
    assert command_line(*asked) == 0
    monkeypatch.chdir(workplace / "two")
    assert on_two(*asked, *HALVES).count("is done already") == 4
    for name in ("evaluate/evaluation.json", "collect/candidates.jsonl", "collect/labels.jsonl"):
        one, two = ((folder / name).read_text() for folder in runs)
        assert len(one.splitlines()) > 3
        assert one == two, name


@pytest.mark.parametrize(("stage", "which"), [pytest.param("sft", 1, marks=pytest.mark.slow), ("ppo", 0)])
def test_a_killed_process_ends_the_others_and_the_run_goes_on(
    stage: str, which: int, miniature: Path, command_line: CommandLine, workplace: Path
) -> None:
    """With an adapter (and for SFT rows that do not divide by two); then on two, and by the same command on one."""
    asked = [
        f"stage={stage}", "experiment=demo", "policy.lora.r=4", "policy.lora.target_modules=[c_attn]",
        "trainer.save_steps=2", "trainer.logging_steps=1", "trainer.bf16=false",
    ]  # fmt: skip
    if stage == "sft":
        asked += [f"policy.path={miniature / 'pretrain'}", "data.limit=193", "trainer.num_train_epochs=3"]
        asked += ["trainer.learning_rate=1e-2"]
        a_step = "trainer.per_device_train_batch_size=32", "trainer.per_device_train_batch_size=16"
    else:
        asked += [f"policy.path={miniature / 'sft'}", f"reward.path={miniature / 'reward'}", "data.limit=300"]
        asked += ["trainer.response_length=8", "trainer.total_episodes=200"]
        a_step = "trainer.per_device_train_batch_size=20", "trainer.per_device_train_batch_size=10"
        asked += ["trainer.gradient_accumulation_steps=1", "trainer.learning_rate=1e-3"]
    assert command_line(*asked, a_step[0], "name=whole") == 0
    half = [*asked, a_step[1], "name=killed"]
    folder = Path("runs/killed") / stage
    status, told, seconds = kill_one(half, folder, which)
    assert status != 0
    assert seconds < 30
    assert "Signal 9 (SIGKILL)" in told, "the launcher's word"
    assert not list(folder.glob(".model.*"))
    assert not (folder / "model").exists()
    shutil.copytree(Path("runs/killed"), Path("runs/alone"))
    assert "resuming from" in on_two(*half)
    assert command_line(*half[:-1], "name=alone") == 0
    whole = Path("runs/whole") / stage
    for name in ("killed", "alone"):
        assert difference(whole, Path("runs") / name / stage) < 1e-5, name
        compared = ("loss", "objective/scores", "objective/kl", "loss/policy_avg")
        check_logs(whole, Path("runs") / name / stage, *compared, abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["fsdp", "zero2", "zero3"])
def test_a_sharded_model_learns_the_same(
    launch: str, miniature: Path, command_line: CommandLine, refused: Refused
) -> None:
    """As accelerate is configured for it; resumed under the same launch alone."""
    if launch != "fsdp":
        pytest.importorskip("deepspeed")
    asked = [
        "stage=sft", "experiment=demo", f"policy.path={miniature / 'pretrain'}", "data.limit=193",
        "trainer.save_steps=4", "trainer.logging_steps=1", "trainer.bf16=false", "trainer.adam_epsilon=1e-6",
    ]  # fmt: skip
    assert command_line(*asked, "name=one") == 0
    asked += ["trainer.use_cpu=false", "trainer.per_device_train_batch_size=16", "name=two"]
    one, two = Path("runs/one/sft"), Path("runs/two/sft")
    on_two(*asked, launch=launch)
    assert difference(one, two) < 1e-5
    cut_off(two)
    assert f"runs/two/sft was checkpointed under {launch}" in refused(shlex.join(asked))
    assert "resuming from" in on_two(*asked, launch=launch)
    assert difference(one, two) < 1e-5
    check_logs(one, two, "loss", abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("launch", ["zero2", "zero3"])
def test_ppo_in_shards_learns_the_same_and_goes_on_without(launch: str, miniature: Path, workplace: Path) -> None:
    """Its checkpoints are of no launch: two plain processes go on with what DeepSpeed's left."""
    pytest.importorskip("deepspeed")
    asked = ["stage=ppo", "experiment=demo", f"policy.path={miniature / 'sft'}", f"reward.path={miniature / 'reward'}"]
    asked += [*(m for m in MINIATURE if "ppo" in m or "data" in m), HALVES[-1], "++stages.ppo.trainer.save_steps=3"]
    on_two(*asked, "name=plain")
    asked += ["trainer.use_cpu=false", "name=shards"]
    on_two(*asked, launch=launch)
    one, two = Path("runs/plain/ppo"), Path("runs/shards/ppo")
    assert len(logged(one)) == 6
    compared = ("objective/scores", "objective/kl", "loss/policy_avg", "grad_norm")
    check_logs(one, two, *compared, rel=1e-3, abs=1e-4)
    cut_off(two)
    assert "resuming from" in on_two(*asked)
    check_logs(one, two, *compared, rel=1e-3, abs=1e-4)


def test_what_the_user_can_mend_is_said_once(workplace: Path) -> None:
    """All processes find the same fault; the launcher, which has a report of its own, ends with it."""
    done = run(torchrun(2, "-m", "rlhf_pipeline", "stage=sft", "experiment=demo", "trainer.learning_rat=1"))
    assert done.returncode == 1, "the launcher's"
    message = "error: trainer.learning_rat is not a field of SFTConfig"
    assert done.stderr.startswith(message)
    said = [line for line in done.stderr.splitlines() if message in line]
    assert len(said) == 2
    assert said[1].strip().startswith("traceback : error: ")


def kill_one(asked: list[str], folder: Path, which: int) -> tuple[int, str, float]:
    """Start two processes and kill -9 one of them once there is a checkpoint; status, errors, seconds to the end."""
    command = torchrun(2, "-m", "rlhf_pipeline", *asked)
    with subprocess.Popen(
        command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    ) as it:
        try:
            deadline = time.monotonic() + 200
            while not list(folder.glob("checkpoints/*/complete")):
                assert it.poll() is None, "it ended before there was a checkpoint"
                assert time.monotonic() < deadline
                time.sleep(0.01)
            ranks = {child.environ().get("RANK"): child for child in psutil.Process(it.pid).children()}
            ranks[str(which)].kill()
            clock = time.monotonic()
            assert it.stderr is not None
            told = it.stderr.read()
            return it.wait(60), told, time.monotonic() - clock
        finally:
            it.kill()


@pytest.fixture(autouse=True)
def _one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    torch.set_num_threads(1)
