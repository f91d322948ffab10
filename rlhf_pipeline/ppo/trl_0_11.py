"""The API of TRL 0.7 to 0.11, whose scripts call `generate`, score the texts themselves, and call `step`.

To run such a script, change its imports to this module. Each step is one update of our PPOTrainer.
"""

import copy
import functools
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase, set_seed
from transformers.trainer_callback import PrinterCallback

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.sampling import Sampling, sample
from rlhf_pipeline.ppo.config import PPOConfig as CurrentConfig
from rlhf_pipeline.ppo.trainer import PPOTrainer as CurrentTrainer

__all__ = [
    "AutoModelForCausalLMWithValueHead", "LengthSampler", "PPOConfig", "PPOTrainer", "create_reference_model",
    "respond_to_batch", "set_seed",
]  # fmt: skip


# Settings that have kept their names.
_SAME = (
    "seed", "learning_rate", "gamma", "lam", "cliprange", "cliprange_value", "vf_coef", "ratio_threshold",
    "use_score_scaling", "use_score_norm", "score_clip", "whiten_rewards",
)  # fmt: skip
# TRL 0.11's names of statistics, and ours.
_STATISTICS = {
    "ppo/mean_scores": "objective/scores",
    "ppo/std_scores": "objective/scores_std",
    "ppo/mean_non_score_reward": "objective/non_score_reward",
    "ppo/loss/policy": "loss/policy_avg",
    "ppo/loss/value": "loss/value_avg",
    "ppo/policy/entropy": "policy/entropy_avg",
    "ppo/policy/approxkl": "policy/approxkl_avg",
    "ppo/policy/clipfrac": "policy/clipfrac_avg",
    "ppo/val/clipfrac": "val/clipfrac_avg",
    "ppo/val/var_explained": "val/explained_variance",
    "tokens/responses_len_mean": "val/response_length",
}


@dataclass
class PPOConfig:
    """TRL 0.11's settings with its defaults. Settings of its memory use and of its trackers' names have no effect."""

    exp_name: str = "ppo"
    seed: int = 0
    log_with: str | None = None
    task_name: str | None = None
    model_name: str = "gpt2"
    query_dataset: str = "stanfordnlp/imdb"
    reward_model: str = "sentiment-analysis:lvwerra/distilbert-imdb"
    remove_unused_columns: bool = True
    tracker_project_name: str = "trl"
    tracker_kwargs: Mapping[str, Any] | None = None
    accelerator_kwargs: Mapping[str, Any] | None = None
    project_kwargs: Mapping[str, Any] | None = None
    optimize_cuda_cache: bool | None = None
    optimize_device_cache: bool = False
    steps: int = 20000  # total number of responses to train on
    learning_rate: float = 1.41e-5
    adap_kl_ctrl: bool = True
    init_kl_coef: float = 0.2
    kl_penalty: str = "kl"
    target: float = 6.0
    horizon: int = 10000
    gamma: float = 1.0
    lam: float = 0.95
    cliprange: float = 0.2
    cliprange_value: float = 0.2
    vf_coef: float = 0.1
    batch_size: int = 128  # per step and process
    mini_batch_size: int = 128
    gradient_accumulation_steps: int = 1
    ppo_epochs: int = 4
    max_grad_norm: float | None = None
    early_stopping: bool = False
    target_kl: float = 1.0
    ratio_threshold: float = 10.0
    use_score_scaling: bool = False
    use_score_norm: bool = False
    score_clip: float | None = None
    whiten_rewards: bool = False

    def current(self) -> CurrentConfig:
        """Return the settings under today's names."""
        rows = self.mini_batch_size * self.gradient_accumulation_steps
        if self.batch_size % rows:
            raise UserError(
                f"batch_size={self.batch_size} is not a multiple of mini_batch_size x gradient_accumulation_steps, "
                f"{self.mini_batch_size} x {self.gradient_accumulation_steps}."
            )
        if self.kl_penalty != "kl":
            raise UserError(f"kl_penalty={self.kl_penalty!r} is not supported; use 'kl'.")
        return CurrentConfig(
            **{name: getattr(self, name) for name in _SAME},
            total_episodes=self.steps,
            per_device_train_batch_size=self.mini_batch_size,
            gradient_accumulation_steps=self.batch_size // self.mini_batch_size,
            num_mini_batches=self.batch_size // rows,
            num_ppo_epochs=self.ppo_epochs,
            kl_coef=self.init_kl_coef,
            kl_target=self.target if self.adap_kl_ctrl else None,
            kl_horizon=self.horizon,
            max_grad_norm=self.max_grad_norm or 0.0,
            max_update_kl=1.5 * self.target_kl if self.early_stopping else None,
            temperature=1.0,
            lr_scheduler_type="constant",
            report_to=self.log_with or "none",
            save_strategy="no",
            disable_tqdm=True,
            num_sample_generations=0,
        )


class PPOTrainer(CurrentTrainer):
    """Our trainer with TRL 0.11's constructor and methods.

    The policy has a value head, which is trained with it. Each step changes `model` itself. A response ends with the
    tokenizer's EOS, unless `generate` gets another `eos_token_id`.
    """

    def __init__(
        self,
        config: PPOConfig,
        model: PreTrainedModel,
        ref_model: PreTrainedModel | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dataset: Any = None,
        optimizer: torch.optim.Optimizer | None = None,
        data_collator: Callable[..., Any] | None = None,
        lr_scheduler: Any = None,
    ) -> None:
        if tokenizer is None:
            raise UserError("PPOTrainer needs the policy's tokenizer.")
        args = config.current()
        args.stop_token = "eos" if tokenizer.eos_token_id is not None else None
        super().__init__(args, tokenizer, model, ref_model, optimizers=(optimizer, lr_scheduler))
        self.remove_callback(PrinterCallback)  # these scripts print their own statistics
        self.config, self.tokenizer, self.dataset, self.dataloader = config, tokenizer, dataset, None
        if dataset is not None:
            self.dataloader = DataLoader(dataset, config.batch_size, True, collate_fn=data_collator, drop_last=True)

    def step(
        self, queries: Sequence[Any], responses: Sequence[Any], scores: Sequence[Any], response_masks: Any = None
    ) -> dict[str, float]:
        """Do one PPO update; returns its statistics under today's names, and the usual ones also under TRL 0.11's."""
        if response_masks is not None:
            raise UserError("response_masks are not supported; every token of a response is trained on.")
        stats = super().step(queries, responses, scores)
        return {**stats, **{old: stats[new] for old, new in _STATISTICS.items()}}

    def generate(
        self, query_tensor: Any, length_sampler: Callable[[], int] | None = None, batch_size: int = 4,
        return_prompt: bool = True, generate_ref_response: bool = False, **options: Any,
    ) -> Any:  # fmt: skip
        """Sample responses: a list for a list of queries, a tensor (1, tokens) for one query."""
        if generate_ref_response:
            raise UserError("generate_ref_response is not supported; call ref_model.generate().")
        if length_sampler is not None:
            options["max_new_tokens"] = length_sampler()
        return super().generate(query_tensor, return_prompt=return_prompt, **options)

    def log_stats(self, *_: Any, **__: Any) -> None:
        """Do nothing: `step` has already logged its statistics to the trackers of `log_with`."""

    def save_pretrained(self, save_directory: str) -> None:
        """Write the policy, its value head and the tokenizer."""
        self.save_model(save_directory)


class AutoModelForCausalLMWithValueHead:
    """Opens a language model without a value head; the trainer adds one."""

    @staticmethod
    def from_pretrained(model: str | PreTrainedModel, peft_config: PeftConfig | None = None, **options: Any) -> Any:
        """Open a model by folder or hub id, or take an open one; with a `peft_config`, add an adapter to it."""
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, **{"trust_remote_code": False, **options})
        return model if peft_config is None else get_peft_model(model, peft_config)


def create_reference_model(model: PreTrainedModel) -> PreTrainedModel:
    """Return a frozen copy of the policy."""
    return copy.deepcopy(model).eval().requires_grad_(False)


def LengthSampler(min_value: int, max_value: int) -> Callable[[], int]:  # noqa: N802
    """Return a function that draws a length in [min_value, max_value)."""
    return functools.partial(random.randrange, min_value, max_value)


@torch.no_grad()
def respond_to_batch(model: PreTrainedModel, queries: Tensor, txt_len: int = 20) -> Tensor:
    """Sample exactly `txt_len` tokens for each of the queries (batch, tokens); returns (batch, txt_len)."""
    draws, limits = torch.rand(txt_len, len(queries)), torch.full((len(queries),), txt_len)
    return sample(model.eval(), queries.tolist(), limits, Sampling(), draws).responses
