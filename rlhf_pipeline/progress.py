"""Progress on stderr: a bar with rate and time left on a terminal, a line every 10 seconds in a log file."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, Any, TypeVar

from rlhf_pipeline.processes import rank

S = TypeVar("S", bound=Sequence[Any])

JOB = "RLHF_PIPELINE_JOB"  # in the environment of a sweep's job: its folder
_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """A log file that shows each state of a bar as a separate line, without control characters."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.flush = file, file.flush

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            self.file.write(f"{line}\n")


class _AboveBars:
    """Standard output on a terminal with bars: it prints whole lines above the bars."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.begun = file, ""

    def write(self, text: str) -> None:
        whole, end, self.begun = (self.begun + text).rpartition("\n")
        if end:
            with _tqdm().external_write_mode(file=_stderr()):
                self.file.write(whole + end)
                self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def _tqdm() -> Any:
    """Return the class of bars. The import takes as long as parsing the command line, so --help avoids it."""
    from tqdm import tqdm

    return tqdm


def _stderr() -> Any:
    """Return the terminal itself, because terminal.Stream would escape the cursor movements of bars."""
    return getattr(sys.stderr, "raw", sys.stderr)


def progress(total: int, title: str, unit: str, initial: int = 0, delay: float = 0.0, leave: bool = True) -> Any:
    """Return a bar of `total` units, shown on rank 0. The rate excludes the first `initial`, which were done before.

    The bar is not shown if all is done within `delay` seconds. A job's bar has its name, because several jobs may run
    at once.
    """
    terminal, job = at_terminal(), Path(os.environ.get(JOB, "")).name
    return _tqdm()(
        total=total, initial=initial, desc=f"{job} {title}".strip(), unit=unit, delay=delay, leave=leave, smoothing=0.1,
        mininterval=0.2 if terminal else 10.0, disable=rank() > 0, dynamic_ncols=terminal,
        bar_format=None if terminal else _LINE, file=_stderr() if terminal else _Lines(_stderr()),
    )  # fmt: skip


def parts(rows: S, size: int, title: str, unit: str, delay: float = 1.0) -> Iterator[S]:
    """Yield the rows in parts of at most `size`, with a bar."""
    with progress(len(rows), title, unit, delay=delay) as bar:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield part  # type: ignore[misc]  # a slice has the type of its sequence
            bar.update(len(part))


def at_terminal() -> bool:
    """Whether bars can be drawn."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def print_above_bars() -> Iterator[None]:
    """Print above the bars inside the block, and close all bars when it ends."""
    out: Any = _AboveBars(sys.stdout) if at_terminal() else sys.stdout
    try:
        with contextlib.redirect_stdout(out):
            yield
    finally:
        if "tqdm" in sys.modules:  # else there are no bars
            for bar in list(getattr(_tqdm(), "_instances", ())):
                bar.close()
        if isinstance(out, _AboveBars) and out.begun:
            out.write("\n")


def print_loading() -> None:
    """Announce the import of torch and TRL, which takes about ten seconds, unless it is done."""
    if "torch" not in sys.modules and rank() == 0:
        print("loading PyTorch and TRL", file=sys.stderr, flush=True)
