"""What a sweep came to: its jobs by the settings they share, over seeds; as a table, as sweep.json and as a page."""

import json
import math
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.files import write_json
from rlhf_pipeline.report import Words, sweep_page, write_page
from rlhf_pipeline.report.summary import command, say
from rlhf_pipeline.report.tables import sweep_table
from rlhf_pipeline.runs import models as made
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.sweeps.jobs import JOB, UNFINISHED, read_job

# What the objective of each stage is: always more is better, and of what was not trained on.
OBJECTIVES = {
    "pretrain": "minus the loss on held-out texts",
    "sft": "minus the loss on held-out texts",
    "reward": "accuracy on held-out rows",
    "ppo": "reward - selection_kl_coef x KL, on validation prompts",
    "evaluate": "mean reward of the last policy's answers to held-out prompts",
}
# And of PPO where no prompts are held back.
IN_TRAINING = "reward - selection_kl_coef x KL while training (no validation prompts)"
AT_BUDGET = "reward within the KL budget, on validation prompts"
_BY_REWARD = "judged by its reward alone, by an earlier version; overwrite=true runs it again"
_NEEDED = ("stage", "settings", "seed", "status")  # of a job


def report_sweep(folder: Path, stage: str, jobs: Collection[str], kl_budget: float | None = None) -> None:
    """Write `sweep.json` and `report.html` of a sweep, print its table, and say what may come next.

    Its folder may hold jobs of other commands, too; `jobs` are those of this one.
    """
    found = summarise(folder, stage, kl_budget)
    write_json(folder / "sweep.json", found)
    page = write_sweep(folder)
    sweep_table(found, jobs)
    print(f"{page} shows the sweep", flush=True)
    if made.ppo_jobs(folder):
        say("next", command("evaluate", str(folder.parent), sweep=folder.name))


def write_sweep(folder: Path, lang: str | None = None) -> Path:
    """Write `report.html` from what the jobs have left; by default in the language that the first was made in.

    Jobs are compared at the KL budget that `sweep.json` has.
    """
    try:
        kl_budget = json.loads((folder / "sweep.json").read_text(encoding="utf-8")).get("kl_budget")
    except (OSError, ValueError):
        kl_budget = None
    found = summarise(folder, kl_budget=kl_budget)
    first = next((RunDir(folder, job["job"], found["stage"]).config() for job in found["jobs"]), {})
    words = Words(lang or (first.get("report") or {}).get("lang") or "en")
    return write_page(folder / "report.html", sweep_page(found, words))


def judge(record: dict[str, Any], kl_budget: float | None) -> tuple[float | None, float]:
    """What a job is worth, and by how much its KL is over the budget.

    Without a budget it is worth its objective, with one the reward on the same prompts.
    """
    objective, results = _finite(record.get("objective")), record.get("results", {})
    if objective is None or kl_budget is None:
        return objective, 0.0
    reward = results.get("validation_reward", results.get("scores"))
    kl = results.get("validation_kl", results.get("kl", math.inf))
    return _finite(reward), max(kl - kl_budget, 0.0)


def summarise(folder: Path, stage: str | None = None, kl_budget: float | None = None) -> dict[str, Any]:
    """A sweep's jobs and, over seeds, their groups, the best first; what is over a KL budget comes last, nearest first.

    Only jobs of one stage compare; without one, that of the job that was begun last. A group shares all that its
    commands say but the seed, and is shown by what not all groups share. A seed counts once.
    """
    found = {path.parent.name: read_job(path.parent) for path in sorted(folder.glob(f"*/{JOB}"))}
    known = {name: job for name, job in found.items() if {*_NEEDED} <= {*job}}  # else its file is damaged
    if stage is None:
        newest = max(known, key=lambda name: (folder / name / JOB).stat().st_mtime, default=None)
        stage = str(known[newest]["stage"]) if newest else ""
    jobs = [_job(folder, name, stage, job, kl_budget) for name, job in known.items() if job["stage"] == stage]
    jobs.sort(key=_place)
    groups: dict[frozenset[tuple[str, str]], dict[int, dict[str, Any]]] = {}
    for job in sorted(jobs, key=lambda job: (job["objective"] is None, job["job"])):  # of a seed, one that is done
        groups.setdefault(frozenset(job["settings"].items()), {}).setdefault(job["seed"], job)
    every = [(dict(group), list(own.values())) for group, own in groups.items()]
    apart = [key for key in dict.fromkeys(key for job in jobs for key in job["settings"])
             if len({settings.get(key) for settings, _ in every}) > 1]  # fmt: skip
    rows = [_row({key: settings.get(key, "default") for key in apart}, own) for settings, own in every]
    rows.sort(key=_place)
    objective = OBJECTIVES.get(stage) if kl_budget is None else AT_BUDGET
    done = [job for job in jobs if job["objective"] is not None]
    if objective == OBJECTIVES["ppo"] and done and not any("validation_reward" in job["results"] for job in done):
        objective = IN_TRAINING
    about = {"sweep": folder.name, "stage": stage, "objective": objective, "kl_budget": kl_budget}
    return {**about, "rows": rows, "jobs": jobs}


def _place(row: dict[str, Any]) -> tuple[bool, float, float]:
    return row["objective"] is None, row["over_budget"], -(row["objective"] or 0.0)


def _job(folder: Path, name: str, stage: str, known: dict[str, Any], kl_budget: float | None) -> dict[str, Any]:
    """What is known of a job. That a stage is done says nothing of a job that failed: it may be of another command."""
    out = RunDir(folder, name, stage).newest_round()
    record, page = out.record, out.path / "report.html"
    done = known["status"] == record.get("status") == "done"
    results = record.get("results", {}) if done else {}
    objective, over_budget = judge(record, kl_budget) if done else (None, 0.0)
    error = known.get("error")
    if "held_out_reward" in results:
        objective, error = None, _BY_REWARD
    return {
        "job": name,
        "settings": known["settings"],
        "seed": known["seed"],
        "status": known["status"],
        "objective": objective,
        "over_budget": over_budget,
        "seconds": record.get("seconds"),
        "results": {key: x for key, x in results.items() if isinstance(x, float) and math.isfinite(x)},
        "error": error,
        "report": str(page.relative_to(folder)) if page.exists() else None,
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _row(settings: dict[str, str], jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The jobs that differ in their seed alone; of one there is no standard error."""
    from rlhf_pipeline.evaluation.metrics import standard_error  # with it `evaluate` loads

    done = [job for job in jobs if job["objective"] is not None]
    values = [job["objective"] for job in done]
    keys = dict.fromkeys(key for job in done for key in job["results"])
    return {
        "settings": settings,
        "objective": _mean(values),
        "over_budget": max((job["over_budget"] for job in done), default=0.0),
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
