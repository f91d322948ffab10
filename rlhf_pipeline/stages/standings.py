"""What the answers of all policies come to: figures by reward, gains, what was given up for the reward, examples."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf_pipeline import metrics
from rlhf_pipeline.settings import Evaluation
from rlhf_pipeline.stages.answers import Answers

Gains = dict[str, dict[str, float]]  # by pair of policies, "ppo - sft"


def figures(values: Sequence[float], neutral: float) -> dict[str, float]:
    """What a policy's rewards come to."""
    scores = np.asarray(values, float)
    return {
        "reward_mean": float(scores.mean()),
        "reward_median": float(np.median(scores)),
        "reward_stderr": metrics.standard_error(scores),
        "positive": float((scores > neutral).mean()),
    }


def gains(values: Mapping[str, Sequence[float]], reference: str, draws: int, seed: int) -> Gains:
    """What every policy has gained over the first one and over the reference, on the same prompts.

    Of two policies the later one's gain over the earlier; which of them is the reference does not turn that round.
    """
    names = list(values)
    pairs = [
        (after, before)
        for after in names
        for before in dict.fromkeys((names[0], reference))
        if after != before and not (before == reference and after == names[0])
    ]
    return {
        f"{after} - {before}": metrics.paired_gain(values[before], values[after], draws, seed)
        for after, before in pairs
    }


def moved(values: Mapping[str, Sequence[float]], reference: str) -> dict[str, float | None]:
    """How far each policy's mean reward is from the reference's, in standard deviations of the reference's answers."""
    there = np.asarray(values[reference], float)
    spread = float(there.std(ddof=1)) if len(there) > 1 else 0.0
    return {name: float(np.mean(own) - there.mean()) / spread if spread else None for name, own in values.items()}


def given_up(
    trained: str, reference: str, gained: Mapping[str, Gains], moves: Mapping[str, Mapping[str, float | None]]
) -> list[str]:
    """A line for each policy after the reference that gained of the `trained` reward and lost of another.

    Both by more than chance: the 95 % intervals are on either side of 0. `gained` and `moves` are by reward.
    """
    lines = []
    names = list(moves[trained])
    for name in names[names.index(reference) + 1 :]:
        pair = f"{name} - {reference}"
        if pair not in gained[trained] or gained[trained][pair]["low"] <= 0:
            continue
        for other, theirs in gained.items():
            if other != trained and theirs[pair]["high"] < 0:
                up, down = (_amount(moves[key][name], gained[key][pair]["mean"], reference) for key in (trained, other))
                lines.append(
                    f"{name}: {trained} rose by {up} while {other} fell by {down}; one may be had at the other's cost"
                )
    return lines


def _amount(move: float | None, mean: float, reference: str) -> str:
    return f"{abs(mean):.3g}" if move is None else f"{abs(move):.2f} s.d. of {reference}'s answers"


def sample_row(prompts: Sequence[str], answers: Mapping[str, Answers], main: str, index: int) -> dict[str, Any]:
    """One prompt with every policy's answer and main reward."""
    return {
        "prompt": prompts[index],
        "responses": {name: answer.responses[index] for name, answer in answers.items()},
        "rewards": {name: answer.rewards[main][index] for name, answer in answers.items()},
    }


def chosen(first: Sequence[float], last: Sequence[float], count: int) -> dict[str, list[int]]:
    """Which prompts are shown: those whose reward changed as the median did, from the first policy to the last, and
    those with the last one's best and worst reward, and with the largest change."""
    after = np.asarray(last, float)
    change = after - np.asarray(first, float)
    orders = {
        "typical": np.abs(change - np.median(change)),
        "best": -after,
        "worst": after,
        "most changed": -np.abs(change),
    }
    return {kind: np.argsort(order, kind="stable")[:count].tolist() for kind, order in orders.items()}


def standing(
    answers: Mapping[str, Answers], last: str, reference: str, rewards: Mapping[str, tuple[str, float]], trained: str,
    prompts: Sequence[str], asked: Evaluation, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """The figures of `evaluation.json`; `rewards` are where each came from and what is neutral to it, the main first.

    `trained` is the one that PPO learnt from.
    """
    main, *others = rewards
    values = {key: {name: answer.rewards[key] for name, answer in answers.items()} for key in rewards}
    by_policy = {
        key: {name: figures(scores, rewards[key][1]) for name, scores in values[key].items()} for key in rewards
    }
    gained = {key: gains(values[key], reference, asked.bootstrap, seed) for key in rewards}
    moves = {key: moved(values[key], reference) for key in rewards}
    first = next(iter(answers))
    shown = {
        kind: [sample_row(prompts, answers, main, index) for index in indices]
        for kind, indices in chosen(values[main][first], values[main][last], asked.examples).items()
    }
    return {
        "metrics": {name: {**by_policy[main][name], **answer.figures} for name, answer in answers.items()},
        "paired_gain": gained[main],
        "rewards": {
            key: {"reward": rewards[key][0], "metrics": by_policy[key], "paired_gain": gained[key]} for key in others
        },
        "moved": moves,
        "warnings": given_up(trained, reference, gained, moves),
        "samples": [sample_row(prompts, answers, main, index) for index in range(len(prompts))],
        "examples": shown.pop("typical"),
        "extremes": shown,
    }
