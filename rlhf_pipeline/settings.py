"""The settings of a stage, and the checks that need no model. No module below uses Hydra."""

import ast
import builtins
import importlib.util
import typing
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from rlhf_pipeline import data
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import is_hub_id
from rlhf_pipeline.limits import check_limits
from rlhf_pipeline.models import policies, rewards
from rlhf_pipeline.registry import (
    Range,
    alternatives,
    check_settings,
    check_value,
    did_you_mean,
    prefix_errors,
    rename_in_errors,
)
from rlhf_pipeline.report import trackers
from rlhf_pipeline.stages import STAGES

Count = Annotated[int, Range(1)]
Several = Annotated[int, Range(2)]
Positive = Annotated[float, Range(above=0)]
Share = Annotated[float, Range(above=0, most=1)]

# The run directory or TRL sets these itself.
_RESERVED = {
    "output_dir": "the run directory is chosen by name=",
    **dict.fromkeys(("seed", "data_seed"), "set seed= for the whole run"),
    **dict.fromkeys(
        ("batch_size", "mini_batch_size", "micro_batch_size", "local_batch_size", "local_mini_batch_size",
         "num_total_batches", "world_size"),
        "it follows from per_device_train_batch_size, gradient_accumulation_steps, num_mini_batches, total_episodes "
        "and the number of processes",
    ),
    "hub_token": "set HF_TOKEN in the environment; no file stores it",
    "resume_from_checkpoint": "an unfinished run resumes by itself",
    "push_to_hub": "hub.push=user/name uploads the finished model, privately",
    "sft_model_path": "set policy.path",
    "reward_model_path": "set reward.path",
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """How `stage=evaluate` compares policies."""

    prompts: Several = 512  # one prompt has no standard error
    batch_size: Count = 128
    examples: int = 3
    bootstrap: Count = 2000
    response_length: Count | None = None  # None: as in the run's PPO
    temperature: Positive | None = None  # None: as in the run's PPO
    best_of: Several | None = None  # also the best of n answers of the reference, a baseline without training
    show: list[str] = field(default_factory=list)  # your own prompts, whose answers are shown
    # The policies to compare: stages of this run, other runs (runs/x, runs/x/ppo), hub ids; empty: all of this run.
    policies: list[str] = field(default_factory=list)
    # More rewards, each by its name and fields: they show what else changes while the run's own reward rises.
    rewards: list[dict[str, Any]] = field(default_factory=list)
    held_out_tokens: Annotated[int, Range(0)] = 10_000  # held-out tokens for each policy's perplexity; 0: no perplexity


@dataclass(frozen=True)
class Collection:
    """How `stage=collect` samples answers. The experiment's PPO gives the defaults for sampling."""

    prompts: Several = 250
    answers: Several = 4  # K, for each prompt
    temperatures: list[Positive] = field(default_factory=lambda: [1.0])  # a prompt's answers use them in turn
    # Stages of this run or paths, used in turn; empty: its SFT policy, and in later rounds the newest PPO policy.
    policies: list[str] = field(default_factory=list)
    similarity: Share = 0.9  # an answer more similar to another answer than this is sampled again
    annotators: Count = 1  # people who label each prompt; several show their agreement
    enough: Share = 1.0  # the share of prompts that must be labelled before a pipeline continues
    batch_size: Count = 128
    response_length: Count = 24
    min_new_tokens: int = 0
    stop_token: Literal["eos"] | None = "eos"
    stop_token_id: int | None = None
    stop_tokens: list[str] = field(default_factory=list)
    suppress_tokens: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chat:
    """How `stage=chat` talks."""

    prompt: list[str] = field(default_factory=list)  # --prompt: answer only these prompts
    mode: Literal["chat", "complete"] | None = None  # a conversation, or a text to continue; None: as the run's data
    temperature: Positive | None = None  # None: as in the run's PPO
    response_length: Count | None = None  # None: as in the run's PPO
    reward: bool | None = None  # whether to show each answer's reward; None: if the run has a reward


@dataclass(frozen=True)
class Plan:
    """The machine that `stage=plan` computes for, and the length of the longest prompt."""

    gpus: Count = 1
    # One of plan.DEVICES. The fields below replace figures of its data sheet.
    gpu: Literal["h100", "h200", "a100", "a100_40", "l40s", "rtx4090", "rtx3090", "l4", "cpu"] = "h100"
    gpu_memory: Positive | None = None  # GiB
    flops: Positive | None = None  # FLOP/s of dense products in the run's number format
    mfu: Share = 0.4  # the share of these FLOP/s that a forward and backward pass reaches
    launch: Literal["single", "ddp", "zero2", "zero3"] | None = None  # None: show all, choose the simplest that fits
    prompt_tokens: Count | None = None  # in the longest prompt; None: data.prompt_tokens, else 256
    json: bool = False  # print JSON instead of a table


@dataclass(frozen=True)
class Comparison:
    """What `stage=compare` compares. Settings evaluate.* say how."""

    # Name to the words of a command, or to a list of commands; null removes an algorithm.
    algorithms: dict[str, str | list[str] | None] = field(default_factory=dict)
    seeds: list[Annotated[int, Range(0, 2**32 - 1)]] = field(default_factory=lambda: [1, 2, 3])
    at_once: Count = 1  # runs in parallel
    typed: list[str] = field(default_factory=list)  # settings of the command line, which every run gets


@dataclass(frozen=True)
class Hub:
    """Where to upload a finished model. The token comes from HF_TOKEN or the client's login; no file stores it."""

    push: str | None = None  # user/name
    private: bool = True


@dataclass(frozen=True)
class Report:
    """How report.html is written. It does not change results."""

    lang: Literal["en", "zh"] = "en"


SECTIONS = {"evaluate": Evaluation, "collect": Collection, "comparison": Comparison, "chat": Chat, "plan": Plan,
            "hub": Hub, "report": Report}  # fmt: skip
# PPO's settings that name tokens. They are not valid in another vocabulary.
TOKENS = ("stop_token", "stop_token_id", "stop_tokens", "suppress_tokens")
# PPO's settings for sampling, which stage=collect also has.
SAMPLING = ("response_length", "min_new_tokens", *TOKENS)
# Settings that only one stage takes.
_ONLY_FOR = {"compare": "evaluate", "sweep": "evaluate", "labels": "collect", "against": "chat"}
_NOT_OF_SWEEPS = ("policies", "show", "examples", "held_out_tokens")


@dataclass(frozen=True)
class Settings:
    """The resolved settings of one stage of one run."""

    stage: str
    name: str
    experiment: str | None = None
    seed: Annotated[int, Range(0, 2**32 - 1)] = 0
    runs: str = "runs"
    overwrite: bool = False
    policy: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    ptx: dict[str, Any] = field(default_factory=dict)
    evaluate: Evaluation = field(default_factory=Evaluation)
    collect: Collection = field(default_factory=Collection)
    comparison: Comparison = field(default_factory=Comparison)
    chat: Chat = field(default_factory=Chat)
    plan: Plan = field(default_factory=Plan)
    against: str | None = None  # stage=chat only: a second policy, a stage of this run or a path
    compare: list[str] = field(default_factory=list)  # stage=evaluate only: runs to show side by side on one page
    sweep: str | None = None  # stage=evaluate only: a multirun, to plot its policies' reward against KL
    hub: Hub = field(default_factory=Hub)
    report: Report = field(default_factory=Report)
    labeler: dict[str, Any] | None = None  # a reward that ranks answers instead of people, with its `noise`
    labels: str | None = None  # stage=collect only: pull, push, serve (Label Studio), or a file of labels
    rounds: Count | None = None  # stage=pipeline only: how often to run collect and the later stages
    stages: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Settings":
        """Check a resolved configuration and return its settings. Unknown keys and wrong types raise `UserError`."""
        known = {f.name: f.type for f in fields(cls)}
        check_settings("", {key: x for key, x in values.items() if key not in SECTIONS}, known)
        sections: dict[str, Any] = {}
        for name, section in SECTIONS.items():
            given = values.get(name) or {}
            check_settings(f"{name}.", given, {f.name: f.type for f in fields(section)})
            sections[name] = section(**given)
        settings = cls(**{**values, **sections})
        settings._check()
        return settings

    def _check(self) -> None:
        """Refuse settings that do not go together."""
        if self.stage not in STAGES:
            raise UserError(f"no stage is called '{self.stage}'. {alternatives(self.stage, STAGES)}")
        check_name(self.name, self.runs)
        self._check_choices()
        check_trainer(self.stage, self.trainer)
        for key, stage in _ONLY_FOR.items():
            if (said := getattr(self, key)) and self.stage != stage:
                shown = f"{key}={said}" if isinstance(said, str) else f"{key}="
                raise UserError(f"{shown} is only for stage={stage}, not for stage={self.stage}; drop it.")
        if self.chat.prompt and self.stage != "chat":
            raise UserError(f"--prompt is only for stage=chat, not for stage={self.stage}; drop it.")
        if not all(map(str.strip, self.chat.prompt)):
            raise UserError("--prompt is empty; it takes a text, as in --prompt 'I saw this'.")
        if not all(map(str.strip, self.evaluate.policies)):
            raise UserError("evaluate.policies has an empty name; it takes stages of this run, runs, paths or hub ids.")
        if not self.collect.temperatures:
            raise UserError("collect.temperatures is empty; it takes one or more numbers above 0.")
        own, usual = asdict(self.evaluate), asdict(Evaluation())
        odd = [f"evaluate.{key}=" for key in _NOT_OF_SWEEPS if own[key] != usual[key]]
        if self.sweep and (odd := [*odd, *(["compare="] if self.compare else [])]):
            raise UserError(f"sweep= measures the policies of a sweep; drop {', '.join(odd)}.")
        if (to := self.hub.push) is not None and not (to.count("/") == 1 and is_hub_id(to)):
            raise UserError(
                f"hub.push={to} is not a repository of the hub; write user/name, as in hub.push=me/my-model."
            )

    def _check_choices(self) -> None:
        """Refuse a policy, reward or data that its registry entry or the stage does not accept."""
        policies.registry.check(self.policy)
        rewards.check_choice(self.reward)
        data.registry.check(self.data)
        if self.policy.get("quantize") and not (self.stage == "sft" and self.policy.get("lora")):
            raise UserError(
                "policy.quantize needs an adapter on stage=sft (QLoRA): stages.sft.policy.quantize=4bit "
                "stages.sft.policy.lora.r=8."
            )
        if self.policy.get("lora"):
            check_settings("policy.lora.", self.policy["lora"], _declared(*_LORA))
            if not STAGES[self.stage].adapter:
                raise UserError(
                    f"stage={self.stage} trains no adapter; set stages.ppo.policy.lora.r= or stages.sft.policy.lora.r=."
                )
        for what, choice in (("ptx", self.ptx), ("reward.demonstrations", self.reward.get("demonstrations"))):
            if choice:
                with prefix_errors(what):
                    data.registry.check(choice)
        learns = self.stage != "reward" or self.reward["name"] == "preference_model"
        if not (STAGES[self.stage].collected and learns):  # else this run's labels can replace data=
            data.check_kind(self.data["name"], self.stage)
        if self.stage == "reward" and self.reward["name"] not in rewards.TRAINABLE:
            fitting = ", ".join(rewards.TRAINABLE)
            raise UserError(f"reward={self.reward['name']} cannot be trained; choose one of: {fitting}.")
        for number, choice in enumerate(self.evaluate.rewards):
            with prefix_errors(f"evaluate.rewards[{number}]"):
                rewards.check_choice(choice)
        if self.labeler is not None:
            if "name" not in self.labeler:
                raise UserError("labeler has fields but no name; add labeler=<reward>.")
            check_value("labeler.noise", self.labeler.get("noise", 0.0), Annotated[float, Range(0)])
            with rename_in_errors("labeler", "reward"):
                rewards.check_choice(self.labelling_reward or {})

    @property
    def labelling_reward(self) -> dict[str, Any] | None:
        """The reward that labels instead of people, without its noise; None if people label."""
        return {key: value for key, value in self.labeler.items() if key != "noise"} if self.labeler else None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, as in `config.yaml`."""
        return asdict(self)


LONGEST_NAME = 200  # bytes of a folder's name; file systems allow 255


def check_name(name: str, runs: str) -> None:
    """Refuse a name that is not a folder below `runs`."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"name='{name}' is not a run name; give a folder below {runs}/.")
    if any(len(part.encode()) > LONGEST_NAME for part in Path(name).parts):
        raise UserError(f"name={name[:40]}... is too long for a folder; it takes at most {LONGEST_NAME} bytes.")
    if (found := next((path for path in (Path(runs), *Path(runs).parents) if path.exists()), None)) and found.is_file():
        raise UserError(f"runs={runs}: {found} is a file; give a folder.")


def check_sections(stages: Iterable[str]) -> None:
    """Refuse a section of `stages` that is not a stage."""
    known = [name for name in STAGES if name != "pipeline"]
    for section in stages:
        if section not in known:
            raise UserError(f"stages.{section} is not a stage. {alternatives(section, known)}")


# -- the fields of a stage's trainer

# Files that declare configuration classes, the subclass first. They are parsed, not imported: an import loads torch,
# and a typo should be refused in a second.
_BASE = ("trl/trainer/base_config.py", "transformers/training_args.py")
_SOURCES = {"PPOConfig": ("rlhf_pipeline/ppo/config.py", "transformers/training_args.py")}
_LORA = ("LoraConfig", "peft/tuners/lora/config.py", "peft/config.py")
_BASE_CLASSES = ("_BaseConfig", "TrainingArguments", "PeftConfig")


def check_trainer(stage: str, values: dict[str, Any]) -> None:
    """Refuse a field that the stage's trainer does not accept."""
    config, known = STAGES[stage].config, trainer_fields(stage)
    for key, value in values.items():
        if config is None and (key not in trackers.FIELDS or stage == "chat"):
            hint = f"set stages.<stage>.trainer.{key}=" if stage == "pipeline" else "drop it"
            raise UserError(f"stage={stage} has no trainer, so trainer.{key} has no effect; {hint}.")
        if key in _RESERVED:
            raise UserError(f"trainer.{key} cannot be set: {_RESERVED[key]}.")
        if key not in known:
            raise UserError(
                f"trainer.{key} is not a field of {config} (stage={stage}). {did_you_mean(key, known)}"
                f"'python -m rlhf_pipeline --cfg job stage={stage}' shows what is set."
            )
        check_value(f"trainer.{key}", value, known[key])
    check_limits(values)
    trackers.check_trackers(values.get("report_to"))


def trainer_fields(stage: str) -> dict[str, Any]:
    """Return the fields and types of the stage's trainer configuration; SFTConfig's if the stage has no trainer."""
    config = STAGES[stage].config or "SFTConfig"
    own = f"trl/trainer/{config.removesuffix('Config').lower()}_config.py"
    # Every stage resolves bf16=auto itself.
    return {**_declared(config, *_SOURCES.get(config, (own, *_BASE))), "bf16": bool | Literal["auto"] | None}


class _Names(dict[str, Any]):
    """The names in annotations; a class that only transformers knows (an enum) becomes `str`."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, None) or getattr(typing, name, str)


@cache
def _declared(config: str, *sources: str) -> dict[str, Any]:
    """Return the fields and types that a library's configuration class declares, read from its source."""
    found: dict[str, Any] = {}
    for source in sources:
        package, _, rest = source.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{package} is not installed; 'make setup' installs what is needed.")
        tree = ast.parse((Path(spec.submodule_search_locations[0]) / rest).read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and node.name in (config, *_BASE_CLASSES):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        kind = ast.unparse(item.annotation)
                        found.setdefault(item.target.id, eval(kind, {}, _Names()))
    return {name: kind for name, kind in found.items() if not name.startswith("_")}
