"""Files of a run: writes are atomic, one process holds the lock, and a damaged file raises UserError."""

import errno
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from rlhf_pipeline.errors import DiskError, UserError

# What the user can do about a disk, by the system's error number.
_DISK = {
    errno.ENOSPC: "no space left for {}: make room, then run the same command again.",
    getattr(errno, "EDQUOT", -1): "the disk quota leaves no space for {}: make room, then run the same command again.",
    errno.EFBIG: "{} may not grow so large: raise the limit (ulimit -f), then run the same command again.",
    errno.EROFS: "{} is on a disk that is read-only: choose another folder, or make it writable.",
    errno.EACCES: "no permission for {}: correct its permissions, or choose another place.",
    errno.EPERM: "no permission for {}: correct its permissions, or choose another place.",
}
# safetensors and pyarrow put the number in the message. torch and SQLite do not give it.
_NUMBER = re.compile(r"(?:[Ee]rrno |os error )(\d+)")
_FULL = re.compile(r"PytorchStreamWriter failed|inline_container.*unexpected pos|No space left|disk is full")


def disk_error(error: BaseException, place: Path | None = None) -> DiskError | None:
    """Return the disk error behind an exception, or None. `place` is the file or folder being written."""
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
    if path and place and place in path.parents:
        path = place
    return DiskError(_DISK[number].format(path or "a temporary file"))


def write_atomic(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    try:
        with temporary.open("x", encoding="utf-8") as file:  # "x" follows no link
            file.write(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all."""
    write_atomic(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    write_atomic(path, _lines(rows))


def append_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Add rows to a log in one system call, so that a kill cuts no row in two."""
    text = _lines(rows).encode()
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        if (written := os.write(descriptor, text)) < len(text):
            os.ftruncate(descriptor, os.fstat(descriptor).st_size - written)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
    finally:
        os.close(descriptor)


def _lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_yaml(path: Path, value: Any) -> None:
    """Write a configuration whole or not at all. ${ is escaped, because Hydra would interpolate it."""
    escaped = _in_texts(value, lambda text: re.sub(r"(\\*)\$\{", r"\1\1\\${", text))
    write_atomic(path, yaml.safe_dump(escaped, sort_keys=False, allow_unicode=True))


def _in_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, dict):
        return {key: _in_texts(inner, change) for key, inner in value.items()}
    if isinstance(value, list):
        return [_in_texts(inner, change) for inner in value]
    return change(value) if isinstance(value, str) else value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object; empty if there is no file."""
    return _read(path, json.loads, {})


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Read the rows of a log; empty if there is no file. A last line that a kill cut off is skipped."""
    return _read(path, _rows, [], errors="replace")  # a character that a kill cut off must not hide all rows


def read_log(path: Path) -> list[dict[str, Any]]:
    """Read a log whose rows have a `step`."""
    rows = read_jsonl(path)
    for row in rows:
        if type(row.get("step")) not in (int, float) or type(row.get("seconds", 0.0)) not in (int, float):
            raise UserError(f"{path} is damaged (a row has no step); restore it, or delete it.")
    return rows


def read_yaml(path: Path) -> dict[str, Any]:
    """Read what `write_yaml` wrote; empty if there is no file."""
    value = _read(path, yaml.safe_load, {})
    return _in_texts(value, lambda text: re.sub(r"(\\+)\$\{", lambda at: at[1][: len(at[1]) // 2] + "${", text))


def _rows(text: str) -> list[dict[str, Any]]:
    *whole, last = text.split("\n")
    rows = json.loads("[" + ",\n".join(filter(None, whole)) + "]")  # together, so that an error has the line's number
    with suppress(ValueError):
        rows.append(json.loads(last))
    if not all(isinstance(row, dict) for row in rows):
        raise ValueError("a line is not a JSON object")
    return rows


def _read(path: Path, parse: Callable[[str], Any], empty: Any, errors: str = "strict") -> Any:
    if not path.exists():
        return empty
    if not path.is_file():  # reading a pipe would never end
        raise UserError(f"{path} is not a regular file; move it away.")
    try:
        value = parse(path.read_text(encoding="utf-8", errors=errors))
    except (ValueError, yaml.YAMLError, RecursionError) as error:
        value = str(error).splitlines()[0]
    if not isinstance(value, type(empty)):
        raise UserError(f"{path} is damaged ({value}); restore it, or delete it.")
    return value


@contextmanager
def lock_folder(lock: Path, work: Path) -> Iterator[None]:
    """Lock a folder for this process until the block ends, however it ends. Raises UserError if it is locked."""
    from filelock import FileLock, Timeout  # imports asyncio, which would slow down --help

    lock.parent.mkdir(parents=True, exist_ok=True)
    if lock.is_symlink():  # old versions of filelock follow it
        raise UserError(f"{lock} is a link; delete it.")
    try:
        taken = FileLock(lock, timeout=0).acquire()
    except Timeout:
        raise UserError(f"{work} is in use by another process; wait for it, or choose another name=.") from None
    with taken:
        yield
