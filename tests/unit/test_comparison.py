"""Answers of policies with their own or another vocabulary, perplexities against transformers' own loss, and figures
against those worked out by hand."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny import TEXTS, tiny_policy

from rlhf_pipeline.data.records import Preference, Text
from rlhf_pipeline.data.tokenization import Question
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.evaluation.comparison import (
    Answers,
    Task,
    evaluation_figures,
    hacking_warnings,
    held_out_texts,
    measure_policy,
    perplexity,
    sample_answers,
)
from rlhf_pipeline.evaluation.lineup import Sampler, make_sampler, open_all, prompt_ids_for, with_room
from rlhf_pipeline.models.policies import Policy, make_policy, train_tokenizer
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.models.sampling import Sampling
from rlhf_pipeline.runs.directory import RunDir

SAMPLING = Sampling(stop_ids=(0,))


def policy(vocabulary: int = 300, seed: int = 0) -> Policy:
    tokenizer = train_tokenizer(TEXTS, vocabulary, 64)
    return Policy(tiny_policy(tokenizer, seed), tokenizer)


def task_of(first: Policy) -> Task:
    prompts = ["the film", "nobody", "the plot was", "the cast"]
    questions = [Question(text, first.tokenizer(text)["input_ids"]) for text in prompts]
    reward = Reward(lambda _, answers: [float(answer.count("o")) for answer in answers], "letters")
    start = Sampler("sft", first, SAMPLING)
    return Task(questions, torch.tensor([12, 8, 12, 8]), {"letters": reward}, first, start, batch_size=3, seed=0)


def test_of_the_reference_itself_the_kl_is_0_and_the_perplexity_that_of_its_samples() -> None:
    task = task_of(policy())
    own = measure_policy(task.reference, task)
    assert own.figures["kl"] == pytest.approx(0, abs=1e-5)
    assert own.rewards["letters"] == [answer.count("o") for answer in own.responses]
    assert 1 <= own.figures["length"] <= 12
    other = Sampler("ppo", policy(seed=1), SAMPLING)
    found = measure_policy(other, task).figures
    assert found["kl"] > 0.1
    assert found["perplexity"] > own.figures["perplexity"]


def test_the_best_of_several_is_worth_the_most_and_costs_what_the_bound_says() -> None:
    ticks: list[int] = []
    task = replace(task_of(policy()), tick=ticks.append)
    tries = [sample_answers(task.reference, task, number) for number in range(1, 9)]
    found = measure_policy(task.reference, task, tries)
    assert sum(ticks) == 8 * 4
    assert found.rewards["letters"] == [
        max(row) for row in zip(*(one.rewards["letters"] for one in tries), strict=True)
    ]
    assert found.rewards["letters"] == [answer.count("o") for answer in found.responses]
    assert [task.first.tokenizer.decode(ids, skip_special_tokens=True) for ids in found.ids] == found.responses
    assert found.figures["kl"] == pytest.approx(math.log(8) - 7 / 8)


def test_another_vocabulary_is_asked_in_its_own_tokens_and_has_no_kl() -> None:
    task = task_of(policy())
    foreign = Sampler("other", policy(280, seed=1), SAMPLING)
    asked = prompt_ids_for(foreign.policy, task.first, task.questions)
    assert [foreign.policy.tokenizer.decode(ids) for ids in asked] == task.prompts
    assert asked != [question.ids for question in task.questions]
    found = measure_policy(foreign, task).figures
    assert found["kl"] is found["perplexity"] is None
    assert found["length"] > 0


def test_held_out_perplexity_is_transformers_own() -> None:
    own = policy()
    rows = [Text("the film was good"), Text("nobody liked the plot and the cast was bad")]
    losses, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*own.tokenizer(row.text)["input_ids"], 0]])
        with torch.no_grad():
            losses += float(own.model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    texts = held_out_texts(rows, [Sampler("own", own, SAMPLING)], 100)
    assert perplexity(own, [ids[:1] for ids in texts], [ids[1:] for ids in texts], 8) == pytest.approx(
        math.exp(losses / tokens), rel=1e-5
    )
    assert perplexity(own, [], [], 8) is None


def test_held_out_texts_are_about_as_many_tokens_as_asked_and_comparisons_are_none() -> None:
    who = [Sampler("own", policy(), SAMPLING)]
    rows = [Text("the film was good and the cast was fine " * 10)] * 50
    found = held_out_texts(rows, who, 65 * 16)
    assert [len(ids) for ids in found] == [64] * 32  # as far as the positions go, 16 texts at a time
    assert held_out_texts(rows, who, 0) == held_out_texts([Preference("a", "b", "c")], who, 100) == []


def test_all_that_ppo_said_of_sampling_is_taken() -> None:
    choice = {"name": "gpt2_scratch", "tokenizer": "characters", "vocabulary": 60, "positions": 32}
    chinese = make_policy(choice, ["你好吗", "我很好，谢谢你", "今天天气真好"] * 10, 0)
    trained = {"response_length": 9, "min_response_length": 4, "temperature": 0.5, "min_new_tokens": 2, "kl_coef": 1.0,
               "stop_tokens": ["气"], "suppress_tokens": ["[UNK]"]}  # fmt: skip
    found = make_sampler("own", chinese, trained, temperature=0.7, response_length=None)
    number = chinese.tokenizer.convert_tokens_to_ids
    assert found.sampling == Sampling(0.7, tuple(sorted((number("[SEP]"), number("气")))), 2, (number("[UNK]"),))
    assert (found.longest, found.shortest) == (9, 4)
    assert make_sampler("own", chinese, {}).longest == 16  # half of the positions


def test_tokens_of_another_vocabulary_are_those_that_its_own_ppo_names(tmp_path: Path) -> None:
    words = {"a": "good", "b": "plot"}  # by run, the token that its PPO stops at
    found = {}
    for name, own in (("a", policy()), ("b", policy(280))):
        stage = tmp_path / name / "ppo"
        own.save(stage / "model")
        token = own.tokenizer.tokenize(words[name])[0]
        trained = {"response_length": 9 if name == "a" else 5, "stop_token": None, "stop_tokens": [token]}
        (stage / "config.yaml").write_text(json.dumps({"policy": {"name": "causal_lm"}, "trainer": trained}))
        (stage / "run.json").write_text(json.dumps({"status": "done", "stage": "ppo", "name": name}))
        found[name] = own.tokenizer.convert_tokens_to_ids(token)
    paths = [(name, str(tmp_path / name / "ppo" / "model")) for name in words]
    policies = open_all(paths, RunDir(tmp_path, "a", "evaluate"), {"name": "causal_lm"})
    assert [(each.sampling.stop_ids, each.longest) for each in policies] == [((found[n],), 9) for n in words]


def test_prompts_without_room_in_every_policy_are_left_out_and_counted(capsys: pytest.CaptureFixture[str]) -> None:
    every = [Question("a", [1] * length) for length in (1, 2, 3)]
    assert with_room(every, [policy(), policy(seed=1)], 62) == every[:2]  # of 64 positions
    assert "warning: 1 of 3 prompts are longer than 2 tokens" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"no prompt leaves room .*: all 1 are longer than 2 tokens"):
        with_room(every[2:], [policy()], 62)
    assert with_room([Question("plot", [5]), Question("", [6])], [policy(), policy(280)], 9) == [Question("plot", [5])]


def compared(reference: str = "sft", **rewards: list[float]) -> dict:
    answers = {name: Answers([name] * len(own), {"letters": own}, {"kl": 0.5}) for name, own in rewards.items()}
    judge = {"letters": Reward(lambda _, texts: [0.0] * len(texts), "letters", neutral=2)}
    prompts = [str(number) for number in range(len(next(iter(rewards.values()))))]
    return evaluation_figures(
        answers, [*answers][-1], reference, judge, "letters", prompts, examples=2, bootstrap=10, seed=0
    )


def test_everyone_is_held_against_the_first_and_the_reference() -> None:
    values = {"base": [0.0, 0.0], "sft": [1.0, 1.0], "best": [3.0, 3.0], "ppo": [2.0, 4.0]}
    found = compared(**values)["paired_gain"]
    pairs = ["sft - base", "best - base", "best - sft", "ppo - base", "ppo - sft"]
    assert list(found) == pairs
    assert [found[pair]["mean"] for pair in pairs] == [1, 3, 2, 3, 2]
    assert found["ppo - sft"]["low"] == 1
    assert found["ppo - sft"]["high"] == 3
    assert list(compared("base", **values)["paired_gain"]) == ["sft - base", "best - base", "ppo - base"]


def test_the_figures_of_a_reward_and_how_far_it_moved_in_deviations_of_the_reference() -> None:
    found = compared(sft=[1, 2, 3, 6], ppo=[3, 4, 5, 8])
    assert found["metrics"]["sft"] == {
        "reward_mean": 3, "reward_median": 2.5, "reward_stderr": pytest.approx((14 / 3) ** 0.5 / 2), "positive": 0.5,
        "kl": 0.5,
    }  # fmt: skip
    assert found["moved"] == {"letters": {"sft": 0, "ppo": pytest.approx(2 / (14 / 3) ** 0.5)}}
    assert compared(sft=[1, 1], ppo=[4, 6])["moved"] == {"letters": {"sft": None, "ppo": None}}


def test_the_examples_are_typical_best_worst_and_most_changed() -> None:
    found = compared(sft=[0, 0, 5, 0, 3], ppo=[1, 2, 0, 9, 4])  # changes: 1, 2, -5, 9, 1
    kinds = {"typical": found["examples"], **found["extremes"]}
    shown = {kind: [row["prompt"] for row in rows] for kind, rows in kinds.items()}
    assert shown == {"typical": ["0", "4"], "best": ["3", "4"], "worst": ["2", "0"], "most changed": ["3", "2"]}
    assert found["samples"][3] == {
        "prompt": "3", "responses": {"sft": "sft", "ppo": "ppo"}, "rewards": {"sft": 0, "ppo": 9}
    }  # fmt: skip


@pytest.mark.parametrize(
    ("classifier", "length", "warned"),
    [
        ((1, 0.5), (-0.4, -0.2), True),
        ((1, 0.5), (-0.4, 0.1), False),  # it may be chance
        ((1, 0.5), (0.4, 0.6), False),
        ((0.1, -0.1), (-0.4, -0.2), False),
    ],
)
def test_a_reward_that_rose_while_another_fell_is_warned_of(
    classifier: tuple[float, float], length: tuple[float, float], warned: bool
) -> None:
    rose, fell = ({"sft - base": {"mean": 1, "low": 0.5, "high": 1.5}} for _ in range(2))
    rose["ppo - sft"] = {"mean": classifier[0], "low": classifier[1], "high": 2}
    fell["ppo - sft"] = {"mean": length[0], "low": -2, "high": length[1]}
    judged = {
        "classifier": {"paired_gain": rose, "moved": {"base": -1.0, "sft": 0.0, "ppo": 2.0}},
        "length": {"paired_gain": fell, "moved": {"base": 1.0, "sft": 0.0, "ppo": None}},
    }
    lines = hacking_warnings(judged, "classifier", "sft")
    assert len(lines) == warned
    for part in ("ppo", "classifier rose by 2.00 s.d. of sft's answers", "length fell by 0.4") if warned else ():
        assert part in lines[0]
