"""Files of one's own by the real command: prompts alone, answers that are too long."""

import contextlib
import json
import shlex
from pathlib import Path

import pytest
from conftest import CommandLine, Refused

from rlhf_pipeline.files import read_json, read_jsonl

TINY = (
    "policy=gpt2_scratch", "policy.size=tiny", "policy.positions=64", "trainer.max_steps=2",
    "trainer.per_device_train_batch_size=4",
)  # fmt: skip
PROMPTS = [{"prompt": "say {}"}, {"messages": [{"role": "user", "content": "say {}"}]}]


def write(name: str, *rows: object) -> str:
    Path(name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return f"data.path={name}"


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> str:
    folder = tmp_path_factory.mktemp("base")
    with contextlib.chdir(folder):
        Path("texts.txt").write_text("".join(f"say {n} and {n + 1}, it is {n}\n" for n in range(60)))
        assert command_line("stage=pretrain", "name=base", "data=text", "data.path=texts.txt", *TINY) == 0
    return f"policy.path={folder / 'runs/base/pretrain'}"


@pytest.fixture
def base(policy: str, workplace: Path) -> str:
    """A policy to begin with, where the current folder is empty."""
    return policy


@pytest.mark.parametrize("form", PROMPTS, ids=["text", "chat"])
def test_prompts_alone_serve_ppo_and_are_nothing_for_sft(
    form: dict[str, str], base: str, command_line: CommandLine, refused: Refused, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("p.jsonl", *(json.loads(json.dumps(form).replace("{}", str(n))) for n in range(8)))
    given = (base, "name=p", "data=instructions", path)
    rewarded = (*given, "reward=length", "reward.target=5")
    options = ("trainer.total_episodes=8", "trainer.per_device_train_batch_size=4", "trainer.response_length=8")
    assert command_line("stage=ppo", *rewarded, *options) == 0
    prompts = {row["prompt"] for row in read_jsonl(Path("runs/p/ppo/samples.jsonl"))}
    asked = {f"say {n}" if "prompt" in form else f"### Instruction:\nsay {n}\n\n### Response:\n" for n in range(8)}
    assert prompts <= asked
    if form is PROMPTS[0]:
        assert command_line("stage=evaluate", *rewarded, "evaluate.prompts=2", "evaluate.bootstrap=20") == 0
        assert command_line("stage=collect", *given, "collect.prompts=3") == 0
        shown = {row["prompt"] for row in read_jsonl(Path("runs/p/collect/candidates.jsonl"))}
        assert shown <= asked
    capsys.readouterr()
    (line,) = refused(shlex.join(["stage=sft", *given])).strip().splitlines()
    assert "none of 8 rows has an answer to learn" in line
    assert not Path("runs/p/sft").exists()


def test_long_prompts_lose_their_beginning_and_answers_are_learnt(
    base: str, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    short = [{"prompt": f"say {n}:", "completion": f" {n}"} for n in range(8)]
    rows = [*short, *({"prompt": f"{'it is ' * 200}say {n}:", "completion": f" {n}"} for n in range(4))]
    sft = ("stage=sft", base, "name=long", "data=instructions", *TINY[3:])
    assert command_line(*sft, write("some.jsonl", *rows)) == 0
    assert "4 of 12 rows are longer than 64 tokens" in (said := capsys.readouterr().out)
    assert "4 prompts lose their beginning\n" in said
    assert command_line(*sft, write("all.jsonl", *rows[8:]), "overwrite=true") == 0
    assert "4 of 4 rows are longer than 64 tokens" in capsys.readouterr().out
    record = read_json(Path("runs/long/sft/run.json"))
    assert 0 < record["results"]["eval_loss"] < 20, "a number, of answers that are there"
    long = write("answers.jsonl", *({"prompt": f"{n}:", "completion": f"{n} " * 100} for n in range(4)))
    wrapped = ("trainer.packing=true", "trainer.packing_strategy=wrapped")
    assert command_line(*sft, long, "overwrite=true", *wrapped) == 0
    assert "lose" not in capsys.readouterr().out


def test_texts_that_pretraining_cuts_are_counted(
    workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("long.jsonl", *({"text": f"{n} " * (100 if n < 5 else 9)} for n in range(40)))
    pretrain = ("stage=pretrain", "name=long", "data=text", path, *TINY)
    assert command_line(*pretrain, "trainer.packing=false") == 0
    assert "warning: 5 of 40 texts lose what is beyond 64 tokens" in capsys.readouterr().out
    assert command_line(*pretrain, "overwrite=true") == 0
    assert "lose" not in capsys.readouterr().out, "wrapped packing loses nothing"


def test_rows_that_do_not_fit_are_refused(base: str, refused: Refused) -> None:
    path = write("p.jsonl", *({"prompt": "it is " * 200 + str(n)} for n in range(8)))
    ppo = f"stage=ppo {base} data=instructions {path} reward=length reward.target=5 trainer.response_length=8"
    assert "no prompt leaves room for an answer" in refused(ppo)
    path = write("r.jsonl", {"text": "good", "label": "正面"}, {"text": "bad", "label": "负面"})
    said = refused(f"stage=pretrain data=sentiment {path} 'data.labels={{正面: 1}}'")
    assert "r.jsonl, line 2: 'label' is '负面'; allowed are 正面 (data.labels)" in said
