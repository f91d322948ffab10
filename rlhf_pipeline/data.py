"""The registry of data sets: locate, read, split, limit; and what each stage makes of the rows."""

import hashlib
import random
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from rlhf_pipeline import formats
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import explained
from rlhf_pipeline.records import Demonstration, Labelled, Preference, Row, Text
from rlhf_pipeline.registry import Registry

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

R = TypeVar("R", bound=Row)


@dataclass(frozen=True)
class Splits(Generic[R]):
    """Rows to learn from, and rows that are never learnt from."""

    train: list[R]
    test: list[R]


# `limit` cuts both splits, `test_limit` the held-out one alone.
# `prompt_tokens`: how many tokens of a text are the prompt, drawn per row from first to last, both included.
registry: Registry[Splits[Any]] = Registry(
    "data", {"limit": int | None, "test_limit": int | None, "min_characters": int, "prompt_tokens": tuple[int, int]}
)

# What each stage can make something of.
TAKES: dict[str, tuple[type, ...]] = {
    "pretrain": (Text, Labelled, Demonstration),
    "sft": (Text, Labelled, Demonstration),
    "reward": (Labelled, Preference),
    "ppo": (Text, Labelled, Demonstration, Preference),
    "evaluate": (Text, Labelled, Demonstration, Preference),
}


@registry.register
def toy_reviews(seed: int, *, train: int = 20_000, test: int = 2_000) -> Splits[Labelled]:
    """Short movie reviews from a grammar of our own: the demo's embedded data. They do not vary with the run's seed."""
    from rlhf_pipeline.toy_reviews import toy_reviews as draw

    rows = draw(train + test, seed=0)
    return Splits(rows[test:], rows[:test])


@registry.register
def imdb(seed: int, *, path: str = "stanfordnlp/imdb") -> Splits[Labelled]:
    """The Large Movie Review Dataset (Maas et al. 2011): the hub's, or the original aclImdb as a folder or .tar.gz."""
    where = Path(path).expanduser()
    if where.exists() or path.endswith((".tar.gz", ".tgz", ".tar")):
        read = formats.read_acl_imdb(where)
        return Splits(read["train"], read["test"])
    splits = _from_hub(path)
    try:
        rows = {s: [Labelled(r["text"], int(r["label"])) for r in splits[s]] for s in ("train", "test")}
    except KeyError as error:
        raise UserError(
            f"data.path={path} has no {error}; data=imdb needs train and test with text and label."
        ) from error
    return Splits(rows["train"], rows["test"])


@registry.register
def sentiment(seed: int, *, path: str, test_share: float = 0.1) -> Splits[Labelled]:
    """Labelled texts from a file: JSONL, CSV, TSV or parquet with a text and a label."""
    return _split(formats.read_labelled(Path(path).expanduser()), test_share)


@registry.register
def preferences(seed: int, *, path: str, test_share: float = 0.1) -> Splits[Preference]:
    """Pairs of a better and a worse answer from a file. All pairs of one prompt fall on one side of the split."""
    rows = formats.read_preferences(Path(path).expanduser())
    return _split(rows, test_share, key=lambda row: row.prompt or row.chosen)


@registry.register
def instructions(seed: int, *, path: str, test_share: float = 0.1) -> Splits[Demonstration]:
    """Demonstrations from a file: prompt and completion, or Alpaca's instruction, input and output."""
    return _split(formats.read_demonstrations(Path(path).expanduser()), test_share, key=lambda row: row.prompt)


@registry.register
def text(seed: int, *, path: str, column: str = "text", test_share: float = 0.1) -> Splits[Text]:
    """Plain texts from a file: one a line, or one a row in `column`."""
    return _split(formats.read_texts(Path(path).expanduser(), column), test_share)


def kind(name: str) -> type[Row]:
    """The type of row that a data set holds, by its entry's return annotation."""
    row: type[Row] = typing.get_args(typing.get_type_hints(registry.entries[name])["return"])[0]
    return row


def check_kind(name: str, stage: str) -> None:
    """Refuse data that a stage can make nothing of."""
    if stage in TAKES and kind(name) not in TAKES[stage]:
        fitting = ", ".join(n for n in registry.entries if kind(n) in TAKES[stage])
        raise UserError(f"data={name} holds rows of {kind(name).__name__}; stage={stage} takes: {fitting}.")


def load_data(choice: dict[str, Any], seed: int) -> Splits[Any]:
    """Read the chosen data, shuffle it by `seed`, and cut it to `limit` rows a split.

    A training row whose text is also held out is dropped, so that no figure is taken on what was learnt.
    """
    splits = registry.build(choice, seed)
    shortest = choice.get("min_characters", 0)
    test = [row for row in splits.test if len(_whole(row)) >= shortest]
    held_out = {_whole(row) for row in splits.test}
    train = [row for row in splits.train if len(_whole(row)) >= shortest and _whole(row) not in held_out]
    for rows in (train, test):
        random.Random(f"rows {seed}").shuffle(rows)
    limit = choice.get("limit")
    if not train[:limit] or not test[:limit]:
        raise UserError(
            f"data={choice['name']} has {len(train)} rows to learn from and {len(test)} to hold out; both are needed."
        )
    return Splits(train[:limit], test[:limit][: choice.get("test_limit")])


def fingerprint(choice: dict[str, Any], splits: Splits[Any]) -> dict[str, Any]:
    """What identifies the rows: their number and a hash over all of them, in order."""
    digest = hashlib.sha256()
    for row in (*splits.train, *splits.test):
        digest.update(repr(row).encode())
    counts = {"train": len(splits.train), "test": len(splits.test)}
    return {"name": choice["name"], "path": choice.get("path"), **counts, "sha256": digest.hexdigest()}


def texts(rows: Sequence[Row]) -> list[str]:
    """The rows as plain text, to learn language from."""
    return [_whole(row) for row in rows]


def prompts(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", choice: dict[str, Any], seed: int
) -> list[list[int]]:
    """Token ids of one prompt a row: the row's own, or the first tokens of its text."""
    return [prompt for prompt, _ in _divided(rows, tokenizer, choice, seed)]


def demonstrations(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", choice: dict[str, Any], seed: int
) -> list[tuple[list[int], list[int]]]:
    """Token ids of prompt and completion; the completion ends with the tokenizer's EOS."""
    divided = _divided(rows, tokenizer, choice, seed)
    return [(prompt, [*rest, int(tokenizer.eos_token_id)]) for prompt, rest in divided if rest]


def _divided(
    rows: Sequence[Row], tokenizer: "PreTrainedTokenizerBase", choice: dict[str, Any], seed: int
) -> Iterator[tuple[list[int], list[int]]]:
    draw = random.Random(f"prompts {seed}")
    first, last = choice.get("prompt_tokens", (2, 8))
    if not 1 <= first <= last:
        raise UserError(f"data.prompt_tokens is [{first}, {last}]; it takes two numbers, 1 <= first <= last.")

    def encode(strings: list[str]) -> list[list[int]]:
        return [list(ids) for ids in tokenizer(strings, add_special_tokens=False)["input_ids"]] if strings else []

    for start in range(0, len(rows), 1000):
        part = rows[start : start + 1000]
        if isinstance(part[0], Demonstration | Preference):
            asked = encode([row.prompt for row in part if isinstance(row, Demonstration | Preference)])
            answered = encode([row.completion if isinstance(row, Demonstration) else row.chosen for row in part])  # type: ignore[union-attr]
            yield from ((q, a) for q, a in zip(asked, answered, strict=True) if q)
        else:
            for ids in encode(texts(part)):
                cut = draw.randint(first, last)
                if len(ids) > cut:
                    yield ids[:cut], ids[cut:]


def _whole(row: Row) -> str:
    match row:
        case Text(text=text) | Labelled(text=text):
            return text
        case Demonstration(prompt=prompt, completion=completion):
            return f"{prompt}\n\n{completion}"
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            return f"{prompt}\n\n{chosen}\n\n{rejected}"
    raise TypeError(type(row))


def _split(rows: list[R], share: float, key: Callable[[R], str] = _whole) -> Splits[R]:
    """Hold out a share of the groups that `key` makes; by a hash, so a row falls on one side whatever the seed."""
    if not 0 < share < 1:
        raise UserError(f"data.test_share is {share}; it takes a number between 0 and 1.")

    def held_out(row: R) -> bool:
        return int(hashlib.sha256(key(row).encode()).hexdigest()[:8], 16) < share * 16**8

    return Splits([r for r in rows if not held_out(r)], [r for r in rows if held_out(r)])


def _from_hub(path: str) -> Any:
    import datasets

    with explained(path, "data.path"):
        return datasets.load_dataset(path)
