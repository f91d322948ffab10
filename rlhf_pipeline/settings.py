"""What a run was asked to do, and the checks that need no model: Hydra stops here."""

import ast
import importlib.util
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from functools import cache
from pathlib import Path
from typing import Any, Literal

from rlhf_pipeline import data
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import is_hub_id
from rlhf_pipeline.limits import check_limits
from rlhf_pipeline.models import policies, rewards
from rlhf_pipeline.plan.devices import check_machine
from rlhf_pipeline.registry import describe, fits, shown, suggest
from rlhf_pipeline.report import trackers

_NOT_OF_SWEEPS = ("policies", "show", "examples", "held_out_tokens")
_COUNTS = ("batch_size", "bootstrap", "response_length")
TRAINED = ("reward", "pretrain", "sft", "ppo")  # the stages that make a model; a run is known by the last of them
STAGES = ("pretrain", "sft", "collect", "reward", "ppo", "evaluate", "chat", "plan", "pipeline")

# Where each stage's trainer config is declared, the subclass first. The files are parsed, not
# imported: importing any of them loads torch, and a typo should be refused in a second.
_BASE = ("trl/trainer/base_config.py", "transformers/training_args.py")
_TRAINER_SOURCES = {
    "pretrain": ("trl/trainer/sft_config.py", *_BASE),
    "sft": ("trl/trainer/sft_config.py", *_BASE),
    "reward": ("trl/trainer/reward_config.py", *_BASE),
    "ppo": ("rlhf_pipeline/ppo/config.py", "transformers/training_args.py"),
}
_LORA_SOURCES = ("peft/tuners/lora/config.py", "peft/config.py")
# Of the classes in all these files, those that are meant.
_CLASSES = ("SFTConfig", "RewardConfig", "PPOConfig", "_BaseConfig", "TrainingArguments", "LoraConfig", "PeftConfig")
# The stages that train an adapter where `policy.lora` asks for one.
_ADAPTS = ("sft", "ppo", "evaluate", "chat", "pipeline")
# The run directory owns these, or TRL computes them.
_RESERVED = {
    "output_dir": "the run directory is chosen by name=",
    "seed": "set seed= for the whole run",
    "data_seed": "set seed= for the whole run",
    "batch_size": "it is per_device_train_batch_size x gradient_accumulation_steps x processes",
    "mini_batch_size": "it is the batch size / num_mini_batches",
    "micro_batch_size": "set per_device_train_batch_size",
    "local_batch_size": "set per_device_train_batch_size and gradient_accumulation_steps",
    "local_mini_batch_size": "set num_mini_batches",
    "num_total_batches": "set total_episodes",
    "world_size": "it is the number of processes launched",
    "hub_token": "set HF_TOKEN in the environment, where no file keeps it",
    "resume_from_checkpoint": "an unfinished run resumes by itself",
    "sft_model_path": "set policy.path",
    "reward_model_path": "set reward.path",
}


@dataclass(frozen=True)
class Evaluation:
    """How `stage=evaluate` compares policies."""

    prompts: int = 512
    batch_size: int = 128
    examples: int = 3
    bootstrap: int = 2000
    response_length: int | None = None  # None: as the run's PPO did
    temperature: float | None = None  # None: as the run's PPO did
    best_of: int | None = None  # also the best of so many answers of the reference: what no training brings
    show: list[str] = field(default_factory=list)  # prompts of one's own, whose answers are shown
    # Who is compared: stages of this run, other runs (runs/x, runs/x/ppo), hub ids; empty: all that this run has made.
    policies: list[str] = field(default_factory=list)
    # More rewards beside the run's own, each by its name and fields: what else changed while that one rose.
    rewards: list[dict[str, Any]] = field(default_factory=list)
    held_out_tokens: int = 10_000  # of held-out texts, on which each policy's perplexity is taken; 0: on none


@dataclass(frozen=True)
class Collection:
    """What `stage=collect` asks a policy, and how; what is not said here is as the experiment's PPO samples."""

    prompts: int = 250
    answers: int = 4  # K, to each prompt
    temperatures: list[float] = field(default_factory=lambda: [1.0])  # answers are drawn at each in turn
    # Stages of this run or paths, in turn; empty: its SFT policy, and in later rounds the newest that PPO made.
    policies: list[str] = field(default_factory=list)
    similarity: float = 0.9  # an answer whose words are more like another's than this is drawn again
    annotators: int = 1  # people who label each prompt, so that their agreement can be seen
    enough: float = 1.0  # the share of prompts that must be labelled before a pipeline goes on
    batch_size: int = 128
    response_length: int = 24
    min_new_tokens: int = 0
    stop_token: Literal["eos"] | None = "eos"
    stop_token_id: int | None = None
    stop_tokens: list[str] = field(default_factory=list)
    suppress_tokens: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Chat:
    """How `stage=chat` talks; null: as the run was made."""

    prompt: list[str] = field(default_factory=list)  # answered, and no more is read: --prompt on the command line
    mode: Literal["chat", "complete"] | None = None  # turns of a conversation, or text that is gone on from
    temperature: float | None = None  # None: as the run's PPO did
    response_length: int | None = None  # None: as the run's PPO did
    reward: bool | None = None  # whether each answer's is shown; None: where the run has one


@dataclass(frozen=True)
class Plan:
    """What `stage=plan` reckons with: the machine, and of the work what only its data could tell."""

    gpus: int = 1
    gpu: str = "h100"  # a key of plan.devices.DEVICES; what is set below goes over what its maker says
    gpu_memory: float | None = None  # GiB
    flops: float | None = None  # a second, of dense products in the form that is computed in
    mfu: float = 0.4  # the share of these that a forward and backward pass reaches
    launch: str | None = None  # of plan.devices.LAUNCHES; None: all, and the simplest that fits
    prompt_tokens: int | None = None  # of the longest prompt; None: data.prompt_tokens, else 256
    json: bool = False  # the plan as JSON in place of a table


@dataclass(frozen=True)
class Hub:
    """Where a finished model goes, if anywhere. The token comes from HF_TOKEN or the client's login: no file has it."""

    push: str | None = None  # user/name
    private: bool = True


@dataclass(frozen=True)
class Report:
    """How report.html is written; it changes nothing of the work."""

    lang: Literal["en", "zh"] = "en"


SECTIONS = {"evaluate": Evaluation, "collect": Collection, "chat": Chat, "plan": Plan, "hub": Hub, "report": Report}
# PPO's settings that name tokens, which mean nothing in another vocabulary.
TOKENS = ("stop_token", "stop_token_id", "stop_tokens", "suppress_tokens")
# PPO's settings that say how a policy samples, which stage=collect has as well.
SAMPLING = ("response_length", "min_new_tokens", *TOKENS)


@dataclass(frozen=True)
class Settings:
    """One stage of one run, resolved."""

    stage: str
    name: str
    experiment: str | None = None
    seed: int = 0
    runs: str = "runs"
    overwrite: bool = False
    policy: dict[str, Any] = field(default_factory=dict)
    reward: dict[str, Any] = field(default_factory=dict)
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    ptx: dict[str, Any] = field(default_factory=dict)
    evaluate: Evaluation = field(default_factory=Evaluation)
    collect: Collection = field(default_factory=Collection)
    chat: Chat = field(default_factory=Chat)
    plan: Plan = field(default_factory=Plan)
    against: str | None = None  # of stage=chat: a second policy, a stage of this run or a path
    compare: list[str] = field(default_factory=list)  # of stage=evaluate: runs that one page shows side by side
    sweep: str | None = None  # of stage=evaluate: a multirun whose policies are set against their KL
    hub: Hub = field(default_factory=Hub)
    report: Report = field(default_factory=Report)
    labeler: dict[str, Any] | None = None  # a reward that ranks in place of people, and its `noise`
    labels: str | None = None  # of stage=collect: pull, push, serve (Label Studio), or a file of labels
    rounds: int | None = None  # of stage=pipeline: how often collect and what follows are gone through
    stages: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Settings":
        """Check a resolved configuration and make it settings. Unknown keys and wrong types are a `UserError`."""
        known = {f.name: f for f in fields(cls)}
        for key in values:
            if key not in known:
                raise UserError(f"there is no setting '{key}'. {suggest(key, known)}Known: {', '.join(known)}.")
        _check_fields("", {k: v for k, v in values.items() if k in _TOP}, _TOP)
        sections: dict[str, Any] = {}
        for name, section in SECTIONS.items():
            given = values.get(name) or {}
            _check_fields(f"{name}.", given, {f.name: f.type for f in fields(section)})
            sections[name] = section(**given)
        settings = cls(**{**values, **sections})
        settings._check()
        return settings

    def _check(self) -> None:
        if self.stage not in STAGES:
            raise UserError(
                f"no stage is called '{self.stage}'. {suggest(self.stage, STAGES)}Known: {', '.join(STAGES)}."
            )
        check_name(self.name, self.runs)
        policies.registry.check(self.policy)
        rewards.check_choice(self.reward)
        data.registry.check(self.data)
        if self.policy.get("quantize") and not (self.stage == "sft" and self.policy.get("lora")):
            raise UserError(
                "policy.quantize goes with an adapter on stage=sft (QLoRA): stages.sft.policy.quantize=4bit "
                "stages.sft.policy.lora.r=8."
            )
        if self.policy.get("lora"):
            _check_fields("policy.lora.", self.policy["lora"], _declared(_LORA_SOURCES))
            if self.stage not in _ADAPTS:
                raise UserError(
                    f"stage={self.stage} trains no adapter; say stages.ppo.policy.lora.r= or for stage=sft."
                )
        for what, choice in (("ptx", self.ptx), ("reward.demonstrations", self.reward.get("demonstrations"))):
            if choice:
                with _said_of(what):
                    data.registry.check(choice)
        check_trainer(self.stage, self.trainer)
        if not (self.stage == "reward" and self.reward["name"] == _FROM_LABELS):  # else the labels of this run will do
            data.check_kind(self.data["name"], self.stage)
        if self.stage == "reward" and self.reward["name"] not in rewards.TRAINABLE:
            fitting = ", ".join(rewards.TRAINABLE)
            raise UserError(f"reward={self.reward['name']} is nothing to train; stage=reward takes one of: {fitting}.")
        at_least = {f"evaluate.{key}": (getattr(self.evaluate, key), 1) for key in _COUNTS}
        at_least["chat.response_length"] = (self.chat.response_length, 1)
        at_least["evaluate.prompts"] = (self.evaluate.prompts, 2)  # or there is no standard error
        at_least["evaluate.held_out_tokens"] = (self.evaluate.held_out_tokens, 0)
        at_least |= {f"data.{key}": (self.data.get(key), 1) for key in ("limit", "test_limit", "prompt_turns")}
        for key, (value, least) in at_least.items():
            if value is not None and value < least:
                raise UserError(f"{key} is {value}; it takes at least {least}.")
        self._check_evaluation()
        self._check_collection()
        self._check_chat()
        check_machine(vars(self.plan))
        for what, said in (("compare=", self.compare), ("sweep=", self.sweep)):
            if said and self.stage != "evaluate":
                raise UserError(f"{what} goes with stage=evaluate; stage={self.stage} takes none.")
        own, usual = asdict(self.evaluate), asdict(Evaluation())
        odd = [f"evaluate.{key}=" for key in _NOT_OF_SWEEPS if own[key] != usual[key]]
        if self.sweep and (odd := [*odd, *(["compare="] if self.compare else [])]):
            raise UserError(f"sweep= measures the policies of a sweep; drop {', '.join(odd)}.")
        if (to := self.hub.push) is not None and not (to.count("/") == 1 and is_hub_id(to)):
            raise UserError(
                f"hub.push={to} is no repository of the hub; it takes user/name, as in hub.push=me/my-model."
            )

    def _check_evaluation(self) -> None:
        if self.evaluate.best_of is not None and self.evaluate.best_of < 2:
            raise UserError(f"evaluate.best_of is {self.evaluate.best_of}; it takes at least 2, or null.")
        if self.evaluate.temperature is not None and self.evaluate.temperature <= 0:
            raise UserError(f"evaluate.temperature is {self.evaluate.temperature}; it takes a number above 0.")
        if not all(map(str.strip, self.evaluate.policies)):
            raise UserError("evaluate.policies has an empty name; it takes stages of this run, runs, paths or hub ids.")
        for number, choice in enumerate(self.evaluate.rewards):
            with _said_of(f"evaluate.rewards[{number}]"):
                rewards.check_choice(choice)

    @property
    def labelling_reward(self) -> dict[str, Any] | None:
        """The reward that labels in the place of people, without its noise; None where people do."""
        return {key: value for key, value in self.labeler.items() if key != "noise"} if self.labeler else None

    def _check_collection(self) -> None:
        for key, least in {"prompts": 2, "answers": 2, "annotators": 1, "batch_size": 1, "response_length": 1}.items():
            if getattr(self.collect, key) < least:
                raise UserError(f"collect.{key} is {getattr(self.collect, key)}; it takes at least {least}.")
        for key in ("similarity", "enough"):
            if not 0 < getattr(self.collect, key) <= 1:
                raise UserError(f"collect.{key} is {getattr(self.collect, key)}; it takes a number above 0, at most 1.")
        if not self.collect.temperatures or min(self.collect.temperatures) <= 0:
            raise UserError(f"collect.temperatures is {self.collect.temperatures}; it takes one or more above 0.")
        if self.rounds is not None and self.rounds < 1:
            raise UserError(f"rounds is {self.rounds}; it takes at least 1, or null.")
        if self.labels is not None and self.stage != "collect":
            raise UserError(f"labels={self.labels} goes with stage=collect; stage={self.stage} takes none.")
        if self.labeler is not None:
            with _said_of("labeler"):
                if "name" not in self.labeler:
                    raise UserError("fields are set of it, and which it is is not; say labeler=.")
                noise = self.labeler.get("noise", 0.0)
                if not fits(noise, float) or not 0 <= noise < math.inf:
                    raise UserError(f"noise is {noise!r}; it takes a number from 0.")
                rewards.check_choice(self.labelling_reward or {})

    def _check_chat(self) -> None:
        for said, what in ((self.against, "against="), (self.chat.prompt, "--prompt")):
            if said and self.stage != "chat":
                raise UserError(f"{what} goes with stage=chat; stage={self.stage} takes none.")
        if not all(map(str.strip, self.chat.prompt)):
            raise UserError("--prompt is empty; it takes a text, as in --prompt 'I saw this'.")
        if self.chat.temperature is not None and self.chat.temperature <= 0:
            raise UserError(f"chat.temperature is {self.chat.temperature}; it takes a number above 0.")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` holds them."""
        return asdict(self)


def check_name(name: str, runs: str) -> None:
    """Refuse what is no folder below `runs`."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"name='{name}' is no run name: it is a folder below {runs}/.")


def check_sections(stages: Iterable[str]) -> None:
    """Refuse a section of `stages` that is no stage."""
    for section in stages:
        if section not in STAGES[:-1]:
            known = ", ".join(STAGES[:-1])
            raise UserError(f"stages.{section} is no stage. {suggest(section, STAGES[:-1])}Known: {known}.")


@contextmanager
def _said_of(setting: str) -> Iterator[None]:
    try:
        yield
    except UserError as error:
        raise UserError(f"{setting}: {error}") from error


_TOP: dict[str, Any] = {
    "seed": int, "runs": str, "overwrite": bool, "name": str,
    "labeler": dict[str, Any] | None, "labels": str | None, "rounds": int | None,
    "against": str | None, "compare": list[str], "sweep": str | None,
}  # fmt: skip
_FROM_LABELS = "preference_model"  # the reward that learns from what stage=collect brought


def _check_fields(prefix: str, values: dict[str, Any], known: dict[str, Any]) -> None:
    for key, value in values.items():
        if key not in known:
            raise UserError(f"there is no setting '{prefix}{key}'. {suggest(key, known)}Known: {', '.join(known)}.")
        if not fits(value, known[key]):
            raise UserError(f"{prefix}{key} is {shown(value)}; it takes {describe(known[key])}.")


def check_trainer(stage: str, values: dict[str, Any]) -> None:
    """Refuse what the stage's TRL config would not take."""
    if stage not in _TRAINER_SOURCES:
        for key in values:
            if key not in trackers.FIELDS or stage == "chat":
                hint = f"say stages.<stage>.trainer.{key}=" if stage == "pipeline" else "drop it"
                raise UserError(f"stage={stage} has no trainer, so trainer.{key} means nothing; {hint}.")
    known = trainer_fields(stage if stage in _TRAINER_SOURCES else "sft")
    config = {"ppo": "PPOConfig", "reward": "RewardConfig"}.get(stage, "SFTConfig")
    for key, value in values.items():
        if key in _RESERVED:
            raise UserError(f"trainer.{key} is not yours to set: {_RESERVED[key]}.")
        if key not in known:
            raise UserError(
                f"trainer.{key} is no field of {config} (stage={stage}). {suggest(key, known)}"
                f"'python -m rlhf_pipeline --cfg job stage={stage}' shows what is set."
            )
        if not fits(value, known[key]):
            raise UserError(f"trainer.{key} is {shown(value)}; {config} takes {describe(known[key])}.")
    check_limits(values)
    trackers.check(values.get("report_to"))


@cache
def trainer_fields(stage: str) -> dict[str, Any]:
    """The fields of the stage's TRL config and their types."""
    # Every stage settles bf16=auto itself.
    return {**_declared(_TRAINER_SOURCES[stage]), "bf16": bool | Literal["auto"] | None}


@cache
def _declared(sources: tuple[str, ...]) -> dict[str, Any]:
    """The fields that some libraries' configuration classes declare, and their types, read from their source."""
    found: dict[str, Any] = {}
    for source in sources:
        package, _, rest = source.partition("/")
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise UserError(f"{package} is not installed; 'make setup' installs what is needed.")
        tree = ast.parse((Path(spec.submodule_search_locations[0]) / rest).read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name.endswith(_CLASSES):
                for item in node.body:
                    if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                        found.setdefault(item.target.id, _type_of(item.annotation))
    return {name: kind for name, kind in found.items() if not name.startswith("_")}


def _type_of(annotation: ast.expr) -> Any:
    """An annotation as a type; a class that only transformers knows (an enum) becomes `str`."""
    names = {"bool": bool, "int": int, "float": float, "str": str, "list": list, "dict": dict, "Any": Any}
    match annotation:
        case ast.Constant(value=None):
            return type(None)
        case ast.Constant(value=str(text)):
            return _type_of(ast.parse(text, mode="eval").body)
        case ast.Name(id=name):
            return names.get(name, str)
        case ast.BinOp(left=left, right=right):
            return _type_of(left) | _type_of(right) if Any not in (_type_of(left), _type_of(right)) else Any
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choices):
            items = choices.elts if isinstance(choices, ast.Tuple) else [choices]
            return Literal[tuple(ast.literal_eval(item) for item in items)]
        case ast.Subscript(value=ast.Name(id=name)):
            return names.get(name, Any)
    return Any
