"""Data sets become prompts and demonstrations."""

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir

from rlhf_pipeline import data
from rlhf_pipeline.data import count_known_prompts, tokenization
from rlhf_pipeline.data.records import Labelled, Preference, Ranking
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.models.policies import train_tokenizer
from rlhf_pipeline.usage import CONF

TOY = {"name": "toy_reviews", "train": 400, "test": 300, "limit": 200, "prompt_tokens": [3, 6]}


def asked(rows: list[Any], tokenizer: Any, choice: dict[str, Any], seed: int) -> list[list[int]]:
    return [question.ids for question in tokenization.questions(rows, tokenizer, choice, seed)]


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


def test_a_training_text_that_is_held_out_too_is_dropped_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for split in ("train", "test"):
        for label, rating in (("pos", 9), ("neg", 2)):
            folder = tmp_path / "aclImdb" / split / label
            folder.mkdir(parents=True)
            for number in range(3):
                own = f"{label} {number}" if number else "the same in both"
                (folder / f"{number}_{rating}.txt").write_text(f"{own} {label} " + (split if number else ""))
    rows = data.load_data({"name": "imdb", "path": str(tmp_path)}, seed=0)
    assert len(rows.test) == 6
    assert len(rows.train) == 4
    assert "data=imdb: 2 of 6 training rows are also held out, and are dropped" in caplog.text


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
    assert asked(rows, tokenizer, TOY, seed=0) == [prompt for prompt, _ in pairs]


def jsonl(path: Path, *rows: object) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def pairs(count: int) -> list[dict[str, str]]:
    return [{"prompt": f"p {i}", "chosen": "good", "rejected": "bad"} for i in range(count)]


def test_labels_of_several_files_are_settled_together(tmp_path: Path) -> None:
    first = jsonl(tmp_path / "a.jsonl", *pairs(40), {"prompt": "p", "chosen": None, "rejected": "r"})
    turned = [{"prompt": "p 0", "chosen": "bad", "rejected": "good"}, {"responses": ["only one"], "prompt": "p"}]
    second = jsonl(tmp_path / "b.jsonl", *turned, {"prompt": "new", "chosen": "x", "rejected": "y"})
    rows = data.load_data({"name": "preferences", "path": [first, second], "test_share": 0.3}, seed=0)
    prompts = {row.prompt for row in (*rows.train, *rows.test)}
    assert prompts == {f"p {i}" for i in range(1, 40)} | {"new"}, "p 0 was preferred both ways"
    assert rows.labels is not None
    assert (rows.labels.summary["contradictions"], rows.labels.summary["rejected"]) == (1, 2)
    assert [(row["file"], row["where"]) for row in rows.labels.rejected] == [(first, "line 41"), (second, "line 2")]
    again = data.load_data({"name": "preferences", "path": [first, first, second], "test_share": 0.3}, seed=0)
    assert again == rows, "a file named twice counts once"


def test_of_several_sheets_each_is_an_annotator(tmp_path: Path) -> None:
    paths = [tmp_path / "a.csv", tmp_path / "b.csv"]
    for path, ranks in zip(paths, ("1,2", "2,1"), strict=True):
        lines = [f"t{n},p {n},x,y,{'1,2' if n < 15 else ranks}\n" for n in range(20)]
        path.write_text("task,prompt,answer1,answer2,rank1,rank2\n" + "".join(lines))
    choice = {"name": "preferences", "path": [str(path) for path in paths], "test_share": 0.3}
    labels = data.load_data(choice, seed=0).labels
    assert labels is not None
    assert (labels.summary["annotators"], labels.summary["agreement"], labels.summary["contradictions"]) == (2, 0.75, 5)


def test_labels_held_out_in_a_file_of_their_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    learnt = jsonl(tmp_path / "a.jsonl", *pairs(5))
    known = {"prompt": "p 0", "chosen": "x", "rejected": "y"}
    ranked = {"prompt": "q", "responses": ["a", "b", "c"], "ranks": [2, 1, 2]}
    held_out = jsonl(tmp_path / "b.jsonl", ranked, known)
    rows = data.load_data({"name": "preferences", "path": learnt, "test_path": held_out}, seed=0)
    assert len(rows.train) == 5
    assert sorted(rows.test, key=repr) == [Preference("p 0", "x", "y"), Ranking("q", ("b", "a", "c"), (1, 2.5, 2.5))]
    assert f"1 of the 2 rows in {held_out} have a prompt that is also trained on" in caplog.text


def sides(path: str, share: float = 0.3) -> tuple[list[Any], list[Any]]:
    rows = data.load_data({"name": "preferences", "path": path, "test_share": share}, seed=0)
    return rows.train, rows.test


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
    path = jsonl(tmp_path / "a.jsonl", *({"prompt": p, "chosen": c, "rejected": r} for p, c, r in rows))
    train, test = ({" ".join(row.prompt.split()) for row in side} for side in sides(path))
    assert (len(train) + len(test), train & test) == (count, set())


@pytest.mark.parametrize("prompt", [{}, {"prompt": "Be nice:"}])
def test_without_a_prompt_of_their_own_pairs_of_one_answer_stay_on_one_side(
    tmp_path: Path, prompt: dict[str, str]
) -> None:
    pairs = [(f"x{i}", f"y{i}", f"z{i}") for i in range(40)]
    rows = [{**prompt, "winner": "a", "a": x, "b": y} for one in pairs for x, y in itertools.combinations(one, 2)]
    train, test = sides(jsonl(tmp_path / "a.jsonl", *rows))
    assert (len(train) + len(test), len(test) % 3) == (120, 0)
    assert not {row.chosen[1:] for row in train} & {row.chosen[1:] for row in test}
    rows = [{**prompt, "winner": "a", "a": f"x{i}", "b": "I cannot say."} for i in range(40)]
    train, test = sides(jsonl(tmp_path / "a.jsonl", *rows))
    assert 0 < len(test) < 40, "an answer that is given to everything joins nothing"


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
    train, test = sides(jsonl(tmp_path / "a.jsonl", *rows), share=0.1)
    assert len(train) + len(test) == len(rows)
    assert 0.05 < len(test) / len(rows) < 0.2
    learnt, held_out = ({(row.prompt, row.chosen) for row in side} for side in (train, test))
    assert not learnt & held_out
    assert {prompt for prompt, _ in learnt} == set(shares)


def test_a_prompt_is_held_out_by_its_own_hash_whatever_the_seed(tmp_path: Path) -> None:
    prompts = [f"p {n}" for n in range(200)]
    rows = [{"prompt": prompt, "chosen": f"good {prompt} {n}", "rejected": "bad"} for prompt in prompts for n in (0, 1)]
    path = jsonl(tmp_path / "a.jsonl", *rows)
    low = {p for p in prompts if int(hashlib.sha256(p.encode()).hexdigest()[:8], 16) < 0.1 * 16**8}
    for seed in (0, 1):
        test = data.load_data({"name": "preferences", "path": path, "test_share": 0.1}, seed).test
        assert (len(test), {row.prompt for row in test}) == (2 * len(low), low)


@pytest.mark.parametrize("prompt", [{}, {"prompt": "Be nice:"}])
def test_pairs_of_an_answer_that_most_of_them_share_are_learnt(tmp_path: Path, prompt: dict[str, str]) -> None:
    rows = [{**prompt, "winner": "a", "a": f"x{i}", "b": "I cannot say." if i % 3 else f"y{i}"} for i in range(90)]
    train, test = sides(jsonl(tmp_path / "a.jsonl", *rows))
    assert len(train) + len(test) == 90
    assert 0 < len(test) < 30
    assert not any(row.rejected == "I cannot say." for row in test)


def test_where_all_pairs_share_answers_a_warning_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rows = ({"prompt": prompt, "chosen": better, "rejected": worse} for prompt, better, worse in MANY)
    train, test = sides(jsonl(tmp_path / "a.jsonl", *rows))
    assert len(train) + len(test) == 36
    assert "all 36 rows share answers" in caplog.text


def test_without_any_preference_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data=preferences has no file; give data\.path="):
        data.load_data({"name": "preferences", "path": None}, seed=0)
    path = jsonl(tmp_path / "a.jsonl", {"prompt": "p", "chosen": "c", "rejected": "c"})
    with pytest.raises(UserError, match=r"a\.jsonl: 1 judgements, and none prefers one answer to a different one"):
        data.load_data({"name": "preferences", "path": path}, seed=0)


@pytest.mark.parametrize("count", [2, 3, 50])
def test_a_few_labels_are_split_too_and_one_prompt_is_not(tmp_path: Path, count: int) -> None:
    rows = [{"prompt": f"p{n}", "chosen": "a", "rejected": "b"} for n in range(count)]
    train, test = sides(jsonl(tmp_path / "a.jsonl", *rows), share=0.001)
    assert (len(train), len(test)) == (count - 1, 1)
    with pytest.raises(UserError, match="both are needed"):
        sides(jsonl(tmp_path / "a.jsonl", rows[0]))


def instructions(tmp_path: Path, *answers: str | None) -> dict[str, Any]:
    rows = [{"instruction": f"i {n}", "output": answer} for n, answer in enumerate(answers)]
    return {"name": "instructions", "path": jsonl(tmp_path / "a.jsonl", *rows)}


@pytest.mark.parametrize("missing", range(6))
def test_where_answers_are_learnt_prompts_alone_are_counted_and_leave_something_to_hold_out(
    tmp_path: Path, missing: int, caplog: pytest.LogCaptureFixture
) -> None:
    choice = instructions(tmp_path, *(None if n == missing else "a" for n in range(6)))
    every = data.load_data(choice, 0)
    assert len(every.train) + len(every.test) == 6
    assert caplog.text == ""
    learnt = data.load_data(choice, 0, answers=True)
    assert learnt.test
    assert {row.answered for row in (*learnt.train, *learnt.test)} == {True}
    assert len(learnt.train) + len(learnt.test) == 5
    assert "data=instructions: 1 of 6 rows skipped (no answer to learn)" in caplog.text


def test_prompts_alone_are_nothing_to_learn(tmp_path: Path) -> None:
    choice = instructions(tmp_path, None, "", " ")
    with pytest.raises(UserError, match=r"none of 3 rows has an answer .*\{completion: ..\}.* stage=ppo"):
        data.load_data(choice, 0, answers=True)
    every = data.load_data(choice, 0)
    assert len(every.train) + len(every.test) == 3


def test_chats_are_split_by_the_users_first_words(tmp_path: Path) -> None:
    said = [[("system", f"Be {n % 3}."), ("user", f"{n}?"), ("assistant", "Yes.")] for n in range(200)]
    rows = [{"messages": [{"role": role, "content": text} for role, text in chat]} for chat in said]
    choice = {"name": "instructions", "path": jsonl(tmp_path / "a.jsonl", *rows), "test_share": 0.3}
    assert 30 < len(data.load_data(choice, seed=0).test) < 100


def test_a_file_of_its_own_to_hold_out(tmp_path: Path) -> None:
    learn = jsonl(tmp_path / "a.jsonl", *({"text": f"t {i}"} for i in range(9)))
    test = jsonl(tmp_path / "b.jsonl", *({"text": text} for text in ("u 0", "u 1", "t 3")))
    rows = data.load_data({"name": "text", "path": learn, "test_path": test}, seed=0)
    assert {row.text for row in rows.test} == {"u 0", "u 1", "t 3"}
    assert len(rows.train) == 8, "what is held out is not learnt"


def test_labels_of_other_names_are_zero_or_one(tmp_path: Path) -> None:
    rows = [{"text": f"t {n}", "label": ("负面", "正面")[n % 2]} for n in range(20)]
    choice: dict[str, Any] = {"name": "sentiment", "path": jsonl(tmp_path / "a.jsonl", *rows)}
    read = data.load_data({**choice, "labels": {"正面": 1, "负面": 0}}, 0)
    assert {row.label == int(row.text[2:]) % 2 for row in (*read.train, *read.test)} == {True}
    for odd in (2, "good", True, None):
        with pytest.raises(UserError, match=r"data\.labels\.正面 is .*; each label takes 0 \(bad\) or 1 \(good\)"):
            data.load_data({**choice, "labels": {"正面": odd}}, 0)
