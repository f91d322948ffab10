"""Accuracy as a module of `evaluate`. It is defined here, so it needs no network. It is slow to import."""

from collections.abc import Sequence

import datasets
import evaluate
import numpy as np


class Accuracy(evaluate.Metric):
    """Share of predictions equal to their reference. `evaluate` would download its own accuracy module from the hub."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features({part: datasets.Value("int32") for part in ("predictions", "references")})
        return evaluate.MetricInfo(description="accuracy", citation="", inputs_description="", features=features)

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}
