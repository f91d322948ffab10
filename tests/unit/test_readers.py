"""Files to records: every format, the forms that users bring, and faults that name their place; the real files too."""

import gzip
import io
import json
import os
import socket
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import jsonl, sheet

from rlhf_pipeline.data import load_data
from rlhf_pipeline.data.acl_imdb import read_acl_imdb
from rlhf_pipeline.data.agreement import combine_judgements
from rlhf_pipeline.data.judgements import read_judgements
from rlhf_pipeline.data.plain_rows import read_rows
from rlhf_pipeline.data.readers import read_demonstrations, read_dialogues, read_labelled, read_texts
from rlhf_pipeline.data.records import Demonstration, Dialogue, Labelled, Preference, Ranking, Text, Turn
from rlhf_pipeline.errors import UserError

ASKED = {"role": "user", "content": "Is it?"}
CHAT = [ASKED, {"role": "assistant", "content": 'It "is", isn\'t it?'}]
WORSE = [ASKED, {"role": "assistant", "content": "No."}]
TURNS = (Turn("user", "Is it?"), Turn("assistant", 'It "is", isn\'t it?'))


Reader = Callable[..., list[Any]]


def read_preferences(path: Path, columns: dict[str, str] | None = None) -> list[Preference | Ranking]:
    return combine_judgements(read_judgements(path, columns).judgements)[0]


def read_reviews(path: Path) -> list[Labelled]:
    return [review for reviews in read_acl_imdb(path).values() for review in reviews]


# --- aclImdb

REVIEWS = {
    "train/pos/10_9.txt": b"A warm film.<br /><br />I saw it   twice.",
    "train/pos/2_7.txt": b"Better than its poster.",
    "train/neg/3_1.txt": b"Two hours I will not get back.",
    "test/pos/0_10.txt": b"Flawless; the score alone is worth it.",
    "test/neg/1_4.txt": b"Nice costumes, no plot.",
    "train/unsup/5_0.txt": b"Nobody rated this one.",
    "README": b"Large Movie Review Dataset v1.0",
}


def write_folder(root: Path, files: dict[str, bytes]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(text)
    return root


def write_archive(path: Path, files: dict[str, bytes], *others: tarfile.TarInfo, prefix: str = "aclImdb/") -> Path:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, text in reversed(files.items()):
            member = tarfile.TarInfo(prefix + name)
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text))
        for member in others:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def test_acl_imdb_is_the_same_from_folder_and_archive(tmp_path: Path) -> None:
    inner = write_folder(tmp_path / "data" / "aclImdb", REVIEWS)
    read = read_acl_imdb(inner)
    assert read == {
        "train": [
            Labelled("Two hours I will not get back.", 0),
            Labelled("Better than its poster.", 1),  # id 2 before 10: by number, not by name
            Labelled("A warm film. I saw it twice.", 1),
        ],
        "test": [Labelled("Nice costumes, no plot.", 0), Labelled("Flawless; the score alone is worth it.", 1)],
    }
    assert read_acl_imdb(tmp_path / "data") == read
    splits = load_data({"name": "imdb", "path": str(inner)}, seed=0)
    assert [set(splits.train), set(splits.test)] == [set(rows) for rows in read.values()]
    for name, prefix in (("a.tar.gz", "aclImdb/"), ("a.tgz", ""), ("a.tar", "./aclImdb/")):
        assert read_acl_imdb(write_archive(tmp_path / name, REVIEWS, prefix=prefix)) == read


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        *((name, b"x", rf"{name} .*rating 1\.\.4 in neg and 7\.\.10 in pos")
          for name in ("train/pos/4_3.txt", "test/neg/6_5.txt", "test/neg/._1_4.txt", "train/pos/8_11.txt")),
        ("test/pos/9_8.txt", b"caf\xe9", r"test/pos/9_8\.txt .*a text in UTF-8"),
        ("test/pos/9_8.txt", b"<br />", r"test/pos/9_8\.txt .*a text in UTF-8"),
        ("train/pos/002_7.txt", b"Another.", r"train/pos/0*2_7\.txt occurs twice"),
    ],
)  # fmt: skip
def test_acl_imdb_names_a_file_that_does_not_fit(
    tmp_path: Path, archive: bool, name: str, text: bytes, message: str
) -> None:
    files = REVIEWS | {name: text}
    path = write_archive(tmp_path / "a.tar.gz", files) if archive else write_folder(tmp_path / "a", files)
    with pytest.raises(UserError, match=message):
        read_acl_imdb(path)


def test_acl_imdb_follows_no_link_and_takes_no_hostile_member(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = write_folder(tmp_path / "a", REVIEWS)
    read = read_acl_imdb(root)
    hostile = [tarfile.TarInfo(name) for name in ("../1_9.txt", "/train/pos/1_9.txt")]
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE):
        link = tarfile.TarInfo("aclImdb/train/pos/7_7.txt")
        link.type, link.linkname = kind, "../../../etc/passwd"
        hostile.append(link)
    archive = write_archive(tmp_path / "a.tar.gz", REVIEWS, *hostile)
    secret = tmp_path / "secret.txt"
    secret.write_text("A secret.")
    for number, target in enumerate([secret, Path("/dev/zero"), Path("nowhere")], start=70):
        (root / f"train/pos/{number}_9.txt").symlink_to(target)
    os.mkfifo(root / "train/pos/80_9.txt")
    for path in (archive, root):
        assert read_acl_imdb(path) == read
        assert f"{path}: 4 links and other entries that are not files are skipped" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"a", "a.tar.gz", "secret.txt"}
    (root / "train/pos").rename(tmp_path / "elsewhere")
    (root / "train/pos").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match="no reviews in train/pos"):
        read_acl_imdb(root)


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"GNU.sparse.map": "0,0", "GNU.sparse.size": str(10**11)}, r"train/pos/7_7\.txt is a sparse file; pack"),
        ({"size": "-512"}, "has a negative size"),
        ({"size": str(2**80)}, "cannot be read to its end"),
    ],
)
def test_acl_imdb_believes_no_size(tmp_path: Path, headers: dict[str, str], message: str) -> None:
    member = tarfile.TarInfo("aclImdb/train/pos/7_7.txt")
    member.pax_headers = headers
    with pytest.raises(UserError, match=message):
        read_acl_imdb(write_archive(tmp_path / "a.tar.gz", REVIEWS, member))


MANY = REVIEWS | {
    f"{s}/pos/{i}_8.txt": f"Film {i}: {i * 7919} stars.".encode() for s in ("train", "test") for i in range(20, 60)
}


@pytest.mark.parametrize(("name", "place"), [("a.tar", 1024 * 60), ("a.tar.gz", -6)])  # a header; gzip's CRC
def test_acl_imdb_that_is_cut_short_or_damaged(tmp_path: Path, name: str, place: int) -> None:
    path = write_archive(tmp_path / name, MANY)
    whole = path.read_bytes()
    damaged = bytearray(whole)
    damaged[place] ^= 0xFF
    for data in (damaged, *(whole[: int(len(whole) * share)] for share in (0.0, 0.1, 0.5, 0.8))):
        path.write_bytes(data)
        with pytest.raises(UserError, match=f"{name} .*cut short, damaged"):
            read_acl_imdb(path)


def test_acl_imdb_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or folder at"):
        read_acl_imdb(tmp_path / "nowhere")
    without = {name: text for name, text in REVIEWS.items() if not name.startswith("test/neg")}
    for path in (write_folder(tmp_path / "aclImdb", without), write_archive(tmp_path / "a.tgz", without)):
        with pytest.raises(UserError, match=r"no reviews in test/neg; .*aclImdb/\{train,test\}/\{pos,neg\}"):
            read_acl_imdb(path)
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match=r"a\.zip is not an aclImdb"):
        read_acl_imdb(tmp_path / "a.zip")


# --- rows of plain values


ONE = "one\u2028two\u2029three\x85four"
LIST = [{"text": "one"}, {"text": "two", "tags": [1, {"a": "]"}]}, {"text": "three"}]
NUMBERED = [(f"{{}} {n}", row) for n, row in enumerate(LIST, start=1)]
GOOD = [("line 2", {"label": "1", "text": "good, cheap"})]
TALKS = "今天天气怎么样\r\n很好啊\r\n那我们去玩吧\r\n\r\n\r\n你吃饭了吗\r\n还没有呢\r\n"


@pytest.mark.parametrize(
    ("name", "text", "rows"),
    [
        # Line separators of Unicode stay inside a text.
        ("a.txt", f"\ufeff{ONE}\r\n\n  \n last", [("line 1", {"text": ONE}), ("line 4", {"text": " last"})]),
        ("a.jsonl", f'{{"text": "{ONE}"}}\n\n{{"text": "a"}}', [("line 1", {"text": ONE}), ("line 3", {"text": "a"})]),
        ("a.csv", f"text,label\n{ONE},1\n", [("line 2", {"text": ONE, "label": "1"})]),
        # A list or lines, whatever the suffix.
        *((f"a.{suffix}", "\n" + json.dumps(LIST, indent=1), [(at.format("row"), row) for at, row in NUMBERED])
          for suffix in ("json", "jsonl")),
        *((f"a.{suffix}", "\n".join(map(json.dumps, LIST)), [(at.format("line"), row) for at, row in NUMBERED])
          for suffix in ("json", "jsonl")),
        # Sheets as spreadsheets save them.
        ("a.csv", '\ufefflabel,text\r\n1,"很快，\n""好吃"""\r\n\r\n0,慢\r\n',
         [("line 2", {"label": "1", "text": '很快，\n"好吃"'}), ("line 5", {"label": "0", "text": "慢"})]),
        ("a.csv", "label;text\n1;good, cheap\n", GOOD), ("a.csv", "label\ttext\n1\tgood, cheap\n", GOOD),
        ("a.tsv", "label\ttext\n1\tgood, cheap\n", GOOD),
        ("a.csv", "text,label,,\ngood,1,,\n", [("line 2", {"text": "good", "label": "1", "": ""})]),
        ("a.csv", f"text,label\n{'x' * 200_000},1\n", [("line 2", {"text": "x" * 200_000, "label": "1"})]),
    ],
)  # fmt: skip
def test_rows_have_their_places_and_may_be_gzipped(tmp_path: Path, name: str, text: str, rows: list[Any]) -> None:
    (tmp_path / name).write_bytes(text.encode())
    (tmp_path / f"{name}.gz").write_bytes(gzip.compress(text.encode()))
    assert list(read_rows(tmp_path / name)) == list(read_rows(tmp_path / f"{name}.gz")) == rows


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16"])
def test_encodings_used_in_china(tmp_path: Path, encoding: str, caplog: pytest.LogCaptureFixture) -> None:
    said = [["今天天气怎么样", "很好啊", "那我们去玩吧"], ["你吃饭了吗", "还没有呢"]]
    (tmp_path / "train.txt").write_bytes(TALKS.encode(encoding))
    found = read_dialogues(tmp_path / "train.txt")
    assert [[turn.text for turn in row.turns] for row in found] == said, "a blank line ends a dialogue"
    assert [turn.role for turn in found[0].turns] == ["user", "assistant", "user"]
    assert read_texts(tmp_path / "train.txt") == [Text(text) for texts in said for text in texts]
    row = {"prompt": "为什么天是蓝的？", "chosen": "因为光的散射。", "rejected": "我不知道，你说呢？"}
    lines = {"a.csv": ",".join(row) + "\r\n" + ",".join(row.values()), "a.jsonl": json.dumps(row, ensure_ascii=False)}
    for name, text in lines.items():
        (tmp_path / name).write_bytes(text.encode(encoding))
        assert [held for _, held in read_rows(tmp_path / name)] == [row]
        assert (f"{name} is not UTF-8; read as" in caplog.text) == (not encoding.startswith("utf-8"))
    few = [f"A film that nobody needs to see twice, number {number}" for number in range(30)]
    few[7] += "，张伟说"
    (tmp_path / "a.txt").write_bytes("\n".join(few).encode(encoding))
    assert read_texts(tmp_path / "a.txt") == [Text(row) for row in few], "a few Chinese words among English ones"


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("euc-kr", "하늘은 왜 파란가요? 모르겠어요"),
        ("cp1251", "Мы на море"),
        ("latin-1", "na\u00efve"),
        ("latin-1", f"{'as few as those are ' * 9}na\u00efve"),
        ("big5", "為什麼天是藍的？"),
    ],
)
def test_other_encodings_are_refused(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\n" + text.encode(encoding) + b"\n")
    with pytest.raises(UserError, match=r"a\.csv, line 2: not UTF-8 .*save the file as UTF-8"):
        list(read_rows(tmp_path / "a.csv"))


def test_parquet(tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": ["good", "bad", "so-so"], "label": [1.0, 0.0, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    (tmp_path / "b.parquet.gz").write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    for name in ("a.parquet", "b.parquet.gz"):
        assert read_labelled(tmp_path / name) == [Labelled("good", 1), Labelled("bad", 0)]
        with pytest.raises(UserError, match=rf"{name}, row 1: 'prompt' is missing"):
            read_demonstrations(tmp_path / name)
    pq.write_table(pa.table([["a"], ["b"]], names=["text", "text"]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: a column name occurs twice"):
        read_texts(tmp_path / "a.parquet")
    often = pa.DictionaryArray.from_arrays(pa.array([0] * 200, pa.int8()), pa.array(["x" * 8_000_000]))
    pq.write_table(pa.table({"text": often}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet holds more than 1,073,741,824 characters"):
        read_texts(tmp_path / "b.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: a list where an object is needed"),
        ("a.json", b'[{"text": "a"},\n 3]', "row 2: a number where an object is needed"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}\n', "line 3: not JSON"),
        ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]\n', "line 2: not JSON"),
        ("a.json", b"[]", "holds no rows"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.txt", b"\n \n", "holds no rows"),
        ("a.csv", b"text,label\na,1\nb, c,0\n", r"line 3: 3 fields; the header has 2 \(text, label\)"),
        ("a.csv", b'text,label\n"a,1\nb,0\n', "line 2: not CSV"),
        ("a.csv", b"text,text\na,b\n", "line 1: a column name occurs twice"),
        ("a.xlsx", b"PK", r"unknown suffix; allowed are \.jsonl, \.json, \.csv.*Save a spreadsheet as CSV UTF-8"),
        ("a.jsonl.gz", b"plain", "cannot be read to its end"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cut short"),
        ("a.parquet", b"PAR1PAR1PAR1", "damaged or misnamed"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ' + b"[" * 200_000, r"line 2: not JSON \(nested too deeply\)"),
        ("a.json", b'[{"text": "a"},\n{"text": ' + b"[" * 200_000, r"a.json: not JSON \(nested too deeply\)"),
        ("a.json", b'[{"text": "a"},\n]', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "text": "c"}', "line 2: a key occurs twice in an object of text"),
        ("a.json", b'[{"text": "a"}, {"text": "b", "more": [{"x": 1, "x": 2}]}]', "row 2: a key occurs twice"),
        ("a.jsonl", rb'{"text": "\ud83d\ude00"}' + b"\n" + rb'{"text": "b \ud83d"}', "line 2: half a character"),
        ("a.json", rb'[{"text": "a", "more": {"\ude00": 1}}]', "row 1: half a character"),
    ],
)
def test_faults_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_texts(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "begin", "part", "times", "message"),
    [
        ("a.txt", b"a\n", b"b", 9_000_000, "line 2: it has 9,000,004 characters; a row takes 8,388,608 at most"),
        ("a.csv", b"text\n", b"b", 9_000_000, "line 2: it has 9,000,000 characters"),
        ("a.csv", b"text", b",", 9_000_000, "line 1: it has 9,000,004 characters"),
        ("a.json", b"[", b"{},", 40_000_000, "holds more than 67,108,864 values"),
        ("a.txt.gz", b"", gzip.compress(bytes(1 << 26), 1), 17, "holds more than 1024 MiB; divide it"),
    ],
    ids=["line", "cell", "columns", "list", "gzip"],
)
def test_a_file_that_would_fill_the_memory(
    tmp_path: Path, name: str, begin: bytes, part: bytes, times: int, message: str
) -> None:
    (tmp_path / name).write_bytes(begin + part * times)
    with pytest.raises(UserError, match=message):
        read_texts(tmp_path / name)


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with socket.socket(socket.AF_UNIX) as opened:
        opened.bind(str(tmp_path / "socket"))
    for target in (tmp_path / "pipe", tmp_path / "socket", Path("/dev/zero")):
        for read, suffix in ((read_texts, "jsonl"), (read_judgements, "csv.gz"), (read_acl_imdb, "tar")):
            (path := tmp_path / f"{target.name}.{suffix}").symlink_to(target)
            with pytest.raises(UserError, match="is a pipe, a socket or a device; give a file"):
                read(path)
    (tmp_path / "reviews.jsonl").touch()
    for missing, said in (("review.jsonl", "; near it: reviews.jsonl"), ("", "."), ("no/such.csv", ".")):
        with pytest.raises(UserError) as caught:
            read_texts(tmp_path / missing)
        assert str(caught.value).startswith(f"no file at {tmp_path / missing}{said}")


# --- texts and labels


def test_labelled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = [0, 1, "1", "NEG", "Positive", "pos", None, ""]
    rows = [{"sentence": f"\ufeffs{i}", "sentiment": value} for i, value in enumerate(values)]
    path = jsonl(tmp_path / "a.jsonl", *rows, {"sentence": " ", "sentiment": 1})
    assert read_labelled(path) == [Labelled(f"s{i}", label) for i, label in enumerate([0, 1, 1, 0, 1, 1])]
    assert "3 of 9 rows skipped" in caplog.text
    path = jsonl(tmp_path / "b.jsonl", {"body": "fine", "y": 1})
    assert read_labelled(path, {"text": "body", "label": "y"}) == [Labelled("fine", 1)]
    rows = [{"text": f"t{n}", "label": label} for n, label in enumerate(["正面", " 负面 ", 5.0, "5", None])]
    found = [Labelled("t0", 1), Labelled("t1", 0), Labelled("t2", 1), Labelled("t3", 1)]
    assert read_labelled(jsonl(tmp_path / "c.jsonl", *rows), labels={"正面": 1, "负面": 0, 5: 1}) == found


SYSTEM = {"role": "system", "content": "Be kind."}
BODY = {"body": "b", "y": 1}
NO_CHAT = "not a list of messages with role and content or from and value"


@pytest.mark.parametrize(
    ("read", "row", "options", "message"),
    [
        (read_labelled, BODY, {}, r"'text\|review\|sentence\|content' is missing; the columns are body, y"),
        (read_labelled, BODY, {"columns": {"text": "body", "label": "star"}},
         r"data\.columns\.label=star names no column here; there are bo"),
        (read_labelled, {"text": "b", "label": 5}, {}, r"'label' is 5; allowed are 0, 1, neg.*data\.labels=\{good"),
        (read_labelled, {"text": "b", "label": " 负面 "}, {"labels": {"正面": 1}},
         r"'label' is ' 负面 '; allowed are 正面 \(data\.labels\)"),
        # No message names a type of Python.
        *((read_labelled, {"text": value, "label": 1}, {}, f"'text' is {said}, not text") for value, said in (
            ({"a": 1}, "an object"), (["a"], "a list"), (3, "a number"), (0.5, "a number"), (True, "true or false"))),
        *((read_demonstrations, {"messages": messages}, {}, message) for messages, message in (
            ([{"role": "judge", "content": "a?"}], "'messages' has a message from 'judge'; allowed are system, user"),
            ([{"role": "user", "content": 3}], f"'messages' is {NO_CHAT}"),
            ([{"role": None, "content": "a?"}], f"'messages' is {NO_CHAT}"),
            ("a?", "'messages' is not a list of messages"))),
        *((read_dialogues, {"conversation": value}, {}, "'conversation' is not a list of .*; a dialogue row needs")
          for value in ([{"utterance": 3}], [{"words": "a"}], "a")),
    ],
)  # fmt: skip
def test_a_row_that_a_reader_cannot_use_is_named_with_its_fault(
    tmp_path: Path, read: Reader, row: dict[str, Any], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=rf"a\.jsonl, line 1: {message}"):
        read(jsonl(tmp_path / "a.jsonl", row), **options)


# --- demonstrations and dialogues


NEXT = {"instruction": "And now?", "input": "Say it.", "output": "Now too.", "system": "Be brief."}
PAST = [[turn.text for turn in TURNS]]
BRIEF, NOW = Turn("system", "Be brief."), Turn("assistant", "Now too.")
NULLS = {"from": None, "value": None, "tool_calls": None, "reasoning_content": None}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "Say hi.", "completion": "Hi."}, Demonstration("Say hi.", "Hi.")),
        ({"instruction": "Mend the spelling.", "input": "freind", "output": "friend"},
         Demonstration((Turn("user", "Mend the spelling.\n\nfreind"),), "friend")),
        ({"instruction": "Is it?", "input": "", "output": "Blue."}, Demonstration(TURNS[:1], "Blue.")),
        ({"question": "Is it?", "answer": "2"}, Demonstration(TURNS[:1], "2")),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, Demonstration(TURNS[:1], TURNS[1].text)),
        ({"messages": [SYSTEM, *CHAT]}, Dialogue((Turn("system", "Be kind."), *TURNS))),
        ({"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好"}]},
         Dialogue((Turn("user", "你好"), Turn("assistant", "好")))),
        ({"conversation": [{"utterance": "alone"}]}, Dialogue((Turn("user", "alone"),), both=True)),
        # What was said before an instruction, and the system's words.
        ({**NEXT, "history": PAST}, Dialogue((BRIEF, *TURNS, Turn("user", "And now?\n\nSay it."), NOW))),
        (NEXT, Dialogue((BRIEF, Turn("user", "And now?\n\nSay it."), NOW))),
        ({**NEXT, "history": None, "system": ""}, Demonstration((Turn("user", "And now?\n\nSay it."),), "Now too.")),
        ({"history": CHAT, "prompt": "c", "completion": "d"},
         Dialogue((*TURNS, Turn("user", "c"), Turn("assistant", "d")))),
        ({"conversations": CHAT, "system": "Be brief."}, Dialogue((BRIEF, *TURNS))),
        # Files that were merged leave the other's columns null.
        ({"messages": [{**ASKED, **NULLS}, {"from": "gpt", "value": "Yes.", "role": None}], "prompt": None},
         Dialogue((TURNS[0], Turn("assistant", "Yes.")))),
        # Prompts alone.
        *((row, Demonstration("p", "")) for row in (
            {"prompt": "p"}, {"prompt": "p", "completion": ""}, {"prompt": "p", "completion": " \n"},
            {"messages": None, "prompt": "p"})),
        *((row, Demonstration(TURNS[:1], "")) for row in (
            {"prompt": [ASKED]}, {"instruction": "Is it?"}, {"question": "Is it?", "answer": None})),
        ({"prompt": [{**SYSTEM, "content": ""}], "completion": "c"}, Demonstration("", "c")),
        ({"messages": [ASKED]}, Dialogue(TURNS[:1])),
        ({"messages": [ASKED, {"role": "assistant", "content": ""}]}, Dialogue(TURNS[:1])),
        ({"messages": [*CHAT, ASKED]}, Dialogue((*TURNS, TURNS[0]))),
    ],
)  # fmt: skip
def test_every_form_of_a_demonstration(tmp_path: Path, row: dict[str, Any], expected: Any) -> None:
    (found,) = read_demonstrations(jsonl(tmp_path / "a.jsonl", row))
    assert found == expected
    ends = found.turns[-1].role == "assistant" if isinstance(found, Dialogue) else bool(found.completion)
    assert found.answered is ends
    if isinstance(found, Dialogue):
        assert found.replies == [place for place, turn in enumerate(found.turns) if turn.role == "assistant"]


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@pytest.mark.parametrize("write", [json.dumps, str], ids=["json", "python"])
def test_messages_written_in_a_cell_are_read_as_messages(tmp_path: Path, write: Any, name: str) -> None:
    put = jsonl if name.endswith("jsonl") else sheet
    path = put(tmp_path / name, {"prompt": "Is it?", "chosen": write(CHAT), "rejected": write(WORSE)})
    assert read_preferences(path) == [Preference((TURNS[0],), TURNS[1].text, "No.")]
    path = put(tmp_path / name, {"prompt": write(CHAT[:1]), "completion": write(CHAT[1:])})
    assert read_demonstrations(path) == [Demonstration((TURNS[0],), TURNS[1].text)]
    path = put(tmp_path / name, {**NEXT, "input": "", "history": write(PAST)})
    assert read_demonstrations(path) == [Dialogue((BRIEF, *TURNS, Turn("user", "And now?"), NOW))]
    path = put(tmp_path / name, {"messages": write(CHAT)})
    assert read_demonstrations(path) == read_dialogues(path) == [Dialogue(TURNS)]
    path = put(tmp_path / name, {"conversation": write([{"utterance": "one"}, {"utterance": "two"}])})
    assert read_dialogues(path) == [Dialogue((Turn("user", "one"), Turn("assistant", "two")), both=True)]
    path = put(tmp_path / name, {"prompt": "p", "responses": write(["it's a", "b", "c"]), "ranks": "[2, 1, 3]"})
    assert read_preferences(path) == [Ranking("p", ("b", "it's a", "c"))]


@pytest.mark.parametrize("put", [jsonl, sheet])
def test_what_looks_like_json_code_a_path_or_a_formula_stays_text(tmp_path: Path, put: Any) -> None:
    texts = [
        '{"a": 1}', '[{"name": "x", "role": "admin"}]', "[1, 2]", "{not json", "['a', 'b']", "[see above] yes",
        '{"a": 1, "a": 2}', r'["\ud83d"]',
        "../../etc/passwd", "file:///etc/passwd", '=HYPERLINK("http://x")', "${oc.env:HOME}", "{{ 7 * 7 }}", "'=1",
    ]  # fmt: skip
    path = put(tmp_path / f"a.{'jsonl' if put is jsonl else 'csv'}", *({"prompt": t, "completion": t} for t in texts))
    assert read_demonstrations(path) == [Demonstration(text, text) for text in texts]
    assert read_texts(path, "prompt") == [Text(text) for text in texts]


@pytest.mark.parametrize(
    "cell",
    [json.dumps(CHAT)[:-5],
     '[{"role": "user", "content": "a", "content": "b"}]', "[{'role': 'user', 'content': 'a', 'role': 'x'}]"],
    ids=["cut off", "key twice", "key twice in Python"],
)  # fmt: skip
def test_a_cell_of_messages_that_cannot_be_read_is_no_text(
    tmp_path: Path, cell: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = sheet(tmp_path / "a.csv", {"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": cell})
    assert read_demonstrations(path) == [Demonstration("p", "c")]
    assert "1 of 2 rows skipped ('completion' begins like a list of messages, and cannot be read as one)" in caplog.text
    deep = f'[{{"role": "user", "content": {"[" * 100_000}'
    path = sheet(tmp_path / "a.csv", {"prompt": "p", "completion": deep})
    with pytest.raises(UserError, match="line 2: nested too deeply"):
        read_demonstrations(path)


def test_what_is_not_read_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    thoughts = ("thinking", "reasoning", "reasoning_content")
    for name in thoughts:
        thought, empty = ([CHAT[0], {**CHAT[1], name: words}] for words in ("Hm.", ""))
        path = jsonl(tmp_path / f"{name}.jsonl", {"messages": thought}, {"messages": empty}, {"messages": CHAT})
        assert read_demonstrations(path) == [Dialogue(TURNS)] * 3
        read_judgements(jsonl(tmp_path / f"pair-{name}.jsonl", {"chosen": thought, "rejected": WORSE}))
    row = {"instruction": "i", "reasoning_content": "Hm.", "output": "o"}
    read_demonstrations(jsonl(tmp_path / "b.jsonl", row, {"prompt": "p", "completion": "c", "history": "x"}))
    counts = {f"{name}.jsonl: 1 of 3 rows have {name}" for name in thoughts}
    counts |= {f"pair-{name}.jsonl: 1 of 1 rows have {name}" for name in thoughts}
    for said in counts | {"b.jsonl: 1 of 2 rows have reasoning_content", "b.jsonl: 1 of 2 rows have history"}:
        assert f"{said}, which is not read" in caplog.text


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [ASKED, {"role": "tool", "content": "{}"}, CHAT[1]]},
        {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [{"name": "clock"}]}, CHAT[1]]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "function_call", "value": "{}"}]},
        {"conversations": [{"from": "human", "value": "a"}, {"from": "observation", "value": "{}"}]},
        {"messages": [{"role": "system", "content": "", "tools": '[{"name": "clock"}]'}, *CHAT]},
        {"messages": CHAT, "tools": '[{"name": "clock"}]'},
    ],
)
def test_rows_with_tools_are_skipped_and_counted(
    tmp_path: Path, row: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    plain = {"messages": [{"role": "system", "content": "s", "tools": "[]"}, *CHAT], "tools": []}
    path = jsonl(tmp_path / "a.jsonl", {"messages": CHAT}, row, plain)
    assert read_demonstrations(path) == [Dialogue(TURNS), Dialogue((Turn("system", "s"), *TURNS))]
    assert "a.jsonl: 1 of 3 rows skipped (it calls tools, which are not read)" in caplog.text
    with pytest.raises(UserError, match=r"all 1 rows were skipped \(it calls tools"):
        read_demonstrations(jsonl(tmp_path / "b.jsonl", row))


@pytest.mark.parametrize("empty", [None, "", "  ", float("nan"), []])
def test_a_null_is_a_blank(tmp_path: Path, empty: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"instruction": "i", "input": empty, "output": "o"},
        {"instruction": empty, "input": empty, "output": empty},
        {"messages": empty},
        {"messages": [{"role": "system", "content": empty}, ASKED, {"role": "assistant", "content": empty}]},
    ]
    found = read_demonstrations(jsonl(tmp_path / "a.jsonl", *rows))
    assert "a.jsonl: 2 of 4 rows skipped (the prompt is empty)" in caplog.text
    assert found == [Demonstration((Turn("user", "i"),), "o"), Dialogue((TURNS[0],))]
    texts = read_texts(jsonl(tmp_path / "b.jsonl", {"text": empty}, {"text": "a"}))
    labelled = read_labelled(jsonl(tmp_path / "c.jsonl", {"text": empty, "label": 1}, {"text": "a", "label": 0}))
    assert (texts, labelled) == ([Text("a")], [Labelled("a", 0)])
    if empty is None:
        alike = [{**rows[0], "instruction": f"i{n}"} for n in range(3)] + [rows[1]]
        assert read_demonstrations(sheet(tmp_path / "a.csv", *alike)) == read_demonstrations(
            jsonl(tmp_path / "a.jsonl", *alike)
        )


# --- the real files


@pytest.mark.parametrize(
    ("reader", "name", "labels"),
    [
        (read_reviews, "imdb/aclImdb_small.tar.gz", {1: 2000, 0: 2000}),
        (read_labelled, "chinese_sentiment/ChnSentiCorp_htl_all.csv.gz", {1: 5322, 0: 2443}),  # less one empty review
        (read_labelled, "chinese_sentiment/waimai_10k.csv.gz", {1: 4000, 0: 7987}),
        (read_labelled, "chinese_sentiment/dianping_asap_sample.jsonl.gz", {1: 230, 0: 26}),
        (read_labelled, "chinese_sentiment/online_shopping_10_cats.csv.gz", {1: 31_727, 0: 31_046}),
        *((read, name, {None: count}) for read, name, count in (
            (read_texts, "imdb/unsup_20k.jsonl.gz", 20_000),
            (read_preferences, "preferences/hh_harmless_base_test.jsonl.gz", 2312),
            (read_preferences, "preferences/zh_sentiment_comment_pairs_train.jsonl.gz", 1000),
            (read_preferences, "preferences/medicalgpt_dpo_zh_500.jsonl.gz", 500),
            (read_preferences, "preferences/llms_from_scratch_preference_1100.jsonl.gz", 1094),
            (read_preferences, "preferences/minchatgpt_chatgpt_preferences.json.gz", 458),
            (read_preferences, "preferences/minchatgpt_ranked3.jsonl.gz", 149),
            (read_preferences, "preferences/oasst_en_ranked.jsonl.gz", 212),
            (read_preferences, "preferences/zh_review_ranklists4.jsonl.gz", 3082),
            (read_demonstrations, "sft/alpaca_en_5k.jsonl.gz", 5000),
            (read_demonstrations, "sft/alpaca_zh_2k.jsonl.gz", 2000),
            (read_demonstrations, "sft/llms_from_scratch_instruct_1100.jsonl.gz", 1100),
            (read_dialogues, "chinese_dialog/train.jsonl.gz", 10_000),
            (read_dialogues, "chinese_dialog/kdconv_dev_test.jsonl.gz", 900),
        )),
    ],
)  # fmt: skip
def test_real_files_have_so_many_rows_of_each_label(
    shared: Path, reader: Reader, name: str, labels: dict[int | None, int]
) -> None:
    assert Counter(getattr(row, "label", None) for row in reader(shared / "data" / name)) == labels


@pytest.mark.parametrize("name", ["chinese_dialog/train.jsonl.gz", "preferences/medicalgpt_dpo_zh_500.jsonl.gz"])
def test_ten_lines_of_real_chinese_in_gbk_are_read_as_in_utf_8(shared: Path, tmp_path: Path, name: str) -> None:
    lines = gzip.decompress((shared / "data" / name).read_bytes()).decode().splitlines(keepends=True)
    for first in range(0, 200, 10):
        text = "".join(lines[first : first + 10])
        (tmp_path / "a.jsonl").write_text(text, encoding="gb18030", newline="")
        (tmp_path / "b.jsonl").write_text(text, encoding="utf-8", newline="")
        assert list(read_rows(tmp_path / "a.jsonl")) == list(read_rows(tmp_path / "b.jsonl"))
