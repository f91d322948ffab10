"""Read files into rows of plain values: JSON, JSON lines, CSV, TSV, Parquet and text, each also gzipped."""

import codecs
import contextlib
import csv
import difflib
import gzip
import io
import json
import logging
import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from rlhf_pipeline.errors import UserError

_LOG = logging.getLogger("rlhf_pipeline")
_JSON = "allowed are one object a line, or one list of them"
_SURROGATE = re.compile("[\ud800-\udfff]")
# Most bytes are valid GB18030, so a text that looks more like another of these encodings is refused.
_ENCODINGS = ["gb18030", "big5", "euc_kr", "shift_jis", "cp1251", "latin_1"]

# Exceptions that the readers raise for a damaged file.
BROKEN = (EOFError, zlib.error, OSError, ValueError, TypeError, LookupError, ArithmeticError, RuntimeError)
LARGEST_FILE = 1 << 30  # bytes, unpacked; a few kilobytes may unpack to more than the memory
LARGEST_ROW = 1 << 23  # characters, as in several novels; a tokenizer needs 300 bytes for each
_LARGEST_JSON = 1 << 26  # values; one takes 2 bytes in the file and 70 in memory

Fields = dict[str, Any]


class RowError(Exception):
    """One row cannot be used. `args`: the reason, and from `read_rows` the row's content. The reader adds the place."""


class SkippedRowError(RowError):
    """A valid row with nothing to read."""


_Rows = Iterator[tuple[str, Any]]  # "line 3" or "row 3", and the row; a RowError for a broken row


def read_rows(path: Path, blocks: bool = False) -> Iterator[tuple[str, Fields | RowError]]:
    """Yield each row's place, and its fields, or a RowError if the row cannot be read.

    A row of a .txt is {"text": line}. With `blocks` it is {"conversation": lines}, up to a blank line.
    """
    readers: dict[str, Callable[[Path], _Rows]] = {
        ".jsonl": _json_rows, ".json": _json_rows, ".csv": _csv_rows, ".tsv": _csv_rows, ".parquet": _parquet_rows,
        ".txt": _txt_blocks if blocks else _txt_rows,
    }  # fmt: skip
    if not path.is_file():
        raise missing(path, "file")
    if suffix(path) not in readers:
        raise UserError(
            f"{path}: unknown suffix; allowed are {', '.join(readers)}, each also with .gz. Save a spreadsheet as CSV "
            "UTF-8; unpack an archive and give one of its files."
        )
    empty, room = True, room_for(path)
    try:
        for where, row in readers[suffix(path)](path):
            empty = False
            if isinstance(row, dict):
                size, why = checked(row)
                if (room := room - size) < 0:  # Parquet stores a repeated text once
                    raise too_large(path, f"{room_for(path):,} characters")
                row = RowError(why, row) if why else row
            elif not isinstance(row, RowError):
                row = RowError(f'{kind_of(row)} where an object is needed, such as {{"text": ...}}', {"value": row})
            yield where, row
    except BROKEN as error:
        raise broken(path, error) from error
    if empty:
        raise UserError(f"{path} holds no rows; it needs one or more.")


def kind_of(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "nothing" if value is None else kinds.get(type(value), "neither text nor a number")


class _RepeatedKey(Fields):
    """A JSON object in which a key occurs twice."""


def _object(pairs: list[tuple[str, Any]]) -> Fields:
    found = dict(pairs)
    return found if len(found) == len(pairs) else _RepeatedKey(found)


from_json = json.JSONDecoder(object_pairs_hook=_object).decode  # `checked` finds repeated keys


def checked(value: Any) -> tuple[int, str | None]:
    """Return a value's number of characters, and why it cannot be used. Checks nested values too."""
    size, why, left = 0, None, [value]
    while left:
        part = left.pop()
        if isinstance(part, _RepeatedKey):
            why = f"a key occurs twice in an object of {', '.join(part)[:200]}"
        if isinstance(part, str):
            size += len(part)
            if not part.isascii() and _SURROGATE.search(part):
                why = "half a character (a lone surrogate) in a text"
        if isinstance(part, dict):
            left += [*part, *part.values()]
        elif isinstance(part, list | tuple):
            left += part
    return size, _too_long(size) if size > LARGEST_ROW else why


def _too_long(size: int) -> str:
    return f"it has {size:,} characters; a row takes {LARGEST_ROW:,} at most"


def missing(path: Path, kind: str) -> UserError:
    if path.exists() and not path.is_dir():
        return UserError(f"{path} is a pipe, a socket or a device; give a {kind}.")
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    near = [] if path.exists() else difflib.get_close_matches(path.name, names)
    return UserError(f"no {kind} at {path}" + (f"; near it: {', '.join(near)}." if near else "."))


def broken(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read to its end ({_reason(error)}). It is cut short, damaged or misnamed; download it again."
    )


def too_large(path: Path, at_most: str) -> UserError:
    return UserError(f"{path} holds more than {at_most}; divide it, or take fewer rows.")


def suffix(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def room_for(path: Path) -> int:
    """Return how many bytes or characters a file may unpack to. Text packs to 1/3 or 1/10, a zip bomb to 1/1000."""
    return max(LARGEST_FILE, 100 * path.stat().st_size)


def content(path: Path, at_most: int | None = None) -> bytes:
    """Return all bytes of a file, unpacked. Raises UserError if there are more than `at_most`."""
    if not path.is_file():  # opening a pipe would block forever
        raise missing(path, "file")
    found, at_most = bytearray(), at_most or room_for(path)
    with gzip.open(path) if path.name.lower().endswith((".gz", ".tgz")) else path.open("rb") as file:
        while part := file.read(1 << 20):
            found += part
            if len(found) > at_most:
                raise too_large(path, f"{at_most >> 20} MiB")
    return bytes(found)


def _text(path: Path) -> str:
    """Read a text in UTF-8, UTF-16 with a byte order mark (Excel's Unicode text), or GB18030 (GBK, common in China)."""
    data = content(path)
    encoding = "utf-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8-sig"
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        import charset_normalizer  # a dependency of requests

        guess = charset_normalizer.from_bytes(data, cp_isolation=_ENCODINGS, threshold=0.6).best()
        if not _has_little_chinese(data) and (guess is None or guess.encoding != "gb18030"):
            line = data.count(b"\n", 0, error.start) + 1
            raise UserError(
                f"{path}, line {line}: not UTF-8 ({error.reason}); save the file as UTF-8 (in a spreadsheet: CSV "
                "UTF-8; else: iconv -f gbk -t utf-8, where gbk is its encoding now)."
            ) from None
        encoding, text = "gb18030", data.decode("gb18030")
    if encoding != "utf-8-sig":
        _LOG.warning("%s is not UTF-8; read as %s", path, encoding)
    return text


def _has_little_chinese(data: bytes) -> bool:
    """Return whether at most a tenth of the bytes are not ASCII, too few to guess by statistics, and they are GB2312.

    GB2312 has pairs of such bytes, so the single accented letters of Latin-1 are not taken for Chinese.
    """
    if 10 * len(data.translate(None, bytes(range(128)))) > len(data):
        return False
    with contextlib.suppress(UnicodeDecodeError):
        data.decode("gb2312")
        return True
    return False


def _txt_rows(path: Path) -> _Rows:
    return ((f"line {number}", {"text": line.rstrip("\r")}) for number, line in _lines(_text(path)))


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the non-blank lines with their numbers. Only "\n" ends a line, so U+2028 stays inside a text."""
    for number, line in enumerate(io.StringIO(text, newline="\n"), start=1):
        if not line.isspace():
            yield number, line.removesuffix("\n")


def _txt_blocks(path: Path) -> _Rows:
    blocks = (
        block.replace("\r", "").split("\n") for block in re.split(r"\n(?:[ \t\r]*\n)+", _text(path).strip()) if block
    )
    return ((f"dialogue {number}", {"conversation": lines}) for number, lines in enumerate(blocks, start=1))


def _json_rows(path: Path) -> _Rows:
    """Read one object per line, or one list. The first character decides, because each suffix is used for both."""
    text = _text(path)
    if sum(map(text.count, "[{,")) > _LARGEST_JSON:
        raise too_large(path, f"{_LARGEST_JSON:,} values")
    if text.lstrip().startswith("["):
        try:
            rows = from_json(text)
        except (ValueError, RecursionError) as error:
            line = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(f"{path}{line}: not JSON ({_reason(error)}); {_JSON}.") from None
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in _lines(text):
        try:
            row = from_json(line)
        except (ValueError, RecursionError) as error:
            row = RowError(f"not JSON ({_reason(error)}); {_JSON}", {"text": line})
        yield f"line {number}", row


def _reason(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else str(error).partition(";")[0]


def _csv_rows(path: Path) -> _Rows:
    text = _text(path)
    # A spreadsheet separates cells by ; if the decimal mark is a comma, and by tabs if it saves as text.
    first = text.partition("\n")[0]
    delimiter = "\t" if suffix(path) == ".tsv" else next((mark for mark in ",;\t" if mark in first), ",")
    csv.field_size_limit(LARGEST_ROW)  # an answer may be longer than the default of 131,072 characters
    reader = csv.reader(_csv_lines(path, text), delimiter=delimiter, strict=True)
    start = 1
    try:
        header = next(filter(None, reader), [])
        named = [name for name in header if name.strip()]  # sheets may have columns without a name
        if len(set(named)) < len(named):
            raise UserError(f"{path}, line 1: a column name occurs twice in {header}; each needs its own.")
        start = reader.line_num + 1
        for cells in reader:
            if len(cells) == len(header):
                yield f"line {start}", dict(zip(header, cells, strict=True))
            elif cells:
                why = f"{len(cells)} fields; the header has {len(header)} ({', '.join(header)[:200]})"
                yield f"line {start}", RowError(why, {"fields": cells})
            start = reader.line_num + 1  # a quoted cell may hold line breaks; the place is the first line
    except csv.Error as error:
        raise UserError(
            f"{path}, line {start}: not CSV ({error}); if a field has quotes, double them and quote the field."
        ) from None


def _csv_lines(path: Path, text: str) -> Iterator[str]:
    for number, line in enumerate(io.StringIO(text, newline=""), start=1):
        if len(line) > LARGEST_ROW:
            raise UserError(f"{path}, line {number}: {_too_long(len(line))}.")
        yield line


def _parquet_rows(path: Path) -> _Rows:
    import pyarrow.parquet as parquet  # slow to import, and few files are Parquet

    with io.BytesIO(content(path)) if path.name.lower().endswith(".gz") else path.open("rb") as raw:
        file = parquet.ParquetFile(raw)
        names = file.schema_arrow.names
        if len(set(names)) < len(names):
            raise UserError(f"{path}: a column name occurs twice in {names}; each needs its own.")
        rows = (  # one by one, because a batch may unpack to much more than its bytes in the file
            {name: column[place].as_py() for name, column in zip(names, batch.columns, strict=True)}
            for batch in file.iter_batches(batch_size=256)
            for place in range(batch.num_rows)
        )
        yield from ((f"row {number}", row) for number, row in enumerate(rows, start=1))
