"""What a run directory holds, read as far as it can be: whatever a file has in it, a page can be made of it."""

import contextlib
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

_NO_STAGES = ("checkpoints", "model")  # of what lies in a run's folders
PARTS = 64  # places that a log too long to be read whole is read at


def stages_below(folder: Path) -> list[Path]:
    """Every stage's folder of a run, also those of its rounds or of a sweep's jobs."""
    if (folder / "run.json").is_file():
        return [folder]
    inside = sorted(path for path in folder.glob("[!.]*") if path.is_dir() and path.name not in _NO_STAGES)
    return [stage for path in inside for stage in stages_below(path)]


def number(value: object) -> float | None:
    """The float of a JSON number, infinite where it is too large for one, and None for anything else."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return math.inf


def members(value: object) -> dict[str, Any]:
    """The object itself, or an empty one where a file holds something else."""
    return value if isinstance(value, dict) else {}


def items(value: object) -> list[dict[str, Any]]:
    """The objects in a list, whatever else the file holds there."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def read(path: Path, notes: list[str], most: int | None = None) -> list[dict[str, Any]]:
    """The JSON objects of a file, one a line where it is .jsonl; what cannot be read is counted in the notes.

    Of a log with more than `most` bytes, only so many are read, in whole lines from all over it.
    """
    content = b"" if not path.is_file() else path.read_bytes() if most is None else _spread(path, most)
    text = content.decode("utf-8-sig", "replace")
    pieces = [piece for piece in (text.split("\n") if path.suffix == ".jsonl" else [text]) if piece.strip()]
    rows: list[dict[str, Any]] = []
    for piece in pieces:
        with contextlib.suppress(ValueError, RecursionError):
            rows += items([json.loads(piece)])
    if len(rows) < len(pieces):
        notes.append(f"{path.name}: {len(pieces) - len(rows)} of {len(pieces)} JSON objects could not be read.")
    return rows


def _spread(path: Path, most: int) -> bytes:
    size, part = path.stat().st_size, most // PARTS
    if size <= most:
        return path.read_bytes()
    found, last = [], size - part
    with path.open("rb") as file:
        for start in (last * place // (PARTS - 1) for place in range(PARTS)):
            file.seek(start)
            block = file.read(part)
            begin = 0 if not start else block.find(b"\n") + 1 or part  # the first line, but for the very first, is cut
            found.append(block[begin:] if start == last else block[begin : block.rfind(b"\n") + 1])
    return b"".join(found)


def only(path: Path, notes: list[str]) -> dict[str, Any]:
    """The one object of a file, empty where there is none."""
    return (read(path, notes) or [{}])[0]


def config(folder: Path) -> dict[str, Any]:
    """What a stage was asked to do: its config.yaml, empty where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        return members(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    return {}


def flat(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Nested settings as pairs of a dotted name and a value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flat(inner, f"{prefix}.{key}".lstrip("."))
    else:
        yield prefix, value
