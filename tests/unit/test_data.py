"""Data sets become prompts and demonstrations."""

import hashlib
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from conftest import jsonl
from hydra import compose, initialize_config_dir

from rlhf_pipeline import data
from rlhf_pipeline.data import count_known_prompts, tokenization
from rlhf_pipeline.data.records import Labelled, Preference, Ranking
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.policies import train_tokenizer
from rlhf_pipeline.usage import CONF

TOY = {"name": "toy_reviews", "train": 400, "test": 300, "limit": 200, "prompt_tokens": [3, 6]}


def test_splits_are_disjoint_cut_to_the_limit_and_known_by_every_row() -> None:
    rows, again, other = (data.load_data({**TOY, "test_limit": cut}, seed) for cut, seed in ((None, 0), (5, 0), (5, 1)))
    assert len(rows.train) == len(rows.test) == 200
    assert not {row.text for row in rows.train} & {row.text for row in rows.test}
    assert {row.label for row in rows.train} == {0, 1}
    assert again.train == rows.train != other.train
    assert again.test == rows.test[:5]
    first = data.fingerprint(TOY, rows)
    assert first == data.fingerprint(TOY, data.Splits([*rows.train], [*rows.test]))
    rows.test.pop()
    assert first["sha256"] != data.fingerprint(TOY, rows)["sha256"]


def test_prompts_that_also_begin_training_texts_are_counted() -> None:
    rows = [Labelled("the film was good", 1), Labelled("a plot", 0), Labelled("the cast", 1)]
    assert count_known_prompts(["the", "the film was good", "the film was bad", "a", "b", "zzz"], rows) == 3
    assert (
        count_known_prompts(["why?", "how?"], [Preference("why?", "so", "no"), Preference("what?", "how?", "no")]) == 1
    )
    assert count_known_prompts(["the"], []) == 0


@pytest.mark.parametrize("experiment", ["demo", "human_feedback"])
def test_the_demos_held_out_prompts_begin_no_training_review(experiment: str) -> None:
    """With the tokenizer and the prompts that the experiment has, for each of the 2,000 held-out reviews."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg: Any = compose("config", [f"experiment={experiment}", "stage=pretrain"])
    rows = data.load_data({"name": cfg.data.name}, seed=0)
    tokenizer = train_tokenizer([row.text for row in rows.train], cfg.policy.vocabulary, cfg.policy.positions)
    asked = tokenization.questions(
        rows.test, tokenizer, {"name": "", "prompt_tokens": [*cfg.data.prompt_tokens]}, seed=0
    )
    assert len(asked) == 2_000
    assert count_known_prompts([question.prompt for question in asked], rows.train) == 0


def test_prompts_are_the_first_tokens_and_demonstrations_lose_nothing() -> None:
    rows = data.load_data(TOY, seed=0).train
    tokenizer = train_tokenizer([row.text for row in rows], 400, 64)
    lessons = tokenization.demonstrations(rows, tokenizer, TOY, seed=0)
    assert len(lessons) == len(rows)
    pairs = [(ids[: learnt.index(1)], ids[learnt.index(1) :]) for ids, learnt in lessons]
    for row, (prompt, completion) in zip(rows, pairs, strict=True):
        assert 3 <= len(prompt) <= 6
        assert completion[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(prompt + completion[:-1]) == row.text
    assert {len(prompt) for prompt, _ in pairs} == {3, 4, 5, 6}
    assert [question.ids for question in tokenization.questions(rows, tokenizer, TOY, seed=0)] == [p for p, _ in pairs]


def load(name: str, path: Path, *rows: object, answers: bool = False, seed: int = 0, **choice: Any) -> data.Splits[Any]:
    """Load rows that are written to a file first."""
    return data.load_data({"name": name, "path": str(jsonl(path, *rows)), **choice}, seed, answers)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"p {i}", "chosen": "good", "rejected": "bad"} for i in range(count)]


def test_labels_of_several_files_are_settled_together(tmp_path: Path) -> None:
    first = str(jsonl(tmp_path / "a.jsonl", *pairs(40), {"prompt": "p", "chosen": None, "rejected": "r"}))
    turned = [{"prompt": "p 0", "chosen": "bad", "rejected": "good"}, {"responses": ["only one"], "prompt": "p"}]
    second = str(jsonl(tmp_path / "b.jsonl", *turned, {"prompt": "new", "chosen": "x", "rejected": "y"}))
    rows = data.load_data({"name": "preferences", "path": [first, second], "test_share": 0.3}, seed=0)
    prompts = {row.prompt for row in (*rows.train, *rows.test)}
    assert prompts == {f"p {i}" for i in range(1, 40)} | {"new"}, "p 0 was preferred both ways"
    assert rows.labels is not None
    assert (rows.labels.summary["contradictions"], rows.labels.summary["rejected"]) == (1, 2)
    assert [(row["file"], row["where"]) for row in rows.labels.rejected] == [(first, "line 41"), (second, "line 2")]
    again = data.load_data({"name": "preferences", "path": [first, first, second], "test_share": 0.3}, seed=0)
    assert again == rows, "a file named twice counts once"


def test_labels_held_out_in_a_file_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    known = {"prompt": "p 0", "chosen": "x", "rejected": "y"}
    ranked = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}
    held_out = jsonl(tmp_path / "b.jsonl", ranked, known)
    rows = load("preferences", tmp_path / "a.jsonl", *pairs(5), test_path=str(held_out))
    assert len(rows.train) == 5
    assert sorted(rows.test, key=repr) == [Preference("p 0", "x", "y"), Ranking("q", ("b", "a", "c"), (1, 2.5, 2.5))]
    assert f"1 of the 2 rows in {held_out} have a prompt that is also trained on" in caplog.text


FORMS = [form.format(i) for i in range(30) for form in ("why {}", "why  {}", "why\r\n{}", " why {}\n")]
MANY = [("much asked", f"a{i}", f"a{j}") for i in range(9) for j in range(i)]


@pytest.mark.parametrize(
    ("rows", "count"),
    [
        ([(prompt, f"a {n}", "b") for n, prompt in enumerate(FORMS)], 30),  # they differ in white space alone
        ([*MANY, *((f"p {i}", "x", "y") for i in range(20))], 21),  # one has most of the pairs
    ],
    ids=["white space", "most"],
)
def test_a_prompt_is_on_one_side_only(tmp_path: Path, rows: list[tuple[str, str, str]], count: int) -> None:
    asked = [{"prompt": prompt, "chosen": better, "rejected": worse} for prompt, better, worse in rows]
    splits = load("preferences", tmp_path / "a.jsonl", *asked, test_share=0.3)
    train, test = ({" ".join(row.prompt.split()) for row in side} for side in (splits.train, splits.test))
    assert (len(train) + len(test), train & test) == (count, set())


@pytest.mark.parametrize("prompt", [{}, {"prompt": "Be nice:"}])
def test_without_a_prompt_of_their_own_pairs_of_one_answer_stay_on_one_side(
    tmp_path: Path, prompt: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def split(pairs: Iterable[tuple[str, str]]) -> tuple[list[Any], list[Any]]:
        rows = [{**prompt, "winner": "a", "a": better, "b": worse} for better, worse in pairs]
        splits = load("preferences", tmp_path / "a.jsonl", *rows, test_share=0.3)
        assert len(splits.train) + len(splits.test) == len(rows)
        return splits.train, splits.test

    threes = [(f"x{i}", f"y{i}", f"z{i}") for i in range(40)]
    train, test = split(pair for three in threes for pair in itertools.combinations(three, 2))
    assert len(test) % 3 == 0
    assert not {row.chosen[1:] for row in train} & {row.chosen[1:] for row in test}
    for common in "abcdefgh":
        _, test = split((f"x{i}", common if i % 3 else f"y{i}") for i in range(90))
        assert 0 < len(test) < 30
        assert common not in {row.rejected for row in test}, "an answer that most pairs share is learnt"
    assert caplog.text == ""
    _, test = split((f"x{i}", "I cannot say.") for i in range(40))
    assert 0 < len(test) < 40, "an answer that is given to everything joins nothing"
    assert "all 40 rows share answers" in caplog.text


@pytest.mark.parametrize(
    "shares", [{"one": 55, "two": 45}, dict.fromkeys("abcd", 25), {"most": 76, "some": 12, "more": 12}]
)
@pytest.mark.parametrize("answers", [2, 4])
def test_a_prompt_with_very_many_pairs_is_divided(tmp_path: Path, shares: dict[str, int], answers: int) -> None:
    """Its pairs are held out with those that they share answers with: of each four answers all six pairs."""
    rows = []
    for prompt, share in shares.items():
        for number in range(share if answers == 4 else 5 * share):
            each = [f"answer {number} {place} to {prompt}" for place in range(answers)]
            rows += [{"prompt": prompt, "chosen": a, "rejected": b} for a, b in itertools.combinations(each, 2)]
    splits = load("preferences", tmp_path / "a.jsonl", *rows)
    assert len(splits.train) + len(splits.test) == len(rows)
    assert 0.05 < len(splits.test) / len(rows) < 0.2
    learnt, held_out = ({(row.prompt, row.chosen) for row in side} for side in (splits.train, splits.test))
    assert not learnt & held_out
    assert {prompt for prompt, _ in learnt} == set(shares)


def test_a_prompt_is_held_out_by_its_own_hash_whatever_the_seed(tmp_path: Path) -> None:
    prompts = [f"p {n}" for n in range(200)]
    rows = [{"prompt": prompt, "chosen": f"good {prompt} {n}", "rejected": "bad"} for prompt in prompts for n in (0, 1)]
    low = {p for p in prompts if int(hashlib.sha256(p.encode()).hexdigest()[:8], 16) < 0.1 * 16**8}
    for seed in (0, 1):
        test = load("preferences", tmp_path / "a.jsonl", *rows, seed=seed).test
        assert (len(test), {row.prompt for row in test}) == (2 * len(low), low)


def test_without_any_preference_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data=preferences has no file; give data\.path="):
        data.load_data({"name": "preferences", "path": None}, seed=0)
    with pytest.raises(UserError, match=r"a\.jsonl: 1 judgements, and none prefers one answer to a different one"):
        load("preferences", tmp_path / "a.jsonl", {"prompt": "p", "chosen": "c", "rejected": "c"})


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_few_labels_are_split_too_and_one_prompt_is_not(tmp_path: Path, count: int) -> None:
    splits = load("preferences", tmp_path / "a.jsonl", *pairs(count), test_share=0.001)
    assert (len(splits.train), len(splits.test)) == (count - 1, 1)
    with pytest.raises(UserError, match="both are needed"):
        load("preferences", tmp_path / "a.jsonl", *pairs(1))


@pytest.mark.parametrize("missing", range(6))
def test_where_answers_are_learnt_prompts_alone_are_counted_and_leave_something_to_hold_out(
    tmp_path: Path, missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"instruction": f"i {n}", "output": None if n == missing else "a"} for n in range(6)]
    every = load("instructions", tmp_path / "a.jsonl", *rows)
    assert len(every.train) + len(every.test) == 6
    assert caplog.text == ""
    learnt = load("instructions", tmp_path / "a.jsonl", *rows, answers=True)
    assert learnt.test
    assert {row.answered for row in (*learnt.train, *learnt.test)} == {True}
    assert len(learnt.train) + len(learnt.test) == 5
    assert "data=instructions: 1 of 6 rows skipped (no answer to learn)" in caplog.text
    with pytest.raises(UserError, match=r"none of 1 rows has an answer .*\{completion: ..\}.* stage=ppo"):
        load("instructions", tmp_path / "a.jsonl", rows[missing], answers=True)


def test_chats_are_split_by_the_users_first_words(tmp_path: Path) -> None:
    said = [[("system", f"Be {n % 3}."), ("user", f"{n}?"), ("assistant", "Yes.")] for n in range(200)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in said]
    assert 30 < len(load("instructions", tmp_path / "a.jsonl", *rows, test_share=0.3).test) < 100


def test_a_file_of_its_own_to_hold_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    test = jsonl(tmp_path / "b.jsonl", *({"text": text} for text in ("u 0", "u 1", "t 3")))
    rows = load("text", tmp_path / "a.jsonl", *({"text": f"t {i}"} for i in range(9)), test_path=str(test))
    assert {row.text for row in rows.test} == {"u 0", "u 1", "t 3"}
    assert {row.text for row in rows.train} == {f"t {i}" for i in range(9)} - {"t 3"}, "what is held out is not learnt"
    assert "data=text: 1 of 9 training rows are also held out, and are dropped" in caplog.text


def test_labels_of_other_names_are_zero_or_one(tmp_path: Path) -> None:
    rows = [{"text": f"t {n}", "label": ("负面", "正面")[n % 2]} for n in range(20)]
    read = load("sentiment", tmp_path / "a.jsonl", *rows, labels={"正面": 1, "负面": 0})
    assert {row.label == int(row.text[2:]) % 2 for row in (*read.train, *read.test)} == {True}
    for odd in (2, "good", True, None):
        with pytest.raises(UserError, match=r"data\.labels\.正面 is .*; each label takes 0 \(bad\) or 1 \(good\)"):
            load("sentiment", tmp_path / "a.jsonl", *rows, labels={"正面": odd})
