"""The jobs of a sweep: what each is called, a process of its own for it, and what became of it.

A job is the run `runs/<sweep>/<job>`; its job.json holds what the stages' run.json cannot: what sets the job apart,
and how it ended where no stage had begun.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.atomic import write_json
from rlhf_pipeline.rundir import RunDir

JOB = "job.json"
_ENVIRONMENT = "RLHF_PIPELINE_JOB"  # names the job's folder to the job's process
_LONGEST = 120  # characters of a folder's name
UNFINISHED = ("waiting", "running")


def job_name(swept: Sequence[str], number: int) -> str:
    """The folder of a job by the settings that set it apart, as they are typed; by its number where they are many."""
    label = ",".join(re.sub(r"[^\w.=+-]", "_", setting) for setting in swept)
    return label if 0 < len(label) <= _LONGEST else f"job{number}"


def note(folder: Path, **values: Any) -> dict[str, Any]:
    """Add to what is known of a job; give all of it."""
    known = {**read_job(folder), **values}
    write_json(folder / JOB, known)
    return known


def read_job(folder: Path) -> dict[str, Any]:
    """What is known of a job, empty where nothing is."""
    path = folder / JOB
    return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}


def note_error(message: str) -> None:
    """Keep why a command was refused, where it is a job's."""
    if folder := os.environ.get(_ENVIRONMENT):
        note(Path(folder), error=message)


def run_job(runs: Path, name: str, stage: str, command: Sequence[str]) -> float | None:
    """Run a job's command in a process of its own; give its objective, None where it failed.

    Of its own, wherever this runs: two trainers in one process would share their state, and one that is killed could
    not say so.
    """
    folder = runs / name
    print(f"\n== {name}", flush=True)
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
    if code == 0:
        note(folder, status="done", exit=0)
        return out.objective()
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
    if known.get("status") in UNFINISHED:
        began = known["status"] == "running"
        what = "killed from outside (time limit, memory, cancelled)" if began else "never began"
        where = known.get("log") or folder.parent / ".submitit"
        note(folder, status="failed", exit=1, error=f"{what}; its output is in {where}")
