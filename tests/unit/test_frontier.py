"""The best of n without drawing n, and which policies of a sweep none beats: right by hand."""

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from rlhf_pipeline.evaluation.algorithms import means_over_seeds
from rlhf_pipeline.evaluation.frontier import best_of_n, compare_points, fit_curves


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


def way(run: str, distances: list[float], rise: Callable[[float], float]) -> list[dict]:
    """Policies at some distances, whose gold reward is 0.1 and what `rise` says, and whose proxy is twice that."""
    return [
        {
            "run": run,
            "start": "s",
            "kl": d * d,
            "reward_mean": 0.2 + 2 * rise(d),
            "rewards": {"gold": {"reward_mean": 0.1 + rise(d)}},
        }
        for d in distances
    ]


def test_the_forms_of_gao_are_found_again() -> None:
    best = way("", [0, 0.5, 0.8, 1.1, 1.3], lambda d: d * (0.6 - 0.2 * d))
    start = {"key": "s", "reward_mean": 0.2, "rewards": {"gold": {"reward_mean": 0.1}}, "best_of": best}
    points = way("rl", [0.4, 1.0, 1.9, 2.5], lambda d: d * (0.5 - 0.1 * math.log(d)))
    points += way("few", [0.4, 1.0, 1.9], lambda d: d)
    found = {(fit["way"], fit["reward"]): fit for fit in fit_curves([start], points)}
    assert set(found) == {(name, reward) for name in ("best of n", "rl") for reward in ("", "gold")}
    expected = {"best of n": (0.6, 0.2, 1.3), "rl": (0.5, 0.1, 2.5)}
    for (name, reward), fit in found.items():
        alpha, beta, to = expected[name]
        times = 1 if reward else 2
        assert (fit["alpha"], fit["beta"], fit["to"]) == pytest.approx((times * alpha, times * beta, to)), (
            name,
            reward,
        )
        assert fit["points"] == 4, "none of a policy that has not moved"


def test_an_algorithm_is_the_mean_of_its_seeds_at_each_step() -> None:
    def row(run: str, step: int, values: list[float]) -> dict:
        figures = {"kl": float(step), "length": 5.0, "distinct_2": 0.5, "reward_mean": float(np.mean(values))}
        own = {"proxy": values, "gold": [value / 2 for value in values]}
        return {"run": run, "step": step, "start": "s", **figures, "values": own,
                "rewards": {"gold": {"reward_mean": figures["reward_mean"] / 2}}}  # fmt: skip

    start = {**row("", 0, [0.0, 1.0, 0.0, 1.0]), "key": "s", "best_of": []}
    start["best_of"] = [{"n": 1, "kl": 0.0, "reward_mean": 0.5, "rewards": start["rewards"]},
                        {"n": 2, "kl": 0.2, "reward_mean": 0.7, "rewards": start["rewards"],
                         "drawn": row("", 0, [1.0, 1.0, 0.0, 1.0])}]  # fmt: skip
    points = [row("a1", 1, [0.5] * 4), row("a1", 2, [1.0] * 4), row("a2", 1, [0.7] * 4), row("a2", 2, [2.0] * 4)]
    costs = {"a1": {"sampled_tokens": 10, "seconds": 4.0}, "a2": {"sampled_tokens": 20, "seconds": 6.0}}
    found = means_over_seeds(start, points, {"a": costs}, draws=200, seed=0)
    assert list(found["algorithms"]) == ["SFT", "best of 2", "a"]
    mine = found["algorithms"]["a"]
    assert (mine["seeds"], mine["sampled_tokens"], mine["seconds"]) == (2, 15, 5.0)
    assert (mine["reward_mean"], mine["rewards"]["gold"]["reward_mean"], mine["kl"]) == (1.5, 0.75, 2.0)
    assert mine["gain"]["mean"] == pytest.approx(1.0)
    assert mine["rewards"]["gold"]["gain"]["mean"] == pytest.approx(0.5)
    assert mine["gain"]["low"] < 0.75 < 1.25 < mine["gain"]["high"], "the seeds differ by 1"
    assert found["algorithms"]["best of 2"]["gain"]["mean"] == pytest.approx(0.25)
    curve = [(row["run"], row["step"], row["reward_mean"], row["kl"]) for row in found["points"]]
    assert curve == [("a", 1, pytest.approx(0.6), 1.0), ("a", 2, pytest.approx(1.5), 2.0)]
