"""stage=evaluate with more policies and more rewards than the run's own."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import MINIATURE, CommandLine
from rich.cells import cell_len
from tiny import TEXTS, tiny_policy

from rlhf_pipeline.evaluation.lineup import lineup
from rlhf_pipeline.models.policies import Policy, train_tokenizer
from rlhf_pipeline.models.rewards import Reward
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.stages.evaluate import learnt_from

ARGS = [arg for arg in MINIATURE if "stages" not in arg]


def evaluated(folder: Path) -> dict:
    return json.loads((folder / "evaluate" / "evaluation.json").read_text())


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
    found = evaluated(run)
    assert list(found["metrics"]) == ["sft", "runs/demo/ppo", "./foreign", "other"]
    assert found["reference"] == "sft"
    assert found["metrics"]["sft"]["kl"] == pytest.approx(0, abs=1e-4)
    assert found["metrics"]["./foreign"]["kl"] is None
    assert found["metrics"]["other"] == found["metrics"]["runs/demo/ppo"]
    for key in ("perplexity", "held_out_perplexity"):
        taken = {name: row[key] for name, row in found["metrics"].items()}
        assert taken.pop("./foreign") is None  # a token of its own is another measure
        assert min(taken.values()) > 1
    for row in found["metrics"].values():
        assert 0 <= row["self_bleu"] <= 1
        assert row["distinct_1"] <= row["distinct_2"] <= row["distinct_3"] or row["repeated"] > 0
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
    assert max(map(cell_len, shown.splitlines())) <= 100
    record = json.loads((run / "evaluate" / "run.json").read_text())
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
    found = evaluated(run)
    assert list(found["metrics"]) == ["pretrain", "base", "ppo", "sft", "best of 9"], "each by its own name"
    speed = json.loads((run / "evaluate" / "run.json").read_text())["results"]["speed"]
    lengths = [row["length"] for row in found["metrics"].values()]
    assert speed["tokens_per_second"] / speed["prompts_per_second"] > 0.8 * min(lengths), "all that was drawn counts"
    assert found["reference"] == "sft"
    assert {"ppo - sft", "ppo - pretrain"} < set(found["paired_gain"])


def test_a_run_is_the_same_by_its_whole_path(run: Path) -> None:
    for runs in (Path("runs"), run.parent.resolve()):
        paths, reference = lineup(RunDir(runs, "demo", "evaluate"), [], {})
        assert (list(paths), reference) == (["base", "sft", "ppo"], "sft")


def test_an_evaluation_without_its_figures_is_said(
    run: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    (run / "evaluate" / "evaluation.json").unlink()
    assert command_line("stage=evaluate", *ARGS) == 2
    assert "evaluation.json is missing; overwrite=true" in capsys.readouterr().err


def test_runs_are_compared_where_there_is_no_run_of_that_name(run: Path, command_line: CommandLine) -> None:
    args = ["stage=evaluate", "name=beside", "reward=length", "reward.target=5", "evaluate.held_out_tokens=0"]
    assert command_line(*args, "evaluate.policies=[runs/demo/pretrain,runs/demo]", *ARGS) == 0
    found = evaluated(run.parent / "beside")
    assert list(found["metrics"]) == ["runs/demo/pretrain", "runs/demo"]
    assert found["metrics"]["runs/demo"]["length"] <= 8  # as that run's PPO sampled
    assert found["metrics"]["runs/demo"]["held_out_perplexity"] is None
    assert found["rewards"] == {}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["evaluate.policies=[sft,round1]"], "runs/demo has made no policy round1. It has: pretrain, sft, ppo"),
        (["evaluate.policies=[./nowhere]"], "there is no folder ./nowhere"),
        (["evaluate.policies=[sft,pppo]"], "pppo"),
        (["evaluate.policies=['']"], "evaluate.policies has an empty name"),
        (
            ["evaluate.rewards=[{name: lenght}]"],
            "evaluate.rewards[0]: no reward is called 'lenght'. Did you mean 'leng",
        ),
        (
            ["evaluate.rewards=[{name: length, goal: 3}]"],
            "evaluate.rewards[0]: reward=length: there is no setting 'reward.goal'",
        ),
        (["evaluate.rewards=[{name: toy_sentiment}, {name: toy_sentiment}]"], "toy_sentiment, which judges already"),
        (["evaluate.rewards=[length]"], "evaluate.rewards is ['length']; it takes a list (settings"),
        (["evaluate.held_out_tokens=-1"], "evaluate.held_out_tokens is -1; it takes a whole number of at least 0"),
    ],
)
def test_what_cannot_be_compared_is_said_in_one_line(
    args: list[str], message: str, run: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command_line("stage=evaluate", "overwrite=true", *args, *ARGS) == 2
    assert message in capsys.readouterr().err


def test_what_ppo_learnt_from_is_known_beside_a_labeler(run: Path) -> None:
    rewards = {name: Reward(lambda _, answers: [0.0] * len(answers), where)
               for name, where in (("length", "length"), ("classifier", "runs/demo/reward/model"))}  # fmt: skip
    assert learnt_from(["runs/demo/sft/model", "runs/demo/ppo/model"], rewards) == "classifier"
    assert learnt_from(["runs/demo/sft/model"], rewards) == "length"
