"""Rewards become numbers, of text in any script; what cannot judge is refused when it is loaded."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import settings_of

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.models import rewards
from rlhf_pipeline.models.policies import train_tokenizer

TEXTS = ["a good film", "a bad film", "这是一部很好的电影", "not good, not bad: 42"]
LENGTH: dict[str, Any] = {"name": "length"}


def built(name: str, **options: object) -> rewards.Reward:
    return rewards.load_reward({"name": name, **options}, None)[0]


def own(folder: Path, source: str, **options: object) -> rewards.Reward:
    """A function `f` of one's own."""
    (folder / "mine.py").write_text(source)
    return built("python", path=f"{folder}/mine.py:f", **options)


SENTIMENT = {0: "NEGATIVE", 1: "POSITIVE"}


def save_classifier(folder: Path, labels: dict[int, str] | None = SENTIMENT, **odd: Any) -> Path:
    """A tiny GPT-2 with a random head, so that every text gets a number of its own; `odd` changes its config.json."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = train_tokenizer(TEXTS * 9, 300, 64)
    torch.manual_seed(0)
    classes = {"id2label": labels, "label2id": {n: i for i, n in labels.items()}} if labels else {"num_labels": 1}
    shape = {"vocab_size": len(tokenizer), "n_positions": 64, "n_layer": 1, "n_embd": 16, "n_head": 2, **classes}
    ids = {"pad_token_id": 1, "eos_token_id": 0}
    GPT2ForSequenceClassification(GPT2Config(**shape, **ids, initializer_range=0.2)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **odd}))
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A classifier of two classes, and a model of one score."""
    classes = {"classifier": SENTIMENT, "preference_model": None}
    return {name: str(save_classifier(tmp_path_factory.mktemp(name), labels)) for name, labels in classes.items()}


@pytest.mark.parametrize(
    ("choice", "answers", "expected"),
    [
        ({"name": "keywords", "words": ["good", "fine"]}, ["good good", "a fine and good film", ""], [1, 2, 0]),
        ({"name": "repetition", "n": 1}, ["good good good good", "a fine film", ""], [-0.75, 0, 0]),
        ({"name": "repetition", "n": 2}, ["好吃好吃好吃"], [2 / 5 - 1]),  # a Chinese character is a word
        ({"name": "length", "target": 5}, ["good good good good", "a fine and good film", ""], [-0.2, 0, -1]),
        ({"name": "length", "target": 4}, ["很好看的", "very good to see"], [0, 0]),
        ({"name": "regex", "pattern": r"(?i)\bgo+d\b", "probes": ["good", ""]}, ["Good, good", "goods"], [2, 0]),
        ({"name": "length", "target": 1}, ["one"], [0]),
        ({"name": "repetition", "n": 7}, ["one"], [0]),
        ({"name": "keywords", "words": ["好"]}, ["好 C++"], [1]),
        ({"name": "keywords", "words": ["c++", "(a|b)"]}, ["好 C++"], [1]),
    ],
)
def test_rules(choice: dict[str, Any], answers: list[str], expected: list[float]) -> None:
    """Building one checks that it tells its own probes apart."""
    assert built(**choice)([""] * len(answers), answers) == pytest.approx(expected)


def test_the_truth_about_toy_reviews() -> None:
    said = [" The story was wonderful.", " The story was never clever."]
    good, bad = built("toy_sentiment")(["I saw this film last week."] * 2, said)
    assert good > 0.5 > bad


REFUSED: dict[str, dict[str, Any]] = {
    r"reward\.pattern='a\(b' is no regular expression: .* at position 1": {"name": "regex", "pattern": "a(b"},
    r"reward=length: reward\.target is 0; it takes a whole number of at least 1": {"name": "length", "target": 0},
    r"reward=repetition: reward\.n is 0; it takes a whole number of at least 1": {"name": "repetition", "n": 0},
    r"reward\.batch_size is 0; it takes a whole number of at least 1": {"name": "classifier", "batch_size": 0},
    r"reward\.lm_coef is -1; it takes a number of at least 0": {"name": "classifier", "lm_coef": -1},
    r"reward\.max_length is -5; it takes a whole number of at": {"name": "preference_model", "max_length": -5},
    r"reward\.words is \[\]; it takes one word or more": {"name": "keywords", "words": []},
    r"reward=keywords: it needs reward\.words": {"name": "keywords"},
    "there is no setting 'reward.wrds'. Did you mean 'words'": {"name": "keywords", "wrds": ["a"]},
}
REFUSED_PARTS: dict[str, list[dict[str, Any]]] = {
    r"^reward\.parts is empty": [],
    r"^reward\.parts\[1\]: no reward is called 'lenght'\. Did you mean 'length'": [LENGTH, {"name": "lenght"}],
    r"^reward\.parts\[0\]: weight is 'much'; it takes a number": [{**LENGTH, "weight": "much"}],
    r"^reward\.parts\[0\]: weight is inf; it takes a number": [{**LENGTH, "weight": math.inf}],
    r"^reward\.parts\[0\]: reward\.parts\[1\]: no reward is": [{"name": "ensemble", "parts": [LENGTH, {"name": "x"}]}],
}
REFUSED |= {message: {"name": "sum", "parts": parts} for message, parts in REFUSED_PARTS.items()}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_loaded(message: str) -> None:
    with pytest.raises(UserError, match=message):
        rewards.check_choice(REFUSED[message])


# Functions of one's own


def test_a_function_is_found_by_its_path(tmp_path: Path) -> None:
    assert own(tmp_path, "def f(prompts, completions):\n    return [-len(c) for c in completions]\n")(
        ["a"], ["four"]
    ) == [-4.0]
    for path, message in {
        f"{tmp_path}/mine.py:ff": r"has no function 'ff'\. Did you mean 'f'\? It has: f\.",
        "nowhere.py:f": r"raised FileNotFoundError: .*No such file.*nowhere\.py",
        f"{tmp_path}/mine.py": "names no function; write it as",
    }.items():
        with pytest.raises(UserError, match=message):
            built("python", path=path)


def test_a_function_of_a_package_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "kindness_rewards"
    package.mkdir()
    (package / "words.py").write_text("KIND = ('please', 'thank')\n")
    (package / "rules.py").write_text(
        "from kindness_rewards.words import KIND\n"
        "def kind(prompts, completions):\n    return (sum(w in c.lower() for w in KIND) for c in completions)\n"
    )
    (package / "broken.py").write_text("\nimport nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in sys.path if p])
    assert built("python", path="kindness_rewards.rules:kind")(["", ""], ["Thank you", "no"]) == [1.0, 0.0]
    with pytest.raises(UserError, match=r"raised ModuleNotFoundError: No module named 'kindness_rewards\.rulez'\.$"):
        built("python", path="kindness_rewards.rulez:kind")
    with pytest.raises(UserError, match=r"raised ModuleNotFoundError: .*nowhere_to_be_found' \(.*broken.py, line 2\)"):
        built("python", path="kindness_rewards.broken:kind")


def test_a_file_may_have_the_name_of_a_module(tmp_path: Path) -> None:
    import random

    (tmp_path / "random.py").write_text("def f(p, c):\n    return [len(x) for x in c]\n")
    assert built("python", path=f"{tmp_path}/random.py:f")([""], ["ab"]) == [2.0]
    assert sys.modules["random"] is random


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(p, c)\n    return []\n", r"raised SyntaxError: expected ':' \(.*mine.py, line 1\)\."),
        ("import sys\nsys.exit(3)\n", r"raised SystemExit: 3 \(.*mine.py, line 2\)"),
        ("def f(p, c):\n    return [1 / len(x) for x in c]\n", r"ZeroDivisionError: .*mine.py, line 2\).*tried on"),
        ("def f(p, c):\n    for x in c:\n        yield {}[x]\n", r"raised KeyError: .* \(.*mine.py, line 3\)"),
        ("import json\ndef f(p, c):\n    return json.loads('{')\n", r"JSONDecodeError: .* \(.*mine.py, line 3\)"),
        ("def f(p, c):\n    pass\n", r"must give a list of numbers: it gave None\. It was tried on"),
        ("def f(p, c):\n    return ['good' for _ in c]\n", r"must give a list of numbers: it gave \['good', 'good', "),
        (
            "def f(completions, **kwargs):\n    return [1.0 if x else None for x in completions]\n",
            r"must give a list of numbers: it gave \[1\.0, 1\.0, None, .*\. It was tried on",
        ),
        (
            "def f(completions, **kwargs):\n    return [len(x) / kwargs['answer'] for x in completions]\n",
            r"raised KeyError: 'answer' \(.*mine.py, line 2\)",
        ),
        ("def f(c):\n    return [1.0]\n", r"mine.py:f has the signature \(c\), .*write def f\(prompts, completions\)"),
        (
            "def f(completions, completion_ids, **kwargs):\n    return [len(x) for x in completion_ids]\n",
            r"raised TypeError: .*NoneType.* \(.*mine.py, line 2\)",
        ),
        ("import torch\ndef f(p, c):\n    return torch.ones(len(c), 2)\n", r"must give a list of numbers"),
    ],
)
def test_a_fault_in_a_function_is_one_line_that_names_its_place(tmp_path: Path, source: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as refused:
        own(tmp_path, source)
    assert not any(other in str(refused.value) for other in ("\n", "rewards.py", "user_function.py"))


def test_what_a_function_raises_later_is_said_too(tmp_path: Path) -> None:
    source = (
        "from rlhf_pipeline.errors import UserError\ndef f(p, c):\n    if c == ['later']:\n        raise OSError('the"
        " judge is away')\n    if c == ['mine']:\n        raise UserError('said well')\n    return map(len, c)\n"
    )
    reward = own(tmp_path, source)
    with pytest.raises(UserError, match=r"^reward=python .*:f raised OSError: the judge is away \(.*mine.py, line 4\)"):
        reward(["a"], ["later"])
    with pytest.raises(UserError, match=r"^said well$"):
        reward(["a"], ["mine"])


@pytest.mark.parametrize(
    ("arguments", "score"),
    [
        ("completions, **kwargs", "len(x) for x in completions"),
        ("completions, prompts", "len(x) for x in completions"),
        ("completions, prompts=None, weight=1.0", "weight * len(x) for x in completions"),
        ("prompts, completions, completion_ids, **kwargs", "len(x) for x in completions"),
        ("prompts, **kwargs", "len(x) for x in kwargs['completions']"),
        ("completions, **kwargs", "len(x[0]['content']) for x in completions"),
        ("prompts, completions, **kw", "len(x[-1].get('content')) for x in completions"),
        ("texts, answers", "len(x) for x in answers"),
        ("texts, answers, /", "len(x) for x in answers"),
        ("*texts", "len(x) for x in texts[1]"),
        (
            "prompts, completions, **k",
            "len(p[-1]['content'] + x[0]['content']) - 8 for p, x in zip(prompts, completions)",
        ),
        ("completions, prompts", "len(p + x) - 8 for p, x in zip(prompts, completions)"),
    ],
)
def test_a_function_may_be_written_for_grpo_and_rloo(tmp_path: Path, arguments: str, score: str) -> None:
    for source in (
        f"def f({arguments}):\n    return [float(x) for x in ({score})]\n",
        f"async def f({arguments}):\n    return [{score}]\n",
        f"class F:\n    def __call__(self, {arguments}):\n        return ({score})\nf = F()\n",
    ):
        assert own(tmp_path, source)(["a prompt", "a phrase"], ["four", "sixsix"]) == [4.0, 6.0]


def test_a_conversational_grpo_function_may_meet_an_empty_answer_first(tmp_path: Path) -> None:
    source = "def f(completions, **kwargs):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    assert own(tmp_path, source)(["p", "p"], ["", "abc"]) == [0.0, 3.0]


@pytest.mark.parametrize(
    ("arguments", "score"),
    [
        ("prompts, completions, answer", "float(a in c) for a, c in zip(answer, completions)"),
        ("p, c, answer, other=None", "other is None and a in x for a, x in zip(answer, c)"),
        ("completions, answer, **more", "a in c and n for a, c, n in zip(answer, completions, more['n'])"),
        ("completions, *, answer, n=()", "a in c[0]['content'] and m for a, c, m in zip(answer, completions, n)"),
    ],
)
def test_a_function_gets_the_columns_that_it_names(tmp_path: Path, arguments: str, score: str) -> None:
    reward = own(tmp_path, f"def f({arguments}):\n    return [{score}]\n")
    assert reward(["12 + 7 ="] * 2, [" 19", " 5"], answer=["19", "4"], n=[1, 1]) == [1.0, 0.0]
    with pytest.raises(UserError, match=r"mine.py:f needs the column answer; .* the data has none\."):
        reward(["12 + 7 ="], [" 19"])
    with pytest.raises(UserError, match=r"needs the column answer; .* the data has key, id\."):
        reward.check_columns(["key", "id"])


def test_columns_may_have_any_name(tmp_path: Path) -> None:
    columns = {key: [1] for key in ("self", "prompts", "completions", "answers", "p", "c", "function", "row")}
    source = "def f(p, c, answers, **more):\n    return [a + len(more) + len(x) for a, x in zip(answers, c)]\n"
    part = {"name": "python", "path": f"{tmp_path}/mine.py:f"}
    assert own(tmp_path, source)([""], ["abc"], **columns) == [1 + 5 + 3]
    mixed = built("sum", parts=[{**part, "weight": 2}, {"name": "length", "target": 1}])
    assert mixed([""], ["a"], **columns) == [2 * (1 + 5 + 1)]
    with pytest.raises(UserError, match="needs the column answers;"):
        mixed([""], ["a"])
    assert built("exact", column="answers")([""], ["1"], **columns) == [1]


@pytest.mark.parametrize(
    ("pattern", "column", "answers", "expected"),
    [
        (None, ["19", " 19\n", 19, "9"], [" 19", "19 ", "19", "19"], [1, 1, 1, 0]),
        ("#### (.+)", ["1 + 2\n#### 3", "4", "5"], ["#### 1\n#### 3", "4", "so #### 5 "], [1, 0, 1]),
        (r"-?\d+", ["-7", "8"], ["It is -7.", "I do not know."], [1, 0]),
    ],
)
def test_exact_answers(pattern: str | None, column: list[Any], answers: list[str], expected: list[float]) -> None:
    reward = built("exact", column="key", pattern=pattern)
    assert reward(["?"] * len(answers), answers, key=column, other=column) == expected
    with pytest.raises(UserError, match="a row has nothing in its column key"):
        reward(["?"], ["19"], key=[None])
    with pytest.raises(UserError, match="is no regular expression"):
        rewards.check_choice({"name": "exact", "pattern": "("})


# The self-test


def test_a_reward_that_is_not_a_number_for_each_is_refused() -> None:
    with pytest.raises(UserError, match="gave 1 numbers for 2"):
        rewards.Reward(lambda p, c: [1.0], "x")(["", ""], ["a", "b"])
    with pytest.raises(UserError, match=r"gave nan for 'prompt answer'"):
        rewards.Reward(lambda p, c: [float("nan")], "x")(["prompt "], ["answer"])


def test_a_reward_that_is_always_the_same_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def f(p, c):\n    return [float('zymurgy' in x) for x in c]\n")
    said = r"gave 0 for all of 11 texts \(\['Could you pl.*reward\.probes=\['\.\.\.', '\.\.\.'\]\.$"
    for choice in ({"name": "python", "path": f"{tmp_path}/mine.py:f"}, {"name": "regex", "pattern": "zymurgy"}):
        with pytest.raises(UserError, match=said) as refused:
            rewards.load_reward(choice, None)
        assert "\n" not in str(refused.value)
        for probes in (["beer", "wine"], ["beer"]):
            with pytest.raises(UserError, match=f"gave 0 for all of {len(probes)} texts"):
                rewards.load_reward({**choice, "probes": probes}, None)
        found, _ = rewards.load_reward({**choice, "probes": ["the zymurgy of beer", "wine"]}, None)
        assert found(["", ""], ["zymurgy", ""]) == [1.0, 0.0]


@pytest.mark.parametrize(
    "body",
    ["float('please' in x.lower())", "len(x)", "sum('一' <= y <= '鿿' for y in x)", "float('return' in x)",
     "-float('!' in x)", "sum(y.isdigit() for y in x)", "len(set(x.split())) / max(len(x.split()), 1)",
     "float('wonderful' in x or 'great' in x)"],
)  # fmt: skip
def test_usual_functions_need_no_probes(tmp_path: Path, body: str) -> None:
    assert own(tmp_path, f"def f(p, c):\n    return [{body} for x in c]\n").probes == rewards.PROBES


# Sums


def test_a_sum_weighs_its_parts() -> None:
    parts = [{"name": "keywords", "words": ["great"], "weight": 2.0}, {"name": "length", "target": 4}]
    reward = built("sum", parts=parts)
    assert reward(["", ""], ["great great", "not so great today"]) == [2.0 - 0.5, 2.0]
    assert reward.neutral == 2 * 0.5 - 0.5
    assert reward.name == "2 x keywords + 1 x length"
    assert reward([], []) == []
    nested = built("sum", parts=[{"name": "sum", "parts": parts, "weight": 10}, {"name": "repetition", "n": 1}])
    assert nested([""], ["great great"]) == [10 * 1.5 - 0.5]


def test_a_part_that_cannot_be_loaded_is_named() -> None:
    for error, message, parts in (
        (UserError, r"^reward\.parts\[1\]: reward=regex gave 0 for all", [LENGTH, {"name": "regex", "pattern": "zzz"}]),
        (NotFinishedError, r"^reward\.parts\[0\]: reward=classifier has no model yet", [{"name": "classifier"}]),
        (UserError, r"gave 0 for all of 3 texts", [{**LENGTH, "weight": 0}]),
    ):
        with pytest.raises(error, match=message):
            built("sum", parts=parts)


@pytest.mark.parametrize(
    ("mode", "expected"), [("mean", [1.5, 0.5]), ("min", [1.0, 0.0]), ("mean_minus_std", [0.5, -0.5])]
)
def test_an_ensemble_trusts_no_part_alone(mode: str, expected: list[float], folders: dict[str, str]) -> None:
    parts = [{"name": "keywords", "words": [word]} for word in ("great", "good")]
    given = "reward.parts=[{name: keywords, words: [great]}, {name: keywords, words: [good], weight: 2}]"
    choice = settings_of("stage=ppo", "reward=ensemble", given, f"reward.mode={mode}", "reward.coef=2").reward
    reward, name = rewards.load_reward(choice, None)
    assert reward(["", ""], ["good and great", "great"]) == expected
    assert name == f"{mode} of 1 x keywords, 2 x keywords"
    assert built("ensemble", parts=parts).neutral == 0.5
    its_run = {"name": "ensemble", "mode": mode, "parts": [{"name": "preference_model"}, parts[0]]}
    trained, _ = rewards.load_reward(its_run, Path(folders["preference_model"]))
    assert trained.parts == [folders["preference_model"], "keywords"]


def test_whose_model_a_sum_waits_for() -> None:
    hub, mine = {"name": "imdb_sentiment"}, {"name": "classifier"}
    assert rewards.trained_part(hub) is hub
    assert rewards.trained_part(settings_of("stage=ppo", "reward=sum").reward)["name"] == "classifier"
    for parts, waits in (
        ([LENGTH, hub, mine], mine),
        ([{**mine, "path": "x"}, hub], hub),
        ([{"name": "sum", "parts": [mine]}], mine),
    ):
        assert rewards.trained_part({"name": "sum", "parts": parts}) is waits


# Classifiers


@pytest.mark.parametrize("name", ["classifier", "preference_model"])
def test_a_reward_without_a_model_says_what_to_do(name: str) -> None:
    with pytest.raises(NotFinishedError, match=r"run stage=reward first, or give reward\.path="):
        built(name)


def test_classes_go_by_name() -> None:
    assert rewards.class_named({0: "NEGATIVE", 1: "POSITIVE"}, "positive", "m") == 1
    assert rewards.class_named({0: "pos", 1: "neg"}, "Positive", "m") == 0
    with pytest.raises(UserError, match=r"m has no class named 'positive'.*LABEL_0, LABEL_1"):
        rewards.class_named({0: "LABEL_0", 1: "LABEL_1"}, "positive", "m")


@pytest.mark.parametrize("name", ["classifier", "imdb_sentiment", "dianping_sentiment"])
def test_label_scale_and_what_is_read(folders: dict[str, str], name: str) -> None:
    def scores(**options: object) -> list[float]:
        return built(name, path=folders["classifier"], **options)(["a bad ", "a good "], ["film", "film"])

    assert scores(text="response")[0] == scores(text="response")[1]
    logits = {label: scores(text="prompt_response", label=label) for label in ("positive", "negative")}
    assert logits["positive"][0] != logits["positive"][1]
    odds = [good - bad for good, bad in zip(logits["positive"], logits["negative"], strict=True)]
    assert scores(text="prompt_response", scale="log_odds") == pytest.approx(odds, abs=1e-5)
    probability = scores(text="prompt_response", scale="probability")
    assert probability == pytest.approx([1 / (1 + math.exp(-x)) for x in odds], abs=1e-5)
    usual = "response" if name == "dianping_sentiment" else "prompt_response"
    assert scores() == scores(text=usual, scale="logit", label="positive")


@pytest.mark.parametrize("name", ["classifier", "preference_model"])
def test_which_end_of_a_long_text_is_cut_off(folders: dict[str, str], name: str) -> None:
    start, end = "a bad film, not good: 42 ", " not bad, a good film"
    whole = start + "film " * 40 + end

    def scores(string: str, **options: object) -> list[float]:
        return built(name, path=folders[name], max_length=8, **options)([""], [string])

    first, last = scores(whole, truncation_side="right"), scores(whole, truncation_side="left")
    assert first != last
    assert scores(whole) == last, "an answer stands at the end of its text"
    if name == "classifier":
        assert scores(whole, text="response") == first
        assert scores(whole, text="response", truncation_side="left") == last
    assert scores(start + "bad " * 40, truncation_side="right") == pytest.approx(first, abs=1e-6)
    assert scores("bad " * 40 + end, truncation_side="left") == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("name", ["classifier", "preference_model"])
def test_scores_do_not_depend_on_the_batch_size(folders: dict[str, str], name: str) -> None:
    texts = [text * count for count in (1, 2, 7) for text in TEXTS] + [""]
    found = [built(name, path=folders[name], batch_size=size)(["A film: "] * len(texts), texts) for size in (64, 1, 3)]
    assert len(set(found[0])) == len(texts)
    for other in found[1:]:
        assert other == pytest.approx(found[0], abs=1e-5)


def test_a_model_that_names_no_pad_token_judges_a_batch(tmp_path: Path, folders: dict[str, str]) -> None:
    save_classifier(tmp_path, pad_token_id=None)
    found, expected = (
        built("classifier", path=str(path))([""] * 4, TEXTS) for path in (tmp_path, folders["classifier"])
    )
    assert found == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("odd", "said"),
    [
        ({"trained_cut": []}, r"trained_cut is \[\]; it takes settings"),
        ({"trained_cut": {"max_length": "x"}}, r"trained_cut\.max_length is 'x'; it takes a whole number"),
        ({"trained_cut": {"truncation_side": "up"}}, r"trained_cut\.truncation_side is 'up'; it takes 'left'"),
        ({"score_offset": "x"}, "score_offset is 'x'; it takes a number"),
        ({"id2label": {"0": 3, "1": 4}}, "has no class named 'positive'.*: 3, 4"),
    ],
)
def test_odd_fields_of_a_classifiers_configuration_are_one_line(odd: dict[str, Any], said: str, tmp_path: Path) -> None:
    save_classifier(tmp_path, **odd)
    with pytest.raises(UserError, match=said):
        built("classifier", path=str(tmp_path))


@pytest.mark.parametrize(
    ("weight", "said"), [(0.0, r"gave 0 for all of 11 texts .*choose another\.$"), (math.nan, r"gave nan for .*finite")]
)
def test_a_classifier_of_no_opinion_is_refused(tmp_path: Path, weight: float, said: str) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(save_classifier(tmp_path) / "model.safetensors")
    weights["score.weight"].fill_(weight)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=said):
        built("classifier", path=str(tmp_path))


def test_one_class_has_a_logit_only(folders: dict[str, str]) -> None:
    one = {"path": folders["preference_model"], "label": "LABEL_0"}
    assert len(built("classifier", **one)([""], ["a"])) == 1
    with pytest.raises(UserError, match=r"has one class, so reward\.scale=probability means nothing"):
        built("classifier", **one, scale="probability")


def test_a_preference_model_reads_texts_with_the_end_it_was_trained_on(folders: dict[str, str]) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    path = folders["preference_model"]
    ids = torch.tensor([[*train_tokenizer(TEXTS * 9, 300, 64)("a good film")["input_ids"], 0]])
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(path).eval()(ids).logits.item()
    assert built("preference_model", path=path)(["a good"], [" film"]) == pytest.approx([expected], abs=1e-5)


def test_rewards_say_what_they_cannot_judge(folders: dict[str, str]) -> None:
    chinese, english = (
        ["这家酒店的房间很大，服务也很好，早餐一般，下次来还住这里。"],
        ["It was a good film, all in all."],
    )
    great, good = built("keywords", words=["great"]), built("keywords", words=["好", "棒"])
    assert great.unfit(chinese) == "its words are Latin and the texts Chinese"
    assert good.unfit(english) == "its words are Chinese and the texts Latin"
    assert great.unfit(english) is good.unfit(chinese) is built("length").unfit(chinese) is None
    both = built("sum", parts=[{"name": "keywords", "words": ["great"]}, LENGTH])
    assert both.unfit(chinese) == "keywords: its words are Latin and the texts Chinese"
    assert both.unfit(english) is None
    for name, options in {"preference_model": {}, "classifier": {"label": "LABEL_0"}}.items():
        reward = built(name, path=folders["preference_model"], **options)
        assert "the texts are Chinese, but only" in str(reward.unfit(chinese))
        assert reward.unfit(english) is None
