"""What a reward reads of a text: the same tokens at the same positions in training, in scoring and once saved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine, Refused, change, once
from tiny_rewards import tiny_config, write
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

from rlhf_pipeline.data import load_data
from rlhf_pipeline.files import read_json
from rlhf_pipeline.models.classifiers import Scorer
from rlhf_pipeline.models.policies import train_tokenizer
from rlhf_pipeline.models.rewards import load_reward
from rlhf_pipeline.stages import reward as stage
from rlhf_pipeline.training.preferences import comparisons_of

PAIRS = [{"prompt": f"Film {i}?", "chosen": " very good" * (1 + i % 4), "rejected": " no"} for i in range(60)]
LABELLED = [{"text": f"film {i} was {('bad', 'good')[i % 2]}" + " it was" * (i % 5), "label": i % 2} for i in range(60)]
ROWS = {"classifier": ("sentiment", LABELLED), "preference_model": ("preferences", PAIRS)}
RUN, MODEL = Path("runs/r/reward"), "runs/r/reward/model"


def make_tokenizer(eos_pads: bool) -> PreTrainedTokenizerBase:
    made = train_tokenizer(["which film was very good, the bad one or the other? yes it was"], 300, 64)
    if eos_pads:
        made.pad_token = made.eos_token
    return made


def save_policy(folder: Path, kind: str) -> Path:
    tokenizer = make_tokenizer("EOS" in kind)
    torch.manual_seed(0)
    if kind.startswith("llama"):
        sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
        model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes))
    else:
        model = GPT2LMHeadModel(
            tiny_config(vocab_size=len(tokenizer), n_embd=32, tie_word_embeddings=True, initializer_range=0.2)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    change(folder / "tokenizer_config.json", padding_side="left")
    assert AutoTokenizer.from_pretrained(folder).padding_side == "left"
    return folder


@pytest.fixture
def trainers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The trainers that stage=reward makes from here on."""
    made: list[Any] = []
    make = stage._trainer
    monkeypatch.setattr(stage, "_trainer", lambda *args: made.append(make(*args)) or made[-1])
    return made


def options(policy: Path, data: str, path: str, *more: str) -> list[str]:
    given = f"name=r data={data} data.path={path} data.test_share=0.2 policy=causal_lm policy.path={policy}"
    return once("stage=reward", *given.split(), "trainer.learning_rate=1e-2", "trainer.max_steps=6", *more)


def by_a_stranger(texts: Sequence[str], end: str) -> torch.Tensor:
    """Scores by a process that has transformers alone, in the batch that the saved tokenizer pads."""
    model = AutoModelForSequenceClassification.from_pretrained(MODEL).eval()
    assert not type(model).__module__.startswith("rlhf_pipeline"), "the plain class, which opens anywhere"
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    ending = getattr(tokenizer, end) if end else ""
    batch = tokenizer([text + ending for text in texts], padding=True, return_tensors="pt")
    with torch.no_grad():
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def in_a_batch_and_alone(trainer: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of the rows of a training batch, and of each row on its own."""
    model = trainer.accelerator.unwrap_model(trainer.model).eval()
    with torch.no_grad():
        padded = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        rows = zip(batch["input_ids"], batch["attention_mask"], strict=True)
        return padded, torch.cat([model(input_ids=ids[mask.bool()][None]).logits for ids, mask in rows])


@pytest.mark.parametrize(
    ("reward", "kind"),
    [("classifier", "gpt2, EOS pads"), ("classifier", "llama, EOS pads"), ("preference_model", "gpt2"),
     ("preference_model", "gpt2, EOS pads"), ("preference_model", "llama, EOS pads")],
)  # fmt: skip
def test_a_text_is_read_alike_wherever_it_stands(
    reward: str, kind: str, workplace: Path, command_line: CommandLine, trainers: list[Any]
) -> None:
    """In a batch and alone, in training, in scoring and once saved; by a reward model with the EOS at its end."""
    data, rows = ROWS[reward]
    path = write(workplace / "rows.jsonl", rows)
    assert command_line(*options(save_policy(workplace / "policy", kind), data, path, f"reward={reward}")) == 0
    padded, alone = in_a_batch_and_alone(trainers[0], trainers[0].data_collator(list(trainers[0].train_dataset)))
    train = load_data({"name": data, "path": path, "test_share": 0.2}, 0).train
    if reward == "classifier":
        texts, end, offset = [row.text for row in train], "", 0.0
        scored = Scorer.open(MODEL, 7, 64).logits(texts)
        assert scored.std(0).min() > 0.01
    else:
        compared, end = comparisons_of(train), "eos_token"
        prompts = [row.prompt for row in compared for _ in row.answers]
        answers = [answer for row in compared for answer in row.answers]
        texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
        offset = AutoModelForSequenceClassification.from_pretrained(MODEL).config.score_offset
        found, _ = load_reward({"name": reward}, RUN)
        scored = torch.tensor(found(prompts, answers))[:, None] + offset
        assert (Scorer.open(MODEL, 7, 64).logits(texts) + offset - alone).abs().mean() > 0.01, "without EOS"
    for read in (padded, scored, by_a_stranger(texts, end)):
        torch.testing.assert_close(read, alone, atol=1e-5, rtol=1e-5)


def test_a_strangers_reward_model_whose_eos_pads_reads_eos_too() -> None:
    tokenizer = make_tokenizer(eos_pads=True)
    torch.manual_seed(0)
    config = tiny_config(vocab_size=len(tokenizer), pad_token_id=tokenizer.eos_token_id, initializer_range=0.2)
    model = GPT2ForSequenceClassification(config)
    texts = ["good", "very bad, it was", "which film?"]
    ids = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    with torch.no_grad():
        states = [model.eval().transformer(torch.tensor([row])).last_hidden_state[0, -1] for row in ids]
        expected = torch.stack([model.score(state) for state in states])
    found = Scorer(model, tokenizer, 8, 32, append_eos=True).logits(texts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("reward", "side"), [("preference_model", None), ("preference_model", "right"), ("classifier", None)]
)
def test_a_long_text_is_scored_as_it_was_cut_in_training(
    reward: str, side: str | None, workplace: Path, command_line: CommandLine
) -> None:
    data, rows = ROWS[reward]
    more = [f"reward={reward}", "trainer.max_length=16", *([f"reward.truncation_side={side}"] if side else [])]
    policy = save_policy(workplace / "policy", "gpt2")
    assert command_line(*options(policy, data, write(workplace / "rows.jsonl", rows), *more)) == 0

    def scores(**how: Any) -> list[float]:
        found, _ = load_reward({"name": reward, **how}, RUN)
        return found(["which film was very good " * 4], ["the bad one"])

    assert scores() == scores(max_length=16, truncation_side=side or "left")
    assert scores() != scores(max_length=32)
    assert scores() != scores(truncation_side="left" if side else "right")


@pytest.mark.parametrize("names", [("NEGATIVE", "POSITIVE"), ("Positive (4-5 stars)", "Negative (1-3)")])
def test_a_starting_classifier_keeps_the_meaning_of_its_head(
    names: tuple[str, str], workplace: Path, command_line: CommandLine
) -> None:
    tokenizer = make_tokenizer(eos_pads=False)
    torch.manual_seed(0)
    classes = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    config = tiny_config(vocab_size=len(tokenizer), n_embd=32, initializer_range=0.2, num_labels=2, **classes)
    GPT2ForSequenceClassification(config).save_pretrained(workplace / "start")
    tokenizer.save_pretrained(workplace / "start")
    path = write(workplace / "labelled.jsonl", LABELLED)
    more = ["reward=classifier", f"reward.path={workplace / 'start'}", "trainer.learning_rate=0"]
    assert command_line(*options(workplace / "start", "sentiment", path, *more)) == 0
    texts, positive = [row["text"] for row in LABELLED[:8]], max(names, key=str.lower)
    before, _ = load_reward({"name": "classifier", "path": str(workplace / "start"), "label": positive}, None)
    after, _ = load_reward({"name": "classifier", "path": str(RUN), "label": "positive"}, None)
    assert after([""] * 8, texts) == pytest.approx(before([""] * 8, texts), abs=1e-6)


# -- pairs that cannot be told apart


def cut_pairs(count: int) -> list[dict[str, str]]:
    tail = " which film was good" * 9
    return [{"prompt": f"Film {i}?", "chosen": " very good" + tail, "rejected": " no" + tail} for i in range(count)]


def test_pairs_that_are_the_same_once_cut_are_counted_and_left_out(
    workplace: Path, command_line: CommandLine, refused: Refused, capsys: pytest.CaptureFixture[str],
    trainers: list[Any],
) -> None:  # fmt: skip
    policy = save_policy(workplace / "policy", "gpt2")

    def asked(rows: list[dict[str, str]], *more: str) -> list[str]:
        path = write(workplace / "pairs.jsonl", rows)
        return options(policy, "preferences", path, "reward=preference_model", "trainer.max_length=20", *more)

    assert command_line(*asked(PAIRS + [{**row, "prompt": f"A {row['prompt']}"} for row in cut_pairs(40)])) == 0
    said = capsys.readouterr().out
    quality = read_json(RUN / "quality.json")
    learnt = len(trainers[0].train_dataset)
    assert learnt + quality["pairs"] == 60
    assert 0 < quality["same_once_cut"] < 40
    for what, same, kept in (
        ("training", 40 - quality["same_once_cut"], learnt),
        ("held-out", quality["same_once_cut"], quality["pairs"]),
    ):
        many = f"{same} of {same + kept} {what} pairs have identical answers once cut to 20 tokens (trainer.max_length"
        assert many in said

    # Where they are all the same, nothing is trained.
    alike = asked(cut_pairs(40), "name=alike")
    error = refused(" ".join(alike)).strip().split("\n")[-1]
    for part in ("pairs have identical answers once cut", "trainer.max_length", "reward.truncation_side=right"):
        assert part in error
    assert not Path("runs/alike/reward/run.json").exists()
    assert command_line(*alike, "reward.truncation_side=right") == 0


# -- demonstrations


def test_other_demonstrations_are_other_work(workplace: Path, command_line: CommandLine, refused: Refused) -> None:
    policy = save_policy(workplace / "policy", "gpt2")
    shows = [{"prompt": f"Film {i}?", "completion": " good"} for i in range(40)]
    path = write(workplace / "shows.jsonl", shows)
    args = options(policy, "preferences", write(workplace / "pairs.jsonl", PAIRS), "reward=preference_model",
                   "reward.demonstrations.name=instructions", f"reward.demonstrations.path={path}",
                   "trainer.save_steps=2", "trainer.max_steps=4")  # fmt: skip
    assert command_line(*args) == 0
    before = read_json(RUN / "run.json")["data"]["demonstrations"]
    assert (before["name"], before["train"] + before["test"], len(before["sha256"])) == ("instructions", 40, 64)
    assert command_line(*args) == 0
    write(workplace / "shows.jsonl", [{**row, "completion": " bad"} for row in shows])
    assert f"its demonstrations {path} has changed since" in refused(" ".join(args))
    assert command_line(*args, "overwrite=true") == 0
    assert read_json(RUN / "run.json")["data"]["demonstrations"]["sha256"] != before["sha256"]
