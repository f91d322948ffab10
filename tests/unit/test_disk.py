"""A disk that is full or may not be written: one line with the place and what to do, and nothing whole is lost."""

import errno
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from huggingface_hub import constants
from launched import run

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import append_jsonl, disk_error, lock_folder, read_json, read_jsonl, read_yaml, write_json
from rlhf_pipeline.hub import explain_failures

PLACE = Path("runs/demo/sft")
FULL = "no space left for runs/demo/sft: make room, then run the same command again."


class SafetensorError(Exception):
    """As safetensors' own, which is known by its words."""


def of_number(number: int, path: str | None = None) -> OSError:
    return OSError(number, os.strerror(number), path)


def caused(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (of_number(errno.ENOSPC), FULL),
        (of_number(errno.ENOSPC, "runs/demo/sft/.run.json.77"), FULL),
        (of_number(errno.ENOSPC, "/cache/x.arrow"), FULL.replace("runs/demo/sft", "/cache/x.arrow")),
        (of_number(errno.EDQUOT), "the disk quota leaves no space for runs/demo/sft: make room"),
        (of_number(errno.EROFS, "runs/demo/.sft.lock"), "runs/demo/.sft.lock is on a disk that is read-only"),
        (of_number(errno.EACCES, "data.csv"), "no permission for data.csv: correct its permissions"),
        (of_number(errno.EFBIG), "runs/demo/sft may not grow so large"),
        (RuntimeError("[enforce fail at inline_container.cc:858] . PytorchStreamWriter failed writing data/3"), FULL),
        (RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0"), FULL),
        (SafetensorError("Error while serializing: I/O error: Disk quota exceeded (os error 122)"), "the disk quota"),
        (OSError("[Errno 28] Error writing bytes to file. Detail: [errno 28] No space left on device"), FULL),
        (caused(RuntimeError("while saving"), of_number(errno.ENOSPC)), FULL),
    ],
)
def test_what_a_library_says_of_a_full_disk_is_one_line(error: Exception, said: str) -> None:
    assert str(disk_error(error, PLACE)).startswith(said)


def test_other_errors_are_not_taken_for_the_disks() -> None:
    others = (FileNotFoundError(2, "x"), RuntimeError("CUDA out of memory"), UserError("[Errno 28] in a text"))
    assert [disk_error(error, PLACE) for error in others] == [None] * 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="Linux has a disk that is always full")
def test_a_log_says_so_when_a_row_does_not_fit() -> None:
    with pytest.raises(OSError, match="No space left") as caught:
        append_jsonl(Path("/dev/full"), [{"step": 1}])
    assert str(disk_error(caught.value, PLACE)) == FULL


@pytest.mark.parametrize(
    ("read", "content", "said"),
    [(read_json, '{"a": 1', "is damaged (Expecting"), (read_json, "[1]", "is damaged ([1])"),
     (read_yaml, "a: [", "is damaged (while parsing"), (read_json, b"\xff", "is damaged ('utf-8' codec"),
     (read_jsonl, '{"a": 1}\n{"a"\n{"a": 3}\n', "is damaged (Expecting ':' delimiter: line 2")],
)  # fmt: skip
def test_a_damaged_file_of_a_run_is_named(read: Any, content: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(f"{path} {said}")):
        read(path)


def test_a_log_is_read_as_far_as_it_was_written(tmp_path: Path) -> None:
    log = tmp_path / "metrics.jsonl"
    assert read_jsonl(log) == []
    append_jsonl(log, [{"step": 1}, {"step": 2}])
    whole = log.read_bytes()
    for torn in (b'{"step": 3, "lo', '{"text": "好'.encode()[:-1]):  # the second within a character
        log.write_bytes(whole + torn)
        assert read_jsonl(log) == [{"step": 1}, {"step": 2}]


def test_links_are_not_followed_and_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    other, path = tmp_path / "other", tmp_path / "run.json"
    other.write_text("mine")
    (tmp_path / f".run.json.{os.getpid()}").symlink_to(other)
    write_json(path, {"a": 1})
    assert read_json(path) == {"a": 1}
    (tmp_path / ".lock").symlink_to(other)
    with pytest.raises(UserError, match=r"\.lock is a link"), lock_folder(tmp_path / ".lock", tmp_path):
        pass
    assert other.read_text() == "mine"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is not a regular file"):
        read_json(tmp_path / "pipe")


def test_a_full_cache_is_not_a_model_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"no space left for {constants.HF_HOME}"), explain_failures(str(tmp_path), "x"):
        raise of_number(errno.ENOSPC)


TEXTS = "\n".join(f"It was a good film, number {number}, and I liked it." for number in range(60))
WORDS = [
    "stage=pretrain", "name=x", "policy=gpt2_scratch", "policy.size=tiny", "policy.vocabulary=300", "data=text",
    "data.path=texts.txt", "trainer.max_steps=4", "trainer.save_steps=2", "trainer.per_device_train_batch_size=4",
]  # fmt: skip
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv.pop(1)),) * 2)
import runpy
runpy.run_module("rlhf_pipeline", run_name="__main__")
"""


def test_a_run_that_found_no_room_goes_on_by_the_same_command(workplace: Path, command_line: CommandLine) -> None:
    Path("texts.txt").write_text(TEXTS)
    for size, place in ((200_000, "runs/x/pretrain"), (20, "runs/x")):
        stopped = run([sys.executable, "-c", LIMITED, str(size), *WORDS])  # no file may be larger
        assert stopped.returncode == 2, stopped.stderr
        assert "Traceback" not in stopped.stderr
        last = stopped.stderr.splitlines()[-1]
        assert last.startswith(("error: no space left for", "error: runs/x")), last
        assert place in last
        if size > 20:
            record = json.loads(Path("runs/x/pretrain/run.json").read_text())
            assert record["status"] == "failed"
            assert "run the same command again" in record["error"]
            assert not list(Path("runs/x/pretrain/checkpoints").glob("checkpoint-*")), "half of one is left"
    assert command_line(*WORDS) == 0
    assert json.loads(Path("runs/x/pretrain/run.json").read_text())["status"] == "done"
