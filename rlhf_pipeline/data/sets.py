"""The registry of data sets: locate, read, split, limit."""

import hashlib
import itertools
import logging
import random
import typing
import zlib
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from rlhf_pipeline.data import readers, records
from rlhf_pipeline.data.acl_imdb import read_acl_imdb
from rlhf_pipeline.data.agreement import Labels, combine_judgements
from rlhf_pipeline.data.judgements import read_judgements
from rlhf_pipeline.data.python_code import source_files
from rlhf_pipeline.data.records import Code, Demonstration, Dialogue, Labelled, Preference, Prompt, Ranking, Row, Text
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import explain_failures, is_hub_id
from rlhf_pipeline.registry import Range, Registry
from rlhf_pipeline.stages import STAGES

R = TypeVar("R", bound=Row)
S = TypeVar("S")

_LOG = logging.getLogger("rlhf_pipeline")
IMDB = "stanfordnlp/imdb"  # on the hub
_MIN_PARTS = 5  # of one prompt's rows; with fewer parts, one part would be too many rows to hold out


@dataclass(frozen=True)
class Splits(Generic[S]):
    """Training rows and held-out rows."""

    train: list[S]
    test: list[S]
    labels: Labels | None = None  # if people judged the answers
    share: float | None = None  # share of the rows to hold out, if none are held out yet


# `limit` cuts both splits, `test_limit` only the held-out one.
# `prompt_tokens`: how many tokens of a text are the prompt, drawn per row from first to last, both included; for code,
# how many tokens a function's head may have. `prompt_turns`: how many turns of a dialogue are the prompt.
registry: Registry[Splits[Any]] = Registry(
    "data",
    {
        "limit": Annotated[int, Range(1)] | None,
        "test_limit": Annotated[int, Range(1)] | None,
        "min_characters": int,
        "prompt_tokens": tuple[int, int],
        "prompt_turns": Annotated[int, Range(1)] | None,
    },
)


@registry.register
def toy_reviews(seed: int, *, train: int = 20_000, test: int = 2_000) -> Splits[Labelled]:
    """Short movie reviews from our own grammar: the demo's data. They do not depend on the run's seed.

    Held-out reviews begin with other words, so their prompts are new to a policy trained on the training reviews.
    """
    from rlhf_pipeline.data.toy_reviews import toy_reviews as draw

    return Splits([*draw(train, seed=0)], [*draw(test, seed=1, held_out=True)])


@registry.register
def toy_arithmetic(seed: int, *, largest: Annotated[int, Range(1, 999)] = 99) -> Splits[Demonstration]:
    """All sums of two numbers up to `largest`: 12 + 7 =, the completion 19, and 19 in the column `answer`.

    About a tenth is held out. 12 + 7 and 7 + 12 are in the same split, so no held-out sum is learnt in either order.
    """
    splits: Splits[Demonstration] = Splits([], [])
    for one, other in itertools.product(range(largest + 1), repeat=2):
        held_out = zlib.crc32(f"{min(one, other)} {max(one, other)}".encode()) % 10 == 0
        row = Demonstration(f"{one} + {other} =", f" {one + other}", {"answer": str(one + other)})
        (splits.test if held_out else splits.train).append(row)
    return splits


@registry.register
def imdb(seed: int, *, path: str = IMDB) -> Splits[Labelled]:
    """The Large Movie Review Dataset (Maas et al. 2011), from the hub or from aclImdb as a folder or .tar.gz."""
    where = Path(path).expanduser()
    if where.exists() or path.endswith((".tar.gz", ".tgz", ".tar")):
        read = read_acl_imdb(where)
        return Splits(read["train"], read["test"])
    import datasets

    with explain_failures(path, "data.path"):
        splits = datasets.load_dataset(path)
    try:
        train, test = ([Labelled(r["text"], int(r["label"])) for r in splits[s]] for s in ("train", "test"))
    except KeyError as error:
        raise UserError(
            f"data.path={path} has no {error}; data=imdb needs train and test with text and label."
        ) from error
    return Splits(train, test)


# Entries that read a file: `test_path` is a second file to hold out; without it, `test_share` of the rows is held out.
# `columns` maps the entry's column names to those of the file (columns: {text: review_body}).


@registry.register
def sentiment(
    seed: int, *, path: str, columns: dict[str, str] | None = None, test_path: str | None = None,
    test_share: float = 0.1, labels: dict[str, int] | None = None,
) -> Splits[Labelled]:  # fmt: skip
    """Labelled texts from a file: JSONL, CSV, TSV or parquet with a text and a label.

    `labels` maps the file's labels to 0 (bad) or 1 (good), as in labels: {正面: 1, 负面: 0}.
    """
    for name, label in (labels or {}).items():
        if type(label) is not int or label not in (0, 1):
            raise UserError(f"data.labels.{name} is {label!r}; each label takes 0 (bad) or 1 (good).")
    return _files(lambda file: readers.read_labelled(file, columns, labels), path, test_path, test_share)


@registry.register
def preferences(
    seed: int, *, path: str | list[str] | None = None, columns: dict[str, str] | None = None,
    buckets: list[str] | None = None, untouched_seconds: float = 5.0, test_path: str | None = None,
    test_share: float = 0.1,
) -> Splits[Preference | Ranking]:  # fmt: skip
    """Human preferences: pairs, ranked lists, sheets and exports of Label Studio, from one file or several.

    Judgements of the same answers are combined into one row. The train/test split is by prompt. `buckets` names a
    Ranker's buckets, best first. An annotation submitted as shown within `untouched_seconds` is not used.
    """
    if not path:
        raise UserError(
            "data=preferences has no file; give data.path=. (stage=reward with reward=preference_model uses the labels "
            "of this run's stage=collect, if there are any.)"
        )

    def read(*paths: str) -> tuple[list[Preference | Ranking], Labels]:
        files = [Path(file).expanduser() for file in dict.fromkeys(paths)]
        found = read_judgements(files, columns, buckets, untouched_seconds)
        rows, summary = combine_judgements(found.judgements)
        if not rows:
            raise UserError(
                f"{', '.join(paths)}: {summary['judgements']} judgements, and none prefers one answer to a different "
                "one."
            )
        aside = {key: found.counts[key] for key in ("skipped", "unlabelled", "superseded", "rejected")}
        return rows, Labels({**summary, **aside}, found.rejected)

    rows, labels = read(*([path] if isinstance(path, str) else path))
    if test_path is None:
        return Splits(rows, [], labels, test_share)
    held_out, test_labels = read(test_path)
    learnt = Counter(map(_split_key, rows))
    known = {prompt for prompt, count in learnt.items() if 2 * count <= len(rows)}  # not one that most rows share
    if again := sum(_split_key(row) in known for row in held_out):
        _LOG.warning("%d of the %d rows in %s have a prompt that is also trained on", again, len(held_out), test_path)
    return Splits(rows, held_out, Labels(labels.summary, labels.rejected + test_labels.rejected))


@registry.register
def instructions(
    seed: int, *, path: str, columns: dict[str, str] | None = None, test_path: str | None = None,
    test_share: float = 0.1,
) -> Splits[Demonstration | Dialogue]:  # fmt: skip
    """Demonstrations: prompt and completion, Alpaca's instruction, input and output, or chat messages."""
    return _files(lambda file: readers.read_demonstrations(file, columns), path, test_path, test_share)


@registry.register
def dialogue(
    seed: int, *, path: str, columns: dict[str, str] | None = None, test_path: str | None = None,
    test_share: float = 0.1,
) -> Splits[Dialogue]:  # fmt: skip
    """Conversations: {"conversation": [{"utterance": ...}, ...]}, messages, or a .txt with blank lines between."""
    return _files(lambda file: readers.read_dialogues(file, columns), path, test_path, test_share)


@registry.register
def text(
    seed: int, *, path: str, column: str = "text", columns: dict[str, str] | None = None, test_path: str | None = None,
    test_share: float = 0.1,
) -> Splits[Text]:  # fmt: skip
    """Plain texts from a file: one a line, or one a row in `column`."""
    return _files(lambda file: readers.read_texts(file, column, columns), path, test_path, test_share)


@registry.register
def python_code(
    seed: int, *, path: str | None = None, column: str = "content", rows: int = 100_000, test_share: float = 0.1
) -> Splits[Code]:
    """Python source: the running interpreter's standard library, a folder, or a hub data set such as codeparrot's.

    A hub data set is streamed, because it may be larger than the disk: `column` of its first `rows` rows is read.
    """
    if path is None or Path(path).expanduser().is_dir() or path.startswith((".", "/", "~")):
        files = source_files(Path(path).expanduser() if path else None)
        return Splits([Code(text) for _, text in files], [], share=test_share)
    with explain_failures(path, "data.path"):
        import datasets

        stream = datasets.load_dataset(path, split="train", streaming=True).take(rows)
        every = [row.get(column) for row in stream]
    found = [source for source in every if source is not None]
    if 0 < len(found) < len(every):
        _LOG.warning("%s: %d of %d rows skipped (the text is empty)", path, len(every) - len(found), len(every))
    if not found or not all(isinstance(source, str) for source in found):
        raise UserError(f"data.path={path} has no text column '{column}'; set data.column=.")
    return Splits([Code(source) for source in dict.fromkeys(found)], [], share=test_share)


def row_type(name: str) -> Any:
    """Return a data set's type of row, from its entry's return annotation; a union if it has several."""
    return typing.get_args(typing.get_type_hints(registry.entries[name])["return"])[0]


def check_kind(name: str, stage: str) -> None:
    """Refuse data that a stage cannot use."""
    kinds = {entry: typing.get_args(row_type(entry)) or (row_type(entry),) for entry in registry.entries}
    takes = STAGES[stage].rows if stage in STAGES else ()
    fitting = [entry for entry, held in kinds.items() if not takes or {row.__name__ for row in held} & {*takes}]
    if name not in fitting:
        holds = " or ".join(held.__name__ for held in kinds[name])
        raise UserError(f"data={name} holds rows of {holds}; stage={stage} takes: {', '.join(fitting)}.")


def load_data(choice: dict[str, Any], seed: int, answers: bool = False) -> Splits[Any]:
    """Read the chosen data, shuffle it by `seed`, and cut it to `limit` rows a split.

    A training row whose text is also held out is dropped, so that no metric is measured on learnt text. With `answers`,
    rows without an answer are dropped too, and the log counts them.
    """
    splits, name = registry.build(choice, seed), choice["name"]
    train, test = splits.train, splits.test
    if answers:
        total = len(train) + len(test)
        train, test = ([row for row in rows if records.is_learnable(row)] for rows in (train, test))
        if not train + test:
            raise UserError(
                f"data={name}: none of {total} rows has an answer to learn (completion, output, answer, or an "
                "assistant's message; data.columns={completion: ..} names the column). Prompts alone are for "
                "stage=ppo, collect and evaluate."
            )
        if lost := total - len(train) - len(test):
            _LOG.warning("data=%s: %d of %d rows skipped (no answer to learn)", name, lost, total)
    if splits.share is not None:
        train, test = _split(train, splits.share)
    shortest, limit = choice.get("min_characters", 0), choice.get("limit")
    held_out = {records.whole_text(row) for row in test}
    every, train = len(train), [row for row in train if records.whole_text(row) not in held_out]
    if both := every - len(train):
        _LOG.warning("data=%s: %d of %d training rows are also held out, and are dropped", name, both, every)
    train, test = ([row for row in rows if len(records.whole_text(row)) >= shortest] for rows in (train, test))
    for rows in (train, test):
        random.Random(f"rows {seed}").shuffle(rows)
    if not train or not test:
        raise UserError(f"data={name} has {len(train)} training rows and {len(test)} held-out rows; both are needed.")
    return Splits(train[:limit], test[:limit][: choice.get("test_limit")], splits.labels)


def fingerprint(choice: dict[str, Any], splits: Splits[Any]) -> dict[str, Any]:
    """Identify the rows by their number and a hash over all of them, in order."""
    digest = hashlib.sha256()
    for row in (*splits.train, *splits.test):
        digest.update(repr((row, row.columns) if getattr(row, "columns", None) else row).encode())
    counts = {"train": len(splits.train), "test": len(splits.test)}
    return {"name": choice["name"], "path": choice.get("path"), **counts, "sha256": digest.hexdigest()}


def hub_set(choice: Mapping[str, Any]) -> str | None:
    """The hub id of the data set that a choice (name, path) reads; None for files and built-in data."""
    default = {"imdb": IMDB, "python_code": None}  # the others read files
    path = choice.get("path") or default.get(str(choice.get("name")))
    if choice.get("name") not in default or not isinstance(path, str) or Path(path).expanduser().exists():
        return None
    return path if is_hub_id(path) else None


def texts(rows: Sequence[Row]) -> list[str]:
    """Return the rows as plain text, for training a tokenizer or for a classifier."""
    return [records.whole_text(row) for row in rows]


def count_known_prompts(prompts: Sequence[Prompt], rows: Sequence[Row]) -> int:
    """Count the prompts that also begin a row. A short one may do so even if its own row differs from all of these.

    The count is useless for code, because its prompts are heads of functions, which do not begin a file.
    """
    known = sorted(texts(rows))
    places = [(bisect_left(known, prompt), prompt) for prompt in map(records.prompt_text, prompts)]
    return sum(place < len(known) and known[place].startswith(prompt) for place, prompt in places)


def _split_key(row: Row) -> str:
    """Return the text that the split goes by: the prompt, the turns up to the user's first, else the whole row."""
    match row:
        case Demonstration(prompt=prompt) | Preference(prompt=prompt) | Ranking(prompt=prompt) if prompt:
            return records.prompt_text(prompt)
        case Dialogue(turns=turns):
            first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
            return records.prompt_text(turns[: first + 1])  # a system message alone is not a question
    return records.whole_text(row)


def _groups(rows: Sequence[Row], share: float) -> list[str]:
    """Return the name of each row's group, which is held out as a whole; "" for a row that is never held out.

    A group is the rows of one prompt. Rows without a prompt are grouped by the answers that they share. So are the rows
    of a prompt that has more than `share` of all rows, if that makes several groups. A group with more than half of
    such rows is never held out.
    """
    first: dict[str, str] = {}  # prompts that differ only in white space are the same
    names = [first.setdefault(" ".join(name.split()), name) for name in map(_split_key, rows)]
    holding: dict[str, list[int]] = defaultdict(list)
    for number, (row, name) in enumerate(zip(rows, names, strict=True)):
        holding[name if getattr(row, "prompt", True) else ""].append(number)
    for prompt, numbers in holding.items():
        if prompt and len(numbers) <= share * len(rows):
            continue
        heads = group_by_shared_answers([prompt] * len(numbers), [rows[number] for number in numbers])
        size = Counter(heads)
        if len(size) == 1 < len(numbers) == len(rows):
            _LOG.warning("all %d rows share answers, so held-out answers may also be training answers", len(rows))
            return [records.whole_text(row) for row in rows]
        if prompt and len(numbers) < len(rows) and len(size) < _MIN_PARTS:
            continue
        for number, head in zip(numbers, heads, strict=True):
            names[number] = "" if 2 * size[head] > len(numbers) > 1 else records.whole_text(rows[numbers[head]])
    return names


def group_by_shared_answers(prompts: Sequence[Prompt], rows: Sequence[Row]) -> list[int]:
    """Return for each row the first row that shares an answer to the same prompt, directly or through other rows."""
    from networkx.utils import UnionFind  # type: ignore[import-untyped]  # a dependency of torch

    holding: dict[tuple[Prompt, str], list[int]] = defaultdict(list)
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        for answer in filter(str.strip, records.answers(row)):
            holding[prompt, answer].append(number)
    groups = UnionFind(range(len(rows)))
    for numbers in holding.values():
        groups.union(*numbers)
    heads = {number: min(together) for together in groups.to_sets() for number in together}
    return [heads[number] for number in range(len(rows))]


def _split(rows: list[R], share: float) -> tuple[list[R], list[R]]:
    """Hold out a share of the rows' groups. A hash decides, so the split does not depend on the seed.

    If there are several groups, at least one is held out, so that a few labels are enough.
    """
    if not 0 < share < 1:
        raise UserError(f"data.test_share is {share}; it takes a number between 0 and 1.")
    groups = _groups(rows, share)
    places = {name: int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8 for name in groups if name}
    least = min(places.values()) if len(set(groups)) > 1 else 0.0
    held_out = [bool(name) and (places[name] < share or places[name] <= least) for name in groups]
    pairs = list(zip(rows, held_out, strict=True))
    return [row for row, out in pairs if not out], [row for row, out in pairs if out]


def _files(read: Callable[[Path], list[R]], path: str, test_path: str | None, share: float) -> Splits[R]:
    rows = read(Path(path).expanduser())
    return Splits(rows, [], share=share) if test_path is None else Splits(rows, read(Path(test_path).expanduser()))
