"""The collapse watch: signs that a policy repeats itself, moves far from its reference, or learns nothing."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from rlhf_pipeline.evaluation.metrics import distinct, repeated

_SAME = 5  # updates in a row in which all rewards are equal


@dataclass
class CollapseWatch:
    """Rolling means over a window of updates. Each sign of collapse gives one warning.

    Its fields are JSON, because a checkpoint stores them.
    """

    window: int
    first: dict[str, float] = field(default_factory=dict)  # means over the first quarter of a window
    seen: int = 0
    recent: list[dict[str, float]] = field(default_factory=list)  # figures of the last `window` updates
    warned: list[str] = field(default_factory=list)
    same: int = 0  # latest updates in a row with equal rewards

    def update(
        self, responses: Sequence[str], length: float, kl: float, spread: float
    ) -> tuple[dict[str, float], list[str]]:
        """Add an update; returns figures to log, and new warnings. `spread`: the rewards' standard deviation."""
        now = {"distinct_2": distinct(responses, 2), "repeated": repeated(responses), "length": length, "kl": kl}
        self.recent = [*self.recent, now][-self.window :]
        self.seen += 1
        self.same = self.same + 1 if len(responses) > 1 and spread == 0 else 0
        early = max(1, self.window // 4)
        if self.seen <= early:
            self.first = {name: self.first.get(name, 0.0) + value / early for name, value in now.items()}
        mean = {name: sum(row[name] for row in self.recent) / len(self.recent) for name in now}
        slope = (kl - self.recent[0]["kl"]) / max(len(self.recent) - 1, 1)
        figures = {f"watch/{name}": mean[name] for name in ("distinct_2", "repeated", "length")}
        warnings = self._warnings(mean) if self.seen > early else []
        if self.same == _SAME and "reward" not in self.warned:
            self.warned.append("reward")
            warnings.append(f"all responses of {_SAME} updates got the same reward, so the policy learns nothing")
        return {**figures, "watch/kl_slope": slope}, warnings

    def _warnings(self, mean: dict[str, float]) -> list[str]:
        first, start, now = self.first, self.recent[0]["kl"], self.recent[-1]["kl"]
        signs = {
            "distinct": (
                mean["distinct_2"] < 0.5 * first["distinct_2"],
                f"distinct bigrams fell from {first['distinct_2']:.2f} to {mean['distinct_2']:.2f}",
            ),
            "repeated": (
                mean["repeated"] > max(0.5, 1.5 * first["repeated"]),
                f"{mean['repeated']:.0%} of the responses are given to more than one prompt",
            ),
            "length": (
                mean["length"] < 0.25 * first["length"],
                f"responses shrank from {first['length']:.1f} to {mean['length']:.1f} tokens",
            ),
            "kl": (  # at least 10 nats in a window, and more than doubled
                len(self.recent) == self.window and now - start > max(10.0, start),
                f"KL went from {start:.2f} to {now:.2f} nats in {self.window} updates",
            ),
        }
        fresh = [name for name, (true, _) in signs.items() if true and name not in self.warned]
        self.warned += fresh
        return [f"{signs[name][1]}; raise kl_coef or lower learning_rate to stay near the reference" for name in fresh]
