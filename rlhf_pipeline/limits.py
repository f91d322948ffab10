"""The least that a trainer's fields take. Without torch, so that what is out of range is refused in a second."""

import math
from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.errors import UserError

_AT_LEAST_ONE = (
    "per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length",
    "total_episodes", "eval_samples", "num_mini_batches", "num_ppo_epochs", "response_length", "min_response_length",
    "local_rollout_forward_batch_size", "kl_horizon", "watch_window", "ptx_batch_size", "ptx_max_length",
)  # fmt: skip
_NOT_NEGATIVE = (
    "kl_coef", "selection_kl_coef", "entropy_coef", "ptx_coef", "vf_coef", "cliprange", "cliprange_value",
    "min_new_tokens", "log_samples", "learning_rate", "critic_learning_rate", "weight_decay",
)  # fmt: skip
_SHARES = ("gamma", "lam", "critic_lam")  # from 0 to 1
_ABOVE_ZERO = ("temperature", "kl_target", "score_clip", "max_update_kl", "ratio_threshold")


def check_limits(trainer: Mapping[str, Any]) -> None:
    """Refuse a number that no trainer can work with; `trainer` are its fields by name."""
    for name, value in trainer.items():
        if not isinstance(value, int | float):
            continue
        if value != value:
            raise UserError(f"trainer.{name} is nan; it takes a number.")
        if name in _AT_LEAST_ONE and not value >= 1:
            raise UserError(f"trainer.{name} is {value}; it takes at least 1.")
        if name in _NOT_NEGATIVE and not 0 <= value < math.inf:
            raise UserError(f"trainer.{name} is {value}; it takes 0 or more (a finite number).")
        if name in _SHARES and not 0 <= value <= 1:
            raise UserError(f"trainer.{name} is {value}; it takes a number from 0 to 1.")
        if name in _ABOVE_ZERO and not value > 0:
            raise UserError(f"trainer.{name} is {value}; it takes a number above 0.")
