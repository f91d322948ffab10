"""Files to rows of plain values, and how a fault is said: the file, the line, what is allowed."""

import codecs
import csv
import difflib
import gzip
import io
import itertools
import json
import logging
import sys
import tarfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from rlhf_pipeline.errors import UserError

_LOG = logging.getLogger("rlhf_pipeline")
_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".txt")
_INSTEAD = {  # what to do with what is often given, yet not read
    ".xlsx": "in the spreadsheet, save it as CSV UTF-8",
    ".xls": "in the spreadsheet, save it as CSV UTF-8",
    ".zip": "unpack it and give one of its files",
}
_COMMON = frozenset(
    "，。！？的一是不了在人有我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能"
    "好都然没于起还"
)
_PACKED = ((b"PK\x03\x04", ".zip or .xlsx"), (b"\x1f\x8b", ".gz"))
BROKEN = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError)  # what a damaged file makes the readers raise


class RowError(UserError):
    """What is wrong with one row of a file, the others being as good as before."""

    def __init__(self, path: Path, number: int, why: str, row: Any = None) -> None:
        super().__init__(f"{path}, {'row' if suffix(path) == '.parquet' else 'line'} {number}: {why}.")
        self.number, self.why, self.row = number, why, row


def read_rows(path: Path, faults: list[RowError] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row as a dict) of a JSON, JSON lines, CSV, TSV, Parquet or text file, gzipped or not.

    A row that cannot be read is an error, or goes to `faults` where these are collected.
    """
    readers = (_json_rows, _json_rows, _csv_rows, _csv_rows, _parquet_rows, _txt_rows)
    reader = dict(zip(_SUFFIXES, readers, strict=True)).get(suffix(path))
    if path.is_dir():
        raise UserError(f"{path} is a folder; give one file ({', '.join(_SUFFIXES)}, each also with .gz).")
    if not path.exists():
        raise no_file(path, "file")
    if reader is None:
        instead = f"; {_INSTEAD[suffix(path)]}" if suffix(path) in _INSTEAD else ""
        raise UserError(f"{path}: unknown suffix; allowed are {', '.join(_SUFFIXES)}, each also with .gz{instead}.")
    return _not_empty(path, reader(path, faults), faults)


def _not_empty(
    path: Path, rows: Iterator[tuple[int, dict[str, Any]]], faults: list[RowError] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    number = 0
    for number, row in rows:
        yield number, row
    if not number and not faults:
        raise UserError(f"{path} holds no rows; it needs one or more.")


def kind_of(value: Any) -> str:
    """What a value is, in the words of a data file."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else kinds.get(type(value), "neither text nor a number")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, cut at "\\n" alone: U+2028 and the like stay inside a text."""
    try:
        encoding = _other_encoding(path)
        with open_file(path) as raw:
            if encoding:
                _LOG.warning("%s is not UTF-8; read as %s", path, encoding)
                with io.TextIOWrapper(raw, encoding, newline="\n") as text:  # type: ignore[type-var]
                    yield from enumerate(text, start=1)
                return
            for number, line in enumerate(raw, start=1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    raise RowError(path, number, _not_utf8(path, line, number, error)) from None
    except BROKEN as error:
        broken(path, error)


def _not_utf8(path: Path, line: bytes, number: int, error: UnicodeDecodeError) -> str:
    packed = next((kind for start, kind in _PACKED if number == 1 and line.startswith(start)), None)
    if packed:
        return f"not text: by its first bytes it is a {packed} file under another name"
    sheet = suffix(path) in (".csv", ".tsv")
    how = "in a spreadsheet: CSV UTF-8" if sheet else "as in iconv -f gbk -t utf-8, where gbk is its encoding now"
    return f"not UTF-8 ({error.reason}); save the file as UTF-8 ({how})"


def _other_encoding(path: Path) -> str | None:
    """The encoding of a text that is not UTF-8: UTF-16 (Excel's Unicode text), or GB18030 (common in China)."""
    with open_file(path) as raw:
        start = raw.read(2)
    if start in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        return "utf-16" if _is_in(path, "utf-16") else None
    if _is_in(path, "utf-8") or not _is_in(path, "gb18030"):
        return None
    wide = Counter(letter for part in _decoded(path, "gb18030") for letter in part if letter > "\x7f")
    # Korean and Russian may pass for it too, but then it reads as a hotchpotch; a Chinese text is four tenths of these.
    return "gb18030" if sum(wide[letter] for letter in _COMMON) >= 0.08 * wide.total() else None


def _decoded(path: Path, encoding: str) -> Iterator[str]:
    with open_file(path) as raw:
        yield from codecs.iterdecode(iter(lambda: raw.read(1 << 20), b""), encoding)


def _is_in(path: Path, encoding: str) -> bool:
    try:
        for _ in _decoded(path, encoding):
            pass
    except UnicodeDecodeError:
        return False
    return True


def _txt_rows(path: Path, faults: list[RowError] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(path):
        if line.strip():
            yield number, {"text": line.rstrip("\r\n")}


def _json_rows(path: Path, faults: list[RowError] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """Objects one a line, or a list of them: the first character tells, since suffixes are used for either."""
    lines = _lines(path)
    first = True
    for number, line in lines:
        if not line.strip():
            continue
        if first and line.lstrip().startswith("["):
            yield from _json_list(path, number, line + "".join(rest for _, rest in lines), faults)
            return
        first = False
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = f"not JSON ({error}); allowed are one object a line, or one list of them"
            _report(RowError(path, number, why, {"text": line.rstrip("\r\n")}), faults)
            continue
        yield from _object(path, number, row, faults)


def _json_list(
    path: Path, number: int, text: str, faults: list[RowError] | None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """The list's objects, each known by the line where it begins; number is the line where the text begins."""
    try:
        rows = json.loads(text)
    except (ValueError, RecursionError) as error:
        line = number + getattr(error, "lineno", 1) - 1
        raise RowError(path, line, f"not JSON ({error}); allowed are one object a line, or one list of them") from None
    decoder, end = json.JSONDecoder(), text.index("[") + 1
    number += text.count("\n", 0, end)
    for row in rows:  # decoded once more for its place alone: json.loads does not tell it
        start = end
        while text[start] in ", \t\r\n":
            start += 1
        number += text.count("\n", end, start)
        yield from _object(path, number, row, faults)
        _, end = decoder.raw_decode(text, start)
        number += text.count("\n", start, end)


def _object(path: Path, number: int, row: Any, faults: list[RowError] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    if isinstance(row, dict):
        yield number, row
    else:
        why = f'{kind_of(row)} where an object is needed, such as {{"text": ...}}'
        _report(RowError(path, number, why, {"value": row}), faults)


def _report(fault: RowError, faults: list[RowError] | None) -> None:
    if faults is None:
        raise fault from None
    faults.append(fault)


def _csv_rows(path: Path, faults: list[RowError] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    tab = suffix(path) == ".tsv"
    lines = (line for _, line in _lines(path))
    first = next(lines, "")
    # A spreadsheet writes ; where the comma stands in decimal numbers, and tabs as what it calls text.
    delimiter = "\t" if tab else next((mark for mark in ",;\t" if mark in first), ",")
    csv.field_size_limit(sys.maxsize)  # answers may be longer than the 131,072 characters it allows otherwise
    reader = csv.reader(itertools.chain([first], lines), delimiter=delimiter, strict=True)
    header: list[str] = []
    start = 1
    try:
        for fields in reader:
            if not header:
                header = fields
                named = [name for name in header if name.strip()]  # columns without a name are left over in sheets
                if len(set(named)) < len(named):
                    raise RowError(path, start, f"a column name occurs twice in {header}; each needs its own")
            elif fields:
                if len(fields) != len(header):
                    why = f"{len(fields)} fields; the header has {len(header)} ({', '.join(header)})"
                    _report(RowError(path, start, why, {"fields": fields}), faults)
                else:
                    yield start, dict(zip(header, fields, strict=True))
            start = reader.line_num + 1  # a quoted field may hold line breaks: a row is known by its first line
    except csv.Error as error:
        kind = "TSV" if tab else "CSV"
        raise RowError(
            path, start, f"not {kind} ({error}); quotes in a field are doubled and the field is quoted"
        ) from None


def _parquet_rows(path: Path, faults: list[RowError] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet as parquet  # slow to import, and few files are Parquet

    number = 0
    try:
        with open_file(path) as raw:
            for batch in parquet.ParquetFile(raw).iter_batches():
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
    except BROKEN as error:
        broken(path, error)


def broken(path: Path, error: Exception) -> NoReturn:
    raise UserError(
        f"{path} cannot be read to its end ({error}): cut short, damaged or misnamed; fetch it again."
    ) from error


def no_file(path: Path, kind: str) -> UserError:
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = difflib.get_close_matches(path.name, names)
    return UserError(f"no {kind} at {path}" + (f"; near it: {', '.join(near)}." if near else "."))


def first_few(items: list[str], count: int = 5) -> str:
    more = f" and {len(items) - count} more" if len(items) > count else ""
    return ", ".join(items[:count]) + more


def suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def open_file(path: Path) -> io.BufferedIOBase:
    return gzip.open(path) if path.name.lower().endswith((".gz", ".tgz")) else path.open("rb")
