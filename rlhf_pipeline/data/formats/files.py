"""Files to rows of plain values. Every error names the file, the line and what is allowed."""

import codecs
import csv
import difflib
import gzip
import io
import itertools
import json
import logging
import re
import sys
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from rlhf_pipeline.errors import UserError

_LOG = logging.getLogger("rlhf_pipeline")
_SHEET = "in the spreadsheet, save it as CSV UTF-8"
_INSTEAD = {".xlsx": _SHEET, ".xls": _SHEET, ".zip": "unpack it and give one of its files"}
_COMMON = frozenset(
    "，。！？的一是不了在人有我他这中大来上个国到说们为子和你地出道也时年得就那要下以生会自着去之过家学对可她里后小么心多天而能"
    "好都然没于起还"
)
_PACKED = ((b"PK\x03\x04", ".zip or .xlsx"), (b"\x1f\x8b", ".gz"))
_JSON = "allowed are one object a line, or one list of them"
BROKEN = (tarfile.TarError, EOFError, zlib.error, OSError, ValueError)  # what a damaged file makes the readers raise


class RowError(UserError):
    """What is wrong with one row of a file. The other rows can still be used."""

    def __init__(self, path: Path, number: int, why: str, row: Any = None) -> None:
        super().__init__(f"{path}, {'row' if suffix(path) == '.parquet' else 'line'} {number}: {why}.")
        self.number, self.why, self.row = number, why, row


_Rows = Iterator[tuple[int, Any]]  # the number of a line and what it holds: a dict, or the RowError that stands for it


def read_rows(path: Path, faults: list[RowError] | None = None) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number from 1, row as a dict) of a JSON, JSON lines, CSV, TSV, Parquet or text file, gzipped or not.

    A row that cannot be read raises its RowError; with `faults`, it is appended there and reading goes on.
    """
    readers = {
        ".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows,
        ".txt": _txt_rows,
    }  # fmt: skip
    allowed = f"{', '.join(readers)}, each also with .gz"
    if path.is_dir():
        raise UserError(f"{path} is a folder; give one file ({allowed}).")
    if not path.exists():
        raise no_file(path, "file")
    if suffix(path) not in readers:
        instead = f"; {_INSTEAD[suffix(path)]}" if suffix(path) in _INSTEAD else ""
        raise UserError(f"{path}: unknown suffix; allowed are {allowed}{instead}.")
    return _objects(path, readers[suffix(path)](path), faults)


def _objects(path: Path, rows: _Rows, faults: list[RowError] | None) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows that are objects; at least one row of whatever kind."""
    empty = True
    try:
        for number, row in rows:
            empty = False
            if isinstance(row, dict):
                yield number, row
                continue
            why = f'{kind_of(row)} where an object is needed, such as {{"text": ...}}'
            fault = row if isinstance(row, RowError) else RowError(path, number, why, {"value": row})
            if faults is None:
                raise fault
            faults.append(fault)
    except BROKEN as error:
        broken(path, error)
    if empty:
        raise UserError(f"{path} holds no rows; it needs one or more.")


def kind_of(value: Any) -> str:
    """What a value is, in the words of a data file."""
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else kinds.get(type(value), "neither text nor a number")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines with their ends, cut at "\\n" alone: U+2028 and the like stay inside a text."""
    encoding = _encoding(path)
    if encoding != "utf-8-sig":
        _LOG.warning("%s is not UTF-8; read as %s", path, encoding)
    with open_file(path) as raw, io.TextIOWrapper(raw, encoding, newline="\n") as text:  # type: ignore[type-var]
        yield from enumerate(text, start=1)


def _encoding(path: Path) -> str:
    """UTF-8; UTF-16 with its mark (Excel's Unicode text); or GB18030 (GBK), common in China. Others are refused."""
    with open_file(path) as raw:
        for number, line in enumerate(raw, start=1):
            if number == 1 and line.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
                return "utf-16"
            try:
                line.decode()
            except UnicodeDecodeError as error:
                if _is_chinese(b"".join([line, *itertools.islice(raw, 1000)])):
                    return "gb18030"
                packed = next((kind for start, kind in _PACKED if number == 1 and line.startswith(start)), None)
                sheet = suffix(path) in (".csv", ".tsv")
                how = (
                    "in a spreadsheet: CSV UTF-8"
                    if sheet
                    else "as in iconv -f gbk -t utf-8, where gbk is its encoding now"
                )
                why = f"not UTF-8 ({error.reason}); save the file as UTF-8 ({how})"
                if packed:
                    why = f"not text: by its first bytes it is a {packed} file under another name"
                raise RowError(path, number, why) from None
    return "utf-8-sig"


def _is_chinese(sample: bytes) -> bool:
    """Whether bytes are Chinese in GB18030: measured, charset-normalizer refuses 3 % of such texts of ten lines."""
    try:
        wide = [letter for letter in sample.decode("gb18030") if letter > "\x7f"]
    except UnicodeDecodeError:
        return False
    # Korean and Russian may pass for it too, but then read as a hotchpotch; a Chinese text is four tenths of these.
    return sum(letter in _COMMON for letter in wide) >= 0.08 * len(wide)


def _txt_rows(path: Path) -> _Rows:
    return ((number, {"text": line.rstrip("\r\n")}) for number, line in _lines(path) if line.strip())


def _json_rows(path: Path) -> _Rows:
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
            yield number, json.loads(line)
        except (ValueError, RecursionError) as error:
            yield number, RowError(path, number, f"not JSON ({error}); {_JSON}", {"text": line.rstrip("\r\n")})


def _json_list(path: Path, number: int, text: str) -> _Rows:
    """The values of a list, each with the line where it begins; `number` is the line where `text` begins."""
    decode, opening, comma = json.JSONDecoder().raw_decode, re.compile(r"\s*\[\s*"), re.compile(r"\s*(?:,\s*|(?=\]))")
    counted, between = 0, opening.match(text)
    try:
        while between and not text.startswith("]", between.end()):
            start = between.end()
            row, end = decode(text, start)
            number, counted = number + text.count("\n", counted, start), start
            yield number, row
            between = comma.match(text, end)
            if not between:
                raise json.JSONDecodeError("Expecting ',' or ']'", text, len(text) - len(text[end:].lstrip()))
        if between and (more := text[between.end() + 1 :].lstrip()):
            raise json.JSONDecodeError("Extra data", text, len(text) - len(more))
    except (ValueError, RecursionError) as error:
        number += text.count("\n", counted, getattr(error, "pos", counted))
        raise RowError(path, number, f"not JSON ({error}); {_JSON}") from None


def _csv_rows(path: Path) -> _Rows:
    lines = (line for _, line in _lines(path))
    first = next(lines, "")
    # A spreadsheet writes ; where the comma stands in decimal numbers, and tabs as what it calls text.
    delimiter = "\t" if suffix(path) == ".tsv" else next((mark for mark in ",;\t" if mark in first), ",")
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
            elif fields and len(fields) != len(header):
                why = f"{len(fields)} fields; the header has {len(header)} ({', '.join(header)})"
                yield start, RowError(path, start, why, {"fields": fields})
            elif fields:
                yield start, dict(zip(header, fields, strict=True))
            start = reader.line_num + 1  # a quoted field may hold line breaks: a row is known by its first line
    except csv.Error as error:
        why = f"not {suffix(path)[1:].upper()} ({error}); quotes in a field are doubled and the field is quoted"
        raise RowError(path, start, why) from None


def _parquet_rows(path: Path) -> _Rows:
    import pyarrow.parquet as parquet  # slow to import, and few files are Parquet

    with open_file(path) as raw:
        batches = parquet.ParquetFile(raw).iter_batches()
        yield from enumerate((row for batch in batches for row in batch.to_pylist()), start=1)


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
