"""Measures against figures worked out by hand."""

import numpy as np
import pytest

from rlhf_pipeline import metrics


def test_accuracy_and_distinct_are_evaluate_modules_that_need_no_network() -> None:
    assert metrics.Accuracy().compute(predictions=[1, 0, 1, 1], references=[1, 1, 1, 0]) == {"accuracy": 0.5}
    texts = ["a b a b", "a b c"]  # ab ba ab, ab bc: 3 different of 5
    assert metrics.Distinct().compute(predictions=texts, references=texts, n=2) == {"distinct_2": 0.6}
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
