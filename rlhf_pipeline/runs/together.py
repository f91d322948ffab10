"""One stage in several processes: one run directory, one log on the screen, and one end."""

import atexit
import contextlib
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from rlhf_pipeline.errors import LostProcessError, UserError
from rlhf_pipeline.launch import processes, rank
from rlhf_pipeline.progress import say_loading
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Settings

_STOPPED = "another process has ended, or all were told to; the same command goes on from the last checkpoint."
_COURTESY = 3  # seconds


class ReadOnlyRunDir(RunDir):
    """A run directory as the processes beside the first one have it: they read, and leave the writing to the first."""

    leads = False

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """The first process holds it for all."""
        yield

    def begin(self, settings: Settings, parents: dict[str, str], fingerprint: dict[str, Any] | None) -> None:
        """Nothing."""

    def finish(self, results: dict[str, Any], objective: float | None = None, status: str = "done") -> None:
        """Nothing."""

    def failed(self, error: BaseException) -> None:
        """Nothing."""

    def rewind(self, step: int) -> None:
        """Nothing."""

    def draw(self) -> None:
        """Nothing."""

    def save_model(self, save: Callable[[Path], None]) -> None:
        """Take part in what all processes do to save."""
        save(self.path / ".model.new")

    def add(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Nothing."""


def run_together(settings: Settings, run: Callable[[RunDir, bool], object]) -> float | None:
    """Run a stage in several processes: the first holds the directory and decides, the others follow."""
    if not hasattr(os, "register_at_fork"):
        raise UserError("several processes on one run need Linux or macOS (on Windows: WSL); start a single one.")
    say_loading()
    from rlhf_pipeline.processes import agree, lost

    out = ReadOnlyRunDir.of(settings) if rank() else RunDir.of(settings)
    _stop_at_sigterm(out)
    try:
        with out.held():
            done = agree(lambda: out.finished(settings))
            if isinstance(sys.stdout, OwnLog):
                sys.stdout.belongs_to(out.path)
            run(out, done)
            agree(lambda: None)  # until then the first one may be writing what the others would read
    except RuntimeError as error:
        if lost(error):
            cause = str(error).strip().splitlines()[0][:300]
            raise LostProcessError(_STOPPED if "by peer" in cause else f"{_STOPPED} It began with: {cause}") from error
        raise
    return out.objective()


def end_at_once(run: Callable[[], None]) -> NoReturn:
    """Run what ends by returning or by `sys.exit`, then leave with its status and without taking the interpreter down.

    DDP, FSDP and DeepSpeed keep hold of the connections, so gloo's threads run to the very end. One that still has the
    last tensor in hand while the interpreter ends aborts the process, when all its work is done.
    """
    status = 0
    try:
        run()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr, sys.__stdout__, sys.__stderr__)):
        with contextlib.suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(status)


class OwnLog:
    """What a process beside the first one says: in `rank<n>.log` of the stage, once that folder is there."""

    def __init__(self) -> None:
        self.path: Path | None = None
        self.kept = ""

    def belongs_to(self, folder: Path) -> None:
        """Tell whose log it is."""
        self.path = folder / f"rank{rank()}.log"

    def write(self, text: str) -> int:
        """Keep it until there is a place for it."""
        self.kept += text
        if self.path is not None and self.path.parent.is_dir():
            with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:  # a full disk, for one
                file.write(self.kept)
            self.kept = ""
        return len(text)

    def flush(self) -> None:
        """It is written at once."""

    def isatty(self) -> bool:
        """It is a file."""
        return False


@contextlib.contextmanager
def own_log() -> Iterator[None]:
    """Of several processes the first has the screen; the others have it for a word on why they end."""
    if rank() == 0:
        yield
        return
    log: Any = OwnLog()
    with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            place = f"; more in {log.path}" if log.path else ""
            leave(f"{type(error).__name__}: {error}{place}", 1, shared=False)


def leave(message: str, status: int, shared: bool = True) -> NoReturn:
    """Say why on the screen, whoever has it, and end.

    What is `shared`, as what was asked for is, all processes find: the first one tells it, and the launcher ends the
    others meanwhile.
    """
    if rank() and not shared:
        message = f"process {rank()}: {message}"
    elif rank():
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(_COURTESY)
    if report := os.environ.get("TORCHELASTIC_ERROR_FILE"):  # the launcher's last word, after a traceback of its own
        Path(report).write_text(json.dumps({"message": message, "timestamp": int(time.time())}), encoding="utf-8")
    print(message, file=sys.__stderr__ if rank() else sys.stderr, flush=True)
    sys.exit(status)


def _stop_at_sigterm(out: RunDir) -> None:
    """torchrun sends it when a process has ended. The main thread may be waiting for that one, and not come to it."""
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)

    def wait() -> None:
        while os.read(reader, 1)[0] != signal.SIGTERM:
            pass
        print(f"process {rank()} of {processes()}: stopped: {_STOPPED}", file=sys.__stderr__, flush=True)
        with contextlib.suppress(Exception):
            out.failed(LostProcessError(_STOPPED))
        os._exit(128 + signal.SIGTERM)

    def alone() -> None:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=alone)  # a loader's or tokenizer's own processes end as ever
    threading.Thread(target=wait, daemon=True).start()
