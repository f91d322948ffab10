"""HTML pages of run directories. A page is one file, loads nothing from the network and runs nothing a model wrote.

stage.py, compare.py, sweep.py and rounds.py make the pages of a stage, of several runs, of a sweep and of rounds, each
from the template of the same name. figures.py makes the tables for pages, terminal, model cards and trackers.
`python -m rlhf_pipeline.report runs/demo` draws a run's pages again.
"""
