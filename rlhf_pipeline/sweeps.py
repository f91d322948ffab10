"""What a sweep came to: its jobs by the settings they share, over seeds; as a table, as sweep.json and as a page."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline import made
from rlhf_pipeline.atomic import write_json
from rlhf_pipeline.jobs import JOB, UNFINISHED, read_job
from rlhf_pipeline.report import Words, sweep_page, write_page
from rlhf_pipeline.rundir import RunDir
from rlhf_pipeline.summary import command, say
from rlhf_pipeline.tables import sweep_table

# What the objective of each stage is: always more is better, and of what was not trained on.
OBJECTIVES = {
    "pretrain": "minus the loss on held-out texts",
    "sft": "minus the loss on held-out texts",
    "reward": "accuracy on held-out rows",
    "ppo": "mean reward of answers to held-out prompts",
    "evaluate": "mean reward of the last policy's answers to held-out prompts",
}
# And of PPO where no prompts are held out.
IN_TRAINING = "mean reward while training (no held-out prompts)"
_NEEDED = ("stage", "settings", "seed", "status")  # of a job


def report_sweep(folder: Path, stage: str, jobs: Collection[str]) -> None:
    """Write `sweep.json` and `report.html` of a sweep, print its table, and say what may come next.

    Its folder may hold jobs of other commands, too; `jobs` are those of this one.
    """
    found = summarise(folder, stage)
    write_json(folder / "sweep.json", found)
    page = write_sweep(folder)
    sweep_table(found, jobs)
    print(f"{page} shows the sweep", flush=True)
    if made.ppo_jobs(folder):
        say("next", command("evaluate", str(folder.parent), sweep=folder.name))


def write_sweep(folder: Path, lang: str | None = None) -> Path:
    """Write `report.html` from what the jobs have left; by default in the language that the first was made in."""
    found = summarise(folder)
    first = next((RunDir(folder, job["job"], found["stage"]).config() for job in found["jobs"]), {})
    words = Words(lang or (first.get("report") or {}).get("lang") or "en")
    return write_page(folder / "report.html", sweep_page(found, words))


def summarise(folder: Path, stage: str | None = None) -> dict[str, Any]:
    """A sweep's jobs and, over seeds, their groups, the best objective first.

    Only jobs of one stage compare; without one, that of the job that was begun last. A group shares all that its
    commands say but the seed, and is shown by what not all groups share. A seed counts once.
    """
    found = {path.parent.name: read_job(path.parent) for path in sorted(folder.glob(f"*/{JOB}"))}
    known = {name: job for name, job in found.items() if {*_NEEDED} <= {*job}}  # else its file is damaged
    if stage is None:
        newest = max(known, key=lambda name: (folder / name / JOB).stat().st_mtime, default=None)
        stage = str(known[newest]["stage"]) if newest else ""
    jobs = [_job(folder, name, stage, job) for name, job in known.items() if job["stage"] == stage]
    jobs.sort(key=lambda job: (job["objective"] is None, -(job["objective"] or 0.0)))
    groups: dict[frozenset[tuple[str, str]], dict[int, dict[str, Any]]] = {}
    for job in sorted(jobs, key=lambda job: (job["objective"] is None, job["job"])):  # of a seed, one that is done
        groups.setdefault(frozenset(job["settings"].items()), {}).setdefault(job["seed"], job)
    every = [(dict(group), list(own.values())) for group, own in groups.items()]
    apart = [key for key in dict.fromkeys(key for job in jobs for key in job["settings"])
             if len({settings.get(key) for settings, _ in every}) > 1]  # fmt: skip
    rows = [_row({key: settings.get(key, "default") for key in apart}, own) for settings, own in every]
    rows.sort(key=lambda row: (row["objective"] is None, -(row["objective"] or 0.0)))
    objective = OBJECTIVES.get(stage)
    done = [job for job in jobs if job["objective"] is not None]
    if stage == "ppo" and done and not any("held_out_reward" in job["results"] for job in done):
        objective = IN_TRAINING
    return {"sweep": folder.name, "stage": stage, "objective": objective, "rows": rows, "jobs": jobs}


def _job(folder: Path, name: str, stage: str, known: dict[str, Any]) -> dict[str, Any]:
    """What is known of a job. That a stage is done says nothing of a job that failed: it may be of another command."""
    out = RunDir(folder, name, stage).newest_round()
    record, page = out.record, out.path / "report.html"
    done = known["status"] == record.get("status") == "done"
    results = record.get("results", {}) if done else {}
    return {
        "job": name,
        "settings": known["settings"],
        "seed": known["seed"],
        "status": known["status"],
        "objective": _finite(record.get("objective")) if done else None,
        "seconds": record.get("seconds"),
        "results": {key: x for key, x in results.items() if isinstance(x, float) and math.isfinite(x)},
        "error": known.get("error"),
        "report": str(page.relative_to(folder)) if page.exists() else None,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _row(settings: dict[str, str], jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The jobs that differ in their seed alone; of one there is no standard error."""
    from rlhf_pipeline.metrics import standard_error  # with it `evaluate` loads

    done = [job for job in jobs if job["objective"] is not None]
    values = [job["objective"] for job in done]
    keys = dict.fromkeys(key for job in done for key in job["results"])
    return {
        "settings": settings,
        "objective": _mean(values),
        "stderr": standard_error(values) if len(values) > 1 else None,
        "seeds": len(values),
        "failed": sum(job["status"] == "failed" for job in jobs),
        "left": sum(job["status"] in (*UNFINISHED, "interrupted") for job in jobs),
        "values": values,
        "results": {key: _mean([job["results"][key] for job in done if key in job["results"]]) for key in keys},
        "seconds": _mean([job["seconds"] for job in done]),
    }


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
