"""Candidates: several different answers to each prompt, each of which can be drawn again from its seed."""

import csv
import io
import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_policy, tiny_tokenizer

from rlhf_pipeline.data.judgements import read_judgements
from rlhf_pipeline.data.records import Judgement
from rlhf_pipeline.data.sheets import FORMULA, sheet
from rlhf_pipeline.data.tokenization import Question, encode
from rlhf_pipeline.feedback.candidates import Asker, alike
from rlhf_pipeline.feedback.labelling import label_row
from rlhf_pipeline.models.policies import Policy
from rlhf_pipeline.models.sampling import Sampling, sample
from rlhf_pipeline.settings import Collection
from rlhf_pipeline.stages.collect import choose, say_what_lacks

COLLECT = Collection(prompts=6, answers=4, response_length=8, batch_size=4, temperatures=[0.7, 1.5])
PROMPTS = ["the film", "the plot was", "nobody", "the cast was fine", "and", "it was good and"]


@pytest.fixture(scope="module")
def asker() -> Asker:
    tokenizer = tiny_tokenizer()
    policies = {name: Policy(tiny_policy(tokenizer, seed), tokenizer) for seed, name in enumerate(("one", "two"))}
    return Asker(policies, dict.fromkeys(policies, Sampling(stop_ids=(0,), min_length=2)), COLLECT, "seed")


def questions(asker: Asker) -> list[Question]:
    tokenizer = asker.policies["one"].tokenizer
    return [Question(prompt, ids) for prompt, ids in zip(PROMPTS, encode(tokenizer, PROMPTS), strict=True)]


def rows(asker: Asker, first: int = 0) -> list[dict]:
    return list(itertools.chain.from_iterable(asker.rows(questions(asker), first)))


def test_every_prompt_has_answers_that_differ_from_policies_and_temperatures_in_turn(asker: Asker) -> None:
    found = rows(asker)
    assert [row["prompt"] for row in found] == PROMPTS
    for row in found:
        assert [answer["id"] for answer in row["answers"]] == ["answer1", "answer2", "answer3", "answer4"]
        sources = {(answer["policy"], answer["temperature"]) for answer in row["answers"]}
        assert sources == {("one", 0.7), ("two", 0.7), ("one", 1.5), ("two", 1.5)}
        for first, second in itertools.combinations([answer["text"] for answer in row["answers"]], 2):
            assert not alike(first, second, COLLECT.similarity)
    assert len({row["task"] for row in found}) == len(found)


def test_the_place_of_an_answer_tells_nothing_of_its_source(asker: Asker) -> None:
    first = {(row["answers"][0]["policy"], row["answers"][0]["temperature"]) for row in rows(asker)}
    assert len(first) > 1


def test_an_answer_can_be_drawn_again_from_what_is_written_of_it(asker: Asker) -> None:
    for question, row in zip(questions(asker), rows(asker), strict=True):
        for answer in row["answers"]:
            policy = asker.policies[answer["policy"]]
            sampling = replace(asker.sampling[answer["policy"]], temperature=answer["temperature"])
            draws = torch.rand(8, generator=torch.Generator().manual_seed(answer["seed"]))
            batch = sample(policy.model, [question.ids], torch.tensor([8]), sampling, draws[:, None])
            assert batch.texts(policy.tokenizer)[1] == [answer["text"]]


def test_neither_the_batches_nor_a_cut_change_the_candidates(asker: Asker) -> None:
    whole = rows(asker)
    assert rows(replace(asker, collect=replace(COLLECT, batch_size=2))) == whole
    assert rows(asker, first=4) == whole[4:]


def test_another_seed_brings_others(asker: Asker) -> None:
    texts = [
        {answer["text"] for row in rows(a) for answer in row["answers"]} for a in (asker, replace(asker, seed="x"))
    ]
    assert len(texts[0] & texts[1]) < len(texts[0]) / 2


def test_a_policy_that_says_one_thing_only_gives_no_row(asker: Asker) -> None:
    sure = replace(asker, collect=replace(COLLECT, temperatures=[1e-4]), policies={"one": asker.policies["one"]})
    assert rows(sure) == []


def test_what_a_policy_that_repeats_itself_did_not_bring_is_said(
    asker: Asker, capsys: pytest.CaptureFixture[str]
) -> None:
    say_what_lacks([row("a", "b", "c"), row("a", "b"), row("a", "b", "c")], 5, 3)
    none, few = capsys.readouterr().out.splitlines()
    assert none.startswith("2 of 5 prompts")
    assert few.startswith("1 of 5 prompts brought fewer than 3")
    say_what_lacks(rows(asker), len(PROMPTS), COLLECT.answers)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("first", "second", "similar"),
    [
        ("a b c", "A  b c", True),
        ("a b c d e f g h i j k l", "a b c d e f g h i j k m", True),
        ("a b c d", "a b c e", False),
        ("很好吃，服务也很热情，下次再来光顾", "很好吃，服务也很热情，下次再来光临", True),
        ("很好吃", "不好吃", False),
        ("", "a", False),
        ("", " ", True),
    ],
)
def test_answers_that_say_nearly_the_same_are_alike(first: str, second: str, similar: bool) -> None:
    assert alike(first, second, 0.9) is similar
    assert alike(second, first, 0.9) is similar


def test_rounds_go_through_the_prompts_one_after_the_other() -> None:
    every = [Question(text, [number]) for number, text in enumerate("aabcde")]
    first, second, third = ("".join(str(q.prompt) for q in choose(every, 2, number)) for number in (1, 2, 3))
    assert first + second + third == "abcdea"


def test_where_there_are_more_sources_than_answers_each_has_its_turn(asker: Asker) -> None:
    found = rows(replace(asker, collect=replace(COLLECT, answers=2)))
    first = [{(answer["policy"], answer["temperature"]) for answer in row["answers"]} for row in found]
    assert first[0] == {("one", 0.7), ("two", 0.7)}
    assert first[0] != first[1]
    assert set().union(*first) == {("one", 0.7), ("two", 0.7), ("one", 1.5), ("two", 1.5)}


def row(*texts: str) -> dict:
    answers = [{"id": f"answer{n}", "text": text} for n, text in enumerate(texts, 1)]
    return {"task": "t1", "prompt": "p", "answers": answers}


@pytest.mark.parametrize(
    ("answers", "ranks", "expected"),
    [
        (("a b", "c", "d"), (3, 1, 2), [3, 1, 2]),
        (("d", "a  b\n", "c"), (2, 3, 1), [3, 1, 2]),  # in another order, other blanks
        (("c", "d"), (1, 2), [1, 2]),  # one was left out
        (("a b", "007", "d"), (3, 1, 2), [3, 1, 2]),  # a spreadsheet changed one
        (("d", "007", "a b"), (3, 1, 2), None),  # and the others stand elsewhere
        (("x", "y", "z"), (3, 1, 2), None),
        (("a b", "y"), (1, 2), None),
    ],
)
def test_a_label_is_of_the_answers_that_were_asked_about(answers: tuple, ranks: tuple, expected: list | None) -> None:
    found = label_row(row("a b", "c", "d"), Judgement("p", answers, ranks, "t1"))
    assert (found and found["ranks"]) == expected


def test_a_sheet_gives_back_what_a_spreadsheet_would_run(tmp_path: Path) -> None:
    texts = ("=1+1", "'-quoted'", "＝全角", '"a", b\nc')
    path = tmp_path / "sheet.csv"
    table = list(csv.reader(io.StringIO(sheet([row(*texts)], ["+p"]).removeprefix("\ufeff"))))
    assert all(not cell.startswith(FORMULA[:-1]) for cell in table[1])
    table[1][-4:] = ["4", "3", "2", "1"]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(table)
    (judgement,) = read_judgements(path).judgements
    assert (judgement.prompt, judgement.answers, judgement.task) == ("+p", texts, "t1")
