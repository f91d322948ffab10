"""Step 2: classifiers with GPT-1's second loss, reward models from pairs and rankings, and how both are left."""

import itertools
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CommandLine, Refused
from datasets import Dataset
from safetensors.torch import load_file
from tiny_rewards import loss_and_gradient, reward_args, tiny_config, tiny_model, write
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from trl import RewardTrainer

from rlhf_pipeline.data import load_data
from rlhf_pipeline.data.records import Demonstration, Dialogue, Preference, Ranking, Turn
from rlhf_pipeline.files import read_json, read_jsonl
from rlhf_pipeline.models.policies import train_tokenizer
from rlhf_pipeline.models.rewards import load_reward
from rlhf_pipeline.training.preferences import (
    Comparison,
    ComparisonTrainer,
    as_demonstration,
    comparisons_of,
    encode_with_eos,
    tokenize_comparisons,
)
from rlhf_pipeline.training.quality import is_near_chance, preference_quality

RANKING = Ranking("Which film?", (" the good one", " any one", " the bad one", " no"))
PAIR = Preference("Was it good? ", "yes it was", "no")
ROWS: list[Preference | Ranking] = [
    RANKING,
    PAIR,
    Ranking("So? ", ("yes", "a", "no")),
    Preference("What of it? ", "much", "none"),
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    made = train_tokenizer(["which film was good, the bad one or the other? yes it was"], 300, 64)
    made.truncation_side = "left"
    return made


def comparison_trainer(
    folder: Path, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None,
    rows: Sequence[Preference | Ranking] = ROWS, margin: float = 0.0, **options: Any,
) -> ComparisonTrainer:  # fmt: skip
    found = comparisons_of(rows, margin)
    return ComparisonTrainer(model or tiny_model(), reward_args(folder, **options), tokenizer, found, found)


# -- comparisons


def test_all_pairs_of_a_prompt_but_those_of_equal_answers() -> None:
    def pairs(row: Preference | Ranking, margin: float = 0.0) -> list[tuple[int, int, float]]:
        return [pair for found in comparisons_of([row], margin) for pair in found.pairs]

    assert [p[:2] for p in pairs(RANKING)] == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert [p[2] for p in pairs(RANKING, margin=0.5)] == [0.5, 1.0, 1.5, 0.5, 1.0, 0.5]
    assert pairs(Ranking("", ("a", "b", "a"))) == [(0, 1, 0.0), (1, 0, 0.0)]
    assert pairs(Preference("", "a", "b", margin=2.5), margin=0.5) == [(0, 1, 2.5)]
    assert pairs(Preference("", "a", "b"), margin=0.5) == [(0, 1, 0.5)]
    assert pairs(Preference("", "a", "a")) == []


def test_pairs_that_share_answers_to_a_prompt_are_put_together() -> None:
    rows = [Preference("p", "a", "b"), Preference("p", "a", "c"), Preference("p", "c", "b")]
    others = [Preference(f"q {i}", "a", "b") for i in range(4)]
    first, *rest = comparisons_of([*rows, *others])
    assert first == Comparison("p", ("a", "b", "c"), ((0, 1, 0.0), (0, 2, 0.0), (2, 1, 0.0)))
    assert first.best == "a"
    assert len(rest) == 4
    assert comparisons_of(rows) == [first]
    apart = [Preference("p", f"a {i}", f"b {i}") for i in range(300)]
    assert [row.answers for row in comparisons_of(apart)] == [(f"a {i}", f"b {i}") for i in range(300)]
    assert [row.pairs for row in comparisons_of(apart)] == [((0, 1, 0.0),)] * 300


def test_pairs_that_share_one_answer_with_everything_are_not_put_together() -> None:
    everything = [Preference("p", f"a {i}", "I cannot say.") for i in range(40)]
    assert [len(row.pairs) for row in comparisons_of(everything)] == [1] * 40
    assert [len(row.pairs) for row in comparisons_of(everything[:9])] == [9]
    ranking = Ranking("p", tuple(f"r {i}" for i in range(20)))
    assert [len(row.pairs) for row in comparisons_of([*everything, ranking])] == [1] * 40 + [190]


def test_labels_of_few_prompts_weigh_alike_and_make_small_batches(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    """Two prompts at 55 and 45 %, four answers each time: half of the labels once had 0.2 % of the loss."""
    rows = [
        Preference(prompt, f"{prompt} {number} {a}", f"{prompt} {number} {b}")
        for prompt, count in (("one", 55), ("two", 45)) for number in range(count)
        for a, b in itertools.combinations(range(4), 2)
    ]  # fmt: skip
    trainer = comparison_trainer(tmp_path, tokenizer, rows=rows)
    assert [len(texts) for texts in trainer.train_dataset["texts"]] == [4] * 100
    weight = trainer.data_collator(list(trainer.train_dataset))["weight"]
    assert weight.tolist() == pytest.approx([1 / 6] * 600)
    assert weight[:330].sum() / weight.sum() == pytest.approx(0.55)


def test_pairs_that_are_the_same_once_cut_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    long = "which film was good? " * 20
    rows = [Preference("q", "yes " + long, "no " + long), Preference("q", "yes", "no"),
            Ranking("r", ("the " + long, "one " + long, "short"))]  # fmt: skip
    found, kept, same = tokenize_comparisons(comparisons_of(rows), tokenizer, 24)
    assert (same, len(found)) == (2, 2)
    assert [row.answers for row in kept] == [("yes", "no"), ("the " + long, "short", "one " + long)]
    assert kept[1].pairs == ((0, 1, 0.0), (2, 1, 0.0))
    assert tokenize_comparisons(comparisons_of(rows), tokenizer, 999)[1:] == (comparisons_of(rows), 0)


def test_a_row_as_a_demonstration(tokenizer: PreTrainedTokenizerBase) -> None:
    turns = (Turn("user", "good?"), Turn("assistant", "yes"))
    assert as_demonstration(RANKING, tokenizer) == "Which film? the good one"
    assert as_demonstration(Demonstration("good? ", "yes"), tokenizer) == "good? yes"
    assert as_demonstration(Dialogue(turns), tokenizer) == as_demonstration(Demonstration(turns[:1], "yes"), tokenizer)
    assert "good?" in as_demonstration(Preference(turns[:1], "yes", "no"), tokenizer)


def test_a_long_text_loses_its_beginning_and_ends_with_eos(tokenizer: PreTrainedTokenizerBase) -> None:
    whole = tokenizer("which film was good?" * 9 + " the answer")["input_ids"]
    (cut,) = encode_with_eos(["which film was good?" * 9 + " the answer"], tokenizer, 20)
    assert cut == [*whole[-19:], tokenizer.eos_token_id]


def test_the_loss_is_the_mean_over_prompts_of_the_mean_over_pairs(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    trainer = comparison_trainer(tmp_path, tokenizer, margin=0.3, center_rewards_coefficient=0.1)
    found, gradient = loss_and_gradient(trainer)
    trainer.model.zero_grad()
    prompts = []
    for row in comparisons_of(ROWS, 0.3):
        texts = row.texts(tokenizer)
        r = [trainer.model(torch.tensor([ids])).logits[0, 0] for ids in encode_with_eos(texts, tokenizer, 32)]
        each = [-torch.sigmoid(r[i] - r[j] - m).log() + 0.1 * (r[i] + r[j]) ** 2 for i, j, m in row.pairs]
        prompts.append(torch.stack(each).mean())
    expected = torch.stack(prompts).mean()
    expected.backward()
    assert found == pytest.approx(expected.item(), rel=1e-5)
    by_hand = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    torch.testing.assert_close(gradient, by_hand, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("center", [None, 0.2])
def test_of_pairs_the_loss_is_trls(center: float | None, tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = [Preference(f"Which film {i}?", " the good one" * (i + 1), " no" * (4 - i)) for i in range(4)]
    ours = comparison_trainer(tmp_path, tokenizer, tiny_model(), rows, center_rewards_coefficient=center)
    data = Dataset.from_list([{name: getattr(r, name) for name in ("prompt", "chosen", "rejected")} for r in rows])
    args = reward_args(tmp_path, center_rewards_coefficient=center)
    trls = RewardTrainer(tiny_model(), args, train_dataset=data, processing_class=tokenizer)
    (found, gradient), (expected, by_trl) = loss_and_gradient(ours), loss_and_gradient(trls)
    assert found == pytest.approx(expected, rel=1e-6)
    torch.testing.assert_close(gradient, by_trl, atol=1e-6, rtol=1e-4)
    for trainer in (ours, trls):
        trainer.log({})
    figures, theirs = (trainer.state.log_history[-1] for trainer in (ours, trls))
    for name in ("accuracy", "margin", "min_reward", "max_reward", "mean_reward"):
        assert figures[name] == pytest.approx(theirs[name], rel=1e-4), name


def test_quality_of_rankings(tokenizer: PreTrainedTokenizerBase) -> None:
    class Short:
        """Prefers the shorter text."""

        labels = 1

        def logits(self, texts: Sequence[str], tick: Callable[[int], object]) -> torch.Tensor:
            tick(len(texts))
            return torch.tensor([[-float(len(text))] for text in texts])

    scorer: Any = Short()
    scorer.tokenizer = tokenizer
    rows = [Ranking("", ("a", "bbb", "cc", "dd")), Preference("", "long", "no")]
    quality = preference_quality(comparisons_of(rows), scorer)
    assert (quality["prompts"], quality["pairs"], quality["rows"]) == (2, 7, 2)
    assert quality["accuracy"] == pytest.approx(3 / 7)  # the first before all others; cc and dd tie, which is wrong
    assert quality["prompt_accuracy"] == pytest.approx((3 / 6 + 0) / 2)
    assert quality["score_mean"] == pytest.approx(-(1 + 3 + 2 + 2 + 4 + 2) / 6)
    assert quality["length_correlation"] == pytest.approx(-1)
    pairs = [Preference("one", f"a{i}", f"bb{i}") for i in range(3)] + [Preference("two", "long", "no")]
    quality = preference_quality(comparisons_of(pairs), scorer)
    assert (quality["prompts"], quality["pairs"], quality["prompt_accuracy"]) == (2, 4, 0.5)


# -- by the command


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A language model that lies in a folder."""
    folder = tmp_path_factory.mktemp("policy")
    torch.manual_seed(0)
    GPT2LMHeadModel(tiny_config(n_embd=32, tie_word_embeddings=True)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


LABELLED = [{"text": f"film {i} was {('bad', 'good')[i % 2]}, {('a loss', 'a win')[i % 2]} it was", "label": i % 2}
            for i in range(96)]  # fmt: skip


def held_out_language_loss(folder: Path) -> float:
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = tokenizer([f"film {i} was good, a win it was" for i in range(200, 208)], return_tensors="pt", padding=True)
    with torch.no_grad():
        states = model.base_model(**{k: batch[k] for k in ("input_ids", "attention_mask")}).last_hidden_state
    logits = states[:, :-1] @ model.get_input_embeddings().weight.t()
    targets = batch["input_ids"][:, 1:].masked_fill(batch["attention_mask"][:, 1:] == 0, -100)
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()


def test_a_classifier_with_lm_coef_goes_on_telling_words(
    policy: Path, workplace: Path, command_line: CommandLine, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(workplace / "labelled.jsonl", LABELLED)
    args = ["stage=reward", "data=sentiment", f"data.path={path}", "data.test_share=0.2", "reward=classifier",
            f"policy.path={policy}", "policy=causal_lm", "trainer.learning_rate=5e-3", "trainer.num_train_epochs=16",
            "trainer.per_device_train_batch_size=16", "trainer.logging_steps=3", "trainer.eval_strategy=epoch",
            'reward.examples=["film 7 was good, a win it was", "film 8 was bad, a loss it was"]']  # fmt: skip
    for coefficient in (0, 0.5):
        assert command_line(*args, f"name=lm{coefficient}", f"reward.lm_coef={coefficient}") == 0
    without, beside = (Path(f"runs/lm{c}/reward") for c in (0, 0.5))
    losses = [held_out_language_loss(run / "model") for run in (without, beside)]
    assert losses[1] < losses[0] - 0.5, losses
    rows = read_jsonl(beside / "metrics.jsonl")
    logged = [row for row in rows if "lm_loss" in row]
    assert logged[-1]["lm_loss"] < logged[0]["lm_loss"]
    assert logged[0]["loss"] == pytest.approx(logged[0]["classification_loss"] + 0.5 * logged[0]["lm_loss"], rel=1e-3)
    measured = [row for row in rows if "eval_loss" in row][-1]
    assert measured["eval_loss"] == pytest.approx(
        measured["eval_classification_loss"] + 0.5 * measured["eval_lm_loss"], rel=1e-3
    )
    assert type(AutoModelForSequenceClassification.from_pretrained(beside / "model")) is GPT2ForSequenceClassification
    quality = read_json(beside / "quality.json")
    assert quality["accuracy"] == 1.0
    good, bad = quality["examples"]
    assert good["text"] == "film 7 was good, a win it was"
    assert good["probabilities"]["positive"] > 0.5 > bad["probabilities"]["positive"]
    assert sum(bad["probabilities"].values()) == pytest.approx(1)
    line = f"negative {bad['probabilities']['negative']:.3f}, positive {bad['probabilities']['positive']:.3f}"
    assert f"{line}: film 8 was bad, a loss it was" in capsys.readouterr().out


RANKINGS = [
    {"prompt": f"Film {i}?", "responses": [" very good, yes it was", " good", " bad", " no"][: 2 + i % 3]}
    for i in range(60)
]

BARE = """
import sys, torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
texts = sys.stdin.read().split("|")
with torch.no_grad():
    ids = [tokenizer(text + tokenizer.eos_token, return_tensors="pt")["input_ids"] for text in texts]
    print(type(model).__name__, *(model(i).logits.item() - model.config.score_offset for i in ids))
"""


@pytest.mark.parametrize(("head", "pooling", "bf16"), [("linear", "last", "false"), ("mlp", "mean", "true")])
def test_a_reward_model_from_rankings_scores_demonstrations_0_on_average(
    head: str, pooling: str, bf16: str, policy: Path, workplace: Path, command_line: CommandLine,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    data = write(workplace / "rankings.jsonl", RANKINGS)
    shows = [{"prompt": f"Film {i}?", "completion": " good" if i % 3 else " no"} for i in range(40)]
    demonstrations = write(workplace / "demonstrations.jsonl", shows)
    args = ["stage=reward", "name=r", "data=preferences", f"data.path={data}", "data.test_share=0.2",
            "reward=preference_model", f"reward.head={head}", f"reward.pooling={pooling}", "policy=causal_lm",
            f"policy.path={policy}", "trainer.learning_rate=5e-3", "trainer.num_train_epochs=10", "reward.margin=0.1",
            "trainer.per_device_train_batch_size=8", "reward.examples=[Film 3? good]",
            f"trainer.bf16={bf16}",
            "reward.demonstrations.name=instructions", f"reward.demonstrations.path={demonstrations}"]  # fmt: skip
    assert command_line(*args) == 0
    quality = read_json(Path("runs/r/reward/quality.json"))
    assert quality["accuracy"] > 0.9
    assert quality["prompts"] == quality["rows"] < quality["pairs"]
    assert quality["prompt_accuracy"] > 0.9
    assert quality["margin"] > 0.1
    assert quality["demonstration_mean"] != 0
    assert f"score {quality['examples'][0]['score']:.3f}: Film 3? good" in capsys.readouterr().out
    # As PPO scores them; and, of the plain class, any process that takes the offset off.
    given = load_data({"name": "instructions", "path": demonstrations}, 0).train
    reward, _ = load_reward({"name": "preference_model", "max_length": 32}, Path("runs/r/reward"))
    found = reward([row.prompt for row in given], [row.completion for row in given])
    assert sum(found) / len(found) == pytest.approx(0, abs=1e-4)
    assert max(found) > 0.01  # they are not all 0; how far apart they are depends on rounding in bf16
    if (head, pooling) == ("linear", "last"):
        texts = "|".join(row.prompt + row.completion for row in given)
        call = [sys.executable, "-c", BARE, "runs/r/reward/model"]
        name, *bare = subprocess.run(call, input=texts, capture_output=True, text=True, check=True).stdout.split()
        assert name == "GPT2ForSequenceClassification"
        assert [float(score) for score in bare] == pytest.approx(found, abs=1e-4)


def test_what_does_not_go_together_is_refused(workplace: Path, refused: Refused) -> None:
    Path("empty.jsonl").touch()
    for asked, complaint in (
        ("reward=classifier reward.base=encoder reward.lm_coef=0.5 data=sentiment", "an encoder has none"),
        ("reward=preference_model data=sentiment", "data=sentiment holds labelled texts"),
        ("reward=classifier data=preferences", "data=preferences holds preferences"),
    ):
        assert complaint in refused(f"stage=reward data.path=empty.jsonl {asked}")


@pytest.mark.parametrize(
    ("accuracy", "labels", "near"),
    [(0.52, [], True), (0.56, [], False), (0.76, [1, 1, 1, 0], True), (0.81, [0, 0, 0, 1], False)],
)
def test_a_reward_near_chance_is_known(accuracy: float, labels: list[int], near: bool) -> None:
    assert is_near_chance({"accuracy": accuracy, "rows": 100}, labels) is near


# -- on real data


REAL = {
    "hh_harmless_base_test": ["data.limit=48", "data.test_limit=24"],
    "zh_review_ranklists4": ["data.limit=32", "data.test_limit=16"],
    "oasst_en_ranked": ["data.limit=16", "data.test_limit=8"],
}


@pytest.mark.parametrize("name", REAL)
def test_on_real_preferences(name: str, shared: Path, workplace: Path, command_line: CommandLine) -> None:
    args = ["stage=reward", "name=real", "data=preferences", *REAL[name], "policy=gpt2_scratch", "policy.size=tiny",
            f"data.path={shared}/data/preferences/{name}.jsonl.gz", "policy.vocabulary=512", "policy.positions=64",
            "reward=preference_model", "trainer.per_device_train_batch_size=8", "trainer.logging_steps=1",
            "trainer.learning_rate=1e-3", "trainer.num_train_epochs=2"]  # fmt: skip
    assert command_line(*args) == 0
    losses = [row["loss"] for row in read_jsonl(Path("runs/real/reward/metrics.jsonl")) if "loss" in row]
    half = len(losses) // 2
    assert sum(losses[half:]) < sum(losses[:half])
    quality = read_json(Path("runs/real/reward/quality.json"))
    assert 0 < quality["accuracy"] < 1
    assert sum(row["count"] for row in quality["calibration"]) == quality["pairs"]
    assert load_file("runs/real/reward/model/model.safetensors")["score.weight"].shape[0] == 1
