"""What reaches the terminal: text is shown, never obeyed, and a reader that has left stops no work."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

MESSAGE = 600  # characters of an error or a log line
# Control and bidirectional characters, and halves of characters. A line break and a tab are harmless.
_OBEYED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
LOGIN = re.compile(r"://[^/?#\s]*@")  # user and password of an address


def escaped(text: str, keep: str = "") -> str:
    """Text without what a terminal would act on; of that, `keep` stays."""
    return _OBEYED.sub(lambda found: found[0] if found[0] in keep else ascii(found[0])[1:-1], text)


def one_line(text: str) -> str:
    """A message in one line of at most `MESSAGE` characters, safe for a terminal; no address shows its login."""
    line = LOGIN.sub("://", escaped(" ".join(text.split())))
    return line if len(line) <= MESSAGE else f"{line[: MESSAGE - 4]} ..."


class Stream:
    """Standard output or error as the program writes to it. Progress bars, which move the cursor, write to `raw`."""

    def __init__(self, raw: Any, keep: str = "") -> None:
        self.raw, self.keep = raw, keep
        if hasattr(raw, "reconfigure"):
            raw.reconfigure(errors="backslashreplace")  # of a character that the terminal's encoding lacks

    def write(self, text: str) -> int:
        """Write it, unless nobody reads any more."""
        with self._while_read():
            self.raw.write(escaped(text, self.keep))
        return len(text)

    def flush(self) -> None:
        """Let others read it."""
        with self._while_read():
            self.raw.flush()

    @contextlib.contextmanager
    def _while_read(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:  # as behind `| head -1`
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.raw.fileno())

    def __getattr__(self, name: str) -> Any:
        return getattr(self.raw, name)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        """One line, safe for a terminal."""
        return one_line(record.getMessage())


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Write to standard output and error through `Stream` until the block is left; a closed one takes everything."""
    out, error = (stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    handler = logging.StreamHandler(Stream(error))
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    with contextlib.redirect_stdout(Stream(out)), contextlib.redirect_stderr(Stream(error, keep="\r")):
        yield
