"""One file a stage; each has one `run(settings, out)`."""

import importlib

from rlhf_pipeline.rundir import RunDir
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.trackers import ready


def run(settings: Settings, out: RunDir) -> None:
    """Run a stage in its run directory."""
    ready(settings.trainer.get("report_to"))
    with out.trackers:
        importlib.import_module(f"rlhf_pipeline.stages.{settings.stage}").run(settings, out)
