"""A language model as judge and labeler, from the command line: scores, faults, and a key that no file holds."""

from pathlib import Path
from typing import Any

import pytest
from conftest import CommandLine
from fake_judge import serving

from rlhf_pipeline.files import read_jsonl
from rlhf_pipeline.models import judge

KEY = "sk-do-not-tell-anyone"
GIVEN = ["name=judged", "policy=gpt2_scratch", "policy.vocabulary=300", "policy.positions=32", "data.limit=60"]


def ordinals(question: str) -> str:
    """Higher for later letters, whatever the answer."""
    return f"I give {sum(map(ord, question)) / 100} points."


def test_a_judge_labels_and_rewards(
    workplace: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("XDG_CACHE_HOME", str(workplace / "cache"))
    monkeypatch.setattr(judge, "PAUSE", 0.01)
    with serving(ordinals) as server:
        named = ["model=m", f"url={server.url}", "template='Rate this: {prompt}{response}'"]
        labeler = ["labeler=judge", *(f"labeler.{word}" for word in named)]
        reward = ["reward=judge", *(f"reward.{word}" for word in named)]
        small = ["trainer.per_device_train_batch_size=8", "trainer.total_episodes=32", "trainer.response_length=4",
                 "trainer.eval_samples=6", "trainer.save_steps=1"]  # fmt: skip
        assert command_line("stage=pretrain", *GIVEN, "trainer.max_steps=1") == 0
        collect = [
            "collect.prompts=6",
            "collect.answers=2",
            "collect.response_length=4",
            "policy.path=runs/judged/pretrain",
        ]
        assert command_line("stage=collect", *GIVEN, *labeler, *collect) == 0
        labels = read_jsonl(Path("runs/judged/collect/labels.jsonl"))
        asked = read_jsonl(Path("runs/judged/collect/candidates.jsonl"))
        assert len(labels) == len(asked) > 1
        for label, row in zip(labels, asked, strict=True):
            questions = [f"Rate this: {row['shown_prompt']}{answer}" for answer in label["responses"]]
            assert label["scores"] == pytest.approx([sum(map(ord, question)) / 100 for question in questions])

        reply, calls = server.reply, len(server.asked)
        server.reply = lambda question: reply(question) if len(server.asked) < calls + 20 else "I am tired."
        assert command_line("stage=ppo", *GIVEN, *reward, *small) == 2
        said = capfd.readouterr().err.strip().splitlines()[-1]
        assert said.startswith("error: reward=judge: m replied 'I am tired.', in which reward.pattern finds no score")
        server.reply = reply
        assert command_line("stage=ppo", *GIVEN, *reward, *small) == 0
        assert "resuming from runs/judged/ppo/checkpoints/checkpoint-" in capfd.readouterr().out
        for row in read_jsonl(Path("runs/judged/ppo/samples.jsonl")):
            question = f"Rate this: {row['prompt']}{row['response']}"
            assert row["reward"] == pytest.approx(sum(map(ord, question)) / 100, rel=1e-5)
        assert command_line("stage=evaluate", *GIVEN, *reward, "evaluate.prompts=4", "evaluate.bootstrap=20") == 0
        assert len(server.questions()) - len(set(server.questions())) <= 8, "asked again: those that were refused"
        assert all(headers["authorization"] == f"Bearer {KEY}" for headers in server.headers)
        assert command_line("stage=chat", "name=judged", "--prompt", "I saw") == 0
        before = len(server.asked)
        printed = capfd.readouterr()
        assert f"to run it, add reward.url={server.url}" in printed.out + printed.err
        assert len(server.asked) == before
    files = [path for path in workplace.rglob("*") if path.is_file()]
    assert workplace / "cache" / "rlhf_pipeline" / "judge.sqlite" in files
    assert not [path for path in files if KEY.encode() in path.read_bytes()]
