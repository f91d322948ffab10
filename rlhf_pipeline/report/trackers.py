"""Trackers beside metrics.jsonl: TensorBoard, Trackio, Weights & Biases. A tracker that fails costs the run nothing.

A trainer's figures go through transformers' own callbacks, which log into the runs opened here.
"""

import functools
import hashlib
import importlib.util
import json
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.texts import shown

# The fields of `trainer` that say where figures are shown. Every stage but chat takes them; its work is the same.
FIELDS = ("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
PROJECT = "rlhf_pipeline"
_STEP = "train/global_step"  # as transformers calls it in trackers that count rows instead
# What may mark up a line of Markdown or HTML, line ends, and the blanks that HTML drops.
_MARKS = re.compile(r"\n|(?:(?<=\s)|^) |[^\w ]|_")
_REFERENCES = {"\n": "<br>", " ": "&#160;"}


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


class Tracker:
    """One tracker's run for the resolved settings, opened in a stage's folder; training continues from `step`."""

    api: Any  # trackio or wandb, which have much in common

    def __init__(self, config: dict[str, Any], folder: Path, step: int) -> None: ...

    def adopt(self, callback: Any) -> None:
        """Have transformers' callback log into this run; WandbCallback does so by itself."""

    def figures(self, values: dict[str, float]) -> None:
        """Log numbers by name."""
        self.api.log(values)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log rows of texts and numbers."""
        self.api.log({name: self.api.Table(columns=columns, data=rows), _STEP: step})

    def close(self, failed: bool) -> None:
        """Write out what is left."""


class TensorBoard(Tracker):
    """Event files in the run directory, or below TENSORBOARD_LOGGING_DIR."""

    def __init__(self, config: dict[str, Any], folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        root = os.environ.get("TENSORBOARD_LOGGING_DIR")
        folder = Path(root).expanduser() / naming(config)["run_name"] if root else folder / "tensorboard"
        # Hides the steps after the checkpoint, which are taken again.
        self.writer: Any = SummaryWriter(str(folder), purge_step=step + 1)
        lines = json.dumps(config, indent=2, ensure_ascii=True).split("\n")
        self.writer.add_text("settings", "\n".join(f"    {line}" for line in lines), step)  # indented: a code block

    def adopt(self, callback: Any) -> None:
        callback.tb_writer, callback.logging_dir = self.writer, self.writer.log_dir

    def figures(self, values: dict[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, 0)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """A table in Markdown, which the page renders."""
        lines = [[literal(cell) for cell in columns], ["---"] * len(columns), *([literal(c) for c in r] for r in rows)]
        self.writer.add_text(name, "\n".join(f"| {' | '.join(line)} |" for line in lines), step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        self.writer.close()


class Trackio(Tracker):
    """A run in Trackio's own folder on this machine, or in the Space that the user names."""

    def __init__(self, config: dict[str, Any], folder: Path, step: int) -> None:
        import trackio

        asked, named, self.api = config["trainer"], naming(config, "trackio"), trackio
        trackio.init(
            project=named["project"], name=named["run_name"], group=config["name"], embed=False,
            resume="allow" if step else "never",  # a run of that name may belong to a folder that was deleted
            space_id=asked.get("trackio_space_id"), bucket_id=asked.get("trackio_bucket_id"),
            private=asked.get("hub_private_repo"),
        )  # fmt: skip
        trackio.config["settings"] = config

    def adopt(self, callback: Any) -> None:
        """The callback's `setup` would open the run again."""

        def setup(args: Any, state: Any, model: Any, **_: Any) -> None:
            model_config = getattr(model, "config", None)
            self.api.config.update({**(model_config.to_dict() if model_config else {}), **args.to_dict()})
            callback._initialized, callback._space_id = True, self.api.context_vars.current_space_id.get()

        callback.setup = setup

    def close(self, failed: bool) -> None:
        """Write out what is queued, unless the callback did."""
        if self.api.context_vars.current_run.get() is not None:
            self.api.finish()


class Wandb(Tracker):
    """A run of Weights & Biases, which with WANDB_MODE=offline lies in the run directory."""

    def __init__(self, config: dict[str, Any], folder: Path, step: int) -> None:
        import wandb

        named, self.api = naming(config, "wandb"), wandb
        wandb.init(
            project=named["project"], name=named["run_name"], id=_run_id(folder, named), resume="allow",
            group=os.environ.get("WANDB_RUN_GROUP") or config["name"],
            dir=os.environ.get("WANDB_DIR") or str(folder), config={"settings": config},
        )  # fmt: skip

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        table = self.api.Table(columns=columns, data=rows, allow_mixed_types=True)
        self.api.log({name: table, _STEP: step})

    def close(self, failed: bool) -> None:
        self.api.finish(exit_code=int(failed))


_KINDS: dict[str, Callable[[dict[str, Any], Path, int], Tracker]] = {
    "tensorboard": TensorBoard,
    "trackio": Trackio,
    "wandb": Wandb,
}
_CALLBACKS = {"TensorBoardCallback": "tensorboard", "TrackioCallback": "trackio", "WandbCallback": "wandb"}


class Trackers:
    """The trackers of one stage's run. A tracker that fails is left out from then on, with a warning.

    A resumed run repeats the steps after its checkpoint. TensorBoard hides the first time; the others show both.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, Tracker] = {}
        self.endings: dict[str, Callable[[], None]] = {}

    def start(self, config: dict[str, Any], step: int = 0, callbacks: Iterable[Any] = ()) -> None:
        """Open what the resolved settings name, from `step` on, and have a trainer's callbacks log into it."""
        config = {key: value for key, value in config.items() if key not in ("defaults", "hydra")}
        for name in chosen(config["trainer"].get("report_to")):
            self._try(name, self._open, name, config, step)
        for callback in callbacks:
            if type(callback).__name__ in _CALLBACKS:
                self._follow(_CALLBACKS[type(callback).__name__], callback)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """The policy's answers with their rewards: the rows that samples.jsonl gets."""
        columns = ["prompt", "response", "reward"]
        cells = [[row[key] for key in columns] for row in rows]
        self._each(lambda tracker: tracker.table("samples", columns, cells, step))

    def evaluation(self, config: dict[str, Any], found: Mapping[str, Any]) -> None:
        """The before/after table of stage=evaluate, its figures, and the answers that it shows."""
        self.start(config)
        self._each(lambda tracker: _show(tracker, found))

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, ending in self.endings.items():
            if name in self.open:
                self._try(name, ending)
        self._each(lambda tracker: tracker.close(kind is not None))
        self.open, self.endings = {}, {}

    def _open(self, name: str, config: dict[str, Any], step: int) -> None:
        self.open[name] = _KINDS[name](config, self.folder, step)

    def _follow(self, name: str, callback: Any) -> None:
        if name in self.open:
            self._try(name, self.open[name].adopt, callback)
        for event in dir(callback):
            if event.startswith("on_"):
                setattr(callback, event, functools.partial(self._event, name, event, getattr(callback, event)))

    def _event(self, name: str, event: str, act: Callable[..., Any], *args: Any, **more: Any) -> None:
        """Let the callback act on an event. Its end waits for the stage's, which may log after training."""
        if event == "on_train_end":
            self.endings[name] = functools.partial(act, *args, **more)
        elif name in self.open:
            self._try(name, act, *args, **more)

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.open.items()):
            self._try(name, act, tracker)

    def _try(self, name: str, act: Callable[..., Any], *args: Any, **more: Any) -> None:
        try:
            act(*args, **more)
        except Exception as error:  # a tracker must not end the training
            self.open.pop(name, None)
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"warning: {name} failed ({reason}) and is left out; the run goes on", flush=True)


def _run_id(folder: Path, named: dict[str, str]) -> str:
    """The same whenever this stage's run is resumed under the same name; another once it is started over."""
    record = folder / "run.json"
    started = json.loads(record.read_text(encoding="utf-8"))["started"] if record.exists() else ""
    return hashlib.sha256(json.dumps([started, *named.values()]).encode()).hexdigest()[:12]


def literal(value: Any) -> str:
    """A value for a cell of a table in Markdown, marking up nothing: generated text is data."""
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else shown(str(value))
    return _MARKS.sub(lambda mark: _REFERENCES.get(mark[0]) or f"&#{ord(mark[0])};", text)


def _show(tracker: Tracker, evaluation: Mapping[str, Any]) -> None:
    """Log numbers by name, and tables: policies by row for each reward, gains, answers side by side."""
    rows = {**evaluation["metrics"], **{f"gain {pair}": gain for pair, gain in evaluation["paired_gain"].items()}}
    numbers = {f"evaluate/{name}/{key}": value for name, row in rows.items() for key, value in row.items()}
    tracker.figures({name: value for name, value in numbers.items() if value is not None})
    for reward, found in {"": evaluation, **evaluation["rewards"]}.items():
        for title, first in (("metrics", "policy"), ("paired_gain", "pair")):
            if by_name := found[title]:
                columns = list(dict.fromkeys(key for row in by_name.values() for key in row))
                cells = [[name, *(row.get(key) for key in columns)] for name, row in by_name.items()]
                tracker.table(f"evaluate/{title} {reward}".rstrip(), [first, *columns], cells, 0)
    extremes = [row for kind in evaluation["extremes"].values() for row in kind]
    if answers := [*evaluation["examples"], *extremes, *evaluation["shown"]]:
        names = list(answers[0]["responses"])
        columns = ["prompt", *(column for name in names for column in (name, f"reward of {name}"))]
        cells = [
            [row["prompt"], *(row[part].get(name) for name in names for part in ("responses", "rewards"))]
            for row in answers
        ]
        tracker.table("evaluate/answers", columns, cells, 0)
