"""The provenance of a run: hashes of its parents, versions, hardware, git state."""

import hashlib
import os
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from rlhf_pipeline.progress import parts

_PACKAGES = ("rlhf_pipeline", "torch", "transformers", "trl", "accelerate", "datasets", "peft", "tokenizers")


def content_hash(folder: Path) -> str:
    """Return the SHA-256 over the names and bytes of a folder's files, except the top README.md.

    The README.md is the model card. stage=evaluate and people rewrite it, which does not change the model.
    """
    digest = hashlib.sha256()
    files = sorted(p for p in folder.rglob("*") if p.is_file() and p != folder / "README.md")
    for (path,) in parts(files, 1, "hash", "file"):
        digest.update(str(path.relative_to(folder)).encode() + b"\0" + bytes.fromhex(file_hash(path)))
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def parent(where: str) -> dict[str, str | None]:
    """Return path and hash of a parent: a folder, a file or a function in a file. A hub id has the hash None."""
    folder, source = Path(where), Path(where.rpartition(":")[0] or where)  # my_rewards.py:enthusiasm
    if source.is_file():
        return {"path": where, "sha256": file_hash(source)}
    return {"path": where, "sha256": content_hash(folder) if folder.is_dir() else None}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the main packages."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def hardware() -> dict[str, Any]:
    """Return the hardware of this process."""
    import torch

    info = Path("/proc/cpuinfo")
    named = re.search(r"^model name\s*: *(.+)$", info.read_text() if info.exists() else "", re.MULTILINE)
    cpu = named[1] if named else platform.processor() or platform.machine()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"cpu": cpu, "cores": os.cpu_count(), "threads": torch.get_num_threads(), "gpu": gpu, "os": sys.platform}


def git() -> dict[str, Any] | None:
    """Return commit and dirty flag of this checkout; None outside a git checkout."""
    here = Path(__file__).parents[2]
    if not (here / ".git").exists():
        return None
    run = [["git", "-C", str(here), "rev-parse", "HEAD"], ["git", "-C", str(here), "status", "--porcelain"]]
    try:
        commit, status = (subprocess.run(c, capture_output=True, text=True, check=True).stdout.strip() for c in run)
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"commit": commit, "dirty": bool(status)}
