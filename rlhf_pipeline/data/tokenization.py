"""Convert rows to token ids, with the policy's tokenizer and template."""

import bisect
import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from rlhf_pipeline.data.python_code import functions
from rlhf_pipeline.data.records import Code, Dialogue, Prompt, Prompted, Row, answers, whole_text
from rlhf_pipeline.data.sets import texts
from rlhf_pipeline.data.templates import format_prompt, learnt_parts, render
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.progress import parts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase as Tokenizer

_PART = 100  # rows tokenized at once: some are whole files of code


class Lesson(NamedTuple):
    """Token ids to learn from, and a mask: 1 for tokens that are learnt, 0 for the prompt."""

    ids: list[int]
    learnt: list[int]


class Question(NamedTuple):
    """A prompt as a record (turns or text) and as token ids, with the other columns of its row."""

    prompt: Prompt
    ids: list[int]
    columns: Mapping[str, Any] = {}


def columns_of(asked: Sequence[Question]) -> dict[str, list[Any]]:
    """Return the columns of the prompts' rows by name; None if a row has no such column."""
    names = dict.fromkeys(name for question in asked for name in question.columns)
    return {name: [question.columns.get(name) for question in asked] for name in names}


def documents(rows: Sequence[Row], tokenizer: "Tokenizer") -> list[list[int]]:
    """Return the token ids of whole rows. Each ends with an EOS, unless the row is only a prompt."""
    end = int(tokenizer.eos_token_id)
    found: list[list[int]] = []
    for part in parts(rows, _PART, "tokenize", "text"):
        encoded = encode(tokenizer, [_language(row, tokenizer) for row in part])
        for row, ids in zip(part, encoded, strict=True):
            found.append([*ids, end] if getattr(row, "answered", True) and ids[-1:] != [end] else ids)
    return found


def _language(row: Row, tokenizer: "Tokenizer") -> str:
    """Return a row's text for a language model. If a row has several answers, the best one is used."""
    if isinstance(row, Dialogue):
        return render(tokenizer, row.turns, reply_follows=False)
    return format_prompt(tokenizer, row.prompt) + answers(row)[0] if isinstance(row, Prompted) else whole_text(row)


def demonstrations(rows: Sequence[Row], tokenizer: "Tokenizer", choice: dict[str, Any], seed: int) -> list[Lesson]:
    """Return prompts with their answers, each with an EOS at its end. Of several answers the best one is used."""
    end = int(tokenizer.eos_token_id)
    if rows and isinstance(rows[0], Prompted):
        bar = itertools.chain.from_iterable(parts(rows, _PART, "tokenize", "text"))
        cut = (learnt_parts(tokenizer, row) for row in bar if isinstance(row, Prompted))
        every = (lesson(tokenizer, said) for said in cut if said)
    else:
        begun = _continuations(rows, tokenizer, choice, seed)
        every = (Lesson(prompt + rest, [0] * len(prompt) + [1] * len(rest)) for prompt, rest in begun)
    found = [each for each in every if any(each.learnt)]
    if rows and not found:
        raise UserError(
            f"data={choice['name']} gives nothing to learn: each row ends within its prompt (data.prompt_tokens sets "
            "how many tokens of a text are its prompt)."
        )
    return [x if x.ids[-1] == end else Lesson([*x.ids, end], [*x.learnt, 1]) for x in found]


def shortened(
    splits: Sequence[list[Lesson]], tokenizer: "Tokenizer", longest: int, apart: bool = True
) -> list[list[Lesson]]:
    """Cut the lessons of each split to at most `longest` tokens, and print a warning that counts the losses.

    A prompt loses its beginning, so that its answer stays whole. An answer that alone does not fit loses its end, and
    so does a text that is both prompt and answer (not `apart`). The prompt then keeps up to half of the tokens.
    """
    lost = Counter({"rows": 0, "prompts lose their beginning": 0, "answers lose their end": 0})

    def short(lesson: Lesson) -> Lesson:
        ids, learnt = lesson
        asked, excess = learnt.index(1), len(ids) - longest
        over = min(excess, asked - (1 if apart and asked > excess else longest // 2))
        lost["rows"] += excess > 0
        if over > 0:
            lost["prompts lose their beginning"] += 1
            first = int(ids[0] in (tokenizer.bos_token_id, tokenizer.cls_token_id))
            ids, learnt = ([*row[:first], *row[first + over :]] for row in (ids, learnt))
        lost["answers lose their end"] += len(ids) > longest
        return Lesson(ids[:longest], learnt[:longest])

    found = [[x for x in map(short, split) if any(x.learnt[1:])] for split in splits]
    total = sum(map(len, splits))
    if rows := lost.pop("rows"):
        lost["rows are left out"] = total - sum(map(len, found))
        said = f"{rows} of {total} rows are longer than {longest} tokens (trainer.max_length, at most the policy's "
        said += "positions): " + ", ".join(f"{count} {what}" for what, count in lost.items() if count)
        if any(split and not left for split, left in zip(splits, found, strict=True)):
            raise UserError(f"{said}, so that nothing is left to learn; raise trainer.max_length, or shorten the data.")
        print(f"warning: {said}", flush=True)
    return found


def questions(rows: Sequence[Row], tokenizer: "Tokenizer", choice: dict[str, Any], seed: int) -> list[Question]:
    """Return the prompts: a row's own, a dialogue's first turns, the first tokens of a text, the heads of functions.

    A row of code gives one prompt per function. A row without a prompt gives none.
    """
    if rows and isinstance(rows[0], Prompted):
        every = [(row, *_prompt_of(row, tokenizer, choice.get("prompt_turns"))) for row in rows]
        asked = [(row, prompt, string) for row, prompt, string in every if string]
        encoded = encode(tokenizer, [string for _, _, string in asked])
        pairs = zip(asked, encoded, strict=True)
        found = [Question(prompt, ids, getattr(row, "columns", {})) for (row, prompt, _), ids in pairs if ids]
        if found and len(found) < len(rows):
            print(f"warning: {len(rows) - len(found)} of {len(rows)} rows have no prompt, and are left out", flush=True)
    else:
        heads = [head for head, _ in _continuations(rows, tokenizer, choice, seed)]
        decoded = tokenizer.batch_decode(heads, skip_special_tokens=True) if heads else []
        found = list(map(Question, decoded, heads))
    if rows and not found:
        raise UserError(
            f"data={choice['name']} gives no prompts: none of {len(rows)} rows has one (data.prompt_tokens sets how "
            "many tokens of a text are its prompt, or how many a function's head may have)."
        )
    return found


def _prompt_of(row: Any, tokenizer: "Tokenizer", turns: int | None) -> tuple[Prompt, str]:
    """Return a row's prompt, as a record and as the text that the policy reads."""
    if not isinstance(row, Dialogue):
        return row.prompt, format_prompt(tokenizer, row.prompt)
    # For a dialogue of two people: the first turn. For a chat: all turns before its last reply, or all turns if the
    # user speaks last.
    ends = row.turns[-1].role == "assistant" or (row.both and len(row.turns) > 1)
    last = len(row.turns) - ends
    if not (count := min(turns or (1 if row.both else last), last)):
        return "", ""  # only the assistant speaks
    reply_follows = count == len(row.turns) or row.turns[count].role == "assistant"
    return row.turns[:count], render(tokenizer, row.turns[:count], reply_follows)


def conversational(rows: Sequence[Row]) -> bool:
    """Whether any row holds turns of a conversation, which a template formats."""
    return any(isinstance(row, Dialogue) or isinstance(getattr(row, "prompt", ""), tuple) for row in rows)


def encode(tokenizer: "Tokenizer", strings: Sequence[str]) -> list[list[int]]:
    """Return the token ids of texts. No special tokens are added, because templates write them out.

    The exception: if the tokenizer begins every text with a BOS, as Llama's does, so does each row here.
    """
    bos = _bos(tokenizer)
    return [ids if ids[:1] == bos else bos + ids for ids in _plain_ids(tokenizer, strings)]


def _plain_ids(tokenizer: "Tokenizer", strings: Sequence[str]) -> list[list[int]]:
    return [list(ids) for ids in tokenizer(list(strings), add_special_tokens=False)["input_ids"]] if strings else []


def _bos(tokenizer: "Tokenizer") -> list[int]:
    first = tokenizer("a")["input_ids"][:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def lesson(tokenizer: "Tokenizer", parts: Sequence[tuple[str, bool]]) -> Lesson:
    """Tokenize a text that is given in parts, and mark the tokens of the learnt parts.

    The text is tokenized as a whole if its first part then has the same tokens as a prompt alone; else part by part.
    Part by part is worse: a vocabulary that begins each text with a blank puts one before every part.
    """
    (asked,) = encode(tokenizer, [parts[0][0]])
    if tokenizer.is_fast:
        text = tokenizer("".join(part for part, _ in parts), add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = list(text["input_ids"]), [start for start, _ in text["offset_mapping"]]
        bos = [] if ids[:1] == asked[:1] else _bos(tokenizer)
        ids, starts = bos + ids, [0] * len(bos) + starts
        ends = list(itertools.accumulate(len(part) for part, _ in parts))
        learnt = [int(parts[min(bisect.bisect_right(ends, start), len(parts) - 1)][1]) for start in starts]
        if ids[: len(asked)] == asked and not any(learnt[: len(asked)]):
            return Lesson(ids, learnt)
    rows = [asked, *_plain_ids(tokenizer, [part for part, _ in parts[1:]])]
    masks = ([int(is_learnt)] * len(row) for row, (_, is_learnt) in zip(rows, parts, strict=True))
    return Lesson(list(itertools.chain(*rows)), list(itertools.chain(*masks)))


def _continuations(
    rows: Sequence[Row], tokenizer: "Tokenizer", choice: dict[str, Any], seed: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yield the tokens of each prompt and its continuation, from functions or from texts cut after a few tokens."""
    of_code = bool(rows) and isinstance(rows[0], Code)
    first, last = choice.get("prompt_tokens", (1, 64) if of_code else (2, 8))
    if not 1 <= first <= last:
        raise UserError(f"data.prompt_tokens is [{first}, {last}]; it takes two numbers, 1 <= first <= last.")
    if of_code:
        # Methods are left out. The body begins with the line break, because that is one token with the indent.
        found = [pair for text in texts(rows) for pair in functions(text)]
        random.Random(f"functions {seed}").shuffle(found)  # functions of one file are similar
        heads = encode(tokenizer, [head.removesuffix("\n") for head, _ in found])
        bodies = _plain_ids(tokenizer, [f"\n{body}" for _, body in found])
        yield from ((head, body) for head, body in zip(heads, bodies, strict=True) if len(head) <= last)
        return
    draw = random.Random(f"prompts {seed}")
    short = 0
    for part in parts(rows, _PART, "tokenize", "text"):
        for ids in encode(tokenizer, texts(part)):
            cut = draw.randint(first, last)
            if len(ids) > cut:
                yield ids[:cut], ids[cut:]
            else:
                short += 1
    if 0 < short < len(rows):
        said = "end within their prompt (data.prompt_tokens), and are left out"
        print(f"warning: {short} of {len(rows)} texts {said}", flush=True)
