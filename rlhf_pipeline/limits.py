"""The ranges of a trainer's numbers. No torch here, so that a number out of range is refused in a second."""

import math
from collections.abc import Mapping
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import Range

LIMITS = {
    **dict.fromkeys(
        ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps", "max_length",
         "total_episodes", "eval_samples", "num_mini_batches", "num_ppo_epochs", "response_length",
         "min_response_length", "local_rollout_forward_batch_size", "kl_horizon", "watch_window", "ptx_batch_size",
         "ptx_max_length", "save_total_limit", "eval_accumulation_steps", "samples_per_prompt"),
        Range(1),
    ),
    **dict.fromkeys(
        ("kl_coef", "selection_kl_coef", "entropy_coef", "ptx_coef", "vf_coef", "cliprange", "cliprange_value",
         "min_new_tokens", "log_samples", "learning_rate", "critic_learning_rate", "weight_decay", "warmup_steps",
         "warmup_ratio", "max_grad_norm", "dataloader_num_workers", "beta"),
        Range(0),
    ),
    **dict.fromkeys(("gamma", "lam", "critic_lam", "adam_beta1", "adam_beta2", "label_smoothing_factor"), Range(0, 1)),
    **dict.fromkeys(
        ("temperature", "kl_target", "score_clip", "max_update_kl", "ratio_threshold", "num_train_epochs",
         "save_steps", "logging_steps", "eval_steps", "adam_epsilon"),
        Range(above=0),
    ),
}  # fmt: skip


def check_limits(trainer: Mapping[str, Any]) -> None:
    """Refuse a number that no trainer can work with; `trainer` maps its fields to values."""
    for name, value in trainer.items():
        if not isinstance(value, int | float) or isinstance(value, bool):
            continue
        if name in LIMITS and not LIMITS[name].holds(value):
            raise UserError(f"trainer.{name} is {value}; it takes a number {LIMITS[name]}.")
        if abs(value) >= 2**31 if isinstance(value, int) else not math.isfinite(value):
            raise UserError(f"trainer.{name} is {value}; it takes a finite number below {2**31}.")
        if name == "max_steps" and value < 1 and value != -1:
            raise UserError(f"trainer.max_steps is {value}; it takes at least 1, or -1 for no limit.")
