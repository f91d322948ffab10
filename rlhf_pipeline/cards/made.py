"""A model and what the files of its run say of it."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from rlhf_pipeline.hub import is_hub_id
from rlhf_pipeline.report import members, read

POLICIES = ("pretrain", "sft", "ppo")  # the stages whose models stage=evaluate compares


@dataclass(frozen=True)
class Made:
    """A stage's model with what is known of it. What a file lacks is an empty object."""

    folder: Path  # runs/<name>/<stage>
    run: dict[str, Any]  # run.json
    settings: dict[str, Any]  # config.yaml
    config: dict[str, Any]  # the model's config.json; of a reward model, over that of its trunk
    quality: dict[str, Any]  # quality.json
    judged: dict[str, Any]  # run.json of the run's stage=evaluate, where that judged this very model
    evaluation: dict[str, Any]  # its evaluation.json

    @property
    def model(self) -> Path:
        """The folder that from_pretrained opens."""
        return self.folder / "model"

    @property
    def stage(self) -> str:
        """The stage that made it."""
        return str(self.run.get("stage"))

    @property
    def causal(self) -> bool:
        """Whether it is a language model."""
        return self.stage in POLICIES

    @property
    def scalar(self) -> bool:
        """Whether it gives one score, and no classes."""
        return bool(members(self.settings.get("reward")).get("name") == "preference_model") and not self.causal

    @property
    def own_class(self) -> bool:
        """Whether transformers needs our class to open it."""
        return self.config.get("model_type") == "rlhf_reward_model"

    @property
    def results(self) -> dict[str, Any]:
        """What its stage ended with."""
        return members(self.run.get("results"))

    @property
    def data(self) -> dict[str, Any]:
        """What identifies the rows that it learnt from."""
        return members(self.run.get("data"))

    @property
    def row(self) -> str | None:
        """What the evaluation calls it."""
        return _role(self.judged, self.run)

    @property
    def parameters(self) -> int:
        """Of the weights that from_pretrained opens; tied ones are stored, and counted, once."""
        from safetensors import safe_open

        count = 0
        for path in self.model.glob("model*.safetensors"):
            with safe_open(path, "np") as weights:
                count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
        return count


def gather(folder: Path, run: dict[str, Any] | None = None, judged: dict[str, Any] | None = None) -> Made:
    """All that the files of a stage say; `run` and `judged` are run.jsons that are about to be written."""
    own = run or json_object(folder / "run.json")
    judge = judged or json_object(folder.parent / "evaluate" / "run.json")
    # A model that was made after it, in the place of another, is not what it judged.
    earlier = str(own.get("finished")) <= str(judge.get("started"))
    if not (judge.get("status") == "done" and earlier and own.get("stage") in POLICIES and _role(judge, own)):
        judge = {}
    config, made = folder / "config.yaml", json_object(folder / "model" / "config.json")
    return Made(
        folder,
        own,
        members(yaml.safe_load(config.read_text(encoding="utf-8"))) if config.exists() else {},
        {**members(made.get("trunk")), **made},
        json_object(folder / "quality.json"),
        judge,
        json_object(folder.parent / "evaluate" / "evaluation.json") if judge else {},
    )


def base_model(run: dict[str, Any], generations: int = 20) -> str | None:
    """The model of the hub that a run's lineage goes back to, if it does."""
    parents = members(run.get("parents"))
    start = members(parents.get("policy")) or members(parents.get("start"))
    where = start.get("path")
    if not isinstance(where, str) or not generations:
        return None
    if start.get("sha256") is None:  # no folder
        return where if is_hub_id(where) else None
    return base_model(json_object(Path(where).parent / "run.json"), generations - 1)


def json_object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; an empty object where it holds none."""
    return (read(path, []) or [{}])[0]


def _role(judge: dict[str, Any], run: dict[str, Any]) -> str | None:
    """As what a stage took the model of another stage of the same run."""
    own = (*Path(str(run.get("name"))).parts, str(run.get("stage")), "model")
    paths = {role: str(members(it).get("path")) for role, it in members(judge.get("parents")).items()}
    return next((role for role, path in paths.items() if Path(path).parts[-len(own) :] == own), None)
