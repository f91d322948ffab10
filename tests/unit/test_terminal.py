"""What reaches the terminal: nothing acts on it, it is bounded, and no reader is needed."""

import os
import subprocess
import sys

import pytest

from rlhf_pipeline import texts
from rlhf_pipeline.terminal import MESSAGE, one_line

COMMAND = [sys.executable, "-m", "rlhf_pipeline"]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x07", r"\u001b[31mred\u0007"),
        ("a\u202eb\u2066c", r"a\u202eb\u2066c"),
        ("half \ud83d", r"half \ud83d"),
        ("\x9b31m", r"\u009b31m"),
        ("a\nb\tc 好 ± 😀", "a\nb\tc 好 ± 😀"),
    ],
)
def test_what_a_terminal_obeys_is_shown(text: str, shown: str) -> None:
    assert texts.printable(text) == shown


def test_a_message_is_one_short_line() -> None:
    assert one_line("two\nlines  of\ttext") == "two lines of text"
    assert len(one_line("long " * 10_000)) == MESSAGE
    assert one_line("no answer from https://me:secret@mirror.cn/a@b") == "no answer from https://mirror.cn/a@b"


@pytest.mark.parametrize("redirect", ["2>&-", ">&-", "2>/dev/full", "| head -c 1"])
def test_a_stream_that_is_closed_full_or_left_makes_no_traceback(redirect: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f'"$@" {redirect}', "-", *COMMAND, "stage=sft", "--cfg", "job"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}, "no data is called '\\u597d'"),
     ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment is not a whole number"),
     ({"RANK": "-1"}, "RANK=-1 in the environment is not a whole number")],
    ids=["ascii", "WORLD_SIZE", "RANK"],
)  # fmt: skip
def test_an_ascii_terminal_and_an_environment_that_is_no_launchers(environment: dict[str, str], said: str) -> None:
    done = subprocess.run([*COMMAND, "stage=sft", "data=好"], capture_output=True, text=True, check=False,
                          env={**os.environ, **environment})  # fmt: skip
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {said}")
