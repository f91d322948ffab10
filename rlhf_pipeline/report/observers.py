"""What watches a stage: its page, the card of its model, and trackers. None of them can end the work that it shows."""

import contextlib
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.report import trackers
from rlhf_pipeline.report.cards import write_cards
from rlhf_pipeline.report.figures import evaluation_tables
from rlhf_pipeline.report.files import columns, members, only
from rlhf_pipeline.report.stage import write_report

SECONDS, SHARE = 5.0, 50.0  # between two drawings: at least so long, and so many times what the last one took


class Observers:
    """The page, the card and the trackers of one stage's folder; its run directory tells them what happens.

    `with Observers(folder) as watching` closes the trackers, as failed if the block raises. What fails is left out,
    with a warning. A resumed run repeats the steps after its checkpoint: TensorBoard hides the first time, the other
    trackers show both.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.open = folder, dict[str, trackers.Run]()
        self._due = 0.0  # when the page is drawn again, by the clock of `time.monotonic`

    def started(self, config: dict[str, Any], step: int) -> None:
        """Open the trackers that the resolved settings name; training goes on from `step`."""
        config = {key: value for key, value in config.items() if key not in ("defaults", "hydra")}
        for name in trackers.chosen(members(config.get("trainer")).get("report_to")):
            with self._trying(name):
                self.open[name] = trackers.KINDS[name](config, self.folder, step)

    def logged(self, step: int, values: dict[str, Any]) -> None:
        """A row of metrics.jsonl, under the names that transformers gives its figures."""
        named = {f"eval/{key[5:]}" if key.startswith("eval_") else f"train/{key}": value
                 for key, value in values.items() if isinstance(value, int | float)}  # fmt: skip
        self._each("log", named, step)

    def sampled(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        """The policy's answers with their rewards, as in samples.jsonl."""
        heads = ["prompt", "response", "reward"]
        self._each("table", "samples", heads, [[row[key] for key in heads] for row in samples], step)

    def evaluated(self, config: dict[str, Any], evaluation: dict[str, Any]) -> None:
        """The tables of an evaluation, and their figures."""
        self.started(config, 0)
        for title, corner, rows in evaluation_tables(evaluation):
            keys = columns(rows.values())
            numbers = {f"evaluate/{name}/{key}": row[key] for name, row in rows.items() for key in keys
                       if isinstance(row.get(key), int | float)}  # fmt: skip
            self._each("log", numbers, 0)
            cells = [[name, *map(row.get, keys)] for name, row in rows.items()]
            self._each("table", f"evaluate/{title}", [corner, *keys], cells, 0)

    def added(self) -> None:
        """A file has grown: the page is drawn again if that is due."""
        if time.monotonic() >= self._due:
            self._draw()

    def ended(self) -> None:
        """run.json says how: done, waiting, interrupted or failed."""
        if only(self.folder / "run.json").get("status") == "done":
            with self._trying("the card"):
                write_cards(self.folder)
        self._draw()

    def _draw(self) -> None:
        began, self._due = time.monotonic(), math.inf  # if it fails, it is tried once more: at the end
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
        except Exception as error:  # none of them may end the training
            self.open.pop(name, None)
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
            print(f"warning: {name} failed ({reason}) and is left out; the run goes on", flush=True)
