"""The registry of data sets: locate, read, split, limit."""

import hashlib
import logging
import random
import typing
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Generic, TypeVar

from rlhf_pipeline.data import formats, records
from rlhf_pipeline.data.agreement import Labels, connected, settle
from rlhf_pipeline.data.python_code import source_files
from rlhf_pipeline.data.records import Code, Demonstration, Dialogue, Labelled, Preference, Prompt, Ranking, Row, Text
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.hub import explained, is_hub_id
from rlhf_pipeline.registry import Range, Registry
from rlhf_pipeline.stages import STAGES

R = TypeVar("R", bound=Row)
S = TypeVar("S")

_LOG = logging.getLogger("rlhf_pipeline")
IMDB = "stanfordnlp/imdb"  # on the hub
_PARTS = 5  # of a prompt: with fewer, the one that is always held out would be too large a share of it


@dataclass(frozen=True)
class Splits(Generic[S]):
    """Rows to learn from, and held-out rows."""

    train: list[S]
    test: list[S]
    labels: Labels | None = None  # where people judged the answers


# `limit` cuts both splits, `test_limit` the held-out one alone.
# `prompt_tokens`: how many tokens of a text are the prompt, drawn per row from first to last, both included; of code,
# the tokens that a function's head may have. `prompt_turns`: how many turns of a dialogue are the prompt.
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

# The rows that each stage can use.
TAKES = {name: tuple(getattr(records, row) for row in stage.rows) for name, stage in STAGES.items() if stage.rows}


@registry.register
def toy_reviews(seed: int, *, train: int = 20_000, test: int = 2_000) -> Splits[Labelled]:
    """Short movie reviews from our own grammar: the demo's data. They do not depend on the run's seed.

    Held-out reviews begin with other words, so their prompts are new to a policy that learnt from the training reviews.
    """
    from rlhf_pipeline.data.toy_reviews import toy_reviews as draw

    return Splits(draw(train, seed=0), draw(test, seed=1, held_out=True))


@registry.register
def imdb(seed: int, *, path: str = IMDB) -> Splits[Labelled]:
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


# Entries that read a file: `test_path` is a second file to hold out; without it, `test_share` of the rows is held out.
# `columns` maps the names that the entry knows to those of the file (columns: {text: review_body}).


@registry.register
def sentiment(
    seed: int, *, path: str, columns: dict[str, str] | None = None, test_path: str | None = None,
    test_share: float = 0.1, labels: dict[str, int] | None = None,
) -> Splits[Labelled]:  # fmt: skip
    """Labelled texts from a file: JSONL, CSV, TSV or parquet with a text and a label.

    `labels` says what the file's labels mean: 0 is bad, 1 is good (labels: {正面: 1, 负面: 0}).
    """
    if odd := [name for name, label in (labels or {}).items() if type(label) is not int or label not in (0, 1)]:
        raise UserError(f"data.labels.{odd[0]} is {(labels or {})[odd[0]]!r}; each label takes 0 (bad) or 1 (good).")
    return _from_files(partial(formats.read_labelled, columns=columns, labels=labels), path, test_path, test_share)


@registry.register
def preferences(
    seed: int, *, path: str | list[str] | None = None, columns: dict[str, str] | None = None,
    buckets: list[str] | None = None, untouched_seconds: float = 5.0, test_path: str | None = None,
    test_share: float = 0.1,
) -> Splits[Preference | Ranking]:  # fmt: skip
    """What people preferred: pairs, ranked lists, sheets and exports of Label Studio, from one file or several.

    Judgements of the same answers are combined into one row. The train/test split is by prompt. `buckets` names a
    Ranker's buckets, best first. An annotation submitted as shown within `untouched_seconds` is not a label.
    """
    if not path:
        raise UserError(
            "data=preferences has no file; give data.path=. (stage=reward with reward=preference_model takes what "
            "this run's stage=collect brought, once it has.)"
        )
    read = partial(_judged, columns=columns, buckets=buckets, untouched_seconds=untouched_seconds)
    rows, labels = read([path] if isinstance(path, str) else path)
    if test_path is None:
        split = _split(rows, test_share)
        return Splits(split.train, split.test, labels)
    held_out, test_labels = read([test_path])
    _say_learnt(rows, held_out, test_path)
    return Splits(rows, held_out, Labels(labels.summary, labels.rejected + test_labels.rejected))


@registry.register
def instructions(
    seed: int, *, path: str, columns: dict[str, str] | None = None, test_path: str | None = None,
    test_share: float = 0.1,
) -> Splits[Demonstration | Dialogue]:  # fmt: skip
    """Demonstrations: prompt and completion, Alpaca's instruction, input and output, or chat messages."""
    return _from_files(partial(formats.read_demonstrations, columns=columns), path, test_path, test_share)


@registry.register
def dialogue(
    seed: int, *, path: str, columns: dict[str, str] | None = None, test_path: str | None = None,
    test_share: float = 0.1,
) -> Splits[Dialogue]:  # fmt: skip
    """Conversations: {"conversation": [{"utterance": ...}, ...]}, messages, or a .txt with blank lines between."""
    return _from_files(partial(formats.read_dialogues, columns=columns), path, test_path, test_share)


@registry.register
def text(
    seed: int, *, path: str, column: str = "text", columns: dict[str, str] | None = None, test_path: str | None = None,
    test_share: float = 0.1,
) -> Splits[Text]:  # fmt: skip
    """Plain texts from a file: one a line, or one a row in `column`."""
    return _from_files(partial(formats.read_texts, column=column, columns=columns), path, test_path, test_share)


@registry.register
def python_code(
    seed: int, *, path: str | None = None, column: str = "content", rows: int = 100_000, test_share: float = 0.1
) -> Splits[Code]:
    """Python source: the running interpreter's standard library, a folder, or a set of the hub such as codeparrot's.

    A hub's set is streamed: `column` of its first `rows` rows. Such sets are larger than disks.
    """
    if path is None or Path(path).expanduser().is_dir() or path.startswith((".", "/", "~")):
        files = source_files(Path(path).expanduser() if path else None)
        return _split([Code(source) for _, source in files], test_share)
    with explained(path, "data.path"):
        import datasets

        stream = datasets.load_dataset(path, split="train", streaming=True).take(rows)
        every = [row.get(column) for row in stream]
    found = [source for source in every if source is not None]
    if 0 < len(found) < len(every):
        _LOG.warning("%s: %d of %d rows skipped (the text is empty)", path, len(every) - len(found), len(every))
    if not found or not all(isinstance(source, str) for source in found):
        raise UserError(f"data.path={path} has no column of text '{column}'; say data.column=.")
    return _split([Code(source) for source in dict.fromkeys(found)], test_share)


def kind(name: str) -> Any:
    """The type of row that a data set holds, by its entry's return annotation; a union where it holds several."""
    return typing.get_args(typing.get_type_hints(registry.entries[name])["return"])[0]


def _kinds(name: str) -> tuple[type, ...]:
    found = kind(name)
    return typing.get_args(found) or (found,)


def check_kind(name: str, stage: str) -> None:
    """Refuse data that a stage cannot use."""
    if stage in TAKES and not set(_kinds(name)) & set(TAKES[stage]):
        fitting = ", ".join(n for n in registry.entries if set(_kinds(n)) & set(TAKES[stage]))
        holds = " or ".join(k.__name__ for k in _kinds(name))
        raise UserError(f"data={name} holds rows of {holds}; stage={stage} takes: {fitting}.")


def load_data(choice: dict[str, Any], seed: int, answers: bool = False) -> Splits[Any]:
    """Read the chosen data, shuffle it by `seed`, and cut it to `limit` rows a split.

    A training row whose text is also held out is dropped, so that no figure is measured on what was learnt. With
    `answers`, rows without an answer are dropped too, and counted.
    """
    splits = registry.build(choice, seed)
    if answers:
        splits = _answered(splits, choice)
    shortest = choice.get("min_characters", 0)
    test = [row for row in splits.test if len(whole(row)) >= shortest]
    held_out = {whole(row) for row in splits.test}
    apart = [row for row in splits.train if whole(row) not in held_out]
    if both := len(splits.train) - len(apart):
        _LOG.warning(
            "data=%s: %d of %d rows to learn from are also held out, and are left out",
            choice["name"], both, len(splits.train),
        )  # fmt: skip
    train = [row for row in apart if len(whole(row)) >= shortest]
    for rows in (train, test):
        random.Random(f"rows {seed}").shuffle(rows)
    limit = choice.get("limit")
    if not train[:limit] or not test[:limit]:
        raise UserError(
            f"data={choice['name']} has {len(train)} rows to learn from and {len(test)} to hold out; both are needed."
        )
    return Splits(train[:limit], test[:limit][: choice.get("test_limit")], splits.labels)


def _answered(splits: Splits[Any], choice: dict[str, Any]) -> Splits[Any]:
    """The rows that hold an answer to learn."""
    train, test = ([row for row in rows if records.teaches(row)] for rows in (splits.train, splits.test))
    kept, total = train + test, len(splits.train) + len(splits.test)
    if len(kept) == total:
        return splits
    if not kept:
        raise UserError(
            f"data={choice['name']}: none of {total} rows has an answer to learn (completion, output, answer, or "
            "an assistant's message; data.columns={completion: ..} names the column). Prompts alone are for stage=ppo, "
            "collect and evaluate."
        )
    _LOG.warning("data=%s: %d of %d rows skipped (no answer to learn)", choice["name"], total - len(kept), total)
    if (train and test) or choice.get("test_path"):
        return Splits(train, test)
    return _split(kept, choice.get("test_share", 0.1))


def fingerprint(choice: dict[str, Any], splits: Splits[Any]) -> dict[str, Any]:
    """What identifies the rows: their number and a hash over all of them, in order."""
    digest = hashlib.sha256()
    for row in (*splits.train, *splits.test):
        digest.update(repr(row).encode())
    counts = {"train": len(splits.train), "test": len(splits.test)}
    return {"name": choice["name"], "path": choice.get("path"), **counts, "sha256": digest.hexdigest()}


def hub_set(choice: Mapping[str, Any]) -> str | None:
    """The hub id of the data set that a choice (name, path) reads; None for files and built-in data."""
    default = {"imdb": IMDB, "python_code": None}  # the others read files
    path = choice.get("path") or default.get(str(choice.get("name")))
    if choice.get("name") not in default or not isinstance(path, str) or Path(path).expanduser().exists():
        return None
    return path if is_hub_id(path) else None


def plain(prompt: Prompt) -> str:
    """A prompt's words without a template."""
    return prompt if isinstance(prompt, str) else "\n\n".join(turn.text for turn in prompt)


def whole(row: Row) -> str:
    """All words of a row."""
    match row:
        case Text(text=text) | Code(text=text) | Labelled(text=text):
            return text
        case Demonstration(prompt=prompt, completion=completion):
            return f"{plain(prompt)}\n\n{completion}"
        case Dialogue(turns=turns):
            return "\n".join(turn.text for turn in turns)
        case Preference(prompt=prompt, chosen=chosen, rejected=rejected):
            return f"{plain(prompt)}\n\n{chosen}\n\n{rejected}"
        case Ranking(prompt=prompt, responses=responses):
            return "\n\n".join((plain(prompt), *responses))
    raise TypeError(type(row))


def texts(rows: Sequence[Row]) -> list[str]:
    """The rows as plain text: for a tokenizer to be trained on, or a classifier to read."""
    return [whole(row) for row in rows]


def begun_by(prompts: Sequence[Prompt], rows: Sequence[Row]) -> int:
    """How many of the prompts also begin a row, as a few words may even where their whole text differs from all rows.

    Not telling for code: its prompts are heads of functions, which do not begin a file.
    """
    known = sorted(texts(rows))
    places = [(bisect_left(known, prompt), prompt) for prompt in map(plain, prompts)]
    return sum(place < len(known) and known[place].startswith(prompt) for place, prompt in places)


def _group(row: Row) -> str:
    """What the split is by: the prompt, the first turn, else the row itself."""
    match row:
        case Demonstration(prompt=prompt) | Preference(prompt=prompt) | Ranking(prompt=prompt) if prompt:
            return plain(prompt)
        case Dialogue(turns=turns):
            first = next((i for i, turn in enumerate(turns) if turn.role == "user"), 0)
            return plain(turns[: first + 1])  # a system's words before it are no question
    return whole(row)


def _groups(rows: Sequence[Row], share: float) -> list[tuple[str, str | None]]:
    """The group that each row is held out with: ("", its prompt), or (its prompt, a part of that prompt's rows).

    Prompts that differ only in white space are the same. A prompt with more than `share` of all rows is too large to
    hold out at once: it is divided into parts, the rows that share answers, if there are enough of them. A prompt that
    all rows have, and rows without a prompt, are divided too. A part with more than half of a prompt's rows has None
    for a name and is never held out: it holds an answer that is given to everything. If all rows are one part, each row
    is its own.
    """
    first: dict[str, str] = {}
    names = [first.setdefault(" ".join(group.split()), group) for group in map(_group, rows)]
    holding: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        holding[names[number] if getattr(row, "prompt", True) else ""].append(number)
    groups: list[tuple[str, str | None]] = [("", name) for name in names]
    for prompt, numbers in holding.items():
        if prompt and len(numbers) <= share * len(rows):
            continue
        own = [rows[number] for number in numbers]
        heads = joined([prompt] * len(own), own)
        parts, largest = len(set(heads)), shared_group(heads)
        if prompt and len(own) < len(rows) and parts < _PARTS:
            continue
        if single := parts == 1 and 1 < len(own) == len(rows):
            _LOG.warning("all %d rows share answers, so held-out answers may also be learnt from", len(rows))
        for place, head in enumerate(heads):
            never = head == largest and parts > 1
            groups[numbers[place]] = (prompt, None if never else whole(own[place if single else head]))
    return groups


def joined(prompts: Sequence[Prompt], rows: Sequence[Row]) -> list[int]:
    """For every row, the first row connected to it by answers to the same prompt, directly or through other rows."""
    holding: dict[tuple[Prompt, str], list[int]] = defaultdict(list)
    for number, (prompt, row) in enumerate(zip(prompts, rows, strict=True)):
        for answer in _answers(row) or (whole(row),):
            if answer.strip():
                holding[prompt, answer].append(number)
    return connected(len(rows), holding.values())


def _answers(row: Row) -> tuple[str, ...]:
    match row:
        case Preference(chosen=chosen, rejected=rejected):
            return (chosen, rejected)
        case Ranking(responses=responses):
            return responses
    return ()


def shared_group(groups: Sequence[Any]) -> Any:
    """The group that more than half of the rows are in, if any: an instruction rather than a question."""
    most, count = Counter(groups).most_common(1)[0] if groups else (None, 0)
    return most if 2 * count > len(groups) > 1 else None


def _split(rows: list[R], share: float) -> Splits[R]:
    """Hold out a share of the rows' groups, by a hash: the split does not depend on the seed.

    At least one of several prompts is held out, and at least one part of a divided prompt: a few labels are enough.
    """
    if not 0 < share < 1:
        raise UserError(f"data.test_share is {share}; it takes a number between 0 and 1.")
    groups = _groups(rows, share)
    places = [int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 16**8 if name else 1.0 for _, name in groups]
    # The places of the groups that a prompt is divided into; under "" all other prompts.
    of: dict[str, set[float]] = defaultdict(set)
    for (prompt, _), place in zip(groups, places, strict=True):
        of[prompt].add(place)
    least = {prompt: min(own) if len(own) > 1 else -1.0 for prompt, own in of.items()}
    held_out = [place < share or place <= least[prompt] for (prompt, _), place in zip(groups, places, strict=True)]
    pairs = list(zip(rows, held_out, strict=True))
    return Splits([row for row, out in pairs if not out], [row for row, out in pairs if out])


def _say_learnt(rows: Sequence[Row], held_out: Sequence[Row], path: str) -> None:
    """Warn if prompts of the held-out file are also learnt from, other than a prompt that most rows share."""
    groups = [_group(row) for row in rows]
    known = set(groups) - {shared_group(groups)}
    if learnt := sum(_group(row) in known for row in held_out):
        _LOG.warning("%d of the %d rows in %s have a prompt that is learnt from too", learnt, len(held_out), path)


def _judged(paths: Sequence[str], **how: Any) -> tuple[list[Preference | Ranking], Labels]:
    """The judgements of all files, combined."""
    read = formats.read_judgements([Path(path).expanduser() for path in dict.fromkeys(paths)], **how)
    rows, summary = settle(read.judgements)
    if not rows:
        raise UserError(
            f"{', '.join(paths)}: {summary['judgements']} judgements, and none prefers one answer to a different one."
        )
    apart = {key: read.counts[key] for key in ("skipped", "unlabelled", "superseded", "rejected")}
    return rows, Labels({**summary, **apart}, read.rejected)


def _from_files(read: Callable[[Path], list[R]], path: str, test_path: str | None, share: float) -> Splits[R]:
    rows = read(Path(path).expanduser())
    return _split(rows, share) if test_path is None else Splits(rows, read(Path(test_path).expanduser()))


def _from_hub(path: str) -> Any:
    import datasets

    with explained(path, "data.path"):
        return datasets.load_dataset(path)
