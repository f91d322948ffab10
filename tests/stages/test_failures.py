"""What goes wrong is said, and is not taken for done; what a stranger's run names is not executed."""

import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import MINIATURE, CommandLine


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_a_loss_that_is_not_finite_is_no_finished_stage(
    stage: str, run: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    for made in ("reward", "ppo", "evaluate", *([stage] if stage in ("pretrain", "sft") else [])):
        shutil.rmtree(run / made, ignore_errors=True)
    rows = [{"prompt": f"Film {i} was", "chosen": f" good {i}.", "rejected": f" bad {i}."} for i in range(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word for word in MINIATURE if "stages" not in word or (stage in word and "epochs" not in word)]
    pairs = ["data=preferences", "data.path=pairs.jsonl", "experiment=demo"] if stage == "dpo" else []
    rate = "trainer.learning_rate=1e30 trainer.max_grad_norm=1e30 trainer.num_train_epochs=3 trainer.logging_steps=1"
    assert command_line(f"stage={stage}", *words, *pairs, *rate.split()) == 2
    assert "is nan at step" in capsys.readouterr().err
    record = json.loads((run / stage / "run.json").read_text())
    assert record["status"] == "failed"
    assert not (run / stage / "model").exists()


def test_a_stage_whose_model_was_deleted_is_not_passed_over(
    run: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    for gone in ("sft/model", "ppo", "evaluate"):
        shutil.rmtree(run / gone)
    for stage in ("sft", "pipeline", "ppo", "evaluate"):
        assert command_line(f"stage={stage}", *MINIATURE) == 2
        error = capsys.readouterr().err
        assert "runs/demo/sft is done, but its model/ is gone" in error
        assert "stage=sft name=demo overwrite=true" in error


@pytest.fixture
def strangers(run: Path) -> Path:
    """The run with a reward of its own, whose code leaves a mark."""
    code = "from pathlib import Path; Path('executed').touch()"
    Path("evil.py").write_text(
        f"{code}\ndef score(prompts, completions): return [float(len(x)) for x in completions]\n"
    )
    for stage in ("ppo", "reward"):
        config = yaml.safe_load((run / stage / "config.yaml").read_text())
        config["reward"] = {"name": "python", "path": "evil.py:score"}
        (run / stage / "config.yaml").write_text(yaml.safe_dump(config))
    return run


def test_a_recorded_function_runs_only_if_the_command_names_it(
    strangers: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("stage=chat", "--prompt", "It was") == 0
    assert "to run it, add reward.path=evil.py:score" in capsys.readouterr().out
    for asked in (
        ["stage=evaluate", "sweep=demo", "name=other"],
        ["--config-path", "runs/demo/ppo", "--config-name", "config", "name=other"],
    ):
        assert command_line(*asked) == 2
        assert "to run it, add reward.path=evil.py:score" in capsys.readouterr().err
    assert command_line("--config-path", "runs/demo/ppo", "--config-name", "config", "name=x", "++reward.scale=1") == 2
    assert command_line("stage=chat", "name=demo", "--prompt", "It was", "reward=python") == 2
    assert not Path("executed").exists()
    assert (
        command_line("stage=chat", "name=demo", "--prompt", "It was", "reward=python", "reward.path=evil.py:score") == 0
    )
    assert Path("executed").exists()


def test_settings_read_no_environment(
    workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "hunter2")
    assert command_line("stage=pretrain", "trainer.run_name=${oc.env:SECRET}") == 2
    error = capsys.readouterr().err
    assert "let the shell fill it in" in error
    assert "hunter2" not in error
    assert not list(workplace.rglob("config.yaml"))
