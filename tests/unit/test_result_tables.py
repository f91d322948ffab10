"""The tables of results in the READMEs are what their script makes from the results that are kept."""

import json
import shutil
from pathlib import Path
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


def made(folder: Path) -> Path:
    """A finished run with round figures, below a root that has one README."""
    run = folder / "runs" / "mine"
    metrics = {name: {"reward_mean": mean, "reward_stderr": 0.02, "kl": kl}
               for name, mean, kl in (("sft", 0.25, 0.0), ("ppo", 0.75, 1.5))}  # fmt: skip
    evaluation = {
        "prompts": 8, "prompts_in_training": 3, "reference": "sft", "metrics": metrics, "samples": [{"prompt": "said"}],
        "paired_gain": {"ppo - sft": {"mean": 0.5, "low": 0.4, "high": 0.6, "win_rate": 0.9}},
    }  # fmt: skip
    record = {
        "status": "done", "seconds": 30.0, "seed": 7, "finished": "2030-01-02T03:04:05+00:00",
        "git": {"commit": "0123456789abcdef", "dirty": False},
        "hardware": {"cpu": "a [fast] one", "gpu": None, "cores": 4, "threads": 2},
        "versions": {"python": "3.12.1", "torch": "2.13.0", "trl": "1.16.0"},
    }  # fmt: skip
    log = [{"step": n, "objective/scores": n / 9, "objective/kl": n / 3, "lr": 1} for n in range(9)]
    for stage in ("ppo", "evaluate"):
        (run / stage).mkdir(parents=True)
        (run / stage / "run.json").write_text(json.dumps(record))
    (run / "evaluate" / "evaluation.json").write_text(json.dumps(evaluation))
    write_jsonl(run / "ppo" / "metrics.jsonl", log)
    (folder / "README.md").write_text("Above.\n<!-- table: evaluation m* -->\nold\n<!-- end -->\nBelow.\n")
    return run


def test_a_run_is_kept_and_shown(tmp_path: Path) -> None:
    run = made(tmp_path)
    assert tables.main([str(run), "--keep", "mine"], tmp_path) == 0
    kept = json.loads((tmp_path / tables.RESULTS / "mine.json").read_text())
    assert kept["measured"]["commit"] == "0123456"
    assert kept["seconds"] == 60
    assert "samples" not in kept["evaluation"]
    shown = (tmp_path / "README.md").read_text()
    assert shown.startswith("Above.\n<!-- table: evaluation m* -->\n|")
    assert shown.endswith("\n<!-- end -->\nBelow.\n")
    assert "old" not in shown
    row = next(line for line in shown.splitlines() if line.startswith("| ppo"))
    assert [cell.strip() for cell in row.strip("|").split("|")] == ["ppo", "0.750", "0.020", "1.50"]
    for said in ("+0.500", "+0.400", "+0.600", "2030-01-02", "0123456", "seed 7", "a &#91;fast&#93; one", "1 min 0 s"):
        assert said in shown.replace("\n", " ")
    assert ElementTree.parse(tmp_path / tables.PICTURES / "mine.svg").getroot().tag.endswith("svg")


def test_a_comparison_is_kept_and_shown(tmp_path: Path) -> None:
    run = made(tmp_path)
    gain = {"mean": 0.25, "low": 0.125, "high": 0.375}
    start = {"reward_mean": 0.5, "kl": 0.0, "rewards": {}}
    found = {"reward": "r", "algorithms": {"SFT": start, "rloo": {**start, "reward_mean": 0.75, "gain": gain}},
             "starts": ["many answers"], "points": [], "fits": []}  # fmt: skip
    (run / "evaluate").rename(run / "compare")
    (run / "compare" / "comparison.json").write_text(json.dumps(found))
    (tmp_path / "README.md").write_text("<!-- table: comparison mine -->\n<!-- end -->\n")
    assert tables.main([str(run), "--keep", "mine"], tmp_path) == 0
    assert "many answers" not in (tmp_path / tables.RESULTS / "mine.json").read_text()
    shown = (tmp_path / "README.md").read_text()
    assert "| rloo | 0.750 |" in shown
    assert all(part in shown for part in ("+0.250", "+0.125", "+0.375", "0123456"))


def test_a_frontier_is_kept_and_shows_the_results(tmp_path: Path) -> None:
    run = made(tmp_path)
    row = {"run": "kl=0.1", "reward_mean": 0.75, "kl": 1.5, "rewards": {"truth": {"reward_mean": 0.625}},
           "answers": ["many answers"], "values": [1.0]}  # fmt: skip
    best = [{"n": n, "kl": 0.1 * n, "reward_mean": 0.5} for n in (1, 2, 3)]
    found = {"sweep": "s", "reward": "r", "fits": [], "starts": [{"key": "k", "best_of": best, "answers": [row]}],
             "points": [{**row, "step": 4}, {**row, "step": None}]}  # fmt: skip
    (run / "evaluate").rename(run / "frontier")
    (run / "frontier" / "frontier.json").write_text(json.dumps(found))
    (tmp_path / "README.md").write_text("<!-- table: frontier mine -->\n<!-- end -->\n")
    assert tables.main([str(run), "--keep", "mine"], tmp_path) == 0
    assert "many answers" not in (tmp_path / tables.RESULTS / "mine.json").read_text()
    shown = (tmp_path / "README.md").read_text()
    assert [line.split("|")[1].strip() for line in shown.splitlines() if "0.750" in line] == ["kl=0.1"]
    assert all(part in shown for part in ("0.625", "best of 2", "0123456"))


def test_a_reward_model_is_kept_and_shown(tmp_path: Path) -> None:
    run = made(tmp_path)
    (run / "evaluate").rename(run / "reward")
    record = json.loads((run / "reward" / "run.json").read_text())
    data = {"name": "preferences", "path": "/some/pairs_of_people.jsonl"}
    (run / "reward" / "run.json").write_text(json.dumps({**record, "data": data}))
    quality = {"accuracy": 0.625, "rows": 1234, "length_correlation": -0.75, "examples": ["a text"]}
    (run / "reward" / "quality.json").write_text(json.dumps(quality))
    (tmp_path / "README.md").write_text("<!-- table: quality mine -->\n<!-- end -->\n")
    assert tables.main([str(run), "--keep", "mine"], tmp_path) == 0
    kept = (tmp_path / tables.RESULTS / "mine.json").read_text()
    assert "a text" not in kept
    assert "/some" not in kept
    shown = (tmp_path / "README.md").read_text()
    assert all(part in shown for part in ("pairs_of_people.jsonl", "0.625", "1234", "-0.750", "0123456"))


def test_the_figures_are_of_the_kept_file(tmp_path: Path) -> None:
    tables.main([str(made(tmp_path)), "--keep", "mine"], tmp_path)
    kept = tmp_path / tables.RESULTS / "mine.json"
    kept.write_text(kept.read_text().replace("0.75", "0.875"))
    text = (tmp_path / "README.md").read_text()
    again = tables.written(text, "en", tmp_path)
    assert "0.750" in text
    assert "0.875" in again
    assert again.replace("0.875", "0.750") == text


def test_a_run_is_printed_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path)
    assert tables.main([str(run), "--lang", "zh"], tmp_path) == 0
    assert "| ppo | 0.750 |" in capsys.readouterr().out
    assert "old" in (tmp_path / "README.md").read_text()
    assert not (tmp_path / tables.RESULTS).exists()


def test_what_cannot_be_made_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = made(tmp_path)
    with pytest.raises(UserError, match="evaluation, whole_evaluation"):
        tables.written("<!-- table: chart mine -->\n<!-- end -->", "en", tmp_path)
    with pytest.raises(UserError, match="none"):
        tables.written("<!-- table: evaluation mine -->\n<!-- end -->", "en", tmp_path)
    assert tables.main([str(run), "--commit", "abc"], tmp_path) == 2
    assert tables.main([str(run), str(run), "--keep", "mine"], tmp_path) == 2
    shutil.rmtree(run / "evaluate")
    assert tables.main([str(run)], tmp_path) == 2
    assert str(run) in capsys.readouterr().err
