"""Step 2: train a classifier on labelled texts, or a scalar reward model on preferences, and measure its quality.

python -m rlhf_pipeline stage=reward
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)
from trl import RewardConfig

from rlhf_pipeline.data import Splits, fingerprint, load_data, row_type, texts
from rlhf_pipeline.data.agreement import Labels
from rlhf_pipeline.data.records import Labelled
from rlhf_pipeline.data.templates import TEMPLATES
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import write_json, write_jsonl
from rlhf_pipeline.hub import model_folder
from rlhf_pipeline.models import policies
from rlhf_pipeline.models.classifiers import Scorer, open_classifier, settle_padding, shift_scores, with_head
from rlhf_pipeline.models.precision import fuse_gelu
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.training.classifier import ClassifierTrainer, check_language_model, tokenize_labelled
from rlhf_pipeline.training.preferences import ComparisonTrainer, as_demonstration, comparisons_of, preferences_of
from rlhf_pipeline.training.quality import example_rows, is_near_chance, labelled_quality, preference_quality, scores
from rlhf_pipeline.training.setup import (
    attach_log,
    building,
    limit_length,
    print_input,
    read_data,
    sharded_weights,
    trainer_args,
)

# layers, width, heads of an encoder from scratch
ENCODERS = {"tiny": (2, 128, 4), "mini": (4, 256, 4), "small": (6, 512, 8)}
CLASS_NAMES = {0: "negative", 1: "positive"}
_DEMONSTRATIONS = 1000  # enough for a mean


def run(settings: Settings, out: RunDir) -> None:
    """Train on the labelled texts or preferences, then measure on the held-out split."""
    args, choice = trainer_args(RewardConfig, settings, out), settings.reward
    source = preferences_of(out, settings.data) if choice["name"] == "preference_model" else settings.data
    labelled = row_type(source["name"]) is Labelled
    _check(choice, source["name"], labelled)
    rows = read_data(source, settings.seed)
    model, tokenizer, where = _start(settings, out, texts(rows.train), 2 if labelled else 1)
    if choice.get("lm_coef"):
        check_language_model(model)
    print_input("start", where)
    paths = source["path"] if isinstance(source.get("path"), list) else []
    for path in paths:
        print_input("labels", path)
    lineage = {f"labels[{number}]" if number else "labels": path for number, path in enumerate(reversed(paths))}
    longest = limit_length(args, model)
    model.config.trained_cut = {"max_length": longest, "truncation_side": choice.get("truncation_side")}
    known = fingerprint(source, rows)
    fuse_gelu(model)
    with building():
        trainer = _trainer(model, tokenizer, args, rows, choice)
    test, before, demonstrations = rows.test, dict[str, Any](), list[str]()
    if not labelled:
        test, before = trainer.rows["eval"], {"same_once_cut": trainer.left_out["eval"]}
        shows = trainer.rows["train"]
        if chosen := choice.get("demonstrations"):
            other = load_data(chosen, settings.seed, answers=True)
            shows, known["demonstrations"] = other.train, fingerprint(chosen, other)
            lineage |= {"demonstrations": chosen["path"]} if chosen.get("path") else {}
        draw = random.Random(f"demonstrations {settings.seed}")
        some = draw.sample(shows, min(len(shows), _DEMONSTRATIONS))
        demonstrations = [as_demonstration(row, tokenizer) for row in some]
    out.begin(settings, {"start": where, **lineage}, known)
    if rows.labels and out.leads:
        _say_labels(rows.labels, out)
    trainer.train(resume_from_checkpoint=attach_log(trainer, out))
    weights = sharded_weights(trainer)
    if not out.leads:
        return
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # scored in fp32, as later
    if weights:
        model.float().load_state_dict(weights, strict=False)
    scorer = Scorer(model, tokenizer, args.per_device_eval_batch_size, longest, tokenizer.truncation_side, not labelled)
    if not labelled:  # demonstrations score 0 on average (Ouyang et al. 2022, 3.5)
        mean = float(scores(demonstrations, scorer, "normalise").double().mean())
        shift_scores(model, -mean)
        before = {"demonstration_mean": mean, **before}

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    out.save_model(save)
    quality = (labelled_quality if labelled else preference_quality)(test, scorer) | before
    quality["examples"] = example_rows(choice.get("examples") or [], scorer)
    write_json(out.path / "quality.json", quality)
    results = {key: value for key, value in quality.items() if not isinstance(value, list)}
    out.finish(results, objective=quality["accuracy"])
    print(", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in results.items() if v is not None))
    if is_near_chance(quality, [row.label for row in test] if labelled else []):
        print(
            "warning: the reward is hardly better than chance, so PPO would learn little from it; add rows, or raise "
            "trainer.num_train_epochs or trainer.learning_rate",
            flush=True,
        )
    for row in quality["examples"]:
        values = row.get("probabilities") or {"score": row["score"]}
        print(", ".join(f"{k} {v:.3f}" for k, v in values.items()) + f": {' '.join(row['text'].split())}")


def _say_labels(labels: Labels, out: RunDir) -> None:
    """Print what was judged, how far people agree, and what was set aside, in short; write all of it to two files."""
    write_json(out.path / "labels.json", labels.summary)
    write_jsonl(out.path / "rejected.jsonl", labels.rejected)
    figures = {key: value for key, value in labels.summary.items() if value or isinstance(value, float)}
    print("labels  " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()))
    for row in labels.rejected[:3]:
        where = f"{row['file']}" + (f", {row['where']}" if row["where"] else "")
        print(f"  set aside: {where}" + (f", task {row['task']}" if row["task"] else "") + f": {row['why']}")
    if len(labels.rejected) > 3:
        print(f"  set aside: {len(labels.rejected) - 3} more, see {out.path / 'rejected.jsonl'}", flush=True)


def _check(choice: dict[str, Any], data: str, labelled: bool) -> None:
    """Refuse settings that do not go together, before anything is loaded."""
    if labelled == (choice["name"] == "preference_model"):
        holds, fits = ("labelled texts", "classifier") if labelled else ("preferences", "preference_model")
        raise UserError(f"data={data} holds {holds}; reward={choice['name']} does not learn from them; use {fits}.")
    if choice.get("lm_coef") and choice.get("base") == "encoder":
        raise UserError(
            "reward.lm_coef weighs a language-model loss, and an encoder has none; "
            "use reward.base=policy, or reward.lm_coef=0."
        )


def _trainer(model: Any, tokenizer: Any, args: RewardConfig, rows: Splits[Any], choice: dict[str, Any]) -> Any:
    if choice["name"] == "preference_model":
        compared = [comparisons_of(split, choice.get("margin", 0.0)) for split in (rows.train, rows.test)]
        if not all(compared):
            raise UserError(
                "training and held-out data each need a prompt with two different answers; add preferences."
            )
        return ComparisonTrainer(model, args, tokenizer, *compared)
    train, test = (tokenize_labelled(split, tokenizer, args.max_length) for split in (rows.train, rows.test))
    collator = DataCollatorWithPadding(tokenizer, pad_to_multiple_of=args.pad_to_multiple_of)
    more = {"processing_class": tokenizer, "lm_coef": choice.get("lm_coef", 0.0)}
    return ClassifierTrainer(model, args, collator, train, test, **more)


def _start(settings: Settings, out: RunDir, strings: Sequence[str], labels: int) -> tuple[Any, Any, str]:
    """Return the model to train: `reward.path`, a new encoder, or this run's language model with a new head."""
    names: dict[str, Any] = {"num_labels": labels}
    if labels == 2:
        names |= {"id2label": CLASS_NAMES, "label2id": {name: index for index, name in CLASS_NAMES.items()}}
    choice, policy, seed = settings.reward, settings.policy, settings.seed
    path, upstream = choice.get("path"), out.upstream("sft", "pretrain", policy=policy)
    if path is None and choice.get("base") == "encoder":
        tokenizer = policies.load_policy(policy, upstream, strings, seed)[0].tokenizer
        size = choice.get("size", "tiny")
        torch.manual_seed(seed)  # for all weights
        return _encoder(tokenizer, size, names), tokenizer, f"an encoder from scratch ({size})"
    if where := model_folder(path) if path else policies.policy_folder(policy, upstream):
        torch.manual_seed(seed)  # for the head
        model, tokenizer = open_classifier(where, ignore_mismatched_sizes=True, **names)
        if labels == 2 and _reversed(policies.open_config(where, "reward.path").id2label):
            head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
            for weight in head.parameters():
                weight.data = weight.data.flip(0)
    else:
        made, where = policies.load_policy(policy, None, strings, seed)
        tokenizer, config = made.tokenizer, made.model.config
        config.update(names)
        model = AutoModelForSequenceClassification.from_config(config)
    if policy.get("template") and path is None:
        tokenizer.chat_template = TEMPLATES[policy["template"]]
    # A conversation that is too long keeps its end, the answer.
    tokenizer.truncation_side = choice.get("truncation_side") or ("left" if labels == 1 else "right")
    tokenizer.padding_side = "right"  # as in scoring: positions are counted from the left, padding included
    torch.manual_seed(seed)
    settle_padding(model, tokenizer, reads_eos=labels == 1)
    if labels == 1:
        model = with_head(model, choice.get("head", "linear"), choice.get("pooling", "last"))
    return model, tokenizer, where


def _reversed(classes: dict[int, str]) -> bool:
    """Return whether a head's classes are positive and negative, in this order, which is not that of LABELS."""
    first, second = (str(classes.get(number)).lower() for number in (0, 1))
    return len(classes) == 2 and first.startswith(("pos", "正", "积极")) and second.startswith(("neg", "负", "消极"))


def _encoder(tokenizer: Any, size: str, names: dict[str, Any]) -> Any:
    """Make a small ModernBERT (arXiv 2412.13663) with mean pooling, with which it learns faster from little data."""
    layers, width, heads = ENCODERS[size]
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
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
        **dict.fromkeys(("embedding_dropout", "mlp_dropout", "classifier_dropout"), 0.1),
        **ids,
        cls_token_id=None,
        sep_token_id=None,
        **names,
    )
    return ModernBertForSequenceClassification(config)
