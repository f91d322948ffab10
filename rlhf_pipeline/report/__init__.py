"""Run directories as pages: one file each, which loads nothing from the network and runs nothing that a model wrote.

stage.py makes a stage's page, compare.py that of several runs, sweep.py that of a sweep; each is a list of blocks
(page.py, charts.py, samples.py, evaluation.py), which templates/page.html turns into HTML.
`python -m rlhf_pipeline.report runs/demo` draws the pages of a run again.
"""

from rlhf_pipeline.report.charts import Line, chart, short
from rlhf_pipeline.report.compare import compare
from rlhf_pipeline.report.evaluation import evaluation_tables
from rlhf_pipeline.report.files import items, members, number, read
from rlhf_pipeline.report.page import Block, assemble, by_row, note, plain, show, write_page
from rlhf_pipeline.report.stage import LivePage, write_report
from rlhf_pipeline.report.sweep import sweep_page
from rlhf_pipeline.report.words import LANGUAGES, Words

__all__ = [
    "LANGUAGES", "Block", "Line", "LivePage", "Words", "assemble", "by_row", "chart", "compare", "evaluation_tables",
    "items", "members", "note", "number", "plain", "read", "short", "show", "sweep_page", "write_page",
    "write_report",
]  # fmt: skip
