"""PPO (proximal policy optimisation) of a language model. The class names are those of TRL."""

from rlhf_pipeline.ppo.config import PPOConfig
from rlhf_pipeline.ppo.trainer import PPOTrainer

__all__ = ["PPOConfig", "PPOTrainer"]
