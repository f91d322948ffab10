"""Data sets become prompts and demonstrations."""

import json
from pathlib import Path

import pytest

from rlhf_pipeline import data, encoding
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.policies import train_tokenizer

TOY = {"name": "toy_reviews", "limit": 200, "prompt_tokens": [3, 6]}


def test_splits_are_disjoint_and_cut_to_the_limit() -> None:
    rows = data.load_data(TOY, seed=0)
    assert len(rows.train) == len(rows.test) == 200
    assert not {row.text for row in rows.train} & {row.text for row in rows.test}
    assert {row.label for row in rows.train} == {0, 1}
    assert data.load_data(TOY, seed=0).train == rows.train
    assert data.load_data(TOY, seed=1).train != rows.train
    assert len(data.load_data({**TOY, "test_limit": 5}, seed=0).test) == 5


def test_a_training_text_that_is_held_out_too_is_dropped(tmp_path: Path) -> None:
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


def test_the_fingerprint_sees_every_row() -> None:
    rows = data.load_data(TOY, seed=0)
    first = data.fingerprint(TOY, rows)
    assert first == data.fingerprint(TOY, data.load_data(TOY, seed=0))
    rows.test.pop()
    assert first["sha256"] != data.fingerprint(TOY, rows)["sha256"]


def test_prompts_are_the_first_tokens_and_demonstrations_lose_nothing() -> None:
    rows = data.load_data(TOY, seed=0).train
    tokenizer = train_tokenizer([row.text for row in rows], 400, 64)
    lessons = encoding.demonstrations(rows, tokenizer, TOY, seed=0)
    assert len(lessons) == len(rows)
    pairs = [(ids[: learnt.index(1)], ids[learnt.index(1) :]) for ids, learnt in lessons]
    for row, (prompt, completion) in zip(rows, pairs, strict=True):
        assert 3 <= len(prompt) <= 6
        assert completion[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(prompt + completion[:-1]) == row.text
    assert {len(prompt) for prompt, _ in pairs} == {3, 4, 5, 6}
    assert encoding.prompts(rows, tokenizer, TOY, seed=0) == [prompt for prompt, _ in pairs]


def test_files_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"text": f"t {i}", "label": i % 2}) + "\n" for i in range(50))
    )
    rows = data.load_data({"name": "sentiment", "path": str(tmp_path / "mine.jsonl"), "test_share": 0.2}, seed=0)
    assert len(rows.train) + len(rows.test) == 50
    assert 3 <= len(rows.test) <= 20
    with pytest.raises(UserError, match="rows to learn from and"):
        data.load_data({"name": "sentiment", "path": str(tmp_path / "mine.jsonl"), "test_share": 0.001}, seed=0)


def test_the_split_of_a_file_does_not_move_with_the_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {i // 3}", "completion": f"c {i}"} for i in range(90)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = {"name": "instructions", "path": str(tmp_path / "mine.jsonl"), "test_share": 0.3}
    first, second = data.load_data(choice, seed=0), data.load_data(choice, seed=1)
    assert {row.completion for row in first.test} == {row.completion for row in second.test}
    assert not {row.prompt for row in first.test} & {row.prompt for row in first.train}
