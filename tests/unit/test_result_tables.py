"""The tables of results in the READMEs are what their script makes from the results that are kept."""

import json
import shutil
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from conftest import ROOT, benchmark

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import read_jsonl, write_jsonl

tables = benchmark("tables")
READMES = tables.readmes()


def test_the_demo_is_in_both_languages_and_in_the_benchmarks() -> None:
    found = {path.relative_to(ROOT).as_posix(): lang for path, lang in READMES.items()}
    assert {"README.md": "en", "README.zh-CN.md": "zh", "tests/benchmarks/README.md": "en"}.items() <= found.items()


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_readme_shows_what_was_measured(readme: Path) -> None:
    text = readme.read_text(encoding="utf-8")
    assert tables.written(text, READMES[readme]) == text, "run: python tests/benchmarks/tables.py"


@pytest.mark.parametrize("picture", tables.pictures(), ids=lambda path: path.name)
def test_a_picture_shows_what_was_measured(picture: Path) -> None:
    text = picture.read_text(encoding="utf-8")
    assert text == tables.pictures()[picture], "run: python tests/benchmarks/tables.py"
    root = ElementTree.fromstring(text)
    lines = root.findall(".//{*}polyline")
    assert len(lines) == 2
    updates = read_jsonl(ROOT / tables.RESULTS / f"{picture.stem}.jsonl")
    assert [len(line.attrib["points"].split()) for line in lines] == [len(updates)] * 2


# What a finished run leaves: stage, file of its results, its content with and without what is not kept, what is shown.
GAIN = {"mean": 0.5, "low": 0.4, "high": 0.6}
START = {"reward_mean": 0.25, "kl": 0.0, "rewards": {}}
POINT = {"run": "kl=0.1", "reward_mean": 0.75, "kl": 1.5, "rewards": {"truth": {"reward_mean": 0.625}}}
BEST = [{"n": n, "kl": 0.1 * n, "reward_mean": 0.5} for n in (1, 2, 3)]
RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any], list[str]]] = {
    "evaluation": (
        "evaluate",
        {"prompts": 8, "prompts_in_training": 3, "reference": "sft", "paired_gain": {"ppo - sft": GAIN},
         "metrics": {"sft": {"reward_mean": 0.25}, "ppo": {"reward_mean": 0.75, "reward_stderr": 0.02, "kl": 1.5}}},
        {"samples": [{"prompt": "a text"}]},
        ["| ppo | 0.750 | 0.020 | 1.50 |", "+0.500", "+0.400", "+0.600", "1 min 0 s"],
    ),
    "comparison": (
        "compare",
        {"reward": "r", "algorithms": {"SFT": START, "rloo": {**START, "reward_mean": 0.75, "gain": GAIN}}, "fits": []},
        {"starts": ["a text"], "points": ["a text"]},
        ["| rloo | 0.750 |", "+0.500", "+0.400", "+0.600"],
    ),
    "frontier": (
        "frontier",
        {"reward": "r", "fits": [], "starts": [{"key": "k", "best_of": BEST}],
         "points": [{**POINT, "reward_mean": 0.7, "step": 4}, {**POINT, "step": None}]},
        {"starts": [{"key": "k", "best_of": BEST, "answers": ["a text"]}],
         "points": [{**POINT, "reward_mean": 0.7, "step": 4, "values": ["a text"]}, {**POINT, "step": None}]},
        ["| kl=0.1 | 0.750 |", "0.625", "best of 2"],
    ),
    "quality": (
        "reward",
        {"accuracy": 0.625, "rows": 1234, "length_correlation": -0.75},
        {"examples": ["a text"]},
        ["| pairs_of_people.jsonl | 0.625 | 1234 | -0.750 |"],
    ),
}  # fmt: skip


def made(folder: Path, what: str) -> Path:
    """A finished run below a root that has one README."""
    run = folder / "runs" / "mine"
    stage, kept, left_out, _ = RUNS[what]
    record = {
        "status": "done", "seconds": 30.0, "seed": 7, "finished": "2030-01-02T03:04:05+00:00",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "hardware": {"cpu": "a [fast] one", "gpu": None, "cores": 4, "threads": 2},
        "versions": {"python": "3.12.1", "torch": "2.13.0", "trl": "1.16.0"},
        "data": {"name": "preferences", "path": "/some/pairs_of_people.jsonl"},
    }  # fmt: skip
    for name in ("ppo", stage):
        (run / name).mkdir(parents=True)
        (run / name / "run.json").write_text(json.dumps(record))
    (run / stage / f"{what}.json").write_text(json.dumps({**kept, **left_out}))
    log = [{"step": n, "objective/scores": n / 9, "objective/kl": n / 3, "lr": 1} for n in range(9)]
    write_jsonl(run / "ppo" / "metrics.jsonl", log)
    (folder / "README.md").write_text(f"Above.\n<!-- table: {what} m* -->\nold\n<!-- end -->\nBelow.\n")
    return run


@pytest.mark.parametrize("what", RUNS)
def test_a_run_is_kept_without_its_answers_and_shown(what: str, tmp_path: Path) -> None:
    run = made(tmp_path, what)
    assert tables.main([str(run), "--keep", "mine"], tmp_path) == 0
    text = (tmp_path / tables.RESULTS / "mine.json").read_text()
    kept = json.loads(text)
    assert kept[what] == RUNS[what][1]
    assert (kept["measured"]["commit"], kept["seconds"]) == ("0123456", 60)
    assert "/some" not in text
    shown = (tmp_path / "README.md").read_text()
    assert shown.startswith(f"Above.\n<!-- table: {what} m* -->\n")
    assert shown.endswith("\n<!-- end -->\nBelow.\n")
    assert not {"old", "0.700"} & set(shown.split())  # 0.700: not a run's last policy
    for said in (*RUNS[what][3], "2030-01-02", "0123456", "seed 7", "a &#91;fast&#93; one"):
        assert said in shown.replace("\n", " "), said
    assert ElementTree.parse(tmp_path / tables.PICTURES / "mine.svg").getroot().tag.endswith("svg")


def test_the_figures_are_of_the_kept_file(tmp_path: Path) -> None:
    tables.main([str(made(tmp_path, "evaluation")), "--keep", "mine"], tmp_path)
    kept = tmp_path / tables.RESULTS / "mine.json"
    kept.write_text(kept.read_text().replace("0.75", "0.875"))
    text = (tmp_path / "README.md").read_text()
    assert tables.written(text, "en", tmp_path) == text.replace("0.750", "0.875") != text


def test_a_run_is_printed_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path, "evaluation")
    assert tables.main([str(run), "--lang", "zh"], tmp_path) == 0
    assert "| ppo | 0.750 |" in capsys.readouterr().out
    assert "old" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / tables.RESULTS).exists()


def test_what_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path, "evaluation")
    with pytest.raises(UserError, match="evaluation, whole_evaluation"):
        tables.written("<!-- table: chart mine -->\n<!-- end -->", "en", tmp_path)
    with pytest.raises(UserError, match="none"):
        tables.written("<!-- table: evaluation mine -->\n<!-- end -->", "en", tmp_path)
    assert tables.main([str(run), str(run), "--keep", "mine"], tmp_path) == 2
    shutil.rmtree(run / "evaluate")
    assert tables.main([str(run)], tmp_path) == 2
    assert str(run) in capsys.readouterr().err
