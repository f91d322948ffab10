"""Checkpoint folders: sealed once they are whole, checked before they are used."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

from rlhf_pipeline.files import write_json

SEAL = "complete"  # the file that says what a whole checkpoint holds


def seal(folder: Path) -> None:
    """Note the size of every file once it is on the disk; from here on the folder counts as whole."""
    held = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        with path.open("r+b") as file:  # Windows syncs no file that is only read
            os.fsync(file.fileno())
        held[str(path.relative_to(folder))] = {"bytes": path.stat().st_size}
    write_json(folder / SEAL, held)


@contextmanager
def replacing(folder: Path) -> Iterator[Path]:
    """An empty hidden folder to fill, which then takes the place of `folder`; what is there goes when it stands."""
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
    """The step of `checkpoint-<step>`; -1 for another name."""
    number = folder.name.rpartition("-")[2]
    return int(number) if number.isdigit() else -1


def sealed(parent: Path) -> list[Path]:
    """The checkpoints below `parent` that were sealed, the oldest first."""
    there = [path for path in parent.glob("checkpoint-*") if step_of(path) >= 0 and (path / SEAL).exists()]
    return sorted(there, key=step_of)


def newest_whole(parent: Path) -> Path | None:
    """The newest checkpoint below `parent` that holds all it was sealed with. One that does not is named and left."""
    for folder in reversed(sealed(parent)):
        if (fault := fault_of(folder)) is None:
            return folder
        _say(folder, fault)
    return None


def drop_old(parent: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` whole checkpoints; None keeps all."""
    for old in sealed(parent)[: -max(keep, 1)] if keep else []:
        shutil.rmtree(old)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint that was sealed; of one that was not, nothing is known."""
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
