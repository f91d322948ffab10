"""The benchmark on real pretrained weights: what it makes of files, without network, training or the weights."""

import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from conftest import benchmark, settings_of
from tiny import TEXTS, tiny_gguf, tiny_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

BASE = "runs/real/smollm2"


@pytest.fixture
def bench(workplace: Path) -> ModuleType:
    return benchmark("real")


def judged(*means: float) -> dict[str, object]:
    """What one reward makes of the base and of PPO."""
    metrics = {n: {"reward_mean": m, "reward_stderr": 0.1} for n, m in zip((BASE, "gae"), means, strict=True)}
    gain = {"mean": means[1] - means[0], "low": means[1] - means[0] - 0.2, "high": means[1] - means[0] + 0.2}
    return {"metrics": metrics, "paired_gain": {f"gae - {BASE}": gain}}


def evaluation() -> dict[str, object]:
    found = judged(0.5, 2.5)
    for name, own in found["metrics"].items():  # type: ignore[attr-defined]
        own.update(kl=3.0 * (name == "gae"), perplexity=20.0, distinct_2=0.7, length=19.5)
    return {**found, "reference": BASE, "rewards": {"classifier (b)": judged(0.6, 0.9), "python": judged(0.1, -0.2)},
            "samples": ["many"], "extremes": {}, "shown": [], "examples": ["few"]}  # fmt: skip


def test_a_gguf_file_becomes_a_folder_once(bench: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="the extra gguf is not installed")
    written = tiny_gguf(tmp_path / "tiny.gguf")
    folder = bench.convert(tmp_path / "tiny.gguf", tmp_path / "made")
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    assert torch.allclose(model.model.norm.weight, torch.from_numpy(written["output_norm"]))
    assert tokenizer(TEXTS[0])["input_ids"] == tiny_tokenizer()(TEXTS[0])["input_ids"]
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    (tmp_path / "tiny.gguf").unlink()
    assert bench.convert(tmp_path / "tiny.gguf", folder) == folder  # nothing is read again


def test_the_halves_and_the_test_share_no_review(bench: ModuleType, tmp_path: Path) -> None:
    for name, count in (("train", 20), ("test", 6)):
        rows = [{"text": f"{name} review {number}", "label": number % 2} for number in range(count)]
        rows += [{"text": "in both", "label": 1}]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = tmp_path / "train.jsonl", tmp_path / "test.jsonl"
    bench.divide(*files, tmp_path / "made", {"reviews": 8, "test": 7}, 0)
    parts = [(tmp_path / "made" / f"{name}.jsonl").read_text().splitlines() for name in ("first", "second", "test")]
    assert [len(part) for part in parts] == [8, 8, 7]
    assert len({json.loads(line)["text"] for part in parts for line in part}) == 23
    assert all("train review" in line for part in parts[:2] for line in part)


def test_the_program_takes_its_commands(bench: ModuleType) -> None:
    made = [settings_of(*words) for words in bench.commands(Path("runs/real/seed0"), Path(BASE), Path("e"), bench.FULL)]
    assert [each.name for each in made] == ["first", "second", *bench.ALGORITHMS, "compared"]
    first, second, *learners, compared = made
    # The judge learns from the other half, and is not what the policies learn from.
    assert [each.data["path"] for each in (first, second)] == [
        f"runs/real/seed0/{n}.jsonl" for n in ("first", "second")
    ]
    assert {each.reward["path"] for each in learners} == {"runs/real/seed0/first/reward"}
    assert [each["name"] for each in compared.evaluate.rewards] == ["classifier", "python"]
    assert compared.evaluate.rewards[0]["path"] == "runs/real/seed0/second/reward"
    # All learn from as many responses to the same prompts.
    same = ("total_episodes", "per_device_train_batch_size", "num_ppo_epochs", "learning_rate", "kl_coef")
    assert len({tuple(each.trainer[key] for key in same) for each in learners}) == 1
    assert len({each.data["path"] for each in (first, *learners)}) == 1


def test_the_table_shows_intervals_and_gains_by_every_judge(bench: ModuleType) -> None:
    header, _, base, ppo = bench.table(evaluation()).splitlines()
    assert header.count("|") == base.count("|") == ppo.count("|") == 9
    assert base.startswith("| SmolLM2-135M-Instruct | 0.500 ± 0.196 | 0.600 ± 0.196 | 0.100 ± 0.196 | 0.00 |")
    assert ppo.startswith(
        "| PPO | 2.500 ± 0.196, +2.000 [+1.800, +2.200] | 0.900 ± 0.196, +0.300 [+0.100, +0.500] "
        "| -0.200 ± 0.196, -0.300 [-0.500, -0.100] | 3.00 |"
    )


def test_what_is_kept_says_how_it_was_measured(bench: ModuleType, tmp_path: Path) -> None:
    hardware = {"cpu": "A CPU", "cores": 2, "threads": 1, "gpu": None}
    for name, stage in (("compared", "evaluate"), ("gae", "ppo"), ("first", "reward"), ("second", "reward")):
        (tmp_path / name / stage).mkdir(parents=True)
        record = {"seconds": 5.0, "git": {"commit": "0123456789", "dirty": stage == "ppo"}, "hardware": hardware,
                  "versions": {"python": "3", "torch": "2", "trl": "1"}, "results": {"accuracy": 0.8},
                  "status": "done", "finished": "2030-01-02T03:04:05+00:00", "seed": 3}  # fmt: skip
        (tmp_path / name / stage / "run.json").write_text(json.dumps(record))
    (tmp_path / "compared" / "evaluate" / "evaluation.json").write_text(json.dumps(evaluation()))
    kept = bench.summary(tmp_path)
    measured = {"commit": "0123456", "seed": 3, "machine": "A CPU", "date": "2030-01-02"}
    assert measured.items() <= kept["measured"].items()
    assert (kept["seconds"], kept["runs"]["gae"]) == (20.0, 5.0)
    assert kept["classifiers"]["second"] == {"accuracy": 0.8}
    assert not {"examples", "samples"} & kept["evaluation"].keys()
    assert bench.table(kept["evaluation"]) == bench.table(evaluation())
