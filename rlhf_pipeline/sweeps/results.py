"""The results of a sweep: its jobs and their means over seeds, as a table, as sweep.json and as a page."""

import math
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from rlhf_pipeline.files import read_json, write_json
from rlhf_pipeline.report.files import as_dict, read_config
from rlhf_pipeline.report.summary import command, print_line
from rlhf_pipeline.report.sweep import sweep_page
from rlhf_pipeline.report.tables import sweep_table
from rlhf_pipeline.report.words import Words
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.models import ppo_jobs
from rlhf_pipeline.stages import STAGES, Stage
from rlhf_pipeline.sweeps.jobs import JOB, read_job

# The objective of PPO without validation prompts, and of a sweep with sweep.kl_budget=.
IN_TRAINING = "reward - selection_kl_coef x KL while training (no validation prompts)"
AT_BUDGET = "reward within the KL budget, on validation prompts"


def report_sweep(folder: Path, stage: str, jobs: Collection[str], kl_budget: float | None = None) -> None:
    """Write `sweep.json` and `report.html` of a sweep, print its table and the next command.

    Its folder may also have jobs of other commands; `jobs` are those of this command.
    """
    found = summarise(folder, stage, kl_budget)
    write_json(folder / "sweep.json", found)
    page = write_sweep(folder)
    sweep_table(found, jobs)
    print(f"{page} shows the sweep", flush=True)
    if ppo_jobs(folder):
        print_line("next", command("evaluate", str(folder.parent), sweep=folder.name))


def write_sweep(folder: Path, lang: str | None = None) -> Path:
    """Write `report.html` from the current state of the jobs, for the stage and the KL budget of `sweep.json`.

    The default language is that of a job's own page.
    """
    before = read_json(folder / "sweep.json")
    noted = [read_job(path.parent) for path in sorted(folder.glob(f"*/{JOB}"))]
    stage = before.get("stage") or next((job["stage"] for job in noted if "stage" in job), "")
    found = summarise(folder, stage, before.get("kl_budget"))
    own = read_config(folder / found["jobs"][0]["job"] / stage) if found["jobs"] else {}
    return sweep_page(folder / "report.html", found, Words(lang or as_dict(own.get("report")).get("lang")))


def summarise(folder: Path, stage: str, kl_budget: float | None = None) -> dict[str, Any]:
    """Return the jobs of one stage, and their groups over seeds, both with the best first.

    The jobs of a group share all settings but the seed. A group shows the settings that not all groups share. If all
    exceed the KL budget, the nearest to it comes first.
    """
    noted = {path.parent: read_job(path.parent) for path in folder.glob(f"*/{JOB}")}
    jobs = sorted((job_result(path, kl_budget) for path, job in noted.items() if job.get("stage") == stage), key=_order)
    groups: dict[frozenset[tuple[str, str]], dict[int, dict[str, Any]]] = {}
    for job in jobs:  # a seed counts once; a finished job comes first
        groups.setdefault(frozenset(job["settings"].items()), {}).setdefault(job["seed"], job)
    keys = dict.fromkeys(key for job in jobs for key in job["settings"])
    apart = [key for key in keys if len({dict(group).get(key) for group in groups}) > 1]
    rows = [{"settings": {key: dict(group).get(key, "default") for key in apart}, **_means([*own.values()])}
            for group, own in groups.items()]  # fmt: skip
    objective = (STAGES.get(stage, Stage()).objective or None) if kl_budget is None else AT_BUDGET
    done = [job["results"] for job in jobs if job["objective"] is not None]
    if stage == "ppo" and kl_budget is None and done and not any("validation_reward" in results for results in done):
        objective = IN_TRAINING
    about = {"sweep": folder.name, "stage": stage, "objective": objective, "kl_budget": kl_budget}
    return {**about, "rows": sorted(rows, key=_order), "jobs": jobs}


def _order(row: dict[str, Any]) -> tuple[bool, float, float, str]:
    return row["objective"] is None, row["over_budget"], -(row["objective"] or 0.0), row.get("job", "")


def job_result(folder: Path, kl_budget: float | None) -> dict[str, Any]:
    """Return a job's entry in sweep.json. With a KL budget, its objective is the reward on the same prompts.

    A job that failed has no result, even if another command has finished the stage in its folder.
    """
    noted = read_job(folder)
    out = RunDir(folder.parent, folder.name, noted["stage"]).newest_round()
    record, page = out.record, out.path / "report.html"
    done = noted["status"] == record.get("status") == "done"
    results = record.get("results", {}) if done else {}
    objective, over_budget = record.get("objective") if done else None, 0.0
    if objective is not None and kl_budget is not None:  # values from training if there are no validation prompts
        objective = results.get("validation_reward", results.get("scores"))
        over_budget = max(results.get("validation_kl", results.get("kl", math.inf)) - kl_budget, 0.0)
    return {
        **{key: noted[key] for key in ("settings", "seed", "status", "error")}, "job": folder.name,
        "objective": objective, "over_budget": over_budget, "seconds": record.get("seconds"),
        "results": {key: x for key, x in results.items() if isinstance(x, float) and math.isfinite(x)},
        "report": str(page.relative_to(folder.parent)) if page.exists() else None,
    }  # fmt: skip


def _means(jobs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the means of jobs that differ only in the seed; a single job has no standard error."""
    done = [job for job in jobs if job["objective"] is not None]
    values, ended = [job["objective"] for job in done], [job["status"] for job in jobs]
    keys = dict.fromkeys(key for job in done for key in job["results"])
    return {
        "objective": fmean(values) if done else None, "values": values, "seeds": len(values),
        "stderr": stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None,
        "over_budget": max((job["over_budget"] for job in done), default=0.0),
        "failed": ended.count("failed"), "left": ended.count("waiting") + ended.count("interrupted"),
        "results": {key: fmean(job["results"][key] for job in done if key in job["results"]) for key in keys},
        "seconds": fmean(job["seconds"] for job in done) if done else None,
    }  # fmt: skip
