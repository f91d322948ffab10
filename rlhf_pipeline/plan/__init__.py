"""What PPO takes before it is run: parameters, memory by part, FLOPs, seconds; computed, nothing is loaded or trained.

networks.py counts on tensors without storage, memory.py and cost.py are arithmetic on these counts.
"""
