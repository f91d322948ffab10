"""Files that are written whole or not at all, and read as far as they were written; work that one process does."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from rlhf_pipeline.errors import DiskError, UserError

# What of a disk the user can mend, by the system's error numbers.
_DISK = {
    errno.ENOSPC: "no space left for {}: make room; the same command goes on.",
    getattr(errno, "EDQUOT", -1): "the disk quota leaves no space for {}: make room; the same command goes on.",
    errno.EFBIG: "{} may not grow so large: raise the limit (ulimit -f); the same command goes on.",
    errno.EROFS: "{} is on a disk that is read-only: choose another folder, or make it writable.",
    errno.EACCES: "no permission for {}: correct its permissions, or choose another place.",
    errno.EPERM: "no permission for {}: correct its permissions, or choose another place.",
}
# safetensors and pyarrow have the number in their words, torch and SQLite have not even that.
_NUMBER = re.compile(r"(?:[Ee]rrno |os error )(\d+)")
_FULL = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos|No space left|disk is full")


def disk_error(error: BaseException, place: Path | None = None) -> DiskError | None:
    """What is wrong with a disk in one line, where that is behind an exception; `place` is what was being written."""
    if isinstance(error, DiskError):
        return error
    number = error.errno if isinstance(error, OSError) else None
    if number is None and isinstance(error, Exception) and not isinstance(error, UserError):
        found = _NUMBER.search(str(error))
        number = int(found[1]) if found else errno.ENOSPC if _FULL.search(str(error)) else None
    if number not in _DISK:
        return disk_error(error.__cause__, place) if error.__cause__ else None
    named = getattr(error, "filename", None)
    path = Path(os.fsdecode(named)) if isinstance(named, str | bytes) else place
    if path and place and place in (path, *path.parents):
        path = place
    elif path and path.name.startswith("."):  # a lock or a temporary name of ours
        path = path.parent
    return DiskError(_DISK[number].format(path or "a temporary file"))


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_yaml(path: Path, value: Any) -> None:
    """Write a configuration whole or not at all. To Hydra ${ begins the name of a setting, so it is escaped."""
    escaped = _in_texts(value, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))
    write_atomic(path, yaml.safe_dump(escaped, sort_keys=False, allow_unicode=True))


def read_yaml(path: Path) -> dict[str, Any]:
    """What `write_yaml` wrote; empty where there is no file."""
    value = yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else {}
    return dict(_in_texts(value, lambda text: re.sub(r"(\\+)\$\{", lambda at: at[1][: len(at[1]) // 2] + "${", text)))


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _in_texts(held, change) for key, held in value.items()}
    if isinstance(value, list):
        return [_in_texts(held, change) for held in value]
    return change(value) if isinstance(value, str) else value


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    write_atomic(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a log in one call of the system, so that a kill does not cut a row in two."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if os.write(descriptor, text) < len(text):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a log. A last line cut off by a kill is left out."""
    rows: list[dict[str, Any]] = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").split("\n"):
            try:
                row = json.loads(line)
            except json.JSONDecodeError:
                continue
            rows.append(row)
    return rows


@contextmanager
def held(lock: Path, work: Path) -> Iterator[None]:
    """Keep other processes out of a folder until the block is left, however the process ends."""
    lock.parent.mkdir(parents=True, exist_ok=True)
    try:
        taken = FileLock(lock, timeout=0).acquire()
    except Timeout:
        raise UserError(f"{work} is being made by another process; wait for it, or choose name=.") from None
    with taken:
        yield
