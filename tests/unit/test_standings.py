"""What answers come to, against figures worked out by hand."""

import pytest

from rlhf_pipeline.stages.standings import chosen, figures, gains, given_up, moved


def test_the_figures_of_a_reward() -> None:
    found = figures([1, 2, 3, 6], neutral=2)
    assert found == {
        "reward_mean": 3, "reward_median": 2.5, "reward_stderr": pytest.approx((14 / 3) ** 0.5 / 2), "positive": 0.5,
    }  # fmt: skip


def test_everyone_is_held_against_the_first_and_the_reference() -> None:
    values = {"base": [0.0, 0.0], "sft": [1.0, 1.0], "best of 4": [3.0, 3.0], "ppo": [2.0, 4.0]}
    found = gains(values, "sft", draws=100, seed=0)
    pairs = ["sft - base", "best of 4 - base", "best of 4 - sft", "ppo - base", "ppo - sft"]
    assert list(found) == pairs
    assert [found[pair]["mean"] for pair in pairs] == [1, 3, 2, 3, 2]
    assert found["ppo - sft"]["low"] == 1
    assert found["ppo - sft"]["high"] == 3
    assert list(gains(values, "base", draws=10, seed=0)) == ["sft - base", "best of 4 - base", "ppo - base"]


def test_how_far_a_reward_moved_is_in_deviations_of_the_reference() -> None:
    assert moved({"sft": [0, 2], "ppo": [4, 6]}, "sft") == {"sft": 0, "ppo": pytest.approx(4 / 2**0.5)}
    assert moved({"sft": [1, 1], "ppo": [4, 6]}, "sft") == {"sft": None, "ppo": None}


def gain(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, "win_rate": 0.5}


@pytest.mark.parametrize(
    ("own", "others", "warned"),
    [
        (gain(1, 0.5, 1.5), gain(-0.4, -0.6, -0.2), True),
        (gain(1, 0.5, 1.5), gain(-0.4, -0.9, 0.1), False),  # it may be chance
        (gain(1, 0.5, 1.5), gain(0.4, 0.2, 0.6), False),
        (gain(0.1, -0.1, 0.3), gain(-0.4, -0.6, -0.2), False),
    ],
)
def test_a_reward_that_rose_while_another_fell_is_warned_of(
    own: dict[str, float], others: dict[str, float], warned: bool
) -> None:
    gained = {
        "classifier": {"sft - base": gain(1, 0.5, 1.5), "ppo - sft": own},
        "length": {"sft - base": gain(-1, -1.5, -0.5), "ppo - sft": others},
    }
    moves = {"classifier": {"base": -1.0, "sft": 0.0, "ppo": 2.0}, "length": {"base": 1.0, "sft": 0.0, "ppo": None}}
    lines = given_up("classifier", "sft", gained, moves)
    assert len(lines) == warned
    if warned:
        assert lines[0].startswith("ppo: classifier rose by 2.00 s.d. of sft's answers while length fell by 0.4;")


def test_the_examples_are_typical_best_worst_and_most_changed() -> None:
    first, last = [0.0, 0.0, 5.0, 0.0, 3.0], [1.0, 2.0, 0.0, 9.0, 4.0]  # changes: 1, 2, -5, 9, 1
    found = chosen(first, last, 2)
    assert found == {"typical": [0, 4], "best": [3, 4], "worst": [2, 0], "most changed": [3, 2]}
