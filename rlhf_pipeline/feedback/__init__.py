"""Answers to compare, and the labels that people, or a reward in their place, give them.

candidates     several different answers to each prompt
labelling      tasks and sheets for people; labels from Label Studio or a file into the run
label_studio   a run's tasks in Label Studio, there and back: client (REST), server (our own), page (what people see)
labeler        a reward that labels in the place of people
"""
