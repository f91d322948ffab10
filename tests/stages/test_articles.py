"""The systems of the articles in miniature: by their experiments, on the real formats, under the models' hub ids."""

import ast
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import CommandLine, jsonl
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from rlhf_pipeline.data.records import Code
from rlhf_pipeline.data.tokenization import documents
from rlhf_pipeline.files import read_jsonl


def by_the_hub(hub: dict[str, str], *args: str) -> str:
    """Run the command line where the hub's stand-in answers; give what it printed."""
    command = [sys.executable, "-m", "rlhf_pipeline", *args]
    done = subprocess.run(command, capture_output=True, text=True, env=hub, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_everything_from_the_reviews_in_miniature(shared: Path, workplace: Path, command_line: CommandLine) -> None:
    small = shared / "data" / "imdb" / "aclImdb_small.tar.gz"
    args = ["stage=pipeline", "experiment=imdb_from_scratch", f"data.path={small}", "data.limit=64"]
    args += ["evaluate.prompts=32", "policy.vocabulary=600"]
    args += ["stages.pretrain.trainer.num_train_epochs=1", "stages.reward.trainer.num_train_epochs=1"]
    args += ["stages.ppo.trainer.total_episodes=32", "stages.ppo.trainer.per_device_train_batch_size=16"]
    assert command_line(*args) == 0
    run = workplace / "runs" / "imdb_from_scratch"
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    assert list(evaluation["metrics"]) == ["base", "ppo"]
    assert evaluation["reference"] == "base"
    assert json.loads((run / "reward" / "quality.json").read_text())["rows"] == 64
    lengths = [row["val/response_length"] for row in read_jsonl(run / "ppo" / "metrics.jsonl")]
    assert all(length <= 24 for length in lengths)


def test_the_classic_demo_by_its_hub_ids(hub: dict[str, str], workplace: Path) -> None:
    small = ["data.limit=100", "stages.ppo.trainer.total_episodes=16", "evaluate.prompts=16"]
    small += ["stages.ppo.trainer.per_device_train_batch_size=4"]
    by_the_hub(hub, "stage=pipeline", "experiment=imdb_sentiment", *small)
    asked = Path(hub["REQUESTS_LOG"]).read_text()
    for name in ("lvwerra/gpt2-imdb", "lvwerra/distilbert-imdb", "datasets/stanfordnlp/imdb"):
        assert name in asked
    run = workplace / "runs" / "imdb_sentiment"
    rows = read_jsonl(run / "ppo" / "metrics.jsonl")
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-5)
    assert rows[0]["objective/kl_coef"] == 0.2
    assert rows[1]["objective/kl_coef"] == pytest.approx(0.2 * (1 - 0.2 * 8 / 10_000))
    assert all(sample["prompt"] for sample in read_jsonl(run / "ppo" / "samples.jsonl"))
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    assert list(evaluation["metrics"]) == ["base", "best of 4", "ppo"]
    rewards = [row["rewards"] for row in evaluation["samples"]]
    better = sum(row["best of 4"] > row["base"] for row in rewards)
    assert better > len(rewards) / 2, "the best of four is better than one, more often than not"
    assert evaluation["metrics"]["best of 4"]["kl"] == pytest.approx(math.log(4) - 3 / 4)
    assert 4 <= evaluation["metrics"]["base"]["length"] <= 15


def test_a_hub_that_cannot_be_reached_is_said_in_one_line(workplace: Path) -> None:
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(workplace / "home")}
    environment.pop("HF_HUB_OFFLINE", None)
    command = [sys.executable, "-m", "rlhf_pipeline", "stage=ppo", "experiment=imdb_sentiment"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=240)
    assert done.returncode == 2
    assert time.monotonic() - started < 45  # the imports; the client's own five attempts a file took a minute more
    assert "the hub at http://127.0.0.1:9 cannot be reached" in done.stdout
    loading, error = done.stderr.strip().split("\n", 1)
    assert loading == "loading PyTorch and TRL"
    assert error.startswith("error: reward.path=lvwerra/distilbert-imdb is not in the cache")
    for said in ("http://127.0.0.1:9", "HF_ENDPOINT", "a local path", "make demo"):
        assert said in error
    assert len(error.splitlines()) == 1


def test_a_code_gpt_from_scratch(workplace: Path, command_line: CommandLine) -> None:
    small = ["policy.size=tiny", "data.limit=12", "policy.vocabulary=600"]
    small += [
        f"stages.{stage}.trainer.{key}" for stage in ("pretrain", "sft") for key in ("max_steps=8", "max_length=64")
    ]
    args = ("stage=pipeline", "experiment=code_gpt", *small, "evaluate.prompts=16", "evaluate.response_length=48")
    assert command_line(*args) == 0
    run = workplace / "runs" / "code_gpt"
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    hello, split = (row["prompt"] for row in evaluation["shown"])
    assert hello.startswith('def print_hello_world():\n    """')
    assert "train_test_split" in split
    for row in evaluation["samples"]:
        head = ast.parse(row["prompt"] + "\n    pass\n").body[0]
        assert isinstance(head, ast.FunctionDef | ast.AsyncFunctionDef), "the prompts are the heads of functions"
    share = [row["rewards"]["sft"] for row in evaluation["samples"]]
    assert set(share) <= {0.0, 1.0}
    assert evaluation["metrics"]["sft"]["reward_mean"] == sum(share) / 16


def test_blocks_lose_nothing_of_a_text() -> None:
    from datasets import Dataset
    from tiny import tiny_tokenizer
    from trl import pack_dataset

    tokenizer = tiny_tokenizer()
    rows = documents([Code(f"def f{number}():\n    return {number}\n" * number) for number in range(1, 30)], tokenizer)
    packed = pack_dataset(Dataset.from_dict({"input_ids": rows}), seq_length=32, strategy="wrapped")["input_ids"]
    assert [token for block in packed for token in block] == [token for row in rows for token in row]
    assert {len(block) for block in packed[:-1]} == {32}


def test_code_of_the_hub_is_read_as_it_comes(hub: dict[str, str], workplace: Path) -> None:
    given = ("data=python_code", "data.path=stanfordnlp/imdb", "data.column=text", "data.rows=40")
    small = ("policy=gpt2_scratch", "policy.vocabulary=400", "trainer.max_steps=2", "trainer.max_length=64")
    by_the_hub(hub, "stage=pretrain", "name=code", *given, *small, "data.test_share=0.3")
    data = json.loads((workplace / "runs/code/pretrain/run.json").read_text())["data"]
    assert data["train"] + data["test"] == 40


def test_the_imdb_reward_from_distilbert(hub: dict[str, str], workplace: Path) -> None:
    small = ("data.limit=60", "stages.reward.trainer.num_train_epochs=1", "stages.reward.trainer.max_length=64")
    said = by_the_hub(hub, "stage=pipeline", "experiment=imdb_reward", *small)
    assert "I like you,I love you" in said
    assert "distilbert-base-uncased" in Path(hub["REQUESTS_LOG"]).read_text()
    run = workplace / "runs" / "imdb_reward" / "reward"
    (example,) = json.loads((run / "quality.json").read_text())["examples"]
    assert example["text"] == "I like you,I love you"
    assert sum(example["probabilities"].values()) == pytest.approx(1)
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.model_type == "distilbert"


def test_the_chinese_dialogue_by_its_hub_ids(hub: dict[str, str], shared: Path, workplace: Path) -> None:
    path = shared / "data" / "chinese_dialog" / "test.jsonl.gz"
    small = ("data.limit=120", "stages.ppo.trainer.total_episodes=64", "evaluate.prompts=24")
    said = by_the_hub(hub, "stage=pipeline", "experiment=chinese_dialog", f"data.path={path}", *small)
    assert "warning" not in said
    asked = Path(hub["REQUESTS_LOG"]).read_text()
    for name in ("shibing624/gpt2-dialogbot-base-chinese", "liam168/c2-roberta-base-finetuned-dianping-chinese"):
        assert name in asked
    run = workplace / "runs" / "chinese_dialog"
    tokenizer = AutoTokenizer.from_pretrained(run / "ppo" / "model")
    model = AutoModelForCausalLM.from_pretrained(run / "ppo" / "model")
    assert (model.config.eos_token_id, model.config.pad_token_id, model.config.n_positions) == (102, 0, 300)
    assert (tokenizer.eos_token, tokenizer.pad_token) == ("[SEP]", "[PAD]")
    samples = read_jsonl(run / "ppo" / "samples.jsonl")
    assert samples
    for sample in samples:
        assert "[UNK]" not in sample["response"]
        assert " " not in sample["prompt"].strip() or not sample["prompt"].isascii()
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    assert set(evaluation["sampling"]["suppressed_ids"]) == {0, 100, 101, 103}
    assert evaluation["sampling"]["stop_ids"] == [102]


def test_chinese_dialogue_from_local_files_alone(shared: Path, workplace: Path, command_line: CommandLine) -> None:
    files = [f"data.path={shared / 'data/chinese_dialog/train.jsonl.gz'}"]
    files += [f"stages.reward.data.path={shared / 'data/chinese_sentiment/waimai_10k.csv.gz'}"]
    small = ("data.limit=100", "policy.size=tiny", "policy.vocabulary=1500", "evaluate.prompts=16")
    steps = [f"stages.{stage}.trainer.num_train_epochs=1" for stage in ("pretrain", "reward")]
    ppo = ("stages.ppo.trainer.total_episodes=32", "stages.ppo.trainer.per_device_train_batch_size=16")
    every = ("stage=pipeline", "experiment=chinese_dialog_from_scratch", *files, *small, *steps, *ppo)
    assert command_line(*every) == 0
    run = workplace / "runs" / "chinese_dialog_from_scratch"
    assert json.loads((run / "reward" / "run.json").read_text())["data"]["name"] == "sentiment"
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    assert list(evaluation["metrics"]) == ["base", "ppo"]
    for sample in evaluation["samples"]:
        assert all("[UNK]" not in answer for answer in sample["responses"].values())
    vocabulary = AutoTokenizer.from_pretrained(run / "pretrain" / "model").get_vocab()
    assert {"[CLS]", "[SEP]", "[PAD]", "[UNK]", "好"} <= set(vocabulary)


def test_what_does_not_fit_together_is_said_in_one_line(
    miniature: Path, shared: Path, workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    chinese = ("data=dialogue", f"data.path={shared / 'data/chinese_dialog/test.jsonl.gz'}", "data.limit=40")
    own = (f"policy.path={miniature / 'sft'}", f"reward.path={miniature / 'reward'}", "policy=causal_lm")
    small = ("trainer.total_episodes=8", "trainer.per_device_train_batch_size=8", "trainer.response_length=4")
    asked = ("stage=ppo", "name=odd", *chinese, *own)
    assert command_line(*asked, *small[:2], "trainer.response_length=64") == 2
    assert "a response takes up to 64 tokens, and the policy has 64 positions" in capsys.readouterr().err
    rows = [{"conversation": [{"utterance": f"你好啊{i}"}, {"utterance": "再见"}]} for i in range(90)]
    short = ("stage=ppo", "data=dialogue", f"data.path={jsonl(workplace / 'short.jsonl', *rows)}", "data.limit=40")
    assert command_line(*short, *own, *small, "name=odd") == 0
    said = [line for line in capsys.readouterr().out.split("\n") if line.startswith("warning: ")]
    assert len(said) == 2
    assert said[0].startswith("warning: policy: the texts are Chinese")
    assert said[1].startswith("warning: reward: the texts are Chinese")
    assert command_line(*short, *own, *small, "name=odder", 'trainer.suppress_tokens=["[UNK]"]') == 2
    assert "error: trainer.suppress_tokens has '[UNK]', which is no token" in capsys.readouterr().err


def test_a_pipeline_leaves_out_what_a_rule_does_not_need(
    workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    small = [f"++stages.{stage}.trainer.max_steps=2" for stage in ("pretrain", "sft")]
    small += ["++stages.ppo.trainer.total_episodes=16", "++stages.ppo.trainer.per_device_train_batch_size=8"]
    given = ("stage=pipeline", "experiment=demo", "data.limit=60", "policy.vocabulary=400", "evaluate.prompts=8")
    assert command_line(*given, *small, "reward=length") == 0
    assert "reward=length needs no training" in capsys.readouterr().out
    assert not (workplace / "runs/demo/reward").exists()
    assert (workplace / "runs/demo/evaluate/evaluation.json").exists()


def test_each_part_of_a_sum_is_a_parent_and_a_changed_function_is_noticed(
    run: Path, workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    (workplace / "mine.py").write_text("def f(prompts, completions):\n    return [len(c) for c in completions]\n")
    parts = "reward.parts=[{name: classifier, scale: probability}, {name: python, path: 'mine.py:f', weight: 0.5}]"
    given = ("stage=ppo", "experiment=demo", "policy.vocabulary=400", "data.limit=60", "reward=sum", parts)
    given += ("trainer.total_episodes=32", "trainer.per_device_train_batch_size=8", "trainer.response_length=4")
    given += ("trainer.save_steps=1",)
    assert command_line(*given, "overwrite=true") == 0
    record = run / "ppo" / "run.json"
    before = json.loads(record.read_text())
    own, mine = (before["parents"][f"reward.parts[{number}]"] for number in (0, 1))
    assert own["path"].endswith("demo/reward/model")
    assert mine["path"] == "mine.py:f"
    assert len(own["sha256"]) == len(mine["sha256"]) == 64
    record.write_text(json.dumps({**before, "status": "running"}))  # as after a kill
    (workplace / "mine.py").write_text("def f(prompts, completions):\n    return [-len(c) for c in completions]\n")
    assert command_line(*given) == 2
    assert "mine.py:f has changed since" in capsys.readouterr().err


def test_evaluate_takes_the_policy_that_is_named(miniature: Path, workplace: Path, command_line: CommandLine) -> None:
    given = ("policy=causal_lm", f"policy.path={miniature / 'sft'}", "reward=length", "data=toy_reviews")
    small = ("data.limit=60", "evaluate.prompts=8", "evaluate.response_length=8")
    assert command_line("stage=evaluate", "name=one", *given, *small) == 0
    record = json.loads((workplace / "runs/one/evaluate/run.json").read_text())
    assert record["parents"]["base"]["path"] == str(miniature / "sft" / "model")
