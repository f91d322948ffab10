"""Checkpoint folders. They are sealed when complete, and checked before use."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from rlhf_pipeline.files import write_json

SEAL = "complete"  # the file that lists the files of a complete checkpoint


def seal(folder: Path) -> None:
    """Sync every file to disk and record its size. After this the checkpoint is complete."""
    held = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        with path.open("r+b") as file:  # Windows cannot sync a file that is open for reading only
            os.fsync(file.fileno())
        held[str(path.relative_to(folder))] = {"bytes": path.stat().st_size}
    write_json(folder / SEAL, held)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """Yield an empty hidden folder to fill. At the end it replaces `folder`, whose old content is then deleted."""
    new, old = (folder.with_name(f".{folder.name}.{what}") for what in ("new", "old"))
    for leftover in (new, old):
        shutil.rmtree(leftover, ignore_errors=True)
    new.mkdir(parents=True)
    yield new
    if folder.exists():
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def step_of(folder: Path) -> int:
    """Return the step of `checkpoint-<step>`; -1 for another name."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def sealed(parent: Path) -> list[Path]:
    """Return the sealed checkpoints below `parent`, the oldest first."""
    there = [path for path in parent.glob("checkpoint-*") if step_of(path) >= 0 and (path / SEAL).exists()]
    return sorted(there, key=step_of)


def newest_whole(parent: Path) -> Path | None:
    """Return the newest undamaged checkpoint below `parent`. Damaged ones are reported and skipped."""
    for folder in reversed(sealed(parent)):
        if (fault := fault_of(folder)) is None:
            return folder
        _say(folder, fault)
    return None


def drop_old(parent: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` sealed checkpoints; None keeps all."""
    for old in sealed(parent)[: -max(keep, 1)] if keep else []:
        shutil.rmtree(old)


def fault_of(folder: Path) -> str | None:
    """Return what is wrong with a sealed checkpoint; None if nothing is wrong, or if it was not sealed."""
    if not (folder / SEAL).exists():
        return None
    try:
        held = json.loads((folder / SEAL).read_text())
    except ValueError:
        return "its seal cannot be read"
    for name, expected in held.items():
        size = (folder / name).stat().st_size if (folder / name).exists() else None
        if size != expected["bytes"]:
            return f"{name} is missing" if size is None else f"{name} has {size} bytes of {expected['bytes']}"
    return None


@lru_cache(maxsize=64)
def _say(folder: Path, fault: str) -> None:
    print(f"{folder} is damaged ({fault}); the checkpoint before it is used", flush=True)
