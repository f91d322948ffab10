"""The best of n without drawing n, and which policies of a sweep none beats: right by hand."""

import math
from itertools import combinations

import numpy as np
import pytest

from rlhf_pipeline.evaluation.frontier import best_of_n, compare_points


def test_the_best_of_n_is_the_mean_over_all_choices_of_n() -> None:
    main, other = np.array([[3.0, 1.0, 2.0], [0.0, 5.0, 4.0]]), np.array([[10.0, 20.0, 30.0], [1.0, 2.0, 3.0]])
    found = best_of_n({"main": main, "other": other}, "main")
    assert [row["n"] for row in found] == [1, 2, 3]
    assert [row["reward_mean"] for row in found] == pytest.approx([(2 + 3) / 2, (8 / 3 + 14 / 3) / 2, (3 + 5) / 2])
    # Chosen by the main reward: of the pairs of the first prompt 10, 10 and 30, of the second 2, 3 and 2.
    theirs = [row["rewards"]["other"]["reward_mean"] for row in found]
    assert theirs == pytest.approx([(20 + 2) / 2, (50 / 3 + 7 / 3) / 2, (10 + 2) / 2])
    assert [row["kl"] for row in found] == pytest.approx([0, math.log(2) - 1 / 2, math.log(3) - 2 / 3])
    assert found[2]["reward_stderr"] == pytest.approx(1.0)  # of 3 and 5


def test_the_best_of_n_of_many_draws_is_that_of_trying() -> None:
    values = np.random.default_rng(0).normal(size=(4, 7))
    for n, row in enumerate(best_of_n({"r": values}, "r"), 1):
        tried = [values[:, list(chosen)].max(1).mean() for chosen in combinations(range(7), n)]
        assert row["reward_mean"] == pytest.approx(np.mean(tried))


def test_a_policy_is_on_the_frontier_where_none_has_more_reward_at_no_more_kl() -> None:
    places = [(0.5, 1.0), (0.6, 1.0), (0.6, 1.0), (0.9, 3.0), (0.8, 4.0), (0.2, 0.1)]
    rows = [{"reward_mean": reward, "kl": kl, "start": "s"} for reward, kl in places]
    compare_points(
        rows, {"s": [{"n": 1, "reward_mean": 0.4}, {"n": 2, "reward_mean": 0.6}, {"n": 3, "reward_mean": 0.85}]}
    )
    assert [row["frontier"] for row in rows] == [False, True, True, True, False, True]
    assert [row["best_of"] for row in rows] == [2, 2, 2, None, 3, 1]


def test_policies_are_compared_with_those_that_began_with_them() -> None:
    rows = [{"reward_mean": reward, "kl": 1.0, "start": start} for reward, start in ((0.5, "s"), (0.9, "t"))]
    compare_points(rows, {"s": [{"n": 1, "reward_mean": 0.6}], "t": [{"n": 1, "reward_mean": 0.6}]})
    assert [(row["frontier"], row["best_of"]) for row in rows] == [(True, 1), (True, None)]


def test_of_one_prompt_there_is_no_standard_error() -> None:
    assert [row["reward_stderr"] for row in best_of_n({"r": np.array([[1.0, 2.0]])}, "r")] == [0.0, 0.0]
