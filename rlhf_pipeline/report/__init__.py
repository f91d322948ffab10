"""Run directories as pages: one file each, which asks nothing of the network and runs nothing that a model wrote.

stage.py is a stage's page, compare.py that of several runs, sweep.py that of a sweep;
`python -m rlhf_pipeline.report runs/demo` draws anew.
"""

from rlhf_pipeline.report.compare import compare
from rlhf_pipeline.report.curves import Line, chart
from rlhf_pipeline.report.files import items, members, number, read
from rlhf_pipeline.report.markup import assemble, by_row, show, text, write_page
from rlhf_pipeline.report.stage import LivePage, write_report
from rlhf_pipeline.report.sweep import sweep_page
from rlhf_pipeline.report.words import LANGUAGES, Words

__all__ = [
    "LANGUAGES",
    "Line",
    "LivePage",
    "Words",
    "assemble",
    "by_row",
    "chart",
    "compare",
    "items",
    "members",
    "number",
    "read",
    "show",
    "sweep_page",
    "text",
    "write_page",
    "write_report",
]
