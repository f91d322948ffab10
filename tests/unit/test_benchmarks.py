"""The benchmarks without their hours: figures that are kept, commands that the program takes, what becomes of failures.

The tables are tested on the results that are kept, in test_result_tables.py.
"""

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

import pytest
import torch
from conftest import benchmark, settings_of
from tiny import TEXTS, tiny_gguf, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_pipeline.files import read_json, write_json, write_jsonl

kept, human_feedback, real = map(benchmark, ("kept", "human_feedback", "real"))


@pytest.fixture
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine, its versions and a commit."""
    hardware = {"cpu": "Some CPU", "gpu": "Some GPU", "cores": 2}
    monkeypatch.setattr(kept, "_asked", lambda: (hardware, {"torch": "2.0"}))
    monkeypatch.setattr(kept, "commit", lambda: "abc")


def options(*words: str) -> Namespace:
    parser = ArgumentParser()
    kept.add_options(parser)
    return parser.parse_args(words)


def rows(folder: Path) -> list[dict]:
    return kept.rows_of(map(read_json, sorted(folder.iterdir())))


@pytest.mark.usefixtures("_machine")
def test_another_run_at_a_commit_adds_to_its_file(tmp_path: Path) -> None:
    for name, value in (("one", 1), ("two", 2), ("one", 3)):
        kept.Kept("speed", options("--results", str(tmp_path))).add(name, {"n": 5, "value": value})
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("speed-some-cpu-")
    assert file.name.endswith("-abc.json")
    assert {row["name"]: row["value"] for row in rows(tmp_path)} == {"one": 3, "two": 2}
    assert all({"date", "load", "command", "versions", "n"} <= set(row) for row in rows(tmp_path))


@pytest.mark.usefixtures("_machine")
def test_the_newest_figure_of_a_machine_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for commit, device, value in (("zzz", "cpu", 1), ("abc", "cpu", 2), ("abc", "cuda", 3)):
        monkeypatch.setattr(kept, "commit", lambda commit=commit: commit)
        opened = kept.Kept("speed", options("--results", str(tmp_path)), device)
        opened.circumstances["date"] = f"2026-01-0{value}"
        opened.add("one", {"n": 1, "value": value})
    assert [row["value"] for row in rows(tmp_path)] == [2, 3]
    text = kept.by_machine(lambda own: kept.table(["x"], [[str(own[0]["value"])]]))(rows(tmp_path))
    assert "| 2 |" in text
    assert "Measured on Some GPU; torch 2.0" in text


@pytest.mark.usefixtures("_machine")
def test_quick_figures_are_kept_only_where_a_folder_is_named(tmp_path: Path) -> None:
    assert kept.Kept("speed", options("--quick")).path is None
    assert kept.Kept("speed", options("--quick", "--results", str(tmp_path))).path.parent == tmp_path
    assert kept.Kept("speed", options()).path.parent == kept.RESULTS


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
        write_json(folder / "evaluate" / "evaluation.json", {"metrics": metrics})
        write_json(folder / "reward" / "quality.json", {"accuracy": 0.75})


def test_a_seed_that_fails_is_named_and_the_others_are_shown(
    workplace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(human_feedback, "run", stand_in)
    monkeypatch.setattr(sys, "argv", ["", "--seeds", "3", "--rounds", "2", "--prompts", "20", "10"])
    with pytest.raises(SystemExit, match="1"):
        human_feedback.main()
    said = capsys.readouterr()
    assert "seed 1, 20 prompts: ended with exit status 2: error: no room (" in said.err
    assert "human_feedback-1.log" in said.err
    rewards = said.out.partition("accuracy")[0]
    assert "| 20 | 0.500 ± 0.000 (2 of 3 seeds) | 0.620 ± 0.020 (2 of 3 seeds) |" in rewards
    assert "| 10 | 0.500 ± 0.000 | 0.620 ± 0.012 | 0.720 ± 0.012 |" in rewards
    picture = Path("human_feedback.svg").read_text()
    assert all(f"true reward, {count} prompts a round</text>" in picture for count in (20, 10))
    assert picture.count("<polyline") == 2 * (1 + 3)  # a line, and a bar at each of its points
    asked = Path("human_feedback-1.log").read_text()
    assert "name=human_feedback/seed1/10 collect.prompts=10" in asked  # what failed leaves the rest be
    assert all("labeler=toy_sentiment" in line for line in asked.splitlines() if "stage=" in line)
    assert not any(word.startswith("reward") for word in asked.split())  # what PPO learns from is the reward model
    assert human_feedback.cell([0.5], 1) == "0.500"  # of one seed there is no spread
    assert human_feedback.cell([], 1) == "-"


def test_a_gguf_file_becomes_a_folder_once(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    written = tiny_gguf(tmp_path / "tiny.gguf")
    folder = real.convert(tmp_path / "tiny.gguf", tmp_path / "made")
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert torch.allclose(model.model.norm.weight, torch.from_numpy(written["output_norm"]))
    assert tokenizer(TEXTS[0])["input_ids"] == tiny_tokenizer()(TEXTS[0])["input_ids"]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    (tmp_path / "tiny.gguf").unlink()
    assert real.convert(tmp_path / "tiny.gguf", folder) == folder  # nothing is read again


def test_the_halves_and_the_test_share_no_review(tmp_path: Path) -> None:
    for name, count in (("train", 20), ("test", 6)):
        own = [{"text": f"{name} review {number}", "label": number % 2} for number in range(count)]
        write_jsonl(tmp_path / f"{name}.jsonl", [*own, {"text": "in both", "label": 1}])
    files = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    real.divide(*files, tmp_path / "made", {"reviews": 8, "test": 7}, 0)
    parts = [(tmp_path / "made" / f"{name}.jsonl").read_text().splitlines() for name in ("first", "second", "test")]
    assert [len(part) for part in parts] == [8, 8, 7]
    assert len({json.loads(line)["text"] for part in parts for line in part}) == 23
    assert all("train review" in line for part in parts[:2] for line in part)


def test_the_program_takes_the_commands_of_real(workplace: Path) -> None:
    asked = real.commands(Path("runs/real/seed0"), Path("runs/real/smollm2"), Path("e"), real.FULL)
    made = [settings_of(*words) for words in asked]
    assert [each.name for each in made] == ["first", "second", *real.ALGORITHMS, "compared"]
    first, second, *learners, compared = made
    # The judge learns from the other half, and is not what the policies learn from.
    halves = [f"runs/real/seed0/{half}.jsonl" for half in ("first", "second")]
    assert [each.data["path"] for each in (first, second)] == halves
    assert {each.reward["path"] for each in learners} == {"runs/real/seed0/first/reward"}
    assert [each["name"] for each in compared.evaluate.rewards] == ["classifier", "python"]
    assert compared.evaluate.rewards[0]["path"] == "runs/real/seed0/second/reward"
    # All learn from as many responses to the same prompts.
    same = ("total_episodes", "per_device_train_batch_size", "num_ppo_epochs", "learning_rate", "kl_coef")
    assert len({tuple(each.trainer[key] for key in same) for each in learners}) == 1
    assert len({each.data["path"] for each in (first, *learners)}) == 1


def test_what_real_keeps_says_how_it_was_measured(tmp_path: Path) -> None:
    hardware = {"cpu": "A CPU", "cores": 2, "threads": 1, "gpu": None}
    for name, stage in (("compared", "evaluate"), ("gae", "ppo"), ("first", "reward"), ("second", "reward")):
        record = {"seconds": 5.0, "git": {"commit": "0123456789", "dirty": stage == "ppo"}, "hardware": hardware,
                  "versions": {"python": "3", "torch": "2", "trl": "1"}, "results": {"accuracy": 0.8},
                  "status": "done", "finished": "2030-01-02T03:04:05+00:00", "seed": 3}  # fmt: skip
        write_json(tmp_path / name / stage / "run.json", record)
    write_json(tmp_path / "compared" / "evaluate" / "evaluation.json", {"metrics": {}, "samples": ["many"]})
    found = real.summary(tmp_path)
    measured = {"commit": "0123456", "seed": 3, "machine": "A CPU", "date": "2030-01-02"}
    assert measured.items() <= found["measured"].items()
    assert (found["seconds"], found["runs"]["gae"]) == (20.0, 5.0)
    assert found["classifiers"]["second"] == {"accuracy": 0.8}
    assert found["evaluation"] == {"metrics": {}}
