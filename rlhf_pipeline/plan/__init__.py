"""What PPO takes before it is run: parameters, memory by part, FLOPs, seconds; nothing is loaded or trained.

`networks` counts a model on tensors without storage, `launches` is arithmetic on these counts and on the data sheets of
`devices`.
"""
