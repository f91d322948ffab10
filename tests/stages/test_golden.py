"""What commands come to, frozen: the settings of every experiment, and the files and figures of the miniature run.

A difference here is one that users see. Where it is meant, `python tests/stages/test_golden.py` freezes what is now.
"""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "golden"
EXPERIMENTS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
# The data of one's own that an experiment asks for.
PATHS = {
    "chinese_dialog": "data.path=talk.jsonl",
    "chinese_dialog_from_scratch": "data.path=talk.jsonl stages.reward.data.path=reviews.csv",
    "code_gpt": "data.path=src",
}
# What users type beside an experiment's name.
COMMANDS = [
    "stage=sft",
    "stage=ppo name=a trainer.kl_coef=0.1 seed=3",
    "stage=ppo stages.ppo.trainer.kl_coef=0.1 trainer.learning_rate=1e-5",
    "stage=ppo experiment=imdb_sentiment reward=length reward.target=20 trainer.total_episodes=512",
    "stage=ppo policy=gpt2",
    "stage=ppo policy=causal_lm policy.path=my/model reward=classifier reward.path=my/judge data=text data.path=t.txt",
    "stage=ppo policy=gpt2 experiment=demo",
    "stage=ppo reward=sum reward.parts=[{name:length,target:9},{name:repetition,weight:0.5}]",
    "stage=ppo policy.lora={r:4} trainer.critic=separate",
    "stage=sft experiment=null data=instructions data.path=指令.jsonl",
    "stage=reward data=preferences data.path=pairs.jsonl reward=preference_model",
    "stage=reward experiment=human_feedback trainer.num_train_epochs=2",
    "stage=collect experiment=human_feedback labeler=toy_sentiment collect.answers=3",
    "stage=evaluate evaluate.best_of=4 evaluate.rewards=[{name:length,target:5}]",
    "stage=pretrain policy.size=small",
    "stage=pretrain policy.size=mini seed=7 runs=elsewhere",
    "stage=ppo experiment=chinese_dialog data.path=d.jsonl ptx.name=text ptx.path=t.txt trainer.ptx_coef=0.5",
    "stage=ppo hub.push=me/model report.lang=zh",
    "stage=plan policy.size=xl plan.launch=zero3 plan.gpus=8",
]


def settings_of(words: str, call: Callable[..., int], patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The settings that a stage is given for a command."""
    from rlhf_pipeline.errors import UserError

    seen: list[dict[str, Any]] = []

    def run(settings: Any, out: Any) -> None:
        seen.append(settings.to_dict())
        raise UserError("seen")

    patch.setattr("rlhf_pipeline.cli.run_module", run)
    assert call(*words.split()) == 2
    assert len(seen) == 1, words
    return json.loads(json.dumps(seen[0]))  # type: ignore[no-any-return]


def commands() -> dict[str, list[str]]:
    """Those of each fixture, by its file's name."""
    found = {}
    for name in EXPERIMENTS:
        stages = yaml.safe_load((ROOT / "conf" / "experiment" / f"{name}.yaml").read_text())["stages"]
        more = f" {PATHS[name]}" if name in PATHS else ""
        found[name] = [f"stage={stage} experiment={name}{more}" for stage in stages]
    return {**found, "typed": COMMANDS}


def read(name: str) -> Any:
    return json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", [*EXPERIMENTS, "typed"])
def test_the_settings_of_commands_are_as_they_were(
    name: str, command_line: Callable[..., int], workplace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = read(name)
    assert list(frozen) == commands()[name]
    for words, expected in frozen.items():
        assert settings_of(words, command_line, monkeypatch) == expected, words


def files_of(run: Path) -> list[str]:
    return sorted(
        str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and not path.name.startswith(".")
    )


def figures_of(run: Path) -> dict[str, Any]:
    """Losses of the trained stages, what their log rows hold, and the evaluation's shape."""
    stages = ("pretrain", "sft", "reward", "ppo")
    results = {stage: json.loads((run / stage / "run.json").read_text())["results"] for stage in stages}
    logs = {stage: (run / stage / "metrics.jsonl").read_text().splitlines() for stage in stages}
    rows = {stage: sorted({key for line in lines for key in json.loads(line)}) for stage, lines in logs.items()}
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    return {
        "losses": {stage: results[stage]["eval_loss"] for stage in ("pretrain", "sft")},
        "results": {stage: sorted(results[stage]) for stage in stages},
        "rows": rows,
        "evaluation": sorted(evaluation),
        "policies": {name: sorted(row) for name, row in evaluation["metrics"].items()},
        "perplexity": {name: row["perplexity"] for name, row in evaluation["metrics"].items()},
    }


def test_the_miniature_run_leaves_the_same_files_and_figures(miniature: Path) -> None:
    frozen = read("miniature")
    assert files_of(miniature) == frozen["files"]
    found = figures_of(miniature)
    for key in ("results", "rows", "evaluation", "policies"):
        assert found[key] == frozen["figures"][key], key
    assert found["losses"] == pytest.approx(frozen["figures"]["losses"], rel=0.01)
    assert found["perplexity"] == pytest.approx(frozen["figures"]["perplexity"], rel=0.2)


def freeze() -> None:
    """Write what is now."""
    sys.path.insert(0, str(ROOT / "tests"))
    from conftest import MINIATURE

    from rlhf_pipeline import cli

    def call(*args: str) -> int:
        sys.argv = ["rlhf_pipeline", *args]
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
        return 0

    GOLDEN.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        os.chdir(folder)
        assert call("stage=pipeline", *MINIATURE) == 0
        run = Path("runs/demo")
        write("miniature", {"files": files_of(run), "figures": figures_of(run)})
    for name, every in commands().items():
        with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
            os.chdir(folder)
            write(name, {words: settings_of(words, call, patch) for words in every})


def write(name: str, found: dict[str, Any]) -> None:
    """One line a command, so that a difference shows where it is."""
    lines = ",\n".join(
        f"{json.dumps(k)}: {json.dumps(v, ensure_ascii=False, sort_keys=True)}" for k, v in found.items()
    )
    (GOLDEN / f"{name}.json").write_text(f"{{\n{lines}\n}}\n", encoding="utf-8")


if __name__ == "__main__":
    freeze()
