"""PPO's settings: TRL's names and meanings, and what its loop lacked."""

from dataclasses import dataclass, field

from trl.experimental.ppo import PPOConfig as TRLPPOConfig


@dataclass
class PPOConfig(TRLPPOConfig):
    """TRL's `PPOConfig` with more fields. `response_length` and the others keep their meaning."""

    bf16: bool | None = field(default=False, metadata={"help": "Mixed precision in the update and the rollout."})
    gradient_checkpointing: bool = field(default=False, metadata={"help": "Trade compute for memory in the update."})
    logging_steps: float = field(default=1, metadata={"help": "Log every this many updates."})
    min_response_length: int | None = field(
        default=None,
        metadata={
            "help": "Each sample's length limit is drawn uniformly from this to `response_length`, both included. "
            "None: every limit is `response_length`."
        },
    )
    min_new_tokens: int = field(default=0, metadata={"help": "The stop token is not sampled before so many tokens."})
    suppress_tokens: list[str] = field(
        default_factory=list, metadata={"help": "Tokens, by name, that are never sampled."}
    )
    kl_target: float | None = field(
        default=None,
        metadata={"help": "KL a response (in nats) that an adaptive coefficient steers to. None: `kl_coef` is fixed."},
    )
    kl_horizon: int = field(default=10_000, metadata={"help": "Episodes in which an adaptive coefficient may double."})
    score_clip: float | None = field(default=None, metadata={"help": "Scores are clipped to +- this. None: not."})
    log_samples: int = field(default=4, metadata={"help": "How many samples of a logged update are kept."})
