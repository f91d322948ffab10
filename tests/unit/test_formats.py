"""Files <-> rows: real content in small files, and the shared real files where RLHF_SHARED names their folder."""

import gzip
import io
import json
import logging
import os
import tarfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from rlhf_pipeline.data import formats
from rlhf_pipeline.data.agreement import settle
from rlhf_pipeline.data.records import Demonstration, Dialogue, Labelled, Preference, Ranking, Text, Turn
from rlhf_pipeline.errors import UserError

REVIEWS = {
    "train/pos/10_9.txt": "A warm film.<br /><br />I saw it   twice.",
    "train/pos/2_7.txt": "Better than its poster.",
    "train/pos/30_8.txt": "The dog steals every scene.",
    "train/neg/3_1.txt": "Two hours I will not get back.",
    "test/pos/0_10.txt": "Flawless; the score alone is worth it.",
    "test/neg/1_4.txt": "Nice costumes, no plot.",
    "train/unsup/5_0.txt": "Nobody rated this one.",
    "README": "Large Movie Review Dataset v1.0",
    "imdb.vocab": "the\nand\n",
}


def write_folder(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return root


def write_archive(path: Path, files: dict[str, str], *others: tarfile.TarInfo, prefix: str = "aclImdb/") -> Path:
    with tarfile.open(path, "w" if path.suffix == ".tar" else "w:gz") as archive:
        for name, text in reversed(files.items()):
            member = tarfile.TarInfo(prefix + name)
            member.size = len(text.encode())
            archive.addfile(member, io.BytesIO(text.encode()))
        for member in others:
            archive.addfile(member, io.BytesIO(bytes(member.size)))
    return path


def write_jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def read_preferences(path: Path, columns: dict[str, str] | None = None) -> list[Preference | Ranking]:
    return settle(formats.read_judgements(path, columns).judgements)[0]


# --- aclImdb


def test_acl_imdb_is_the_same_from_folder_and_archive(tmp_path: Path) -> None:
    inner = write_folder(tmp_path / "data" / "aclImdb", REVIEWS)
    read = formats.read_acl_imdb(inner)
    assert read == {
        "train": [
            Labelled("Two hours I will not get back.", 0),
            Labelled("Better than its poster.", 1),  # id 2 before 10: by number, not by name
            Labelled("A warm film. I saw it twice.", 1),
            Labelled("The dog steals every scene.", 1),
        ],
        "test": [
            Labelled("Nice costumes, no plot.", 0),
            Labelled("Flawless; the score alone is worth it.", 1),
        ],
    }
    assert formats.read_acl_imdb(tmp_path / "data") == read
    for name, prefix in (("a.tar.gz", "aclImdb/"), ("a.tgz", ""), ("a.tar", "./aclImdb/")):
        assert formats.read_acl_imdb(write_archive(tmp_path / name, REVIEWS, prefix=prefix)) == read
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.tar", "a.tar.gz", "a.tgz", "data"]


@pytest.mark.parametrize("archive", [False, True])
def test_acl_imdb_names_all_misfits_in_one_error(tmp_path: Path, archive: bool) -> None:
    bad = {"train/pos/4_3.txt": "x", "test/neg/6_5.txt": "x", "test/neg/._1_4.txt": "x", "train/pos/8_11.txt": "x"}
    bad |= {f"train/neg/notes{i}.md": "x" for i in range(3)}
    files = REVIEWS | bad
    path = write_archive(tmp_path / "a.tar.gz", files) if archive else write_folder(tmp_path / "a", files)
    with pytest.raises(UserError, match="7 files do not fit") as caught:
        formats.read_acl_imdb(path)
    message = str(caught.value)
    assert "test/neg/6_5.txt (rating 5 in neg)" in message
    assert "train/neg/notes2.md" in message
    assert "and 2 more" in message
    assert "1..4 in neg and 7..10 in pos" in message


@pytest.mark.parametrize(("text", "why"), [(b"caf\xe9", "not UTF-8"), (b"<br />", "empty")])
def test_acl_imdb_names_an_unreadable_review(tmp_path: Path, text: bytes, why: str) -> None:
    root = write_folder(tmp_path, REVIEWS)
    (root / "test/pos/9_8.txt").write_bytes(text)
    with pytest.raises(UserError, match=rf"test/pos/9_8\.txt \({why}\)"):
        formats.read_acl_imdb(root)


def link(kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo("aclImdb/train/pos/7_7.txt")
    member.type, member.linkname = kind, "../../../etc/passwd"
    return member


@pytest.mark.parametrize(
    "member",
    [
        tarfile.TarInfo("../x"),
        tarfile.TarInfo("aclImdb/train/pos/../../../../1_9.txt"),
        tarfile.TarInfo("/etc/1_9.txt"),
        link(tarfile.SYMTYPE),
        link(tarfile.LNKTYPE),
        link(tarfile.CHRTYPE),
        link(tarfile.FIFOTYPE),
    ],
    ids=["up", "up-inside", "absolute", "symlink", "hardlink", "device", "fifo"],
)
def test_acl_imdb_refuses_a_hostile_member(tmp_path: Path, member: tarfile.TarInfo) -> None:
    path = write_archive(tmp_path / "a.tar.gz", REVIEWS, member)
    with pytest.raises(UserError) as caught:
        formats.read_acl_imdb(path)
    assert f"'{member.name}'" in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["a.tar.gz"]


def many() -> dict[str, str]:
    extra = {f"{s}/pos/{i}_8.txt": f"Film {i}: {i * 7919} stars." for s in ("train", "test") for i in range(20, 60)}
    return REVIEWS | extra


@pytest.mark.parametrize("name", ["a.tar.gz", "a.tar"])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.8])
def test_acl_imdb_truncated_archive(tmp_path: Path, name: str, share: float) -> None:
    path = write_archive(tmp_path / name, many())
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(UserError, match=name) as caught:
        formats.read_acl_imdb(path)
    assert "cut short" in str(caught.value)


def test_acl_imdb_damage_is_not_taken_for_the_end(tmp_path: Path) -> None:
    path = write_archive(tmp_path / "a.tar", many())
    data = bytearray(path.read_bytes())
    data[1024 * 60] ^= 0xFF  # a header: each member takes two blocks of 512
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        formats.read_acl_imdb(path)
    zipped = write_archive(tmp_path / "b.tar.gz", many())
    data = bytearray(zipped.read_bytes())
    data[-6] ^= 0xFF  # gzip's CRC
    zipped.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        formats.read_acl_imdb(zipped)


def test_acl_imdb_missing_parts(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file or folder at"):
        formats.read_acl_imdb(tmp_path / "nowhere")
    without = {name: text for name, text in REVIEWS.items() if not name.startswith("test/neg")}
    for path in (write_folder(tmp_path / "aclImdb", without), write_archive(tmp_path / "a.tgz", without)):
        with pytest.raises(UserError, match=r"no reviews in test/neg; .*aclImdb/\{train,test\}/\{pos,neg\}"):
            formats.read_acl_imdb(path)
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match=r"a\.zip is not an aclImdb; allowed are a folder and \.tar\.gz"):
        formats.read_acl_imdb(tmp_path / "a.zip")


# --- read_rows


def test_rows_line_separators_stay_inside_a_text(tmp_path: Path) -> None:
    text = "one\u2028two\u2029three\x85four"
    path = write_jsonl(tmp_path / "a.jsonl", {"text": text}, {"text": "five"})
    assert list(formats.read_rows(path)) == [(1, {"text": text}), (2, {"text": "five"})]
    (tmp_path / "a.txt").write_bytes(f"\ufeff{text}\r\n\n  \nlast".encode())
    assert list(formats.read_rows(tmp_path / "a.txt")) == [(1, {"text": text}), (4, {"text": "last"})]
    (tmp_path / "a.csv").write_text(f"text,label\n{text},1\n", encoding="utf-8")
    assert formats.read_labelled(tmp_path / "a.csv") == [Labelled(text, 1)]


def test_rows_json_list_or_lines_whatever_the_suffix(tmp_path: Path) -> None:
    rows = [{"text": "one"}, {"text": "two", "tags": [1, {"a": "]"}]}, {"text": "three"}]
    for suffix in ("json", "jsonl"):
        path = tmp_path / f"list.{suffix}"
        path.write_text("\n" + json.dumps(rows, indent=1), encoding="utf-8")
        assert [row for _, row in formats.read_rows(path)] == rows
        lines = path.read_text(encoding="utf-8").split("\n")
        numbers = [number for number, _ in formats.read_rows(path)]
        assert [lines[number - 1] for number in numbers] == [" {"] * 3
        path = write_jsonl(tmp_path / f"lines.{suffix}", *rows)
        assert list(formats.read_rows(path)) == list(enumerate(rows, start=1))


def test_rows_csv_bom_quotes_and_line_breaks(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('label,review\r\n1,"很快，\n""好吃"""\r\n\r\n0,慢\r\n'.encode("utf-8-sig"))
    assert list(formats.read_rows(path)) == [
        (2, {"label": "1", "review": '很快，\n"好吃"'}),
        (5, {"label": "0", "review": "慢"}),
    ]
    (tmp_path / "b.csv").write_text("label;review\n1;good, cheap\n", encoding="utf-8")
    assert list(formats.read_rows(tmp_path / "b.csv")) == [(2, {"label": "1", "review": "good, cheap"})]
    (tmp_path / "a.tsv").write_text("text\tlabel\na, b\tpos\n", encoding="utf-8")
    assert formats.read_labelled(tmp_path / "a.tsv") == [Labelled("a, b", 1)]


SHEET = "prompt,chosen,rejected\r\n为什么天是蓝的？,因为光的散射。,我不知道，你说呢？\r\n"


@pytest.mark.parametrize("encoding", ["gbk", "gb18030", "utf-16"])
def test_rows_of_sheets_as_spreadsheets_save_them_in_china(
    tmp_path: Path, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "a.csv").write_bytes(SHEET.encode(encoding))
    row = {"prompt": "为什么天是蓝的？", "chosen": "因为光的散射。", "rejected": "我不知道，你说呢？"}
    assert list(formats.read_rows(tmp_path / "a.csv")) == [(2, row)]
    assert "a.csv is not UTF-8; read as" in caplog.text


@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("euc-kr", "하늘은 왜 파란가요? 모르겠어요"),
        ("cp1251", "Мы на море"),
        ("latin-1", "na\u00efve"),
        ("big5", "為什麼天是藍的？"),
    ],
)
def test_rows_of_other_encodings_are_not_guessed_at(tmp_path: Path, encoding: str, text: str) -> None:
    (tmp_path / "a.csv").write_bytes(b"text\n" + text.encode(encoding) + b"\n")
    with pytest.raises(UserError, match=r"a\.csv, line 2: not UTF-8 .* \(in a spreadsheet: CSV UTF-8\)"):
        list(formats.read_rows(tmp_path / "a.csv"))


def test_rows_of_sheets_with_what_spreadsheets_leave_in_them(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label,,\ngood,1,,\n")
    assert list(formats.read_rows(tmp_path / "a.csv")) == [(2, {"text": "good", "label": "1", "": ""})]
    (tmp_path / "a.csv").write_text("text\tlabel\ngood, cheap\t1\n")
    assert list(formats.read_rows(tmp_path / "a.csv")) == [(2, {"text": "good, cheap", "label": "1"})]
    (tmp_path / "a.csv").write_text("text,label\n" + "x" * 200_000 + ",1\n")
    assert len(formats.read_labelled(tmp_path / "a.csv")[0].text) == 200_000


def test_rows_gzip_and_parquet(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"text": "比赛"})
    zipped = tmp_path / "a.jsonl.gz"
    zipped.write_bytes(gzip.compress(path.read_bytes()))
    assert formats.read_texts(zipped) == [Text("比赛")]
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pa.table({"text": ["good", "bad", "so-so"], "label": [1.0, 0.0, None]})
    pq.write_table(table, tmp_path / "a.parquet")
    assert formats.read_labelled(tmp_path / "a.parquet") == [Labelled("good", 1), Labelled("bad", 0)]
    with pytest.raises(UserError, match=r"a\.parquet, row 1: 'prompt' is missing"):
        formats.read_demonstrations(tmp_path / "a.parquet")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "a"}\n\n{"text": \n', "line 3: not JSON"),
        ("a.jsonl", b'{"text": "a"}\n["b"]\n', "line 2: a list where an object is needed"),
        ("a.json", b'[{"text": "a"},\n 3]', "line 2: a number where an object is needed"),
        ("a.json", b'[[{"text": "a"}]]', "line 1: a list where an object is needed"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"}\n', "line 3: not JSON"),
        ("a.json", b'[{"text": "a"}]\n[{"text": "b"}]\n', "line 2: not JSON"),
        ("a.json", b'[{"text": "a"} {"text": "b"}]', "line 1: not JSON"),
        ("a.json", b"[]", "holds no rows"),
        ("a.jsonl", b"", "holds no rows"),
        ("a.csv", b"text,label\n", "holds no rows"),
        ("a.txt", b"\n \n", "holds no rows"),
        ("a.txt", "ok\nna\u00efve".encode("latin-1"), "line 2: not UTF-8"),
        ("a.csv", b"text,label\na,1\nb, c,0\n", r"line 3: 3 fields; the header has 2 \(text, label\)"),
        ("a.csv", b'text,label\n"a,1\nb,0\n', "line 2: not CSV"),
        ("a.csv", b"text,text\na,b\n", "line 1: a column name occurs twice"),
        ("a.xlsx", b"PK", r"unknown suffix; allowed are \.jsonl, \.json, \.csv.* save it as CSV UTF-8"),
        ("a.zip", b"PK", r"unknown suffix; .* unpack it"),
        (
            "a.json",
            b"PK\x03\x04\xff",
            r"line 1: not text: by its first bytes it is a \.zip or \.xlsx file under another",
        ),
        ("a.csv", gzip.compress(b"text\na\n", mtime=0), r"line 1: not text: by its first bytes it is a \.gz file"),
        ("a.jsonl.gz", b"plain", "cannot be read to its end"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99, mtime=0)[:-9], "cut short"),
        ("a.parquet", b"PAR1PAR1PAR1", "damaged or misnamed"),
    ],
)
def test_rows_faults_name_file_and_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(formats.read_rows(tmp_path / name))
    assert str(caught.value).startswith(str(tmp_path / name))


def test_rows_missing_file_and_folder(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "reviews.jsonl", {"text": "a"})
    with pytest.raises(UserError, match=r"no file at .*review\.jsonl; near it: reviews\.jsonl"):
        formats.read_rows(tmp_path / "review.jsonl")
    with pytest.raises(UserError, match="is a folder; give one file"):
        formats.read_rows(tmp_path)
    with pytest.raises(UserError, match=r"no file at .*\.$"):
        formats.read_rows(tmp_path / "no" / "such.csv")


# --- typed rows

CHAT = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]


def test_labelled(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = [0, 1, "1", "NEG", "Positive", "pos", None, ""]
    rows = [{"sentence": f"\ufeffs{i}", "sentiment": value} for i, value in enumerate(values)]
    path = write_jsonl(tmp_path / "a.jsonl", *rows, {"sentence": " ", "sentiment": 1})
    with caplog.at_level(logging.INFO, logger="rlhf_pipeline"):
        read = formats.read_labelled(path)
    assert read == [Labelled(f"s{i}", label) for i, label in enumerate([0, 1, 1, 0, 1, 1])]
    assert "3 of 9 rows skipped" in caplog.text
    path = write_jsonl(tmp_path / "b.jsonl", {"body": "fine", "y": 1})
    assert formats.read_labelled(path, {"text": "body", "label": "y"}) == [Labelled("fine", 1)]
    with pytest.raises(UserError, match=r"line 1: 'text\|review\|sentence\|content' is missing among body, y"):
        formats.read_labelled(path)
    path = write_jsonl(tmp_path / "c.jsonl", {"text": "a", "label": 1}, {"text": "b", "label": 5})
    with pytest.raises(UserError, match=r"c\.jsonl, line 2: 'label' is 5; allowed are 0, 1, neg"):
        formats.read_labelled(path)


def test_demonstrations(tmp_path: Path) -> None:
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "Say hi.", "completion": "Hi."},
        {"instruction": "Mend the spelling.", "input": "freind", "output": "friend"},
        {"instruction": "Name a colour.", "input": "", "output": "Blue."},
        {"question": "1+1?", "answer": "2"},
        {"instruction": "Be silent.", "input": "", "output": ""},
        {"prompt": [{"role": "user", "content": "Hi?"}], "completion": [{"role": "assistant", "content": "Yes."}]},
        {"messages": [{"role": "system", "content": "Be kind."}, *CHAT]},
        {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好"}]},
    )
    assert formats.read_demonstrations(path) == [
        Demonstration("Say hi.", "Hi."),
        Demonstration((Turn("user", "Mend the spelling.\n\nfreind"),), "friend"),
        Demonstration((Turn("user", "Name a colour."),), "Blue."),
        Demonstration((Turn("user", "1+1?"),), "2"),
        Demonstration((Turn("user", "Be silent."),), ""),
        Demonstration((Turn("user", "Hi?"),), "Yes."),
        Dialogue((Turn("system", "Be kind."), Turn("user", "a?"), Turn("assistant", "b"))),
        Dialogue((Turn("user", "你好"), Turn("assistant", "好"))),
    ]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "judge", "content": "a?"}], "message from 'judge'; allowed are system, user"),
        ([{"role": "user", "content": 3}], "not a list of messages with role and content or from and value"),
        ([{"role": None, "content": "a?"}], "not a list of messages with role and content or from and value"),
        ("a?", "not a list of messages"),
    ],
)
def test_chat_faults(tmp_path: Path, messages: object, message: str) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"messages": CHAT}, {"messages": messages})
    with pytest.raises(UserError, match=message) as caught:
        formats.read_demonstrations(path)
    assert "a.jsonl, line 2: " in str(caught.value)


def test_columns_go_by_the_users_names(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", {"q": "Why?", "good": "So.", "bad": "No.", "prompt": "an id"})
    columns = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    assert read_preferences(path, columns) == [Preference("Why?", "So.", "No.")]
    (tmp_path / "b.csv").write_text("body,stars\nfine,1\n")
    assert formats.read_labelled(tmp_path / "b.csv", columns={"text": "body", "label": "stars"}) == [
        Labelled("fine", 1)
    ]
    with pytest.raises(
        UserError, match=r"b\.csv, line 2: data\.columns\.label=star names no column here; there are bo"
    ):
        formats.read_labelled(tmp_path / "b.csv", columns={"text": "body", "label": "star"})


def test_preferences_of_every_form(tmp_path: Path) -> None:
    dialog = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: a joke?\n\nAssistant:"
    turns = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}]
    path = write_jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "p", "chosen": "c", "rejected": "r"},
        {"prompt": "p", "selected": "c", "rejected": "r"},
        {"chosen": f"{dialog} Sure: knock knock.", "rejected": f"{dialog} Sure, no."},
        {"instruction": "i", "input": "x", "output": "c", "chosen": "c", "rejected": "r"},
        {"conversations": turns, "chosen": "c", "rejected": "r"},
        {"prompt": "p", "chosen": "same", "rejected": "same"},
        {"id": "q7", "winner": "ppo", "task": "t", "sft": "r", "ppo": "c"},
        {"chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "r"}]},
        {"prompt": "a?", "chosen": CHAT, "rejected": [CHAT[0], {"role": "assistant", "content": "r"}]},
        {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 0.5},
        {"prompt": "p", "responses": ["a", "b", "c"]},
        {"context": [], "prompt": "p", "responses": ["a", "b"]},
        {"context": [{"role": "prompter", "text": "q"}], "prompt": "p", "responses": ["a", "b"]},
        {"ranked": ["x", "y", ""]},
    )
    assert read_preferences(path) == [
        Preference("p", "c", "r"),
        Preference("p", "c", "r"),
        Preference(dialog, " Sure: knock knock.", " Sure, no."),
        Preference((Turn("user", "i\n\nx"),), "c", "r"),
        Preference((Turn("system", "Be brief."), Turn("user", "Why?")), "c", "r"),
        Preference("", "c", "r"),
        Preference((Turn("user", "a?"),), "b", "r"),
        Preference((Turn("user", "a?"),), "b", "r"),
        Preference("p", "c", "r", 0.5),
        Ranking("p", ("a", "b", "c")),
        Preference((Turn("user", "p"),), "a", "b"),
        Preference((Turn("user", "q"), Turn("user", "p")), "a", "b"),
        Ranking("", ("x", "y", "")),
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "rejected": "r"}, "'chosen' is missing; a preference row needs prompt, chosen, rejected."),
        ({"prompt": "p", "chosen": None, "rejected": "r"}, "'chosen' is blank; a preference row"),
        ({"winner": "x", "x": "c", "y": "r", "source": "s"}, "beside 'x' there is not one other answer but y, source"),
        ({"winner": "x", "x": "c"}, "beside 'x' there is not one other answer but none"),
        (
            {"Prompt": "p", "Rank1": 1},
            "no label among the columns Prompt, Rank1; allowed are prompt, chosen, rejected;",
        ),
        ({"chosen": "c", "rejected": "r"}, "'prompt' is missing, and chosen and rejected are not dialogs"),
        ({"conversations": [{"from": "human"}], "chosen": "c", "rejected": "r"}, "'conversations' is not a list"),
    ],
)
def test_a_preference_that_cannot_be_read_is_set_aside_with_the_reason(
    tmp_path: Path, row: dict[str, object], message: str
) -> None:
    path = write_jsonl(tmp_path / "reviews.jsonl", {"prompt": "p", "chosen": "c", "rejected": "r"}, row)
    read = formats.read_judgements(path)
    assert [(j.prompt, j.answers) for j in read.judgements] == [("p", ("c", "r"))]
    (aside,) = read.rejected
    assert (aside["file"], aside["line"], aside["row"]) == (str(path), 2, row)
    assert aside["why"].startswith(message.rstrip("."))


def test_dialogues(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "b.jsonl", {"conversation": [{"utterance": "哪个区？"}, {"utterance": "艾欧尼亚"}]})
    assert formats.read_dialogues(path) == [
        Dialogue((Turn("user", "哪个区？"), Turn("assistant", "艾欧尼亚")), both=True)
    ]
    path = write_jsonl(tmp_path / "c.jsonl", {"conversation": [{"utterance": "alone"}]})
    assert formats.read_dialogues(path) == [Dialogue((Turn("user", "alone"),), both=True)]
    for value in ([{"utterance": 3}], [{"words": "a"}], "a"):
        path = write_jsonl(tmp_path / "d.jsonl", {"conversation": value})
        with pytest.raises(UserError, match=r"line 1: 'conversation' is not a list of .*; a dialogue row needs"):
            formats.read_dialogues(path)


# --- the real files


@pytest.fixture(scope="module")
def real() -> Path:
    shared = os.environ.get("RLHF_SHARED")
    if not shared:
        pytest.skip("RLHF_SHARED is not set: it names the folder whose data/ holds the real files")
    return Path(shared) / "data"


def test_real_acl_imdb_folder_and_archive(real: Path, tmp_path: Path) -> None:
    archive = real / "imdb/aclImdb_small.tar.gz"
    read = formats.read_acl_imdb(archive)
    for split in ("train", "test"):
        assert Counter(row.label for row in read[split]) == {0: 1000, 1: 1000}
    assert not any("<br" in row.text or "  " in row.text for rows in read.values() for row in rows)
    with tarfile.open(archive) as opened:
        opened.extractall(tmp_path, filter="data")
    assert formats.read_acl_imdb(tmp_path) == read


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("ChnSentiCorp_htl_all.csv.gz", {1: 5322, 0: 2443}),  # 2,444 less the one empty review
        ("waimai_10k.csv.gz", {1: 4000, 0: 7987}),
        ("online_shopping_10_cats.csv.gz", None),
        ("dianping_asap_sample.jsonl.gz", {1: 230, 0: 26}),
    ],
)
def test_real_chinese_sentiment(real: Path, name: str, counts: dict[int, int] | None) -> None:
    rows = formats.read_labelled(real / "chinese_sentiment" / name)
    if counts is None:
        assert len(rows) == 62_774 - 1
    else:
        assert Counter(row.label for row in rows) == counts


Reader = Callable[[Path], list[object]]


@pytest.mark.parametrize(
    ("reader", "name", "count"),
    [
        (formats.read_texts, "imdb/unsup_20k.jsonl.gz", 20_000),
        (read_preferences, "preferences/hh_harmless_base_test.jsonl.gz", 2312),
        (read_preferences, "preferences/zh_sentiment_comment_pairs_train.jsonl.gz", 1000),
        (read_preferences, "preferences/zh_sentiment_comment_pairs_test.jsonl.gz", 100),
        (read_preferences, "preferences/medicalgpt_dpo_zh_500.jsonl.gz", 500),
        (read_preferences, "preferences/llms_from_scratch_preference_1100.jsonl.gz", 1094),
        (read_preferences, "preferences/minchatgpt_chatgpt_preferences.json.gz", 458),
        (read_preferences, "preferences/minchatgpt_ranked3.jsonl.gz", 149),
        (read_preferences, "preferences/oasst_en_ranked.jsonl.gz", 212),
        (read_preferences, "preferences/zh_review_ranklists4.jsonl.gz", 3082),
        (formats.read_demonstrations, "sft/alpaca_en_5k.jsonl.gz", 5000),
        (formats.read_demonstrations, "sft/alpaca_zh_2k.jsonl.gz", 2000),
        (formats.read_demonstrations, "sft/llms_from_scratch_instruct_1100.jsonl.gz", 1100),
        (formats.read_dialogues, "chinese_dialog/train.jsonl.gz", 10_000),
        (formats.read_dialogues, "chinese_dialog/valid.jsonl.gz", 1000),
        (formats.read_dialogues, "chinese_dialog/test.jsonl.gz", 1000),
        (formats.read_dialogues, "chinese_dialog/kdconv_dev_test.jsonl.gz", 900),
    ],
)
def test_real_counts(real: Path, reader: Reader, name: str, count: int) -> None:
    assert len(reader(real / name)) == count


def test_real_hh_prompt_and_answer_make_up_the_dialog(real: Path) -> None:
    path = real / "preferences/hh_harmless_base_test.jsonl.gz"
    raw = [row for _, row in formats.read_rows(path)]
    read = read_preferences(path)
    assert [(p.prompt + p.chosen, p.prompt + p.rejected) for p in read] == [(r["chosen"], r["rejected"]) for r in raw]
    assert all(p.prompt.endswith("\n\nAssistant:") for p in read)


@pytest.mark.parametrize("name", ["chinese_dialog/train.jsonl.gz", "preferences/medicalgpt_dpo_zh_500.jsonl.gz"])
def test_ten_lines_of_real_chinese_in_gbk_are_read_as_in_utf_8(real: Path, tmp_path: Path, name: str) -> None:
    lines = gzip.decompress((real / name).read_bytes()).decode().splitlines(keepends=True)
    for first in range(0, 200, 10):
        text = "".join(lines[first : first + 10])
        (tmp_path / "a.jsonl").write_text(text, encoding="gb18030", newline="")
        (tmp_path / "b.jsonl").write_text(text, encoding="utf-8", newline="")
        assert list(formats.read_rows(tmp_path / "a.jsonl")) == list(formats.read_rows(tmp_path / "b.jsonl"))
