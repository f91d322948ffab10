"""Model cards: the README.md that the hub reads and shows, made from a stage's files with templates/card.md.

Every value is escaped for Markdown, so names, paths and generated text cannot end a table, a block or the metadata.
"""

import json
import math
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml
from markupsafe import Markup, escape

from rlhf_pipeline.data.sets import hub_set
from rlhf_pipeline.hub import is_hub_id
from rlhf_pipeline.report import page
from rlhf_pipeline.report.figures import evaluation_tables
from rlhf_pipeline.report.files import (
    as_dict,
    as_number,
    columns,
    dicts_in,
    finite,
    read_config,
    read_object,
    read_objects,
)
from rlhf_pipeline.stages import FOLDERS, POLICIES
from rlhf_pipeline.texts import printable

CARD = "README.md"
# The keys of config.yaml that a card repeats, because they determine the stage's work.
_WORK = ("defaults", "hydra", "stage", "name", "experiment", "seed", "runs", "overwrite", "policy", "reward", "data",
         "trainer", "ptx", "stages")  # fmt: skip
# Figures for the hub: their names in `results` and in evaluation.json, and the hub's names for these metrics.
_HELD_OUT = {"eval_loss": "loss", "eval_perplexity": "perplexity", "accuracy": "accuracy",
             "prompt_accuracy": "accuracy", "calibration_error": "calibration_error",
             "length_correlation": "pearsonr"}  # fmt: skip
_COMPARED = {"reward_mean": "mean_reward", "kl": "kl", "perplexity": "perplexity", "distinct_2": "distinct_2"}
# Markdown's special characters; a character reference shows them literally (CommonMark 0.31, section 2.5).
_MARKS = {ord(mark): f"&#{ord(mark)};" for mark in "\\`*[]|~$"}
_UNDERSCORE = re.compile(r"(?<![^\W_])_|_(?![^\W_])")  # an underscore inside a word has no effect


def model_card(folder: Path) -> str:
    """Return the card of the model in `runs/<name>/<stage>`."""
    return _rendered(_gather(folder))


def write_cards(folder: Path) -> None:
    """Write the card of a stage's model. stage=evaluate writes the cards of all models of the run that it judged."""
    for place in [folder.parent / stage for stage in POLICIES] if folder.name == "evaluate" else [folder]:
        if (place / "model").is_dir() and ((found := _gather(place))["evaluation"] or place == folder):
            temporary = place / f".card.{os.getpid()}"  # not in model/: a killed process must leave no extra file there
            temporary.write_text(_rendered(found), encoding="utf-8")
            os.replace(temporary, place / "model" / CARD)


def with_model_id(card: str, repository: str) -> str:
    """Return the card with code that opens the model by its hub id."""
    line = f"model_id = {_literal(repository)}"
    return re.sub(r'^model_id = ".*"$', lambda _: line, card, count=1, flags=re.MULTILINE)


def _gather(folder: Path) -> dict[str, Any]:
    """Return the unescaped values that the card of the model in `folder` shows."""
    run, judge = (_without_home(read_object(place / "run.json")) for place in (folder, folder.parent / "evaluate"))
    model, stage = folder / "model", str(run.get("stage"))
    # `row` is the policy's name in the comparison. A policy that was trained after the comparison was not judged.
    own = (*Path(str(run.get("name"))).parts, stage, "model")
    paths = {role: Path(str(as_dict(made).get("path"))) for role, made in as_dict(judge.get("parents")).items()}
    row = next((role for role, path in paths.items() if path.parts[-len(own) :] == own), None)
    earlier = str(run.get("finished")) <= str(judge.get("started"))
    compared = judge.get("status") == "done" and earlier and stage in POLICIES and row
    evaluation = _without_home(read_object(folder.parent / "evaluate" / "evaluation.json")) if compared else {}
    settings = _without_home(read_config(folder))  # with Hydra's escapes, because the card repeats the settings
    own_config, data = read_object(model / "config.json"), as_dict(run.get("data"))
    logged = read_objects(folder / "metrics.jsonl", [])
    return {
        "run": run, "stage": stage, "about": FOLDERS[stage].model if stage in FOLDERS else "",
        "model": str(model), "settings": settings, "data": data,
        "results": as_dict(run.get("results")), "source": hub_set(data) or data.get("path"),
        "config": {**as_dict(own_config.get("trunk")), **own_config},  # a reward model's values override its trunk's
        "causal": stage in POLICIES, "own_class": own_config.get("model_type") == "rlhf_reward_model",
        "parameters": _parameters(model), "vocabulary": read_object(model / "tokenizer.json"),
        "tokenizer": read_object(model / "tokenizer_config.json"), "template": (model / "chat_template.jinja").exists(),
        "steps": max((as_number(row.get("step")) or 0 for row in logged), default=None),
        "calibration": dict(enumerate(dicts_in(read_object(folder / "quality.json").get("calibration")), 1)),
        "evaluation": evaluation, "row": row, "judged_on": as_dict(judge.get("data")) if compared else {},
        "tables": evaluation_tables(evaluation), "policies": list(as_dict(evaluation.get("metrics"))),
        "work": {key: settings[key] for key in _WORK if key in settings},
    }  # fmt: skip


def _parameters(model: Path) -> int:
    """Count the parameters in the files that from_pretrained opens. Tied weights are stored, and counted, once."""
    from safetensors import safe_open

    opened: list[Any] = [safe_open(path, "np") for path in model.glob("model*.safetensors")]
    return sum(int(math.prod(weights.get_slice(name).get_shape())) for weights in opened for name in weights.keys())  # noqa: SIM118


def _metadata(found: dict[str, Any]) -> str:
    """Return the card's metadata as YAML. Ids are checked by their form; names become one plain line."""
    task, results, stage = "text-generation" if found["causal"] else "text-classification", [], _label(found["stage"])
    compared = as_dict(as_dict(found["evaluation"].get("metrics")).get(found["row"]))
    for data, figures, known in (found["data"], found["results"], _HELD_OUT), (found["judged_on"], compared, _COMPARED):
        metrics = [{"type": metric, "value": float(f"{value:.6g}"), "name": page.ENGLISH.name(key)}
                   for key, metric in known.items() if (value := finite(figures.get(key))) is not None]  # fmt: skip
        if data and metrics:
            name, sha256 = _label(data.get("name")), _label(data.get("sha256"))
            dataset = {"type": hub_set(data) or name, "name": name, "split": "test", "args": {"sha256": sha256}}
            results.append({"task": {"type": task}, "dataset": dataset, "metrics": metrics})
    sets = [hub_set(choice) for choice in (found["data"], as_dict(found["settings"].get("ptx"))) if choice]
    head: dict[str, Any] = {
        "library_name": "rlhf_pipeline" if found["own_class"] else "transformers",  # the library that opens the model
        "pipeline_tag": task, "tags": ["rlhf_pipeline", "rlhf", "trl", "reward-model" if stage == "reward" else stage],
        "base_model": _base_model(found["run"]), "datasets": [name for name in dict.fromkeys(sets) if name],
        "model-index": results and [{"name": f"{_label(found['run'].get('name'))} {stage}", "results": results}],
    }  # fmt: skip
    return yaml.safe_dump({key: value for key, value in head.items() if value}, sort_keys=False, allow_unicode=True)


def _base_model(run: dict[str, Any], generations: int = 20) -> str | None:
    """Return the hub id of the model that a run's lineage begins with, if it is on the hub."""
    parents = as_dict(run.get("parents"))
    start = as_dict(parents.get("policy")) or as_dict(parents.get("start"))
    where = start.get("path")
    if not isinstance(where, str) or not generations:
        return None
    if start.get("sha256") is None:  # not a folder
        return where if is_hub_id(where) else None
    return _base_model(read_object(Path(where).expanduser().parent / "run.json"), generations - 1)


def _label(value: object) -> str:
    """Return a value as one short line without invisible characters, for metadata."""
    return " ".join("".join(c for c in str(value) if c.isspace() or printable(c) == c).split())[:100]


def _without_home(value: Any) -> Any:
    """Replace the home folder in paths by `~`: cards are published, and the user's name is private."""
    home = os.path.expanduser("~").rstrip("/") + "/"
    if isinstance(value, str):
        return "~/" + value.removeprefix(home) if len(home) > 1 and value.startswith(home) else value
    if isinstance(value, dict):
        return {key: _without_home(inner) for key, inner in value.items()}
    return [_without_home(inner) for inner in value] if isinstance(value, list) else value


def as_markdown(value: object) -> Markup:
    """Return a value as one escaped line of Markdown, safe in a table. `Markup` values are not changed."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, list):
        value = [as_markdown(part) for part in value if part or part == 0] or None
        return Markup(", ").join(value) if value else as_markdown(None)
    text = printable(page.display(value))
    text = text[:300] + " ..." if len(text) > 300 else text
    return Markup(_UNDERSCORE.sub("&#95;", " ".join(escape(text).split()).translate(_MARKS)))


def markdown_table(head: Sequence[object], rows: Iterable[Sequence[object]]) -> Markup:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return Markup("\n".join(f"| {' | '.join(map(as_markdown, line))} |" for line in lines))


def _by_row(corner: str, found: object, names: dict[str, str] | None = None) -> Markup:
    """Return a Markdown table of the rows by name, with the columns in `names`, or all columns."""
    rows = as_dict(found)
    heads = names or {key: page.ENGLISH.name(key) for key in columns(rows.values())}
    cells = [[name, *(as_dict(row).get(key) for key in heads)] for name, row in rows.items()]
    return markdown_table([corner, *heads.values()], cells)


def _yaml(values: dict[str, Any]) -> Markup:
    """Return a fenced block of YAML. The fence is longer than any inside; invisible characters are escaped."""
    text = yaml.safe_dump(values, sort_keys=False, allow_unicode=not _hides(values), width=110)
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
    return Markup(f"{fence}yaml\n{text}{fence}")


def _literal(text: str) -> Markup:
    """Return a string as a Python literal on one line."""
    return Markup(json.dumps(text, ensure_ascii=_hides(text)))


def _hides(value: object) -> bool:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return printable(text) != text


def _rendered(found: dict[str, Any]) -> str:
    templates = page.environment(as_markdown)
    templates.globals |= {
        "table": markdown_table,
        "by_row": _by_row,
        "yaml": _yaml,
        "literal": _literal,
        "lasted": page.lasted,
    }
    head = Markup(_metadata(found).rstrip())
    return str(templates.get_template("card.md").render(metadata=head, **found))
