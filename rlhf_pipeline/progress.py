"""Progress: a bar with rate and time left at a terminal, a line now and then in a log file. Both go to stderr."""

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import IO, Any, TypeVar
from weakref import WeakSet

from tqdm import tqdm

from rlhf_pipeline.processes import rank

S = TypeVar("S", bound=Sequence[Any])

_LINE = "{desc}: {percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}, {rate_fmt}{postfix}]"
_open: WeakSet[Any] = WeakSet()  # what `screen` closes


class _Lines:
    """A log file as a bar's screen: each state that it draws is a line of its own."""

    def __init__(self, file: IO[str]) -> None:
        self.file = file

    def write(self, text: str) -> None:
        """Without that by which a bar draws over itself: carriage returns, blanks, cursor movements."""
        if line := text.replace("\x1b[A", "").strip():
            self.file.write(f"{line}\n")

    def flush(self) -> None:
        """Let others read it."""
        self.file.flush()


class _Above:
    """Standard output at a terminal with bars: whole lines, above them."""

    def __init__(self, file: IO[str]) -> None:
        self.file, self.begun = file, ""

    def write(self, text: str) -> None:
        """Keep a line that has begun until it is whole."""
        whole, end, self.begun = (self.begun + text).rpartition("\n")
        if end:
            with tqdm.external_write_mode(file=sys.stderr):
                self.file.write(whole + end)
                self.file.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.file, name)


def progress(total: int, title: str, unit: str, initial: int = 0, delay: float = 0.0, leave: bool = True) -> Any:
    """A bar of `total` units, the first `initial` of which were done before: they count for no rate.

    With a `delay`, in seconds, what takes less is not shown. Of several processes the first one shows it.
    """
    terminal = at_terminal()
    how = {"dynamic_ncols": True} if terminal else {"bar_format": _LINE, "file": _Lines(sys.stderr)}
    bar = tqdm(
        total=total, initial=initial, desc=title, unit=unit, delay=delay, leave=leave, smoothing=0.1,
        mininterval=0.2 if terminal else 10.0, disable=rank() > 0, **how,
    )  # fmt: skip
    _open.add(bar)
    return bar


def parts(rows: S, size: int, title: str, unit: str, delay: float = 1.0) -> Iterator[S]:
    """The rows by at most `size` at once, with a bar."""
    with progress(len(rows), title, unit, delay=delay) as bar:
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield part  # type: ignore[misc]  # a slice of a sequence is one of its kind
            bar.update(len(part))


def at_terminal() -> bool:
    """Whether bars are looked at as they move."""
    return sys.stderr.isatty()


@contextlib.contextmanager
def screen() -> Iterator[None]:
    """Keep what is printed above the bars, and leave none open, however the block ends."""
    out: Any = _Above(sys.stdout) if at_terminal() else sys.stdout
    try:
        with contextlib.redirect_stdout(out):
            yield
    finally:
        for bar in list(_open):
            bar.close()
        _open.clear()
        if isinstance(out, _Above) and out.begun:
            out.write("\n")


def say_loading() -> None:
    """A line before torch and TRL are imported, unless they have been: it takes some ten seconds."""
    if "torch" not in sys.modules and rank() == 0:
        print("loading PyTorch and TRL", file=sys.stderr, flush=True)
