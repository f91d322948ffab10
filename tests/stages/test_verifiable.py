"""Answers that can be checked: a row's columns reach the reward that names them, in every stage that judges."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine

from rlhf_pipeline.data import load_data
from rlhf_pipeline.files import read_jsonl

POLICY = ["policy=gpt2_scratch", "policy.vocabulary=300", "policy.positions=24"]
SUMS = [*POLICY, "name=sums", "data=toy_arithmetic", "data.largest=5"]
PPO = ["trainer.total_episodes=32", "trainer.per_device_train_batch_size=16", "trainer.response_length=4",
       "trainer.log_samples=16", "trainer.eval_samples=8"]  # fmt: skip
OWN = (
    "def f(prompts, completions, answer):\n"
    "    return [sum(map(ord, c)) + 1000.0 * float(a) for c, a in zip(completions, answer)]\n"
)


def test_no_question_of_the_test_is_learnt_from() -> None:
    rows = load_data({"name": "toy_arithmetic"}, seed=0)
    assert len(rows.train) + len(rows.test) == 100 * 100
    assert 800 < len(rows.test) < 1200
    pairs = [
        {frozenset(row.prompt.removesuffix(" =").split(" + ")) for row in split} for split in (rows.train, rows.test)
    ]
    assert not pairs[0] & pairs[1]
    for row in rows.test:
        assert eval(row.prompt.removesuffix("=")) == int(row.completion) == int(row.columns["answer"])


@pytest.fixture(scope="module")
def sums(tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Iterator[Path]:
    """The current folder of this module's tests, with a policy that has seen some sums."""
    folder = tmp_path_factory.mktemp("sums")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert command_line("stage=sft", *SUMS, "trainer.num_train_epochs=30", "trainer.learning_rate=3e-3") == 0
        yield folder


@pytest.mark.usefixtures("sums")
def test_the_policy_is_paid_for_exact_answers(command_line: CommandLine) -> None:
    assert command_line("stage=ppo", *SUMS, "reward=exact", *PPO) == 0
    samples = read_jsonl(Path("runs/sums/ppo/samples.jsonl"))
    assert len(samples) == 32
    for row in samples:
        right = eval(row["prompt"].removesuffix("="))
        assert row["reward"] == float(row["response"].strip() == str(right))
    assert any(row["reward"] for row in samples)
    assert command_line("stage=evaluate", *SUMS, "reward=exact", "evaluate.best_of=3") == 0
    found = json.loads(Path("runs/sums/evaluate/evaluation.json").read_text())
    assert found["metrics"].keys() == {"sft", "best of 3", "ppo"}
    for row in found["samples"]:
        right = str(eval(row["prompt"].removesuffix("=")))
        assert row["rewards"] == {who: float(said.strip() == right) for who, said in row["responses"].items()}


@pytest.mark.usefixtures("sums")
def test_a_function_of_ones_own_gets_columns_of_the_file(command_line: CommandLine, capsys: Any) -> None:
    Path("mine.py").write_text(OWN)
    rows = [{"prompt": f"{n} + 1 =", "completion": str(n + 1), "answer": str(n + 1), "id": n} for n in range(90)]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = [*POLICY, "name=own", "policy.path=runs/sums/sft", "data=instructions", "data.path=rows.jsonl"]
    reward = ["reward=python", "reward.path=mine.py:f"]

    def paid(prompt: str, answer: str) -> float:
        return sum(map(ord, answer)) + 1000.0 * eval(prompt.removesuffix("="))

    assert command_line("stage=ppo", *given, *reward, *PPO) == 0
    samples = read_jsonl(Path("runs/own/ppo/samples.jsonl"))
    assert [row["reward"] for row in samples] == [paid(row["prompt"], row["response"]) for row in samples]
    small = ["evaluate.prompts=4", "evaluate.best_of=2"]
    assert command_line("stage=evaluate", *given, *reward, *small, "evaluate.show=[hello]") == 2
    assert "needs the column answer; besides prompts and completions evaluate.show has none" in capsys.readouterr().err
    assert command_line("stage=evaluate", *given, *reward, *small) == 0
    for row in json.loads(Path("runs/own/evaluate/evaluation.json").read_text())["samples"]:
        assert row["rewards"] == {who: paid(row["prompt"], said) for who, said in row["responses"].items()}
    labeler = [
        "labeler=python", "labeler.path=mine.py:f", "collect.prompts=8", "collect.answers=2",
        "collect.temperatures=[3.0]",
    ]  # fmt: skip
    assert command_line("stage=collect", *given, *labeler, "collect.response_length=4") == 0
    for row in read_jsonl(Path("runs/own/collect/labels.jsonl")):
        assert row["scores"] == [paid(row["prompt"], said) for said in row["responses"]]
    tasks = json.loads(Path("runs/own/collect/tasks.json").read_text())
    assert all(task["data"].keys() == {"task", "prompt", "items", "answer1", "answer2"} for task in tasks)
    assert command_line("stage=chat", "name=own", *reward, "--prompt", "1 + 1 =") == 2
    assert "needs the column answer; besides prompts and completions a chat has none" in capsys.readouterr().err


@pytest.mark.usefixtures("sums")
def test_data_without_the_column_is_refused_at_once(command_line: CommandLine, capsys: Any) -> None:
    given = [*POLICY, "name=none", "policy.path=runs/sums/sft", "reward=exact"]
    for data, missing, has in (
        (["data=toy_reviews", "data.limit=99"], "answer", "none"),
        (["data=toy_arithmetic", "reward.column=key"], "key", "answer"),
    ):
        assert command_line("stage=ppo", *given, *data, *PPO) == 2
        said = f"reward=exact needs the column {missing}; besides prompts and completions the data has {has}."
        assert said in capsys.readouterr().err
    assert not list(Path("runs/none").rglob("run.json"))
