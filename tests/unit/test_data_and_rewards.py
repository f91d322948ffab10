"""Data sets become prompts and demonstrations; rewards become numbers."""

import json
from pathlib import Path

import pytest

from rlhf_pipeline import data, rewards
from rlhf_pipeline.errors import NotFinishedError, UserError
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
    pairs = data.demonstrations(rows, tokenizer, TOY, seed=0)
    assert len(pairs) == len(rows)
    for row, (prompt, completion) in zip(rows, pairs, strict=True):
        assert 3 <= len(prompt) <= 6
        assert completion[-1] == tokenizer.eos_token_id
        assert tokenizer.decode(prompt + completion[:-1]) == row.text
    assert {len(prompt) for prompt, _ in pairs} == {3, 4, 5, 6}
    assert data.prompts(rows, tokenizer, TOY, seed=0) == [prompt for prompt, _ in pairs]


def test_files_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.jsonl").write_text(
        "".join(json.dumps({"text": f"t {i}", "label": i % 2}) + "\n" for i in range(50))
    )
    rows = data.load_data({"name": "sentiment", "path": str(tmp_path / "mine.jsonl"), "test_share": 0.2}, seed=0)
    assert len(rows.train) + len(rows.test) == 50
    assert 3 <= len(rows.test) <= 20
    with pytest.raises(UserError, match="rows to learn from and"):
        data.load_data({"name": "sentiment", "path": str(tmp_path / "mine.jsonl"), "test_share": 0.001}, seed=0)


def built(name: str, **options: object) -> rewards.Reward:
    return rewards.load_reward({"name": name, **options}, None)[0]


def test_rules() -> None:
    answers = ["good good good good", "a fine and good film", ""]
    assert built("keywords", words=["good", "fine"])([""] * 3, answers) == [1.0, 2.0, 0.0]
    assert built("repetition", n=1)([""] * 3, answers) == [-0.75, 0.0, 0.0]
    assert built("length", target=5)([""] * 3, answers) == pytest.approx([-0.2, 0.0, -1.0])
    toy = built("toy_sentiment")
    good, bad = toy(["I saw this film last week."] * 2, [" The story was wonderful.", " The story was never clever."])
    assert good > 0.5 > bad


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    assert built("python", path=f"{tmp_path}/mine.py:short")(["a"], ["four"]) == [-4.0]
    with pytest.raises(UserError, match=r"has no function 'shrot'\. Did you mean 'short'"):
        built("python", path=f"{tmp_path}/mine.py:shrot")
    with pytest.raises(UserError, match="there is no file"):
        built("python", path="nowhere.py:f")


def test_a_reward_that_is_not_a_number_for_each_is_refused() -> None:
    with pytest.raises(UserError, match="gave 1 numbers for 2"):
        rewards.Reward(lambda p, c: [1.0], "x")(["", ""], ["a", "b"])
    with pytest.raises(UserError, match=r"gave nan for 'prompt answer'"):
        rewards.Reward(lambda p, c: [float("nan")], "x")(["prompt "], ["answer"])


def test_a_reward_without_a_model_says_what_to_do() -> None:
    for name in ("classifier", "preference_model"):
        with pytest.raises(NotFinishedError, match=r"run stage=reward first, or give reward\.path="):
            built(name)


def test_classes_go_by_name() -> None:
    assert rewards.class_named({0: "NEGATIVE", 1: "POSITIVE"}, "positive", "m") == 1
    assert rewards.class_named({0: "pos", 1: "neg"}, "Positive", "m") == 0
    with pytest.raises(UserError, match=r"m has no class named 'positive'.*LABEL_0, LABEL_1"):
        rewards.class_named({0: "LABEL_0", 1: "LABEL_1"}, "positive", "m")


def test_the_split_of_a_file_does_not_move_with_the_seed(tmp_path: Path) -> None:
    rows = [{"prompt": f"p {i // 3}", "completion": f"c {i}"} for i in range(90)]
    (tmp_path / "mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = {"name": "instructions", "path": str(tmp_path / "mine.jsonl"), "test_share": 0.3}
    first, second = data.load_data(choice, seed=0), data.load_data(choice, seed=1)
    assert {row.completion for row in first.test} == {row.completion for row in second.test}
    assert not {row.prompt for row in first.test} & {row.prompt for row in first.train}


def test_a_preference_model_reads_texts_with_the_end_it_was_trained_on(tmp_path: Path) -> None:
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = train_tokenizer(["a good film"] * 9, 300, 64)
    torch.manual_seed(0)
    shape = {"vocab_size": len(tokenizer), "n_positions": 64, "n_layer": 1, "n_embd": 16, "n_head": 2}
    model = GPT2ForSequenceClassification(GPT2Config(**shape, num_labels=1, pad_token_id=1, eos_token_id=0))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    ids = torch.tensor([[*tokenizer("a good film")["input_ids"], 0]])
    with torch.no_grad():
        expected = model.eval()(ids).logits.item()
    assert built("preference_model", path=str(tmp_path))(["a good"], [" film"]) == pytest.approx([expected], abs=1e-5)
