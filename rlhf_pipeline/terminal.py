"""Output to the terminal: control characters are escaped, and a closed pipe does not stop a run."""

import contextlib
import logging
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from rlhf_pipeline.texts import printable

MESSAGE = 600  # characters of an error or a log line
LOGIN = re.compile(r"://[^/?#\s]*@")  # user and password in a URL


def one_line(text: str) -> str:
    """Return a message in one line of at most `MESSAGE` characters, safe for a terminal, without logins of URLs."""
    line = LOGIN.sub("://", printable(" ".join(text.split())))
    return line if len(line) <= MESSAGE else f"{line[: MESSAGE - 4]} ..."


class Stream:
    """Standard output or error with control characters escaped. Progress bars move the cursor, so they use `raw`."""

    def __init__(self, raw: Any, keep: str = "\n\t") -> None:
        self.raw, self.keep = raw, keep
        if hasattr(raw, "reconfigure"):
            raw.reconfigure(errors="backslashreplace")  # for characters that the terminal's encoding lacks

    def write(self, text: str) -> int:
        """Write the text, unless the reader has closed the pipe."""
        with self._while_read():
            self.raw.write(printable(text, self.keep))
        return len(text)

    def flush(self) -> None:
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
def safe_output() -> Iterator[None]:
    """Wrap standard output and error in `Stream` inside the block. Output to a closed one is discarded."""
    out, error = (stream or open(os.devnull, "w", encoding="utf-8") for stream in (sys.stdout, sys.stderr))  # noqa: SIM115
    handler = logging.StreamHandler(Stream(error))
    handler.setFormatter(_Formatter())
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    with contextlib.redirect_stdout(Stream(out)), contextlib.redirect_stderr(Stream(error, keep="\n\t\r")):
        yield
