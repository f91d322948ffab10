"""How far a reward can be trusted: measured on prompts and texts that it was not trained on."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from rlhf_pipeline.data.records import Labelled
from rlhf_pipeline.evaluation import metrics
from rlhf_pipeline.models.classifiers import Scorer
from rlhf_pipeline.progress import progress

if TYPE_CHECKING:
    from rlhf_pipeline.training.preferences import Comparison


def scores(strings: Sequence[str], scorer: Scorer, title: str = "quality") -> torch.Tensor:
    """(strings, classes), with a bar."""
    with progress(len(strings), title, "text") as bar:
        return torch.cat([scorer.logits(strings[i : i + 512], bar.update) for i in range(0, len(strings), 512)])


def labelled_quality(rows: Sequence[Labelled], scorer: Scorer) -> dict[str, Any]:
    """A classifier's."""
    logits = scores([row.text for row in rows], scorer).numpy()
    truth = np.array([row.label for row in rows])
    score = logits[:, 1] - logits[:, 0]  # log odds of positive
    accuracy = metrics.Accuracy().compute(predictions=(score > 0).astype(int), references=truth)
    return {
        **accuracy,
        "rows": len(rows),
        "margin": float(np.where(truth == 1, score, -score).mean()),
        **_common(score, [len(row.text) for row in rows], _logistic(score), truth),
    }


def preference_quality(rows: Sequence["Comparison"], scorer: Scorer) -> dict[str, Any]:
    """A reward model's: how often, and by how much, it prefers what people preferred. A tie counts as wrong."""
    texts = [row.texts(scorer.tokenizer) for row in rows]
    score = scores([text for row in texts for text in row], scorer)[:, 0].numpy()
    first = np.cumsum([0, *map(len, texts)])
    margins = [
        np.array([score[start + i] - score[start + j] for i, j, _ in row.pairs])
        for start, row in zip(first, rows, strict=False)
    ]
    margin = np.concatenate(margins)
    of_prompt: dict[Any, list[NDArray[Any]]] = {}
    for number, (row, each) in enumerate(zip(rows, margins, strict=True)):
        of_prompt.setdefault(row.prompt or number, []).append(each > 0)
    right = (margin > 0).astype(int)
    lengths = [len(text) for row in texts for text in row]
    return {
        **metrics.Accuracy().compute(predictions=right, references=np.ones_like(right)),
        "prompt_accuracy": float(np.mean([np.concatenate(each).mean() for each in of_prompt.values()])),
        "rows": len(rows),
        "prompts": len(of_prompt),
        "pairs": len(margin),
        "margin": float(margin.mean()),
        **_common(score, lengths, _logistic(np.abs(margin)), right),
    }


def example_rows(texts: Sequence[str], scorer: Scorer) -> list[dict[str, Any]]:
    """What a reward makes of texts: the probability of each class by its name, or the score."""
    if not texts:
        return []
    logits = scorer.logits(texts)
    if scorer.labels == 1:
        return [{"text": text, "score": float(row[0])} for text, row in zip(texts, logits, strict=True)]
    names = [str(scorer.model.config.id2label[index]) for index in range(scorer.labels)]
    found = [dict(zip(names, row, strict=True)) for row in logits.softmax(-1).tolist()]
    return [{"text": text, "probabilities": row} for text, row in zip(texts, found, strict=True)]


def example_line(row: dict[str, Any]) -> str:
    """One of `example_rows` on one line."""
    values = row.get("probabilities") or {"score": row["score"]}
    return ", ".join(f"{name} {value:.3f}" for name, value in values.items()) + f": {' '.join(row['text'].split())}"


def _common(
    score: NDArray[Any], lengths: Sequence[int], probability: NDArray[Any], truth: NDArray[Any]
) -> dict[str, Any]:
    """Calibration, and what scores depend on."""
    calibration, error = metrics.calibration(probability, truth)
    return {
        "calibration_error": error,
        "length_correlation": metrics.correlation(score, lengths),
        "score_mean": float(score.mean()),
        "score_std": float(score.std()),
        "calibration": calibration,
    }


def _logistic(value: NDArray[Any]) -> NDArray[Any]:
    return 1 / (1 + np.exp(-value.astype(np.float64)))
