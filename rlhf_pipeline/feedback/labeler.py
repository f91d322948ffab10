"""A reward in the place of people: it ranks answers, and errs as they do if asked to."""

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.progress import parts


def rank(rows: Sequence[dict[str, Any]], reward: Reward, noise: float, seed: str) -> tuple[list[dict[str, Any]], float]:
    """Rows of `labels.jsonl` for those of `candidates.jsonl`, and the share of pairs ranked as without noise.

    `noise`, in standard deviations of all scores, is the scale of Gumbel noise on each score, so that a better answer
    is put first with the probability of Bradley and Terry (1952): close pairs are confused, clear ones hardly ever.
    """
    asked = [(row["shown_prompt"], answer["text"]) for row in rows for answer in row["answers"]]
    scores: list[float] = []
    for part in parts(asked, 128, "label", "answer"):
        scores += reward([prompt for prompt, _ in part], [text for _, text in part])
    scale, draw, left = noise * float(np.std(scores)), random.Random(f"labeler {seed}"), iter(scores)
    found, right, pairs = [], 0, 0
    for row in rows:
        own = list(itertools.islice(left, len(row["answers"])))
        seen = [score - scale * math.log(-math.log(draw.uniform(1e-12, 1 - 1e-12))) for score in own] if scale else own
        clear = [(i, j) for i, j in itertools.combinations(range(len(own)), 2) if own[i] != own[j]]
        pairs += len(clear)
        right += sum((own[i] > own[j]) == (seen[i] > seen[j]) for i, j in clear)
        found.append(
            {
                "task": row["task"],
                "prompt": row["prompt"],
                "responses": [answer["text"] for answer in row["answers"]],
                "ranks": [1 + sum(other > score for other in seen) for score in seen],
                "annotator": reward.name,
                "scores": own,
            }
        )
    if not pairs:
        raise UserError(
            f"labeler={reward.name} gives all answers to each prompt the same score, so it prefers none; take another "
            "labeler=, or a policy that has learnt more."
        )
    return found, right / pairs
