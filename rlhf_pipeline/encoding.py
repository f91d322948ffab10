"""Rows to token ids: what each stage makes of the data, in the words and special tokens of the policy."""

import random
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_pipeline.data import texts, whole
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.python_code import functions
from rlhf_pipeline.records import Code, Demonstration, Dialogue, Preference, Ranking, Row
from rlhf_pipeline.templates import pieces, render, written

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_PART = 1000  # rows tokenized at once


class Lesson(NamedTuple):
    """Token ids to learn from, and which of them are learnt: 1, or 0 where they only stand before what is."""

    ids: list[int]
    learnt: list[int]


def documents(rows: Sequence[Row], tokenizer: "Tokenizer") -> list[list[int]]:
    """Token ids of whole rows, each with its end, to learn a language from."""
    end = int(tokenizer.eos_token_id)
    found: list[list[int]] = []
    for start in range(0, len(rows), _PART):
        part = rows[start : start + _PART]
        strings = [
            render(tokenizer, row.turns, False) if isinstance(row, Dialogue) else _said(row, tokenizer) for row in part
        ]
        found += [ids if ids[-1:] == [end] else [*ids, end] for ids in encode(tokenizer, strings)]
    return found


def demonstrations(rows: Sequence[Row], tokenizer: "Tokenizer", choice: dict[str, Any], seed: int) -> list[Lesson]:
    """Prompts with what is to be answered, which ends with the tokenizer's EOS."""
    end = int(tokenizer.eos_token_id)
    found: list[Lesson] = []
    for row_pieces in _lessons(rows, tokenizer, choice, seed):
        ids: list[int] = []
        learnt: list[int] = []
        for piece, is_learnt in row_pieces:
            ids += piece
            learnt += [int(is_learnt)] * len(piece)
        if not any(learnt):
            continue
        if ids[-1] != end:
            ids, learnt = [*ids, end], [*learnt, 1]
        found.append(Lesson(ids, learnt))
    return found


def prompts(rows: Sequence[Row], tokenizer: "Tokenizer", choice: dict[str, Any], seed: int) -> list[list[int]]:
    """Token ids of prompts: a row's own, a dialogue's first turns, the first tokens of a text, the heads of functions.

    A row of code gives as many prompts as it has functions; one without a prompt gives none.
    """
    if rows and isinstance(rows[0], Code):
        return [head for head, _ in _functions(rows, tokenizer, choice, seed)]
    if rows and isinstance(rows[0], Demonstration | Preference | Ranking | Dialogue):
        strings = [_asked(row, tokenizer, choice.get("prompt_turns")) for row in rows]
        return [ids for ids in encode(tokenizer, [s for s in strings if s]) if ids]
    return [prompt for prompt, _ in _cut(rows, tokenizer, choice, seed)]


def conversational(rows: Sequence[Row]) -> bool:
    """Whether any row holds turns of a conversation, so that a template has a say in it."""
    return any(isinstance(row, Dialogue) or isinstance(getattr(row, "prompt", ""), tuple) for row in rows)


def encode(tokenizer: "Tokenizer", strings: Sequence[str]) -> list[list[int]]:
    """Token ids without the special tokens that a tokenizer may add: templates write out those that belong."""
    return [list(ids) for ids in tokenizer(list(strings), add_special_tokens=False)["input_ids"]] if strings else []


def _said(row: Row, tokenizer: "Tokenizer") -> str:
    match row:
        case Demonstration(prompt=prompt, completion=answer) | Preference(prompt=prompt, chosen=answer):
            return written(tokenizer, prompt) + answer
        case Ranking(prompt=prompt, responses=(best, *_)):
            return written(tokenizer, prompt) + best
    return whole(row)


def _asked(row: Row, tokenizer: "Tokenizer", turns: int | None) -> str:
    if not isinstance(row, Dialogue):
        assert isinstance(row, Demonstration | Preference | Ranking)
        return written(tokenizer, row.prompt)
    # Of two people's talk the first turn, of a chat all that stands before its last reply.
    last = max(i for i, turn in enumerate(row.turns) if row.both or turn.role == "assistant")
    return render(tokenizer, row.turns[: min(turns or (1 if row.both else last), last)], reply_follows=True)


def _lessons(
    rows: Sequence[Row], tokenizer: "Tokenizer", choice: dict[str, Any], seed: int
) -> Iterator[list[tuple[list[int], bool]]]:
    """Each row in pieces of token ids, with whether they are learnt."""
    if rows and isinstance(rows[0], Code):
        for head, body in _functions(rows, tokenizer, choice, seed):
            yield [(head, False), (body, True)]
    elif rows and isinstance(rows[0], Demonstration | Dialogue):
        for row in rows:
            if isinstance(row, Dialogue):
                parts = pieces(tokenizer, row)
            else:
                assert isinstance(row, Demonstration)
                parts = [(written(tokenizer, row.prompt), False), (row.completion, True)]
            if parts:
                ids = encode(tokenizer, [string for string, _ in parts])
                yield [(piece, learnt) for piece, (_, learnt) in zip(ids, parts, strict=True)]
    else:
        for prompt, rest in _cut(rows, tokenizer, choice, seed):
            yield [(prompt, False), (rest, True)]


def _functions(
    rows: Sequence[Row], tokenizer: "Tokenizer", choice: dict[str, Any], seed: int
) -> list[tuple[list[int], list[int]]]:
    """Heads and bodies of the functions in files of code, in random order: a file's functions are much alike."""
    longest = choice.get("prompt_tokens", (1, 64))[1]
    # The line break goes to the body: in a file it is one token with the indent that follows.
    found = [(h[:-1], f"\n{b}") for row in rows if isinstance(row, Code) for h, b in functions(row.text)]
    random.Random(f"functions {seed}").shuffle(found)
    heads, bodies = encode(tokenizer, [h for h, _ in found]), encode(tokenizer, [b for _, b in found])
    return [(head, body) for head, body in zip(heads, bodies, strict=True) if len(head) <= longest]


def _cut(
    rows: Sequence[Row], tokenizer: "Tokenizer", choice: dict[str, Any], seed: int
) -> Iterator[tuple[list[int], list[int]]]:
    """The first tokens of each text, and the others."""
    draw = random.Random(f"prompts {seed}")
    first, last = choice.get("prompt_tokens", (2, 8))
    if not 1 <= first <= last:
        raise UserError(f"data.prompt_tokens is [{first}, {last}]; it takes two numbers, 1 <= first <= last.")
    for start in range(0, len(rows), _PART):
        for ids in encode(tokenizer, texts(rows[start : start + _PART])):
            cut = draw.randint(first, last)
            if len(ids) > cut:
                yield ids[:cut], ids[cut:]
