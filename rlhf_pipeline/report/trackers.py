"""Experiment trackers: TensorBoard, Trackio, Weights & Biases, SwanLab."""

import contextlib
import hashlib
import importlib.util
import json
import os
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import did_you_mean
from rlhf_pipeline.report.files import read_object
from rlhf_pipeline.report.page import display
from rlhf_pipeline.texts import printable

# The fields of `trainer` that set the tracking. Every stage but chat takes them. They do not affect its work.
FIELDS = ("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
DEFAULT_PROJECT = "rlhf_pipeline"
_STEP = "train/global_step"  # transformers' name for the step in trackers that count rows themselves
# Special characters of Markdown and HTML, line ends, and the spaces that HTML drops.
_MARKS = re.compile(r"\n|(?:(?<=\s)|^) |[^\w ]|_")
_REFERENCES = {"\n": "<br>", " ": "&#160;"}
Cells = Sequence[Sequence[Any]]


def chosen_trackers(report_to: Any) -> list[str]:
    """Return the trackers that `report_to` names; [] for null and `none`."""
    words = report_to if isinstance(report_to, list) else [report_to]
    return [word for word in dict.fromkeys(str(word) for word in words if word is not None) if word != "none"]


def check_trackers(report_to: Any) -> None:
    """Refuse a tracker that is unknown or not installed."""
    for word in chosen_trackers(report_to):
        if word not in KINDS:
            takes = f"It takes none, {', '.join(KINDS)}, or a list: trainer.report_to=[{','.join(KINDS)}]."
            raise UserError(f"trainer.report_to={word} is not a supported tracker. {did_you_mean(word, KINDS)}{takes}")
        found = importlib.util.find_spec(word)
        if found is None or found.origin is None:  # only a folder of that name, not a package
            raise UserError(
                f"trainer.report_to={word} needs {word}, which is not installed: pip install 'rlhf_pipeline[{word}]', "
                f"or choose one of: {', '.join(['none', *(kind for kind in KINDS if kind != word)])}."
            )


def check_logins(report_to: Any) -> None:
    """Refuse Weights & Biases and SwanLab without a login: they would prompt for a key, and a script would hang."""
    for tracker, logged_in in (("wandb", _wandb_logged_in), ("swanlab", _swanlab_logged_in)):
        if tracker in chosen_trackers(report_to) and not logged_in():
            raise UserError(
                f"trainer.report_to={tracker}: nobody is logged in. Run '{tracker} login' or set "
                f"{tracker.upper()}_API_KEY; {tracker.upper()}_MODE=offline keeps the run on this machine, for "
                f"'{tracker} sync'."
            )


def _wandb_logged_in() -> bool:
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # no crash reports to the maker
    import wandb

    with contextlib.suppress(Exception):  # verify=False: no request over the network
        online = wandb.setup().settings.mode in ("online", "run", "shared")
        return not online or bool(wandb.login(prompt=False, verify=False))
    return False


def _swanlab_logged_in() -> bool:
    import swanlab

    settings = swanlab.Settings()
    return settings.mode != "online" or settings.api_key is not None


def naming(config: Mapping[str, Any], tracker: str = "trackio") -> dict[str, str]:
    """Return the name and the project of a tracker's run; `config` are the resolved settings."""
    asked = config["trainer"]
    return {
        "run_name": asked.get("run_name") or f"{config['name']}/{config['stage']}",
        "project": asked.get("project") or os.environ.get(f"{tracker.upper()}_PROJECT") or DEFAULT_PROJECT,
    }


class Run(NamedTuple):
    """A tracker's run of one stage."""

    log: Callable[[Mapping[str, float], int], None]  # (figures by name, step)
    table: Callable[[str, Sequence[str], Cells, int], None]  # (name, headings, cells, step)
    close: Callable[[bool], None]  # (whether the stage failed)


def _tensorboard(config: dict[str, Any], folder: Path, step: int) -> Run:
    """Write event files to the run directory, or below TENSORBOARD_LOGGING_DIR. Events after `step` are hidden."""
    from torch.utils.tensorboard import SummaryWriter

    root = os.environ.get("TENSORBOARD_LOGGING_DIR")
    place = Path(root).expanduser() / naming(config)["run_name"] if root else folder / "tensorboard"
    writer: Any = SummaryWriter(str(place), purge_step=step + 1)
    settings = json.dumps(config, indent=2, ensure_ascii=True)
    writer.add_text("settings", textwrap.indent(settings, "    "), step)  # indented, so Markdown shows a code block

    def log(values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)

    def table(name: str, heads: Sequence[str], cells: Cells, step: int) -> None:
        rows = [
            list(map(markdown_cell, heads)),
            ["---"] * len(heads),
            *(list(map(markdown_cell, row)) for row in cells),
        ]
        writer.add_text(name, "\n".join(f"| {' | '.join(row)} |" for row in rows), step)
        writer.flush()

    return Run(log, table, lambda failed: writer.close())


def _trackio(config: dict[str, Any], folder: Path, step: int) -> Run:
    """Open a run in Trackio's own folder on this machine, or in the Space that the user names."""
    import trackio

    asked, named = config["trainer"], naming(config, "trackio")
    private = asked.get("hub_private_repo")
    trackio.init(
        project=named["project"], name=named["run_name"], group=config["name"], embed=False, private=private,
        resume="allow" if step else "never",  # never: a run of that name may belong to a deleted folder
        space_id=asked.get("trackio_space_id"), bucket_id=asked.get("trackio_bucket_id"),
    )  # fmt: skip
    trackio.config["settings"] = config

    def close(failed: bool) -> None:
        space, static = trackio.context_vars.current_space_id.get(), asked.get("trackio_static_space_id")
        trackio.finish()
        if space and static:
            trackio.freeze(space_id=space, project=named["project"], new_space_id=static, private=private)

    return _in_rows(trackio, close)


def _wandb(config: dict[str, Any], folder: Path, step: int) -> Run:
    """Open a run of Weights & Biases. With WANDB_MODE=offline its files are in the run directory."""
    import wandb

    named = naming(config, "wandb")
    wandb.init(
        project=named["project"], name=named["run_name"], id=_key(folder, named), resume="allow",
        config={"settings": config}, group=os.environ.get("WANDB_RUN_GROUP") or config["name"],
        dir=os.environ.get("WANDB_DIR") or str(folder),
    )  # fmt: skip
    wandb.define_metric(_STEP)
    wandb.define_metric("*", step_metric=_STEP, step_sync=True)
    return _in_rows(wandb, lambda failed: wandb.finish(exit_code=int(failed)), allow_mixed_types=True)


def _swanlab(config: dict[str, Any], folder: Path, step: int) -> Run:
    """Open a run of SwanLab. With SWANLAB_MODE=offline or local its files are in the run directory."""
    import swanlab

    named = naming(config, "swanlab")
    swanlab.init(
        project=named["project"], name=named["run_name"], id=_key(folder, named), resume="allow",
        config={"settings": config}, group=os.environ.get("SWANLAB_GROUP") or config["name"],
        log_dir=os.environ.get("SWANLAB_LOG_DIR") or str(folder / "swanlab"),
    )  # fmt: skip

    def log(values: Mapping[str, float], step: int) -> None:
        swanlab.log(dict(values), step=step)

    def table(name: str, heads: Sequence[str], cells: Cells, step: int) -> None:
        swanlab.log({name: swanlab.echarts.Table().add(list(heads), [list(row) for row in cells])}, step=step)

    return Run(log, table, lambda failed: swanlab.finish(state="crashed" if failed else "success"))


def _key(folder: Path, named: Mapping[str, str]) -> str:
    """Return the id of the tracker's run: the same for a resumed stage, a new one for a stage that starts over."""
    began = read_object(folder / "run.json").get("started", "")
    return hashlib.sha256(json.dumps([began, *named.values()]).encode()).hexdigest()[:12]


def _in_rows(api: Any, close: Callable[[bool], None], **more: bool) -> Run:
    """Return a `Run` for a tracker that takes the step as a figure like any other."""

    def table(name: str, heads: Sequence[str], cells: Cells, step: int) -> None:
        api.log({name: api.Table(columns=heads, data=cells, **more), _STEP: step})

    return Run(lambda values, step: api.log({**values, _STEP: step}), table, close)


KINDS = {"tensorboard": _tensorboard, "trackio": _trackio, "wandb": _wandb, "swanlab": _swanlab}


def markdown_cell(value: Any) -> str:
    """Escape a value for a cell of a Markdown table, because generated text may contain markup."""
    return _MARKS.sub(lambda mark: _REFERENCES.get(mark[0]) or f"&#{ord(mark[0])};", printable(display(value)))
