"""Measures against figures worked out by hand."""

import numpy as np
import pytest

from rlhf_pipeline.evaluation import metrics
from rlhf_pipeline.evaluation.accuracy import Accuracy


def test_accuracy_is_an_evaluate_module_that_needs_no_network() -> None:
    assert Accuracy().compute(predictions=[1, 0, 1, 1], references=[1, 1, 1, 0]) == {"accuracy": 0.5}


def test_distinct() -> None:
    assert metrics.distinct(["a b a b", "a b c"], 2) == 0.6  # ab ba ab, ab bc: 3 different of 5
    assert metrics.distinct(["one"], 2) == 0


def test_correlation() -> None:
    assert metrics.correlation([1, 2, 3], [2, 4, 6]) == pytest.approx(1)
    assert metrics.correlation([1, 2, 3], [6, 4, 2]) == pytest.approx(-1)
    assert metrics.correlation([1, 1, 1], [1, 2, 3]) is None


def test_calibration_error_is_the_weighted_gap() -> None:
    rows, error = metrics.calibration(np.array([0.9, 0.9, 0.1, 0.1]), np.array([1, 0, 0, 0]))
    assert [row["count"] for row in rows] == [2, 2]
    assert error == pytest.approx((2 * 0.1 + 2 * 0.4) / 4)


def test_the_paired_gain_and_its_interval() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=400)
    after = before + 0.5 + 0.1 * rng.normal(size=400)
    gain = metrics.paired_gain(before, after, draws=1000, seed=0)
    assert gain["mean"] == pytest.approx(0.5, abs=0.02)
    assert gain["high"] - gain["low"] == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.15)
    assert gain["win_rate"] > 0.99
    assert metrics.paired_gain([1, 1], [1, 1], 10, 0) == {"mean": 0, "low": 0, "high": 0, "win_rate": 0.5}


def test_an_interval_over_seeds_and_prompts() -> None:
    rng = np.random.default_rng(0)
    before = rng.normal(size=300)
    of_seeds, of_prompts = 0.2 * rng.normal(size=(20, 1)), 0.5 * rng.normal(size=300)
    after = before + 1 + of_seeds + of_prompts
    gain = metrics.paired_gain(before, after, draws=2000, seed=0)
    assert gain["mean"] == pytest.approx(after.mean() - before.mean())
    error = np.sqrt(of_seeds.var(ddof=1) / 20 + of_prompts.var(ddof=1) / 300)  # crossed: the variances add up
    assert gain["high"] - gain["low"] == pytest.approx(2 * 1.96 * error, rel=0.1)
    alone = metrics.paired_gain(before, after[0], draws=500, seed=3)
    assert metrics.paired_gain(before, after[:1], draws=500, seed=3) == alone, "of one training as without seeds"


def test_of_three_seeds_the_variance_of_the_mean_is_unbiased_and_the_interval_reaches_from_one_to_another() -> None:
    after = np.array([[0.0], [1.0], [5.0]]).repeat(4, 1)
    gain = metrics.paired_gain(np.zeros(4), after, draws=3000, seed=0)
    assert (gain["low"], gain["high"], gain["mean"]) == (0, 5, 2)
    spread = [metrics.paired_gain(np.zeros(4), after, draws=1, seed=number)["low"] for number in range(3000)]
    assert np.var(spread) == pytest.approx(np.var([0, 1, 5], ddof=1) / 3, rel=0.1)


def test_repeated_answers_are_those_that_another_prompt_got_as_well() -> None:
    assert metrics.repeated(["yes", " yes", "no", "well"]) == 0.5
    assert metrics.repeated(["a", "b"]) == metrics.repeated([]) == 0


def test_self_bleu_is_the_mean_bleu_of_each_text_against_the_others() -> None:
    assert metrics.self_bleu(["a b c d"] * 3) == pytest.approx(1)
    # Nothing in common: a tenth of a match in each order, of 4, 3, 2 and 1 n-grams.
    assert metrics.self_bleu(["a b c d", "e f g h"]) == pytest.approx(0.1 / 24**0.25)
    # "a b c": 2 of 3, 1 of 2, none of 1, and a penalty for 3 words beside 4. "a b d e": 2 of 4, 1 of 3, none of 2 or 1.
    first = (2 / 3 * 1 / 2 * 0.1) ** (1 / 3) * np.exp(1 - 4 / 3)
    second = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1) ** (1 / 4)
    assert metrics.self_bleu(["a b c", "a b d e"]) == pytest.approx((first + second) / 2)
    # A word counts no more often than the other text has it.
    assert metrics.self_bleu(["a a a", "a"]) == pytest.approx(((1 / 3 * 0.1 / 2 * 0.1) ** (1 / 3) + np.exp(-2)) / 2)
    # Of three, an n-gram matches if either of the others has it, and a text is no reference to itself.
    assert metrics.self_bleu(["a b", "a c", "d b"], most=3) == pytest.approx(
        ((1 * 0.1) ** 0.5 + 2 * (1 / 2 * 0.1) ** 0.5) / 3
    )
    assert metrics.self_bleu(["a b", "a b", "c d"], most=2) == pytest.approx(1)
    assert metrics.self_bleu(["", " ", "one"]) is None
    assert metrics.self_bleu(["好吃", "好吃"]) == pytest.approx(1)
