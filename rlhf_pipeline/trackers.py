"""Trackers beside metrics.jsonl: TensorBoard, Trackio, Weights & Biases. What fails in one costs the run nothing.

A trainer's figures go through transformers' own callbacks, which log into what is opened here.
"""

import functools
import importlib.util
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from rlhf_pipeline.atomic import write_json
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.scripts import shown

# The fields of `trainer` that say where figures are shown. Every stage but chat takes them; its work is the same.
FIELDS = ("report_to", "run_name", "project", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id")
PROJECT = "rlhf_pipeline"
_STEP = "train/global_step"  # as transformers calls it in trackers that count rows instead
_STATE = "trackers.json"
# What may mark up a line of Markdown or HTML, line ends, and the blanks that HTML drops.
_MARKS = re.compile(r"\n|(?:(?<=\s)|^) |[^\w ]|_")
_REFERENCES = {"\n": "<br>", " ": "&#160;"}


def chosen(report_to: Any) -> list[str]:
    """The trackers that `report_to` names; none for null and `none`."""
    words = report_to if isinstance(report_to, list) else [report_to]
    return [word for word in dict.fromkeys(str(word) for word in words if word is not None) if word != "none"]


def check(report_to: Any) -> None:
    """Refuse a word that names no tracker of ours, and a tracker that is not installed.

    Transformers knows more of them, to which samples and tables would not go, and which have not been tried.
    """
    for word in chosen(report_to):
        if word not in _KINDS:
            takes = f"It takes none, {', '.join(_KINDS)}, or a list: trainer.report_to=[{','.join(_KINDS)}]."
            why = "would be whatever is installed" if word == "all" else "is no tracker that is supported"
            raise UserError(f"trainer.report_to={word} {why}. {suggest(word, _KINDS)}{takes}")
        found = importlib.util.find_spec(word)
        if found is None or found.origin is None:  # a folder of that name in the current one is no package
            raise UserError(
                f"trainer.report_to={word} needs {word}, which is not installed: pip install 'rlhf_pipeline[{word}]', "
                f"or say one of: {', '.join(['none', *(kind for kind in _KINDS if kind != word)])}."
            )


def ready(report_to: Any) -> None:
    """Refuse Weights & Biases where it would ask for a key: a script has nobody to answer."""
    if "wandb" not in chosen(report_to):
        return
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # its reports to its makers
    import wandb

    try:
        if wandb.setup().settings.mode not in ("online", "run", "shared") or wandb.login(prompt=False, verify=False):
            return  # a network that is down is the run's affair, not the key's
        reason = "nobody is logged in"
    except Exception as error:
        reason = " ".join(str(error).split())[:300].rstrip(".")
    raise UserError(
        f"trainer.report_to=wandb: {reason}. Say 'wandb login' or set WANDB_API_KEY; WANDB_MODE=offline keeps the run "
        "on this machine, for 'wandb sync'."
    )


def naming(config: Mapping[str, Any], tracker: str = "trackio") -> dict[str, str]:
    """What a stage's run is called, and in which project; `config` are the resolved settings."""
    asked = config["trainer"]
    return {
        "run_name": asked.get("run_name") or f"{config['name']}/{config['stage']}",
        "project": asked.get("project") or os.environ.get(f"{tracker.upper()}_PROJECT") or PROJECT,
    }


class Run(NamedTuple):
    """What a tracker is told of the run that it is to show."""

    config: dict[str, Any]  # the resolved settings
    folder: Path
    step: int  # it goes on from there
    id: str  # the same as long as the run directory is
    resumed: bool  # the tracker has some of it


class Tracker(Protocol):
    """One tracker's run."""

    def adopt(self, callback: Any) -> None:
        """Have transformers' callback log into this run."""

    def figures(self, values: dict[str, float]) -> None:
        """Log numbers by name."""

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """Log rows of texts and numbers."""

    def close(self, failed: bool) -> None:
        """Write out what is left."""


class TensorBoard:
    """Event files in the run directory, or below TENSORBOARD_LOGGING_DIR."""

    def __init__(self, run: Run) -> None:
        from torch.utils.tensorboard import SummaryWriter

        root = os.environ.get("TENSORBOARD_LOGGING_DIR")
        folder = Path(root).expanduser() / naming(run.config)["run_name"] if root else run.folder / "tensorboard"
        # What a run that was cut off logged after its checkpoint is hidden: those steps are taken again.
        self.writer: Any = SummaryWriter(str(folder), purge_step=run.step + 1)
        lines = json.dumps(run.config, indent=2, ensure_ascii=True).split("\n")
        self.writer.add_text("settings", "\n".join(f"    {line}" for line in lines), run.step)  # indented, it is code

    def adopt(self, callback: Any) -> None:
        """The callback takes a writer."""
        callback.tb_writer, callback.logging_dir = self.writer, self.writer.log_dir

    def figures(self, values: dict[str, float]) -> None:
        """A scalar each."""
        for name, value in values.items():
            self.writer.add_scalar(name, value, 0)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """A table in Markdown, which the page renders."""
        head, *cells = [[literal(cell) for cell in row] for row in (columns, *rows)]
        lines = [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cells)]
        self.writer.add_text(name, "\n".join(lines), step)
        self.writer.flush()

    def close(self, failed: bool) -> None:
        """Close the file."""
        self.writer.close()


class Trackio:
    """A run in Trackio's own folder on this machine, or in the Space that the user names."""

    def __init__(self, run: Run) -> None:
        import trackio

        asked, named = run.config["trainer"], naming(run.config, "trackio")
        self.trackio: Any = trackio
        trackio.init(
            project=named["project"], name=named["run_name"], group=run.config["name"], embed=False,
            resume="allow" if run.resumed else "never",  # a run of that name may be of a folder that is no more
            space_id=asked.get("trackio_space_id"), bucket_id=asked.get("trackio_bucket_id"),
            private=asked.get("hub_private_repo"),
        )  # fmt: skip
        trackio.config["settings"] = run.config

    def adopt(self, callback: Any) -> None:
        """The callback's `setup` would open the run again."""

        def setup(args: Any, state: Any, model: Any, **_: Any) -> None:
            model_config = getattr(model, "config", None)
            self.trackio.config.update({**(model_config.to_dict() if model_config else {}), **args.to_dict()})
            callback._initialized, callback._space_id = True, self.trackio.context_vars.current_space_id.get()

        callback.setup = setup

    def figures(self, values: dict[str, float]) -> None:
        """One row."""
        self.trackio.log(values)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """A table in a row of its own; the page shows texts as they are."""
        self.trackio.log({name: self.trackio.Table(columns=columns, data=rows), _STEP: step})

    def close(self, failed: bool) -> None:
        """Write out what is queued, unless the callback did."""
        if self.trackio.context_vars.current_run.get() is not None:
            self.trackio.finish()


class Wandb:
    """A run of Weights & Biases, which with WANDB_MODE=offline lies in the run directory."""

    def __init__(self, run: Run) -> None:
        import wandb

        named = naming(run.config, "wandb")
        self.wandb: Any = wandb
        wandb.init(
            project=named["project"], name=named["run_name"], id=run.id, resume="allow",
            group=os.environ.get("WANDB_RUN_GROUP") or run.config["name"],
            dir=os.environ.get("WANDB_DIR") or str(run.folder), config={"settings": run.config},
        )  # fmt: skip

    def adopt(self, callback: Any) -> None:
        """The callback takes the run that is open."""

    def figures(self, values: dict[str, float]) -> None:
        """One row."""
        self.wandb.log(values)

    def table(self, name: str, columns: list[str], rows: list[list[Any]], step: int) -> None:
        """A table in a row of its own."""
        self.wandb.log({name: self.wandb.Table(columns=columns, data=rows, allow_mixed_types=True), _STEP: step})

    def close(self, failed: bool) -> None:
        """Send what is left."""
        self.wandb.finish(exit_code=int(failed))


_KINDS: dict[str, Callable[[Run], Tracker]] = {"tensorboard": TensorBoard, "trackio": Trackio, "wandb": Wandb}
_CALLBACKS = {"TensorBoardCallback": "tensorboard", "TrackioCallback": "trackio", "WandbCallback": "wandb"}


class Trackers:
    """The trackers of one stage's run. One that fails is warned of and left out from then on.

    TensorBoard hides the steps that a resumed run takes again. The others cannot: `trackers.json` keeps how far each
    has come, and what it was sent is not sent again, though a kill may cost the last row.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.open: dict[str, Tracker] = {}
        self.seen: dict[str, int] = {}  # the last step that a tracker has from an earlier process
        self.state: dict[str, dict[str, Any]] = {}
        self.endings: dict[str, Callable[[], None]] = {}

    def start(self, config: dict[str, Any], step: int = 0, callbacks: Iterable[Any] = ()) -> None:
        """Open what the resolved settings name, from `step` on, and have a trainer's callbacks log into it."""
        config = {key: value for key, value in config.items() if key not in ("defaults", "hydra")}
        file = self.folder / _STATE
        self.state = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        for name in chosen(config["trainer"].get("report_to")):
            own, named = self.state.get(name, {}), naming(config, name)
            if {key: own.get(key) for key in named} != named:  # none there, or under another name
                own = self.state[name] = {**named, "id": secrets.token_hex(4), "step": -1}
            self.seen[name] = -1 if name == "tensorboard" else own["step"]
            run = Run(config, self.folder, step, own["id"], own["step"] >= 0)
            self._try(name, self._open, name, run)
        for callback in callbacks:
            if type(callback).__name__ in _CALLBACKS:
                self._follow(_CALLBACKS[type(callback).__name__], callback)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """What the policy said, with its reward: the rows that samples.jsonl gets."""
        columns = ["prompt", "response", "reward"]
        for name, tracker in list(self.open.items()):
            if step > self.seen[name]:
                self._try(
                    name, tracker.table, "samples", columns, [[row[key] for key in columns] for row in rows], step
                )

    def evaluation(self, config: dict[str, Any], found: Mapping[str, Any]) -> None:
        """The before/after table of stage=evaluate, its figures, and the answers that it shows."""
        self.start(config)
        for name, tracker in list(self.open.items()):
            self._try(name, _show, tracker, found)

    def __enter__(self) -> "Trackers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for name, ending in self.endings.items():
            if name in self.open:
                self._try(name, ending)
        for name, tracker in list(self.open.items()):
            self._try(name, tracker.close, kind is not None)
        self.open, self.endings = {}, {}

    def _open(self, name: str, run: Run) -> None:
        self.open[name] = _KINDS[name](run)

    def _follow(self, name: str, callback: Any) -> None:
        if name in self.open:
            self._try(name, self.open[name].adopt, callback)
        for event in dir(callback):
            if event.startswith("on_"):
                setattr(callback, event, functools.partial(self._event, name, event, getattr(callback, event)))

    def _event(
        self, name: str, event: str, act: Callable[..., Any], args: Any, state: Any, *rest: Any, **more: Any
    ) -> None:
        """What the callback does of an event. The end waits for that of the stage, which may log after its training."""
        if event == "on_train_end":
            self.endings[name] = functools.partial(act, args, state, *rest, **more)
        elif name in self.open and not (event == "on_log" and state.global_step <= self.seen[name]):
            self._try(name, act, args, state, *rest, **more)
            if event == "on_log":
                self.state[name]["step"] = state.global_step
                write_json(self.folder / _STATE, self.state)

    def _try(self, name: str, act: Callable[..., Any], *args: Any, **more: Any) -> None:
        try:
            act(*args, **more)
        except Exception as error:  # whatever it is, it is not the training's
            self.open.pop(name, None)
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"warning: {name} failed ({reason}) and is left out; the run goes on", flush=True)


def literal(value: Any) -> str:
    """A value for a cell of a table in Markdown, where it is itself and nothing more: what a model wrote is data."""
    text = f"{value:.4g}" if isinstance(value, float) else "" if value is None else shown(str(value))
    return _MARKS.sub(lambda mark: _REFERENCES.get(mark[0]) or f"&#{ord(mark[0])};", text)


def _show(tracker: Tracker, evaluation: Mapping[str, Any]) -> None:
    """The evaluation's numbers by name, and as tables: policies by row for each reward, gains, answers side by side."""
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
