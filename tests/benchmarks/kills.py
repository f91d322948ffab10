"""Checks that a run that is killed 20 times ends like one that never was: the same weights (bytes), the same log.

python tests/benchmarks/kills.py [--kills 20] [--kills2 5] [--only ppo,lora,pretrain,sft,reward,ppo2] [--seed 0]

SIGKILL goes to the whole process tree, at random moments of the training. Every third kill comes while a checkpoint or
the model is written, and every sixth before training. Each attempt is a fork of this process, which has already loaded
the libraries.
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
from typing import NoReturn

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import MINIATURE  # sets the environment, so it comes before the libraries

from rlhf_pipeline import cli
from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.stages import (
    sft,  # noqa: F401 (loaded for the children)
)

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
    optional: bool = False  # the command line may refuse it

    @property
    def args(self) -> list[str]:
        """The command's arguments, each setting once."""
        settings = {word.partition("=")[0]: word for word in (*MINIATURE, *LONGER, *self.more)}
        return [f"stage={self.stage}", *settings.values()]


KINDS = {
    "pretrain": Kind("pretrain"),
    "sft": Kind("sft", ("pretrain",)),
    "reward": Kind("reward", ("pretrain",)),
    "ppo": Kind("ppo", ("sft", "reward")),
    "lora": Kind("ppo", ("sft", "reward"), (LORA,), optional=True),
    "ppo2": Kind("ppo", ("sft", "reward"), processes=2, optional=True),
}


class RefusedError(Exception):
    """The command line refused the command."""


class BrokenError(Exception):
    """A run failed, or differs from one that was never killed."""


# -- moments to kill at: functions that return True when the moment has come


def never() -> bool:
    """Do not kill."""
    return False


def passed(when: float) -> bool:
    """Whether the clock is past `when`."""
    return time.monotonic() > when


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
        self.log, self.start = folder / "log", time.monotonic()
        self.status: int | None = None
        sys.stdout.flush()
        self.pid = os.fork()
        if self.pid == 0:
            _become(kind, folder, self.log)

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self.start

    def wait(self, until: Callable[[], bool] = never) -> bool:
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
        """Return its error message, or its last lines if it has none."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("error: ")]
        return errors[-1] if errors else "\n".join(lines[-20:])


def _become(kind: Kind, folder: Path, log: Path) -> NoReturn:
    """Turn this forked process into the command."""
    status = 1
    try:
        os.setsid()
        os.chdir(folder)
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for stream in (1, 2):
            os.dup2(output, stream)
        if kind.processes > 1:
            launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={kind.processes}"]
            os.execv(sys.executable, [sys.executable, *launcher, "-m", "rlhf_pipeline", *kind.args])
        sys.argv = ["rlhf_pipeline", *kind.args]
        cli.main()
        status = 0
    except SystemExit as leaving:
        status = leaving.code if isinstance(leaving.code, int) else 1
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # skips the parent's clean-up


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
            if attempt.status and kind.optional and attempt.told().startswith("error: "):
                raise RefusedError(attempt.told())
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
                    until = partial(passed, time.monotonic() + draw.uniform(0, first))
                attempt = Attempt(kind, folder)
                ended = not attempt.wait(until if number < kills else never)
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


def differences(whole: Path, killed: Path) -> list[str]:
    """Return the differences between a killed run's weights and logs and those of the unbroken run."""
    weights = [{str(p.relative_to(r)): p for p in r.glob("model/**/*.safetensors")} for r in (whole, killed)]
    found = [] if weights[0] else ["there are no weights to compare"]
    for name in sorted({*weights[0], *weights[1]}):
        one, other = (each[name].read_bytes() if name in each else None for each in weights)
        if one != other:
            found.append(f"{name}: " + ("missing" if other is None else "unexpected" if one is None else "other bytes"))
    for name in ("metrics.jsonl", "samples.jsonl"):
        one, other = (rows_of(run / name) for run in (whole, killed))
        if len(one) != len(other):
            found.append(f"{name}: {len(other)} rows, of {len(one)}")
        for number, (expected, got) in enumerate(zip(one, other, strict=False), 1):
            if expected != got:
                found.append(f"{name}, row {number}: {got}\n    never killed: {expected}")
                break
    return found


def rows_of(path: Path) -> list[str]:
    """Return a log's rows without `seconds`, as text, so that NaN equals NaN."""
    return [json.dumps({k: v for k, v in row.items() if k != "seconds"}) for row in read_jsonl(path)]


def main() -> int:
    """Return 0 if every kind's runs are equal, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--kills2", type=int, default=5, help="for kinds with several processes, which start slowly")
    parser.add_argument("--only", default=",".join(KINDS), help="comma-separated kinds")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    parser.add_argument("--folder", type=Path, help="folder of the runs, which is kept (default: a temporary folder)")
    asked = parser.parse_args()
    names = asked.only.split(",")
    if unknown := set(names) - set(KINDS):
        parser.error(f"no kind is called {', '.join(sorted(unknown))}. Known: {', '.join(KINDS)}.")
    root, status = asked.folder or Path(tempfile.mkdtemp(prefix="kills-")), 0
    runs = Kills(root.resolve(), asked.seed)
    for name in names:
        try:
            line = runs.survive(name, asked.kills2 if KINDS[name].processes > 1 else asked.kills)
        except RefusedError as refused:
            line = f"skipped: {refused}"
        except BrokenError as broken:
            line, status = f"DIFFERS {broken}", 1
        print(f"{name:<9}{line}", flush=True)
    if status or asked.folder:
        print(f"the runs are in {root}")
    else:
        shutil.rmtree(root)
    return status


if __name__ == "__main__":
    sys.exit(main())
