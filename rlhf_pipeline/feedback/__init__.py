"""Answers to compare, and the labels that people, or a reward in their place, give them.

candidates     several different answers to each prompt
labelling      labels from Label Studio, a file or a reward into the run
label_studio   tasks and labels between a run and Label Studio; the server on this machine
"""
