"""Run directories as pages: one file each, which loads nothing from the network and runs nothing that a model wrote.

stage.py makes a stage's page, compare.py that of several runs, sweep.py and rounds.py those of a sweep and of rounds,
each from the template of its name. figures.py makes the tables that page, terminal, card and trackers show.
`python -m rlhf_pipeline.report runs/demo` draws the pages of a run again.
"""
