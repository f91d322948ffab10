"""`overwrite=true` with something mistaken: what was finished is there afterwards, byte for byte."""

from pathlib import Path

import pytest
from conftest import MINIATURE, CommandLine

MISTAKES = {
    "pretrain": ["data=sentiment data.path=mistaken.csv", "data=text data.path=nowhere.txt", "policy.sise=mini"],
    "sft": [
        "policy.path=nowhere/at/all", "policy.path=mistaken.csv", "policy=gpt2_scratch policy.path=runs/demo/reward",
        "data=instructions data.path=mistaken.csv", "trainer.learning_rate=fast", "policy.size=mini",
        "policy.lora.target_modules=[nothing_like_it]",
    ],
    "reward": ["data=sentiment data.path=mistaken.csv", "reward.path=nowhere/at/all reward.base=null"],
    "ppo": [
        "reward=python reward.path=rewards.py:broken", "reward=python reward.path=rewards.py:too_few",
        "reward.path=nowhere/at/all", "trainer.num_mini_batches=7", "data=text data.path=mistaken.csv",
        "trainer.stop_tokens=[nothing_like_it]", "trainer.response_length=100000",
        "policy.lora.r=0", "policy.lora.init_lora_weights=olora", "trainer.fsdp=full_shard",
    ],
    "evaluate": [
        "evaluate.policies=[nowhere/at/all]", "evaluate.response_length=100000", "reward=python reward.path=no.py:f",
    ],
    "collect": ["collect.policies=[nowhere/at/all]", "labeler=python labeler.path=rewards.py:broken"],
}  # fmt: skip
REWARDS = """
def broken(prompts, completions, **columns):
    raise ValueError("no")

def too_few(prompts, completions, **columns):
    return [1.0]
"""


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def finished(run: Path) -> Path:
    Path("mistaken.csv").write_text("text,label\nfine,1\nnot so,maybe\n")
    Path("rewards.py").write_text(REWARDS)
    return run


@pytest.mark.parametrize("stage", MISTAKES)
def test_a_mistake_leaves_what_was_finished(
    stage: str, finished: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    if stage == "collect":
        assert command_line("stage=collect", *MINIATURE, "labeler=length", "labeler.target=5", "collect.prompts=4") == 0
    before = files(finished / stage)
    assert before["run.json"]
    for mistake in MISTAKES[stage]:
        words = [word for word in MINIATURE if mistake.partition("=")[0] not in word]
        status = command_line(f"stage={stage}", "experiment=demo", *words, *mistake.split(), "overwrite=true")
        assert status == 2, (mistake, capsys.readouterr())
        assert files(finished / stage) == before, mistake
        assert not list(finished.glob(".*.old")), mistake
        assert "Traceback" not in capsys.readouterr().err
