"""DPO by the real command: it learns, is TRL's loss, resumes to the bit, and takes an adapter and people's labels."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import MINIATURE, CommandLine, Refused, cut_off, logged, once
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf_pipeline.data import load_data
from rlhf_pipeline.files import read_json
from rlhf_pipeline.runs.lineage import content_hash

GOOD, BAD = (" a great film.", " wonderful, see it."), (" an awful film.", " boring, skip it.")
DPO = (
    "stage=dpo", "experiment=demo", *(word for word in MINIATURE if "stages" not in word), "data=preferences",
    "data.path=pairs.jsonl", "trainer.bf16=false", "trainer.learning_rate=1e-3", "trainer.save_steps=4",
    "trainer.per_device_train_batch_size=8", "trainer.logging_steps=2", "trainer.num_train_epochs=3",
    "trainer.beta=0.3",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(miniature: Path, tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Path:
    """The miniature run up to SFT, and DPO on a file of pairs that prefer praise."""
    workplace = tmp_path_factory.mktemp("dpo")
    for stage in ("pretrain", "sft"):
        shutil.copytree(miniature / stage, workplace / "runs" / "demo" / stage)
    rows = [
        {"prompt": f"The {name} was", "chosen": GOOD[i % 2], "rejected": BAD[i // 2 % 2]}
        for i, name in enumerate(f"{a} {b}" for a in ("film", "plot", "cast", "end") for b in map(str, range(10)))
    ]
    (workplace / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workplace)
        assert command_line(*DPO) == 0
    return workplace / "runs" / "demo"


@pytest.fixture
def there(run: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The same, with the folder of its runs as the current one."""
    monkeypatch.chdir(run.parents[1])
    return run


def test_it_learns_what_is_preferred(there: Path) -> None:
    folder = there / "dpo"
    record = read_json(folder / "run.json")
    assert record["results"]["accuracy"] > 0.9
    assert record["results"]["eval_loss"] < math.log(2) - 0.1
    assert record["parents"]["policy"]["path"] == "runs/demo/sft/model"
    assert logged(folder)[0]["loss"] == pytest.approx(math.log(2), abs=1e-5), "at first the policy is the reference"
    assert "pipeline_tag: text-generation" in (folder / "model" / "README.md").read_text()
    assert "rewards/margins" in (folder / "report.html").read_text()


def test_its_loss_is_the_papers(there: Path) -> None:
    """-log sigmoid(beta x (log p/p_ref of chosen - that of rejected)), summed over an answer's tokens and EOS."""
    tokenizer = AutoTokenizer.from_pretrained(there / "dpo" / "model")
    models = [AutoModelForCausalLM.from_pretrained(there / stage / "model").eval() for stage in ("dpo", "sft")]

    def log_p(model: Any, prompt: str, answer: str) -> float:
        asked, ids = tokenizer(prompt)["input_ids"], [*tokenizer(prompt + answer)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            found = model(torch.tensor([ids])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])
        return float(found[len(asked) - 1 :].sum())

    losses = []
    for row in load_data({"name": "preferences", "path": "pairs.jsonl"}, 0).test:
        policy, reference = (
            log_p(model, row.prompt, row.chosen) - log_p(model, row.prompt, row.rejected) for model in models
        )
        losses.append(math.log1p(math.exp(-0.3 * (policy - reference))))
    assert logged(there / "dpo")[-1]["eval_loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-4)


def test_it_resumes_to_the_bit(run: Path, workplace: Path, command_line: CommandLine) -> None:
    shutil.copytree(run.parents[1], workplace, dirs_exist_ok=True)
    folder = Path("runs/demo/dpo")
    cut_off(folder)
    assert command_line(*DPO) == 0
    assert logged(folder) == logged(run / "dpo")
    assert content_hash(folder / "model") == content_hash(run / "dpo" / "model")


def test_an_adapter_is_merged_into_what_it_makes(there: Path, command_line: CommandLine) -> None:
    given = ("name=adapter", "policy.path=runs/demo/sft", "policy.lora.r=4")
    assert command_line(*once(*DPO, *given, "trainer.learning_rate=1e-2", "trainer.max_steps=2")) == 0
    model = AutoModelForCausalLM.from_pretrained("runs/adapter/dpo/model")
    assert not any("lora" in name for name, _ in model.named_parameters())
    assert content_hash(Path("runs/adapter/dpo/model")) != content_hash(there / "sft" / "model")


def test_data_without_preferences_is_refused(refused: Refused) -> None:
    assert "toy_reviews" in refused("stage=dpo")
