"""Sample answers to compare, and collect their labels from people or from a reward.

candidates     several different answers to each prompt
labelling      labels from Label Studio, a file or a reward
label_studio   exchange of tasks and labels with Label Studio; the server on this machine
"""
