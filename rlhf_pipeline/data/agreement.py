"""Combine judgements of the same answers into one row to learn from, and measure how far people agree."""

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from rlhf_pipeline.data.records import Judgement, Preference, Prompt, Ranking

_Pair = tuple[Prompt, str, str]  # two answers to a prompt, in the order of their texts


@dataclass(frozen=True)
class Labels:
    """The labels of a data set: counts and agreement, and the rows that were set aside."""

    summary: dict[str, Any]
    rejected: list[dict[str, Any]]


def combine_judgements(judgements: Sequence[Judgement]) -> tuple[list[Preference | Ranking], dict[str, Any]]:
    """Return the rows to learn from, in the order of the judgements, and a summary of the judgements.

    Judgements of the same answers to a prompt become one row, ordered by mean rank (Borda). Equal means tie.
    """
    ranks = [_ranks(judgement) for judgement in judgements]
    alike: dict[tuple[Prompt, frozenset[str]], list[int]] = defaultdict(list)
    verdicts: dict[_Pair, list[tuple[str | None, int]]] = defaultdict(list)  # annotator; 1: first is better, 0: tie
    for number, (judgement, own) in enumerate(zip(judgements, ranks, strict=True)):
        alike[judgement.prompt, frozenset(own)].append(number)
        for pair in _pairs(judgement.prompt, own):
            better = own[pair[2]] - own[pair[1]]
            verdicts[pair].append((judgement.annotator, (better > 0) - (better < 0)))
    rows: list[Preference | Ranking] = []
    ordered: set[_Pair] = set()
    for (prompt, _), numbers in alike.items():
        mean = {answer: fmean(ranks[n][answer] for n in numbers) for answer in ranks[numbers[0]]}
        ordered |= {pair for pair in _pairs(prompt, mean) if mean[pair[1]] != mean[pair[2]]}
        if len(set(mean.values())) > 1:
            rows.append(_row(prompt, mean, [judgements[n].margin for n in numbers]))
    agreement, alpha = _agreement(verdicts.values())
    return rows, {
        "judgements": len(judgements),
        "tasks": len({(j.prompt, j.task or frozenset(j.answers)) for j in judgements}),
        "annotators": len({judgement.annotator for judgement in judgements} - {None}),
        "pairs": len(ordered),
        "ties": len(verdicts) - len(ordered),
        "dropped": sum(ordered.isdisjoint(_pairs(j.prompt, own)) for j, own in zip(judgements, ranks, strict=True)),
        "contradictions": sum({1, -1} <= {better for _, better in given} for given in verdicts.values()),
        "agreement": agreement,
        "alpha": alpha,
    }


def _row(prompt: Prompt, mean: Mapping[str, float], margins: Sequence[float | None]) -> Preference | Ranking:
    answers = sorted(mean, key=lambda answer: mean[answer])
    ranks = tuple(mean[answer] for answer in answers)
    if len(answers) == 2:
        known = [margin for margin in margins if margin is not None]
        # The row has a margin only if all annotators agree and each gives one.
        margin = fmean(known) if ranks[0] == 1 and len(known) == len(margins) else None
        return Preference(prompt, answers[0], answers[1], margin)
    return Ranking(prompt, tuple(answers), () if ranks == tuple(range(1, len(ranks) + 1)) else ranks)


def _ranks(judgement: Judgement) -> dict[str, float]:
    """Rank each different answer from 1. Tied answers share the mean of their ranks, and so do equal texts."""
    given: dict[str, list[float]] = defaultdict(list)
    for answer, rank in zip(judgement.answers, _averaged(judgement.ranks), strict=True):
        given[answer].append(rank)
    return dict(zip(given, _averaged([fmean(own) for own in given.values()]), strict=True))


def _averaged(ranks: Sequence[float]) -> list[float]:
    return [sum(other < rank for other in ranks) + (ranks.count(rank) + 1) / 2 for rank in ranks]


def _pairs(prompt: Prompt, answers: Iterable[str]) -> Iterator[_Pair]:
    """Return all pairs of answers, sorted by text. The order in which they were shown or judged does not matter."""
    return ((prompt, first, second) for first, second in itertools.combinations(sorted(answers), 2))


def _agreement(verdicts: Iterable[Sequence[tuple[str | None, int]]]) -> tuple[float | None, float | None]:
    """Return the share of pairs of annotators that give the same verdict, and Krippendorff's alpha.

    The share leaves ties out. Alpha (nominal) counts a tie as a third verdict. None: there is nothing to compare.
    """
    own = [Counter({who: better for who, better in given if who is not None}.values()) for given in verdicts]
    counts = [[each[1], each[0], each[-1]] for each in own if each.total() > 1]
    same = sum(a * (a - 1) + b * (b - 1) for a, _, b in counts)
    both = sum((a + b) * (a + b - 1) for a, _, b in counts)
    alpha = None
    if sum(map(any, zip(*counts, strict=True))) > 1:
        import krippendorff  # imports numpy, which is slow, and few data sets have several annotators

        alpha = float(krippendorff.alpha(value_counts=counts, level_of_measurement="nominal"))
    return same / both if both else None, alpha
