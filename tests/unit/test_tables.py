"""What stage=evaluate prints: readable at 100 columns, and what models and people wrote is shown, not obeyed."""

import random

import pytest

from rlhf_pipeline.evaluation.comparison import Answers, evaluation_figures
from rlhf_pipeline.evaluation.metrics import variety
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.report.tables import evaluation_table, rounds_table
from rlhf_pipeline.terminal import safe_output

PROMPTS = [f"prompt {number}" for number in range(8)]


def evaluation(names: list[str], said: str = "an answer") -> dict:
    """Of policies that gain of the first reward, one after the other, and lose of the second."""
    draw = random.Random(0)
    texts = [f"{said} {number}" for number in range(8)]
    figures = {"kl": None, "perplexity": 3.0, **variety(texts), "length": 4.0}
    answers = {}
    for place, name in enumerate(names):
        rewards = {"classifier": [place + draw.random() for _ in PROMPTS], "length": [-place - draw.random()] * 8}
        answers[name] = Answers(texts, rewards, dict(figures))
    about = {"classifier": ("runs/demo/reward/model", 0.0), "length": ("length", -0.5)}
    rewards = {key: Reward(lambda _, texts: [0.0] * len(texts), *about[key]) for key in about}
    found = evaluation_figures(
        answers, names[-1], names[1], rewards, "classifier", PROMPTS, examples=3, bootstrap=50, seed=0
    )
    return {"prompts": 8, "prompts_in_training": 3, "reward": "runs/demo/reward/model", "reference": names[1], **found}


def test_a_table_with_many_columns_is_turned(capsys: pytest.CaptureFixture[str]) -> None:
    keys = [f"a_long_figure_{number}" for number in range(9)]
    rounds_table({str(number): dict.fromkeys(keys, number + 0.25) for number in (1, 2, 3)}, ["length"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    cells = [[cell.strip() for cell in line.strip("│┃").replace("┃", "│").split("│")] for line in lines]
    assert ["", "1", "2", "3"] in cells
    assert all([key, "1.250", "2.250", "3.250"] in cells for key in keys)


def test_many_policies_are_readable_at_100_columns(capsys: pytest.CaptureFixture[str]) -> None:
    names = ["base", "sft", "best of 4", "round1", "round2", "a-user/" + "a-model-with-a-long-name" * 2]
    evaluation_table(evaluation(names))
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 100
    figures = [line for line in lines if line.startswith("│ base ")]
    assert len(figures) == 2
    assert "…" not in "".join(lines)
    said = "\n".join(lines)
    assert "8 held-out prompts (3 of 8 also begin training texts)" in said.replace("\n", " ")
    assert "By other rewards" in said
    assert "warning: round1: classifier rose by" in said
    assert "worst: prompt" in said


def test_names_and_answers_are_shown_as_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation_table(evaluation(["base", "[red]sft"], said="[bold]so\x1b[2J"))
    said = capsys.readouterr().out
    assert "[red]sft" in said
    assert "[bold]so" in said
    assert "\x1b" not in said


def test_an_evaluation_from_before_there_were_more_rewards_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    found = evaluation(["base", "sft"])
    del found["prompts_in_training"]
    for key in ("rewards", "moved", "warnings", "extremes"):
        del found[key]
    for row in found["metrics"].values():
        for key in ("self_bleu", "repeated", "distinct_1", "distinct_3"):
            del row[key]
    evaluation_table(found)
    assert "Typical answers" in capsys.readouterr().out


def test_at_a_terminal_a_table_has_no_codes(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # rich then takes the output for a terminal
    monkeypatch.setenv("COLUMNS", "150")
    with safe_output():
        evaluation_table(evaluation(["base", "sft", "ppo"]))
    said = capfd.readouterr().out
    assert "reward" in said
    assert "\x1b" not in said
    assert "\\u001b" not in said
