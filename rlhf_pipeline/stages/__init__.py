"""One file a stage; each has one `run(settings, out)`."""

import importlib

from rlhf_pipeline.report.trackers import ready
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Settings


def run(settings: Settings, out: RunDir) -> None:
    """Run a stage in its run directory."""
    ready(settings.trainer.get("report_to"))
    with out.trackers:
        importlib.import_module(f"rlhf_pipeline.stages.{settings.stage}").run(settings, out)
