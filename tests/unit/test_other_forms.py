"""Files as they are about: messages in cells, system words and history, tools, nulls, other encodings, own labels."""

import csv
import json
import logging
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.data import formats
from rlhf_pipeline.data.agreement import settle
from rlhf_pipeline.data.records import Demonstration, Dialogue, Labelled, Preference, Ranking, Text, Turn
from rlhf_pipeline.errors import UserError

ASKED = {"role": "user", "content": "Is it?"}
CHAT = [ASKED, {"role": "assistant", "content": 'It "is", isn\'t it?'}]
WORSE = [ASKED, {"role": "assistant", "content": "No."}]
TURNS = (Turn("user", "Is it?"), Turn("assistant", 'It "is", isn\'t it?'))


def jsonl(path: Path, *rows: object) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sheet(path: Path, *rows: dict[str, Any]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0], delimiter="\t" if path.suffix == ".tsv" else ",")
        writer.writeheader()
        writer.writerows(rows)
    return path


def preferences(path: Path) -> list[Preference | Ranking]:
    return settle(formats.read_judgements(path).judgements)[0]


def as_numpy(messages: list[dict[str, str]]) -> str:
    """A column of Parquet that went through pandas to CSV."""
    return "[" + "\n ".join(map(str, messages)) + "]"


@pytest.mark.parametrize("name", ["a.csv", "a.tsv", "a.jsonl"])
@pytest.mark.parametrize("write", [json.dumps, str, as_numpy], ids=["json", "python", "numpy"])
def test_messages_written_in_a_cell_are_read_as_messages(tmp_path: Path, write: Any, name: str) -> None:
    put = jsonl if name.endswith("jsonl") else sheet
    path = put(tmp_path / name, {"prompt": "Is it?", "chosen": write(CHAT), "rejected": write(WORSE)})
    assert preferences(path) == [Preference((TURNS[0],), TURNS[1].text, "No.")]
    path = put(tmp_path / name, {"prompt": write(CHAT[:1]), "completion": write(CHAT[1:])})
    assert formats.read_demonstrations(path) == [Demonstration((TURNS[0],), TURNS[1].text)]
    path = put(tmp_path / name, {"messages": write(CHAT)})
    assert formats.read_demonstrations(path) == [Dialogue(TURNS)]
    assert formats.read_dialogues(path) == [Dialogue(TURNS)]
    utterances = write([{"utterance": "one"}, {"utterance": "two"}]) if write is not as_numpy else '["one", "two"]'
    path = put(tmp_path / name, {"conversation": utterances})
    assert formats.read_dialogues(path) == [Dialogue((Turn("user", "one"), Turn("assistant", "two")), both=True)]


def test_messages_of_files_that_were_merged_leave_their_other_columns_null(tmp_path: Path) -> None:
    nulls = {"from": None, "value": None, "tool_calls": None, "reasoning_content": None}
    other = {"role": None, "content": None}
    mixed = [{**message, **nulls} for message in CHAT[:1]] + [{"from": "gpt", "value": "Yes.", **other}]
    path = jsonl(tmp_path / "a.jsonl", {"messages": mixed, "prompt": None}, {"messages": None, "prompt": "p"})
    talk = Dialogue((TURNS[0], Turn("assistant", "Yes.")))
    assert formats.read_demonstrations(path) == [talk, Demonstration("p", "")]


def test_ranked_lists_in_cells_may_be_pythons(tmp_path: Path) -> None:
    for write in (json.dumps, str):
        row = {"prompt": "p", "responses": write(["it's a", "b", "c"]), "ranks": "[2, 1, 3]"}
        path = sheet(tmp_path / "a.csv", row)
        assert preferences(path) == [Ranking("p", ("b", "it's a", "c"))]


def test_answers_of_json_and_code_stay_text(tmp_path: Path) -> None:
    texts = ['{"a": 1}', '[{"name": "x", "role": "admin"}]', "[1, 2]", "{not json", "['a', 'b']", "[see above] yes"]
    path = sheet(tmp_path / "a.csv", *({"prompt": text, "completion": text} for text in texts))
    assert formats.read_demonstrations(path) == [Demonstration(text, text) for text in texts]


def test_a_cell_of_messages_that_was_cut_off_is_no_text(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    cut = json.dumps(CHAT)[:-5]
    path = sheet(tmp_path / "a.csv", {"prompt": "p", "completion": "c"}, {"prompt": "q", "completion": cut})
    assert formats.read_demonstrations(path) == [Demonstration("p", "c")]
    assert "1 of 2 rows skipped ('completion' begins like a list of messages, and cannot be read as one)" in caplog.text
    deep = f'[{{"role": "user", "content": {"[" * 100_000}'
    path = sheet(tmp_path / "a.csv", {"prompt": "p", "completion": deep})
    with pytest.raises(UserError, match="lists in lists, too deep"):
        formats.read_demonstrations(path)
    rows = ({"prompt": "p", "chosen": "c", "rejected": "r"}, {"prompt": "p", "chosen": cut, "rejected": "r"})
    (aside,) = formats.read_judgements(sheet(tmp_path / "b.csv", *rows)).rejected
    assert (aside["line"], aside["why"][:27]) == (3, "'chosen' begins like a list")


@pytest.mark.parametrize("form", [("from", "value", "human", "gpt"), ("role", "content", "user", "assistant")])
@pytest.mark.parametrize("key", ["conversations", "messages"])
def test_a_pair_of_one_message_each_after_a_conversation(tmp_path: Path, key: str, form: tuple[str, ...]) -> None:
    who, words, user, assistant = form
    said = [{who: user, words: "Is it?"}, {who: assistant, words: "Yes."}, {who: user, words: "Why?"}]
    chosen, rejected = {who: assistant, words: "So."}, {who: assistant, words: "No."}
    before = (Turn("user", "Is it?"), Turn("assistant", "Yes."), Turn("user", "Why?"))
    rows = [
        {key: said, "chosen": chosen, "rejected": rejected},
        {key: said, "chosen": [chosen], "rejected": [rejected]},
    ]
    path = jsonl(tmp_path / "a.jsonl", *rows, {key: said, "chosen": "So.", "rejected": "No.", "system": "Be brief."})
    assert preferences(path) == [
        Preference(before, "So.", "No."),
        Preference(before, "So.", "No."),
        Preference((Turn("system", "Be brief."), *before), "So.", "No."),
    ]
    swift = {key: [*said, {who: assistant, words: "So."}], "rejected_response": "No."}
    assert preferences(jsonl(tmp_path / "b.jsonl", swift)) == [Preference(before, "So.", "No.")]


HISTORY = {
    "instruction": "And now?",
    "input": "Say it.",
    "output": "Now too.",
    "system": "Be brief.",
    "history": [["Is it?", "Yes."], ["Why?", "So."]],
}
BEFORE = (
    Turn("system", "Be brief."), Turn("user", "Is it?"), Turn("assistant", "Yes."),
    Turn("user", "Why?"), Turn("assistant", "So."), Turn("user", "And now?\n\nSay it."),
)  # fmt: skip


def test_alpacas_history_and_system_stand_before_the_instruction(tmp_path: Path) -> None:
    answer = Turn("assistant", "Now too.")
    bare = {**HISTORY, "history": None, "system": ""}
    path = jsonl(tmp_path / "a.jsonl", HISTORY, {**HISTORY, "history": []}, bare)
    alone = Demonstration((BEFORE[-1],), "Now too.")
    assert formats.read_demonstrations(path) == [
        Dialogue((*BEFORE, answer)), Dialogue((BEFORE[0], BEFORE[-1], answer)), alone,
    ]  # fmt: skip
    for write in (json.dumps, str):
        path = sheet(tmp_path / "a.csv", {**HISTORY, "history": write(HISTORY["history"])})
        assert formats.read_demonstrations(path) == [Dialogue((*BEFORE, answer))]
    chats = {"history": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "prompt": "c"}
    path = jsonl(tmp_path / "b.jsonl", {**chats, "completion": "d"}, {"conversations": CHAT, "system": "Be brief."})
    turns = (Turn("user", "a"), Turn("assistant", "b"), Turn("user", "c"), Turn("assistant", "d"))
    assert formats.read_demonstrations(path) == [Dialogue(turns), Dialogue((BEFORE[0], *TURNS))]
    pair = {key: value for key, value in HISTORY.items() if key != "output"} | {"chosen": "c", "rejected": "r"}
    assert preferences(jsonl(tmp_path / "c.jsonl", pair)) == [Preference(BEFORE, "c", "r")]


def test_thoughts_that_are_not_read_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    thought = [CHAT[0], {**CHAT[1], "reasoning_content": "Hm."}]
    for name in ("thinking", "reasoning"):  # gpt-oss and others
        formats.read_demonstrations(
            jsonl(tmp_path / f"{name}.jsonl", {"messages": [CHAT[0], {**CHAT[1], name: "Hm."}]})
        )
        assert f"{name}.jsonl: 1 of 1 rows have {name}, which is not read" in caplog.text
    empty = [CHAT[0], {**CHAT[1], "reasoning_content": ""}]
    path = jsonl(tmp_path / "a.jsonl", {"messages": thought}, {"messages": empty}, {"messages": CHAT})
    assert formats.read_demonstrations(path) == [Dialogue(TURNS)] * 3
    assert "a.jsonl: 1 of 3 rows have reasoning_content, which is not read" in caplog.text
    row = {"instruction": "i", "reasoning_content": "Hm.", "output": "o"}
    formats.read_demonstrations(jsonl(tmp_path / "b.jsonl", row, {"prompt": "p", "completion": "c", "history": "x"}))
    assert "b.jsonl: 1 of 2 rows have reasoning_content, which is not read" in caplog.text
    assert "b.jsonl: 1 of 2 rows have history, which is not read" in caplog.text
    formats.read_judgements(jsonl(tmp_path / "c.jsonl", {"chosen": thought, "rejected": WORSE}))
    assert "c.jsonl: 1 of 1 rows have reasoning_content, which is not read" in caplog.text


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
    assert formats.read_demonstrations(path) == [Dialogue(TURNS), Dialogue((Turn("system", "s"), *TURNS))]
    assert "a.jsonl: 1 of 3 rows skipped (it calls tools, which are not read)" in caplog.text
    with pytest.raises(UserError, match=r"all 1 rows were skipped \(it calls tools"):
        formats.read_demonstrations(jsonl(tmp_path / "b.jsonl", row))


def test_prompts_alone(tmp_path: Path) -> None:
    path = jsonl(
        tmp_path / "a.jsonl",
        {"prompt": "p"}, {"prompt": "p", "completion": ""}, {"prompt": "p", "completion": " \n"},
        {"prompt": [ASKED]}, {"instruction": "i"}, {"question": "q", "answer": None},
        {"messages": [ASKED]}, {"messages": [ASKED, {"role": "assistant", "content": ""}]},
        {"messages": [*CHAT, ASKED]},
    )  # fmt: skip
    found = formats.read_demonstrations(path)
    assert found == [
        *[Demonstration("p", "")] * 3,
        *[Demonstration((Turn("user", text),), "") for text in ("Is it?", "i", "q")],
        *[Dialogue((TURNS[0],))] * 2,
        Dialogue((*TURNS, TURNS[0])),
    ]  # fmt: skip
    assert not any(row.answered for row in found)
    assert [row.replies for row in found if isinstance(row, Dialogue)] == [[], [], [1]]


@pytest.mark.parametrize("empty", [None, "", "  ", float("nan"), []])
def test_a_null_is_a_blank(tmp_path: Path, empty: Any, caplog: pytest.LogCaptureFixture) -> None:
    rows = [
        {"instruction": "i", "input": empty, "output": "o"},
        {"instruction": empty, "input": empty, "output": empty},
    ]
    chat = {"messages": [{"role": "system", "content": empty}, ASKED, {"role": "assistant", "content": empty}]}
    found = formats.read_demonstrations(jsonl(tmp_path / "a.jsonl", *rows, {"messages": empty}, chat))
    assert "a.jsonl: 2 of 4 rows skipped (the prompt is empty)" in caplog.text
    assert found[0] == Demonstration((Turn("user", "i"),), "o")
    assert found[1:] == [Dialogue((TURNS[0],))]
    texts = formats.read_texts(jsonl(tmp_path / "b.jsonl", {"text": empty}, {"text": "a"}))
    labelled = formats.read_labelled(
        jsonl(tmp_path / "c.jsonl", {"text": empty, "label": 1}, {"text": "a", "label": 0})
    )
    assert (texts, labelled) == ([Text("a")], [Labelled("a", 0)])
    pair = {"prompt": "p", "chosen": "c", "rejected": "r"}
    read = formats.read_judgements(
        jsonl(tmp_path / "d.jsonl", pair, {**pair, "chosen": empty}, {**pair, "prompt": empty})
    )
    assert [row["why"].partition(";")[0] for row in read.rejected] == ["'chosen' is blank"]
    assert [judgement.answers for judgement in read.judgements] == [("c", "r")] * 2


def test_a_null_in_a_sheet_and_in_json_are_alike(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows: list[dict[str, Any]] = [{"instruction": f"i{n}", "input": None, "output": f"o{n}"} for n in range(8)]
    rows[3]["output"] = rows[5]["instruction"] = rows[5]["output"] = None
    from_json, from_csv = jsonl(tmp_path / "a.jsonl", *rows), sheet(tmp_path / "a.csv", *rows)
    assert formats.read_demonstrations(from_json) == formats.read_demonstrations(from_csv)
    assert caplog.text.count("1 of 8 rows skipped (the prompt is empty)") == 2
    assert "None" not in repr(formats.read_demonstrations(from_json))


def test_an_answer_of_nothing_that_won_is_an_answer(tmp_path: Path) -> None:
    row = {"prompt": "p", "winner": "sft", "sft": "", "ppo": "r"}
    assert preferences(jsonl(tmp_path / "a.jsonl", row)) == [Preference("p", "", "r")]
    good, null = {**row, "sft": "c"}, {**row, "sft": None}
    (aside,) = formats.read_judgements(jsonl(tmp_path / "b.jsonl", good, null)).rejected
    assert aside["why"].startswith("'sft' is blank")
    (aside,) = formats.read_judgements(jsonl(tmp_path / "c.jsonl", good, {**good, "winner": None})).rejected
    assert aside["why"].startswith("'winner' is blank")


TALKS = "今天天气怎么样\r\n很好啊\r\n那我们去玩吧\r\n\r\n\r\n你吃饭了吗\r\n还没有呢\r\n"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "gbk", "gb18030", "utf-16"])
def test_a_text_of_dialogues_with_blank_lines_between(
    tmp_path: Path, encoding: str, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "train.txt").write_bytes(TALKS.encode(encoding))
    said = [["今天天气怎么样", "很好啊", "那我们去玩吧"], ["你吃饭了吗", "还没有呢"]]
    found = formats.read_dialogues(tmp_path / "train.txt")
    assert [[turn.text for turn in row.turns] for row in found] == said
    assert [turn.role for turn in found[0].turns] == ["user", "assistant", "user"]
    assert all(row.both for row in found)
    assert formats.read_texts(tmp_path / "train.txt") == [Text(text) for texts in said for text in texts]
    assert ("train.txt is not UTF-8; read as" in caplog.text) == (not encoding.startswith("utf-8"))


def test_json_lines_in_gbk_are_read_as_a_sheet_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = [{"text": "今天天气怎么样"}, {"text": "很好啊，我们去玩吧"}]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_bytes(lines.encode("gbk"))
    assert [row for _, row in formats.read_rows(tmp_path / "a.jsonl")] == rows
    assert "a.jsonl is not UTF-8; read as gb18030" in caplog.text
    (tmp_path / "b.txt").write_bytes("為什麼天是藍的？".encode("big5"))
    with pytest.raises(UserError, match=r"b\.txt, line 1: not UTF-8 .*; save the file as UTF-8 \(as in iconv -f gbk"):
        formats.read_texts(tmp_path / "b.txt")


def test_labels_of_other_names(tmp_path: Path) -> None:
    rows = [{"text": f"t{n}", "label": label} for n, label in enumerate(["正面", " 负面 ", "正面", None])]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    found = [Labelled("t0", 1), Labelled("t1", 0), Labelled("t2", 1)]
    assert formats.read_labelled(path, labels={"正面": 1, "负面": 0}) == found
    stars = jsonl(
        tmp_path / "b.jsonl", {"text": "a", "label": 5}, {"text": "b", "label": 1.0}, {"text": "c", "label": "5"}
    )
    read = formats.read_labelled(stars, labels={5: 1, 1: 0})
    assert read == [Labelled("a", 1), Labelled("b", 0), Labelled("c", 1)]
    with pytest.raises(UserError, match=r"line 2: 'label' is ' 负面 '; allowed are 正面 \(data\.labels\)"):
        formats.read_labelled(path, labels={"正面": 1})
    with pytest.raises(UserError, match=r"line 1: 'label' is '正面'; allowed are 0, 1, .*data\.labels=\{good: 1"):
        formats.read_labelled(path)


@pytest.mark.parametrize(
    ("value", "said"),
    [({"a": 1}, "an object"), (["a"], "a list"), (3, "a number"), (0.5, "a number"), (True, "true or false")],
)
def test_no_message_names_a_type_of_python(
    tmp_path: Path, value: Any, said: str, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(UserError, match=f"line 1: 'text' is {said}, not text"):
        formats.read_texts(jsonl(tmp_path / "a.jsonl", {"text": value}))
    good = {"prompt": "p", "winner": "a", "a": "x", "b": "y"}
    with caplog.at_level(logging.WARNING):
        read = formats.read_judgements(jsonl(tmp_path / "b.jsonl", good, {**good, "a": value}))
    assert read.rejected[0]["why"].startswith(f"'a' is {said}, not text")
    if not isinstance(value, dict):
        with pytest.raises(UserError, match=f"line 1: {said} where an object is needed"):
            formats.read_texts(jsonl(tmp_path / "c.jsonl", value if not isinstance(value, list) else [value]))
