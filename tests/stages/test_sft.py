"""SFT on every kind of demonstration, English and Chinese, by the real command."""

import importlib.util
import json
import random
from pathlib import Path

import pytest
from conftest import CommandLine, jsonl
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_pipeline.data.readers import read_demonstrations, read_dialogues
from rlhf_pipeline.data.tokenization import demonstrations

SMALL = (
    "stage=sft", "policy=gpt2_scratch", "policy.vocabulary=600", "policy.positions=128", "data.limit=96",
    "trainer.per_device_train_batch_size=8", "trainer.learning_rate=2e-3", "trainer.max_length=96",
)  # fmt: skip


def results(run: Path) -> dict[str, float]:
    found: dict[str, float] = json.loads((run / "sft" / "run.json").read_text())["results"]
    return found


CHAT = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Are you there?"}]
PAIRS = [{"prompt": f"{i} and {i + 1} are", "completion": f" {i} {i + 1}."} for i in range(160)]
# One prompt for all: it is no question that keeps rows together.
TALKS = [{"messages": [*CHAT, {"role": "assistant", "content": f"Yes, {i} times."}]} for i in range(60)]


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (PAIRS, ("trainer.packing=true", "trainer.packing_strategy=wrapped", "trainer.num_train_epochs=20")),
        (PAIRS, ("policy.lora.r=4", "trainer.learning_rate=2e-2")),
        (TALKS, ("data.test_share=0.2",)),
    ],
    ids=["packed", "lora", "chat"],
)
def test_rows_of_ones_own(
    rows: list[object], options: tuple[str, ...], workplace: Path, command_line: CommandLine
) -> None:
    data = jsonl(workplace / "a.jsonl", *rows)
    given = [word for word in SMALL if word.split("=")[0] not in {option.split("=")[0] for option in options}]
    assert command_line(*given, "data=instructions", f"data.path={data}", "name=a", *options) == 0
    found = results(workplace / "runs" / "a")
    assert found["eval_loss"] < found["eval_loss_before"] - 0.3
    model = AutoModelForCausalLM.from_pretrained(workplace / "runs/a/sft/model")
    assert not any("lora" in name for name, _ in model.named_parameters()), "an adapter is merged"


@pytest.mark.parametrize(
    ("setting", "package"), [("use_liger_kernel=true", "liger_kernel"), ("optim=adamw_bnb_8bit", "bitsandbytes")]
)
def test_a_setting_whose_package_is_missing_says_so_in_one_line(
    setting: str, package: str, workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    data = jsonl(workplace / "a.jsonl", *PAIRS[:40])
    assert command_line(*SMALL, "data=instructions", f"data.path={data}", "name=a", f"trainer.{setting}") == 2
    told = capsys.readouterr().err
    assert "Traceback" not in told
    assert "install" in next(line for line in told.splitlines() if line.startswith("error: "))
    assert json.loads((workplace / "runs/a/sft/run.json").read_text())["status"] == "failed"


def test_completion_only_loss_is_what_is_measured(workplace: Path, command_line: CommandLine) -> None:
    """With prompts that cannot be guessed and completions that can, the two losses part."""
    draw = random.Random(0)
    rows = [{"prompt": f"{draw.randrange(10**9)}:", "completion": " yes"} for _ in range(160)]
    data = jsonl(workplace / "a.jsonl", *rows)
    every = ("data=instructions", f"data.path={data}", "trainer.num_train_epochs=2")
    assert command_line(*SMALL, *every, "name=part") == 0
    assert command_line(*SMALL, *every, "name=all", "trainer.completion_only_loss=false") == 0
    part, whole = (results(workplace / "runs" / name) for name in ("part", "all"))
    assert part["eval_loss"] < 0.5
    assert 1.0 < whole["eval_loss"] < whole["eval_loss_before"] - 0.3


@pytest.mark.parametrize("name", ["alpaca_en_5k", "alpaca_zh_2k"])
def test_alpaca(name: str, shared: Path, workplace: Path, command_line: CommandLine) -> None:
    path = shared / "data" / "sft" / f"{name}.jsonl.gz"
    assert command_line(*SMALL, "data=instructions", f"data.path={path}", "name=a") == 0
    found = results(workplace / "runs" / "a")
    assert found["eval_loss"] < found["eval_loss_before"] - 0.3
    tokenizer = AutoTokenizer.from_pretrained(workplace / "runs/a/sft/model")
    row = read_demonstrations(path)[0]
    (lesson,) = demonstrations([row], tokenizer, {}, 0)
    messages = [{"role": turn.role, "content": turn.text} for turn in row.prompt]  # type: ignore[union-attr]
    asked = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert list(asked) == lesson.ids[: lesson.learnt.index(1)], "the saved tokenizer asks as the policy was taught"


@pytest.mark.parametrize("name", ["train", "kdconv_dev_test"])
def test_dialogues_of_many_turns(name: str, shared: Path, workplace: Path, command_line: CommandLine) -> None:
    path = shared / "data" / "chinese_dialog" / f"{name}.jsonl.gz"
    args = ("data=dialogue", f"data.path={path}", "name=a", "policy.tokenizer=characters")
    assert command_line(*SMALL, *args) == 0
    found = results(workplace / "runs" / "a")
    assert found["eval_loss"] < found["eval_loss_before"] - 0.3
    tokenizer = AutoTokenizer.from_pretrained(workplace / "runs/a/sft/model")
    row = max(read_dialogues(path), key=lambda row: len(row.turns))
    (lesson,) = demonstrations([row], tokenizer, {}, 0)
    ends = [i for i, token in enumerate(lesson.ids) if token == tokenizer.sep_token_id]
    assert len(ends) == len(row.turns)
    assert lesson.learnt == [0] * (ends[0] + 1) + [1] * (len(lesson.ids) - ends[0] - 1)


def test_quantized_weights_under_an_adapter(
    workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ("data=instructions", f"data.path={jsonl(workplace / 'a.jsonl', *PAIRS[:40])}")
    assert command_line(*SMALL, *given, "name=base") == 0
    base = ("policy.path=runs/base/sft", "policy.quantize=4bit")
    assert command_line(*SMALL, *given, "name=q", *base) == 2
    assert "stages.sft.policy.lora.r=8" in capsys.readouterr().err
    status = command_line(*SMALL, *given, "name=q", *base, "policy.lora.r=4")
    if importlib.util.find_spec("bitsandbytes") is None:
        assert status == 2
        assert "pip install 'rlhf_pipeline[quantize]'" in capsys.readouterr().err
        return
    assert status == 0
    model = AutoModelForCausalLM.from_pretrained(workplace / "runs/q/sft/model")
    assert not getattr(model, "is_quantized", False), "the adapter is merged into whole weights"
