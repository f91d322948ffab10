"""Progress on stderr: a bar with rate and time left at a terminal, a line now and then in a log file."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any, TypeVar

from rlhf_pipeline.processes import rank

S = TypeVar("S", bound=Sequence[Any])

_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"


class _Lines:
    """A log file in which each state of a bar is a line of its own: without carriage returns and cursor movements."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.flush = file, file.flush

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            self.file.write(f"{line}\n")


class _Above:
    """Standard output at a terminal with bars: whole lines, above them."""

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
    """The class of bars. Importing it takes as long as reading the command line, so --help does without."""
    from tqdm import tqdm

    return tqdm


def _stderr() -> Any:
    """The terminal itself: bars move its cursor, which terminal.Stream would escape."""
    return getattr(sys.stderr, "raw", sys.stderr)


def progress(total: int, title: str, unit: str, initial: int = 0, delay: float = 0.0, leave: bool = True) -> Any:
    """A bar of `total` units; the first `initial` were done before, and count for no rate. Of several ranks, rank 0's.

    It is not shown if all is done within `delay` seconds.
    """
    terminal = at_terminal()
    return _tqdm()(
        total=total, initial=initial, desc=title, unit=unit, delay=delay, leave=leave, smoothing=0.1,
        mininterval=0.2 if terminal else 10.0, disable=rank() > 0, dynamic_ncols=terminal,
        bar_format=None if terminal else _LINE, file=_stderr() if terminal else _Lines(_stderr()),
    )  # fmt: skip


def parts(rows: S, size: int, title: str, unit: str, delay: float = 1.0) -> Iterator[S]:
    """The rows by at most `size` at once, with a bar."""
    with progress(len(rows), title, unit, delay=delay) as bar:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield part  # type: ignore[misc]  # a slice of a sequence is one of its kind
            bar.update(len(part))


def at_terminal() -> bool:
    """Whether somebody sees bars move."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def screen() -> Iterator[None]:
    """Keep what is printed above the bars, and leave none open, however the block ends."""
    out: Any = _Above(sys.stdout) if at_terminal() else sys.stdout
    try:
        with contextlib.redirect_stdout(out):
            yield
    finally:
        for bar in list(getattr(_tqdm(), "_instances", ())):
            bar.close()
        if isinstance(out, _Above) and out.begun:
            out.write("\n")


def say_loading() -> None:
    """Say so before torch and TRL are imported, which takes some ten seconds, unless they have been."""
    if "torch" not in sys.modules and rank() == 0:
        print("loading PyTorch and TRL", file=sys.stderr, flush=True)
