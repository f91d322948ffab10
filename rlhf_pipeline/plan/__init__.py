"""What PPO takes before it is run: parameters, memory, FLOPs, seconds, within some 15 %; no weights are loaded.

`needs` counts the networks and does the arithmetic, with the data sheets of `devices`.
"""
