"""`STAGES` describes each stage to the rest of the program. The module of the same name does the stage's work."""

from dataclasses import dataclass
from typing import Literal

_TRAINED = ("seed", "policy", "data", "trainer")
_LANGUAGE = ("Text", "Code", "Labelled", "Demonstration", "Dialogue")
_COMPARED = ("Preference", "Ranking")


@dataclass(frozen=True)
class Stage:
    """A stage's inputs and outputs."""

    config: str | None = None  # the trainer's configuration class, whose fields are trainer.*
    makes: Literal["policy", "reward"] | None = None  # the kind of model that it saves in model/
    takes: tuple[str, ...] = ()  # stages of the same run whose models it starts from, if they are done
    work: tuple[str, ...] = ()  # the settings that define its work; the others may differ when it is run again
    rows: tuple[str, ...] = ()  # the kinds of rows it learns from; see data/records.py
    collected: bool = False  # whether it can learn from the labels of stage=collect instead of data=
    adapter: bool = False  # whether it takes policy.lora
    sharded: tuple[str, ...] = ()  # the launchers that it supports to split a model over processes
    objective: str = ""  # what a sweep compares: higher is better, and it is not measured on training data
    outcome: str = ""  # its results in a line
    then: str | None = None  # what to run after it, unless an experiment sets it
    model: str = ""  # describes its model on the model card


# In the order of a pipeline. A new stage is a row here, rlhf_pipeline/stages/<name>.py and conf/stage/<name>.yaml.
STAGES = {
    "pretrain": Stage(
        "SFTConfig",
        "policy",
        work=_TRAINED,
        rows=_LANGUAGE,
        sharded=("zero2", "zero3", "fsdp"),
        objective="minus the loss on held-out texts",
        outcome="perplexity {eval_perplexity:.1f} a token on held-out texts",
        model="A language model trained from scratch",
    ),
    "sft": Stage(
        "SFTConfig",
        "policy",
        takes=("pretrain",),
        work=_TRAINED,
        rows=(*_LANGUAGE, *_COMPARED),
        adapter=True,
        sharded=("zero2", "zero3", "fsdp"),
        objective="minus the loss on held-out texts",
        outcome="held-out loss {eval_loss:.3f}, from {eval_loss_before:.3f}",
        model="A language model after supervised fine-tuning",
    ),
    "collect": Stage(
        takes=("sft",),
        work=("seed", "policy", "data", "collect", "labeler"),
        rows=(*_LANGUAGE, *_COMPARED),
    ),
    "reward": Stage(
        "RewardConfig",
        "reward",
        work=("seed", "policy", "reward", "data", "trainer"),
        rows=("Labelled", *_COMPARED),
        collected=True,
        sharded=("zero2",),
        objective="accuracy on held-out rows",
        outcome="held-out accuracy {accuracy:.2%} of {pairs}",
        then="ppo",
    ),
    "dpo": Stage(
        "DPOConfig",
        "policy",
        takes=("sft",),
        work=_TRAINED,
        rows=_COMPARED,
        collected=True,
        adapter=True,
        objective="accuracy on held-out pairs",
        outcome="held-out accuracy {accuracy:.2%} of {pairs} pairs, margin {margin:.3f}",
        then="evaluate",
        model="A language model after DPO, which learned from preferences",
    ),
    "ppo": Stage(
        "PPOConfig",
        "policy",
        takes=("sft", "reward"),
        work=(*_TRAINED, "reward", "ptx"),
        rows=(*_LANGUAGE, *_COMPARED),
        adapter=True,
        sharded=("zero2", "zero3"),
        objective="reward - selection_kl_coef x KL, on validation prompts",
        then="evaluate",
        model="A language model after PPO, which moved it towards what a reward scores highly",
    ),
    "evaluate": Stage(
        takes=("pretrain", "sft", "reward", "dpo", "ppo"),
        work=("seed", "policy", "reward", "data", "evaluate", "labeler"),
        rows=(*_LANGUAGE, *_COMPARED),
        adapter=True,
        objective="mean reward of the last policy's answers to held-out prompts",
    ),
    "compare": Stage(
        takes=("sft", "reward"),
        work=("seed", "policy", "reward", "data", "evaluate"),
        rows=(*_LANGUAGE, *_COMPARED),
        outcome="{runs} runs; by reward - {kl_coef} x KL {best} is best: reward {reward_mean:.3f} at KL {kl:.2f}",
    ),
    "chat": Stage(adapter=True),
    "plan": Stage("PPOConfig", rows=(*_LANGUAGE, *_COMPARED), adapter=True),
    "pipeline": Stage(adapter=True),
}
# The folders of a run: evaluate with sweep= has its own.
FOLDERS = {
    **STAGES,
    "frontier": Stage(
        work=("reward", "data", "evaluate", "labeler"),
        outcome="{policies} policies, the best has reward {reward_mean:.3f} at KL {kl:.2f}",
    ),
}
POLICIES = tuple(name for name, stage in STAGES.items() if stage.makes == "policy")
# The stages that make a model. The last of them gives a pipeline's result.
TRAINED = ("reward", *POLICIES)
