"""Measures of texts and scores. The `evaluate` modules among them are defined here, so they need no network."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import datasets
import evaluate
import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_pipeline.texts import words_of


class Accuracy(evaluate.Metric):
    """Share of predictions equal to their reference. The hub's module of that name is fetched as code; this is not."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("accuracy", "int32")

    def _compute(self, predictions: Sequence[int], references: Sequence[int]) -> dict[str, float]:
        return {"accuracy": float(np.mean(np.asarray(predictions) == np.asarray(references)))}


class Distinct(evaluate.Metric):
    """Different word n-grams over all of them, of all texts together (Li et al. 2016, arXiv 1510.03055)."""

    def _info(self) -> evaluate.MetricInfo:
        return _info("distinct-n", "string")

    def _compute(self, predictions: Sequence[str], references: Sequence[str], n: int = 2) -> dict[str, float]:
        return {f"distinct_{n}": distinct(predictions, n)}


def _info(name: str, kind: str) -> evaluate.MetricInfo:
    features = datasets.Features({part: datasets.Value(kind) for part in ("predictions", "references")})
    return evaluate.MetricInfo(description=name, citation="", inputs_description="", features=features)


def repeated(texts: Sequence[str]) -> float:
    """Share of texts that are there more than once, blanks around them apart; 0 where there are none."""
    counts = Counter(text.strip() for text in texts)
    return sum(count for count in counts.values() if count > 1) / max(len(texts), 1)


def self_bleu(texts: Sequence[str], most: int = 200) -> float | None:
    """Mean BLEU-4 of each text with all others as its references (Zhu et al. 2018, arXiv 1802.01886), from 0 to 1.

    None where fewer than two texts have words.

    Of the first `most` texts alone: it grows with their number, so that only equal numbers compare. An order of
    n-grams without a match counts as a tenth of one (Chen and Cherry 2014, method 1), one that a text is too short for
    not at all.
    """
    said = [words for text in texts[:most] if (words := words_of(text))]
    if len(said) < 2:
        return None
    precisions: list[list[float]] = [[] for _ in said]
    for n in range(1, 5):
        counts = [Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1)) for words in said]
        highest: dict[tuple[str, ...], tuple[int, int]] = {}  # of each n-gram, in any text and in any other than that
        for own in counts:
            for gram, count in own.items():
                first, second = highest.get(gram, (0, 0))
                highest[gram] = (max(first, count), max(second, min(first, count)))
        for place, own in enumerate(counts):
            matched = sum(min(count, highest[gram][count == highest[gram][0]]) for gram, count in own.items())
            if own:
                precisions[place].append(math.log((matched or 0.1) / own.total()))
    lengths = Counter(map(len, said))
    scores = [math.exp(float(np.mean(p)) + _brevity(len(w), lengths)) for p, w in zip(precisions, said, strict=True)]
    return float(np.mean(scores))


def _brevity(length: int, lengths: Counter[int]) -> float:
    """The logarithm of BLEU's penalty for a text shorter than the other that is nearest in length."""
    others = lengths - Counter([length])
    nearest = min(others, key=lambda other: (abs(other - length), other))
    return min(0.0, 1 - nearest / length)


def distinct(texts: Sequence[str], n: int) -> float:
    """Different word n-grams over all word n-grams of `texts`, an ideograph being a word; 0 where there are none."""
    grams = [tuple(words[i : i + n]) for words in map(words_of, texts) for i in range(len(words) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0


def correlation(first: ArrayLike, second: ArrayLike) -> float | None:
    """Pearson's correlation; None where either does not vary."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else None


def calibration(probability: NDArray[Any], truth: NDArray[Any], bins: int = 10) -> tuple[list[dict[str, float]], float]:
    """Predicted against observed share of positives in equal bins, and the expected calibration error."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    rows: list[dict[str, float]] = []
    for number in range(bins):
        inside = index == number
        if inside.any():
            predicted, observed = float(probability[inside].mean()), float(truth[inside].mean())
            rows.append({"predicted": predicted, "observed": observed, "count": int(inside.sum())})
    error = sum(row["count"] * abs(row["predicted"] - row["observed"]) for row in rows) / max(len(truth), 1)
    return rows, float(error)


def standard_error(values: ArrayLike) -> float:
    """Of the mean of independent values; 0 of a single one, which says nothing of it."""
    own = np.asarray(values, float)
    return float(own.std(ddof=1) / math.sqrt(len(own))) if len(own) > 1 else 0.0


def paired_gain(before: Sequence[float], after: Sequence[float], draws: int, seed: int) -> dict[str, float]:
    """Mean of `after - before` over the same prompts, its 95 % bootstrap interval, and how often `after` wins.

    A tie is half a win.
    """
    gain = np.asarray(after, float) - np.asarray(before, float)
    rng = np.random.default_rng(seed)
    means = np.array([gain[rng.integers(0, len(gain), len(gain))].mean() for _ in range(draws)])
    low, high = np.quantile(means, [0.025, 0.975])
    wins = float(np.mean(gain > 0) + 0.5 * np.mean(gain == 0))
    return {"mean": float(gain.mean()), "low": float(low), "high": float(high), "win_rate": wins}
