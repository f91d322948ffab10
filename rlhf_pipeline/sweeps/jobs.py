"""The jobs of a sweep: each is the run `runs/<sweep>/<job>`, in a separate process.

Its job.json has what identifies it (stage, settings, seed) and how it ended (status, exit, error).
"""

import contextlib
import hashlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline import progress
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import read_json, write_json
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import LONGEST_NAME
from rlhf_pipeline.words import as_user_types

JOB = "job.json"
# Settings that do not change a job's result, and the seed, over which results are averaged.
_NOT_WORK = re.compile(r"name|runs|seed|overwrite|hydra[./].*|report[.].*")


def job_name(swept: Sequence[str]) -> str:
    """Return a job's folder: the settings that are swept, with a hash if they are not a valid folder name."""
    typed = ",".join(swept)
    label = re.sub(r"[^\w.,=+-]", "_", typed)
    mark = hashlib.sha256(typed.encode()).hexdigest()[:8]
    label = label if label == typed else f"{label}-{mark}"
    return (label or "job0") if len(label.encode()) <= LONGEST_NAME else f"job-{mark}"


def result_settings(command: Sequence[str]) -> dict[str, str]:
    """Return the settings that determine a command's result; jobs that share them differ only in the seed."""
    typed = ("experiment=null" if word == "~experiment" else as_user_types(word) for word in command)
    settings = dict(word.lstrip("+").partition("=")[::2] for word in typed)
    return {key: value for key, value in settings.items() if not _NOT_WORK.fullmatch(key)}


def is_number(objective: float | None) -> bool:
    """Whether an objective can be compared; some stages have none."""
    return objective is None or math.isfinite(objective)


def read_job(folder: Path) -> dict[str, Any]:
    """Read a job's job.json; empty if it is missing or damaged."""
    with contextlib.suppress(UserError):
        return read_json(folder / JOB)
    return {}


def update_job(folder: Path, **values: Any) -> None:
    """Add values to the job.json of a job."""
    write_json(folder / JOB, {**read_job(folder), **values})


def record_error(message: str) -> None:
    """Add the message to job.json, if this process is a job's."""
    if folder := os.environ.get(progress.JOB):
        with contextlib.suppress(OSError):  # as when the disk is full
            update_job(Path(folder), error=message)


def run_job(runs: Path, name: str, stage: str, command: Sequence[str]) -> float | None:
    """Run a job's command in a new process and return its objective, or None if it failed.

    In one process, trainers would share accelerate's state, and nothing could report a job that was killed.
    """
    folder = runs / name
    print(f"\n== {name}", flush=True)
    update_job(folder, error=None)
    words = [sys.executable, "-m", "rlhf_pipeline", *command]
    with subprocess.Popen(words, env={**os.environ, progress.JOB: str(folder)}) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # the job's process gets it too
            process.wait()
            code = 130
    if code in (130, -2):
        update_job(folder, status="interrupted")
        raise KeyboardInterrupt
    out = RunDir(runs, name, stage).newest_round()
    objective = out.objective()
    if code == 0 and is_number(objective):
        update_job(folder, status="done", exit=0)
        return objective
    error = read_job(folder).get("error") or out.record.get("error") or f"exit status {code}"
    if code <= 0:
        error = f"killed by signal {-code}" if code else f"the objective is {objective}; overwrite=true runs it again"
    update_job(folder, status="failed", exit=code or 1, error=error)
    return None
