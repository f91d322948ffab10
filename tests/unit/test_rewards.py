"""Rewards become numbers, of text in any script; what cannot judge is refused when it is loaded."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from conftest import settings_of

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.models import rewards
from rlhf_pipeline.models.policies import train_tokenizer

TEXTS = ["a good film", "a bad film", "这是一部很好的电影", "not good, not bad: 42"]


def built(name: str, **options: object) -> rewards.Reward:
    return rewards.load_reward({"name": name, **options}, None)[0]


def file_of(folder: Path, source: str) -> str:
    (folder / "mine.py").write_text(source)
    return f"{folder}/mine.py"


def save_classifier(folder: Path, labels: dict[int, str] | None = None, **options: Any) -> Path:
    """A tiny GPT-2 with a random head, so that every text gets a number of its own."""
    import torch
    from transformers import GPT2Config, GPT2ForSequenceClassification

    tokenizer = train_tokenizer(TEXTS * 9, 300, 64)
    torch.manual_seed(0)
    classes = {"id2label": labels, "label2id": {n: i for i, n in labels.items()}} if labels else {"num_labels": 1}
    shape = {"vocab_size": len(tokenizer), "n_positions": 64, "n_layer": 1, "n_embd": 16, "n_head": 2, **classes}
    ids = {"pad_token_id": 1, "eos_token_id": 0}
    model = GPT2ForSequenceClassification(GPT2Config(**shape, **ids, initializer_range=0.2, **options))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A classifier of two classes."""
    return str(save_classifier(tmp_path_factory.mktemp("classifier"), {0: "NEGATIVE", 1: "POSITIVE"}))


# Rules


def test_rules() -> None:
    answers = ["good good good good", "a fine and good film", ""]
    assert built("keywords", words=["good", "fine"])([""] * 3, answers) == [1.0, 2.0, 0.0]
    assert built("repetition", n=1)([""] * 3, answers) == [-0.75, 0.0, 0.0]
    assert built("length", target=5)([""] * 3, answers) == [-0.2, 0.0, -1.0]
    assert built("regex", pattern=r"(?i)\bgo+d\b", probes=answers)([""] * 2, ["Good, good", "goods"]) == [2.0, 0.0]
    toy = built("toy_sentiment")
    good, bad = toy(["I saw this film last week."] * 2, [" The story was wonderful.", " The story was never clever."])
    assert good > 0.5 > bad


def test_a_chinese_character_is_a_word() -> None:
    assert built("length", target=4)(["", ""], ["很好看的", "very good to see"]) == [0.0, 0.0]
    assert built("repetition", n=2)([""], ["好吃好吃好吃"]) == [pytest.approx(2 / 5 - 1)]


def test_rules_that_cannot_be_are_refused_before_anything_is_loaded() -> None:
    cases: dict[str, dict[str, object]] = {
        r"reward\.pattern='a\(b' is no regular expression: .* at position 1": {"name": "regex", "pattern": "a(b"},
        r"reward\.target is 0; it takes at least 1": {"name": "length", "target": 0},
        r"reward\.n is 0; it takes at least 1": {"name": "repetition", "n": 0},
        r"reward\.words is \[\]; it takes one word or more": {"name": "keywords", "words": []},
        r"reward=keywords needs a field 'words'": {"name": "keywords"},
        "has no field 'wrds'. Did you mean 'words'": {"name": "keywords", "wrds": ["a"]},
    }
    for message, choice in cases.items():
        with pytest.raises(UserError, match=message):
            rewards.check_choice(choice)


# Functions of one's own


def test_a_function_of_ones_own(tmp_path: Path) -> None:
    path = file_of(tmp_path, "def short(prompts, completions):\n    return [-len(c) for c in completions]\n")
    assert built("python", path=f"{path}:short")(["a"], ["four"]) == [-4.0]
    with pytest.raises(UserError, match=r"has no function 'shrot'\. Did you mean 'short'\? It has: short\."):
        built("python", path=f"{path}:shrot")
    with pytest.raises(UserError, match=r"raised FileNotFoundError: .*No such file.*nowhere\.py"):
        built("python", path="nowhere.py:f")
    with pytest.raises(UserError, match="names no function; write it as"):
        built("python", path=path)


def test_a_function_of_a_package_in_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "kindness_rewards"
    package.mkdir()
    (package / "words.py").write_text("KIND = ('please', 'thank')\n")
    (package / "rules.py").write_text(
        "from kindness_rewards.words import KIND\n"
        "def kind(prompts, completions):\n    return (sum(w in c.lower() for w in KIND) for c in completions)\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [p for p in __import__("sys").path if p])
    assert built("python", path="kindness_rewards.rules:kind")(["", ""], ["Thank you", "no"]) == [1.0, 0.0]
    with pytest.raises(UserError, match=r"raised ModuleNotFoundError: No module named 'kindness_rewards\.rulez'\.$"):
        built("python", path="kindness_rewards.rulez:kind")
    (package / "broken.py").write_text("\nimport nowhere_to_be_found\n")
    with pytest.raises(UserError, match=r"raised ModuleNotFoundError: .*nowhere_to_be_found' \(.*broken.py, line 2\)"):
        built("python", path="kindness_rewards.broken:kind")


def test_a_file_may_have_the_name_of_a_module(tmp_path: Path) -> None:
    import random

    (tmp_path / "random.py").write_text("def f(p, c):\n    return [len(x) for x in c]\n")
    assert built("python", path=f"{tmp_path}/random.py:f")([""], ["ab"]) == [2.0]
    assert __import__("sys").modules["random"] is random


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("def f(p, c)\n    return []\n", r"raised SyntaxError: expected ':' \(.*mine.py, line 1\)\."),
        ("import sys\nsys.exit(3)\n", r"raised SystemExit: 3 \(.*mine.py, line 2\)"),
        (
            "def f(p, c):\n    return [1 / len(x) for x in c]\n",
            r"ZeroDivisionError: .* \(.*mine.py, line 2\).*tried on",
        ),
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
        ("def f(c):\n    return [1.0]\n", r"mine.py:f takes \(c\), and .*write def f\(prompts, completions\)"),
        (
            "def f(completions, ground_truth, **kwargs):\n    return [1.0]\n",
            r"mine.py:f takes \(completions, ground_truth, \*\*kwargs\), and there are prompts and completions alone",
        ),
        (
            "def f(completions, completion_ids, **kwargs):\n    return [len(x) for x in completion_ids]\n",
            r"raised TypeError: .*NoneType.* \(.*mine.py, line 2\)",
        ),
        ("import torch\ndef f(p, c):\n    return torch.ones(len(c), 2)\n", r"must give a list of numbers"),
    ],
)
def test_what_goes_wrong_in_a_function_of_ones_own_is_said_with_its_line(
    tmp_path: Path, source: str, said: str
) -> None:
    with pytest.raises(UserError, match=said) as refused:
        built("python", path=file_of(tmp_path, source) + ":f")
    assert "\n" not in str(refused.value)
    assert "rewards.py" not in str(refused.value)
    assert "user_function.py" not in str(refused.value)


@pytest.mark.parametrize(
    "source",
    [
        "def f(completions, **kwargs):\n    return [float(len(x)) for x in completions]\n",
        "def f(completions, prompts):\n    return [float(len(x)) for x in completions]\n",
        "def f(completions, prompts=None, weight=1.0):\n    return (weight * len(x) for x in completions)\n",
        "def f(prompts, completions, completion_ids, **kwargs):\n    return [float(len(x)) for x in completions]\n",
        "def f(prompts, **kwargs):\n    return [float(len(x)) for x in kwargs['completions']]\n",
        "async def f(completions, **kwargs):\n    return [float(len(x)) for x in completions]\n",
        "def f(completions, **kwargs):\n    return [float(len(x[0]['content'])) for x in completions]\n",
        "def f(prompts, completions, **kw):\n    return [len(x[-1].get('content')) for x in completions]\n",
        "def f(texts, answers):\n    return [float(len(x)) for x in answers]\n",
        "def f(texts, answers, /):\n    return [float(len(x)) for x in answers]\n",
        "def f(*texts):\n    return [float(len(x)) for x in texts[1]]\n",
        "class F:\n    def __call__(self, completions, **kw):\n        return [len(x) for x in completions]\nf = F()\n",
    ],
)
def test_a_function_may_be_written_for_grpo_and_rloo(tmp_path: Path, source: str) -> None:
    reward = built("python", path=file_of(tmp_path, source) + ":f")
    assert reward(["a prompt", "another one"], ["four", "sixsix"]) == [4.0, 6.0]


def test_a_conversational_grpo_function_may_meet_an_empty_answer_first(tmp_path: Path) -> None:
    source = "def f(completions, **kwargs):\n    return [float(len(c[0]['content'])) for c in completions]\n"
    assert built("python", path=file_of(tmp_path, source) + ":f")(["p", "p"], ["", "abc"]) == [0.0, 3.0]


def test_a_grpo_function_sees_prompts_too(tmp_path: Path) -> None:
    plain = "def f(completions, prompts):\n    return [float(p[-1] == c[0]) for p, c in zip(prompts, completions)]\n"
    talk = (
        "def f(prompts, completions, **kw):\n"
        "    return [len(p[-1]['content']) + len(c[0]['content']) for p, c in zip(prompts, completions)]\n"
    )
    probes = [" x", "y"]
    assert built("python", path=file_of(tmp_path, plain) + ":f", probes=probes)(["ab"] * 2, ["b", "a"]) == [1.0, 0.0]
    assert built("python", path=file_of(tmp_path, talk) + ":f")(["ab"] * 2, ["b", "abc"]) == [3.0, 5.0]


def test_what_a_function_raises_later_is_said_too(tmp_path: Path) -> None:
    source = (
        "from rlhf_pipeline.errors import UserError\ndef f(p, c):\n    if c == ['later']:\n        raise OSError('the"
        " judge is away')\n    if c == ['mine']:\n        raise UserError('said well')\n    return map(len, c)\n"
    )
    reward = built("python", path=file_of(tmp_path, source) + ":f")
    with pytest.raises(UserError, match=r"^reward=python .*:f raised OSError: the judge is away \(.*mine.py, line 4\)"):
        reward(["a"], ["later"])
    with pytest.raises(UserError, match=r"^said well$"):
        reward(["a"], ["mine"])


# The self-test


def test_a_reward_that_is_not_a_number_for_each_is_refused() -> None:
    with pytest.raises(UserError, match="gave 1 numbers for 2"):
        rewards.Reward(lambda p, c: [1.0], "x")(["", ""], ["a", "b"])
    with pytest.raises(UserError, match=r"gave nan for 'prompt answer'"):
        rewards.Reward(lambda p, c: [float("nan")], "x")(["prompt "], ["answer"])


def test_a_reward_that_is_always_the_same_is_refused(tmp_path: Path) -> None:
    path = file_of(tmp_path, "def f(p, c):\n    return [float('zymurgy' in x) for x in c]\n") + ":f"
    said = r"gave 0 for all of 11 texts \(\['Could you pl.*reward\.probes=\['\.\.\.', '\.\.\.'\]\.$"
    for choice in ({"name": "python", "path": path}, {"name": "regex", "pattern": "zymurgy"}):
        with pytest.raises(UserError, match=said) as refused:
            rewards.load_reward(choice, None)
        assert "\n" not in str(refused.value)
        with pytest.raises(UserError, match="gave 0 for all of 2 texts"):
            rewards.load_reward({**choice, "probes": ["beer", "wine"]}, None)
        with pytest.raises(UserError, match="gave 0 for all of 1 texts"):
            rewards.load_reward({**choice, "probes": ["beer"]}, None)
        found, _ = rewards.load_reward({**choice, "probes": ["the zymurgy of beer", "wine"]}, None)
        assert found(["", ""], ["zymurgy", ""]) == [1.0, 0.0]


def test_usual_functions_need_no_probes(tmp_path: Path) -> None:
    bodies = {
        "polite": "float('please' in x.lower())",
        "long": "len(x)",
        "chinese": "sum('一' <= y <= '鿿' for y in x)",
        "code": "float('return' in x)",
        "calm": "-float('!' in x)",
        "digits": "sum(y.isdigit() for y in x)",
        "various": "len(set(x.split())) / max(len(x.split()), 1)",
        "positive": "float('wonderful' in x or 'great' in x)",
    }
    source = "".join(f"def {name}(p, c):\n    return [{body} for x in c]\n" for name, body in bodies.items())
    path = file_of(tmp_path, source)
    for name in bodies:
        assert built("python", path=f"{path}:{name}").probes == rewards.PROBES


def test_every_rule_tells_its_own_probes_apart() -> None:
    words = [["好"], ["c++", "(a|b)"]]
    choices = [{"name": "length", "target": 1}, {"name": "repetition", "n": 7}, {"name": "toy_sentiment"}]
    for options in [*choices, *({"name": "keywords", "words": some} for some in words)]:
        reward = built(**options)
        assert len(set(reward([""] * len(reward.probes), reward.probes))) > 1


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


def test_the_command_line_takes_the_parts_of_a_sum() -> None:
    parts = "[{name: keywords, words: [great], weight: 1.0}, {name: length, target: 12, weight: 0.5}]"
    choice = settings_of("stage=ppo", "reward=sum", f"reward.parts={parts}").reward
    shipped = settings_of("stage=ppo", "reward=sum").reward
    rewards.check_choice(choice)
    assert rewards.load_reward(choice, None)[0](["It was"], [" great"]) == [pytest.approx(1 - 0.5 * 11 / 12)]
    rewards.check_choice(shipped)
    assert rewards.trained_part(shipped)["name"] == "classifier"


def test_what_is_wrong_in_a_part_is_said_with_its_number(tmp_path: Path) -> None:
    length = {"name": "length"}
    early: dict[str, list[dict[str, Any]]] = {
        r"^reward\.parts is empty": [],
        r"^reward\.parts\[1\]: no reward is called 'lenght'\. Did you mean 'length'": [length, {"name": "lenght"}],
        r"^reward\.parts\[1\]: reward=length has no field 'traget'\. Did you": [length, {**length, "traget": 3}],
        r"^reward\.parts\[0\]: reward\.target is 'x'": [{**length, "target": "x"}],
        r"^reward\.parts\[0\]: weight is 'much'; it takes a number": [{**length, "weight": "much"}],
        r"^reward\.parts\[0\]: weight is inf; it takes a number": [{**length, "weight": math.inf}],
        r"^reward\.parts\[1\]: reward=keywords needs a field 'words'": [length, {"name": "keywords"}],
        r"^reward\.parts\[0\]: reward\.parts\[1\]: no reward is called 'x'": [
            {"name": "sum", "parts": [length, {"name": "x"}]}
        ],
    }
    for message, parts in early.items():
        with pytest.raises(UserError, match=message):
            rewards.check_choice({"name": "sum", "parts": parts})
    with pytest.raises(UserError, match=r"^reward\.parts\[1\]: reward=regex gave 0 for all of 11 texts"):
        built("sum", parts=[length, {"name": "regex", "pattern": "zymurgy"}])
    with pytest.raises(NotFinishedError, match=r"^reward\.parts\[0\]: reward=classifier has no model yet"):
        built("sum", parts=[{"name": "classifier"}])
    with pytest.raises(UserError, match=r"gave 0 for all of 2 texts"):
        built("sum", parts=[{**length, "weight": 0}])


def test_a_sum_uses_the_runs_trained_reward(folder: str) -> None:
    parts = [{"name": "classifier", "weight": 0.5}, {"name": "length", "target": 3}]
    reward, _ = rewards.load_reward({"name": "sum", "parts": parts}, Path(folder))
    alone = built("classifier", path=folder)
    assert reward([""], ["a good film"]) == [pytest.approx(0.5 * alone([""], ["a good film"])[0])]


def test_whose_model_a_sum_waits_for() -> None:
    hub, own = {"name": "imdb_sentiment"}, {"name": "classifier"}
    assert rewards.trained_part(hub) is hub
    assert rewards.trained_part({"name": "sum", "parts": [{"name": "length"}, hub, own]}) is own
    assert rewards.trained_part({"name": "sum", "parts": [{**own, "path": "x"}, hub]}) is hub
    assert rewards.trained_part({"name": "sum", "parts": [{"name": "sum", "parts": [own]}]}) is own


# Classifiers


def test_a_reward_without_a_model_says_what_to_do() -> None:
    for name in ("classifier", "preference_model"):
        with pytest.raises(NotFinishedError, match=r"run stage=reward first, or give reward\.path="):
            built(name)


def test_classes_go_by_name() -> None:
    assert rewards.class_named({0: "NEGATIVE", 1: "POSITIVE"}, "positive", "m") == 1
    assert rewards.class_named({0: "pos", 1: "neg"}, "Positive", "m") == 0
    with pytest.raises(UserError, match=r"m has no class named 'positive'.*LABEL_0, LABEL_1"):
        rewards.class_named({0: "LABEL_0", 1: "LABEL_1"}, "positive", "m")


@pytest.mark.parametrize("name", ["classifier", "imdb_sentiment", "dianping_sentiment"])
def test_label_scale_and_what_is_read(folder: str, name: str) -> None:
    def scores(**options: object) -> list[float]:
        return built(name, path=folder, **options)(["a bad ", "a good "], ["film", "film"])

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
def test_which_end_of_a_long_text_is_cut_off(tmp_path: Path, name: str) -> None:
    path = save_classifier(tmp_path, {0: "NEGATIVE", 1: "POSITIVE"} if name == "classifier" else None)
    start, end = "a bad film, not good: 42 ", " not bad, a good film"
    whole = start + "film " * 40 + end

    def scores(*texts: str, **options: object) -> list[float]:
        reward = built(name, path=str(path), max_length=8, **options)
        return reward([""] * len(texts), list(texts))

    first, last = scores(whole, truncation_side="right"), scores(whole, truncation_side="left")
    assert first != last
    assert scores(whole) == last, "an answer stands at the end of its text"
    if name == "classifier":
        assert scores(whole, text="response") == first
        assert scores(whole, text="response", truncation_side="left") == last
    assert scores(start + "bad " * 40, truncation_side="right") == pytest.approx(first, abs=1e-6)
    assert scores("bad " * 40 + end, truncation_side="left") == pytest.approx(last, abs=1e-6)


@pytest.mark.parametrize("name", ["classifier", "preference_model"])
def test_scores_do_not_depend_on_the_batch_size(tmp_path: Path, name: str) -> None:
    path = save_classifier(tmp_path, {0: "NEGATIVE", 1: "POSITIVE"} if name == "classifier" else None)
    texts = [text * count for count in (1, 2, 7) for text in TEXTS] + [""]
    prompts = ["A film: "] * len(texts)
    found = [built(name, path=str(path), batch_size=size)(prompts, texts) for size in (1, 3, 64)]
    assert len(set(found[0])) == len(texts)
    assert found[1] == pytest.approx(found[0], abs=1e-5)
    assert found[2] == pytest.approx(found[0], abs=1e-5)


def test_a_model_that_names_no_pad_token_judges_a_batch(tmp_path: Path) -> None:
    save_classifier(tmp_path, {0: "NEGATIVE", 1: "POSITIVE"})
    expected = built("classifier", path=str(tmp_path))([""] * 4, TEXTS)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    assert built("classifier", path=str(tmp_path))([""] * 4, TEXTS) == pytest.approx(expected, abs=1e-5)


def test_a_classifier_of_no_opinion_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_classifier(tmp_path, {0: "NEGATIVE", 1: "POSITIVE"})
    weights = load_file(tmp_path / "model.safetensors")
    weights["score.weight"].zero_()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"gave 0 for all of 11 texts .*choose another\.$"):
        built("classifier", path=str(tmp_path))
    weights["score.weight"].fill_(math.nan)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"gave nan for .*it must be finite"):
        built("classifier", path=str(tmp_path))


def test_one_class_has_a_logit_only(tmp_path: Path) -> None:
    save_classifier(tmp_path)
    assert len(built("classifier", path=str(tmp_path), label="LABEL_0")([""], ["a"])) == 1
    with pytest.raises(UserError, match=r"has one class, so reward\.scale=probability means nothing"):
        built("classifier", path=str(tmp_path), label="LABEL_0", scale="probability")


def test_a_preference_model_reads_texts_with_the_end_it_was_trained_on(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification

    save_classifier(tmp_path)
    tokenizer = train_tokenizer(TEXTS * 9, 300, 64)
    ids = torch.tensor([[*tokenizer("a good film")["input_ids"], 0]])
    with torch.no_grad():
        expected = AutoModelForSequenceClassification.from_pretrained(tmp_path).eval()(ids).logits.item()
    assert built("preference_model", path=str(tmp_path))(["a good"], [" film"]) == pytest.approx([expected], abs=1e-5)


# Languages


def test_rewards_say_what_they_cannot_judge(tmp_path: Path) -> None:
    chinese, english = (
        ["这家酒店的房间很大，服务也很好，早餐一般，下次来还住这里。"],
        ["It was a good film, all in all."],
    )
    great, good = built("keywords", words=["great"]), built("keywords", words=["好", "棒"])
    assert great.unfit(chinese) == "its words are Latin and the texts Chinese"
    assert good.unfit(english) == "its words are Chinese and the texts Latin"
    assert great.unfit(english) is good.unfit(chinese) is built("length").unfit(chinese) is None
    parts = [{"name": "keywords", "words": ["great"]}, {"name": "length"}]
    assert built("sum", parts=parts).unfit(chinese) == "keywords: its words are Latin and the texts Chinese"
    assert built("sum", parts=parts).unfit(english) is None
    own = save_classifier(tmp_path)
    for choice in ({"name": "preference_model"}, {"name": "classifier", "label": "LABEL_0"}):
        reward, _ = rewards.load_reward({**choice, "path": str(own)}, None)
        assert "the texts are Chinese, and only" in str(reward.unfit(chinese))
        assert reward.unfit(english) is None
