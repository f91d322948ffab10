"""The Large Movie Review Dataset in its original layout, as a folder or an archive."""

import re
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from rlhf_pipeline.data.formats.files import BROKEN, broken, first_few, no_file, open_file
from rlhf_pipeline.data.records import Labelled
from rlhf_pipeline.errors import UserError

_ARCHIVES = (".tar.gz", ".tgz", ".tar")
_LAYOUT = "aclImdb/{train,test}/{pos,neg}/<id>_<rating>.txt"
_REVIEW = re.compile(r"(?:aclImdb/)?((train|test)/(pos|neg)/(.+))", re.DOTALL)
_REVIEW_NAME = re.compile(r"([0-9]+)_(10|[1-9])\.txt")
_RATINGS = {"neg": range(1, 5), "pos": range(7, 11)}
_BREAK = re.compile(r"<br\s*/?>", re.IGNORECASE)


def read_acl_imdb(path: Path) -> dict[str, list[Labelled]]:
    """The reviews of "train" and "test" in the original aclImdb layout, a folder or a tar archive of it."""
    if path.is_dir():
        files = _folder_files(path)
    elif not path.exists():
        raise no_file(path, "file or folder")
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
            f"{path}: {len(faults)} files do not fit: {first_few(sorted(faults))}; "
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
        with open_file(path) as raw, tarfile.open(fileobj=raw, mode="r:") as archive:
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
    except BROKEN as error:
        broken(path, error)
