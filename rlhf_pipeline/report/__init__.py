"""Run directories as pages: one file each, which loads nothing from the network and runs nothing that a model wrote.

stage.py makes a stage's page, compare.py that of several runs, sweep.py and rounds.py those of a sweep and of rounds,
each from the template of its name. figures.py makes the tables that page, terminal, card and trackers show.
`python -m rlhf_pipeline.report runs/demo` draws the pages of a run again.
"""

from rlhf_pipeline.report.compare import compare
from rlhf_pipeline.report.observers import LivePage
from rlhf_pipeline.report.page import write_page
from rlhf_pipeline.report.stage import write_report
from rlhf_pipeline.report.sweep import sweep_page
from rlhf_pipeline.report.words import LANGUAGES, Words

__all__ = ["LANGUAGES", "LivePage", "Words", "compare", "sweep_page", "write_page", "write_report"]
