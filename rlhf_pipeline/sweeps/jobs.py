"""The jobs of a sweep: what each is called, a process of its own for it, and what became of it.

A job is the run `runs/<sweep>/<job>`; its job.json holds what the stages' run.json cannot: what sets the job apart,
and how it ended where no stage had begun.
"""

import contextlib
import hashlib
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import held, write_json
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.words import as_typed

JOB = "job.json"
_LOCK = ".job.lock"  # held while the job is run
_ENVIRONMENT = "RLHF_PIPELINE_JOB"  # names the job's folder to the job's process
_LONGEST = 200  # bytes of a folder's name; file systems take 255
# Of a command, what says nothing of the work: where, by what, how often it is done, and how it is shown.
_NOT_WORK = re.compile(r"name|runs|seed|overwrite|hydra[./].*|report[.].*")
UNFINISHED = ("waiting", "running")


def job_name(swept: Sequence[str]) -> str:
    """The folder of a job by the settings that set it apart, as they are typed.

    Where a folder cannot be called so, a hash of them tells it from what else would be called the same.
    """
    if not swept:
        return "job0"
    typed = ",".join(swept)
    label = re.sub(r"[^\w.,=+-]", "_", typed)
    if label != typed:
        label += f"-{_hash(typed)}"
    return label if len(label.encode()) <= _LONGEST else f"job-{_hash(typed)}"


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def settings_of(command: Sequence[str]) -> dict[str, str]:
    """What a command says of its work: jobs that share it differ in their seed alone."""
    typed = ("experiment=null" if word == "~experiment" else as_typed(word) for word in command)
    said = dict(word.lstrip("+").partition("=")[::2] for word in typed)
    return {key: value for key, value in said.items() if not _NOT_WORK.fullmatch(key)}


def is_number(objective: float | None) -> bool:
    """Whether an objective can be compared; some stages have none."""
    return objective is None or math.isfinite(objective)


def note(folder: Path, **values: Any) -> dict[str, Any]:
    """Add to what is known of a job; give all of it."""
    known = {**read_job(folder), **values}
    write_json(folder / JOB, known)
    return known


def read_job(folder: Path) -> dict[str, Any]:
    """What is known of a job; empty where nothing is, or the file is damaged."""
    try:
        known = json.loads((folder / JOB).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def at_work(folder: Path) -> bool:
    """Whether another process runs the job at this moment."""
    if not (folder / _LOCK).exists():
        return False
    try:
        with held(folder / _LOCK, folder):
            return False
    except UserError:
        return True


def note_error(message: str) -> None:
    """Keep why a command was refused, where it is a job's."""
    if folder := os.environ.get(_ENVIRONMENT):
        with contextlib.suppress(OSError):  # as where the disk is full
            note(Path(folder), error=message)


def run_job(runs: Path, name: str, stage: str, command: Sequence[str]) -> float | None:
    """Run a job's command in a process of its own; give its objective, None where it failed.

    Of its own, wherever this runs: two trainers in one process would share their state, and one that is killed could
    not say so.
    """
    folder = runs / name
    print(f"\n== {name}", flush=True)
    try:
        with held(folder / _LOCK, folder):
            return _run(runs, name, stage, command)
    except UserError as error:  # what becomes of it is the other's to say
        print(error, flush=True)
        return None


def _run(runs: Path, name: str, stage: str, command: Sequence[str]) -> float | None:
    folder = runs / name
    note(folder, status="running", error=None, log=_log())
    with subprocess.Popen(
        [sys.executable, "-m", "rlhf_pipeline", *command], env={**os.environ, _ENVIRONMENT: str(folder)}
    ) as process:
        try:
            code = process.wait()
        except KeyboardInterrupt:  # it has been interrupted, too, and says where it was
            process.wait()
            code = 130
    if code in (130, -2):
        note(folder, status="interrupted")
        raise KeyboardInterrupt
    out = RunDir(runs, name, stage).newest_round()
    objective = out.objective()
    if code == 0 and not is_number(objective):
        note(folder, status="failed", exit=1, error=f"the objective is {objective}; overwrite=true makes it anew")
        return None
    if code == 0:
        note(folder, status="done", exit=0)
        return objective
    why = read_job(folder).get("error") or out.record.get("error") or f"exit status {code}"
    note(folder, status="failed", exit=code, error=why if code > 0 else f"killed by signal {-code}")
    return None


def _log() -> str | None:
    """Where the output of this process goes, where submitit started it."""
    if "SUBMITIT_FOLDER" not in os.environ:
        return None
    from submitit import JobEnvironment

    return str(JobEnvironment().paths.stdout)


def note_lost(folder: Path) -> None:
    """Say of a job that ought to have ended, and did not say how, that it was killed."""
    known = read_job(folder)
    if known.get("status") in UNFINISHED and not at_work(folder):
        began = known["status"] == "running"
        what = "killed from outside (time limit, memory, cancelled)" if began else "never began"
        where = known.get("log") or folder.parent / ".submitit"
        note(folder, status="failed", exit=1, error=f"{what}; its output is in {where}")
