"""Step 2: the reward. From labelled texts a classifier, from preferences a scalar model; ends with its quality.

python -m rlhf_pipeline stage=reward
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from datasets import Dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)
from trl import RewardConfig

from rlhf_pipeline import metrics
from rlhf_pipeline.data import fingerprint, kind, load_data, texts
from rlhf_pipeline.hub import explained, open_pretrained
from rlhf_pipeline.policies import load_policy
from rlhf_pipeline.precision import fuse_gelu
from rlhf_pipeline.records import Labelled, Preference
from rlhf_pipeline.rewards import Scorer
from rlhf_pipeline.rundir import RunDir, model_folder, write_json
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages.batching import OrderedRewardTrainer, OrderedTrainer
from rlhf_pipeline.stages.common import Clock, fit_length, progress, say_done, say_taken, trainer_args, watch

# layers, width, heads of an encoder from scratch
ENCODERS = {"tiny": (2, 128, 4), "mini": (4, 256, 4), "small": (6, 512, 8)}
LABELS = {0: "negative", 1: "positive"}


def run(settings: Settings, out: RunDir) -> None:
    """Train on what the data holds, then measure on the held-out split."""
    clock, args = Clock(), trainer_args(RewardConfig, settings, out)
    rows = load_data(settings.data, settings.seed)
    labelled = kind(settings.data["name"]) is Labelled
    model, tokenizer, where = _start(settings, out, texts(rows.train), 2 if labelled else 1)
    say_taken("start", where)
    out.begin(settings, {"start": where}, fingerprint(settings.data, rows))
    longest = fit_length(args, model)
    fuse_gelu(model)
    if labelled:
        collator = DataCollatorWithPadding(tokenizer)
        data = [_labelled(split, tokenizer, longest) for split in (rows.train, rows.test)]
        trainer = OrderedTrainer(model, args, collator, data[0], data[1], processing_class=tokenizer)
    else:
        columns = ("prompt", "chosen", "rejected")
        pairs = [Dataset.from_list([{c: getattr(r, c) for c in columns} for r in s]) for s in (rows.train, rows.test)]
        trainer = OrderedRewardTrainer(
            model, args, train_dataset=pairs[0], eval_dataset=pairs[1], processing_class=tokenizer
        )
    trainer.train(resume_from_checkpoint=watch(trainer, out, "reward"))

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    out.save_model(save)
    scorer = Scorer(model, tokenizer, args.per_device_eval_batch_size, longest, append_eos=not labelled)
    quality = labelled_quality(rows.test, scorer) if labelled else preference_quality(rows.test, scorer)
    write_json(out.path / "quality.json", quality)
    results = {key: value for key, value in quality.items() if not isinstance(value, list)}
    out.finish(results, objective=quality["accuracy"])
    print(", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in results.items() if v is not None))
    say_done(out, f"held-out accuracy {quality['accuracy']:.2%} of {quality['rows']}", clock)


def _start(settings: Settings, out: RunDir, strings: Sequence[str], labels: int) -> tuple[Any, Any, str]:
    """The model to begin with: `reward.path`, an encoder from scratch, or this run's language model with a new head."""
    names: dict[str, Any] = {"num_labels": labels}
    if labels == 2:
        names |= {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    torch.manual_seed(settings.seed)  # for the head
    upstream = out.upstream("sft", "pretrain", policy=settings.policy)
    path = settings.reward.get("path")
    if path is None and settings.reward.get("base") == "encoder":
        tokenizer = load_policy(settings.policy, upstream, strings, settings.seed)[0].tokenizer
        size = settings.reward.get("size", "tiny")
        torch.manual_seed(settings.seed)
        return _encoder(tokenizer, size, names), tokenizer, f"an encoder from scratch ({size})"
    if path is None and upstream is None and settings.policy.get("path") is None:
        policy, where = load_policy(settings.policy, None, strings, settings.seed)
        if where.endswith("untrained"):
            config = policy.model.config
            config.update(names)
            return AutoModelForSequenceClassification.from_config(config), policy.tokenizer, where
        path = where
    where = model_folder(path or settings.policy.get("path") or str(upstream))
    with explained(where, "reward.path"):
        tokenizer = AutoTokenizer.from_pretrained(where)
    model = open_pretrained(
        AutoModelForSequenceClassification, where, "reward.path", ignore_mismatched_sizes=True, **names
    )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model.config.pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, where


def _encoder(tokenizer: Any, size: str, names: dict[str, Any]) -> Any:
    """A small ModernBERT (arXiv 2412.13663) that pools the mean: with little data it learns faster so."""
    layers, width, heads = ENCODERS[size]
    config = ModernBertConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        local_attention=64,
        global_attn_every_n_layers=2,
        classifier_pooling="mean",
        embedding_dropout=0.1,
        mlp_dropout=0.1,
        classifier_dropout=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        cls_token_id=None,
        sep_token_id=None,
        **names,
    )
    return ModernBertForSequenceClassification(config)


def _labelled(rows: Sequence[Labelled], tokenizer: Any, longest: int) -> Dataset:
    ids = tokenizer([row.text for row in rows], truncation=True, max_length=longest)["input_ids"]
    return Dataset.from_dict({"input_ids": ids, "labels": [row.label for row in rows]})


def _scores(strings: Sequence[str], scorer: Scorer) -> torch.Tensor:
    found, part = [], 512
    with progress(len(strings), "quality") as bar:
        for start in range(0, len(strings), part):
            found.append(scorer.logits(strings[start : start + part]))
            bar.update(len(found[-1]))
    return torch.cat(found)


def labelled_quality(rows: Sequence[Labelled], scorer: Scorer) -> dict[str, Any]:
    """How far a classifier can be trusted, on rows that it was not trained on."""
    logits = _scores([row.text for row in rows], scorer).numpy()
    truth = np.array([row.label for row in rows])
    score = logits[:, 1] - logits[:, 0]  # log odds of positive
    probability = 1 / (1 + np.exp(-score.astype(np.float64)))
    accuracy = metrics.Accuracy().compute(predictions=(score > 0).astype(int), references=truth)
    calibration, error = metrics.calibration(probability, truth)
    return {
        **accuracy,
        "rows": len(rows),
        "margin": float(np.where(truth == 1, score, -score).mean()),
        "calibration_error": error,
        "length_correlation": metrics.correlation(score, [len(row.text) for row in rows]),
        "score_mean": float(score.mean()),
        "score_std": float(score.std()),
        "calibration": calibration,
    }


def preference_quality(rows: Sequence[Preference], scorer: Scorer) -> dict[str, Any]:
    """How often, and by how much, a reward model prefers what people preferred, on prompts not trained on."""
    sides = [[row.prompt + getattr(row, side) for row in rows] for side in ("chosen", "rejected")]
    chosen, rejected = (_scores(side, scorer)[:, 0].numpy() for side in sides)
    margin = chosen - rejected
    probability = 1 / (1 + np.exp(-np.abs(margin).astype(np.float64)))
    calibration, error = metrics.calibration(probability, (margin > 0).astype(int))
    both = np.concatenate([chosen, rejected])
    return {
        **metrics.Accuracy().compute(predictions=(margin > 0).astype(int), references=np.ones(len(rows), dtype=int)),
        "rows": len(rows),
        "margin": float(margin.mean()),
        "calibration_error": error,
        "length_correlation": metrics.correlation(both, [len(text) for text in sides[0] + sides[1]]),
        "score_mean": float(both.mean()),
        "score_std": float(both.std()),
        "calibration": calibration,
    }
