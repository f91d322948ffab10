"""stage=compare: algorithms and seeds as runs of their own, one table; and rejection sampling, which is one of them."""

import json
import math
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from conftest import MINIATURE, CommandLine, Refused, once, settings_of

from rlhf_pipeline.cli import in_order
from rlhf_pipeline.data import load_data
from rlhf_pipeline.data.tokenization import demonstrations
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import read_json, read_jsonl
from rlhf_pipeline.models.policies import train_tokenizer

# Of the experiment's five algorithms the two that are made otherwise: by groups, and by collecting first.
SMALL = (
    "stage=compare", "experiment=compare", "name=demo", *MINIATURE, "evaluate.best_of=5",
    "comparison.at_once=2", "comparison.seeds=[1,2]",
    *(f"comparison.algorithms.{name}=null" for name in ("ppo", "grpo", "dpo")),
    "stages.ppo.trainer.gradient_accumulation_steps=1", "stages.ppo.trainer.eval_samples=16",
    "stages.collect.collect.prompts=24",
)  # fmt: skip


@pytest.fixture
def run(miniature: Path, workplace: Path) -> Path:
    """A copy of what the algorithms start from."""
    for stage in ("pretrain", "sft", "reward"):
        shutil.copytree(miniature / stage, workplace / "runs" / "demo" / stage)
    return workplace / "runs" / "demo"


def test_algorithms_are_compared_and_what_failed_or_is_new_is_run_again(
    run: Path, command_line: CommandLine, capfd: pytest.CaptureFixture[str]
) -> None:
    broken = "comparison.algorithms.broken=stage=dpo data=preferences data.path=nowhere.jsonl"
    assert command_line(*once(*SMALL, broken, "comparison.algorithms.best-of-4-sft=null")) == 2
    said = capfd.readouterr()
    assert "2 of 4 runs failed" in said.err
    assert "nowhere.jsonl" in said.err
    before = read_json(run / "compare" / "comparison.json")
    assert before["failed"] == ["demo/broken,seed=1", "demo/broken,seed=2"]
    assert list(before["algorithms"]) == ["SFT", "best of 4", "best of 5", "rloo"]

    # An algorithm joins, another leaves: what is done is neither run nor measured again.
    assert command_line(*SMALL) == 0
    said = capfd.readouterr()
    assert {line for line in said.out.splitlines() if line.startswith("== ")} == {
        f"== demo/best-of-4-sft,seed={seed}" for seed in (1, 2)
    }
    names = [f"{name},seed={seed}" for seed in (1, 2) for name in ("rloo", "best-of-4-sft")]
    found, frontier = read_json(run / "compare" / "comparison.json"), read_json(run / "compare" / "frontier.json")
    assert list(found["algorithms"]) == ["SFT", "best of 4", "best of 5", "rloo", "best-of-4-sft"]
    start = frontier["starts"][0]
    assert start["prompts"] == 24
    assert 0 <= start["prompts_in_training"] < 24, "so small a vocabulary splits words"
    points: dict[str, list[dict[str, Any]]] = {name: [] for name in names}  # of each run, the last is its result
    for point in frontier["points"]:
        points[point["run"]].append(point)
    assert all(points.values())
    assert [point["step"] for point in points["rloo,seed=1"]] == [2, 4, 6, 8, 10, 12]

    for name, row in found["algorithms"].items():
        assert "toy_sentiment" in row["rewards"], name
        assert ("gain" in row) == (name != "SFT")
    for name in ("rloo", "best-of-4-sft"):
        row, of = found["algorithms"][name], [points[f"{name},seed={seed}"][-1] for seed in (1, 2)]
        assert row["seeds"] == 2
        assert row["reward_mean"] == pytest.approx(sum(each["reward_mean"] for each in of) / 2)
        assert row["gain"]["mean"] == pytest.approx(row["reward_mean"] - start["reward_mean"], abs=1e-5)
        assert row["gain"]["low"] <= row["gain"]["mean"] <= row["gain"]["high"]
        assert row["seconds"] > 0
        assert 96 <= row["sampled_tokens"] <= 96 * 8 * 1.5, "96 answers of at most 8 tokens, few of them drawn twice"
    best = [row["reward_mean"] for row in start["best_of"]]
    assert best == sorted(best)
    assert found["algorithms"]["best of 5"]["reward_mean"] == pytest.approx(best[-1])
    assert found["algorithms"]["best of 5"]["kl"] == pytest.approx(math.log(5) - 4 / 5)

    page = (run / "compare" / "report.html").read_text()
    for shown in (page, said.out):
        assert "Algorithms, means over seeds" in shown
        assert "best of 5" in shown
    assert page.count('<figure class="wide">') == 2
    fits = {(fit["way"], fit["reward"]) for fit in found["fits"]}
    assert fits == {(way, reward) for way in ("best of n", "rloo") for reward in ("", "toy_sentiment")}

    # A policy of rejection sampling learns the best of what the SFT policy answered, and of no review.
    taught = read_json(run / "best-of-4-sft,seed=1" / "sft" / "run.json")
    assert taught["data"]["name"] == "preferences"
    assert taught["parents"]["policy"]["path"] == "runs/demo/sft/model"
    labels = read_jsonl(run / "best-of-4-sft,seed=1" / "collect" / "labels.jsonl")
    assert taught["data"]["train"] + taught["data"]["test"] <= len(labels) <= 24

    # Once more: nothing is run nor measured, even if the table is lost. With fewer seeds the others are left out.
    (run / "compare" / "comparison.json").unlink()
    assert command_line(*SMALL) == 0
    assert read_json(run / "compare" / "frontier.json") == frontier
    assert read_json(run / "compare" / "comparison.json") == found
    assert read_json(run / "compare" / "run.json")["results"]["best"] in ("rloo", "best-of-4-sft")
    assert command_line(*once(*SMALL, "comparison.seeds=[1]")) == 0
    assert not any(line.startswith("== ") for line in capfd.readouterr().out.splitlines())
    assert read_json(run / "compare" / "comparison.json")["algorithms"]["rloo"]["seeds"] == 1
    assert {row["run"] for row in read_json(run / "compare" / "frontier.json")["points"]} == {
        "rloo,seed=1", "best-of-4-sft,seed=1"
    }  # fmt: skip


def test_what_cannot_be_run_is_refused_before_anything_begins(run: Path, refused: Refused) -> None:
    for said, told in (
        ("comparison.algorithms.ppo=stage=ppo trainer.advantag=rloo", "comparison.algorithms.ppo: trainer.advantag"),
        ("comparison.seeds=[]", "nothing to compare"),
    ):
        assert told in refused(shlex.join(once(*SMALL, said)))
        assert not list(run.glob("*seed=*"))


def test_of_compared_answers_sft_learns_the_best(workplace: Path) -> None:
    rows = [{"prompt": f"The film {n}", "responses": [f" best {n}", " worse", f" worst {n}"], "ranks": [1, 1, 3]}
            for n in range(20)]  # fmt: skip
    rows += [{"prompt": f"A plot {n}", "chosen": f" chosen {n}", "rejected": " rejected"} for n in range(20)]
    (workplace / "rankings.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    choice = {"name": "preferences", "path": "rankings.jsonl"}
    splits = load_data(choice, 0)
    tokenizer = train_tokenizer([json.dumps(row) for row in rows], 300, 64)
    lessons = demonstrations([*splits.train, *splits.test], tokenizer, choice, 0)
    taught = {tokenizer.decode([i for i, learnt in zip(*each, strict=True) if learnt]) for each in lessons}
    end = tokenizer.eos_token
    assert taught == {f"{text} {n}{end}" for text in (" best", " chosen") for n in range(20)}


def test_what_an_experiment_says_after_compare_is_for_its_runs() -> None:
    stages = settings_of("stage=pipeline", "experiment=compare").stages
    assert in_order(stages) == ["pretrain", "sft", "reward", "compare"]


def test_each_run_is_told_what_the_user_says() -> None:
    said = ("data.limit=300", "stages.ppo.trainer.kl_coef=0.1", "comparison.seeds=[4]", "stages.compare.seed=5")
    typed = settings_of("stage=compare", "experiment=compare", "name=a", "seed=3", *said).comparison.typed
    assert [word.lstrip("+") for word in typed] == ["data.limit=300", "stages.ppo.trainer.kl_coef=0.1"]


def test_labels_of_a_run_are_for_sft_only_where_its_data_are_preferences(
    run: Path, command_line: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    label = {"task": "t", "prompt": "The film", "responses": [" a", " b"], "ranks": [1, 2], "annotator": "me"}
    (run / "again" / "collect").mkdir(parents=True)
    (run / "again" / "collect" / "labels.jsonl").write_text(json.dumps(label) + "\n")
    seen: list[dict[str, Any]] = []

    def load(choice: dict[str, Any], *_: Any, **__: Any) -> None:
        seen.append(choice)
        raise UserError("seen")

    monkeypatch.setattr("rlhf_pipeline.stages.sft.read_data", load)
    for data in ("data=toy_reviews", "data=preferences"):
        assert command_line("stage=sft", "experiment=demo", "name=demo/again", *MINIATURE[1:2], data) == 2
    assert [choice["name"] for choice in seen] == ["toy_reviews", "preferences"]
    assert [choice.get("path") for choice in seen] == [None, ["runs/demo/again/collect/labels.jsonl"]]
