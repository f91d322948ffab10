"""What goes wrong is said, and is not taken for done; what a stranger's run names is not executed."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from conftest import MINIATURE, CommandLine, Refused, change

from rlhf_pipeline.files import read_json


@pytest.mark.parametrize("stage", ["pretrain", "sft", "reward", "dpo"])
def test_a_loss_that_is_not_finite_is_no_finished_stage(stage: str, run: Path, refused: Refused) -> None:
    for made in ("reward", "ppo", "evaluate", *([stage] if stage in ("pretrain", "sft") else [])):
        shutil.rmtree(run / made, ignore_errors=True)
    rows = [{"prompt": f"Film {i} was", "chosen": f" good {i}.", "rejected": f" bad {i}."} for i in range(60)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = [word for word in MINIATURE if "stages" not in word or (stage in word and "epochs" not in word)]
    pairs = ["data=preferences", "data.path=pairs.jsonl", "experiment=demo"] if stage == "dpo" else []
    rate = "trainer.learning_rate=1e30 trainer.max_grad_norm=1e30 trainer.num_train_epochs=3 trainer.logging_steps=1"
    assert "is nan at step" in refused(f"stage={stage} {rate} {shlex.join([*words, *pairs])}")
    assert read_json(run / stage / "run.json")["status"] == "failed"
    assert not (run / stage / "model").exists()


def test_a_stage_whose_model_was_deleted_is_not_passed_over(run: Path, refused: Refused) -> None:
    for gone in ("sft/model", "ppo", "evaluate"):
        shutil.rmtree(run / gone)
    for stage in ("sft", "pipeline", "ppo", "evaluate"):
        error = refused(f"stage={stage} {' '.join(MINIATURE)}")
        assert "runs/demo/sft is done, but its model/ is gone" in error
        assert "stage=sft name=demo overwrite=true" in error


def test_a_recorded_function_runs_only_if_the_command_names_it(
    run: Path, command_line: CommandLine, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    code = "from pathlib import Path; Path('executed').touch()"
    Path("evil.py").write_text(
        f"{code}\ndef score(prompts, completions): return [float(len(x)) for x in completions]\n"
    )
    for stage in ("ppo", "reward"):
        change(run / stage / "config.yaml", reward={"name": "python", "path": "evil.py:score"})
    hint, recorded = "to run it, add reward.path=evil.py:score", "--config-path runs/demo/ppo --config-name config"
    assert command_line("stage=chat", "--prompt", "It was") == 0
    assert hint in capsys.readouterr().out
    for asked in ("stage=evaluate sweep=demo", recorded, f"{recorded} ++reward.scale=1"):
        assert hint in refused(f"{asked} name=other")
    refused("stage=chat name=demo --prompt 'It was' reward=python")
    assert not Path("executed").exists()
    named = ("reward=python", "reward.path=evil.py:score")
    assert command_line("stage=chat", "name=demo", "--prompt", "It was", *named) == 0
    assert Path("executed").exists()
