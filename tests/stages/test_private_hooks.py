"""Our trainers override methods of transformers and TRL, most of them private. Each must still be called by them."""

import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel
from transformers.trainer_utils import SaveStrategy
from two_trainers import KINDS, make

from rlhf_pipeline.models.classifiers import RewardModel
from rlhf_pipeline.ppo import PPOTrainer
from rlhf_pipeline.training.batching import OrderedSFTTrainer
from rlhf_pipeline.training.classifier import ClassifierTrainer
from rlhf_pipeline.training.preferences import ComparisonTrainer

UPSTREAM = ("transformers", "trl", "peft", "accelerate")
TRAINERS = {
    "sft": OrderedSFTTrainer, "classifier": ClassifierTrainer, "language": ClassifierTrainer,
    "comparisons": ComparisonTrainer,
}  # fmt: skip
OURS = {"_shared", "_uncounted", "_counts", "_counts_of", "_note"}  # which nobody else calls


def private_overrides(kind: type) -> set[str]:
    """Private names that a class, or a base of it in this project, defines and a base of another library does, too."""
    names = {False: set[str](), True: set[str]()}
    for base in kind.__mro__:
        names[base.__module__.startswith("rlhf_pipeline")] |= set(vars(base))
    return {name for name in names[True] & names[False] if name.startswith("_") and not name.startswith("__")}


@pytest.mark.parametrize("kind", KINDS)
def test_every_hook_of_a_trainer_is_called(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: dict[str, int] = defaultdict(int)
    owner = TRAINERS[kind]
    ours = {name for base in owner.__mro__ if base.__module__.startswith("rlhf_pipeline") for name in vars(base)}
    private = {name for name in ours - OURS if name.startswith("_") and not name.startswith("__")}
    attribute = "_loss_shifts_labels" if kind == "sft" else "loss_is_scaled_for_ga"
    hooks = {*private, "prediction_step", "evaluation_loop", "compute_loss", attribute}

    def from_upstream(depth: int = 2) -> bool:
        return sys._getframe(depth).f_globals["__name__"].split(".")[0] in UPSTREAM

    def watched(name: str, own: Any) -> Any:
        def method(*args: Any, **options: Any) -> Any:
            called[name] += from_upstream()
            return own(*args, **options)

        def value(self: Any) -> Any:
            called[name] += from_upstream()
            return vars(self)[name]

        return method if callable(own) else property(value, lambda self, new: vars(self).__setitem__(name, new))

    for name in hooks:
        monkeypatch.setattr(owner, name, watched(name, getattr(owner, name, None)), raising=False)
    trainer = make(kind, tmp_path, 2, 2, 3)
    trainer.args.save_strategy, trainer.args.save_steps = SaveStrategy.STEPS, 3
    trainer.train()
    trainer.evaluate()
    again = make(kind, tmp_path, 2, 2, 3)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    idle = sorted(hooks - {name for name, count in called.items() if count})
    assert not idle, (
        f"{owner.__name__} overrides {', '.join(idle)}, which transformers and TRL no longer call: "
        "what the override does is silently lost"
    )


def test_the_ppo_trainer_overrides_nothing_private_that_it_does_not_call_itself() -> None:
    assert private_overrides(PPOTrainer) <= {"_save_checkpoint"}


def test_what_a_reward_model_says_of_itself_is_still_asked_for() -> None:
    for name in private_overrides(RewardModel) | {"_supports_sdpa", "_supports_flash_attn"}:
        assert hasattr(PreTrainedModel, name), f"transformers no longer knows {name}, which RewardModel sets"
