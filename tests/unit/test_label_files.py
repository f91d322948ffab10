"""Files of labels: Label Studio's exports, sheets and ranked lists; what is set aside; nothing odd breaks it."""

import copy
import csv
import json
import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from rlhf_pipeline.data.agreement import settle
from rlhf_pipeline.data.formats import Judged, read_judgements
from rlhf_pipeline.data.records import Judgement, Preference, Turn
from rlhf_pipeline.errors import UserError

DATA = {
    "task": "t1",
    "prompt": "Why?",
    "items": [{"id": f"answer{n}", "title": str(n), "body": text} for n, text in enumerate(("So.", "No.", "一"), 1)],
    "answer1": "So.",
    "answer2": "No.",
    "answer3": "一",
}


def control(value: dict[str, Any], name: str = "choice", origin: str = "manual") -> dict[str, Any]:
    return {"value": value, "id": "x", "from_name": name, "to_name": "items", "type": "some", "origin": origin}


def ranker(value: Any, **options: str) -> dict[str, Any]:
    return control({"ranker": value}, **options)


LEFT, RIGHT = control({"selected": "left"}), control({"selected": "right"})


def annotation(*results: Any, by: Any = 1, **fields: Any) -> dict[str, Any]:
    about = {"was_cancelled": False, "lead_time": 30.0, "updated_at": "2026-01-01T00:00:00Z", "parent_prediction": None}
    return {"id": 1, "completed_by": by, "result": list(results), "prediction": {}, **about, **fields}


def task(*annotations: Any, number: int = 1, data: Any = DATA, **fields: Any) -> dict[str, Any]:
    return {"id": number, "annotations": list(annotations), "drafts": [], "predictions": [], "data": data, **fields}


def read(folder: Path, *rows: Any, **options: Any) -> Judged:
    path = folder / "labels.json"
    path.write_text(json.dumps(list(rows)), encoding="utf-8")
    return read_judgements(path, **options)


def why(folder: Path, row: Any, **options: Any) -> str:
    """Why a row is set aside, a good one beside it."""
    (aside,) = read(folder, row, task(annotation(LEFT, by="good"), number=99), **options).rejected
    return str(aside["why"])


def order(found: Judged) -> list[list[str]]:
    """The answers of each judgement, best first, as the texts that tie."""
    return [
        ["".join(a for a, r in zip(j.answers, j.ranks, strict=True) if r == rank) for rank in sorted(set(j.ranks))]
        for j in found.judgements
    ]


# --- Label Studio, JSON


def test_a_pairwise_annotation_is_a_judgement_of_the_first_two_answers(tmp_path: Path) -> None:
    found = read(tmp_path, task(annotation(LEFT), annotation(RIGHT, by={"id": 2, "email": "b@example.org"})))
    assert found.judgements == [
        Judgement("Why?", ("So.", "No."), (1, 2), "t1", "1"),
        Judgement("Why?", ("So.", "No."), (2, 1), "t1", "b@example.org"),
    ]
    chat = [{"role": "user", "content": "Hi?"}]
    for first, second in (
        ("answer_1", "answer_2"),
        ("response1", "response2"),
        ("left", "right"),
        ("text_a", "text_b"),
    ):
        (only,) = read(tmp_path, task(annotation(RIGHT), data={"messages": chat, first: "a", second: "b"})).judgements
        assert only == Judgement((Turn("user", "Hi?"),), ("a", "b"), (2, 1), "1", "1")
    mapped = {"prompt": "q", "answer1": "good", "answer2": "bad"}
    (only,) = read(
        tmp_path, task(annotation(LEFT), data={"q": "?", "good": "a", "bad": "b"}), columns=mapped
    ).judgements
    assert only == Judgement("?", ("a", "b"), (1, 2), "1", "1")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (["answer3", "answer1", "answer2"], ["一", "So.", "No."]),
        (["answer3", "answer1"], ["一", "So."]),
        ({"choice": ["answer3", "answer1", "answer2"]}, ["一", "So.", "No."]),
        ({"rank": ["answer2", "answer1", "answer3"]}, ["No.", "So.", "一"]),
        ({"_": ["answer2", "answer1", "answer3"]}, ["No.", "So.", "一"]),
        ({"better": ["answer3"], "_": ["answer2"], "worse": ["answer1"]}, ["一", "No.", "So."]),
        ({"Worst": ["answer3"], "Best": [], "Good": ["answer2", "answer1"]}, ["So.No.", "一"]),
        ({"better": ["answer1"], "worse": [], "_": ["answer2", "answer3"]}, ["So.", "No.一"]),
    ],
)
def test_a_ranker_in_all_its_shapes(tmp_path: Path, value: Any, expected: list[str]) -> None:
    found = read(tmp_path, task(annotation(ranker(value))))
    assert order(found) == [expected]
    shown = [text for text in ("So.", "No.", "一") if text in found.judgements[0].answers]
    assert list(found.judgements[0].answers) == shown


def test_buckets_of_ones_own_need_their_order(tmp_path: Path) -> None:
    row = task(annotation(ranker({"ads": ["answer1"], "useful": ["answer3"], "_": ["answer2"]})))
    assert "no order is known of the buckets ads, useful, _; say data.buckets=[..], best first" in why(tmp_path, row)
    assert order(read(tmp_path, row, buckets=["useful", "ads"])) == [["一", "So."]], "what is unsorted has no place"
    assert order(read(tmp_path, row, buckets=["useful", "_", "ads"])) == [["一", "No.", "So."]]
    row = task(annotation(ranker({"good": ["answer1"], "chosen": ["answer3"], "bad": ["answer2"]})))
    assert "no order is known" in why(tmp_path, row), "good and chosen: which is better?"
    for wrong in (["one"], ["one", "one"]):
        with pytest.raises(UserError, match=r"data\.buckets is .* two or more different names"):
            read(tmp_path, row, buckets=wrong)


def test_items_are_looked_up_by_id_then_body_then_title_then_in_the_data(tmp_path: Path) -> None:
    items = [{"id": 1, "title": "one"}, {"id": 2, "title": "-", "body": "two"}, {"id": 4, "html": "<b>4</b>"}]
    data = {"prompt": "", "list": items, "third": "three"}
    found = read(tmp_path, task(annotation(ranker([2, "1", "third", 4])), data=data))
    assert order(found) == [["two", "one", "three", "<b>4</b>"]]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (task(annotation()), "nothing selected"),
        (
            task(annotation(control({"choices": ["x"]}), control({"rating": 4}))),
            "the results are of Rating, Choices; a comparison takes the tag Pairwise or Ranker",
        ),
        (
            task(annotation(ranker({"better": [], "_": ["answer1", "answer2"]}))),
            "nothing selected: all is left unsorted",
        ),
        (task(annotation(control({"selected": "both"}))), "'selected' is neither left nor right"),
        (task(annotation(LEFT, control({"selected": "right"}, name="safety"))), "2 labels in one, by choice, safety"),
        (task(annotation(ranker(["answer1", "answer9"]))), "'answer9' is the id of no answer, or of two"),
        (task(annotation(ranker(["answer1", "answer1"]))), "'answer1' is ranked twice"),
        (task(annotation(ranker(["answer1"]))), "1 of 1 answers ranked; it takes two or more"),
        (task(annotation(ranker(["answer1", {"id": "answer2"}]))), "'ranker' holds what is no id"),
        (task(annotation(ranker({"better": "answer1", "worse": ["answer2"]}))), "'ranker' is neither a list of ids"),
        (task(annotation(LEFT), data={**DATA, "answer2": 3}), "'answer2' is a number, not text"),
        (
            task(annotation(LEFT), data={"prompt": "p", "one": "a", "two": "b"}),
            "no answers such as answer1 and answer2",
        ),
        (
            task(annotation(LEFT), data={"poem": "p", "answer1": "a", "answer2": "b"}),
            "no prompt among poem; data.columns",
        ),
        (task(annotation(LEFT), data=["answer1"]), "a task needs a list of annotations and an object as data"),
        (task(annotation(LEFT), data={**DATA, "answer2": None}), "'answer2' is blank"),
        (task("left"), "an annotation is not an object"),
        (task(annotation(LEFT), data={**DATA, "prompt": "\ud800"}), "half a character"),
    ],
)
def test_what_cannot_be_believed_is_set_aside_with_a_plain_reason(tmp_path: Path, row: Any, reason: str) -> None:
    assert why(tmp_path, row).startswith(reason)


def test_a_row_set_aside_can_be_mended_and_read_again(tmp_path: Path) -> None:
    found = read(tmp_path, task(annotation(LEFT, by="x"), annotation(by="y")))
    (aside,) = found.rejected
    about = {
        "file": str(tmp_path / "labels.json"),
        "line": 1,
        "task": "t1",
        "annotator": "y",
        "why": "nothing selected",
    }
    assert {key: value for key, value in aside.items() if key != "row"} == about
    aside["row"]["annotations"][0]["result"] = [RIGHT]
    assert [j.annotator for j in read(tmp_path, aside["row"]).judgements] == ["y"]


def test_which_of_two_controls_is_the_label_can_be_said(tmp_path: Path) -> None:
    row = task(annotation(LEFT, control({"selected": "right"}, name="safety")))
    assert order(read(tmp_path, row, columns={"label": "safety"})) == [["No.", "So."]]
    with pytest.raises(UserError, match="nothing selected by 'taste'"):
        read(tmp_path, row, columns={"label": "taste"})


def test_skipped_unlabelled_predicted_and_drafted_make_no_judgement(tmp_path: Path) -> None:
    found = read(
        tmp_path,
        task(annotation(LEFT)),
        task(annotation(LEFT, was_cancelled=True), number=2, data={**DATA, "task": "t2"}),
        task(number=3, data={**DATA, "task": "t3"}, predictions=[{"result": [LEFT]}], drafts=[{"result": [LEFT]}]),
        {"data": {**DATA, "task": "t4"}},
    )
    assert len(found.judgements) == 1
    assert found.rejected == []
    counts = {"tasks": 4, "judgements": 1, "skipped": 1, "unlabelled": 2, "superseded": 0, "rejected": 0}
    assert found.counts == counts


def test_the_newest_word_of_a_person_counts(tmp_path: Path) -> None:
    days = [f"2026-01-0{day}T00:00:00Z" for day in range(1, 5)]
    found = read(
        tmp_path,
        task(
            annotation(RIGHT, updated_at=days[2]),
            annotation(LEFT, updated_at=days[0]),
            annotation(LEFT, by=2, updated_at=days[0]),
            annotation(RIGHT, by=2, updated_at=days[1], was_cancelled=True),
            annotation(LEFT, by=None),
            annotation(RIGHT, by=None),
        ),
    )
    assert [(j.annotator, j.ranks) for j in found.judgements] == [("1", (2, 1)), (None, (1, 2)), (None, (2, 1))]
    assert (found.counts["superseded"], found.counts["skipped"]) == (2, 1)


def test_two_servers_count_their_tasks_and_people_from_one(tmp_path: Path) -> None:
    tasks = [task(annotation(LEFT), data={"prompt": prompt, "answer1": "a", "answer2": "b"}) for prompt in "pq"]
    assert [j.prompt for j in read(tmp_path, *tasks).judgements] == ["p", "q"], "exports put together"
    assert [j.prompt for j in read(tmp_path, *(found for row in tasks for found in flat(row))).judgements] == ["p", "q"]
    own = [task(annotation(LEFT), data={"q": prompt, "x": "a", "y": "b"}) for prompt in "pq"]
    columns = {"prompt": "q", "answer1": "x", "answer2": "y"}
    assert len(read(tmp_path, *own, columns=columns).judgements) == 2
    assert read(tmp_path, *own, own[0], columns=columns).counts["superseded"] == 1


def test_the_newest_word_counts_in_several_files_too(tmp_path: Path) -> None:
    days = [f"2026-01-0{day}T00:00:00Z" for day in range(1, 4)]
    monday, friday = tmp_path / "monday.json", tmp_path / "friday.json"
    monday.write_text(json.dumps([task(annotation(LEFT, updated_at=days[0])), task(annotation(LEFT, by=2), number=2)]))
    later = task(annotation(RIGHT, updated_at=days[2]), annotation(LEFT, by=3, updated_at=days[1]))
    friday.write_text(json.dumps([later]))
    for files in ([monday, friday], [friday, monday]):
        found = read_judgements(files)
        assert {(j.annotator, j.ranks) for j in found.judgements} == {("1", (2, 1)), ("2", (1, 2)), ("3", (1, 2))}
        assert (found.counts["superseded"], found.counts["tasks"]) == (1, 1)
    write_csv(tmp_path / "friday.csv", flat(later))
    assert read_judgements([monday, tmp_path / "friday.csv"]).counts["superseded"] == 1, "another form of the same"
    friday.write_text("[]")
    with pytest.raises(UserError, match=r"friday\.json holds no rows"):
        read_judgements([monday, friday])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("2026-01-01T00:00:00Z", "2026-01-01T00:00:00.5Z"),
        ("2026-01-01T08:00:00.000001+08:00", "2026-01-01T00:00:01Z"),
        ("", "2026-01-01T00:00:00Z"),
    ],
)
def test_the_newest_is_told_by_the_time_not_by_how_it_is_written(tmp_path: Path, first: str, second: str) -> None:
    row = task(annotation(RIGHT, updated_at=second), annotation(LEFT, updated_at=first))
    assert [j.ranks for j in read(tmp_path, row).judgements] == [(2, 1)]


@pytest.mark.parametrize(
    ("result", "about", "kept"),
    [
        (ranker(["answer1", "answer2", "answer3"]), {"lead_time": 1.94}, False),
        (ranker(["answer1", "answer2", "answer3"]), {"lead_time": 5.0}, True),
        (ranker(["answer1", "answer2", "answer3"]), {"lead_time": None}, True),
        (ranker(["answer2", "answer1", "answer3"]), {"lead_time": 1.94}, True),
        (LEFT, {"lead_time": 1.94}, True),
        (control({"selected": "left"}, origin="prediction"), {"lead_time": 1.94, "parent_prediction": 7}, False),
        (control({"selected": "left"}, origin="prediction-changed"), {"lead_time": 1.94, "parent_prediction": 7}, True),
    ],
)
def test_what_was_submitted_at_once_as_it_was_shown_is_no_label(
    tmp_path: Path, result: Any, about: dict[str, Any], kept: bool
) -> None:
    row = task(annotation(result, **about))
    if kept:
        assert read(tmp_path, row).rejected == []
    else:
        what = "the order as shown" if "ranker" in result["value"] else "the prediction as it stood"
        assert why(tmp_path, row) == f"untouched: {what}, after 1.9 s"
        assert read(tmp_path, row, untouched_seconds=1.5).rejected == []


def test_of_a_prediction_what_was_shown_is_what_it_says(tmp_path: Path) -> None:
    predicted = {"id": 7, "result": [ranker({"choice": ["answer3", "answer2", "answer1"]})]}

    def submitted(*ids: str, **about: Any) -> dict[str, Any]:
        return task(annotation(ranker(list(ids), origin="prediction"), lead_time=2, parent_prediction=7, **about))

    same, other = ("answer3", "answer2", "answer1"), ("answer1", "answer2", "answer3")
    assert why(tmp_path, submitted(*same, prediction=predicted)) == "untouched: the order as shown, after 2.0 s"
    assert why(tmp_path, {**submitted(*same), "predictions": [predicted]}).startswith("untouched")
    assert order(read(tmp_path, submitted(*other, prediction=predicted))) == [["So.", "No.", "一"]]
    moved = task(annotation(ranker(list(same), origin="prediction-changed"), lead_time=2, parent_prediction=7))
    assert read(tmp_path, {**moved, "predictions": [{**predicted, "id": 8}]}).rejected == [], "another one's order"


# --- Label Studio, an annotation a row


def flat(row: dict[str, Any], **data: str) -> list[dict[str, Any]]:
    """A task as its JSON_MIN has it."""
    about = ("created_at", "updated_at", "lead_time")
    return [
        {
            **{data.get(key, key): value for key, value in row["data"].items()},
            "id": row["id"],
            **{result["from_name"]: [result["value"]] for result in given["result"]},
            "annotator": given["completed_by"],
            "annotation_id": given["id"],
            **{key: given.get(key) for key in about},
        }
        for given in row["annotations"]
        if not given["was_cancelled"]
    ] or [{**row["data"], "id": row["id"], "annotator": None, "annotation_id": None, **dict.fromkeys(about)}]


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Rows as Label Studio's converter writes them: sorted columns, all text quoted, lists and objects as JSON."""
    with path.open("w", encoding="utf-8", newline="") as file:
        names = sorted({key for row in rows for key in row})
        writer = csv.DictWriter(
            file, names, quoting=csv.QUOTE_NONNUMERIC, delimiter="\t" if path.suffix == ".tsv" else ","
        )
        writer.writeheader()
        for row in rows:
            cells = {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for k, v in row.items()}
            writer.writerow(cells)
    return path


EXPORT = [
    task(annotation(LEFT), annotation(RIGHT, by=2)),
    task(
        annotation(ranker({"_": ["answer3", "answer1", "answer2"]}, name="rank")), number=2, data={**DATA, "task": "b"}
    ),
    task(
        annotation(ranker(["answer1", "answer2", "answer3"], name="rank"), lead_time=1.9),
        number=3,
        data={**DATA, "task": "c"},
    ),
    task(annotation(), number=4, data={**DATA, "task": "d"}),
    task(number=5, data={**DATA, "task": "e"}),
]


def test_the_flat_exports_say_what_the_whole_one_does(tmp_path: Path) -> None:
    whole = read(tmp_path, *EXPORT)
    assert [(len(whole.judgements)), whole.counts["unlabelled"], whole.counts["rejected"]] == [3, 1, 2]
    rows = [found for row in EXPORT for found in flat(row)]
    for found in (
        read(tmp_path, *rows),
        read_judgements(write_csv(tmp_path / "a.csv", rows)),
        read_judgements(write_csv(tmp_path / "a.tsv", rows)),
    ):
        assert found.judgements == whole.judgements
        assert found.counts == whole.counts
        assert [row["why"] for row in found.rejected] == [row["why"] for row in whole.rejected]


@pytest.mark.parametrize(
    ("cells", "reason"),
    [
        ({"r1": [{"rating": 5}], "r2": '[{"rating": 2}]'}, "the results are of Rating; a comparison takes the tag"),
        ({"better": "the first"}, "nothing selected by Pairwise or Ranker; other columns are better"),
        ({}, "nothing selected"),
    ],
)
def test_a_flat_row_without_a_comparison_names_what_it_holds(
    tmp_path: Path, cells: dict[str, Any], reason: str
) -> None:
    row = {"prompt": "p", "answer1": "a", "answer2": "b", **cells, "annotation_id": 3, "id": 8}
    found = why(tmp_path, row)
    assert found.startswith(reason)
    assert (found == "nothing selected") == (not cells)


def test_stars_of_a_prediction_are_not_taken_for_the_annotators(tmp_path: Path) -> None:
    stars = {"id": 7, "result": [control({"rating": 5}, name="stars")]}
    row = task(annotation(LEFT, lead_time=1.0, parent_prediction=7), predictions=[stars])
    assert len(read(tmp_path, row).judgements) == 1


def test_an_annotator_may_be_an_object(tmp_path: Path) -> None:
    row = {"prompt": "p", "answer1": "a", "answer2": "b", "annotation_id": 3, "id": 8, "which": "left"}
    for by in ({"id": 2, "email": "b@example.org"}, '{"email": "b@example.org"}', "b@example.org"):
        assert [j.annotator for j in read(tmp_path, {**row, "annotator": by}).judgements] == ["b@example.org"]


@pytest.mark.parametrize("value", ["left", {"selected": "left"}, [{"selected": "left"}], '[{"selected": "left"}]'])
def test_a_flat_label_is_found_by_what_it_is(tmp_path: Path, value: Any) -> None:
    row = {
        "prompt": "left or right?",
        "answer1": "right",
        "answer2": "left",
        "which": value,
        "annotation_id": 3,
        "id": 8,
    }
    assert read(tmp_path, row).judgements == [Judgement("left or right?", ("right", "left"), (1, 2), "8")]


@pytest.mark.parametrize(
    "value", [["answer2", "answer1"], {"rank": ["answer2", "answer1"]}, {"good": ["answer2"], "bad": ["answer1"]}]
)
def test_a_flat_ranking_is_found_by_its_ids(tmp_path: Path, value: Any) -> None:
    row = {**DATA, "tags": ["x", "y"], "rank": value, "annotation_id": 3, "id": 8}
    assert order(read(tmp_path, row)) == [["No.", "So."]]


def test_a_control_with_the_name_of_a_column_leaves_the_data_whole(tmp_path: Path) -> None:
    row = task(annotation(control({"selected": "right"}, name="prompt")))
    path = write_csv(tmp_path / "a.csv", flat(row, prompt="_data_prompt"))
    assert read_judgements(path).judgements == read(tmp_path, row).judgements


# --- sheets and ranked lists


def write_sheet(path: Path, *lines: str, mark: str = "\ufeff") -> Path:
    path.write_text(mark + "\r\n".join(lines) + "\r\n", encoding="utf-8", newline="")
    return path


HEADER = "task,prompt,answer1,answer2,answer3,rank1,rank2,rank3"


def test_a_sheet_filled_in_by_hand(tmp_path: Path) -> None:
    path = write_sheet(
        tmp_path / "sheet.csv",
        HEADER,
        "a,'=1+1?,'-two,'@three,'tis,2,1.0,2",
        "b,p,x,y,z,,,",
        "c,p,x,y,z,2,,1",
        "d,p,x,y,z,1,,",
        "e,p,x,y,z,1,first,2",
        "f,p,x,y,z,1,2",
        ",,,,,,,",
    )
    found = read_judgements(path)
    assert found.judgements == [
        Judgement("=1+1?", ("-two", "@three", "'tis"), (2, 1, 2), "a"),
        Judgement("p", ("x", "z"), (2, 1), "c"),
    ]
    assert found.counts == {"tasks": 6, "judgements": 2, "skipped": 0, "unlabelled": 1, "superseded": 0, "rejected": 3}
    assert [(row["line"], row["why"].split(";")[0]) for row in found.rejected] == [
        (5, "1 of 3 answers ranked"),
        (6, "'rank2' is 'first', not a number"),
        (7, "7 fields"),
    ]
    with pytest.raises(UserError, match=r"no usable label: .*1 unlabelled.*line 3: 2 fields; the header has 8"):
        read_judgements(write_sheet(path, HEADER, "b,p,x,y,z,,,", "c,p"))


def test_a_rank_for_an_answer_that_is_not_there_is_set_aside(tmp_path: Path) -> None:
    found = read_judgements(write_sheet(tmp_path / "a.csv", HEADER, "a,p,x,y,,1,2,3", "b,p,x,y,,1,2,"))
    assert found.judgements == [Judgement("p", ("x", "y"), (1, 2), "b")]
    assert [row["why"] for row in found.rejected] == ["rank3 is given to answer3, which is empty"]


def test_a_sheet_saved_with_semicolons(tmp_path: Path) -> None:
    path = write_sheet(tmp_path / "a.csv", HEADER.replace(",", ";"), 'a;"p, q";x;y;z;3;2;1', mark="")
    assert read_judgements(path).judgements == [Judgement("p, q", ("x", "y", "z"), (3, 2, 1), "a")]


def test_ranked_lists_with_and_without_ranks(tmp_path: Path) -> None:
    row = {"prompt": "p", "responses": ["x", "y", "z"]}
    by = {"task": "t", "annotator": "me"}
    found = read(
        tmp_path, row, {**row, "ranks": [3, 1, 3], **by}, {**row, "ranks": [2, None, 1]},
        {**row, "ranks": [1, 2, 3], **by}, {**row, "ranks": [1, 2]}, {**row, "ranks": [1, 2, float("nan")]},
        {**row, "ranks": [1, 2, 10**400]}, {"ranked": "xy"},
    )  # fmt: skip
    assert found.judgements == [
        Judgement("p", ("x", "y", "z"), (1, 2, 3)),
        Judgement("p", ("x", "z"), (2, 1)),
        Judgement("p", ("x", "y", "z"), (1, 2, 3), "t", "me"),  # said after (3, 1, 3)
    ]
    assert found.counts["superseded"] == 1
    assert [row["why"].split(";")[0] for row in found.rejected] == [
        "'ranks' is not a list of 3 numbers, one to each response",
        "'ranks' is 'nan', not a number",
        f"'ranks' is {'1' + '0' * 39!r}, not a number",
        "'ranked' is not a list of 2 or more texts",
    ]


def test_ranked_lists_in_a_sheet_stand_as_json(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,responses,ranks\np,"[""x"", ""[1]""]","[2, 1]"\nq,"[""x"", ""y""]",\n')
    found = read_judgements(tmp_path / "a.csv")
    assert found.judgements == [Judgement("p", ("x", "[1]"), (2, 1)), Judgement("q", ("x", "y"), (1, 2))]


def test_a_category_and_one_annotator_for_all_are_no_repeats(tmp_path: Path) -> None:
    tasks = [task(annotation(LEFT), number=n, data={**DATA, "task": "qa", "prompt": str(n)}) for n in range(3)]
    assert len(read(tmp_path, *tasks).judgements) == 3
    assert len(read(tmp_path, *(found for row in tasks for found in flat(row))).judgements) == 3
    rows = [{"prompt": f"{n}", "chosen": "c", "rejected": "r", "task": "qa", "annotator": "human"} for n in range(3)]
    assert len(read(tmp_path, *rows).judgements) == 3


# --- faults of rows and of files


def test_a_broken_line_stops_none_of_the_others(tmp_path: Path) -> None:
    good = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"})
    path = tmp_path / "a.jsonl"
    path.write_text(f'{good}\n{{"prompt": "p", "cho\n["x"]\n{good}\n{{"rejected": "r"}}\n')
    found = read_judgements(path)
    assert len(found.judgements) == 2
    assert [(row["line"], row["row"]) for row in found.rejected] == [
        (2, {"text": '{"prompt": "p", "cho'}),
        (3, {"value": ["x"]}),
        (5, {"rejected": "r"}),
    ]
    assert "not JSON" in found.rejected[0]["why"]
    path.write_text("[1\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line \d: not JSON"):
        read_judgements(path)
    path.write_text("{\n")
    with pytest.raises(UserError, match=r"a\.jsonl holds no usable label: .*1 rejected; line 1: not JSON"):
        read_judgements(path)
    path.write_bytes(good.encode() + b"\n\xff\n")
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        read_judgements(path)


def test_a_file_with_nothing_usable_says_why_and_how_often(tmp_path: Path) -> None:
    rows = [task(annotation(by=n), number=n, data={**DATA, "task": str(n)}) for n in range(1, 4)]
    with pytest.raises(UserError) as caught:
        read(tmp_path, *rows, task(annotation(LEFT, was_cancelled=True), number=9))
    assert str(caught.value) == (
        f"{tmp_path / 'labels.json'} holds no usable label: 4 tasks, 0 judgements, 1 skipped, 0 unlabelled, "
        "0 superseded, 3 rejected; line 1: nothing selected (3 such rows)."
    )


@pytest.mark.parametrize("depth", [200, 950, 990, 100_000])
def test_lists_in_lists_are_set_aside_or_refused(tmp_path: Path, depth: int) -> None:
    path = tmp_path / "a.jsonl"
    deep = '{"id": 1, "data": {"prompt": %s}, "annotations": [{"result": [{"value": {"ranker": %s}}]}]}\n'
    nested = "[" * depth + "]" * depth
    path.write_text(deep % (nested, nested) + json.dumps({"prompt": "p", "chosen": "c", "rejected": "r"}) + "\n")
    found = read_judgements(path)
    assert len(found.judgements) == len(found.rejected) == 1
    json.dumps(found.rejected)
    path = write_csv(tmp_path / "a.csv", [row | {"note": nested[:50_000]} for row in flat(EXPORT[0])] + flat(EXPORT[1]))
    found = read_judgements(path)
    assert {j.task for j in found.judgements} >= {"b"}, "a cell of JSON is set aside with its row"


# --- oddities at random

ODD = (
    None, True, 0, -1, 1.5, 1e300, float("nan"), "", "left", "_", "\ud800", "[1", '{"a": 1}', [], [[]], {},
    {"id": None}, {"id": "answer1", "body": 3}, [{"id": 1}, {"id": 1}], ["answer1"], {"ranker": 3},
    {"selected": ["left"]}, [{"selected": "left"}], "x" * 300,
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
            other, place = rng.choice(list(places(rows)))
            node[key] = copy.deepcopy(other[place])
    return rows


PLAIN = [
    {"prompt": "p", "chosen": "c", "rejected": "r", "margin": 1},
    {
        "prompt": [{"role": "user", "content": "a"}],
        "responses": ["a", "b"],
        "ranks": [1, 2],
        "task": "t",
        "annotator": "x",
    },
    {"task": "t", "prompt": "p", "answer1": "a", "answer2": "b", "rank1": "1", "rank2": "2"},
    {"winner": "x", "x": "1", "y": "2"},
    {"context": [{"role": "user", "text": "x"}], "prompt": "p", "responses": ["a", "b"]},
    {"conversations": [{"from": "human", "value": "x"}], "chosen": "c", "rejected": "d"},
]


def check_never_breaks(path: Path, rows: Any, rng: random.Random) -> bool:
    """Whether mutated rows were read; whatever comes of them can be settled and written down."""
    path.write_text(json.dumps(mutate(rows, rng)))
    buckets = rng.choice([None, ["better", "worse"], ["_", "better", "worse"]])
    try:
        found = read_judgements(path, rng.choice([None, {"prompt": "prompt"}, {"label": "choice"}]), buckets)
    except UserError:
        return False
    json.dumps(found.rejected, ensure_ascii=False, allow_nan=False).encode()
    settled, summary = settle(found.judgements)
    json.dumps([repr(settled), summary], ensure_ascii=False, allow_nan=False).encode()
    return True


def test_whatever_stands_in_a_file_only_user_errors_come_of_it(tmp_path: Path) -> None:
    rng = random.Random("odd")
    minified = [found for row in EXPORT for found in flat(row)]
    outcomes = Counter(check_never_breaks(tmp_path / "odd.json", r, rng) for r in [EXPORT, minified, PLAIN] * 250)
    assert outcomes[True] > 200, "some are still read"
    assert outcomes[False] > 20


# --- the real exports


def real(shared: Path, name: str) -> Path:
    return shared / "data" / "preferences" / "label_studio" / name


def test_real_pairwise_export(shared: Path) -> None:
    found = read_judgements(real(shared, "pairwise_export.json"))
    assert Counter(judgement.ranks for judgement in found.judgements) == {(1, 2): 18, (2, 1): 14}
    assert {judgement.annotator for judgement in found.judgements} == {"2"}
    assert found.rejected == []
    rows, summary = settle(found.judgements)
    assert (len(rows), summary["pairs"], summary["tasks"]) == (32, 32, 32)
    raw = json.loads(real(shared, "pairwise_export.json").read_text(encoding="utf-8"))[0]["data"]
    assert rows[0] == Preference(raw["prompt"], raw["answer1"], raw["answer2"])
    with pytest.raises(UserError, match="32 unlabelled, 0 superseded, 0 rejected"):
        read_judgements(real(shared, "pairwise_import.json"))
    with pytest.raises(UserError, match="no usable label"):
        read_judgements(real(shared, "ranker_doc_example.json"))


def test_real_exports_of_label_studio(shared: Path) -> None:
    pairs = read_judgements(real(shared, "ls_export_pairwise.json"))
    assert [(j.task, j.answers, j.ranks) for j in pairs.judgements] == [
        ("10", ("first answer", "second answer"), (1, 2))
    ]
    assert [(row["task"], row["why"]) for row in pairs.rejected] == [
        ("11", "untouched: the prediction as it stood, after 2.2 s"),
        ("14", "nothing selected"),
    ]
    ranked = read_judgements(real(shared, "ls_export_ranker.json"))
    assert [(j.task, j.ranks) for j in ranked.judgements] == [("8", (2, 1, 3, 4))]
    assert [(row["task"], row["why"]) for row in ranked.rejected] == [
        ("9", "untouched: the order as shown, after 1.9 s"),
        ("12", "untouched: the order as shown, after 1.9 s"),
    ]
    assert ranked.counts["skipped"] == 1
    buckets = read_judgements(real(shared, "ls_export_ranker_buckets.json"))
    assert [(j.task, j.ranks) for j in buckets.judgements] == [("5", (1, 3, 2, 3)), ("6", (1, 2, 2, 2))]
    assert settle(buckets.judgements)[1]["pairs"] == 5 + 3


def test_the_documented_forms_of_a_ranker(shared: Path, tmp_path: Path) -> None:
    known = json.loads(real(shared, "ranker_doc_example.json").read_text(encoding="utf-8"))
    data = {**known["task_data"], "prompt": "arrow"}
    bodies = {item["id"]: item["body"] for item in data["items"]}
    for form in ("result_flat", "result_nested"):
        assert order(read(tmp_path, task(annotation(known[form]), data=data))) == [
            [bodies["mdn"], bodies["wiki"], bodies["blog"]]
        ]
    row = task(annotation(known["result_buckets"]), data=data)
    assert "say data.buckets" in why(tmp_path, row)
    assert order(read(tmp_path, row, buckets=["best", "ads"])) == [[bodies["mdn"], bodies["blog"]]]


def test_real_exports_mutated_at_random(shared: Path, tmp_path: Path) -> None:
    rng = random.Random("real")
    for name in ("ls_export_pairwise.json", "ls_export_ranker.json", "ls_export_ranker_buckets.json"):
        rows = json.loads(real(shared, name).read_text(encoding="utf-8"))
        assert sum(check_never_breaks(tmp_path / "odd.json", rows, rng) for _ in range(150)) > 20
