"""Checks that a run that is killed 20 times ends like one that never was: the same weights (bytes), the same log.

python tests/benchmarks/kills.py [--kills 20] [--only ppo,lora,pretrain,sft,reward,ppo2] [--seed 0]

SIGKILL goes to the whole process tree, at random moments of the training. Every third kill comes while a checkpoint or
the model is written, and every sixth before training. Runs of several processes, which start slowly, are killed a
quarter as often.
"""

import argparse
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import psutil
from forked import MINIATURE, fork

from rlhf_pipeline.files import read_jsonl

# More steps and checkpoints than the miniature has; later settings win.
LONGER = (
    "++stages.pretrain.trainer.num_train_epochs=3",
    "++stages.pretrain.trainer.per_device_train_batch_size=8",
    "++stages.pretrain.trainer.save_steps=2",
    "++stages.sft.trainer.num_train_epochs=3",
    "++stages.sft.trainer.per_device_train_batch_size=16",
    "++stages.reward.trainer.num_train_epochs=3",
    "++stages.reward.trainer.per_device_train_batch_size=16",
    "++stages.reward.trainer.save_steps=2",
    "++stages.reward.trainer.logging_steps=1",
    "++stages.ppo.trainer.total_episodes=320",
)
LORA = "++stages.ppo.policy.lora={r:4,target_modules:[c_attn]}"
STALLED = 3  # after this many attempts without a new checkpoint they get longer
LIMIT = 600  # seconds; a longer attempt counts as hanging


@dataclass(frozen=True)
class Kind:
    """A stage to run, the kinds that must run before it, and its number of processes."""

    stage: str
    after: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    processes: int = 1

    def start(self, folder: Path) -> int:
        """Start the command in `folder`, each setting once; returns its process id."""
        settings = {word.partition("=")[0]: word for word in (*MINIATURE, *LONGER, *self.more)}
        words, log = [f"stage={self.stage}", *settings.values()], folder / "log"
        if self.processes == 1:
            return fork(words, folder, log)
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self.processes}"]
        python = [sys.executable, *launcher, "-m", "rlhf_pipeline", *words]
        return fork(words, folder, log, partial(os.execv, sys.executable, python))


KINDS = {
    "pretrain": Kind("pretrain"),
    "sft": Kind("sft", ("pretrain",)),
    "reward": Kind("reward", ("pretrain",)),
    "ppo": Kind("ppo", ("sft", "reward")),
    "lora": Kind("ppo", ("sft", "reward"), (LORA,)),
    "ppo2": Kind("ppo", ("sft", "reward"), processes=2),
}


class BrokenError(Exception):
    """A run failed, or differs from one that was never killed."""


# -- moments to kill at: functions that return True when the moment has come


def half_written(stage: Path) -> dict[Path, int]:
    """Return the incomplete folders of checkpoints and models, and when each last changed."""
    found = {}
    for folder in (*stage.glob("checkpoints/*"), *stage.glob("checkpoints/.*"), *stage.glob(".model.*")):
        with suppress(OSError):  # it may be renamed or deleted meanwhile
            if folder.is_dir() and not (folder / "complete").exists():
                found[folder] = max(path.stat().st_mtime_ns for path in (folder, *folder.iterdir()))
    return found


def writing(stage: Path, skip: int) -> Callable[[], bool]:
    """Return a function that is True while a new checkpoint or model is written, after the first `skip` ones."""
    before, seen = half_written(stage), set()

    def now() -> bool:
        fresh = [folder for folder, when in half_written(stage).items() if before.get(folder) != when]
        seen.update(folder.name.rpartition("-")[2] for folder in fresh)
        return bool(fresh) and len(seen) > skip

    return now


def into_training(stage: Path, seconds: float) -> Callable[[], bool]:
    """Return a function that is True `seconds` after training wrote its first log row of this attempt."""
    before, began = _stamp(stage / "metrics.jsonl"), 0.0

    def now() -> bool:
        nonlocal began
        if not began and _stamp(stage / "metrics.jsonl") != before:
            began = time.monotonic()
        return began > 0 and time.monotonic() - began > seconds

    return now


def before_training(seconds: float) -> Callable[[], bool]:
    """Return a function that is True `seconds` from now."""
    when = time.monotonic() + seconds
    return lambda: time.monotonic() > when


def _stamp(path: Path) -> tuple[int, int] | None:
    """Return a value that changes when a file is written or replaced; None if there is no file."""
    with suppress(OSError):
        status = path.stat()
        return status.st_ino, status.st_mtime_ns
    return None


def whole_checkpoints(stage: Path) -> set[str]:
    """Names of the checkpoints that can be resumed from."""
    return {path.parent.name for path in stage.glob("checkpoints/checkpoint-*/complete")}


# -- one attempt


class Attempt:
    """A kind's command in `folder`, in a new session."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.log, self.began = folder / "log", time.monotonic()
        self.status: int | None = None
        self.pid = kind.start(folder)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.began

    def wait(self, until: Callable[[], bool] = lambda: False) -> bool:
        """Wait until `until()` is True; returns False if the command ends first."""
        try:
            while self.seconds < LIMIT:
                pid, status = os.waitpid(self.pid, os.WNOHANG)
                if pid:
                    self.status = os.waitstatus_to_exitcode(status)
                    return False
                if until():
                    return True
                time.sleep(0.001)
            raise BrokenError(f"an attempt did not end in {LIMIT} s:\n{self.told()}")
        except BaseException:
            self.kill()  # it would outlive this process
            raise

    def kill(self) -> None:
        """Send SIGKILL to the whole tree, and wait until it is gone, because it holds the run directory's lock."""
        own = psutil.Process(self.pid)
        tree = [own, *own.children(recursive=True)]  # torchrun's workers lead sessions of their own
        for process in tree:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        os.waitpid(self.pid, 0)
        while any(map(_alive, tree)):
            time.sleep(0.002)

    def told(self) -> str:
        """Return the last lines of its log."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-20:])


def _alive(process: psutil.Process) -> bool:
    """Whether a process still runs; a zombie does not."""
    with suppress(psutil.NoSuchProcess):
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    return False


# -- runs


class Kills:
    """The runs of all kinds, below one folder."""

    def __init__(self, root: Path, seed: int) -> None:
        self.root, self.seed = root, seed
        self.timing: dict[str, tuple[float, float]] = {}  # unbroken runs: seconds to the first log row, in total

    def unbroken(self, name: str) -> Path:
        """Return the folder of this kind's run that is never killed; the first call makes it."""
        folder, kind = self.root / name / "unbroken", KINDS[name]
        if name not in self.timing:
            stage = self.prepare(name, folder)
            attempt = Attempt(kind, folder)
            attempt.wait(into_training(stage, 0))
            first = attempt.seconds
            if attempt.status is None:
                attempt.wait()
            if attempt.status:
                raise BrokenError(f"the run without kills ends with status {attempt.status}:\n{attempt.told()}")
            self.timing[name] = first, attempt.seconds
        return folder / "runs" / "demo" / kind.stage

    def prepare(self, name: str, folder: Path) -> Path:
        """Copy the stages that this kind needs into an empty folder; returns its future run directory."""
        shutil.rmtree(folder, ignore_errors=True)
        runs = folder / "runs" / "demo"
        runs.mkdir(parents=True)
        for earlier in KINDS[name].after:
            shutil.copytree(self.unbroken(earlier), runs / KINDS[earlier].stage)
        return runs / KINDS[name].stage

    def survive(self, name: str, kills: int) -> str:
        """Kill a run `kills` times, let it end and compare it; returns a line about it.

        A run that ends before it was killed often enough is compared too, and another run starts.
        """
        kind, whole, folder = KINDS[name], self.unbroken(name), self.root / name / "killed"
        first, total = self.timing[name]
        share = 1.5 * (total - first) / kills  # seconds of training per attempt
        draw, count, stalled, clock = random.Random(f"{self.seed} {name}"), Counter[str](), 0, time.monotonic()
        while count["kills"] < kills:
            stage = self.prepare(name, folder)
            count["runs"] += 1
            ended = False
            while not ended:
                before, torn, number = whole_checkpoints(stage), half_written(stage), count["kills"]
                longer = 1.5 ** max(stalled - STALLED + 1, 0)
                aimed = number % 3 == 2 and stalled < STALLED
                until = into_training(stage, draw.uniform(0, share * longer))
                if aimed:
                    until = writing(stage, draw.randrange(2))
                elif number % 6 == 1:
                    until = before_training(draw.uniform(0, first))
                attempt = Attempt(kind, folder)
                ended = not attempt.wait(until) if number < kills else not attempt.wait()
                if not ended:
                    time.sleep(max(draw.uniform(-0.02, 0.02), 0) if aimed else 0)  # so that kills hit different files
                    attempt.kill()
                    count["kills"] += 1
                    count["half"] += any(torn.get(path) != when for path, when in half_written(stage).items())
                    count["resumable"] += bool(whole_checkpoints(stage))
                    stalled = 0 if whole_checkpoints(stage) - before else stalled + 1
                elif attempt.status:
                    raise BrokenError(f"after {count['kills']} kills: status {attempt.status}:\n{attempt.told()}")
            if found := differences(whole, stage):
                raise BrokenError(f"after {count['kills']} kills:\n  " + "\n  ".join(found))
            share /= 2  # if there is another run, this one ended too soon
        return (
            f"{count['kills']} of {kills} kills ({count['half']} left something half written, {count['resumable']} a "
            f"checkpoint to resume from), {count['runs']} run(s), {time.monotonic() - clock:.0f} s; "
            f"equal to the run never killed, of {total:.0f} s"
        )


def content(run: Path) -> dict[str, object]:
    """A run's weights in bytes, and its logs row by row without `seconds`, as text, so that NaN equals NaN."""
    found: dict[str, object] = {str(p.relative_to(run)): p.read_bytes() for p in run.glob("model/**/*.safetensors")}
    for name in ("metrics.jsonl", "samples.jsonl"):
        for number, row in enumerate(read_jsonl(run / name), 1):
            found[f"{name}, row {number}"] = json.dumps({k: v for k, v in row.items() if k != "seconds"})
    return found


def differences(whole: Path, killed: Path) -> list[str]:
    """Return the first differences between a killed run's weights and logs and those of the unbroken run."""
    expected, got = content(whole), content(killed)
    if not any(isinstance(weights, bytes) for weights in expected.values()):
        return ["there are no weights to compare"]
    names = [name for name in {**expected, **got} if expected.get(name) != got.get(name)][:5]
    return [f"{name}: {str(got.get(name))[:200]}, never killed: {str(expected.get(name))[:200]}" for name in names]


def main() -> int:
    """Return 0 if every kind's runs are equal, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--only", default=",".join(KINDS), help="comma-separated kinds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    asked = parser.parse_args()
    names = asked.only.split(",")
    if unknown := set(names) - set(KINDS):
        parser.error(f"no kind is called {', '.join(unknown)}. Known: {', '.join(KINDS)}.")
    root, status = Path(tempfile.mkdtemp(prefix="kills-")), 0
    runs = Kills(root, asked.seed)
    for name in names:
        try:
            line = runs.survive(name, asked.kills if KINDS[name].processes == 1 else max(asked.kills // 4, 1))
        except BrokenError as broken:
            line, status = f"DIFFERS {broken}", 1
        print(f"{name:<9}{line}", flush=True)
    if status:
        print(f"the runs are in {root}")
    else:
        shutil.rmtree(root)
    return status


if __name__ == "__main__":
    sys.exit(main())
