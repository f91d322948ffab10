"""What a run was asked to do, and the checks that need no model: Hydra stops here."""

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
from rlhf_pipeline.registry import Range, check, check_known, near, said_as, said_of, suggest
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
    "hub_token": "set HF_TOKEN in the environment, where no file keeps it",
    "resume_from_checkpoint": "an unfinished run resumes by itself",
    "push_to_hub": "hub.push=user/name uploads the finished model, privately",
    "sft_model_path": "set policy.path",
    "reward_model_path": "set reward.path",
}  # fmt: skip


@dataclass(frozen=True)
class Evaluation:
    """How `stage=evaluate` compares policies."""

    prompts: Several = 512  # with one there is no standard error
    batch_size: Count = 128
    examples: int = 3
    bootstrap: Count = 2000
    response_length: Count | None = None  # None: as the run's PPO did
    temperature: Positive | None = None  # None: as the run's PPO did
    best_of: Several | None = None  # also the best of so many answers of the reference: what no training brings
    show: list[str] = field(default_factory=list)  # prompts of one's own, whose answers are shown
    # Who is compared: stages of this run, other runs (runs/x, runs/x/ppo), hub ids; empty: all that this run has made.
    policies: list[str] = field(default_factory=list)
    # More rewards beside the run's own, each by its name and fields: what else changed while that one rose.
    rewards: list[dict[str, Any]] = field(default_factory=list)
    held_out_tokens: Annotated[int, Range(0)] = 10_000  # of held-out texts, for each policy's perplexity; 0: none


@dataclass(frozen=True)
class Collection:
    """What `stage=collect` asks a policy, and how. Sampling defaults to what the experiment's PPO does."""

    prompts: Several = 250
    answers: Several = 4  # K, to each prompt
    temperatures: list[Positive] = field(default_factory=lambda: [1.0])  # answers are drawn at each in turn
    # Stages of this run or paths, in turn; empty: its SFT policy, and in later rounds the newest that PPO made.
    policies: list[str] = field(default_factory=list)
    similarity: Share = 0.9  # an answer whose words are more like another's than this is drawn again
    annotators: Count = 1  # people who label each prompt, so that their agreement can be seen
    enough: Share = 1.0  # the share of prompts that must be labelled before a pipeline goes on
    batch_size: Count = 128
    response_length: Count = 24
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
    temperature: Positive | None = None  # None: as the run's PPO did
    response_length: Count | None = None  # None: as the run's PPO did
    reward: bool | None = None  # whether each answer's is shown; None: where the run has one


@dataclass(frozen=True)
class Plan:
    """The machine that `stage=plan` computes for, and what only the data could tell of the work."""

    gpus: Count = 1
    # One of plan.DEVICES; what is set below goes over its data sheet.
    gpu: Literal["h100", "h200", "a100", "a100_40", "l40s", "rtx4090", "rtx3090", "l4", "cpu"] = "h100"
    gpu_memory: Positive | None = None  # GiB
    flops: Positive | None = None  # a second, of dense products in the number format that is computed in
    mfu: Share = 0.4  # the share of these that a forward and backward pass reaches
    launch: Literal["single", "ddp", "zero2", "zero3"] | None = None  # None: all, and the simplest that fits
    prompt_tokens: Count | None = None  # of the longest prompt; None: data.prompt_tokens, else 256
    json: bool = False  # print JSON instead of a table


@dataclass(frozen=True)
class Comparison:
    """What `stage=compare` compares; evaluate.* says how."""

    # By name, the words that one would type, or a list of such commands; null leaves one out.
    algorithms: dict[str, str | list[str] | None] = field(default_factory=dict)
    seeds: list[Annotated[int, Range(0, 2**32 - 1)]] = field(default_factory=lambda: [1, 2, 3])
    at_once: Count = 1  # runs that go on beside each other
    typed: list[str] = field(default_factory=list)  # what the user said, which goes for each run as well


@dataclass(frozen=True)
class Hub:
    """Where a finished model goes, if anywhere. The token comes from HF_TOKEN or the client's login: no file has it."""

    push: str | None = None  # user/name
    private: bool = True


@dataclass(frozen=True)
class Report:
    """How report.html is written; it changes nothing of the work."""

    lang: Literal["en", "zh"] = "en"


SECTIONS = {"evaluate": Evaluation, "collect": Collection, "comparison": Comparison, "chat": Chat, "plan": Plan,
            "hub": Hub, "report": Report}  # fmt: skip
# PPO's settings that name tokens, which mean nothing in another vocabulary.
TOKENS = ("stop_token", "stop_token_id", "stop_tokens", "suppress_tokens")
# PPO's settings that say how a policy samples, which stage=collect has as well.
SAMPLING = ("response_length", "min_new_tokens", *TOKENS)
# Settings of one stage, which no other takes.
_OF_STAGE = {"compare": "evaluate", "sweep": "evaluate", "labels": "collect", "against": "chat"}
_NOT_OF_SWEEPS = ("policies", "show", "examples", "held_out_tokens")


@dataclass(frozen=True)
class Settings:
    """One stage of one run, resolved."""

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
    against: str | None = None  # of stage=chat: a second policy, a stage of this run or a path
    compare: list[str] = field(default_factory=list)  # of stage=evaluate: runs that one page shows side by side
    sweep: str | None = None  # of stage=evaluate: a multirun whose policies are set against their KL
    hub: Hub = field(default_factory=Hub)
    report: Report = field(default_factory=Report)
    labeler: dict[str, Any] | None = None  # a reward that ranks in place of people, and its `noise`
    labels: str | None = None  # of stage=collect: pull, push, serve (Label Studio), or a file of labels
    rounds: Count | None = None  # of stage=pipeline: how often collect and what follows are gone through
    stages: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, values: dict[str, Any]) -> "Settings":
        """Check a resolved configuration and make it settings. Unknown keys and wrong types are a `UserError`."""
        known = {f.name: f.type for f in fields(cls)}
        check_known("", {key: x for key, x in values.items() if key not in SECTIONS}, known)
        sections: dict[str, Any] = {}
        for name, section in SECTIONS.items():
            given = values.get(name) or {}
            check_known(f"{name}.", given, {f.name: f.type for f in fields(section)})
            sections[name] = section(**given)
        settings = cls(**{**values, **sections})
        settings._check()
        return settings

    def _check(self) -> None:
        """Refuse settings that do not go together."""
        if self.stage not in STAGES:
            raise UserError(f"no stage is called '{self.stage}'. {near(self.stage, STAGES)}")
        check_name(self.name, self.runs)
        self._check_choices()
        check_trainer(self.stage, self.trainer)
        for key, stage in _OF_STAGE.items():
            if (said := getattr(self, key)) and self.stage != stage:
                shown = f"{key}={said}" if isinstance(said, str) else f"{key}="
                raise UserError(f"{shown} goes with stage={stage}; stage={self.stage} takes none.")
        if self.chat.prompt and self.stage != "chat":
            raise UserError(f"--prompt goes with stage=chat; stage={self.stage} takes none.")
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
                f"hub.push={to} is no repository of the hub; it takes user/name, as in hub.push=me/my-model."
            )

    def _check_choices(self) -> None:
        """Refuse a policy, reward or data that its entry or the stage does not take."""
        policies.registry.check(self.policy)
        rewards.check_choice(self.reward)
        data.registry.check(self.data)
        if self.policy.get("quantize") and not (self.stage == "sft" and self.policy.get("lora")):
            raise UserError(
                "policy.quantize goes with an adapter on stage=sft (QLoRA): stages.sft.policy.quantize=4bit "
                "stages.sft.policy.lora.r=8."
            )
        if self.policy.get("lora"):
            check_known("policy.lora.", self.policy["lora"], _declared(*_LORA))
            if not STAGES[self.stage].adapter:
                raise UserError(
                    f"stage={self.stage} trains no adapter; say stages.ppo.policy.lora.r= or for stage=sft."
                )
        for what, choice in (("ptx", self.ptx), ("reward.demonstrations", self.reward.get("demonstrations"))):
            if choice:
                with said_of(what):
                    data.registry.check(choice)
        learns = self.stage != "reward" or self.reward["name"] == "preference_model"
        if not (STAGES[self.stage].collected and learns):  # else the labels of this run will do
            data.check_kind(self.data["name"], self.stage)
        if self.stage == "reward" and self.reward["name"] not in rewards.TRAINABLE:
            fitting = ", ".join(rewards.TRAINABLE)
            raise UserError(f"reward={self.reward['name']} cannot be trained; choose one of: {fitting}.")
        for number, choice in enumerate(self.evaluate.rewards):
            with said_of(f"evaluate.rewards[{number}]"):
                rewards.check_choice(choice)
        if self.labeler is not None:
            if "name" not in self.labeler:
                raise UserError("labeler has fields but no name; add labeler=<reward>.")
            check("labeler.noise", self.labeler.get("noise", 0.0), Annotated[float, Range(0)])
            with said_as("labeler", "reward"):
                rewards.check_choice(self.labelling_reward or {})

    @property
    def labelling_reward(self) -> dict[str, Any] | None:
        """The reward that labels in the place of people, without its noise; None where people do."""
        return {key: value for key, value in self.labeler.items() if key != "noise"} if self.labeler else None

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as `config.yaml` holds them."""
        return asdict(self)


LONGEST_NAME = 200  # bytes of a folder's name; file systems take 255


def check_name(name: str, runs: str) -> None:
    """Refuse what is no folder below `runs`."""
    if not name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"name='{name}' is no run name: it is a folder below {runs}/.")
    if any(len(part.encode()) > LONGEST_NAME for part in Path(name).parts):
        raise UserError(f"name={name[:40]}... is too long for a folder; it takes at most {LONGEST_NAME} bytes.")
    if (found := next((path for path in (Path(runs), *Path(runs).parents) if path.exists()), None)) and found.is_file():
        raise UserError(f"runs={runs}: {found} is a file; give a folder.")


def check_sections(stages: Iterable[str]) -> None:
    """Refuse a section of `stages` that is no stage."""
    known = [name for name in STAGES if name != "pipeline"]
    for section in stages:
        if section not in known:
            raise UserError(f"stages.{section} is no stage. {near(section, known)}")


# -- the fields of a stage's trainer

# Where configuration classes are declared, the subclass first. The files are parsed, not imported: importing any of
# them loads torch, and a typo should be refused in a second.
_BASE = ("trl/trainer/base_config.py", "transformers/training_args.py")
_SOURCES = {"PPOConfig": ("rlhf_pipeline/ppo/config.py", "transformers/training_args.py")}
_LORA = ("LoraConfig", "peft/tuners/lora/config.py", "peft/config.py")
_BASE_CLASSES = ("_BaseConfig", "TrainingArguments", "PeftConfig")


def check_trainer(stage: str, values: dict[str, Any]) -> None:
    """Refuse what the stage's trainer would not take."""
    config, known = STAGES[stage].config, trainer_fields(stage)
    for key, value in values.items():
        if config is None and (key not in trackers.FIELDS or stage == "chat"):
            hint = f"say stages.<stage>.trainer.{key}=" if stage == "pipeline" else "drop it"
            raise UserError(f"stage={stage} has no trainer, so trainer.{key} means nothing; {hint}.")
        if key in _RESERVED:
            raise UserError(f"trainer.{key} is not yours to set: {_RESERVED[key]}.")
        if key not in known:
            raise UserError(
                f"trainer.{key} is no field of {config} (stage={stage}). {suggest(key, known)}"
                f"'python -m rlhf_pipeline --cfg job stage={stage}' shows what is set."
            )
        check(f"trainer.{key}", value, known[key])
    check_limits(values)
    trackers.check(values.get("report_to"))


def trainer_fields(stage: str) -> dict[str, Any]:
    """The fields of the stage's trainer configuration and their types; of a stage without a trainer, SFTConfig's."""
    config = STAGES[stage].config or "SFTConfig"
    own = f"trl/trainer/{config.removesuffix('Config').lower()}_config.py"
    # Every stage settles bf16=auto itself.
    return {**_declared(config, *_SOURCES.get(config, (own, *_BASE))), "bf16": bool | Literal["auto"] | None}


class _Names(dict[str, Any]):
    """The names in annotations; a class that only transformers knows (an enum) becomes `str`."""

    def __missing__(self, name: str) -> Any:
        return getattr(builtins, name, None) or getattr(typing, name, str)


@cache
def _declared(config: str, *sources: str) -> dict[str, Any]:
    """The fields that a configuration class of a library declares, and their types, read from its source."""
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
