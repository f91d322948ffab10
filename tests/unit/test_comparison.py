"""Answers of policies with their own or another vocabulary, perplexities against transformers' own loss, and figures
against those worked out by hand."""

import math
from dataclasses import replace

import pytest
import torch
from tiny import TEXTS, tiny_policy

from rlhf_pipeline.data.records import Preference, Text
from rlhf_pipeline.data.tokenization import Question
from rlhf_pipeline.evaluation.comparison import (
    Trial,
    chosen,
    figures,
    gains,
    held_out_perplexity,
    held_out_texts,
    measure,
    moved,
    reread,
    traded,
)
from rlhf_pipeline.evaluation.lineup import Contestant, asked_of
from rlhf_pipeline.models.policies import Policy, train_tokenizer
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.models.sampling import Sampling

SAMPLING = Sampling(stop_ids=(0,))


def policy(vocabulary: int = 300, seed: int = 0) -> Policy:
    tokenizer = train_tokenizer(TEXTS, vocabulary, 64)
    return Policy(tiny_policy(tokenizer, seed), tokenizer)


def trial_of(first: Policy) -> Trial:
    prompts = ["the film", "nobody", "the plot was", "the cast"]
    questions = [Question(text, first.tokenizer(text)["input_ids"]) for text in prompts]
    reward = Reward(lambda _, answers: [float(answer.count("o")) for answer in answers], "letters")
    start = Contestant("sft", first, SAMPLING)
    return Trial(questions, torch.tensor([12, 8, 12, 8]), {"letters": reward}, first, start, batch_size=3, seed=0)


def test_of_the_reference_itself_the_kl_is_0_and_the_perplexity_that_of_its_samples() -> None:
    trial = trial_of(policy())
    own = measure(trial.reference, trial)
    assert own.figures["kl"] == pytest.approx(0, abs=1e-5)
    assert own.rewards["letters"] == [answer.count("o") for answer in own.responses]
    assert 1 <= own.figures["length"] <= 12
    other = measure(Contestant("ppo", policy(seed=1), SAMPLING), trial)
    assert other.figures["kl"] > 0.1
    assert other.figures["perplexity"] > own.figures["perplexity"]


def test_the_best_of_several_is_worth_the_most_and_costs_what_the_bound_says() -> None:
    trial = trial_of(policy())
    ticks = []
    best = measure(trial.reference, replace(trial, tick=ticks.append), 8)
    plain = measure(trial.reference, trial)
    assert sum(best.rewards["letters"]) > sum(plain.rewards["letters"])
    assert best.rewards["letters"] == [answer.count("o") for answer in best.responses]
    assert best.figures["kl"] == pytest.approx(math.log(8) - 7 / 8)
    assert sum(ticks) == 8 * 4
    assert trial.speed()["tokens_per_second"] > 0


def test_another_vocabulary_is_asked_in_its_own_tokens_and_has_no_kl() -> None:
    trial = trial_of(policy())
    foreign = policy(280, seed=1)
    asked = asked_of(foreign, trial.first, trial.questions)
    assert [foreign.tokenizer.decode(ids) for ids in asked] == trial.prompts
    assert asked != [question.ids for question in trial.questions]
    found = measure(Contestant("other", foreign, SAMPLING), trial)
    assert found.figures["kl"] is None
    assert found.figures["perplexity"] > 1


def test_texts_read_again_are_the_tokens_that_they_were_sampled_as_or_as_many_as_fit() -> None:
    first = policy()
    question = Question("the film", first.tokenizer("the film")["input_ids"])
    answer = first.tokenizer(" was good")["input_ids"]
    batch = reread(first, [question] * 3, [" was good", "", ""], [True, True, False])
    assert batch is not None
    assert batch.prompt_lengths.tolist() == [len(question.ids)] * 2
    assert batch.tokens[0].tolist() == [*question.ids, *answer, 0]
    assert batch.response_lengths.tolist() == [len(answer) + 1, 1]
    long = reread(first, [question], [" was good" * 40], [True])
    assert long is not None
    assert long.tokens.shape[1] == 64
    assert reread(first, [question], [""], [False]) is None


def test_held_out_perplexity_is_transformers_own() -> None:
    own = policy()
    rows = [Text("the film was good"), Text("nobody liked the plot and the cast was bad")]
    losses, tokens = 0.0, 0
    for row in rows:
        ids = torch.tensor([[*own.tokenizer(row.text)["input_ids"], 0]])
        with torch.no_grad():
            losses += float(own.model(ids, labels=ids).loss) * (ids.shape[1] - 1)
        tokens += ids.shape[1] - 1
    assert held_out_perplexity(own, rows, 64, 8) == pytest.approx(math.exp(losses / tokens), rel=1e-5)
    assert held_out_perplexity(own, [], 64, 8) is None


def test_held_out_texts_are_bounded_by_tokens_and_comparisons_are_none() -> None:
    own = policy()
    rows = [Text("the film was good and the cast was fine")] * 50
    length = len(own.tokenizer(rows[0].text)["input_ids"]) + 1
    who = [Contestant("own", own, SAMPLING)]
    assert held_out_texts(rows, who, 3 * length) == (rows[:3], 64)
    assert held_out_texts(rows, who, 3 * length + 1) == (rows[:4], 64)
    assert held_out_texts(rows, who, 0) == ([], 64)
    assert held_out_texts([Preference("a", "b", "c")], who, 100) == ([], 64)


def test_no_text_is_read_beyond_what_a_policy_was_taught() -> None:
    who = [Contestant("long", policy(), SAMPLING), Contestant("short", policy(), SAMPLING, taught=5)]
    rows = [Text("the film was good and the cast was fine")] * 50
    assert held_out_texts(rows, who, 10) == (rows[:2], 5)


def test_the_figures_of_a_reward() -> None:
    found = figures([1, 2, 3, 6], neutral=2)
    assert found == {
        "reward_mean": 3, "reward_median": 2.5, "reward_stderr": pytest.approx((14 / 3) ** 0.5 / 2), "positive": 0.5,
    }  # fmt: skip


def test_everyone_is_held_against_the_first_and_the_reference() -> None:
    values = {"base": [0.0, 0.0], "sft": [1.0, 1.0], "best of 4": [3.0, 3.0], "ppo": [2.0, 4.0]}
    found = gains(values, "sft", draws=100, seed=0)
    pairs = ["sft - base", "best of 4 - base", "best of 4 - sft", "ppo - base", "ppo - sft"]
    assert list(found) == pairs
    assert [found[pair]["mean"] for pair in pairs] == [1, 3, 2, 3, 2]
    assert found["ppo - sft"]["low"] == 1
    assert found["ppo - sft"]["high"] == 3
    assert list(gains(values, "base", draws=10, seed=0)) == ["sft - base", "best of 4 - base", "ppo - base"]


def test_how_far_a_reward_moved_is_in_deviations_of_the_reference() -> None:
    assert moved({"sft": [0, 2], "ppo": [4, 6]}, "sft") == {"sft": 0, "ppo": pytest.approx(4 / 2**0.5)}
    assert moved({"sft": [1, 1], "ppo": [4, 6]}, "sft") == {"sft": None, "ppo": None}


def gain(mean: float, low: float, high: float) -> dict[str, float]:
    return {"mean": mean, "low": low, "high": high, "win_rate": 0.5}


@pytest.mark.parametrize(
    ("own", "others", "warned"),
    [
        (gain(1, 0.5, 1.5), gain(-0.4, -0.6, -0.2), True),
        (gain(1, 0.5, 1.5), gain(-0.4, -0.9, 0.1), False),  # it may be chance
        (gain(1, 0.5, 1.5), gain(0.4, 0.2, 0.6), False),
        (gain(0.1, -0.1, 0.3), gain(-0.4, -0.6, -0.2), False),
    ],
)
def test_a_reward_that_rose_while_another_fell_is_warned_of(
    own: dict[str, float], others: dict[str, float], warned: bool
) -> None:
    gained = {
        "classifier": {"sft - base": gain(1, 0.5, 1.5), "ppo - sft": own},
        "length": {"sft - base": gain(-1, -1.5, -0.5), "ppo - sft": others},
    }
    moves = {"classifier": {"base": -1.0, "sft": 0.0, "ppo": 2.0}, "length": {"base": 1.0, "sft": 0.0, "ppo": None}}
    lines = traded("classifier", "sft", gained, moves)
    assert len(lines) == warned
    if warned:
        for part in ("ppo", "classifier rose by 2.00 s.d. of sft's answers", "length fell by 0.4"):
            assert part in lines[0]


def test_the_examples_are_typical_best_worst_and_most_changed() -> None:
    first, last = [0.0, 0.0, 5.0, 0.0, 3.0], [1.0, 2.0, 0.0, 9.0, 4.0]  # changes: 1, 2, -5, 9, 1
    found = chosen(first, last, 2)
    assert found == {"typical": [0, 4], "best": [3, 4], "worst": [2, 0], "most changed": [3, 2]}
