"""Sample several different answers to each prompt, for people to compare."""

import hashlib
import itertools
import json
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from difflib import SequenceMatcher
from typing import Any

import torch

from rlhf_pipeline.data.templates import visible_prompt
from rlhf_pipeline.data.tokenization import Question
from rlhf_pipeline.evaluation.lineup import prompt_ids_for
from rlhf_pipeline.models.policies import Policy
from rlhf_pipeline.models.sampling import Sampling, check_positions, sample
from rlhf_pipeline.processes import gather_parts, is_own_part, processes
from rlhf_pipeline.settings import Collection
from rlhf_pipeline.texts import words_of

_TRIES = 5  # attempts to draw an answer that differs from the others


@dataclass(frozen=True)
class Asker:
    """Draws answers to each prompt with policies and temperatures in turn. Near-duplicates are drawn again."""

    policies: Mapping[str, Policy]  # by source; the questions have the tokens of the first policy
    sampling: Mapping[str, Sampling]  # of each policy, at temperature 1
    collect: Collection
    seed: str

    def rows(self, questions: Sequence[Question], first: int = 0) -> Iterator[list[dict[str, Any]]]:
        """Yield a list of rows of `candidates.jsonl` per batch of prompts, from prompt number `first`.

        The processes share the batches. A prompt without two different answers has no row.
        """
        starts = range(first, len(questions), self.collect.batch_size)
        for place in range(0, len(starts), processes()):
            turn = enumerate(starts[place : place + processes()])
            yield from gather_parts(
                {number: self._batch(questions, start) for number, start in turn if is_own_part(number)}
            )

    def _batch(self, questions: Sequence[Question], start: int) -> list[dict[str, Any]]:
        asked = dict(enumerate(questions[start : start + self.collect.batch_size], start))
        answers, tokens = self._answers(asked)
        return [self._row(number, asked[number], a, tokens[number]) for number, a in answers.items() if len(a) > 1]

    def _row(self, number: int, question: Question, answers: list[dict[str, Any]], tokens: int) -> dict[str, Any]:
        prompt = question.prompt
        random.Random(f"order {self.seed} {number}").shuffle(answers)  # the order must not reveal the policy
        texts = [answer["text"] for answer in answers]
        name = hashlib.sha256(repr((self.seed, number, prompt, texts)).encode()).hexdigest()[:10]
        return {
            "task": f"t{name}",  # with a letter, because spreadsheets read some hashes as numbers
            "number": number,
            "prompt": prompt if isinstance(prompt, str) else [{"role": t.role, "content": t.text} for t in prompt],
            "shown_prompt": visible_prompt(next(iter(self.policies.values())).tokenizer, prompt),
            "answers": [{"id": f"answer{n}", **answer} for n, answer in enumerate(answers, 1)],
            "sampled_tokens": tokens,
            # Values that JSON cannot hold, such as a date from Parquet, become text.
            **({"columns": json.loads(json.dumps({**question.columns}, default=str))} if question.columns else {}),
        }

    def _answers(self, asked: Mapping[int, Question]) -> tuple[dict[int, list[dict[str, Any]]], Counter[int]]:
        """Return up to K answers to each prompt, and how many tokens were sampled for it, by prompt number.

        No two answers are more alike than `similarity`. Each has its policy, temperature and seed, to draw it again.
        """
        tokens: Counter[int] = Counter()
        sources = list(itertools.product(self.collect.temperatures, self.policies))
        found: dict[int, dict[int, dict[str, Any]]] = {number: {} for number in asked}
        for attempt, (place, (temperature, where)) in itertools.product(range(_TRIES), enumerate(sources)):
            # Each prompt begins with the next source, so that all are used even if there are more than K.
            wanted = [
                (number, slot)
                for number, got in found.items()
                for slot in range((place - number) % len(sources), self.collect.answers, len(sources))
                if slot not in got
            ]
            for at in range(0, len(wanted), self.collect.batch_size):
                part = wanted[at : at + self.collect.batch_size]
                keys = [f"{self.seed} {number} {slot} {attempt}" for number, slot in part]
                seeds = [int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") for key in keys]
                drawn = self._draw(where, temperature, [asked[number] for number, _ in part], seeds)
                for (number, slot), (text, length), seed in zip(part, drawn, seeds, strict=True):
                    tokens[number] += length
                    if not any(alike(text, other["text"], self.collect.similarity) for other in found[number].values()):
                        source = {"policy": where, "temperature": temperature, "seed": seed}
                        found[number][slot] = {"text": text, **source}
        return {number: [got[slot] for slot in sorted(got)] for number, got in found.items()}, tokens

    def _draw(
        self, where: str, temperature: float, questions: Sequence[Question], seeds: Sequence[int]
    ) -> list[tuple[str, int]]:
        """Return an answer and its number of tokens per prompt. Each has its own seed, so its batch does not matter."""
        policy, length = self.policies[where], self.collect.response_length
        ids = prompt_ids_for(policy, next(iter(self.policies.values())), questions)
        check_positions(policy.model, ids, length)
        draws = [torch.rand(length, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
        sampling = replace(self.sampling[where], temperature=temperature)
        batch = sample(policy.model, ids, torch.full((len(ids),), length), sampling, torch.stack(draws, 1))
        return list(zip(batch.texts(policy.tokenizer)[1], batch.response_lengths.tolist(), strict=True))


def alike(first: str, second: str, similarity: float) -> bool:
    """Return whether two texts are nearly the same, word by word. Equal texts always are."""
    one, other = (words_of(text.lower()) for text in (first, second))
    return one == other or SequenceMatcher(None, one, other, autojunk=False).ratio() > similarity
