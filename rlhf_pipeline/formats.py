"""Files <-> rows: every file format is parsed here, once, and every fault names the file and the line."""

import csv
import difflib
import gzip
import io
import json
import logging
import re
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn, TypeVar

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.records import Demonstration, Dialogue, Labelled, Preference, Ranking, Text

T = TypeVar("T")

_LOG = logging.getLogger("rlhf_pipeline")
_ARCHIVES = (".tar.gz", ".tgz", ".tar")
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_LAYOUT = "aclImdb/{train,test}/{pos,neg}/<id>_<rating>.txt"
_REVIEW = re.compile(r"(?:aclImdb/)?((train|test)/(pos|neg)/(.+))", re.DOTALL)
_REVIEW_NAME = re.compile(r"([0-9]+)_(10|[1-9])\.txt")
_RATINGS = {"neg": range(1, 5), "pos": range(7, 11)}
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)
_TEXT_COLUMNS = ("text", "review", "sentence", "content")
_LABEL_COLUMNS = ("label", "sentiment")
_LABELS = {"0": 0, "neg": 0, "negative": 0, "1": 1, "pos": 1, "positive": 1}
_ASSISTANT = "\n\nAssistant:"
_BROKEN = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError)  # what a damaged file makes the readers raise


# --- aclImdb ---------------------------------------------------------------------------------------------------------


def read_acl_imdb(path: Path) -> dict[str, list[Labelled]]:
    """The reviews of "train" and "test" in the original aclImdb layout, a folder or a tar archive of it."""
    if path.is_dir():
        files = _folder_files(path)
    elif not path.exists():
        raise _no_file(path, "file or folder")
    elif path.name.lower().endswith(_ARCHIVES):
        files = _archive_files(path)
    else:
        raise UserError(
            f"{path} is not an aclImdb; allowed are a folder and {', '.join(_ARCHIVES)}, laid out {_LAYOUT}."
        )
    found: dict[tuple[str, str], dict[tuple[int, int], str]] = {(s, f): {} for s in ("train", "test") for f in _RATINGS}
    faults: list[str] = []
    for name, data in files:
        if review := _REVIEW.fullmatch(name):
            short, split, folder, file = review.groups()
            try:
                key, text = _review(file, folder, data)
                found[split, folder][key] = text  # a member that an archive holds twice: the last, as when extracted
            except ValueError as fault:
                faults.append(f"{short} ({fault})")
    if faults:
        raise UserError(
            f"{path}: {len(faults)} files do not fit: {_first(sorted(faults))}; "
            f"allowed is <id>_<rating>.txt with rating 1..4 in neg and 7..10 in pos."
        )
    for (split, folder), reviews in found.items():
        if not reviews:
            raise UserError(f"{path}: no reviews in {split}/{folder}; the layout must be {_LAYOUT}.")
    return {
        split: [Labelled(t, label) for label, f in enumerate(_RATINGS) for _, t in sorted(found[split, f].items())]
        for split in ("train", "test")
    }


def _review(file: str, folder: str, data: bytes) -> tuple[tuple[int, int], str]:
    """((id, rating), text) of one review file; a ValueError says in a few words what does not fit."""
    name = _REVIEW_NAME.fullmatch(file)
    if not name:
        raise ValueError("not <id>_<rating>.txt, rating 1..10")
    number, rating = int(name[1]), int(name[2])
    if rating not in _RATINGS[folder]:
        raise ValueError(f"rating {rating} in {folder}")
    try:
        text = " ".join(_BREAK.sub(" ", data.decode()).split())
    except UnicodeDecodeError:
        raise ValueError("not UTF-8") from None
    if not text:
        raise ValueError("empty")
    return (number, rating), text


def _folder_files(path: Path) -> Iterator[tuple[str, bytes]]:
    root = path / "aclImdb" if (path / "aclImdb").is_dir() and not (path / "train").is_dir() else path
    for split in ("train", "test"):
        for folder in _RATINGS:
            for file in (root / split / folder).rglob("*"):
                if file.is_file():
                    yield file.relative_to(root).as_posix(), file.read_bytes()


def _archive_files(path: Path) -> Iterator[tuple[str, bytes]]:
    """Reviews straight from the archive: nothing is written to disk, so no member can land outside a folder."""
    try:
        with _open(path) as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                name = PurePosixPath(member.name)
                if name.is_absolute() or ".." in name.parts:
                    raise UserError(
                        f"{path}: member '{member.name}' points outside the archive; allowed are paths within."
                    )
                if not (member.isfile() or member.isdir()):
                    raise UserError(
                        f"{path}: member '{member.name}' is a link or device; allowed are files and folders."
                    )
                if member.isfile() and _REVIEW.fullmatch(str(name)):
                    content = archive.extractfile(member)
                    yield str(name), content.read() if content else b""
            # tarfile takes a damaged header for the end. The true end is zeros; reading it also checks gzip's CRC.
            end = raw.read()
            if not end or end.strip(b"\0"):
                raise tarfile.ReadError("no end-of-archive mark where one should be")
    except _BROKEN as error:
        _broken(path, error)


# --- rows of any file ------------------------------------------------------------------------------------------------


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row as a dict) of a JSON, JSON lines, CSV, TSV, Parquet or text file, gzipped or not."""
    readers = (_json_rows, _json_rows, _csv_rows, _csv_rows, _parquet_rows, _txt_rows)
    reader = dict(zip(_SUFFIXES, readers, strict=True)).get(_suffix(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder; give one file ({', '.join(_SUFFIXES)}, each also with .gz).")
    if not path.exists():
        raise _no_file(path, "file")
    if reader is None:
        raise UserError(f"{path}: unknown suffix; allowed are {', '.join(_SUFFIXES)}, each also with .gz.")
    return _not_empty(path, reader(path))


def _not_empty(path: Path, rows: Iterator[tuple[int, dict[str, Any]]]) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for number, row in rows:
        yield number, row
    if not number:
        raise UserError(f"{path} holds no rows; it needs one or more.")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, cut at "\\n" alone: U+2028 and the like stay inside a text."""
    try:
        with _open(path) as raw:
            for number, line in enumerate(raw, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise _at(path, number, f"not UTF-8 ({error.reason}); save the file as UTF-8") from None
    except _BROKEN as error:
        _broken(path, error)


def _txt_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


def _json_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects one a line, or a list of them: the first character tells, since suffixes are used for either."""
    lines = _lines(path)
    first = True
    for number, line in lines:
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            yield from _json_list(path, number, line + "".join(rest for _, rest in lines))
            return
        first = False
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _at(path, number, f"not JSON ({error}); allowed are one object a line, or one list of them") from None
        yield number, _object(path, number, row)


def _json_list(path: Path, number: int, text: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """The list's objects, each known by the line where it begins; number is the line where the text begins."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = number + getattr(error, "lineno", 1) - 1
        raise _at(path, line, f"not JSON ({error}); allowed are one object a line, or one list of them") from None
    decoder, end = json.JSONDecoder(), 0
    for row in rows:  # decoded once more for its place alone: json.loads does not tell it
        start = end
        while text[start] in "[, \t\r\n":
            start += 1
        number += text.count("\n", end, start)
        yield number, _object(path, number, row)
        _, end = decoder.raw_decode(text, start)
        number += text.count("\n", start, end)


def _object(path: Path, number: int, row: Any) -> dict[str, Any]:
    if not isinstance(row, dict):
        raise _at(path, number, f'{type(row).__name__} where an object is needed, such as {{"text": ...}}')
    return row


def _csv_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    tab = _suffix(path) == ".tsv"
    reader = csv.reader((line for _, line in _lines(path)), delimiter="\t" if tab else ",", strict=True)
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            if not header:
                header = fields
                if len(set(header)) < len(header):
                    raise _at(path, start, f"a column name occurs twice in {header}; each needs its own")
            elif fields:
                if len(fields) != len(header):
                    raise _at(path, start, f"{len(fields)} fields; the header has {len(header)} ({', '.join(header)})")
                yield start, dict(zip(header, fields, strict=True))
            start = reader.line_num + 1  # a quoted field may hold line breaks: a row is known by its first line
    except csv.Error as error:
        kind = "TSV" if tab else "CSV"
        raise _at(path, start, f"not {kind} ({error}); quotes in a field are doubled and the field is quoted") from None


def _parquet_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet as parquet  # slow to import, and few files are Parquet

    number = 0
    try:
        with _open(path) as raw:
            for batch in parquet.ParquetFile(raw).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except _BROKEN as error:
        _broken(path, error)


# --- typed rows ------------------------------------------------------------------------------------------------------


def read_texts(path: Path, column: str = "text") -> list[Text]:
    """Plain texts; empty ones are skipped and counted in the log."""

    def parse(row: _Row) -> Text | None:
        text = row.text(column)
        return Text(text) if text.strip() else None

    return _collect(path, f"a text row needs {column}", "the text is empty", parse)


def read_labelled(path: Path, text_column: str | None = None, label_column: str | None = None) -> list[Labelled]:
    """Texts with label 0 or 1; rows with no label or no text are skipped and counted in the log."""
    texts = (text_column,) if text_column else _TEXT_COLUMNS
    labels = (label_column,) if label_column else _LABEL_COLUMNS

    def parse(row: _Row) -> Labelled | None:
        text_key, label_key = row.first(*texts), row.first(*labels)
        raw, value = row.fields[text_key], row.fields[label_key]
        if raw is None or value is None or not str(value).strip():
            return None
        text = row.text(text_key).removeprefix("\ufeff").strip()  # Chinese review sets hold stray byte order marks
        label = _LABELS.get(
            str(value).strip().lower().removesuffix(".0")
        )  # 1.0: integers beside nulls, by way of pandas
        if label is None:
            raise row.error(f"'{label_key}' is {value!r}; allowed are 0, 1, neg, pos, negative, positive")
        return Labelled(text, label) if text else None

    needs = f"a labelled row needs {'|'.join(texts)} and {'|'.join(labels)}"
    return _collect(path, needs, "no label or no text", parse)


def read_demonstrations(path: Path) -> list[Demonstration]:
    """Prompts with a good answer; rows with an empty answer are skipped and counted in the log."""

    def parse(row: _Row) -> Demonstration | None:
        if "instruction" in row.fields:
            prompt, answer = _instruction(row), row.text("output")
        elif "question" in row.fields:
            prompt, answer = row.text("question"), row.text("answer")
        else:
            prompt, answer = row.text("prompt"), row.text("completion")
        return Demonstration(prompt, answer) if answer.strip() else None

    needs = "a demonstration row needs prompt, completion (or instruction, output; or question, answer)"
    return _collect(path, needs, "the answer is empty", parse)


def read_preferences(path: Path) -> list[Preference]:
    """Pairs of answers, the better one known; rows with two equal answers are skipped and counted in the log."""

    def parse(row: _Row) -> Preference | None:
        chosen = row.text("selected" if "selected" in row.fields and "chosen" not in row.fields else "chosen")
        rejected = row.text("rejected")
        if chosen == rejected:
            return None
        if "prompt" in row.fields:
            return Preference(row.text("prompt"), chosen, rejected)
        if "instruction" in row.fields:
            return Preference(_instruction(row), chosen, rejected)
        if "conversations" in row.fields:
            return Preference("\n\n".join(row.texts("conversations", "value")), chosen, rejected)
        same = next((i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
        shared = chosen[:same] if len(chosen) <= len(rejected) else rejected[:same]
        cut = shared.rfind(_ASSISTANT) + len(_ASSISTANT)
        if not shared.startswith("\n\nHuman:") or cut < len(_ASSISTANT):
            raise row.error("'prompt' is missing, and chosen and rejected are not dialogs that begin alike")
        return Preference(chosen[:cut], chosen[cut:], rejected[cut:])

    return _collect(path, "a preference row needs prompt, chosen, rejected", "chosen and rejected are equal", parse)


def read_rankings(path: Path) -> list[Ranking]:
    """Two or more answers to a prompt, best first; lists without a prompt get an empty one."""

    def parse(row: _Row) -> Ranking:
        if "ranked" in row.fields:
            return Ranking("", row.texts("ranked", at_least=2))
        return Ranking(row.text("prompt"), row.texts("responses", at_least=2))

    return _collect(path, "a ranking row needs prompt and responses, best first (or ranked)", "", parse)


def read_dialogues(path: Path) -> list[Dialogue]:
    """Utterances of two people in turn."""
    needs = 'a dialogue row needs conversation: [{"utterance": ...}, ...]'
    return _collect(path, needs, "", lambda row: Dialogue(row.texts("conversation", "utterance", at_least=2)))


@dataclass(frozen=True, slots=True)
class _Row:
    """One row, where it stands and what its kind needs."""

    path: Path
    number: int
    fields: dict[str, Any]
    needs: str

    def error(self, problem: str) -> UserError:
        return _at(self.path, self.number, f"{problem}; {self.needs}")

    def first(self, *keys: str) -> str:
        for key in keys:
            if key in self.fields:
                return key
        raise self.error(f"'{'|'.join(keys)}' is missing among {', '.join(self.fields) or 'no columns'}")

    def text(self, key: str) -> str:
        if key not in self.fields:
            raise self.error(f"'{key}' is missing")
        value = self.fields[key]
        if not isinstance(value, str):
            raise self.error(f"'{key}' is {type(value).__name__}, not text")
        return value

    def texts(self, key: str, inner: str | None = None, at_least: int = 1) -> tuple[str, ...]:
        """A list of texts, or of objects that hold a text under the name inner."""
        if key not in self.fields:
            raise self.error(f"'{key}' is missing")
        items = self.fields[key]
        if isinstance(items, list) and inner:
            items = [item.get(inner) if isinstance(item, dict) else None for item in items]
        if not isinstance(items, list) or len(items) < at_least or not all(isinstance(item, str) for item in items):
            each = f"objects with a text '{inner}'" if inner else "texts"
            raise self.error(f"'{key}' is not a list of {at_least} or more {each}")
        return tuple(items)


def _instruction(row: _Row) -> str:
    """Alpaca's instruction, and its input below it where there is one."""
    detail = row.text("input") if row.fields.get("input") is not None else ""
    return f"{row.text('instruction')}\n\n{detail}" if detail.strip() else row.text("instruction")


def _collect(path: Path, needs: str, why_skipped: str, parse: Callable[[_Row], T | None]) -> list[T]:
    parsed = [parse(_Row(path, number, fields, needs)) for number, fields in read_rows(path)]
    rows = [row for row in parsed if row is not None]
    if not rows:
        raise UserError(f"{path}: all {len(parsed)} rows were skipped ({why_skipped}); {needs}.")
    if len(rows) < len(parsed):
        _LOG.warning("%s: %d of %d rows skipped (%s)", path, len(parsed) - len(rows), len(parsed), why_skipped)
    return rows


# --- faults and files ------------------------------------------------------------------------------------------------


def _at(path: Path, number: int, problem: str) -> UserError:
    return UserError(f"{path}, {'row' if _suffix(path) == '.parquet' else 'line'} {number}: {problem}.")


def _broken(path: Path, error: Exception) -> NoReturn:
    raise UserError(
        f"{path} cannot be read to its end ({error}): cut short, damaged or misnamed; fetch it again."
    ) from error


def _no_file(path: Path, kind: str) -> UserError:
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names)
    return UserError(f"no {kind} at {path}" + (f"; near it: {', '.join(near)}." if near else "."))


def _first(items: list[str], count: int = 5) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def _suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _open(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.name.lower().endswith((".gz", ".tgz")) else path.open("rb")
