"""Measure how far a reward can be trusted, on held-out prompts and texts."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_pipeline.data.records import Labelled
from rlhf_pipeline.evaluation import metrics
from rlhf_pipeline.evaluation.accuracy import Accuracy
from rlhf_pipeline.models.classifiers import Scorer
from rlhf_pipeline.progress import progress
from rlhf_pipeline.training.preferences import Comparison


def scores(strings: Sequence[str], scorer: Scorer, title: str = "quality") -> torch.Tensor:
    """Return logits (strings, classes), and show a bar."""
    with progress(len(strings), title, "text") as bar:
        return torch.cat([scorer.logits(strings[i : i + 512], bar.update) for i in range(0, len(strings), 512)])


def is_near_chance(quality: Mapping[str, Any], labels: Sequence[int]) -> bool:
    """Return whether an accuracy is less than a standard error above chance.

    Chance is the share of the more frequent of the held-out `labels`; one half for pairs, which have none.
    """
    positive = sum(labels) / len(labels) if labels else 0.5
    return bool(quality["accuracy"] < max(positive, 1 - positive) + math.sqrt(0.25 / quality["rows"]))


def labelled_quality(rows: Sequence[Labelled], scorer: Scorer) -> dict[str, Any]:
    """Measure a classifier on held-out rows."""
    texts, truth = [row.text for row in rows], np.array([row.label for row in rows])
    logits = scores(texts, scorer).numpy()
    score = logits[:, 1] - logits[:, 0]  # log odds of positive
    margin = np.where(truth == 1, score, -score)
    return _quality((score > 0).astype(int), truth, margin, score, score, truth, texts) | {"rows": len(rows)}


def preference_quality(rows: Sequence[Comparison], scorer: Scorer) -> dict[str, Any]:
    """Measure how often, and by how much, a reward model prefers what people preferred. A tie counts as wrong."""
    texts = [row.texts(scorer.tokenizer) for row in rows]
    every = [text for row in texts for text in row]
    score = scores(every, scorer)[:, 0].numpy()
    margins: list[float] = []
    of_prompt: dict[Any, list[bool]] = {}
    first = np.cumsum([0, *map(len, texts)])
    for number, (row, start) in enumerate(zip(rows, first, strict=False)):
        own = [score[start + i] - score[start + j] for i, j, _ in row.pairs]
        margins += own
        of_prompt.setdefault(row.prompt or number, []).extend(margin > 0 for margin in own)
    margin = np.array(margins)
    right = (margin > 0).astype(int)
    return _quality(right, np.ones_like(right), margin, score, np.abs(margin), right, every) | {
        "prompt_accuracy": float(np.mean([np.mean(own) for own in of_prompt.values()])),
        "rows": len(rows),
        "prompts": len(of_prompt),
        "pairs": len(margin),
    }


def _quality(
    found: NDArray[Any], truth: NDArray[Any], margin: NDArray[Any], score: NDArray[Any], log_odds: NDArray[Any],
    happened: NDArray[Any], texts: Sequence[str],
) -> dict[str, Any]:  # fmt: skip
    """Return accuracy, statistics of the scores, and calibration: how well `log_odds` predict what `happened`."""
    calibration, error = metrics.calibration(1 / (1 + np.exp(-log_odds.astype(np.float64))), happened)
    return {
        **Accuracy().compute(predictions=found, references=truth),
        "margin": float(margin.mean()),
        "calibration_error": error,
        "length_correlation": metrics.correlation(score, [len(text) for text in texts]),
        "score_mean": float(score.mean()),
        "score_std": float(score.std()),
        "calibration": calibration,
    }


def example_rows(texts: Sequence[str], scorer: Scorer) -> list[dict[str, Any]]:
    """Return each text with the probability of each class by its name, or with its score."""
    logits = scorer.logits(texts)
    if scorer.labels == 1:
        return [{"text": text, "score": float(row[0])} for text, row in zip(texts, logits, strict=True)]
    names = [str(scorer.model.config.id2label[index]) for index in range(scorer.labels)]
    found = [dict(zip(names, row, strict=True)) for row in logits.softmax(-1).tolist()]
    return [{"text": text, "probabilities": row} for text, row in zip(texts, found, strict=True)]
