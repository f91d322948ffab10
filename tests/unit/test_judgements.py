"""Files of labels: pairs, ranked lists, sheets, Label Studio's exports; what is set aside; nothing odd breaks it."""

import copy
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import sheet

from rlhf_pipeline.data.agreement import combine_judgements
from rlhf_pipeline.data.judgements import Judged, read_judgements
from rlhf_pipeline.data.records import Judgement, Preference, Ranking, Turn
from rlhf_pipeline.errors import UserError


def read(folder: Path, *rows: Any, **options: Any) -> Judged:
    path = folder / "labels.json"
    path.write_text(json.dumps(list(rows)), encoding="utf-8")
    return read_judgements(path, **options)


GOOD = {"prompt": "good", "chosen": "c", "rejected": "r"}
NOTHING = "nothing selected by the tag Pairwise or Ranker"


# --- pairs and ranked lists

CHAT = [{"role": "user", "content": "a?"}, {"role": "assistant", "content": "b"}]
WORSE = [CHAT[0], {"role": "assistant", "content": "r"}]
DIALOG = "\n\nHuman: hi\n\nAssistant: Hello.\n\nHuman: a joke?\n\nAssistant:"
TALK = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "Why?"}]
SAID = (Turn("system", "Be brief."), Turn("user", "Why?"))


FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"prompt": "p", "chosen": "c", "rejected": "r"}, Preference("p", "c", "r")),
    ({"prompt": None, "chosen": "c", "rejected": "r"}, Preference("", "c", "r")),
    ({"prompt": "p", "selected": "c", "rejected": "r"}, Preference("p", "c", "r")),
    ({"prompt": "p", "chosen": "c", "rejected": "r", "margin": 0.5}, Preference("p", "c", "r", 0.5)),
    ({"chosen": f"{DIALOG} Sure: knock.", "rejected": f"{DIALOG} Sure, no."},
     Preference(DIALOG, " Sure: knock.", " Sure, no.")),
    ({"instruction": "i", "input": "x", "output": "c", "chosen": "c", "rejected": "r"},
     Preference((Turn("user", "i\n\nx"),), "c", "r")),
    ({"conversations": TALK, "chosen": "c", "rejected": "r"}, Preference(SAID, "c", "r")),
    ({"instruction": "Why?", "system": "Be brief.", "history": [["a?", "b"]], "chosen": "c", "rejected": "r"},
     Preference((SAID[0], Turn("user", "a?"), Turn("assistant", "b"), SAID[1]), "c", "r")),
    ({"messages": TALK[1:], "system": "Be brief.", "chosen": "c", "rejected": "r"}, Preference(SAID, "c", "r")),
    *(({"conversations": TALK, "chosen": wrap({who: "gpt", text: "c"}), "rejected": wrap({who: "gpt", text: "r"})},
       Preference(SAID, "c", "r"))
      for who, text in (("from", "value"), ("role", "content")) for wrap in (dict, lambda message: [message])),
    ({"messages": [*TALK, {"from": "gpt", "value": "c"}], "rejected_response": "r"}, Preference(SAID, "c", "r")),
    ({"id": "q7", "winner": "ppo", "task": "t", "sft": "r", "ppo": "c"}, Preference("", "c", "r")),
    ({"prompt": "p", "winner": "sft", "sft": "", "ppo": "r"}, Preference("p", "", "r")),
    ({"chosen": CHAT, "rejected": WORSE}, Preference((Turn("user", "a?"),), "b", "r")),
    ({"prompt": "a?", "chosen": CHAT, "rejected": WORSE}, Preference((Turn("user", "a?"),), "b", "r")),
    ({"chosen": [{"role": "system", "content": ""}, CHAT[1]], "rejected": "r"}, Preference("", "b", "r")),
    *(({"prompt": "p", "responses": ["a", "b", "c"], "ranks": empty}, Ranking("p", ("a", "b", "c")))
      for empty in (None, float("nan"), " ", [], "[]")),
    ({"prompt": "p", "responses": ["a", "b", "c"], "ranks": [2, None, 1]}, Preference("p", "c", "a")),
    ({"prompt": "p", "responses": '["x", "[1]"]', "ranks": "[2, 1]"}, Preference("p", "[1]", "x")),
    ({"context": [], "prompt": "p", "responses": ["a", "b"]}, Preference((Turn("user", "p"),), "a", "b")),
    ({"context": [{"role": "prompter", "text": "q"}], "prompt": "p", "responses": ["a", "b"]},
     Preference((Turn("user", "q"), Turn("user", "p")), "a", "b")),
    ({"ranked": ["x", "y", ""]}, Ranking("", ("x", "y", ""))),
    ({"prompt": "p", "answer1": "a", "answer2": "b", "rank1": "2", "rank2": "1"}, Preference("p", "b", "a")),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), FORMS)
def test_every_form_of_a_pair_and_a_ranking(tmp_path: Path, row: dict[str, Any], expected: object) -> None:
    assert combine_judgements(read(tmp_path, row).judgements)[0] == [expected]


# --- Label Studio, JSON

SHOWN = ["So.", "No.", "一"]
ANSWERS = {f"answer{n}": text for n, text in enumerate(SHOWN, 1)}
DATA = {"task": "t1", "prompt": "Why?", "items": [{"id": k, "body": text} for k, text in ANSWERS.items()], **ANSWERS}


def control(value: dict[str, Any], name: str = "choice", origin: str = "manual") -> dict[str, Any]:
    return {"value": value, "id": "x", "from_name": name, "to_name": "items", "type": "some", "origin": origin}


def ranker(value: Any, **options: str) -> dict[str, Any]:
    return control({"ranker": value}, **options)


LEFT, RIGHT = control({"selected": "left"}), control({"selected": "right"})


def annotation(*results: Any, by: Any = 1, **about: Any) -> dict[str, Any]:
    known = {"was_cancelled": False, "lead_time": 30.0, "updated_at": "2026-01-01T00:00:00Z", "parent_prediction": None}
    return {"id": 1, "completed_by": by, "result": list(results), "prediction": {}, **known, **about}


def task(*annotations: Any, number: int = 1, data: Any = DATA, **about: Any) -> dict[str, Any]:
    return {"id": number, "annotations": list(annotations), "drafts": [], "predictions": [], "data": data, **about}


def order(found: Judged) -> list[list[str]]:
    """The answers of each judgement, best first, as the texts that tie."""
    return [
        ["".join(a for a, r in zip(j.answers, j.ranks, strict=True) if r == rank) for rank in sorted(set(j.ranks))]
        for j in found.judgements
    ]


def test_a_pairwise_annotation_is_a_judgement_of_the_first_two_answers(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "Hi?"}]
    for first, second in (
        ("answer_1", "answer_2"),
        ("response1", "response2"),
        ("left", "right"),
        ("text_a", "text_b"),
    ):
        (only,) = read(tmp_path, task(annotation(RIGHT), data={"messages": chat, first: "a", second: "b"})).judgements
        assert only == Judgement((Turn("user", "Hi?"),), ("a", "b"), (2, 1), "1", "1")
    (only,) = read(tmp_path, task(annotation(LEFT), data={"answer1": "a", "answer2": "b"})).judgements
    assert only == Judgement("", ("a", "b"), (1, 2), "1", "1"), "there need not be a prompt"


@pytest.mark.parametrize(
    ("row", "columns", "expected"),
    [
        ({"q": "?", "good": "a", "bad": "b", "prompt": "an id"}, {"prompt": "q", "chosen": "good", "rejected": "bad"},
         Judgement("?", ("a", "b"), (1, 2))),
        (task(annotation(LEFT), data={"q": "?", "good": "a", "bad": "b"}),
         {"prompt": "q", "answer1": "good", "answer2": "bad"}, Judgement("?", ("a", "b"), (1, 2), "1", "1")),
        (task(annotation(LEFT, control({"selected": "right"}, name="safety"))), {"label": "safety"},
         Judgement("Why?", ("So.", "No."), (2, 1), "t1", "1")),
    ],
    ids=["pair", "annotation", "control"],
)  # fmt: skip
def test_columns_go_by_the_users_names(tmp_path: Path, row: Any, columns: dict[str, str], expected: Judgement) -> None:
    assert read(tmp_path, row, columns=columns).judgements == [expected]


@pytest.mark.parametrize(
    ("value", "buckets", "expected"),
    [
        (["answer3", "answer1", "answer2"], None, ["一", "So.", "No."]),
        (["answer3", "answer1"], None, ["一", "So."]),
        ({"rank": ["answer2", "answer1", "answer3"]}, None, ["No.", "So.", "一"]),
        ({"_": ["answer2", "answer1", "answer3"]}, None, ["No.", "So.", "一"]),
        ({"better": ["answer3"], "_": ["answer2"], "worse": ["answer1"]}, None, ["一", "No.", "So."]),
        ({"Worst": ["answer3"], "Best": [], "Good": ["answer2", "answer1"]}, None, ["So.No.", "一"]),
        ({"better": ["answer1"], "worse": [], "_": ["answer2", "answer3"]}, None, ["So.", "No.一"]),
        ({"ads": ["answer1"], "useful": ["answer3"], "_": ["answer2"]}, ["useful", "ads"], ["一", "So."]),
        ({"ads": ["answer1"], "useful": ["answer3"], "_": ["answer2"]}, ["useful", "_", "ads"], ["一", "No.", "So."]),
    ],
)
def test_a_ranker_in_all_its_shapes(tmp_path: Path, value: Any, buckets: list[str] | None, expected: list[str]) -> None:
    found = read(tmp_path, task(annotation(ranker(value))), buckets=buckets)
    assert order(found) == [expected]
    assert [*found.judgements[0].answers] == sorted(found.judgements[0].answers, key=SHOWN.index), "as they were shown"
    for wrong in (["one"], ["one", "one"]):
        with pytest.raises(UserError, match=r"data\.buckets is .* two or more different names"):
            read(tmp_path, task(annotation(ranker(value))), buckets=wrong)


def test_items_are_looked_up_by_id_then_body_then_title_then_in_the_data(tmp_path: Path) -> None:
    items = [{"id": 1, "title": "one"}, {"id": 2, "title": "-", "body": "two"}, {"id": 4, "html": "<b>4</b>"}]
    data = {"prompt": "", "list": items, "third": "three"}
    found = read(tmp_path, task(annotation(ranker([2, "1", "third", 4])), data=data))
    assert order(found) == [["two", "one", "three", "<b>4</b>"]]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "p", "rejected": "r"}, "'chosen' is missing; a preference row needs prompt, chosen, rejected"),
        *(({"prompt": "p", "chosen": empty, "rejected": "r"}, "'chosen' is blank; a preference row")
          for empty in (None, "  ", float("nan"), [], [{"role": "system", "content": ""}])),
        ({"messages": [{"role": "system", "content": ""}], "rejected_response": "r"}, "'messages' is blank"),
        ({"prompt": "p", "chosen": json.dumps(CHAT)[:-5], "rejected": "r"}, "'chosen' begins like a list of messages"),
        ({"winner": "x", "x": "c", "y": "r", "source": "s"}, "winner 'x' needs one other answer column; there are y, "),
        ({"winner": "x", "x": "c"}, "winner 'x' needs one other answer column; there are none"),
        ({"winner": "x", "x": None, "y": "r"}, "'x' is nothing, not text"),
        ({"winner": "x", "x": 3, "y": "r"}, "'x' is a number, not text"),
        ({"winner": None, "x": "c", "y": "r"}, "'winner' is blank"),
        ({"Prompt": "p", "Rank1": 1}, "no label among the columns Prompt, Rank1; allowed are prompt, chosen,"),
        ({"chosen": "c", "rejected": "r"}, "'prompt' is missing, and chosen and rejected are not dialogues"),
        ({"conversations": [{"from": "human"}], "chosen": "c", "rejected": "r"}, "'conversations' is not a list"),
        ({"prompt": "p", "responses": ["x", "y"], "ranks": [1]}, "'ranks' is not a list of 2 numbers, one to each"),
        ({"prompt": "p", "responses": ["x", "y"], "ranks": [1, float("inf")]}, "'ranks' is 'inf', not a number"),
        ({"prompt": "p", "responses": ["x", "y"], "ranks": [1, 10**400]}, f"'ranks' is {'1' + '0' * 39!r}, not a"),
        ({"ranked": "xy"}, "'ranked' is not a list of 2 or more texts"),
        ("text", "text where an object is needed"),
        (task(annotation()), "nothing selected"),
        (task(annotation(control({"choices": ["x"]}), control({"rating": 4}))), "nothing selected by the tag Pairwise"),
        (task(annotation(ranker({"better": [], "_": ["answer1", "answer2"]}))), "nothing selected: all answers"),
        (task(annotation(control({"selected": "both"}))), "'selected' is neither left nor right"),
        (task(annotation(LEFT, control({"selected": "right"}, name="safety"))), "2 labels in one annotation (choice, "),
        (task(annotation(ranker(["answer1", "answer9"]))), "no answer with a text has the id 'answer9'"),
        (task(annotation(ranker(["answer1"]))), "1 of 1 answers ranked; two or more are needed"),
        (task(annotation(ranker({"better": "answer1", "worse": ["answer2"]}))), "'ranker' is neither a list of ids"),
        (task(annotation(ranker({"ads": ["answer1"], "useful": ["answer3"]}))),
         "the order of the buckets ads, useful is unknown; set data.buckets=[..], best first"),
        (task(annotation(LEFT), data={**DATA, "answer2": 3}), "no answer with a text has the id 'answer2'"),
        (task(annotation(LEFT), data={"prompt": "p", "one": "a", "two": "b"}), "no answers such as answer1"),
        (task(annotation(LEFT), data={"poem": "p", "answer1": "a", "answer2": "b"}),
         "no prompt among the columns poem; set data.columns"),
        (task(annotation(LEFT), data=["answer1"]), "'data' is a list, not an object"),
        (task(annotation(LEFT), data={**DATA, "prompt": "\ud800"}), "half a character"),
        (task(annotation(ranker(["answer1", "answer2", "answer1"]))), "an answer is ranked twice"),
        (task(annotation(ranker({"Best": ["answer1"], "best": ["answer2"]}))), "a bucket occurs twice"),
        (task(annotation(ranker(["x", "y"])), data={"list": [{"id": "x"}, {"id": "x"}]}), "an id occurs twice in 'li"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_used_is_set_aside_with_the_reason(tmp_path: Path, row: Any, message: str) -> None:
    (aside,) = read(tmp_path, GOOD, row).rejected
    assert aside["why"].startswith(message)
    assert (aside["file"], aside["where"]) == (str(tmp_path / "labels.json"), "row 2")
    if isinstance(row, dict):
        assert aside["row"].keys() == row.keys()


def test_a_row_set_aside_can_be_mended_and_read_again(tmp_path: Path) -> None:
    found = read(tmp_path, task(annotation(LEFT, by="x"), annotation(by="y")))
    (aside,) = found.rejected
    assert (aside["task"], aside["annotator"], aside["why"]) == ("t1", "y", NOTHING)
    aside["row"]["annotations"][0]["result"] = [RIGHT]
    assert [j.annotator for j in read(tmp_path, aside["row"]).judgements] == ["y"]


DAYS = [f"2026-01-0{day}T00:00:00{fraction}Z" for day, fraction in ((1, ""), (1, ".5"), (2, ""))]


def test_the_latest_label_of_a_person_counts_within_a_task_and_across_files(tmp_path: Path) -> None:
    own = task(
        annotation(RIGHT, updated_at=DAYS[1]),
        annotation(LEFT, updated_at=DAYS[0]),
        annotation(LEFT, by=2, updated_at=DAYS[0]),
        annotation(RIGHT, by=2, updated_at=DAYS[2], was_cancelled=True),
        annotation(LEFT, by=None),
        annotation(RIGHT, by=None),
    )
    found = read(tmp_path, own)
    assert [(j.annotator, j.ranks) for j in found.judgements] == [("1", (2, 1)), (None, (1, 2)), (None, (2, 1))]
    assert (found.counts["superseded"], found.counts["skipped"]) == (2, 1)
    monday, friday = tmp_path / "monday.json", tmp_path / "friday.json"
    monday.write_text(json.dumps([task(annotation(LEFT, updated_at=DAYS[0])), task(annotation(LEFT, by=2), number=2)]))
    later = task(annotation(RIGHT, updated_at=DAYS[2]), annotation(LEFT, by=3, updated_at=DAYS[1]))
    friday.write_text(json.dumps([later]))
    for files in ([monday, friday], [friday, monday]):
        found = read_judgements(files)
        assert {(j.annotator, j.ranks) for j in found.judgements} == {("1", (2, 1)), ("2", (1, 2)), ("3", (1, 2))}
        assert (found.counts["superseded"], found.counts["tasks"]) == (1, 1)
    friday = sheet(tmp_path / "friday.csv", *flat(later))
    assert read_judgements([monday, friday]).counts["superseded"] == 1, "another form of the same"


def test_a_number_a_category_and_an_annotator_that_others_share_are_no_repeats(tmp_path: Path) -> None:
    tasks = [task(annotation(LEFT), data={"prompt": prompt, "answer1": "a", "answer2": "b"}) for prompt in "pq"]
    for rows in (tasks, [found for row in tasks for found in flat(row)]):
        assert [j.prompt for j in read(tmp_path, *rows).judgements] == ["p", "q"], "every server counts from one"
    assert read(tmp_path, *tasks, tasks[0]).counts["superseded"] == 1
    tasks = [task(annotation(LEFT), number=n, data={**DATA, "task": "qa", "prompt": str(n)}) for n in range(3)]
    assert len(read(tmp_path, *tasks).judgements) == 3
    pairs = [{"prompt": f"{n}", "chosen": "c", "rejected": "r", "task": "qa", "annotator": "human"} for n in range(3)]
    assert len(read(tmp_path, *pairs).judgements) == 3
    again = {"prompt": "0", "responses": ["c", "r"], "ranks": [2, 1], "task": "qa", "annotator": "human"}
    found = read(tmp_path, *pairs, again)
    assert (len(found.judgements), found.judgements[-1].ranks, found.counts["superseded"]) == (3, (2, 1), 1)
    by_way_of_pandas = {**again, "task": 7.0, "annotator": 2}, {**again, "task": 7, "annotator": 2.0}
    (numbered,) = read(tmp_path, *by_way_of_pandas).judgements
    assert (numbered.task, numbered.annotator) == ("7", "2"), "whole numbers beside nulls"


@pytest.mark.parametrize(
    ("result", "seconds", "kept"),
    [
        (ranker(["answer1", "answer2", "answer3"]), 1.94, False),
        (ranker(["answer1", "answer2", "answer3"]), 5.0, True),
        (ranker(["answer1", "answer2", "answer3"]), None, True),
        (ranker(["answer2", "answer1", "answer3"]), 1.94, True),
        (LEFT, 1.94, True),
        (control({"selected": "left"}, origin="prediction"), 1.94, False),
        (control({"selected": "left"}, origin="prediction-changed"), 1.94, True),
    ],
)
def test_what_was_submitted_at_once_as_it_was_shown_is_no_label(
    tmp_path: Path, result: Any, seconds: float | None, kept: bool
) -> None:
    row = task(annotation(result, lead_time=seconds))
    what = "the order as shown" if "ranker" in result["value"] else "the prediction unchanged"
    whys = [] if kept else [f"untouched: submitted with {what} after 1.9 s"]
    assert [aside["why"] for aside in read(tmp_path, row, GOOD).rejected] == whys
    assert read(tmp_path, row, untouched_seconds=1.5).rejected == []


# --- Label Studio, an annotation a row


def flat(row: dict[str, Any]) -> list[dict[str, Any]]:
    """A task as its JSON_MIN has it."""
    about = ("created_at", "updated_at", "lead_time")
    return [
        {
            **row["data"],
            "id": row["id"],
            **{result["from_name"]: [result["value"]] for result in given["result"]},
            "annotator": given["completed_by"],
            "annotation_id": given["id"],
            **{key: given.get(key) for key in about},
        }
        for given in row["annotations"]
    ] or [{**row["data"], "id": row["id"], "annotator": None, "annotation_id": None, **dict.fromkeys(about)}]


UNSORTED = ranker({"_": ["answer3", "answer1", "answer2"]}, name="rank")
AS_SHOWN = ranker(["answer1", "answer2", "answer3"], name="rank")
EXPORT = [
    task(annotation(LEFT), annotation(RIGHT, by={"id": 2, "email": "b@example.org"})),
    task(annotation(UNSORTED), number=2, data={**DATA, "task": "b"}),
    task(annotation(AS_SHOWN, lead_time=1.9), number=3, data={**DATA, "task": "c"}),
    task(annotation(), number=4, data={**DATA, "task": "d"}),
    task(annotation(control({"rating": 5}, name="stars")), number=5, data={**DATA, "task": "e"}),
    task(number=6, data={**DATA, "task": "f"}, predictions=[{"result": [LEFT]}], drafts=[{"result": [LEFT]}]),
]


def test_the_flat_exports_say_what_the_whole_one_does(tmp_path: Path) -> None:
    whole = read(tmp_path, *EXPORT)
    assert whole.judgements == [
        Judgement("Why?", ("So.", "No."), (1, 2), "t1", "1"),
        Judgement("Why?", ("So.", "No."), (2, 1), "t1", "b@example.org"),
        Judgement("Why?", ("So.", "No.", "一"), (2, 3, 1), "b", "1"),
    ]
    counts = {"tasks": 6, "judgements": 3, "skipped": 0, "unlabelled": 1, "superseded": 0, "rejected": 3}
    assert whole.counts == counts, "neither a prediction nor a draft is a label"
    assert read(tmp_path, {"data": DATA}, GOOD).counts["unlabelled"] == 1, "a task to import"
    rows = [found for row in EXPORT for found in flat(row)]
    for found in (
        read(tmp_path, *rows),
        read_judgements(sheet(tmp_path / "a.csv", *rows)),
        read_judgements(sheet(tmp_path / "a.tsv", *rows)),
    ):
        assert (found.judgements, found.counts) == (whole.judgements, whole.counts)
        assert [row["why"] for row in found.rejected] == [row["why"] for row in whole.rejected]


# --- sheets

HEADER = "task,prompt,answer1,answer2,answer3,rank1,rank2,rank3"


def write_sheet(path: Path, *lines: str) -> Path:
    path.write_text("\ufeff" + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    return path


def test_a_sheet_filled_in_by_hand(tmp_path: Path) -> None:
    path = write_sheet(
        tmp_path / "sheet.csv", HEADER, "a,'=1+1?,'-two,'@three,'tis,2,1.0,2", "b,p,x,y,z,,,", "c,p,x,y,z,2,,1",
        "d,p,x,y,z,1,,", "e,p,x,y,z,1,first,2", "f,p,x,y,z,1,2", "g,p,x,y,,1,2,3", ",,,,,,,",
    )  # fmt: skip
    found = read_judgements(path)
    assert found.judgements == [
        Judgement("=1+1?", ("-two", "@three", "'tis"), (2, 1, 2), "a"),
        Judgement("p", ("x", "z"), (2, 1), "c"),
    ]
    assert found.counts == {"tasks": 7, "judgements": 2, "skipped": 0, "unlabelled": 1, "superseded": 0, "rejected": 4}
    assert [(row["where"], row["why"].split(";")[0]) for row in found.rejected] == [
        ("line 5", "1 of 3 answers ranked"),
        ("line 6", "'rank2' is 'first', not a number"),
        ("line 7", "7 fields"),
        ("line 8", "rank3 is given to answer3, which is empty"),
    ]
    with pytest.raises(UserError, match=r"no usable label: .*1 unlabelled.*line 3: 2 fields; the header has 8"):
        read_judgements(write_sheet(path, HEADER, "b,p,x,y,z,,,", "c,p"))
    path = write_sheet(path, HEADER.replace(",", ";"), 'a;"p, q";x;y;z;3;2;1')
    assert read_judgements(path).judgements == [Judgement("p, q", ("x", "y", "z"), (3, 2, 1), "a")]
    assert [j.annotator for j in read_judgements([path]).judgements] == [str(path)], "of several, each is an annotator"


# --- faults of rows and of files


def test_a_broken_line_stops_none_of_the_others(tmp_path: Path) -> None:
    good = json.dumps(GOOD)
    path = tmp_path / "a.jsonl"
    broken = {
        '{"prompt": "p", "cho': ("not JSON", {"text": '{"prompt": "p", "cho'}),
        '["x"]': ("a list where an object is needed", {"value": ["x"]}),
        '{"rejected": "r"}': ("'chosen' is missing", {"rejected": "r"}),
        good[:-1] + ', "chosen": "d"}': ("a key occurs twice", {**GOOD, "chosen": "d"}),
        r'{"chosen": "\ud83d", "rejected": "b"}': ("half a character", {"chosen": "?", "rejected": "b"}),
    }
    path.write_text("\n".join((good, *broken, good)))
    found = read_judgements(path)
    assert len(found.judgements) == 2
    assert [row["where"] for row in found.rejected] == [f"line {number}" for number in range(2, 7)]
    for row, (reason, held) in zip(found.rejected, broken.values(), strict=True):
        assert row["why"].startswith(reason)
        assert row["row"] == held
    path.write_text("{\n" * 3)
    with pytest.raises(
        UserError, match=r"a\.jsonl holds no usable label: 3 tasks, .* 3 rejected; line 1: .*3 such rows"
    ):
        read_judgements(path)
    for content in (b"[1\n", good.encode() + b"\n\xff\n", b"[]"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"a\.jsonl(, line \d: not (JSON|UTF-8)| holds no rows)"):
            read_judgements(path)


@pytest.mark.parametrize("depth", [200, 950, 990, 100_000])
def test_lists_in_lists_are_set_aside_or_refused(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "a.jsonl"
    deep = '{"id": 1, "data": {"prompt": %s}, "annotations": [{"result": [{"value": {"ranker": %s}}]}]}\n'
    nested = "[" * depth + "]" * depth
    path.write_text(deep % (nested, nested) + json.dumps(GOOD) + "\n")
    found = read_judgements(path)
    assert len(found.judgements) == len(found.rejected) == 1
    json.dumps(found.rejected)
    rows = [row | {"note": nested[:50_000]} for row in flat(EXPORT[0])]
    path = sheet(tmp_path / "a.csv", *rows, *flat(EXPORT[1]))
    assert {j.task for j in read_judgements(path).judgements} >= {"b"}, "a cell of JSON is set aside with its row"


# --- oddities at random

ODD = (
    None, True, 0, -1, 1.5, 1e300, float("nan"), "", "left", "_", "\ud800", "[1", '{"a": 1}', [], [[]], {},
    {"id": None}, {"id": "answer1", "body": 3}, [{"id": 1}, {"id": 1}], ["answer1"], {"ranker": 3},
    {"selected": ["left"]}, [{"selected": "left"}], "x" * 300, CHAT, CHAT[1:], [{"role": "system", "content": ""}],
)  # fmt: skip


def places(node: Any) -> Iterator[tuple[Any, Any]]:
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        yield node, key
        yield from places(value)


def mutate(rows: Any, rng: random.Random) -> Any:
    rows = copy.deepcopy(rows)
    for _ in range(rng.randint(1, 6)):
        node, key = rng.choice(list(places(rows)) or [([0], 0)])
        how = rng.random()
        if how < 0.6:
            node[key] = copy.deepcopy(rng.choice(ODD))
        elif how < 0.8:
            del node[key]
        else:
            other, place = rng.choice(list(places(rows)) or [([0], 0)])
            node[key] = copy.deepcopy(other[place])
    return rows


def test_whatever_stands_in_a_file_only_user_errors_come_of_it(tmp_path: Path) -> None:
    """What is read of mutated rows can be settled and written down."""
    rng, path, outcomes = random.Random("odd"), tmp_path / "odd.json", Counter[bool]()
    minified = [found for row in EXPORT for found in flat(row)]
    for rows in [EXPORT, minified, [row for row, _ in FORMS]] * 120:
        path.write_text(json.dumps(mutate(rows, rng)))
        buckets = rng.choice([None, ["better", "worse"], ["_", "better", "worse"]])
        try:
            found = read_judgements(path, rng.choice([None, {"prompt": "prompt"}, {"label": "choice"}]), buckets)
        except UserError:
            outcomes[False] += 1
            continue
        outcomes[True] += 1
        json.dumps(found.rejected, ensure_ascii=False, allow_nan=False).encode()
        settled, summary = combine_judgements(found.judgements)
        json.dumps([repr(settled), summary], ensure_ascii=False, allow_nan=False).encode()
    assert outcomes[True] > 100, "some are still read"
    assert outcomes[False] > 10


# --- the real exports


def real(shared: Path, name: str) -> Path:
    return shared / "data" / "preferences" / "label_studio" / name


def test_real_pairwise_export(shared: Path) -> None:
    found = read_judgements(real(shared, "pairwise_export.json"))
    assert Counter(judgement.ranks for judgement in found.judgements) == {(1, 2): 18, (2, 1): 14}
    assert ({judgement.annotator for judgement in found.judgements}, found.rejected) == ({"2"}, [])
    raw = json.loads(real(shared, "pairwise_export.json").read_text(encoding="utf-8"))[0]["data"]
    assert (found.judgements[0].prompt, found.judgements[0].answers) == (
        raw["prompt"],
        (raw["answer1"], raw["answer2"]),
    )
    for unlabelled in ("pairwise_import.json", "ranker_doc_example.json"):
        with pytest.raises(UserError, match="no usable label"):
            read_judgements(real(shared, unlabelled))


def test_real_exports_of_label_studio(shared: Path) -> None:
    pairs = read_judgements(real(shared, "ls_export_pairwise.json"))
    assert [(j.task, j.answers, j.ranks) for j in pairs.judgements] == [
        ("10", ("first answer", "second answer"), (1, 2))
    ]
    assert [(row["task"], row["why"]) for row in pairs.rejected] == [
        ("11", "untouched: submitted with the prediction unchanged after 2.2 s"),
        ("14", NOTHING),
    ]
    ranked = read_judgements(real(shared, "ls_export_ranker.json"))
    assert [(j.task, j.ranks) for j in ranked.judgements] == [("8", (2, 1, 3, 4))]
    assert [(row["task"], row["why"][:9]) for row in ranked.rejected] == [("9", "untouched"), ("12", "untouched")]
    assert ranked.counts["skipped"] == 1
    buckets = read_judgements(real(shared, "ls_export_ranker_buckets.json"))
    assert [(j.task, j.ranks) for j in buckets.judgements] == [("5", (1, 3, 2, 3)), ("6", (1, 2, 2, 2))]
