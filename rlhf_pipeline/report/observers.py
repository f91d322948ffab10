"""The observers of a stage: its page, its model card and the trackers. Their errors never stop the stage."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.report import trackers
from rlhf_pipeline.report.cards import write_cards
from rlhf_pipeline.report.figures import evaluation_tables
from rlhf_pipeline.report.files import as_dict, columns, read_object
from rlhf_pipeline.report.stage import write_report

SECONDS, SHARE = 5.0, 50.0  # least time between two drawings: in seconds, and as a multiple of the last drawing's time


class Observers:
    """The page, the model card and the trackers of a stage's folder. `RunDir` calls the methods.

    `with Observers(folder) as watching` closes the trackers, and marks them failed if the block raises. An observer
    that raises is dropped with a warning. A resumed run repeats the steps after its checkpoint: TensorBoard hides the
    earlier rows, the other trackers show both.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.open = folder, dict[str, trackers.Run]()
        self._due = 0.0  # the earliest time of the next drawing, as `time.monotonic`

    def started(self, config: dict[str, Any], step: int) -> None:
        """Open the trackers that the resolved settings name. Training continues from `step`."""
        config = {key: value for key, value in config.items() if key not in ("defaults", "hydra")}
        for name in trackers.chosen_trackers(as_dict(config.get("trainer")).get("report_to")):
            with self._trying(name):
                self.open[name] = trackers.KINDS[name](config, self.folder, step)

    def logged(self, step: int, values: dict[str, Any]) -> None:
        """Log a row of metrics.jsonl, with the names that transformers gives to figures."""
        named = {f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": value
                 for key, value in values.items() if isinstance(value, int | float)}  # fmt: skip
        self._each("log", named, step)

    def sampled(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """Show the policy's answers with their rewards, as in samples.jsonl."""
        heads = ["prompt", "response", "reward"]
        self._each("table", "samples", heads, [[row[key] for key in heads] for row in samples], step)

    def evaluated(self, config: dict[str, Any], evaluation: dict[str, Any]) -> None:
        """Log the tables of an evaluation, and their figures."""
        self.started(config, 0)
        for title, corner, rows in evaluation_tables(evaluation):
            keys = columns(rows.values())
            numbers = {f"evaluate/{name}/{key}": row[key] for name, row in rows.items() for key in keys
                       if isinstance(row.get(key), int | float)}  # fmt: skip
            self._each("log", numbers, 0)
            cells = [[name, *map(row.get, keys)] for name, row in rows.items()]
            self._each("table", f"evaluate/{title}", [corner, *keys], cells, 0)

    def added(self) -> None:
        """Draw the page again if enough time has passed. Called when a file has grown."""
        if time.monotonic() >= self._due:
            self._draw()

    def ended(self) -> None:
        """Draw the page, and write the card if the stage is done. run.json holds the status."""
        if read_object(self.folder / "run.json").get("status") == "done":
            with self._trying("the card"):
                write_cards(self.folder)
        self._draw()

    def _draw(self) -> None:
        began, self._due = time.monotonic(), math.inf  # inf: if drawing fails, the next try is at the end
        with self._trying("report.html"):
            write_report(self.folder)
            self._due = time.monotonic() + max(SECONDS, SHARE * (time.monotonic() - began))

    def __enter__(self) -> "Observers":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._each("close", kind is not None)

    def _each(self, method: str, *values: Any) -> None:
        for name, run in list(self.open.items()):
            with self._trying(name):
                getattr(run, method)(*values)

    @contextlib.contextmanager
    def _trying(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # an observer must not stop the training
            self.open.pop(name, None)
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"warning: {name} failed ({reason}) and is left out; the run goes on", flush=True)
