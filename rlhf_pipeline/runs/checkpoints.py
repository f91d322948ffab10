"""Checkpoint folders: sealed once they are whole, checked before they are used."""

import json
import os
import shutil
from functools import lru_cache
from pathlib import Path

SEAL = "complete"  # the file that says what a whole checkpoint holds


def seal(folder: Path) -> None:
    """Note the size of every file once it is on the disk; from here on the folder counts as whole."""
    held = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != SEAL):
        with path.open("r+b") as file:  # Windows syncs no file that is only read
            os.fsync(file.fileno())
        held[str(path.relative_to(folder))] = {"bytes": path.stat().st_size}
    temporary = folder / f".{SEAL}"
    with temporary.open("w") as file:
        file.write(json.dumps(held, indent=1))
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, folder / SEAL)


def put_in_place(temporary: Path, folder: Path) -> None:
    """Rename a written folder to its name, in the place of what is there, which goes when the new one stands."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        os.replace(folder, old)
    os.replace(temporary, folder)
    shutil.rmtree(old, ignore_errors=True)


def give_way(old: Path, new: Path, begun: bool) -> None:
    """Delete old work that was moved aside where the new has begun; else put it back in its place."""
    if begun:
        shutil.rmtree(old)
    else:
        shutil.rmtree(new, ignore_errors=True)
        os.replace(old, new)
        print(f"{new} is as it was before", flush=True)


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
        fault = fault_of(folder)
        if fault is None:
            return folder
        _say(folder, fault)
    return None


def drop_old(parent: Path, keep: int | None) -> None:
    """Delete all but the newest `keep` whole checkpoints; None keeps all."""
    for old in sealed(parent)[: -max(keep, 1)] if keep else []:
        shutil.rmtree(old)


def drop_half_written(stage: Path) -> None:
    """Delete what was being written when the disk was full: nothing uses it, and the record of the run needs room."""
    for folder in (*stage.glob(".model.new"), *stage.glob("checkpoints/*checkpoint-*")):
        if not (folder / SEAL).exists():
            shutil.rmtree(folder, ignore_errors=True)


def fault_of(folder: Path) -> str | None:
    """What is wrong with a checkpoint that was sealed; of one that was not, nothing is known."""
    if not (folder / SEAL).exists():
        return None
    try:
        held = json.loads((folder / SEAL).read_text())
    except ValueError:
        return "its seal cannot be read"
    for name, expected in held.items():
        path = folder / name
        if not path.exists():
            return f"{name} is missing"
        if path.stat().st_size != expected["bytes"]:
            return f"{name} has {path.stat().st_size} bytes of {expected['bytes']}"
    return None


@lru_cache(maxsize=64)
def _say(folder: Path, fault: str) -> None:
    print(f"{folder} is damaged ({fault}); the checkpoint before it is used", flush=True)
