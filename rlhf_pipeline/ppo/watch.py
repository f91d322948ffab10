"""The collapse watch: signs that a policy has found one thing to say, or is running away from its reference."""

from collections import deque
from collections.abc import Sequence
from typing import Any

from rlhf_pipeline.evaluation.metrics import Distinct, repeated

# What counts as a collapse, against the run's first updates.
_DISTINCT_SHARE = 0.5  # of the distinct bigrams there were at first
_REPEATED = 0.5  # of the answers are one that another prompt got as well
_LENGTH_SHARE = 0.25  # of the length there was at first
_STEEP = 10.0  # nats of KL more than a window ago, and more than twice what it was


class CollapseWatch:
    """Rolling figures over a window of updates, and a plain warning where one says collapse. Holds only numbers."""

    def __init__(self, window: int) -> None:
        self.window = window
        self.first: dict[str, float] = {}  # the figures of the first updates, averaged
        self.seen = 0
        self.recent: deque[dict[str, float]] = deque(maxlen=window)
        self.warned: set[str] = set()

    def update(self, responses: Sequence[str], length: float, kl: float) -> tuple[dict[str, float], list[str]]:
        """Take in one update's answers; give figures to log, and warnings that have not been given before."""
        distinct = Distinct().compute(predictions=list(responses), references=list(responses), n=2)["distinct_2"]
        figures = {
            "distinct_2": float(distinct),
            "repeated": repeated(responses),
            "length": length,
            "kl": kl,
        }
        self.recent.append(figures)
        self.seen += 1
        early = max(1, self.window // 4)
        if self.seen <= early:
            for name, value in figures.items():
                self.first[name] = self.first.get(name, 0.0) + value / early
        rolling = {name: sum(row[name] for row in self.recent) / len(self.recent) for name in figures}
        slope = (self.recent[-1]["kl"] - self.recent[0]["kl"]) / max(len(self.recent) - 1, 1)
        found = {
            "watch/distinct_2": rolling["distinct_2"],
            "watch/repeated": rolling["repeated"],
            "watch/length": rolling["length"],
            "watch/kl_slope": slope,
        }
        return found, self._warnings(rolling) if self.seen > early else []

    def _warnings(self, rolling: dict[str, float]) -> list[str]:
        before, start, now = self.first, self.recent[0]["kl"], self.recent[-1]["kl"]
        told = {
            "distinct": (
                rolling["distinct_2"] < _DISTINCT_SHARE * before["distinct_2"],
                f"distinct bigrams fell from {before['distinct_2']:.2f} to {rolling['distinct_2']:.2f}",
            ),
            "repeated": (
                rolling["repeated"] > max(_REPEATED, 1.5 * before["repeated"]),
                f"{rolling['repeated']:.0%} of the answers are given to more than one prompt",
            ),
            "length": (
                rolling["length"] < _LENGTH_SHARE * before["length"],
                f"answers shrank from {before['length']:.1f} to {rolling['length']:.1f} tokens",
            ),
            "kl": (
                len(self.recent) == self.window and now - start > max(_STEEP, start),
                f"KL went from {start:.2f} to {now:.2f} nats in {self.window} updates",
            ),
        }
        fresh = [name for name, (true, _) in told.items() if true and name not in self.warned]
        self.warned |= set(fresh)
        return [f"{told[name][1]}; a higher kl_coef or a lower learning_rate keeps it nearer" for name in fresh]

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs, as JSON holds it."""
        return {"first": self.first, "seen": self.seen, "recent": list(self.recent), "warned": sorted(self.warned)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.first, self.seen, self.warned = dict(state["first"]), state["seen"], set(state["warned"])
        self.recent = deque(state["recent"], maxlen=self.window)
