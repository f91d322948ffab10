"""Speed of SFT, pretraining and the reward stage against TRL's defaults, in real tokens (no padding) per second.

    python tests/benchmarks/stages_speed.py [--quick] [--rounds 5] [--results FOLDER]

In each round all sides take turns, each in a process on the same cores. They train for one epoch on the same rows, from
the same untrained GPT-2 of 6 layers, 256 wide, without dropout. The rows are texts of IMDB and pairs of hh-rlhf if
RLHF_SHARED has them, else random words of such lengths. A ratio is the median over the rounds. The time is wall-clock
time, so nothing else should run. Both sides have TRL's batch size, 8, and at most 512 tokens per text. bf16 is on if
the machine has it natively; TRL's default, bf16 everywhere, would be slower elsewhere. The rows are few: with more
rows, those of a batch have more similar lengths.
"""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import resource
import statistics
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.update(HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", TRANSFORMERS_VERBOSITY="error")
os.environ.update(TOKENIZERS_PARALLELISM="false", TRL_EXPERIMENTAL_SILENCE="1")

import datasets
import torch
import yaml
from kept import ROOT, Kept, Row, add_options, by_machine, say, spread, table
from networks import QUICK, SMALL, gpt2_config
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel, PreTrainedTokenizerBase, Trainer
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from rlhf_pipeline.models.policies import train_tokenizer
from rlhf_pipeline.models.precision import choose_bf16, fuse_gelu, native_bf16
from rlhf_pipeline.training.batching import OrderedSFTTrainer
from rlhf_pipeline.training.preferences import Comparison, ComparisonTrainer

TEXTS = ("input_ids", "chosen_ids", "rejected_ids")  # the columns of token ids in TRL's rows
LONGEST, VOCABULARY, BATCH = 512, SMALL["vocabulary"], 8


@dataclass(frozen=True)
class Rows:
    """The training data as token ids."""

    tokenizer: PreTrainedTokenizerBase
    texts: list[list[int]]
    pairs: list[tuple[list[int], list[int]]]


def random_words(count: int) -> str:
    """Words of two to five syllables, a few of them frequent."""
    syllables = [c + v for c in "bdfgklmnprstvz" for v in ("a", "e", "i", "o", "u", "ar", "en")]
    words = random.Random(0)
    known = ["".join(words.choices(syllables, k=words.randint(2, 5))) for _ in range(5000)]
    return " ".join(random.choices(known, [1 / (i + 5) for i in range(5000)], k=count))


def read_texts(count: int) -> list[str]:
    """Reviews, or random words with the lengths of IMDB's reviews: mean 230 words, median 175."""
    archive = Path(os.environ.get("RLHF_SHARED", ""), "data/imdb/aclImdb_small.tar.gz")
    if not archive.exists():
        return [random_words(max(10, int(random.lognormvariate(5.16, 0.72)))) for _ in range(count)]
    with tarfile.open(archive) as files:
        members = sorted((m for m in files if m.name.endswith(".txt")), key=lambda m: m.name)
        return [files.extractfile(m).read().decode() for m in random.sample(members, count)]  # type: ignore[union-attr]


def read_pairs(count: int) -> list[tuple[str, str]]:
    """Whole dialogues with a better and a worse last turn, or random words of such lengths."""
    file = Path(os.environ.get("RLHF_SHARED", ""), "data/preferences/hh_harmless_base_test.jsonl.gz")
    if file.exists():
        with gzip.open(file, "rt", encoding="utf-8") as lines:
            rows = [json.loads(line) for line in lines]
        return [(row["chosen"], row["rejected"]) for row in random.sample(rows, count)]
    asked = [random_words(max(5, int(random.lognormvariate(4.3, 0.9)))) for _ in range(count)]
    answers = [[random_words(max(3, int(random.lognormvariate(3.3, 0.8)))) for _ in range(2)] for _ in asked]
    return [(f"{q} {better}", f"{q} {worse}") for q, (better, worse) in zip(asked, answers, strict=True)]


def read_rows(texts: int, pairs: int) -> Rows:
    """Texts and pairs in tokens of a vocabulary trained on the texts."""
    random.seed(0)
    strings = read_texts(1000)
    tokenizer = train_tokenizer(strings, VOCABULARY, 2 * LONGEST)
    ids: list[list[int]] = tokenizer(strings[:texts], add_special_tokens=False)["input_ids"]
    both = [tokenizer(list(pair))["input_ids"] for pair in read_pairs(pairs)]
    return Rows(
        tokenizer,
        [[*row[: LONGEST - 1], tokenizer.eos_token_id] for row in ids],
        [(better[:LONGEST], worse[:LONGEST]) for better, worse in both],
    )


def model(kind: Callable[[GPT2Config], Any], quick: bool) -> Any:
    """Make an untrained GPT-2 with gelu_new, as GPT-2 on the hub has, and without dropout."""
    torch.manual_seed(0)
    return kind(gpt2_config(**{**(QUICK if quick else SMALL), "vocabulary": VOCABULARY}))


def common(folder: str) -> dict[str, Any]:
    """Settings that all sides share."""
    return {
        "output_dir": folder,
        "num_train_epochs": 1,
        "per_device_train_batch_size": BATCH,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "use_cpu": True,  # without this setting transformers refuses bf16 on a CPU
    }


def of_stage(stage: str, folder: str, **changes: Any) -> dict[str, Any]:
    """The settings of conf/stage, for one epoch."""
    settings: dict[str, Any] = yaml.safe_load((ROOT / "conf" / "stage" / f"{stage}.yaml").read_text())["trainer"]
    return {**settings, "bf16": choose_bf16(settings.get("bf16"))[0], **common(folder), **changes}


def demonstrations(rows: Rows, count: int | None = None) -> datasets.Dataset:
    """Texts whose first 5 tokens are the prompt."""
    ids = rows.texts[:count]
    masks = [[0] * 5 + [1] * (len(row) - 5) for row in ids]
    return datasets.Dataset.from_dict({"input_ids": ids, "completion_mask": masks})


def preferences(rows: Rows) -> datasets.Dataset:
    """Pairs as RewardTrainer prepares them."""
    better, worse = zip(*rows.pairs, strict=True)
    return datasets.Dataset.from_dict({"chosen_ids": list(better), "rejected_ids": list(worse)})


def trl_sft(rows: Rows, folder: str, quick: bool, **changes: Any) -> Trainer:
    """SFTTrainer with its defaults."""
    args = SFTConfig(**common(folder), bf16=native_bf16(), **changes)
    few = len(rows.texts) // 8 if args.packing else None  # they become one long row, which is slower the longer it is
    data = demonstrations(rows, few)
    return SFTTrainer(model(GPT2LMHeadModel, quick), args, train_dataset=data, processing_class=rows.tokenizer)


def trl_packed(rows: Rows, folder: str, quick: bool) -> Trainer:
    """SFTTrainer with packing, otherwise with its defaults."""
    return trl_sft(rows, folder, quick, packing=True)


def our_sft(rows: Rows, folder: str, quick: bool) -> Trainer:
    """stage=sft"""
    policy = model(GPT2LMHeadModel, quick)
    fuse_gelu(policy)
    args = SFTConfig(**of_stage("sft", folder))
    return OrderedSFTTrainer(policy, args, train_dataset=demonstrations(rows), processing_class=rows.tokenizer)


def our_pretrain(rows: Rows, folder: str, quick: bool) -> Trainer:
    """stage=pretrain, with the stage's own number of tokens per batch"""
    policy = model(GPT2LMHeadModel, quick)
    fuse_gelu(policy)
    args = SFTConfig(**of_stage("pretrain", folder, per_device_train_batch_size=4 * BATCH))
    data = datasets.Dataset.from_dict({"input_ids": rows.texts})
    return OrderedSFTTrainer(policy, args, train_dataset=data, processing_class=rows.tokenizer)


def trl_reward(rows: Rows, folder: str, quick: bool) -> Trainer:
    """RewardTrainer with its defaults."""
    args = RewardConfig(**common(folder), bf16=native_bf16())
    scorer = model(GPT2ForSequenceClassification, quick)
    return RewardTrainer(scorer, args, train_dataset=preferences(rows), processing_class=rows.tokenizer)


def our_reward(rows: Rows, folder: str, quick: bool) -> Trainer:
    """stage=reward"""
    scorer = model(GPT2ForSequenceClassification, quick)
    fuse_gelu(scorer)
    args = RewardConfig(**of_stage("reward", folder))
    decode = rows.tokenizer.decode
    pairs = [Comparison("", (decode(better), decode(worse)), ((0, 1, 0.0),)) for better, worse in rows.pairs]
    return ComparisonTrainer(scorer, args, rows.tokenizer, pairs, pairs[:1])


Side = Callable[[Rows, str, bool], Trainer]
LEVERS = "batches of like length; no gradient checkpointing; GELU in one kernel"
COMPARISONS: list[tuple[str, Side, Side, str]] = [
    ("stage=sft against SFTTrainer", trl_sft, our_sft, LEVERS),
    ("stage=pretrain against SFTTrainer", trl_sft, our_pretrain, "wrapped packing: no padding, no mask; the last two"),
    ("stage=pretrain against SFTTrainer packing=true", trl_packed, our_pretrain, "attention within blocks of 128"),
    ("stage=sft against SFTTrainer packing=true", trl_packed, our_sft, "attention within a text, not in one long row"),
    (
        "stage=reward, pairs, against RewardTrainer",
        trl_reward,
        our_reward,
        f"{LEVERS}; the texts of a batch in four parts",
    ),
]


def once(side: Side, rows: Rows, quick: bool) -> Row:
    """Train one epoch: real tokens per second, tokens with padding per real token, peak memory in MB."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        trainer = side(rows, folder, quick)
        collate, counts = trainer.data_collator, [0, 0]

        def counting(examples: list[dict[str, Any]]) -> dict[str, Any]:
            every = (texts for e in examples for texts in e.get("texts") or map(e.get, TEXTS) if texts)
            counts[0] += sum(map(len, every))
            batch: dict[str, Any] = collate(examples)
            counts[1] += batch["input_ids"].numel()
            return batch

        trainer.data_collator = counting
        start = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - start
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"speed": counts[0] / seconds, "padding": counts[1] / counts[0], "memory": memory}


def measure(side: Side, rows: Rows, quick: bool) -> Row:
    """Run one side in a fork of this process. It must not compute before, because threads do not survive a fork."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("fork")) as pool:
        return pool.submit(once, side, rows, quick).result()


@by_machine
def stages_table(rows: Sequence[Row]) -> str:
    """One row per comparison: tokens per second, padding and memory."""

    def medians(row: Row, what: str, digits: int) -> list[str]:
        return [f"{statistics.median(m[what] for m in row[side]):,.{digits}f}" for side in ("trl", "ours")]

    lines = []
    for row in rows:
        ratios = [ours["speed"] / trl["speed"] for trl, ours in zip(row["trl"], row["ours"], strict=True)]
        lines.append([row["name"], *medians(row, "speed", 0), spread(ratios)])
        lines[-1] += [" to ".join(medians(row, "padding", 2)), " to ".join(medians(row, "memory", 0)), row["levers"]]
    header = ["stage", "TRL, tokens/s", "ours", "times as fast (range)", "padding, x real", "peak MB"]
    return table([*header, "what brings it"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--rounds", type=int, default=5)
    asked = parser.parse_args()
    datasets.disable_progress_bars()
    kept = Kept("stages", asked)
    texts = read_rows(16, 16) if asked.quick else read_rows(48, 96)
    os.sched_setaffinity(0, set(sorted(os.sched_getaffinity(0))[:2]))  # each side inherits them
    sides = dict.fromkeys(side for _, trl, ours, _ in COMPARISONS for side in (trl, ours))
    found: dict[Side, list[Row]] = {side: [] for side in sides}
    for round_ in range(asked.rounds):
        for side in sides:
            found[side].append(measure(side, texts, asked.quick))
            say(f"round {round_ + 1}  {side.__name__:<14}{found[side][-1]['speed']:8.0f} tokens/s")
    print(stages_table([
        kept.add(name, {"n": asked.rounds, "trl": found[trl], "ours": found[ours], "levers": levers})
        for name, trl, ours, levers in COMPARISONS
    ]))  # fmt: skip


if __name__ == "__main__":
    main()
