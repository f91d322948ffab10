"""The cards of a miniature run: they say what the run was, their code runs, and the hub gives their models back."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import MINIATURE, CommandLine

from rlhf_pipeline import cli
from rlhf_pipeline.report.cards import model_card, with_model_id
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.lineage import content_hash
from rlhf_pipeline.settings import Hub

STAGES = ("pretrain", "sft", "reward", "ppo")


def card(run: Path, stage: str) -> str:
    return (run / stage / "model" / "README.md").read_text(encoding="utf-8")


def code(text: str, language: str) -> str:
    """The block of a language."""
    found = re.search(rf"^```{language}\n(.*?)\n```$", text, re.MULTILINE | re.DOTALL)
    assert found
    return found[1]


def test_every_model_has_a_card_that_is_up_to_date(miniature: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(miniature.parents[1])
    for stage, role in {"pretrain": "base", "sft": "sft", "reward": None, "ppo": "ppo"}.items():
        text, record = card(miniature, stage), json.loads((miniature / stage / "run.json").read_text())
        assert text == model_card(Path("runs", "demo", stage))
        assert record["data"]["sha256"] in text
        for parent in record["parents"].values():
            assert f"| {parent['path']} | {parent['sha256']} |" in text
        assert ("## Evaluation" in text) == (f"This model is {role}." in text) == bool(role)


@pytest.mark.parametrize("stage", STAGES)
def test_the_settings_of_a_card_are_the_same_work(
    stage: str, miniature: Path, workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(miniature, workplace / "runs" / "demo")) / stage
    before = content_hash(folder)
    (workplace / "config.yaml").write_text(code(card(miniature, stage), "yaml"))
    assert command_line("--config-path", ".", "--config-name", "config") == 0
    assert f"runs/demo/{stage} is done already" in capsys.readouterr().out
    assert content_hash(folder) == before


def test_a_pipeline_pushes_the_policy_that_it_trained_last_once_it_is_judged(
    miniature: Path, workplace: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = workplace / "runs" / "demo"
    shutil.copytree(miniature, run)
    shutil.rmtree(run / "evaluate")
    pushed: list[tuple[str, Hub, bool]] = []

    def publish(out: RunDir, to: Hub) -> None:
        pushed.append((str(out.model), to, (run / "evaluate" / "evaluation.json").exists()))

    monkeypatch.setattr(cli, "publish", publish)
    assert command_line("stage=pipeline", *MINIATURE, "hub.push=me/tiny", "++stages.sft.hub.push=me/before") == 0
    first, last = ("runs/demo/sft/model", Hub("me/before"), False), ("runs/demo/ppo/model", Hub("me/tiny"), True)
    assert pushed == [first, last]
    assert "push: null" not in (config := (run / "evaluate" / "config.yaml").read_text())
    assert yaml.safe_load(config)["hub"] == {}


def test_the_hub_gives_a_model_back(miniature: Path, hub: dict[str, str]) -> None:
    """Its files, in a repository of the stand-in, open by the card's own code, with the id for a folder."""
    root = Path(hub["REQUESTS_LOG"]).parent
    shutil.copytree(miniature / "ppo" / "model", root / "models" / "me" / "tiny")
    command = [sys.executable, "-c", code(with_model_id(card(miniature, "ppo"), "me/tiny"), "python")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=False, env=hub, cwd=root)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert re.search(r"GET /me/tiny/resolve/\w+/model.safetensors", Path(hub["REQUESTS_LOG"]).read_text())
