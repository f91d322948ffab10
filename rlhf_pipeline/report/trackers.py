"""Trackers beside metrics.jsonl: TensorBoard, Trackio, Weights & Biases. A tracker that fails costs the run nothing."""

import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.report.figures import answers_of, evaluation_tables
from rlhf_pipeline.report.files import columns, members
from rlhf_pipeline.texts import shown

# The fields of `trainer` that say where figures are shown. Every stage but chat takes them; its work is the same.
FIELDS = ("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
PROJECT = "rlhf_pipeline"
_STEP = "train/global_step"  # as transformers calls it in trackers that count rows instead
# What may mark up a line of Markdown or HTML, line ends, and the blanks that HTML drops.
_MARKS = re.compile(r"\n|(?:(?<=\s)|^) |[^\w ]|_")
_REFERENCES = {"\n": "<br>", " ": "&#160;"}
Cells = Sequence[Sequence[Any]]


def chosen(report_to: Any) -> list[str]:
    """The trackers that `report_to` names; none for null and `none`."""
    words = report_to if isinstance(report_to, list) else [report_to]
    return [word for word in dict.fromkeys(str(word) for word in words if word is not None) if word != "none"]


def check(report_to: Any) -> None:
    """Refuse a tracker that is not installed, and others of transformers, which would get no samples or tables."""
    for word in chosen(report_to):
        if word not in _KINDS:
            takes = f"It takes none, {', '.join(_KINDS)}, or a list: trainer.report_to=[{','.join(_KINDS)}]."
            why = "would mean whatever is installed" if word == "all" else "is not a supported tracker"
            raise UserError(f"trainer.report_to={word} {why}. {suggest(word, _KINDS)}{takes}")
        found = importlib.util.find_spec(word)
        if found is None or found.origin is None:  # a mere folder of that name
            raise UserError(
                f"trainer.report_to={word} needs {word}, which is not installed: pip install 'rlhf_pipeline[{word}]', "
                f"or choose one of: {', '.join(['none', *(kind for kind in _KINDS if kind != word)])}."
            )


def ready(report_to: Any) -> None:
    """Refuse Weights & Biases where it would prompt for a key: in a script nobody answers."""
    if "wandb" not in chosen(report_to):
        return
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports to its makers
    import wandb

    try:
        if wandb.setup().settings.mode not in ("online", "run", "shared") or wandb.login(prompt=False, verify=False):
            return  # whether the network is up is not asked
        reason = "nobody is logged in"
    except Exception as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
    raise UserError(
        f"trainer.report_to=wandb: {reason}. Run 'wandb login' or set WANDB_API_KEY; WANDB_MODE=offline keeps the run "
        "on this machine, for 'wandb sync'."
    )


def naming(config: Mapping[str, Any], tracker: str = "trackio") -> dict[str, str]:
    """The name and the project of a stage's run; `config` are the resolved settings."""
    asked = config["trainer"]
    return {
        "run_name": asked.get("run_name") or f"{config['name']}/{config['stage']}",
        "project": asked.get("project") or os.environ.get(f"{tracker.upper()}_PROJECT") or PROJECT,
    }


class TensorBoard:
    """Event files in the run directory, or below TENSORBOARD_LOGGING_DIR; steps after `step` are hidden."""

    def __init__(self, config: dict[str, Any], folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        root = os.environ.get("TENSORBOARD_LOGGING_DIR")
        folder = Path(root).expanduser() / naming(config)["run_name"] if root else folder / "tensorboard"
        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
        lines = json.dumps(config, indent=2, ensure_ascii=True).split("\n")
        self.writer.add_text("settings", "\n".join(f"    {line}" for line in lines), step)  # indented: a code block

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def table(self, step: int, name: str, heads: Sequence[str], cells: Cells) -> None:
        """A table in Markdown, which TensorBoard renders."""
        rows = [[literal(cell) for cell in heads], ["---"] * len(heads), *([literal(c) for c in row] for row in cells)]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(row)} |" for row in rows), step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class _Rows:
    """Trackio and Weights & Biases log rows, in which the step is a figure like others."""

    api: Any
    mixed: Mapping[str, bool] = MappingProxyType({})  # asks for a table of texts and numbers

    def figures(self, step: int, values: Mapping[str, float]) -> None:
        self.api.log({**values, _STEP: step})

    def table(self, step: int, name: str, heads: Sequence[str], cells: Cells) -> None:
        self.api.log({name: self.api.Table(columns=heads, data=cells, **self.mixed), _STEP: step})


class Trackio(_Rows):
    """A run in Trackio's own folder on this machine, or in the Space that the user names."""

    def __init__(self, config: dict[str, Any], folder: Path, step: int) -> None:
        import trackio

        self.asked, self.named, self.api = config["trainer"], naming(config, "trackio"), trackio
        trackio.init(
            project=self.named["project"], name=self.named["run_name"], group=config["name"], embed=False,
            resume="allow" if step else "never",  # a run of that name may belong to a folder that was deleted
            space_id=self.asked.get("trackio_space_id"), bucket_id=self.asked.get("trackio_bucket_id"),
            private=self.asked.get("hub_private_repo"),
        )  # fmt: skip
        trackio.config["settings"] = config

    def close(self, failed: bool) -> None:
        space = self.api.context_vars.current_space_id.get()
        self.api.finish()
        if space and (static := self.asked.get("trackio_static_space_id")):
            private = self.asked.get("hub_private_repo")
            self.api.freeze(space_id=space, project=self.named["project"], new_space_id=static, private=private)


class Wandb(_Rows):
    """A run of Weights & Biases, which with WANDB_MODE=offline lies in the run directory."""

    mixed = MappingProxyType({"allow_mixed_types": True})

    def __init__(self, config: dict[str, Any], folder: Path, step: int) -> None:
        import wandb

        named, self.api = naming(config, "wandb"), wandb
        wandb.init(
            project=named["project"], name=named["run_name"], id=_run_id(folder, named), resume="allow",
            group=os.environ.get("WANDB_RUN_GROUP") or config["name"],
            dir=os.environ.get("WANDB_DIR") or str(folder), config={"settings": config},
        )  # fmt: skip
        wandb.define_metric("*", step_metric=_STEP, step_sync=True)

    def close(self, failed: bool) -> None:
        self.api.finish(exit_code=int(failed))


_KINDS: dict[str, Callable[[dict[str, Any], Path, int], Any]] = {
    "tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb,
}  # fmt: skip


def _run_id(folder: Path, named: dict[str, str]) -> str:
    """The same whenever this stage's run is resumed under the same name; another once it is started over."""
    record = folder / "run.json"
    started = json.loads(record.read_text(encoding="utf-8"))["started"] if record.exists() else ""
    return hashlib.sha256(json.dumps([started, *named.values()]).encode()).hexdigest()[:12]


class Trackers:
    """The trackers of one stage's run, which show what its files hold; one that fails is left out, with a warning.

    A resumed run repeats the steps after its checkpoint. TensorBoard hides the first time; the others show both.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, Any] = {}

    def start(self, config: dict[str, Any], step: int = 0) -> None:
        """Open those that the resolved settings name; training goes on from `step`."""
        config = {key: value for key, value in config.items() if key not in ("defaults", "hydra")}
        for name in chosen(members(config.get("trainer")).get("report_to")):
            self._try(name, self._open, name, config, step)

    def logged(self, step: int, values: Mapping[str, Any]) -> None:
        """The figures of one row of metrics.jsonl, under the names that transformers gives them."""
        rows = {key: value for key, value in values.items() if isinstance(value, int | float)}
        named = {f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": rows[key] for key in rows}
        self._each(lambda tracker: tracker.figures(step, named))

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The policy's answers with their rewards: the rows that samples.jsonl gets."""
        heads = ["prompt", "response", "reward"]
        self._each(lambda tracker: tracker.table(step, "samples", heads, [[row[key] for key in heads] for row in rows]))

    def evaluation(self, config: dict[str, Any], found: Mapping[str, Any]) -> None:
        """The tables of an evaluation, their figures, and the answers that it shows."""
        self.start(config)
        tables, answers = evaluation_tables(found), answers_of(found)
        numbers = {f"evaluate/{name}/{key}": value for table in tables for name, row in table.rows.items()
                   for key, value in row.items() if isinstance(value, int | float)}  # fmt: skip
        self._each(lambda tracker: tracker.figures(0, numbers))
        for title, corner, rows in tables:
            heads = columns(rows.values())
            cells = [[name, *(row.get(key) for key in heads)] for name, row in rows.items()]
            self._table(f"evaluate/{title}", [corner, *heads], cells)
        if answers:
            names = list(answers[0]["responses"])
            heads = ["prompt", *(head for name in names for head in (name, f"reward of {name}"))]
            cells = [[row["prompt"], *(row[part].get(name) for name in names for part in ("responses", "rewards"))]
                     for row in answers]  # fmt: skip
            self._table("evaluate/answers", heads, cells)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._each(lambda tracker: tracker.close(kind is not None))
        self.open = {}

    def _table(self, name: str, heads: Sequence[str], cells: Cells) -> None:
        self._each(lambda tracker: tracker.table(0, name, heads, cells))

    def _open(self, name: str, config: dict[str, Any], step: int) -> None:
        self.open[name] = _KINDS[name](config, self.folder, step)

    def _each(self, act: Callable[[Any], None]) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, act, tracker)

    def _try(self, name: str, act: Callable[..., None], *args: Any) -> None:
        try:
            act(*args)
        except Exception as error:  # a tracker must not end the training
            self.open.pop(name, None)
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"warning: {name} failed ({reason}) and is left out; the run goes on", flush=True)


def literal(value: Any) -> str:
    """A value for a cell of a table in Markdown, marking up nothing: generated text is data."""
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else shown(str(value))
    return _MARKS.sub(lambda mark: _REFERENCES.get(mark[0]) or f"&#{ord(mark[0])};", text)
