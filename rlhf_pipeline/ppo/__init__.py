"""Proximal policy optimisation of a language model: TRL's PPOTrainer, with a loop of our own."""

from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
