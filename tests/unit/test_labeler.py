"""A reward in the place of people: exact without noise, and with it wrong as people are."""

import itertools
import math

import pytest

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.feedback.labeler import rank
from rlhf_pipeline.models.rewards import Reward

LENGTH = Reward(lambda prompts, answers: [float(len(answer)) for answer in answers], "length")


def candidates(*answers: str, count: int = 1) -> list[dict]:
    listed = [{"id": f"answer{n}", "text": text} for n, text in enumerate(answers, 1)]
    return [{"task": str(n), "prompt": "p", "shown_prompt": "p", "answers": listed} for n in range(count)]


def test_without_noise_the_order_is_that_of_the_scores_and_equal_scores_tie() -> None:
    (row,), as_without = rank(candidates("aa", "a", "aaaa", "bb"), LENGTH, 0.0, "0")
    assert row["ranks"] == [2, 4, 1, 2]
    assert row["scores"] == [2, 1, 4, 2]
    assert as_without == 1
    assert (row["task"], row["annotator"], row["responses"]) == ("0", "length", ["aa", "a", "aaaa", "bb"])


def test_noise_confuses_close_answers_as_bradley_and_terry_say() -> None:
    """Scores 1, 2 and 6 have a standard deviation of 2.16: with half of that as noise, 2 beats 1 by sigmoid(1/1.08)."""
    found, as_without = rank(candidates("a", "aa", "aaaaaa", count=4000), LENGTH, 0.5, "0")
    scale = 0.5 * math.sqrt(14 / 3)
    rates = {}
    for better, worse in itertools.combinations((2, 1, 0), 2):
        rates[better, worse] = sum(row["ranks"][better] < row["ranks"][worse] for row in found) / len(found)
        gap = found[0]["scores"][better] - found[0]["scores"][worse]
        assert rates[better, worse] == pytest.approx(1 / (1 + math.exp(-gap / scale)), abs=0.025)  # over 3 s.e.
    assert rates[1, 0] < rates[2, 1] < rates[2, 0] < 1
    assert as_without == pytest.approx(sum(rates.values()) / 3)


def test_a_labeler_that_prefers_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="labeler=length gives all answers to each prompt the same score"):
        rank(candidates("a", "b", count=3), LENGTH, 0.0, "0")


def test_the_seed_decides_the_errors() -> None:
    rows = candidates("a", "aa", "aaa", "aaaa", count=20)
    assert rank(rows, LENGTH, 1.0, "0") == rank(rows, LENGTH, 1.0, "0")
    assert rank(rows, LENGTH, 1.0, "0") != rank(rows, LENGTH, 1.0, "1")
