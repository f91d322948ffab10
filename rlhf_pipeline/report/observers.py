"""What watches a stage: its page, the card of its model, and trackers. None of them can end the work that it shows."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_pipeline.report.stage import write_report
from rlhf_pipeline.report.trackers import Trackers
from rlhf_pipeline.runs.directory import Observer

SECONDS, SHARE = 5.0, 50.0  # between two drawings: at least so long, and so many times what the last one took


class LivePage:
    """A stage's page while the stage goes: drawn seldom, and a page that cannot be drawn stops nothing."""

    def __init__(self, folder: Path) -> None:
        self.folder, self._due, self._warned = folder, 0.0, False

    def draw(self, whole: bool = False) -> None:
        """Draw the page if it is due; at the end (`whole`) in any case."""
        began = time.monotonic()
        if whole or began >= self._due:
            try:
                write_report(self.folder)
            except Exception as error:
                if not self._warned:
                    print(f"warning: {self.folder / 'report.html'} could not be drawn: {error}", flush=True)
                self._warned = True
            self._due = time.monotonic() + max(SECONDS, SHARE * (time.monotonic() - began))


class Observers(Observer):
    """The page, the card and the trackers of one stage's folder; its run directory tells them what happens.

    `with Observers(folder) as watching` closes the trackers, as failed if the block raises.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.page, self.trackers = folder, LivePage(folder), Trackers(folder)

    def started(self, config: dict[str, Any], step: int) -> None:
        self.trackers.start(config, step)

    def logged(self, step: int, values: dict[str, Any]) -> None:
        self.trackers.logged(step, values)

    def sampled(self, step: int, samples: Sequence[dict[str, Any]]) -> None:
        self.trackers.samples(step, samples)

    def evaluated(self, config: dict[str, Any], evaluation: dict[str, Any]) -> None:
        self.trackers.evaluation(config, evaluation)

    def added(self) -> None:
        self.page.draw()

    def finishing(self, record: dict[str, Any]) -> None:
        """`record` is about to become run.json: what is done has a card already."""
        from rlhf_pipeline.report.cards import write_cards

        write_cards(self.folder, record)

    def ended(self) -> None:
        """run.json says how: done, waiting, interrupted or failed."""
        self.page.draw(whole=True)

    def __enter__(self) -> "Observers":
        return self

    def __exit__(self, *error: Any) -> None:
        self.trackers.__exit__(*error)
