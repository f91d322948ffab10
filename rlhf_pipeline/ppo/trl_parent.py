"""The base classes of our PPOConfig and PPOTrainer. Up to TRL 1.12 they are TRL's, so that `isinstance` works in
scripts written for TRL. Later versions of TRL have no PPO; the base classes are then those of transformers."""

import importlib.util
import warnings
from pathlib import Path

_TRL = importlib.util.find_spec("trl")

# TRL is imported only if it has PPO, because the import takes a third of a second.
if _TRL and any(Path(folder, "experimental", "ppo").is_dir() for folder in _TRL.submodule_search_locations or ()):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TRL warns that its PPO is experimental
        from trl.experimental.ppo import PPOConfig as ParentConfig
        from trl.experimental.ppo import PPOTrainer as ParentTrainer
else:
    from transformers import Trainer as ParentTrainer
    from transformers import TrainingArguments as ParentConfig

__all__ = ["ParentConfig", "ParentTrainer"]
