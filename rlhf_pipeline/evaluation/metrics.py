"""Measures of texts and scores."""

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from rlhf_pipeline.texts import words_of


def _grams(words: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]


def variety(texts: Sequence[str]) -> dict[str, float | None]:
    """Return the diversity of answers: distinct n-grams, share of repeated answers, self-BLEU."""
    grams: dict[str, float | None] = {f"distinct_{n}": distinct(texts, n) for n in (1, 2, 3)}
    return {**grams, "repeated": repeated(texts), "self_bleu": self_bleu(texts)}


def distinct(texts: Sequence[str], n: int) -> float:
    """Return distinct word n-grams over all word n-grams of `texts`; 0 if there are none. An ideograph is a word."""
    grams = [gram for text in texts for gram in _grams(words_of(text), n)]
    return len(set(grams)) / len(grams) if grams else 0.0


def repeated(texts: Sequence[str]) -> float:
    """Return the share of texts that occur more than once, ignoring outer whitespace; 0 if there are no texts."""
    counts = Counter(text.strip() for text in texts)
    return sum(count for count in counts.values() if count > 1) / max(len(texts), 1)


def self_bleu(texts: Sequence[str], most: int = 200) -> float | None:
    """Return the mean BLEU-4 of each text against all others (Zhu et al. 2018, arXiv 1802.01886), from 0 to 1.

    None if fewer than two texts have words. Only the first `most` texts count: self-BLEU grows with their number, so
    compare equal numbers. An n-gram order without a match counts as 0.1 matches (Chen and Cherry 2014, method 1). If a
    text is too short for an order, that order does not count.
    """
    said = [words for text in texts[:most] if (words := words_of(text))]
    if len(said) < 2:
        return None
    precisions: list[list[float]] = [[] for _ in said]
    for n in range(1, 5):
        counts = [Counter(_grams(words, n)) for words in said]
        highest: dict[tuple[str, ...], list[int]] = {}  # for each n-gram, the two highest counts in one text
        for own in counts:
            for gram, count in own.items():
                highest[gram] = sorted([*highest.get(gram, [0, 0]), count])[1:]
        for found, own in zip(precisions, counts, strict=True):
            # The highest count in the other texts is the highest of all, or the second if this text has the highest.
            matched = sum(min(count, highest[gram][count < highest[gram][1]]) for gram, count in own.items())
            if own:
                found.append(math.log((matched or 0.1) / own.total()))
    lengths = Counter(map(len, said))
    scores = []
    for found, words in zip(precisions, said, strict=True):
        nearest = min(lengths - Counter([len(words)]), key=lambda length: (abs(length - len(words)), length))
        brevity = min(0.0, 1 - nearest / len(words))
        scores.append(math.exp(float(np.mean(found)) + brevity))
    return float(np.mean(scores))


def correlation(first: ArrayLike, second: ArrayLike) -> float | None:
    """Return Pearson's correlation; None if either input is constant."""
    a, b = np.asarray(first, float), np.asarray(second, float)
    return float(np.corrcoef(a, b)[0, 1]) if a.std() > 0 and b.std() > 0 else None


def calibration(probability: NDArray[Any], truth: NDArray[Any], bins: int = 10) -> tuple[list[dict[str, float]], float]:
    """Return predicted and observed share of positives in bins of equal width, and the expected calibration error."""
    index = np.minimum((probability * bins).astype(int), bins - 1)
    every = [(probability[index == number], truth[index == number]) for number in np.unique(index)]
    rows = [{"predicted": float(p.mean()), "observed": float(t.mean()), "count": len(p)} for p, t in every]
    return rows, sum(abs(row["predicted"] - row["observed"]) * row["count"] for row in rows) / max(len(truth), 1)


def standard_error(values: ArrayLike) -> float:
    """Return the standard error of the mean of independent values; 0 for a single value."""
    own = np.asarray(values, float)
    return float(own.std(ddof=1) / math.sqrt(len(own))) if len(own) > 1 else 0.0


def paired_gain(before: ArrayLike, after: ArrayLike, draws: int, seed: int) -> dict[str, float]:
    """Return the mean of `after - before` over the same prompts, its 95 % bootstrap interval, and the win rate.

    A tie is half a win. `after` is (prompts,), or (seeds, prompts) for several trainings. Then prompts and seeds are
    both resampled, because they are crossed: all trainings answer the same prompts. It draws n of n prompts, but s - 1
    of s trainings: s of s would make the variance too small by (s - 1) / s (Rao and Wu 1988). The interval cannot
    extend beyond the observed trainings; with three that differ much it is too short.
    """
    gain = np.atleast_2d(np.asarray(after, float) - np.asarray(before, float))
    (seeds, prompts), rng, of_seeds = gain.shape, np.random.default_rng(seed), np.random.default_rng([seed, 1])
    means = [
        gain[of_seeds.integers(0, seeds, max(seeds - 1, 1))][:, rng.integers(0, prompts, prompts)].mean()
        for _ in range(draws)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    wins = float(np.mean(gain > 0) + 0.5 * np.mean(gain == 0))
    return {"mean": float(gain.mean()), "low": float(low), "high": float(high), "win_rate": wins}
