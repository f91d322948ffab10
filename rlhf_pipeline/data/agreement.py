"""Judgements to rows to learn from: judgements of the same answers are settled, and how far people agree.

Two judgements bear on each other if they compare the same two answers to one prompt, in one task or in two.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.data.records import Judgement, Preference, Prompt, Ranking

_Pair = tuple[Prompt, str, str]  # two answers to a prompt, in the order of their texts
_Votes = list[tuple[int, int]]  # (number of the judgement, 1: the first is better, -1: the second, 0: neither)


@dataclass(frozen=True)
class Labels:
    """What is known of the labels in a data set: counts and agreement, and the rows that were set aside."""

    summary: dict[str, Any]
    rejected: list[dict[str, Any]]


def settle(judgements: Sequence[Judgement]) -> tuple[list[Preference | Ranking], dict[str, Any]]:
    """Rows to learn from, in the order of the judgements, and a summary of what was judged.

    Judgements of the same answers are combined by their mean ranks (Borda); equal means tie. If people contradict
    each other and only some of the answers are the same, the majority decides every pair. Judgements that name neither
    task nor annotator are rows of their own, unless one contradicts them.
    """
    ranks = [_ranks(judgement) for judgement in judgements]
    votes: dict[_Pair, _Votes] = defaultdict(list)
    for number, (judgement, own) in enumerate(zip(judgements, ranks, strict=True)):
        for pair in _pairs(judgement.prompt, own):
            votes[pair].append((number, _sign(own[pair[2]] - own[pair[1]])))
    heads = connected(len(judgements), ([number for number, _ in given] for given in votes.values()))
    contradicted = [given for given in votes.values() if {1, -1} <= {sign for _, sign in given}]
    disputed = {heads[given[0][0]] for given in contradicted}
    alike: dict[tuple[int, frozenset[str]], list[int]] = defaultdict(list)  # numbers of judgements of the same answers
    for number, head in enumerate(heads):
        alike[head, frozenset(ranks[number])].append(number)
    by_pairs = {head for head, sets in Counter(head for head, _ in alike).items() if sets > 1} & disputed

    placed: list[tuple[int, Preference | Ranking]] = []  # rows, by the number of a judgement
    for (head, _), numbers in alike.items():
        named = any(judgements[n].task is not None or judgements[n].annotator is not None for n in numbers)
        for same in [numbers] if named or head in disputed else [[n] for n in numbers]:
            if head not in by_pairs and (row := _combined([(judgements[n], ranks[n]) for n in same])):
                placed.append((same[0], row))
    for (prompt, first, second), given in votes.items():
        net = sum(sign for _, sign in given)
        if net and (head := heads[given[0][0]]) in by_pairs:
            placed.append((head, Preference(prompt, *((first, second) if net > 0 else (second, first)))))
    rows = [row for _, row in sorted(placed, key=lambda numbered: numbered[0])]

    ordered = Counter(pair for row in rows for pair in _ordered(row))
    agreement, alpha = _agreement(judgements, votes.values())
    pairs_of = (_pairs(judgement.prompt, own) for judgement, own in zip(judgements, ranks, strict=True))
    return rows, {
        "judgements": len(judgements),
        "tasks": len({(j.task or head, j.prompt) for j, head in zip(judgements, heads, strict=True)}),
        "annotators": len({judgement.annotator for judgement in judgements} - {None}),
        "pairs": ordered.total(),
        "ties": len(votes) - len(ordered),
        "dropped": sum(not any(pair in ordered for pair in pairs) for pairs in pairs_of),
        "contradictions": len(contradicted),
        "agreement": agreement,
        "alpha": alpha,
    }


def _combined(given: Sequence[tuple[Judgement, Mapping[str, float]]]) -> Preference | Ranking | None:
    """One row of judgements of the same answers, by their mean ranks; None if two answers tie."""
    prompt = given[0][0].prompt
    mean = {answer: sum(own[answer] for _, own in given) / len(given) for answer in given[0][1]}
    if len(set(mean.values())) < 2:
        return None
    answers = sorted(mean, key=lambda answer: mean[answer])
    if len(answers) == 2:
        # A margin is known if all agree, and each says by how much.
        margins = [j.margin for j, own in given if j.margin is not None and own[answers[0]] < own[answers[1]]]
        margin = sum(margins) / len(margins) if len(margins) == len(given) else None
        return Preference(prompt, answers[0], answers[1], margin)
    ranks = tuple(mean[answer] for answer in answers)
    return Ranking(prompt, tuple(answers), () if ranks == tuple(range(1, len(ranks) + 1)) else ranks)


def _ranks(judgement: Judgement) -> dict[str, float]:
    """Each different answer's rank from 1; those that tie share the mean of their ranks, and so do equal texts."""
    given: dict[str, list[float]] = defaultdict(list)
    for answer, rank in zip(judgement.answers, _averaged(judgement.ranks), strict=True):
        given[answer].append(rank)
    return dict(zip(given, _averaged([sum(own) / len(own) for own in given.values()]), strict=True))


def _averaged(ranks: Sequence[float]) -> list[float]:
    return [sum(other < rank for other in ranks) + (ranks.count(rank) + 1) / 2 for rank in ranks]


def _pairs(prompt: Prompt, answers: Iterable[str]) -> Iterator[_Pair]:
    """All pairs of answers; by their texts, so that the order in which they were shown or judged plays no part."""
    return ((prompt, first, second) for first, second in itertools.combinations(sorted(answers), 2))


def _ordered(row: Preference | Ranking) -> Iterator[_Pair]:
    """The pairs that a row puts in an order."""
    answers = (row.chosen, row.rejected) if isinstance(row, Preference) else row.responses
    own = dict(zip(answers, getattr(row, "ranks", ()) or range(len(answers)), strict=True))
    return (pair for pair in _pairs(row.prompt, own) if own[pair[1]] != own[pair[2]])


def _sign(difference: float) -> int:
    return (difference > 0) - (difference < 0)


def connected(count: int, groups: Iterable[Sequence[int]]) -> list[int]:
    """For every number below `count` the first that it is in a group with, by way of others too (union-find)."""
    head = list(range(count))

    def of(number: int) -> int:
        while head[number] != number:
            head[number] = head[head[number]]
            number = head[number]
        return number

    for group in groups:
        first = of(group[0])
        for number in group[1:]:
            one, other = sorted((first, of(number)))
            head[other] = first = one
    return [of(number) for number in range(count)]


def _agreement(judgements: Sequence[Judgement], votes: Iterable[_Votes]) -> tuple[float | None, float | None]:
    """How far people agree: the share of their pairs of verdicts that are the same, and Krippendorff's alpha.

    The share leaves ties out; to alpha (nominal) a tie is a verdict of its own. None if nothing can be said.
    """
    same, both, counts = 0, 0, []
    for given in votes:
        own = {judgements[n].annotator: sign for n, sign in given if judgements[n].annotator is not None}
        if len(own) > 1:
            verdicts = Counter(own.values())
            first, second = verdicts[1], verdicts[-1]
            same += first * (first - 1) // 2 + second * (second - 1) // 2
            both += (first + second) * (first + second - 1) // 2
            counts.append([first, verdicts[0], second])
    alpha = None
    if sum(any(column) for column in zip(*counts, strict=True)) > 1:
        import krippendorff  # and numpy with it: slow to import, and few data sets have several annotators

        alpha = float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))
    return same / both if both else None, alpha
