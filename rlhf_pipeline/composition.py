"""A command's words to one stage's settings, by one composition of Hydra.

From weakest to strongest: conf/config.yaml, the stage's and groups' files, the experiment, its section for the stage,
what the user says in general, what the user says of this stage (stages.ppo.trainer.kl_coef=0.1).
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
from rlhf_pipeline.registry import Registry, shown, suggest
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.models import choices, sweep
from rlhf_pipeline.settings import SAMPLING, SECTIONS, Settings, check_sections
from rlhf_pipeline.stages import STAGES
from rlhf_pipeline.words import CONF, parse, quoted

_DEFAULT = "demo"  # the experiment, where none is named; as in conf/config.yaml
_CHOICES: dict[str, Registry[Any]] = {
    "policy": policies.registry,
    "reward": rewards.registry,
    "data": data.registry,
}
# Of a configuration, two values of which one is for small models: ${by_size:1.0e-3,5.0e-4}
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
    """The settings of the stage that `words` (see `words.read`) ask for."""
    with contextlib.ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():
            stack.enter_context(hydra.initialize_config_dir(str(CONF), version_base="1.3"))
        return settle(hydra.compose("config", expand(words)))


def expand(words: Sequence[str], folders: Sequence[str] = ()) -> list[str]:
    """Lay an experiment's section for the stage beneath what the user says, in words that Hydra composes.

    If the user, or the section, chooses another policy, reward or data than the experiment, the experiment's values
    for it are left out. `folders` are more places to look for experiments, as --config-dir gives.
    """
    said = {_key(word): parse(word) for word in words}
    stage = said["stage"].value() if "stage" in said else None
    if stage not in STAGES or any(override.is_sweep_override() for override in said.values()):
        return list(words)  # which Hydra refuses
    check_sections(key.split(".")[1] for key in said if key.startswith("stages."))
    sections = [key for key in said if key.startswith("stages.") and not said[key].is_delete()]
    if bare := next((key for key in sections if key.count(".") == 1), None):
        raise UserError(f"{bare}={shown(said[bare].value())} is no section of settings; say {bare}.<setting>=...")
    if "rounds" in said and stage != "pipeline" and said["rounds"].value() is not None:
        raise UserError(f"rounds= goes with stage=pipeline; stage={stage} takes none.")
    of = "ppo" if stage == "plan" else str(stage)
    general = [word for word in words if of == "pipeline" or not _key(word).startswith("stages.")]
    own = [word.replace(f"stages.{of}.", "", 1) for word in words if _key(word).startswith(f"stages.{of}.")]
    experiment = _experiment(said, folders)
    section = dict((experiment.get("stages") or {}).get(of) or {})
    opened: dict[str, Any] = {}
    if of == "collect":
        section["collect"] = _sampling_of_ppo(experiment, said) | (section.get("collect") or {})
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
            if kind not in opened:  # the user's values are for the general choice
                foreign = [w for w in general if _key(w).startswith(f"{kind}.") and _field(w) not in registry.common]
                general = [word for word in general if word not in foreign]
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


def _field(word: str) -> str:
    return _key(word).split(".")[1]


def _experiment(said: Mapping[str, Override], folders: Sequence[str]) -> dict[str, Any]:
    """The file of the experiment that is chosen; empty where there is none."""
    choice = said.get("experiment")
    if choice is not None and choice.is_delete():
        return {}
    return _file("experiment", str(choice.value()) if choice else _DEFAULT, folders)


def _file(group: str, name: str, folders: Sequence[str] = ()) -> dict[str, Any]:
    for folder in (CONF, *map(Path, folders)):
        if (path := folder / group / f"{name}.yaml").is_file():
            return dict(yaml.load(path.read_text(encoding="utf-8"), get_yaml_loader()) or {})
    return {}


def _sampling_of_ppo(experiment: Mapping[str, Any], said: Mapping[str, Override]) -> dict[str, Any]:
    """How the experiment's PPO samples, and what the user says of it."""
    trainer = ((experiment.get("stages") or {}).get("ppo") or {}).get("trainer") or {}
    users = {key: said[f"stages.ppo.trainer.{key}"].value() for key in SAMPLING if f"stages.ppo.trainer.{key}" in said}
    return {key: value for key, value in trainer.items() if key in SAMPLING} | users


def _as_its_run(
    stage: str, said: Mapping[str, Override], experiment: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """What a chat, or the evaluation of a sweep, takes from the run that it opens, and words that go with it."""
    value = {key: override.value() for key, override in said.items()}
    runs, name = Path(str(value.get("runs", "runs"))), value.get("name")
    if stage == "evaluate":
        overwrite = value.get("overwrite") is True
        found, folder, opened = sweep(runs, str(value["sweep"]), str(name) if name else None, overwrite)
        if "reward@labeler" in said:
            opened.pop("labeler", None)
        check_functions(opened, map(str, value.values()))
        return opened, [f"name={quoted(found)}", f"sweep={quoted(folder)}"]
    experiments = experiment.get("experiment")
    run = RunDir(runs, str(name or experiments or "default"), "chat", experiments)
    asked = {key.removeprefix("policy."): x for key, x in value.items() if key.startswith("policy.")}
    opened = dict(choices(run, asked))
    if unnamed := _unnamed(opened, map(str, value.values())):
        kind, field, place = unnamed
        del opened["reward"]
        if "reward" not in said:
            print(f"the run's reward is not asked without its name; add reward={kind} reward.{field}={place}")
            return opened, ["++chat.reward=false"]
    if any(key.partition(".")[0] == "reward" for key in said) and "chat.reward" not in said:
        return opened, ["++chat.reward=true"]
    return opened, []


_OUTSIDE = {"python": "path", "judge": "url"}  # rewards that run code, or send texts and a key, and where


def _unnamed(recorded: Mapping[str, Any], values: Iterable[str]) -> tuple[str, str, str] | None:
    """Name, field and place of a recorded reward that runs code or asks a server which is not among the `values`."""
    said = list(values)
    every = [choice for kind in ("reward", "labeler") if (choice := recorded.get(kind))]
    every += (recorded.get("evaluate") or {}).get("rewards") or []
    while every:
        choice = every.pop(0)
        field = _OUTSIDE.get(str(choice.get("name")))
        if field and not any(str(choice.get(field)) in value for value in said):
            return str(choice["name"]), field, str(choice.get(field))
        every += choice.get("parts") or []
    return None


def check_functions(recorded: Mapping[str, Any], values: Iterable[str]) -> None:
    """Refuse to run a Python function, or to ask a server, that only a recorded configuration names.

    It may be a stranger's. `values` are what the command line says.
    """
    if unnamed := _unnamed(recorded, values):
        kind, field, place = unnamed
        raise UserError(f"the recorded reward is {kind} with {place}; to run it, name it: reward.{field}={place}.")


def settle(cfg: DictConfig) -> Settings:
    """A composed configuration as settings."""
    OmegaConf.set_struct(cfg, False)
    for key in ("policy", "reward", "data", "trainer", "ptx", "stages", *SECTIONS):
        if key in cfg and not OmegaConf.is_dict(cfg[key]):
            raise UserError(f"{key}={shown(cfg[key])} is no section of settings; say {key}.<setting>=...")
    check_sections(map(str, cfg.stages))
    for key in sorted(key for key in OmegaConf.missing_keys(cfg) if not key.startswith("stages.")):
        kind = key.partition(".")[0]
        own: Any = (cfg.stages.get(cfg.stage) or {}).get(kind) or {}
        where = f"stages.{cfg.stage}." if own.get("name") and own["name"] == cfg[kind].get("name") else ""
        raise UserError(f"{where}{key} is not set; say {where}{key}=...")
    if cfg.stage != "pipeline":
        cfg.stages = {}
    values = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(values, dict)
    values["name"] = values.get("name") or values.get("experiment") or "default"
    if values["stage"] == "reward" and "parts" in values["reward"]:  # the part that has no model is trained
        rewards.check_choice(values["reward"])
        part = rewards.trained_part(values["reward"])
        values["reward"] = {key: value for key, value in part.items() if key != "weight"}
    return Settings.of({str(key): value for key, value in values.items()})


def explained(error: Exception) -> str:
    """Hydra's and OmegaConf's messages in one line, without what only a user of Hydra would understand."""
    lines = [line.rstrip() for line in str(error).replace("++", "").splitlines() if line.strip()]
    text = " ".join(line for line in lines if not re.match(r"\s*(full_key|object_type|set_struct|To append)", line))
    if "hydra/launcher/submitit" in text:
        return "hydra/launcher=submitit_... needs an extra: pip install 'rlhf_pipeline[slurm]'."
    if found := re.search(r"Could not find '([\w/]+)/([^/']*)'", text):
        known = [line.strip() for line in lines[2:] if line[0] == "\t" and "provider=" not in line]
        near = suggest(found[2], known)
        return f"no {found[1]} is called '{found[2]}'. {near}Known: {', '.join(known)}."
    if found := re.search(r"Could not override '([^']+)'", text):
        settings = list(Settings.__dataclass_fields__)
        return f"there is no setting '{found[1]}'. {suggest(found[1], settings)}Known: {', '.join(settings)}."
    if "must specify 'stage'" in text:
        return f"say which stage: stage=<{'|'.join(STAGES)}>, as in 'python -m rlhf_pipeline stage=sft'."
    if found := re.match(r"Interpolation key '(.*?)' not found", text):
        return f"a value holds ${{{found[1]}}}, and there is no setting '{found[1]}'."
    if found := re.match(r"Ambiguous value for argument '(.*?)=(.*?)' ", text):
        key, values = found[1], found[2]
        return f"{key}={values} has several values: a list is '{key}=[{values}]', and a sweep takes -m as well."
    if found := re.match(r"Error merging override (([\w.]+)=.*)", text):
        return f"{found[1]} is no section of settings; say {found[2]}.<setting>=..."
    if found := re.match(r"Multiple values for ([\w/]+)", text):
        return f"+{found[1]}= would be a second choice; write {found[1]}=..."
    if found := re.search(r"Check that the config directory '(.*)' exists", text):
        return f"--config-path: there is no folder {found[1]}."
    if found := re.match(r"Cannot find primary config '(.*?)'", text):
        return f"--config-name: there is no configuration '{found[1]}' in the folder of --config-path."
    return text
