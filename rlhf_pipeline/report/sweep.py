"""The page of a sweep: its objective by settings, and its jobs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from rlhf_pipeline.report.charts import sweep_chart
from rlhf_pipeline.report.figures import sweep_figures
from rlhf_pipeline.report.files import as_dict, as_number, dicts_in
from rlhf_pipeline.report.page import write_page
from rlhf_pipeline.report.words import Words


def sweep_page(target: Path, found: Mapping[str, Any], words: Words) -> Path:
    """Write the page of a sweep; `found` is the content of sweep.json. Returns `target`."""
    rows, jobs = dicts_in(found.get("rows")), dicts_in(found.get("jobs"))
    names = [", ".join(f"{k}={v}" for k, v in as_dict(row.get("settings")).items()) or "all" for row in rows]
    failed = sum(job.get("status") == "failed" for job in jobs)
    notes = [words("{} of {} jobs failed.", failed, len(jobs))] if failed else []
    if rows and as_number(rows[0].get("over_budget")):
        notes.append(words("No settings keep within the KL budget; nearest: {}.", names[0]))
    return write_page(
        target, "sweep", words, title=f"{found.get('sweep')} · {found.get('stage')}", notes=notes, sweep=found,
        budget=as_number(found.get("kl_budget")), chart=sweep_chart(rows, words),
        rows=dict(zip(names, map(sweep_figures, rows), strict=True)),
        jobs=[job | {"link": quote(str(job["report"])) if job.get("report") else ""} for job in jobs],
    )  # fmt: skip
