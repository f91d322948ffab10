"""The benchmark of human feedback, with a stand-in for the pipeline: what it runs, and what it makes of what fails."""

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import benchmark


@pytest.fixture
def bench(workplace: Path) -> ModuleType:
    return benchmark("human_feedback")


def stand_in(arguments: list[str], log: Path) -> None:
    """Leaves what a pipeline leaves; the second seed's fails."""
    said = dict(word.partition("=")[::2] for word in arguments)
    with log.open("a") as file:
        file.write(" ".join(arguments) + "\n")
    if said["stage"] != "pipeline":
        return
    if said["seed"] == "1" and said["collect.prompts"] == "20":
        with log.open("a") as file:
            file.write("error: no room\n\n")
        raise subprocess.CalledProcessError(2, arguments)
    for number in range(1, int(said["rounds"]) + 1):
        folder = Path("runs", said["name"], f"round{number}")
        worth = 0.5 + number / 10 + int(said["seed"]) / 50
        metrics = {"sft": {"reward_mean": 0.5, "kl": 0.0}, "ppo": {"reward_mean": worth, "kl": 1.0}}
        for stage, name, found in (
            ("evaluate", "evaluation", {"metrics": metrics}),
            ("reward", "quality", {"accuracy": 0.75}),
        ):
            (folder / stage).mkdir(parents=True, exist_ok=True)
            (folder / stage / f"{name}.json").write_text(json.dumps(found))


def run(bench: ModuleType, monkeypatch: pytest.MonkeyPatch, *options: str) -> int | str | None:
    monkeypatch.setattr(bench, "run", stand_in)
    monkeypatch.setattr(sys, "argv", ["human_feedback.py", *options])
    with pytest.raises(SystemExit) as ended:
        bench.main()
    return ended.value.code


def test_a_seed_that_fails_is_named_and_the_others_are_shown(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bench, monkeypatch, "--seeds", "3", "--rounds", "2", "--prompts", "20", "10") == 1
    said = capsys.readouterr()
    assert "seed 1, 20 prompts: ended with exit status 2: error: no room (" in said.err
    assert "human_feedback-1.log" in said.err
    rewards = said.out.partition("accuracy")[0]
    assert "| 20 | 0.500 ± 0.000 (2 of 3 seeds) | 0.620 ± 0.020 (2 of 3 seeds) |" in rewards
    assert "| 10 | 0.500 ± 0.000 | 0.620 ± 0.012 | 0.720 ± 0.012 |" in rewards
    asked = Path("human_feedback-1.log").read_text()
    assert "name=human_feedback/seed1/10 collect.prompts=10" in asked  # what failed leaves the rest be
    assert all("labeler=toy_sentiment" in line for line in asked.splitlines() if "stage=" in line)
    assert not any(word.startswith("reward") for word in asked.split())  # what PPO learns from is the reward model


def test_what_is_there_is_shown(
    bench: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(bench, monkeypatch, "--show") == 0
    assert "| 250 | - | - | - | - |" in capsys.readouterr().out
    assert not Path("human_feedback.svg").exists()
    four = ("--seeds", "1", "--rounds", "1", "--prompts", "10", "20", "30", "40")
    assert run(bench, monkeypatch, *four) == 0
    assert "| 10 | 0.500 | 0.600 |" in capsys.readouterr().out  # of one seed there is no spread
    assert Path("human_feedback.svg").read_text().count("<polyline") == 4
