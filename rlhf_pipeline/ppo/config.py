"""PPO's settings, which have TRL's names, and checks that they fit together."""

import dataclasses
import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Any, Literal

import torch
from transformers import PreTrainedTokenizerBase
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.limits import check_limits
from rlhf_pipeline.models.precision import choose_bf16
from rlhf_pipeline.models.sampling import Sampling
from rlhf_pipeline.ppo.trl_parent import ParentConfig
from rlhf_pipeline.processes import processes

_OUTPUTS = (
    "num_total_batches", "micro_batch_size", "local_batch_size", "batch_size", "local_mini_batch_size",
    "mini_batch_size",
)  # fmt: skip
# Fields that transformers and TRL declare but PPO never reads. Setting one is an error.
_UNREAD = (
    "auto_find_batch_size", "average_tokens_across_devices", "batch_eval_metrics", "bf16_full_eval", "data_seed",
    "dataloader_drop_last", "dataloader_in_order", "dataloader_multiprocessing_context", "dataloader_num_workers",
    "dataloader_persistent_workers", "dataloader_pin_memory", "dataloader_prefetch_factor", "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb", "ddp_find_unused_parameters", "ddp_static_graph", "debug", "ds3_gather_for_generation",
    "enable_jit_checkpoint", "eval_accumulation_steps", "eval_do_concat_batches", "eval_use_gather_object",
    "fp16_full_eval", "hub_always_push", "hub_strategy", "ignore_data_skip", "include_for_metrics",
    "include_num_input_tokens_seen", "label_names", "label_smoothing_factor", "length_column_name",
    "liger_kernel_config", "logging_nan_inf_filter",
    "neftune_noise_alpha", "parallelism_config", "prediction_loss_only", "resume_from_checkpoint",
    "save_on_each_node", "save_only_model", "skip_memory_metrics", "torch_compile", "torch_compile_backend",
    "torch_compile_mode", "torch_empty_cache_steps", "train_sampling_strategy", "use_cache", "use_liger_kernel",
)  # fmt: skip
# PPO never reads these either, but scripts written for TRL keep their own settings in them.
_OF_SCRIPTS = (
    "dataset_num_proc", "do_eval", "do_predict", "do_train", "exp_name", "reward_model_path", "sft_model_path"
)  # fmt: skip

# Fields that are used only with a critic.
_OF_THE_CRITIC = (
    "critic", "critic_init", "critic_learning_rate", "critic_lam", "vf_coef", "cliprange_value", "gamma", "lam",
    "whiten_rewards",
)  # fmt: skip


def _field(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class PPOConfig(ParentConfig):
    """The fields of TRL 1.12's `PPOConfig`, transformers' training arguments, and more fields of our own."""

    # -- fields of transformers whose defaults differ here
    learning_rate: float = _field(3e-6, "The policy's initial learning rate; see `lr_scheduler_type`.")
    bf16: bool | None = _field(None, "bf16 matrix products, fp32 master weights. None or auto: if bf16 is native.")
    gradient_checkpointing: bool = _field(False, "Use less memory and more time in the update.")
    logging_steps: float = _field(1, "Log every this many updates; a value below 1 is a share of all updates.")
    # -- length of the training, and batches
    total_episodes: int | None = _field(None, "Responses to train on. None: `num_train_epochs` times the prompts.")
    num_ppo_epochs: int = _field(4, "Passes over each batch of responses.")
    num_mini_batches: int = _field(1, "Minibatches per batch; each gives one optimizer step.")
    local_rollout_forward_batch_size: int = _field(64, "Rows that a process samples and scores at once.")
    # -- sampling
    response_length: int = _field(53, "Maximum length of a response, in tokens.")
    min_response_length: int | None = _field(
        None, "Each response's limit is drawn uniformly from this to `response_length`. None: it is `response_length`."
    )
    min_new_tokens: int = _field(0, "No stop token is sampled before this many tokens.")
    temperature: float = _field(0.7, "Logits are divided by this, in sampling and in training.")
    stop_token: Literal["eos"] | None = _field(None, "`eos`: the tokenizer's EOS token ends a response.")
    stop_token_id: int | None = _field(None, "The id of a token that ends a response, instead of `stop_token`.")
    stop_tokens: list[str] = field(default_factory=list, metadata={"help": "Names of more tokens that end a response."})
    suppress_tokens: list[str] = field(default_factory=list, metadata={"help": "Names of tokens never sampled."})
    # -- the advantage
    advantage: Literal["gae", "rloo", "grpo", "dr_grpo"] = _field(
        "gae", "The baseline: a critic (gae: PPO), or the other responses to the same prompt (rloo, grpo, dr_grpo)."
    )
    samples_per_prompt: int | None = _field(None, "Responses per prompt of a batch. None: 1 with gae, else 4.")
    kl_in: Literal["reward", "loss"] | None = _field(
        None, "Where the KL penalty is added; the loss uses k3. None: the reward for gae and rloo, else the loss."
    )
    # -- the critic
    critic: Literal["shared", "separate"] = _field("shared", "A value head on the policy's trunk, or its own network.")
    critic_init: Literal["policy", "reward"] = _field("policy", "The model that a separate critic starts from.")
    critic_learning_rate: float | None = _field(
        None, "The critic's learning rate. None: `learning_rate`, or 30 times that for a value head."
    )
    critic_lam: float | None = _field(None, "GAE's lambda for the critic's targets. None: `lam`.")
    # -- the objective
    kl_coef: float = _field(0.05, "Weight of the penalty on the KL between policy and reference.")
    kl_estimator: Literal["k1", "k3"] = _field("k1", "Estimator of that KL. k1: log(p/q); k3: q/p - 1 - log(q/p).")
    kl_target: float | None = _field(None, "Target KL per response, in nats: `kl_coef` adapts to reach it.")
    kl_horizon: int = _field(10_000, "An adaptive `kl_coef` changes by at most about 20 % in this many episodes.")
    cliprange: float = _field(0.2, "The ratio of new to old probability is clipped to 1 ± this.")
    vf_coef: float = _field(0.1, "Weight of the critic's loss.")
    cliprange_value: float = _field(0.2, "A value is clipped to the rollout's value ± this.")
    gamma: float = _field(1.0, "Discount factor per token.")
    lam: float = _field(0.95, "GAE's lambda.")
    whiten_rewards: bool = _field(False, "Scale per-token rewards to variance 1 over the batch.")
    missing_eos_penalty: float | None = _field(None, "Subtracted from the score of a response without a stop token.")
    entropy_coef: float = _field(0.0, "Weight of the entropy bonus, which uses the sampling distribution.")
    ptx_coef: float = _field(0.0, "InstructGPT's gamma: weight of the log-likelihood of pretraining texts (PPO-ptx).")
    ptx_batch_size: int | None = _field(None, "Pretraining texts per optimizer step. None: as many as responses.")
    ptx_max_length: int = _field(128, "Pretraining texts are cut to this many tokens.")
    score_clip: float | None = _field(None, "Clip scores to ± this. None: do not clip.")
    use_score_scaling: bool = _field(False, "Divide scores by their running standard deviation.")
    use_score_norm: bool = _field(False, "With `use_score_scaling`, subtract their running mean as well.")
    # -- guards and evaluation
    max_update_kl: float | None = _field(None, "End an update once KL(old || new) per token is above this.")
    ratio_threshold: float = _field(10.0, "Stop the run if the mean ratio of an optimizer step is above this.")
    watch_window: int = _field(20, "Window of the collapse watch, in updates.")
    eval_samples: int | None = _field(
        256,
        "Number of held-out prompts in an evaluation during training. None: all. The command line holds out at most a "
        "tenth of the training prompts for this.",
    )
    selection_kl_coef: float = _field(
        0.05,
        "The best policy of a run or a sweep has the highest eval_score = eval_reward - selection_kl_coef x eval_kl. "
        "Unlike kl_coef, it is the same for all jobs of a sweep.",
    )
    log_samples: int = _field(4, "Number of samples kept per logged update.")
    num_sample_generations: int = _field(10, "How many times a run prints responses to held-out prompts.")
    # -- for adapters
    model_adapter_name: str | None = _field(None, "If there are several adapters, the name of the trained one.")
    ref_adapter_name: str | None = _field(None, "If there are several adapters, the name of the reference.")
    # -- so that scripts written for TRL run unchanged
    dataset_num_proc: int | None = _field(None, "For scripts: processes that prepare their data.")
    exp_name: str | None = _field(None, "For scripts: a name, in TRL 0.12 to 0.16.")
    sft_model_path: str = _field("EleutherAI/pythia-160m", "For scripts: the path of the policy.")
    reward_model_path: str = _field("EleutherAI/pythia-160m", "For scripts: the path of the reward model.")
    ds3_gather_for_generation: bool = _field(True, "No effect: under ZeRO-3 the weights are always gathered.")
    # -- TRL's trainer wrote these; `check_config` refuses them
    world_size: int | None = _field(None, "Number of processes.")
    num_total_batches: int | None = _field(None, "Number of updates.")
    micro_batch_size: int | None = _field(None, "Rows of a forward and backward pass, over all processes.")
    local_batch_size: int | None = _field(None, "Rows of an update, in one process.")
    batch_size: int | None = _field(None, "Rows of an update, over all processes.")
    local_mini_batch_size: int | None = _field(None, "Rows of an optimizer step, in one process.")
    mini_batch_size: int | None = _field(None, "Rows of an optimizer step, over all processes.")

    @property
    def group_size(self) -> int:
        """Responses per prompt of a batch."""
        return self.samples_per_prompt or (1 if self.advantage == "gae" else 4)

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL penalty is part of the loss, as in GRPO's paper, instead of the reward."""
        return (self.kl_in or ("loss" if "grpo" in self.advantage else "reward")) == "loss"

    def __post_init__(self) -> None:
        """Choose precision and evaluation, then run transformers' own `__post_init__`."""
        if self.bf16 not in (True, False, None, "auto"):
            raise UserError(f"trainer.bf16 is {self.bf16!r}; it takes auto, true or false.")
        asked = True if os.environ.get("ACCELERATE_MIXED_PRECISION") == "bf16" else self.bf16
        chosen, self.precision_choice = choose_bf16(asked)
        # The trainer uses the same autocast context in all passes, so transformers must not open another.
        self.bf16 = False
        inherited: Any = self
        if processes() > 1 and not torch.accelerator.is_available():
            inherited.use_cpu = True  # otherwise accelerate treats each process as a separate run
        if inherited.eval_steps is not None and inherited.eval_strategy == "no":
            inherited.eval_strategy = "steps"
        if inherited.metric_for_best_model is None:
            inherited.metric_for_best_model, inherited.greater_is_better = "eval_score", True
        super().__post_init__()
        self.world_size = inherited.distributed_state.num_processes  # TRL's field hides transformers' property
        self.bf16 = chosen
        unset_hf_deepspeed_config()  # otherwise ZeRO-3 shards every model, even the reward model


def check_config(args: PPOConfig, script: bool = True) -> int:
    """Refuse settings that do not fit together; returns the number of rows in one process's batch.

    `script`: the caller is a script, which may keep settings of its own in the configuration.
    """
    unread = _UNREAD if script else (*_UNREAD, *_OF_SCRIPTS)
    settled = {"do_eval": args.eval_strategy != "no", "dataloader_pin_memory": args.use_cpu}  # set by transformers
    for each in fields(args):
        default = each.default if each.default_factory is MISSING else each.default_factory()
        if each.name in unread and not settled.get(each.name) and getattr(args, each.name) not in (default, None, []):
            raise UserError(f"trainer.{each.name} has no effect in PPO; leave it out.")
        if each.name in _OUTPUTS and getattr(args, each.name) is not None:
            raise UserError(f"trainer.{each.name} cannot be set: it follows from the other settings.")
    check_limits(vars(args))
    for name, choices in {
        "critic": ("shared", "separate"), "critic_init": ("policy", "reward"), "kl_estimator": ("k1", "k3"),
        "stop_token": ("eos", None), "advantage": ("gae", "rloo", "grpo", "dr_grpo"), "kl_in": ("reward", "loss", None),
    }.items():  # fmt: skip
        if getattr(args, name) not in choices:
            raise UserError(f"trainer.{name} is {getattr(args, name)!r}; it takes {' or '.join(map(str, choices))}.")
    for each in fields(args) if args.advantage != "gae" else ():
        if each.name in _OF_THE_CRITIC and getattr(args, each.name) != each.default:
            raise UserError(
                f"trainer.advantage={args.advantage} has no critic, so trainer.{each.name} has no effect; leave it out."
            )
    rows, longest = args.per_device_train_batch_size * args.gradient_accumulation_steps, args.response_length
    episodes = rows * processes()
    no_stop = args.stop_token is None and args.stop_token_id is None and not args.stop_tokens
    schedule = str(getattr(args.lr_scheduler_type, "value", args.lr_scheduler_type))
    refused = {
        "trainer.fp16 is not possible: its range is too small for PPO's ratios; use trainer.bf16": args.fp16,
        "trainer.stop_token and trainer.stop_token_id exclude each other; add trainer.stop_token=null": (
            args.stop_token is not None and args.stop_token_id is not None
        ),
        "trainer.missing_eos_penalty needs a trainer.stop_token; add trainer.stop_token=eos": (
            args.missing_eos_penalty is not None and no_stop
        ),
        "trainer.use_score_norm needs trainer.use_score_scaling=true": (
            args.use_score_norm and not args.use_score_scaling
        ),
        f"a batch of {rows} rows does not divide into trainer.num_mini_batches={args.num_mini_batches}": (
            rows % args.num_mini_batches
        ),
        f"a batch of {episodes} responses does not divide by trainer.samples_per_prompt={args.group_size}": (
            episodes % args.group_size
        ),
        f"trainer.advantage={args.advantage} compares responses to one prompt; trainer.samples_per_prompt takes 2 or "
        "more": args.advantage != "gae" and args.group_size < 2,
        f"a batch of {episodes} episodes is 5 times trainer.kl_horizon={args.kl_horizon} or more, so one update could "
        "bring the adaptive coefficient to 0 or below; raise kl_horizon": (
            args.kl_target is not None and episodes >= 5 * args.kl_horizon
        ),
        "trainer.critic_init=reward starts a separate critic; add trainer.critic=separate": (
            args.critic == "shared" and args.critic_init == "reward"
        ),
        f"trainer.min_new_tokens is {args.min_new_tokens}, more than the response_length of {longest}": (
            args.min_new_tokens > longest
        ),
        f"trainer.min_response_length is {args.min_response_length}, more than the response_length of {longest}": (
            (args.min_response_length or 0) > longest
        ),
        "trainer.lr_scheduler_type=reduce_lr_on_plateau is not possible in PPO: it waits for a loss to fall": (
            schedule == "reduce_lr_on_plateau"
        ),
    }
    for message, holds in refused.items():
        if holds:
            raise UserError(f"{message}.")
    return rows


def make_sampling(args: PPOConfig, tokenizer: PreTrainedTokenizerBase, embeddings: int = 0) -> Sampling:
    """Return the sampling distribution of a configuration.

    If a policy has more `embeddings` than its tokenizer has tokens, the ids without a token are never sampled.
    """
    vocabulary = tokenizer.get_vocab()
    for name in ("stop_tokens", "suppress_tokens"):
        for token in getattr(args, name):
            if token not in vocabulary:
                raise UserError(f"trainer.{name} has '{token}', which is no token of the policy's vocabulary.")
    stops = {vocabulary[token] for token in args.stop_tokens}
    if args.stop_token == "eos":
        if tokenizer.eos_token_id is None:
            raise UserError("trainer.stop_token=eos needs a tokenizer with an eos_token; use trainer.stop_tokens.")
        stops.add(int(tokenizer.eos_token_id))
    if args.stop_token_id is not None:
        if not 0 <= args.stop_token_id < len(tokenizer):
            raise UserError(
                f"trainer.stop_token_id is {args.stop_token_id}; the policy's token ids are 0 to {len(tokenizer) - 1}."
            )
        stops.add(args.stop_token_id)
    suppressed = {vocabulary[token] for token in args.suppress_tokens} | set(range(len(tokenizer), embeddings))
    if clash := suppressed & stops:
        names = ", ".join(sorted(token for token, number in vocabulary.items() if number in clash))
        raise UserError(f"trainer.suppress_tokens and the stop tokens share {names}; remove it from one of them.")
    return Sampling(args.temperature, tuple(sorted(stops)), args.min_new_tokens, tuple(sorted(suppressed)))


def change_sampling(sampling: Sampling, options: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> Sampling:
    """Apply `options` of transformers' `generate` to `sampling`. Options that truncate the distribution are refused."""
    neutral = {"do_sample": (True,), "top_k": (0, None), "top_p": (1, None), "min_length": (-1, 0, None)}
    check_limits(options)
    changes = dict[str, Any]()
    for name, value in options.items():
        if name == "temperature":
            changes["temperature"] = float(value)
        elif name == "min_new_tokens":
            changes["min_length"] = int(value or 0)
        elif name == "suppress_tokens":
            changes["suppressed_ids"] = tuple(sorted({*sampling.suppressed_ids, *(value or [])}))
        elif name == "eos_token_id":  # an id outside the vocabulary: no token ends a response
            ids = value if isinstance(value, list | tuple) else [value]
            changes["stop_ids"] = tuple(sorted(int(i) for i in ids if i is not None and 0 <= i < len(tokenizer)))
        elif name != "pad_token_id" and value not in neutral.get(name, ()):
            allowed = f"it takes {' or '.join(map(str, neutral[name]))}" if name in neutral else "leave it out"
            raise UserError(
                f"generate({name}={value!r}): PPO samples from the policy's whole distribution, so this is not "
                f"supported; {allowed}."
            )
    return dataclasses.replace(sampling, **changes)
