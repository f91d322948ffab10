"""Candidates, each of which can be drawn again from its seed; their labels, by people and by a reward."""

import csv
import io
import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import tiny_policy, tiny_tokenizer

from rlhf_pipeline.data.judgements import read_judgements
from rlhf_pipeline.data.records import Judgement
from rlhf_pipeline.data.sheets import FORMULA, label_studio_tasks, sheet
from rlhf_pipeline.data.tokenization import Question, encode
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.feedback.candidates import Asker, alike
from rlhf_pipeline.feedback.labelling import label_row, rank_by_reward
from rlhf_pipeline.models.policies import Policy
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.models.sampling import Sampling, sample
from rlhf_pipeline.settings import Collection
from rlhf_pipeline.stages.collect import choose

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


@pytest.fixture(scope="module")
def found(asker: Asker) -> list[dict]:
    """The rows of all prompts."""
    return rows(asker)


def rows(asker: Asker, first: int = 0) -> list[dict]:
    return list(itertools.chain.from_iterable(asker.rows(questions(asker), first)))


def test_every_prompt_has_answers_that_differ_from_policies_and_temperatures_in_turn(found: list[dict]) -> None:
    assert [row["prompt"] for row in found] == PROMPTS
    for row in found:
        assert [answer["id"] for answer in row["answers"]] == ["answer1", "answer2", "answer3", "answer4"]
        sources = {(answer["policy"], answer["temperature"]) for answer in row["answers"]}
        assert sources == {("one", 0.7), ("two", 0.7), ("one", 1.5), ("two", 1.5)}
        for first, second in itertools.combinations([answer["text"] for answer in row["answers"]], 2):
            assert not alike(first, second, COLLECT.similarity)
    assert len({row["task"] for row in found}) == len(found)
    shown_first = {(row["answers"][0]["policy"], row["answers"][0]["temperature"]) for row in found}
    assert len(shown_first) > 1  # the place of an answer does not tell its source


def test_an_answer_can_be_drawn_again_from_what_is_written_of_it(asker: Asker, found: list[dict]) -> None:
    for question, row in zip(questions(asker), found, strict=True):
        for answer in row["answers"]:
            policy = asker.policies[answer["policy"]]
            sampling = replace(asker.sampling[answer["policy"]], temperature=answer["temperature"])
            draws = torch.rand(8, generator=torch.Generator().manual_seed(answer["seed"]))
            batch = sample(policy.model, [question.ids], torch.tensor([8]), sampling, draws[:, None])
            assert batch.texts(policy.tokenizer)[1] == [answer["text"]]


def test_the_seed_alone_makes_the_candidates_not_the_batches_nor_a_cut(asker: Asker, found: list[dict]) -> None:
    assert rows(replace(asker, collect=replace(COLLECT, batch_size=2))) == found
    assert rows(asker, first=4) == found[4:]
    both = (found, rows(replace(asker, seed="x")))
    texts, others = ({answer["text"] for row in drawn for answer in row["answers"]} for drawn in both)
    assert len(texts & others) < len(texts) / 2
    sure = replace(asker, collect=replace(COLLECT, temperatures=[1e-4]), policies={"one": asker.policies["one"]})
    assert rows(sure) == [], "a policy that says one thing only gives no row"


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
        (("a b", "x", "y"), (3, 1, 2), None),
        (("a b", "y"), (1, 2), None),
    ],
)
def test_a_label_is_of_the_answers_that_were_asked_about(answers: tuple, ranks: tuple, expected: list | None) -> None:
    found = label_row(row("a b", "c", "d"), Judgement("p", answers, ranks, "t1"))
    assert (found and found["ranks"]) == expected


def test_a_sheet_gives_back_what_a_spreadsheet_would_run(tmp_path: Path) -> None:
    texts = ("=1+1", "'-quoted'", "＝全角", '"a", b\nc')
    path = tmp_path / "sheet.csv"
    written = sheet(label_studio_tasks([{**row(*texts), "prompt": "+p"}])).removeprefix("\ufeff")
    table = list(csv.reader(io.StringIO(written)))
    assert all(not cell.startswith(FORMULA[:-1]) for cell in table[1])
    table[1][-4:] = ["4", "3", "2", "1"]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(table)
    (judgement,) = read_judgements(path).judgements
    assert (judgement.prompt, judgement.answers, judgement.task) == ("+p", texts, "t1")


LENGTH = Reward(lambda prompts, answers: [float(len(answer)) for answer in answers], "length")


def test_a_reward_ranks_by_its_scores_and_equal_scores_tie() -> None:
    (label,), as_without = rank_by_reward([{**row("aa", "a", "aaaa", "bb"), "shown_prompt": "p"}], LENGTH, 0.0, "0")
    assert label["ranks"] == [2, 4, 1, 2]
    assert label["scores"] == [2, 1, 4, 2]
    assert as_without == 1
    assert (label["task"], label["annotator"], label["responses"]) == ("t1", "length", ["aa", "a", "aaaa", "bb"])
    with pytest.raises(UserError, match="labeler=length gives all answers to each prompt the same score"):
        rank_by_reward([{**row("a", "b"), "shown_prompt": "p"}], LENGTH, 0.0, "0")


def test_noise_confuses_close_answers_as_bradley_and_terry_say() -> None:
    """Scores 1, 2 and 6 have a standard deviation of 2.16: with half of that as noise, 2 beats 1 by sigmoid(1/1.08)."""
    asked = [{**row("a", "aa", "aaaaaa"), "shown_prompt": "p"}] * 4000
    found, as_without = rank_by_reward(asked, LENGTH, 0.5, "0")
    scale = 0.5 * math.sqrt(14 / 3)
    rates = {}
    for better, worse in itertools.combinations((2, 1, 0), 2):
        rates[better, worse] = sum(label["ranks"][better] < label["ranks"][worse] for label in found) / len(found)
        gap = found[0]["scores"][better] - found[0]["scores"][worse]
        assert rates[better, worse] == pytest.approx(1 / (1 + math.exp(-gap / scale)), abs=0.025)  # over 3 s.e.
    assert as_without == pytest.approx(sum(rates.values()) / 3)
    assert (
        rank_by_reward(asked[:20], LENGTH, 1.0, "0")
        == rank_by_reward(asked[:20], LENGTH, 1.0, "0")
        != rank_by_reward(asked[:20], LENGTH, 1.0, "1")
    )
