"""What ours inherit from. TRL to 1.12 has a PPO of its own: ours are subclasses of it there, so that `isinstance` holds
in scripts that were written for it. Later TRL has none, and nothing of it is needed."""

import warnings

try:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it is experimental is no news to whoever asked for ours
        from trl.experimental.ppo import PPOConfig as ParentConfig
        from trl.experimental.ppo import PPOTrainer as ParentTrainer
except ModuleNotFoundError:
    from transformers import Trainer as ParentTrainer
    from transformers import TrainingArguments as ParentConfig

__all__ = ["ParentConfig", "ParentTrainer"]
