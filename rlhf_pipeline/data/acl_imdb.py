"""The Large Movie Review Dataset in its original layout, as a folder or an archive."""

import io
import logging
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from rlhf_pipeline.data.plain_rows import BROKEN, LARGEST_ROW, broken, content, missing
from rlhf_pipeline.data.records import Labelled
from rlhf_pipeline.errors import UserError

_LOG = logging.getLogger("rlhf_pipeline")
_ARCHIVES = (".tar.gz", ".tgz", ".tar")
_LAYOUT = "aclImdb/{train,test}/{pos,neg}/<id>_<rating>.txt"
_REVIEW = re.compile(r"(?:aclImdb/)?((train|test)/((pos|neg)/.+))", re.DOTALL)
_NAME = re.compile(r"(?:neg/([0-9]{1,18})_([1-4])|pos/([0-9]{1,18})_([7-9]|10))\.txt")
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


def read_acl_imdb(path: Path) -> dict[str, list[Labelled]]:
    """Return the reviews of "train" and "test" in the original aclImdb layout, from a folder or a tar archive.

    Links that lead out of the folder, links in an archive and entries that are not files are skipped and counted.
    """
    if not path.is_dir() and not path.is_file():
        raise missing(path, "file or folder")
    if path.is_file() and not path.name.lower().endswith(_ARCHIVES):
        raise UserError(
            f"{path} is not an aclImdb folder or archive ({', '.join(_ARCHIVES)}); the layout must be {_LAYOUT}."
        )
    found: dict[str, dict[tuple[int, ...], str]] = {"train": {}, "test": {}}
    left_out = 0
    for review, data in _folder_files(path) if path.is_dir() else _archive_files(path):
        if data is None:
            left_out += 1
            continue
        short, split, name, side = review.groups()
        known = _NAME.fullmatch(name)
        try:
            text = " ".join(_BREAK.sub(" ", data.decode()).split())
        except UnicodeDecodeError:
            text = ""
        if not known or not text:
            raise UserError(
                f"{path}: {short} is not a review; it must be called <id>_<rating>.txt with rating 1..4 in neg and "
                "7..10 in pos, and hold a text in UTF-8."
            )
        key = (int(side == "pos"), *(int(number) for number in known.groups() if number))
        if key in found[split]:
            raise UserError(f"{path}: {short} occurs twice; each review needs its own id.")
        found[split][key] = text
    if left_out:
        _LOG.warning("%s: %d links and other entries that are not files are skipped", path, left_out)
    for split, texts in found.items():
        for label, side in enumerate(("neg", "pos")):
            if all(key[0] != label for key in texts):
                raise UserError(f"{path}: no reviews in {split}/{side}; the layout must be {_LAYOUT}.")
    return {split: [Labelled(text, key[0]) for key, text in sorted(texts.items())] for split, texts in found.items()}


def _folder_files(path: Path) -> Iterator[tuple[re.Match[str], bytes | None]]:
    root = path / "aclImdb" if (path / "aclImdb").is_dir() else path
    inside = path.resolve()
    for file in root.glob("t*/*/*"):
        review = _REVIEW.fullmatch(file.relative_to(root).as_posix())
        if review and not file.is_dir():
            own = file.is_file() and file.resolve().is_relative_to(inside)
            yield review, content(file, LARGEST_ROW) if own else None


def _archive_files(path: Path) -> Iterator[tuple[re.Match[str], bytes | None]]:
    """Yield reviews from an archive. Nothing is written to disk, so no member can be unpacked outside a folder."""
    try:
        raw = io.BytesIO(content(path))
        with tarfile.open(fileobj=raw, mode="r:") as archive:
            for member in archive:
                if member.size < 0:  # tarfile would seek backwards and loop forever
                    raise tarfile.ReadError(f"{member.name} has a negative size")
                if member.issparse():
                    raise UserError(f"{path}: {member.name} is a sparse file; pack the archive without --sparse.")
                review = _REVIEW.fullmatch(str(PurePosixPath(member.name)))
                if review and not member.isdir():
                    file = archive.extractfile(member) if member.isfile() else None
                    yield review, file.read() if file else None
            # tarfile takes a damaged header as the end. The true end is zeros. Reading it also checks gzip's CRC.
            end = raw.read()
            if not end or end.strip(b"\0"):
                raise tarfile.ReadError("the end-of-archive mark is missing")
    except (*BROKEN, tarfile.TarError) as error:
        raise broken(path, error) from error
