"""stage=evaluate with more policies and more rewards than the run's own."""

import shutil
from pathlib import Path

import pytest
from conftest import MINIATURE, CommandLine, Refused
from tiny import TEXTS, tiny_policy

from rlhf_pipeline.evaluation.lineup import lineup
from rlhf_pipeline.files import read_json
from rlhf_pipeline.models.policies import Policy, train_tokenizer
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.stages.evaluate import learnt_from

ARGS = [arg for arg in MINIATURE if "stages" not in arg]


def test_policies_by_hand_and_more_rewards(
    run: Path, workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer = train_tokenizer(TEXTS, 300, 64)
    Policy(tiny_policy(tokenizer), tokenizer).save(workplace / "foreign")
    shutil.copytree(run / "ppo", workplace / "runs" / "other" / "ppo")
    policies = "evaluate.policies=[sft,runs/demo/ppo,./foreign,other]"
    rewards = "evaluate.rewards=[{name: length, target: 5}, {name: toy_sentiment}, {name: length, target: 9}]"
    assert command_line("stage=evaluate", "overwrite=true", policies, rewards, *ARGS) == 0
    shown = capsys.readouterr().out
    found = read_json(run / "evaluate" / "evaluation.json")
    assert list(found["metrics"]) == ["sft", "runs/demo/ppo", "./foreign", "other"]
    assert 0 < found["prompts_in_training"] <= found["prompts"] == 24  # a few words of a grammar
    assert len({sample["prompt"] for sample in found["samples"]}) > 12
    assert found["reference"] == "sft"
    assert found["metrics"]["sft"]["kl"] == pytest.approx(0, abs=1e-4)
    assert found["metrics"]["./foreign"]["kl"] is None
    assert found["metrics"]["other"] == found["metrics"]["runs/demo/ppo"]
    for key in ("perplexity", "held_out_perplexity"):
        without = [name for name, row in found["metrics"].items() if row[key] is None]
        assert without == ["./foreign"]  # a token of its own is another measure
    for name, row in found["metrics"].items():
        assert row["reward_mean"] == pytest.approx(sum(sample["rewards"][name] for sample in found["samples"]) / 24)
        assert 0 <= row["positive"] <= 1
    length = "length (target=5)"  # names that repeat are told apart by their fields
    assert list(found["rewards"]) == [length, "toy_sentiment", "length (target=9)"]
    for name, row in found["rewards"][length]["metrics"].items():
        by_hand = [-abs(len(s["responses"][name].split()) - 5) / 5 for s in found["samples"]]
        assert row["reward_mean"] == pytest.approx(sum(by_hand) / 24)
    assert set(found["moved"]) == {"classifier", *found["rewards"]}
    assert found["moved"][length]["sft"] == 0
    gains = found["rewards"][length]["paired_gain"]
    pairs = ["runs/demo/ppo - sft", "./foreign - sft", "other - sft"]
    assert list(gains) == list(found["paired_gain"]) == pairs
    means = {name: row["reward_mean"] for name, row in found["rewards"][length]["metrics"].items()}
    assert gains["./foreign - sft"]["mean"] == pytest.approx(means["./foreign"] - means["sft"])
    best = found["extremes"]["best"][0]["rewards"]["other"]
    assert best == max(sample["rewards"]["other"] for sample in found["samples"])
    assert "By other rewards" in shown
    record = read_json(run / "evaluate" / "run.json")
    assert record["parents"]["evaluate.rewards[1]"]["path"] == "toy_sentiment"
    assert record["results"]["speed"]["tokens_per_second"] > 0
    page = (run / "evaluate" / "report.html").read_text()
    assert f"{length} · runs/demo/ppo" in page

    # Again, it is done; and done anew it is the same to the byte.
    before = (run / "evaluate" / "evaluation.json").read_bytes()
    assert command_line("stage=evaluate", policies, rewards, *ARGS) == 0
    assert "By other rewards" in capsys.readouterr().out
    assert command_line("stage=evaluate", "overwrite=true", policies, rewards, *ARGS) == 0
    assert (run / "evaluate" / "evaluation.json").read_bytes() == before


def test_where_ppo_began_is_the_reference_wherever_it_stands(run: Path, command_line: CommandLine) -> None:
    shutil.copytree(run / "pretrain", run.parent / "base" / "pretrain")
    asked = ["evaluate.policies=[pretrain,base,ppo,sft]", "evaluate.held_out_tokens=0", "evaluate.best_of=9", *ARGS]
    assert command_line("stage=evaluate", "overwrite=true", *asked) == 0
    found = read_json(run / "evaluate" / "evaluation.json")
    assert list(found["metrics"]) == ["pretrain", "base", "ppo", "sft", "best of 9"], "each by its own name"
    speed = read_json(run / "evaluate" / "run.json")["results"]["speed"]
    lengths = [row["length"] for row in found["metrics"].values()]
    assert speed["tokens_per_second"] / speed["prompts_per_second"] > 0.8 * min(lengths), "all that was drawn counts"
    assert found["reference"] == "sft"
    assert {"ppo - sft", "ppo - pretrain"} < set(found["paired_gain"])


def test_a_run_is_the_same_by_its_whole_path(run: Path) -> None:
    for runs in (Path("runs"), run.parent.resolve()):
        paths, reference = lineup(RunDir(runs, "demo", "evaluate"), [], {})
        assert (list(paths), reference) == (["base", "sft", "ppo"], "sft")


def test_runs_are_compared_where_there_is_no_run_of_that_name(run: Path, command_line: CommandLine) -> None:
    args = ["stage=evaluate", "name=beside", "reward=length", "reward.target=5", "evaluate.held_out_tokens=0"]
    assert command_line(*args, "evaluate.policies=[runs/demo/pretrain,runs/demo]", *ARGS) == 0
    found = read_json(run.parent / "beside" / "evaluate" / "evaluation.json")
    assert list(found["metrics"]) == ["runs/demo/pretrain", "runs/demo"]
    assert found["metrics"]["runs/demo"]["length"] <= 8  # as that run's PPO sampled
    assert found["metrics"]["runs/demo"]["held_out_perplexity"] is None
    assert found["rewards"] == {}


def test_what_cannot_be_compared_is_said(run: Path, refused: Refused) -> None:
    for asked, message in (
        ("evaluate.policies=[sft,round1]", "runs/demo has made no policy round1. It has: pretrain, sft, ppo"),
        ("evaluate.policies=[./nowhere]", "there is no folder ./nowhere"),
        ("evaluate.policies=[sft,pppo]", "pppo"),
        ("evaluate.rewards=[{name:toy_sentiment},{name:toy_sentiment}]", "toy_sentiment, which judges already"),
        ("evaluate.response_length=100", "and the policy has 64 positions"),
        ("name=new", "runs/new has no policy to evaluate; 'make ppo NAME=new' makes one"),
    ):
        assert message in refused(f"stage=evaluate overwrite=true {asked} {' '.join(ARGS)}")
    (run / "evaluate" / "evaluation.json").unlink()
    assert "evaluation.json is missing; overwrite=true" in refused(f"stage=evaluate {' '.join(ARGS)}")


def test_what_ppo_learnt_from_is_known_beside_a_labeler(run: Path) -> None:
    rewards = {name: Reward(lambda _, answers: [0.0] * len(answers), where)
               for name, where in (("length", "length"), ("classifier", "runs/demo/reward/model"))}  # fmt: skip
    assert learnt_from(["runs/demo/sft/model", "runs/demo/ppo/model"], rewards) == "classifier"
    assert learnt_from(["runs/demo/sft/model"], rewards) == "length"
