"""Find the models of a run, the run of a model, and the settings that made it."""

import contextlib
import re
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.hub import model_folder
from rlhf_pipeline.processes import rank
from rlhf_pipeline.report.files import stages_below
from rlhf_pipeline.runs.checkpoints import sealed
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.stages import FOLDERS, POLICIES, STAGES

# Policy settings that affect only its training, not the model itself.
_TRAINING = ("path", "lora", "quantize")


def policies_of(run: RunDir, policy: dict[str, Any] | None = None) -> dict[str, str]:
    """Return a run's policies by stage, the oldest first. A round's PPO policy has the round's name, such as round2."""
    found = {stage: run.upstream(stage, policy=policy) for stage in POLICIES}
    for each in reversed(run.rounds()):
        model = each.upstream("ppo", policy=policy)
        if model and model.parents[1] == each.path.parent:  # made in this round, not in a parent run
            found[f"round{each.round}"] = model
    return {name: str(model) for name, model in found.items() if model}


def newest_policy(run: RunDir, policy: dict[str, Any] | None = None) -> str | None:
    """Return PPO's model of the newest round that has one, else the policy of the last other stage."""
    trained = (each.upstream("ppo", policy=policy) for each in (*run.rounds(), run))
    newest = next(filter(None, trained), None) or run.upstream(*reversed(POLICIES), policy=policy)
    return str(newest) if newest else None


def find_policy(word: str, run: RunDir) -> str:
    """Return a policy's folder or hub id. `word` is a stage or round of `run`, a run's name, a folder or a hub id."""
    own = policies_of(run)
    if word in own:
        return own[word]
    if word in STAGES or re.fullmatch(r"round\d+", word):
        raise NotFinishedError(
            f"{run.runs / run.name} has made no policy {word}. It has: {', '.join(own) or 'none'}; or name a run, a "
            "folder or a hub id."
        )
    folder = run.runs / word
    return locate_model(str(folder) if folder.is_dir() else word)


def ppo_settings(run: RunDir | None) -> dict[str, Any]:
    """Return the trainer settings of a run's newest PPO, finished or not; empty if it has no PPO."""
    if run is None:
        return {}
    made = [path for name, path in policies_of(run).items() if name not in ("pretrain", "sft")]
    ppo = run_of(made[-1]) if made else RunDir(run.runs, run.name, "ppo")
    return dict(ppo.config().get("trainer", {})) if ppo else {}


def recover(runs: Path) -> None:
    """Restore or delete the work that a killed process had moved aside, unless another process holds the directory."""
    every = [old for depth in ("*", "*/*", "*/*/*") for old in runs.glob(f"{depth}/.*.old")]
    for old in every if rank() == 0 else ():
        if (stage := old.name[1:-4]) in FOLDERS:
            with contextlib.suppress(UserError), RunDir(runs, str(old.parent.relative_to(runs)), stage).locked():
                pass


def locate_model(path: str) -> str:
    """Return a model's folder or hub id. A run's folder gives its newest policy, a stage's folder its model."""
    folder = Path(path).expanduser()
    if any((folder / stage / "run.json").exists() for stage in POLICIES):
        return newest_policy(RunDir(folder.parent, folder.name, "chat")) or model_folder(path)
    return model_folder(path)


def run_of(model: str | Path) -> RunDir | None:
    """Return the stage directory that made a model; None if no run made it."""
    stage = Path(model).parent
    if len(stage.parts) < 2:  # a relative path from inside the run
        stage = stage.absolute()
    record = RunDir(stage.parent.parent, stage.parent.name, stage.name).record
    if not record:
        return None
    name = Path(record.get("name") or stage.parent.name)  # the name of a round or of a sweep's job has several parts
    if stage.parent.parts[-len(name.parts) :] != name.parts:
        name = Path(stage.parent.name)  # the run has been moved
    return RunDir(stage.parents[len(name.parts)], str(name), stage.name, record.get("experiment"))


def folder_of(runs: Path, name: str) -> Path:
    """Return the folder of a run, given its name below `runs` or its path."""
    return inside if (inside := runs / name).is_dir() else Path(name).expanduser()


def ppo_jobs(folder: Path) -> list[RunDir]:
    """Return the PPO stages of a run, of a sweep's jobs, or of their rounds."""
    found = [run_of(path / "model") for path in stages_below(folder) if path.name == "ppo"]
    return [job for job in found if job]


def sweep_choices(
    runs: Path, said: str, name: str | None, afresh: bool = False
) -> tuple[str, str, dict[str, dict[str, Any]]]:
    """Return a sweep's name (or `name`), its folder, and the policy, reward, data and labeler to judge with.

    They are those of the sweep's last evaluation. With `afresh`, or without one, they are those of its first job.
    """
    folder = folder_of(runs, said)
    if (folder / "run.json").is_file():  # a stage of one run
        folder = folder.resolve().parent
    jobs = [job for job in ppo_jobs(folder) if job.model.is_dir() or sealed(job.checkpoints)]
    if not jobs:
        raise NotFinishedError(
            f"{folder} holds no run of stage=ppo with a checkpoint; sweep= takes a run with a stage=ppo, or a sweep, "
            "such as 'python -m rlhf_pipeline -m stage=ppo name=coefs trainer.kl_coef=0.02,0.1' makes."
        )
    inside = folder.resolve().is_relative_to(runs.resolve()) and folder.resolve() != runs.resolve()
    name = name or str(folder.resolve().relative_to(runs.resolve()) if inside else folder.resolve().name)
    before = {} if afresh else RunDir(runs, name, "frontier").config()
    config = before or jobs[0].config()
    kinds = ("policy", "reward", "data", "labeler")
    return name, str(folder), {kind: config[kind] for kind in kinds if config.get(kind)}


def recorded_choices(run: RunDir, asked: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings of policy, reward and data that a run was made with; empty for a policy that no run made.

    `asked` are the policy fields that the user set. Its `path` can be in another run. Raises UserError if a value does
    not fit the newest policy (for example, another size).
    """
    path = asked.get("path")
    where = locate_model(path) if path else newest_policy(run)
    home = run_of(where) if where else None
    found: dict[str, dict[str, Any]] = {}
    if home is not None:
        config = home.made_with()
        own = {key: value for key, value in config["policy"].items() if key not in _TRAINING}
        if not path:
            newest_policy(run, policy={**own, **{key: value for key, value in asked.items() if key != "template"}})
        found = {"policy": {**own, "path": where}, "data": config["data"], "reward": config["reward"]}
    # PPO's reward, else the trained reward model; the reward in sft's settings is only a default.
    for stage in ("ppo", "reward"):
        if config := (home or run).sibling(stage).config():
            return {**found, "reward": config["reward"]}
    return found
