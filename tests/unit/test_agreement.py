"""Judgements settled into rows, and agreement: every number worked out by hand."""

import pytest

from rlhf_pipeline.data.agreement import combine_judgements
from rlhf_pipeline.data.records import Judgement, Preference, Ranking
from rlhf_pipeline.training.preferences import Comparison, comparisons_of


def said(order: str, by: str | None = None, prompt: str = "p", task: str | None = None) -> Judgement:
    """A judgement from best to worst, ties in one word: "a bc" is a before b and c."""
    ranks = {answer: place for place, tied in enumerate(order.split(), start=1) for answer in tied}
    answers = tuple(sorted(ranks))  # as shown
    return Judgement(prompt, answers, tuple(ranks[answer] for answer in answers), task, by)


def test_rows_stand_in_the_order_of_the_judgements_and_are_counted() -> None:
    rows, summary = combine_judgements(
        [
            Judgement("p", ("c", "r"), (1, 2), margin=0.5),
            Judgement("q", ("x", "y", "z"), (3, 1, 2)),
            Judgement("q", ("c", "r"), (1, 2)),
            Judgement("q", ("v", "w", "u"), (10, 20, 20)),
        ]
    )
    assert rows == [
        Preference("p", "c", "r", 0.5),
        Ranking("q", ("y", "z", "x")),
        Preference("q", "c", "r"),
        Ranking("q", ("v", "w", "u"), (1, 2.5, 2.5)),  # who tie share the mean of their places
    ]
    counts = {key: summary[key] for key in ("judgements", "tasks", "annotators", "pairs", "ties", "contradictions")}
    assert counts == {"judgements": 4, "tasks": 4, "annotators": 0, "pairs": 7, "ties": 1, "contradictions": 0}
    assert summary["agreement"] is summary["alpha"] is None


def test_judgements_of_the_same_answers_are_one_row_by_their_mean_ranks() -> None:
    rows, summary = combine_judgements([said("a b c", "x"), said("b a c", "y"), said("c ab", "z", prompt="q")])
    assert rows == [Ranking("p", ("a", "b", "c"), (1.5, 1.5, 3)), Ranking("q", ("c", "a", "b"), (1, 2.5, 2.5))]
    assert (summary["pairs"], summary["ties"], summary["contradictions"], summary["annotators"]) == (4, 2, 1, 3)
    # ab: 3 of 3 pairs of people agree; ac and bc: 1 of 3 each
    summary = combine_judgements([said("a b c", "x"), said("a b c", "y"), said("c a b", "z")])[1]
    assert (summary["agreement"], summary["contradictions"]) == (pytest.approx(5 / 9), 2)
    two, one = said("a b", "x"), said("b a", "y")
    assert combine_judgements([two, said("a b", "z"), one])[0] == [Preference("p", "a", "b")], "two against one"
    rows, summary = combine_judgements([two, one])
    assert rows == []
    assert (summary["pairs"], summary["ties"], summary["dropped"], summary["contradictions"]) == (0, 1, 2, 1)
    margins = [Judgement("p", ("a", "b"), (1, 2), "t", by, margin) for by, margin in (("x", 1.0), ("y", 2.0))]
    assert combine_judgements(margins)[0] == [Preference("p", "a", "b", 1.5)]
    margins.append(Judgement("p", ("a", "b"), (2, 1), "t", "z", 5.0))
    assert combine_judgements(margins)[0] == [Preference("p", "a", "b")], "a margin outlives agreement alone"


def test_the_task_plays_no_part_and_other_answers_are_another_question() -> None:
    rows, _ = combine_judgements([said("a b", task="1"), said("b a", task="2"), said("b a"), said("a b", prompt="q")])
    assert rows == [Preference("p", "b", "a"), Preference("q", "a", "b")], "another prompt is another question"
    rows, summary = combine_judgements([said("a b c", "x"), said("b a", "y"), said("b a", "z")])
    assert rows == [Ranking("p", ("a", "b", "c")), Preference("p", "b", "a")]
    assert (summary["contradictions"], summary["pairs"]) == (1, 3)


def test_equal_texts_say_nothing_of_each_other() -> None:
    rows, summary = combine_judgements(
        [Judgement("p", ("a", "a"), (1, 2)), Judgement("q", ("a", "b", "a", "c"), (1, 2, 3, 4))]
    )
    assert rows == [Ranking("q", ("a", "b", "c"), (1.5, 1.5, 3))], "a before b and after it: a tie"
    assert (summary["dropped"], summary["pairs"], summary["ties"]) == (1, 2, 1)


@pytest.mark.parametrize(
    ("verdicts", "agreement", "alpha"),
    [
        # 6 values, 3 of each: observed 2/6, expected 2 * 3 * 3 / (6 * 5)
        ((("a b", "a b"), ("a b", "b a"), ("b a", "b a")), 2 / 3, 1 - (2 / 6) / (18 / 30)),
        # and a tie: 8 values, 4, 3 and 1: observed 4/8, expected (64 - 16 - 9 - 1) / (8 * 7)
        ((("a b", "a b"), ("a b", "b a"), ("b a", "b a"), ("ab", "a b")), 2 / 3, 1 - (4 / 8) / (38 / 56)),
        ((("a b", "a b"), ("b a", "b a")), 1.0, 1.0),
        ((("a b", "a b"), ("a b", "a b")), 1.0, None),  # one verdict throughout: chance would agree as well
        ((("ab", "a b"),), None, 0.0),  # 2 values, one of each: observed 1, expected 1
    ],
)
def test_agreement_and_alpha(
    verdicts: tuple[tuple[str, str], ...], agreement: float | None, alpha: float | None
) -> None:
    given = [
        said(order, by, prompt=str(n)) for n, pair in enumerate(verdicts) for order, by in zip(pair, "xy", strict=True)
    ]
    alone = [said("b a", "x", prompt="alone"), said("b a", None, prompt="0"), said("a b", None, prompt="0")]
    summary = combine_judgements([*given, *alone])[1]  # who judges alone, or has no name, agrees with nobody
    assert summary["agreement"] == (None if agreement is None else pytest.approx(agreement))
    assert summary["alpha"] == (None if alpha is None else pytest.approx(alpha))


def test_ties_of_a_ranking_make_no_pairs_and_ranks_their_margins() -> None:
    (found,) = comparisons_of([Ranking("p", ("a", "b", "c", "d"), (1, 2.5, 2.5, 4))], margin=2.0)
    places = ((0, 1, 3.0), (0, 2, 3.0), (0, 3, 6.0), (1, 3, 3.0), (2, 3, 3.0))
    assert found == Comparison("p", ("a", "b", "c", "d"), places)
    assert comparisons_of([Ranking("p", ("a", "b"), (1, 1))]) == []
