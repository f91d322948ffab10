"""The best of n without drawing n, and which policies of a sweep none beats: right by hand."""

import math
from collections.abc import Callable
from itertools import combinations

import numpy as np
import pytest

from rlhf_pipeline.evaluation.algorithms import means_over_seeds
from rlhf_pipeline.evaluation.frontier import best_of_n, compare_points, fit_curves


def test_the_best_of_n_is_the_mean_over_all_choices_of_n() -> None:
    main, other = np.random.default_rng(0).normal(size=(2, 4, 7))  # of 4 prompts, 7 answers each
    rows = best_of_n({"main": main, "other": other}, "main")
    assert [row["n"] for row in rows] == [1, 2, 3, 4, 5, 6, 7]
    prompts = np.arange(4)
    for n, row in enumerate(rows, 1):
        tried = [np.array(chosen)[main[:, chosen].argmax(1)] for chosen in combinations(range(7), n)]
        values, others = (np.mean([each[prompts, best] for best in tried], 0) for each in (main, other))
        assert row["reward_mean"] == pytest.approx(values.mean())
        assert row["reward_stderr"] == pytest.approx(values.std(ddof=1) / 2)
        assert row["rewards"]["other"]["reward_mean"] == pytest.approx(others.mean()), "chosen by the main reward"
        assert row["kl"] == pytest.approx(math.log(n) - (n - 1) / n)
    one = best_of_n({"r": np.array([[1.0, 2.0]])}, "r")
    assert [row["reward_stderr"] for row in one] == [0.0, 0.0], "of one prompt there is none"


def test_a_policy_is_on_the_frontier_where_none_of_its_start_has_more_reward_at_no_more_kl() -> None:
    places = [(0.5, 1.0, "s"), (0.6, 1.0, "s"), (0.6, 1.0, "s"), (0.9, 3.0, "s"), (0.8, 4.0, "s"), (0.2, 0.1, "s"),
              (0.5, 1.0, "t"), (0.9, 1.0, "u")]  # fmt: skip
    rows = [{"reward_mean": reward, "kl": kl, "start": start} for reward, kl, start in places]
    best = [{"n": 1, "reward_mean": 0.4}, {"n": 2, "reward_mean": 0.6}, {"n": 3, "reward_mean": 0.85}]
    compare_points(rows, {"s": best, "t": best[1:], "u": best[:2]})
    assert [row["frontier"] for row in rows] == [False, True, True, True, False, True, True, True]
    assert [row["best_of"] for row in rows] == [2, 2, 2, None, 3, 1, 2, None]


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
