"""Read a run directory. Damaged or missing files give empty values, so that a page can always be made."""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml


def stages_below(folder: Path) -> list[Path]:
    """Return all stage folders of a run, including its rounds and a sweep's jobs. Symbolic links are not followed."""
    if (folder / "run.json").is_file():
        return [folder]
    inside = (path for path in sorted(folder.glob("[!.]*")) if path.is_dir() and not path.is_symlink())
    return [stage for path in inside for stage in stages_below(path)]


def as_number(value: object) -> float | None:
    """Return a JSON number as a float (infinity if it is too large), or None for anything else."""
    try:
        return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None
    except OverflowError:
        return math.inf


def finite(value: object) -> float | None:
    """Return a finite JSON number as a float, or None for anything else."""
    number = as_number(value)
    return number if number is not None and math.isfinite(number) else None


def as_dict(value: object) -> dict[str, Any]:
    """Return the value if it is a dict, else an empty dict."""
    return value if isinstance(value, dict) else {}


def dicts_in(value: object) -> list[dict[str, Any]]:
    """Return the dicts in a list; [] if the value is not a list."""
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def columns(rows: Iterable[object]) -> list[str]:
    """Return the keys that have a value in any row, in the order in which keys first appear."""
    known = list(map(as_dict, rows))
    keys = dict.fromkeys(key for row in known for key in row)
    return [key for key in keys if any(row.get(key) is not None for row in known)]


def read_objects(path: Path, notes: list[str]) -> list[dict[str, Any]]:
    """Return the JSON objects of a file (one per line in .jsonl). Unreadable ones are counted in `notes`."""
    text = path.read_bytes().decode("utf-8-sig", "replace") if path.is_file() else ""
    pieces = [piece for piece in (text.split("\n") if path.suffix == ".jsonl" else [text]) if piece.strip()]
    rows: list[dict[str, Any]] = []
    for piece in pieces:
        with contextlib.suppress(ValueError, RecursionError):
            rows += dicts_in([json.loads(piece)])
    if len(rows) < len(pieces):
        notes.append(f"{path.name}: {len(pieces) - len(rows)} of {len(pieces)} JSON objects could not be read.")
    return rows


def read_object(path: Path, notes: list[str] | None = None) -> dict[str, Any]:
    """Return the first JSON object of a file, or an empty dict."""
    return (read_objects(path, [] if notes is None else notes) or [{}])[0]


def read_config(folder: Path) -> dict[str, Any]:
    """Return a stage's config.yaml, or an empty dict if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
        return as_dict(yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8")))
    return {}


def flatten(value: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield nested settings as pairs of dotted name and value."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from flatten(inner, f"{prefix}.{key}".lstrip("."))
    else:
        yield prefix, value
