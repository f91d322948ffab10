"""Judgements to rows to learn from: what several people said of the same answers is settled, and how far they agree.

Two judgements bear on each other where they compare the same two answers to one prompt, be it in one task or in two.
"""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_pipeline.data.records import Judgement, Preference, Prompt, Ranking

_Pair = tuple[Prompt, str, str]  # two answers to a prompt, in the order of their texts
_Votes = list[tuple[int, int]]  # (number of the judgement, 1: the first is better, -1: the second, 0: neither)
_Places = Mapping[str, float]  # of the answers of a judgement, by their texts


@dataclass(frozen=True)
class Labels:
    """What is known of the labels in a data set: counts and agreement, and the rows that were set aside."""

    summary: dict[str, Any]
    rejected: list[dict[str, Any]]


def settle(judgements: Sequence[Judgement]) -> tuple[list[Preference | Ranking], dict[str, Any]]:
    """Rows to learn from, in the order of the judgements, and a summary of what was judged.

    Judgements of the same answers are combined by their mean ranks (Borda); equal means tie. Where people contradict
    each other and only some of the answers are the same, the majority has every pair. Judgements that name neither
    task nor annotator are rows of their own, unless one contradicts them.
    """
    places = [_places(judgement) for judgement in judgements]
    votes: dict[_Pair, _Votes] = defaultdict(list)
    for number, judgement in enumerate(judgements):
        for pair in _pairs(judgement.prompt, places[number]):
            votes[pair].append((number, _sign(places[number][pair[2]] - places[number][pair[1]])))
    heads = connected(len(judgements), ([number for number, _ in given] for given in votes.values()))
    contradicted = [given for given in votes.values() if {1, -1} <= {sign for _, sign in given}]
    disputed = {heads[given[0][0]] for given in contradicted}
    groups: dict[int, list[int]] = defaultdict(list)
    for number, head in enumerate(heads):
        groups[head].append(number)
    found: list[tuple[int, Preference | Ranking]] = []
    for head, numbers in groups.items():
        found += _settled(numbers, judgements, places, votes, head in disputed)
    rows = [row for _, row in sorted(found, key=lambda numbered: numbered[0])]
    ordered = Counter(pair for row in rows for pair in _ordered(row))
    agreement, alpha = _agreement(judgements, votes.values())
    pairs_of = (_pairs(judgement.prompt, own) for judgement, own in zip(judgements, places, strict=True))
    summary = {
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
    return rows, summary


def _settled(
    numbers: Sequence[int], judgements: Sequence[Judgement], places: Sequence[_Places],
    votes: Mapping[_Pair, _Votes], disputed: bool,
) -> Iterator[tuple[int, Preference | Ranking]]:  # fmt: skip
    """The rows of judgements that bear on each other, each with the number of a judgement to stand at."""
    sets: dict[frozenset[str], list[int]] = defaultdict(list)
    for number in numbers:
        sets[frozenset(places[number])].append(number)
    if disputed and len(sets) > 1:
        for pair in dict.fromkeys(p for n in numbers for p in _pairs(judgements[n].prompt, places[n])):
            if net := sum(sign for _, sign in votes[pair]):
                prompt, first, second = pair
                yield numbers[0], Preference(prompt, *((first, second) if net > 0 else (second, first)))
        return
    for same in sets.values():
        named = any(judgements[n].task is not None or judgements[n].annotator is not None for n in same)
        for together in [same] if disputed or named else [[n] for n in same]:
            if row := _combined([judgements[n] for n in together], [places[n] for n in together]):
                yield together[0], row


def _combined(judgements: Sequence[Judgement], places: Sequence[_Places]) -> Preference | Ranking | None:
    """One row of judgements of the same answers, by their mean ranks; of two answers that tie, none."""
    prompt = judgements[0].prompt
    mean = {answer: sum(own[answer] for own in places) / len(places) for answer in places[0]}
    if len(set(mean.values())) < 2:
        return None
    answers = sorted(mean, key=lambda answer: mean[answer])
    if len(answers) == 2:
        known = [j.margin for j, own in zip(judgements, places, strict=True) if own[answers[0]] < own[answers[1]]]
        margins = [margin for margin in known if margin is not None]
        alike = len(margins) == len(judgements)  # a margin is known where all agree, and each says by how much
        return Preference(prompt, answers[0], answers[1], sum(margins) / len(margins) if alike else None)
    ranks = tuple(mean[answer] for answer in answers)
    plain = ranks == tuple(range(1, len(ranks) + 1))
    return Ranking(prompt, tuple(answers), () if plain else ranks)


def _places(judgement: Judgement) -> _Places:
    """Each different answer's rank from 1; those that tie share the mean of their ranks, and so do equal texts."""
    first = _averaged(judgement.ranks)
    texts = list(dict.fromkeys(judgement.answers))
    if len(texts) == len(first):
        return dict(zip(texts, first, strict=True))
    given: dict[str, list[float]] = defaultdict(list)
    for answer, rank in zip(judgement.answers, first, strict=True):
        given[answer].append(rank)
    return dict(zip(texts, _averaged([sum(given[text]) / len(given[text]) for text in texts]), strict=True))


def _averaged(ranks: Sequence[float]) -> list[float]:
    count = Counter(ranks)
    below = dict(zip(sorted(count), itertools.accumulate((count[r] for r in sorted(count)), initial=0), strict=False))
    return [below[rank] + (count[rank] + 1) / 2 for rank in ranks]


def _pairs(prompt: Prompt, answers: Iterable[str]) -> Iterator[_Pair]:
    """All pairs of answers; by their texts, so that the order in which they were shown or judged plays no part."""
    return ((prompt, first, second) for first, second in itertools.combinations(sorted(answers), 2))


def _ordered(row: Preference | Ranking) -> Iterator[_Pair]:
    """The pairs that a row puts in an order."""
    if isinstance(row, Preference):
        return _pairs(row.prompt, (row.chosen, row.rejected))
    places = dict(zip(row.responses, row.ranks or range(len(row.responses)), strict=True))
    return (pair for pair in _pairs(row.prompt, places) if places[pair[1]] != places[pair[2]])


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

    The share leaves ties out; to alpha (nominal) a tie is a verdict of its own. None where nothing can be said.
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
    if sum(any(column) for column in zip(*counts, strict=True)) < 2:
        return same / both if both else None, None
    import krippendorff  # and numpy with it: slow to import, and few data sets have several annotators

    alpha = float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))
    return same / both if both else None, alpha
