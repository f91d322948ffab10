"""What the files of a run say about a model, and the metadata that the hub reads."""

import math
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf_pipeline.data import hub_set
from rlhf_pipeline.hub import is_hub_id
from rlhf_pipeline.report import items, members, number, read
from rlhf_pipeline.stages import POLICIES
from rlhf_pipeline.texts import shown

if TYPE_CHECKING:
    from huggingface_hub import ModelCardData


SIGNS = {
    "distinct": "the share of distinct bigrams fell by more than half",
    "repeated": "most answers were given to more than one prompt",
    "length": "answers shrank to less than a quarter of their length",
    "kl": "the KL to the initial policy ran away",
}
_SHAPE = {
    "layers": ("n_layer", "num_hidden_layers", "n_layers"),
    "width": ("n_embd", "hidden_size", "dim"),
    "heads": ("n_head", "num_attention_heads", "n_heads"),
    "positions": ("n_positions", "max_position_embeddings"),
}
# Of config.yaml, what determines a stage's work.
_WORK = ("defaults", "hydra", "stage", "name", "experiment", "seed", "runs", "overwrite", "policy", "reward", "data",
         "trainer", "ptx", "stages")  # fmt: skip
# Columns of the evaluation's tables, by their names in evaluation.json.
POLICY = {"reward_mean": "reward", "reward_stderr": "± s.e.", "reward_median": "median", "positive": "positive",
          "kl": "KL", "perplexity": "perplexity", "distinct_2": "distinct-2", "length": "length"}  # fmt: skip
GAIN = {"mean": "mean", "low": "95 % from", "high": "to", "win_rate": "wins"}
# Figures for the hub, by their names in `results` and in evaluation.json: the hub's metric, and a title.
_HELD_OUT = {
    "eval_loss": ("loss", "held-out loss"),
    "eval_perplexity": ("perplexity", "held-out perplexity"),
    "accuracy": ("accuracy", "held-out accuracy"),
    "prompt_accuracy": ("accuracy", "held-out accuracy, mean over prompts"),
    "calibration_error": ("calibration_error", "expected calibration error"),
    "length_correlation": ("pearsonr", "correlation of score and length"),
}
_COMPARED = {
    "reward_mean": ("mean_reward", "mean reward"),
    "kl": ("kl", "KL to the reference policy"),
    "perplexity": ("perplexity", "perplexity under the base model"),
    "distinct_2": ("distinct_2", "share of distinct bigrams"),
}


def gather(folder: Path, run: dict[str, Any] | None = None, judged: dict[str, Any] | None = None) -> dict[str, Any]:
    """What a card shows of the model in `folder`, by the template's names; nothing is escaped yet.

    `run` and `judged` are the run.json files of the stage and of its evaluation, where they are yet to be written.
    """
    run, model = _without_home(run or _object(folder / "run.json")), folder / "model"
    judge = _without_home(judged or _object(folder.parent / "evaluate" / "run.json"))
    stage, row = str(run.get("stage")), _role(judge, run)
    # A model made after the evaluation, in the place of another, is not what it judged.
    earlier = str(run.get("finished")) <= str(judge.get("started"))
    compared = bool(judge.get("status") == "done" and earlier and stage in POLICIES and row)
    evaluation = _without_home(_object(folder.parent / "evaluate" / "evaluation.json")) if compared else {}
    policies = members(evaluation.get("metrics"))
    file = folder / "config.yaml"  # as it is, with Hydra's escapes, for the card repeats it
    settings = members(_without_home(yaml.safe_load(file.read_text(encoding="utf-8")))) if file.exists() else {}
    reward = members(settings.get("reward"))
    data, results, parents, hardware = (members(run.get(key)) for key in ("data", "results", "parents", "hardware"))
    config = _object(model / "config.json")
    config = {**members(config.get("trunk")), **config}  # a reward model's, over that of its trunk
    own_class = config.get("model_type") == "rlhf_reward_model"  # transformers needs ours to open it
    shape = {name: next((config[key] for key in keys if key in config), None) for name, keys in _SHAPE.items()}
    head, tokenizer = _object(model / "tokenizer.json"), _object(model / "tokenizer_config.json")
    steps = [number(logged.get("step")) or 0 for logged in read(folder / "metrics.jsonl", [])]
    signs, commit = results.get("collapse_watch"), members(run.get("git")).get("commit")
    return {
        "run": run, "stage": stage, "model": str(model), "data": data, "source": hub_set(data) or data.get("path"),
        "causal": stage in POLICIES, "own_class": own_class,
        "scalar": reward.get("name") == "preference_model",  # one score, no classes
        "parameters": _parameters(model),
        "architecture": [
            config.get("architectures"),
            *(f"{name} {value}" for name, value in shape.items() if value is not None),
            *(f"{key} {config.get(key)}" for key in ("head", "pooling") if own_class),
        ],
        "tokenizer": [tokenizer.get("tokenizer_class"), members(head.get("model")).get("type"),
                      *_counted(config.get("vocab_size"), "tokens")],
        "chat": tokenizer.get("chat_template") or (model / "chat_template.jinja").exists(),
        "trainer": [f"{key}={value}" for key, value in members(settings.get("trainer")).items()],
        "steps": max(steps, default=None), "seconds": number(run.get("seconds")),
        "hardware": [hardware.get("gpu") or hardware.get("cpu"), *_counted(hardware.get("cores"), "cores")],
        "versions": {**members(run.get("versions")), **({"commit": commit} if commit else {})},
        "parents": _rows(parents, ("path", "sha256")),
        "reward": [reward.get("name"), members(parents.get("reward")).get("path")],
        "results": results, "figures": [[k.replace("_", " "), v] for k, v in results.items() if number(v) is not None],
        "accuracy": number(results.get("accuracy")), "length": number(results.get("length_correlation")),
        "signs": [SIGNS[sign] for sign in signs if sign in SIGNS] if isinstance(signs, list) else [],
        "calibration": [[part.get(key) for key in ("predicted", "observed", "count")]
                        for part in items(_object(folder / "quality.json").get("calibration"))],
        "compared": compared, "evaluation": evaluation, "row": row,
        "judged_on": members(judge.get("data")) if compared else {},
        "policy_head": ["", *POLICY.values()], "policies": _rows(policies, POLICY),
        "gain_head": ["Paired gain", *GAIN.values()], "gains": _rows(evaluation.get("paired_gain"), GAIN),
        "answer_head": ["Prompt", *policies],
        "answers": [[example.get("prompt"), *(members(example.get("responses")).get(name) for name in policies)]
                    for example in items(evaluation.get("examples"))],
        "settings": {key: settings[key] for key in _WORK if key in settings},
    }  # fmt: skip


def metadata(found: dict[str, Any]) -> "ModelCardData":
    """The head of a card. Ids are checked by their form; names are reduced to one plain line."""
    from huggingface_hub import EvalResult, ModelCardData

    task, results = "text-generation" if found["causal"] else "text-classification", []
    compared = members(members(found["evaluation"].get("metrics")).get(found["row"]))
    for data, figures, known in (
        (found["data"], found["results"], _HELD_OUT),
        (found["judged_on"], compared, _COMPARED),
    ):
        name, sha = _label(data.get("name")), _label(data.get("sha256"))
        for key, (metric, title) in known.items() if data else ():
            value = number(figures.get(key))
            if value is not None and math.isfinite(value):
                results.append(EvalResult(
                    task_type=task, dataset_type=hub_set(data) or name, dataset_name=name, dataset_split="test",
                    dataset_args={"sha256": sha}, metric_type=metric, metric_name=title,
                    metric_value=float(f"{value:.6g}"),
                ))  # fmt: skip
    sets = [hub_set(choice) for choice in (found["data"], members(found["settings"].get("ptx"))) if choice]
    stage = _label(found["stage"])
    return ModelCardData(
        library_name="rlhf_pipeline" if found["own_class"] else "transformers",  # the hub shows how it opens the model
        pipeline_tag=task,
        tags=["rlhf_pipeline", "rlhf", "trl", "reward-model" if stage == "reward" else stage],
        base_model=_base_model(found["run"]),
        datasets=[name for name in dict.fromkeys(sets) if name] or None,
        model_name=f"{_label(found['run'].get('name'))} {stage}" if results else None,
        eval_results=results or None,
    )


def _base_model(run: dict[str, Any], generations: int = 20) -> str | None:
    """The hub's model that a run's lineage goes back to, if it does."""
    parents = members(run.get("parents"))
    start = members(parents.get("policy")) or members(parents.get("start"))
    where = start.get("path")
    if not isinstance(where, str) or not generations:
        return None
    if start.get("sha256") is None:  # not a folder
        return where if is_hub_id(where) else None
    return _base_model(_object(Path(where).expanduser().parent / "run.json"), generations - 1)


def _role(judge: dict[str, Any], run: dict[str, Any]) -> str | None:
    """The role in which a stage took the model of another stage of the same run."""
    own = (*Path(str(run.get("name"))).parts, str(run.get("stage")), "model")
    paths = {role: str(members(it).get("path")) for role, it in members(judge.get("parents")).items()}
    return next((role for role, path in paths.items() if Path(path).parts[-len(own) :] == own), None)


def _parameters(model: Path) -> int:
    """Of the weights that from_pretrained opens; tied weights are stored, and counted, once."""
    from safetensors import safe_open

    count = 0
    for path in model.glob("model*.safetensors"):
        with safe_open(path, "np") as weights:
            count += sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118
    return count


def _rows(found: object, columns: Iterable[str]) -> list[list[Any]]:
    return [[name, *(members(row).get(key) for key in columns)] for name, row in members(found).items()]


def _counted(number: object, what: str) -> list[str]:
    return [] if number is None else [f"{number} {what}"]


def _object(path: Path) -> dict[str, Any]:
    """What a JSON file holds; an empty object where it holds none."""
    return (read(path, []) or [{}])[0]


def _label(value: object) -> str:
    """A value as one short line without characters that hide, for metadata."""
    return " ".join("".join(c for c in str(value) if c.isspace() or shown(c) == c).split())[:100]


def _without_home(value: Any) -> Any:
    """Paths in the home folder begin with `~`: cards are published, and the user's name is private."""
    home = os.path.expanduser("~").rstrip("/") + "/"
    if isinstance(value, str):
        return "~/" + value.removeprefix(home) if len(home) > 1 and value.startswith(home) else value
    if isinstance(value, dict):
        return {key: _without_home(inner) for key, inner in value.items()}
    return [_without_home(inner) for inner in value] if isinstance(value, list) else value
