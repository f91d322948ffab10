"""Compose the words of a command line into one stage's settings, by a single Hydra composition.

From weakest to strongest: conf/config.yaml, the files of the stage and the groups, the experiment, its section for the
stage, the command line's general settings, the command line's settings for the stage (stages.ppo.trainer.kl_coef=0.1).
"""

import contextlib
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader

from rlhf_pipeline import data
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models import policies, rewards
from rlhf_pipeline.registry import Registry, alternatives, as_written
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.models import recorded_choices, sweep_choices
from rlhf_pipeline.settings import SAMPLING, SECTIONS, Settings, check_sections
from rlhf_pipeline.stages import STAGES
from rlhf_pipeline.usage import CONF
from rlhf_pipeline.words import parse, quoted

_DEFAULT = "demo"  # the experiment if none is named, as in conf/config.yaml
# Settings of stage=compare itself. The runs that it compares get all other settings.
_OF_COMPARISON = re.compile(r"[+~]*(stage|name|runs|seed|experiment|overwrite|(hub|comparison|stages\.compare)\..*)")
_NO_SECTION = "{0} is a section of settings, so {0}={1} is not valid; set {0}.<key>=..."
_CHOICES: dict[str, Registry[Any]] = {
    "policy": policies.registry,
    "reward": rewards.registry,
    "data": data.registry,
}
# In a configuration, ${by_size:1.0e-3,5.0e-4} is the first value for small models and the second for large ones.
OmegaConf.register_new_resolver(
    "by_size",
    lambda small, large, _root_: small if _root_.policy.get("size") in ("tiny", "mini", "mid") else large,
    replace=True,
)


def _no_environment(name: str, *_: str) -> str:
    raise UserError(f"${{oc.env:{name}}} would be written to config.yaml; let the shell fill it in: ${name}")


# A recorded configuration, perhaps a stranger's, could otherwise copy secrets into the files of a run.
OmegaConf.register_new_resolver("oc.env", _no_environment, replace=True)


def settings_of(words: Sequence[str]) -> Settings:
    """Return the settings of the stage that `words` ask for; see `words.read`."""
    return to_settings(compose(words))


def compose(words: Sequence[str]) -> DictConfig:
    """Return the configuration that `words` ask for."""
    with contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():
            stack.enter_context(hydra.initialize_config_dir(str(CONF), version_base="1.3"))
        return hydra.compose("config", expand(words))


def expand(words: Sequence[str], folder: str | None = None) -> list[str]:
    """Return words for Hydra: the experiment's section for the stage, then the command line's settings.

    If the command line or the section chooses another policy, reward or data than the experiment, the experiment's
    values for it are dropped. `folder` is another folder with experiments (--config-dir).
    """
    said = {_key(word): parse(word) for word in words}
    stage = said["stage"].value() if "stage" in said else None
    if several := next((key for key, override in said.items() if override.is_sweep_override()), None):
        value = str(said[several].input_line).partition("=")[2]
        raise UserError(
            f"{several}={value} has several values; write '{several}=[{value}]' for a list, or add -m for a sweep."
        )
    if stage not in STAGES:
        return list(words)  # which Hydra refuses
    check_sections(key.split(".")[1] for key in said if key.startswith("stages."))
    for key, override in said.items():
        if key.startswith("stages.") and key.count(".") == 1 and not override.is_delete():
            raise UserError(_NO_SECTION.format(key, as_written(override.value())))
    if "rounds" in said and stage != "pipeline" and said["rounds"].value() is not None:
        raise UserError(f"rounds= is only for stage=pipeline, not for stage={stage}; drop it.")
    of = "ppo" if stage == "plan" else str(stage)
    general = [word for word in words if of == "pipeline" or not _key(word).startswith("stages.")]
    own = [word.replace(f"stages.{of}.", "", 1) for word in words if _key(word).startswith(f"stages.{of}.")]
    experiment: dict[str, Any] = {}
    if "experiment" not in said or not said["experiment"].is_delete():
        name = str(said["experiment"].value()) if "experiment" in said else _DEFAULT
        experiment = _file("experiment", name, folder)
    sections = experiment.get("stages") or {}
    section = dict(sections.get(of) or {})
    opened: dict[str, Any] = {}
    if of == "collect":  # it samples as PPO does
        ppo = (sections.get("ppo") or {}).get("trainer") or {}
        ppo |= {key: said[word].value() for key in SAMPLING if (word := f"stages.ppo.trainer.{key}") in said}
        section["collect"] = {key: ppo[key] for key in SAMPLING if key in ppo} | (section.get("collect") or {})
    elif of == "compare":  # its runs get the command line's settings
        rest = [quoted(word) for word in words if not _OF_COMPARISON.fullmatch(word.partition("=")[0])]
        general = [*general, f"++comparison.typed=[{','.join(rest)}]"]
    elif of == "chat" or (of == "evaluate" and "sweep" in said and said["sweep"].value()):
        opened, more = _as_its_run(of, said, experiment)
        section, general = section | opened, general + more
    chosen = {_key(word): str(parse(word).value()) for word in [*general, *own] if _key(word) in _CHOICES}
    usual = {key.split("/")[-1]: entry for each in experiment.get("defaults", []) for key, entry in each.items()}
    added, dropped = [], []
    for kind, registry in _CHOICES.items():
        part, values = dict(section.pop(kind, None) or {}), experiment.get(kind) or {}
        name = part.pop("name", usual.get(kind))
        other = kind in opened or name != usual.get(kind)
        if kind in chosen:
            fields = registry.fields(chosen[kind])
            part = {key: x for key, x in part.items() if key in fields and (not other or name == chosen[kind])}
            values = {key: x for key, x in values.items() if key not in fields or (other and part)}
        elif other:
            added.append(f"{kind}={name}")
            part = _file(kind, name) | part
            if kind not in opened:  # the command line's values belong to the general choice
                ours = {f"{kind}.{field}" for field in registry.common}
                general = [w for w in general if not _key(w).startswith(f"{kind}.") or _key(w) in ours]
        else:
            values = {}
        dropped += [f"~{kind}.{key}" for key in values if key not in part]
        if part:
            section[kind] = part
    if section:
        store = ConfigStore.instance()
        store.store(group="section", name=of, node=OmegaConf.create(section), package="_global_")
        added.append(f"+section={of}")
    return [*added, *dropped, *general, *own]


def _key(word: str) -> str:
    return word.lstrip("+~").partition("=")[0]


def _file(group: str, name: str, more: str | None = None) -> dict[str, Any]:
    """Return the values of a group's file; empty if there is no file."""
    for folder in (CONF, *([Path(more)] if more else [])):
        if (path := folder / group / f"{name}.yaml").is_file():
            return dict(yaml.load(path.read_text(encoding="utf-8"), get_yaml_loader()) or {})
    return {}


def _as_its_run(
    stage: str, said: Mapping[str, Override], experiment: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Return what a chat or a sweep's evaluation takes from the run that it opens, and words to add to the command."""
    value = {key: override.value() for key, override in said.items()}
    runs, name, more = Path(str(value.get("runs", "runs"))), value.get("name"), list[str]()
    if stage == "evaluate":
        afresh = value.get("overwrite") is True
        found, folder, opened = sweep_choices(runs, str(value["sweep"]), str(name) if name else None, afresh)
        more = [f"name={quoted(found)}", f"sweep={quoted(folder)}"]
        if "reward@labeler" in said:
            opened.pop("labeler", None)
    else:
        experiments = experiment.get("experiment")
        run = RunDir(runs, str(name or experiments or "default"), "chat", experiments)
        opened = dict(
            recorded_choices(
                run, {key.removeprefix("policy."): x for key, x in value.items() if key.startswith("policy.")}
            )
        )
        if "chat.reward" not in said and any(key.partition(".")[0] == "reward" for key in said):
            more = ["++chat.reward=true"]
    try:
        check_functions(opened, map(str, value.values()))
    except UserError as refusal:
        if stage == "evaluate":
            raise
        opened.pop("reward", None)
        if "reward" not in said:
            print(refusal)
            more = ["++chat.reward=false"]
    return opened, more


_EXTERNAL = {"python": "path", "judge": "url"}  # rewards that run code or send texts and a key; the field says where


def check_functions(recorded: Mapping[str, Any], values: Iterable[str]) -> None:
    """Refuse a Python function or a server that only a recorded configuration names: it may be a stranger's.

    `values` are the values on the command line.
    """
    typed, evaluate = list(values), recorded.get("evaluate")
    every: list[Any] = [recorded.get("reward"), recorded.get("labeler")]
    every += (evaluate.get("rewards") or []) if isinstance(evaluate, Mapping) else []
    for choice in every:
        if not isinstance(choice, Mapping):  # absent, or refused when it is read
            continue
        kind = str(choice.get("name"))
        field = _EXTERNAL.get(kind)
        if field and not any(str(choice.get(field)) in value for value in typed):
            place = str(choice.get(field))
            raise UserError(f"the recorded reward is {kind} with {place}; to run it, add reward.{field}={place}.")
        every += choice.get("parts") or []


def to_settings(cfg: DictConfig) -> Settings:
    """Return a composed configuration as settings."""
    OmegaConf.set_struct(cfg, False)
    for key in ("policy", "reward", "data", "trainer", "ptx", "stages", *SECTIONS):
        if key in cfg and not OmegaConf.is_dict(cfg[key]):
            raise UserError(_NO_SECTION.format(key, as_written(cfg[key])))
    check_sections(map(str, cfg.stages))
    for key in sorted(key for key in OmegaConf.missing_keys(cfg) if not key.startswith("stages.")):
        kind = key.partition(".")[0]
        own: Any = (cfg.stages.get(cfg.stage) or {}).get(kind) or {}
        where = f"stages.{cfg.stage}." if own.get("name") and own["name"] == cfg[kind].get("name") else ""
        raise UserError(f"{where}{key} is not set; add {where}{key}=...")
    if cfg.stage != "pipeline":
        cfg.stages = {}
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    values["name"] = values.get("name") or values.get("experiment") or "default"
    if values["stage"] == "reward" and "parts" in values["reward"]:  # train the part that has no model
        rewards.check_choice(values["reward"])
        part = rewards.trained_part(values["reward"])
        values["reward"] = {key: value for key, value in part.items() if key != "weight"}
    return Settings.of({str(key): value for key, value in values.items()})


# Messages of Hydra and OmegaConf, and what the user reads instead; {0} is the first group.
_EXPLAINED = {
    r"hydra/launcher/submitit": "hydra/launcher=submitit_... needs an extra: pip install 'rlhf_pipeline[slurm]'.",
    r"must specify 'stage'": f"choose a stage: stage=<{'|'.join(STAGES)}>, as in 'python -m rlhf_pipeline stage=sft'.",
    r"^Interpolation key '(.*?)' not found": "a value refers to ${{{0}}}, but there is no setting '{0}'.",
    r"^Error merging override (([\w.]+)=.*)": "{1} is a section of settings, so {0} is not valid; set {1}.<key>=...",
    r"^Multiple values for ([\w/]+)": "+{0}= would add a second choice; write {0}=...",
    r"Check that the config directory '(.*)' exists": "--config-path: there is no folder {0}.",
    r"^Cannot find primary config '(.*?)'":
        "--config-name: there is no configuration '{0}' in the folder of --config-path.",
}  # fmt: skip


def explain_hydra_error(error: Exception) -> str:
    """Return a message of Hydra or OmegaConf in one line, without the terms that only a Hydra user knows."""
    lines = [line.rstrip() for line in str(error).replace("++", "").splitlines() if line.strip()]
    text = " ".join(line for line in lines if not re.match(r"\s*(full_key|object_type|set_struct|To append)", line))
    for pattern, message in _EXPLAINED.items():
        if found := re.search(pattern, text):
            return message.format(*found.groups())
    if found := re.search(r"Could not find '([\w/]+)/([^/']*)'", text):
        known = [line.strip() for line in lines[2:] if line[0] == "\t" and "provider=" not in line]
        return f"no {found[1]} is called '{found[2]}'. {alternatives(found[2], known)}"
    if found := re.search(r"Could not override '([^']+)'", text):
        return f"there is no setting '{found[1]}'. {alternatives(found[1], Settings.__dataclass_fields__)}"
    return text
