"""Step 2: the reward. From labelled texts a classifier, from preferences a scalar model; ends with its quality.

python -m rlhf_pipeline stage=reward
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    ModernBertConfig,
    ModernBertForSequenceClassification,
)
from trl import RewardConfig

from rlhf_pipeline.data import Splits, fingerprint, kind, load_data, texts
from rlhf_pipeline.data.agreement import Labels
from rlhf_pipeline.data.records import Labelled
from rlhf_pipeline.data.templates import TEMPLATES, visible
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.files import write_json, write_jsonl
from rlhf_pipeline.hub import explained, model_folder, open_pretrained
from rlhf_pipeline.models.classifiers import Scorer, settle_padding
from rlhf_pipeline.models.networks import text_config
from rlhf_pipeline.models.policies import load_policy, open_config
from rlhf_pipeline.models.precision import fuse_gelu
from rlhf_pipeline.models.reward_model import register, shift_scores, with_head
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.training.classifier import (
    ClassifierTrainer,
    LanguageClassifierTrainer,
    check_language_model,
    tokenized,
)
from rlhf_pipeline.training.preferences import Comparison, ComparisonTrainer, compare, preferences_of, shown, told_apart
from rlhf_pipeline.training.quality import (
    example_line,
    example_rows,
    labelled_quality,
    preference_quality,
    scores,
)
from rlhf_pipeline.training.setup import (
    building,
    fit_length,
    say_taken,
    sharded_weights,
    take_data,
    trainer_args,
    watch,
)

# layers, width, heads of an encoder from scratch
ENCODERS = {"tiny": (2, 128, 4), "mini": (4, 256, 4), "small": (6, 512, 8)}
LABELS = {0: "negative", 1: "positive"}
_DEMONSTRATIONS = 1000  # enough for a mean


def run(settings: Settings, out: RunDir) -> None:
    """Train on what the data holds, then measure on the held-out split."""
    args, choice = trainer_args(RewardConfig, settings, out), settings.reward
    source = preferences_of(out, settings.data) if choice["name"] == "preference_model" else settings.data
    labelled = kind(source["name"]) is Labelled
    _check(choice, source["name"], labelled)
    rows = take_data(source, settings.seed)
    compared = None if labelled else _compared(rows, choice.get("margin", 0.0))
    model, tokenizer, where = _start(settings, out, texts(rows.train), 2 if labelled else 1)
    if choice.get("lm_coef"):
        check_language_model(model)
    say_taken("start", where)
    paths = source["path"] if isinstance(source.get("path"), list) else []
    for path in paths:
        say_taken("labels", path)
    lineage = {f"labels[{number}]" if number else "labels": path for number, path in enumerate(reversed(paths))}
    longest = fit_length(args, model)
    model.config.trained_cut = {"max_length": longest, "truncation_side": choice.get("truncation_side")}
    known, shows, same = fingerprint(source, rows), Splits[Any]([], []), 0
    if compared:
        compared, same = _told_apart(compared, tokenizer, longest)
        shows = compared
        if chosen := choice.get("demonstrations"):
            shows = load_data(chosen, settings.seed, answers=True)
            known["demonstrations"] = fingerprint(chosen, shows)
            lineage |= {"demonstrations": chosen["path"]} if chosen.get("path") else {}
    demonstrations = _shown(shows.train, tokenizer, settings.seed)
    out.begin(settings, {"start": where, **lineage}, known)
    if rows.labels and out.leads:
        _say_labels(rows.labels, out)
    fuse_gelu(model)
    with building():
        trainer = _trainer(model, tokenizer, args, compared or rows, choice)
    trainer.train(resume_from_checkpoint=watch(trainer, out))
    weights = sharded_weights(trainer)
    if not out.leads:
        return
    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False)  # scored as others will: in fp32
    if weights:
        model.float().load_state_dict(weights, strict=False)
    scorer = Scorer(model, tokenizer, args.per_device_eval_batch_size, longest, tokenizer.truncation_side, not labelled)
    before = {} if labelled else {"demonstration_mean": _normalise(scorer, demonstrations), "same_once_cut": same}

    def save(folder: Path) -> None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    out.save_model(save)
    quality = preference_quality(compared.test, scorer) if compared else labelled_quality(rows.test, scorer)
    quality |= before
    quality["examples"] = example_rows(choice.get("examples") or [], scorer)
    write_json(out.path / "quality.json", quality)
    results = {key: value for key, value in quality.items() if not isinstance(value, list)}
    out.finish(results, objective=quality["accuracy"])
    print(", ".join(f"{k.replace('_', ' ')} {v:.4g}" for k, v in results.items() if v is not None))
    for row in quality["examples"]:
        print(example_line(row))


def _say_labels(labels: Labels, out: RunDir) -> None:
    """What was judged, how far people agree, and what was set aside: on the screen in a line, whole in two files."""
    write_json(out.path / "labels.json", labels.summary)
    write_jsonl(out.path / "rejected.jsonl", labels.rejected)
    figures = {key: value for key, value in labels.summary.items() if value or isinstance(value, float)}
    print("labels  " + ", ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items()))
    for row in labels.rejected[:3]:
        where = f"{row['file']}" + (f", line {row['line']}" if row["line"] else "")
        print(f"  set aside: {where}" + (f", task {row['task']}" if row["task"] else "") + f": {row['why']}")
    if len(labels.rejected) > 3:
        print(f"  set aside: {len(labels.rejected) - 3} more, see {out.path / 'rejected.jsonl'}", flush=True)


def _check(choice: dict[str, Any], data: str, labelled: bool) -> None:
    """Refuse what does not go together, before anything is loaded."""
    if labelled == (choice["name"] == "preference_model"):
        holds, fits = ("labelled texts", "classifier") if labelled else ("preferences", "preference_model")
        raise UserError(f"data={data} holds {holds}; reward={choice['name']} does not learn from them, {fits} does.")
    for key in ("lm_coef", "margin"):
        if choice.get(key, 0) < 0:
            raise UserError(f"reward.{key} is {choice[key]}; it takes a number from 0.")
    if choice.get("lm_coef") and choice.get("base") == "encoder":
        raise UserError(
            "reward.lm_coef weighs the loss of a language model, and an encoder is none; "
            "use reward.base=policy, or reward.lm_coef=0."
        )


def _compared(rows: Splits[Any], margin: float) -> Splits[Comparison]:
    """The answers to each prompt, and which is better than which."""
    found = Splits(compare(rows.train, margin), compare(rows.test, margin))
    if not found.train or not found.test:
        raise UserError("the data has no two different answers to a prompt on both sides of the split; it needs some.")
    return found


def _told_apart(rows: Splits[Comparison], tokenizer: Any, longest: int) -> tuple[Splits[Comparison], int]:
    """The rows without the pairs that are the same tokens once cut; and how many of those were held out."""
    kept: list[list[Comparison]] = []
    same = 0
    for split, what in ((rows.train, "to learn from"), (rows.test, "to hold out")):
        found, same = told_apart(split, tokenizer, longest)
        kept.append(found)
        count = sum(len(row.pairs) for row in split)
        cut = f"{same} of {count} pairs {what} are the same tokens once cut to {longest}"
        if not found:
            raise UserError(
                f"{cut}, so nothing is left; raise trainer.max_length (up to the model's positions), or cut the other "
                f"end: reward.truncation_side={'right' if tokenizer.truncation_side == 'left' else 'left'}."
            )
        if same:
            print(f"{cut} (trainer.max_length, reward.truncation_side); they are left out", flush=True)
    return Splits(kept[0], kept[1]), same


def _trainer(model: Any, tokenizer: Any, args: RewardConfig, rows: Splits[Any], choice: dict[str, Any]) -> Any:
    if choice["name"] == "preference_model":
        return ComparisonTrainer(model, args, tokenizer, rows.train, rows.test)
    train, test = (tokenized(split, tokenizer, args.max_length) for split in (rows.train, rows.test))
    given = (model, args, DataCollatorWithPadding(tokenizer, pad_to_multiple_of=args.pad_to_multiple_of), train, test)
    if not choice.get("lm_coef"):
        return ClassifierTrainer(*given, processing_class=tokenizer)
    return LanguageClassifierTrainer(*given, processing_class=tokenizer, lm_coef=choice["lm_coef"])


def _shown(rows: Sequence[Any], tokenizer: Any, seed: int) -> list[str]:
    """Some of the rows as texts that are to score 0 on average: demonstrations, or the best of compared answers."""
    found = random.Random(f"demonstrations {seed}").sample(rows, min(len(rows), _DEMONSTRATIONS))
    return [visible(tokenizer, r.prompt) + r.best if isinstance(r, Comparison) else shown(r, tokenizer) for r in found]


def _normalise(scorer: Scorer, demonstrations: Sequence[str]) -> float:
    """Shift all scores so that demonstrations score 0 on average (Ouyang et al. 2022, 3.5); gives what they scored."""
    mean = float(scores(demonstrations, scorer, "normalise").double().mean())
    shift_scores(scorer.model, -mean)
    return mean


def _start(settings: Settings, out: RunDir, strings: Sequence[str], labels: int) -> tuple[Any, Any, str]:
    """The model to begin with: `reward.path`, an encoder from scratch, or this run's language model with a new head."""
    names: dict[str, Any] = {"num_labels": labels}
    if labels == 2:
        names |= {"id2label": LABELS, "label2id": {name: index for index, name in LABELS.items()}}
    upstream = out.upstream("sft", "pretrain", policy=settings.policy)
    path = settings.reward.get("path")
    if path is None and settings.reward.get("base") == "encoder":
        tokenizer = load_policy(settings.policy, upstream, strings, settings.seed)[0].tokenizer
        size = settings.reward.get("size", "tiny")
        torch.manual_seed(settings.seed)  # for all of it
        return _encoder(tokenizer, size, names), tokenizer, f"an encoder from scratch ({size})"
    where = path or settings.policy.get("path") or upstream
    model, tokenizer, where = (
        _opened(str(where), settings.seed, names) if where else _from_policy(settings, strings, names)
    )
    if settings.policy.get("template") and path is None:
        tokenizer.chat_template = TEMPLATES[settings.policy["template"]]
    # Of a conversation that is too long its end, the answer, stays.
    tokenizer.truncation_side = settings.reward.get("truncation_side") or ("left" if labels == 1 else "right")
    tokenizer.padding_side = "right"  # positions are counted from the left, padding and all; so are they in scoring
    if labels == 1:
        torch.manual_seed(settings.seed)
        settle_padding(model, tokenizer)
        model = with_head(model, settings.reward.get("head", "linear"), settings.reward.get("pooling", "last"))
    return model, tokenizer, where


def _opened(path: str, seed: int, names: dict[str, Any]) -> tuple[Any, Any, str]:
    """A model that lies somewhere, with a new head where its own is of another kind."""
    where = model_folder(path)
    with explained(where, "reward.path"):
        tokenizer = AutoTokenizer.from_pretrained(where)
    register()
    classes = open_config(where, "reward.path").id2label
    torch.manual_seed(seed)  # for the head
    model = open_pretrained(
        AutoModelForSequenceClassification, where, "reward.path", ignore_mismatched_sizes=True, **names
    )
    if "id2label" in names and _turned(classes):
        head = [module for module in model.modules() if isinstance(module, torch.nn.Linear)][-1]
        for weight in head.parameters():
            weight.data = weight.data.flip(0)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    text_config(model).pad_token_id = tokenizer.pad_token_id
    return model, tokenizer, where


def _turned(classes: dict[int, str]) -> bool:
    """Whether the classes of a head are positive and negative, in this order: that of LABELS is the other one."""
    first, second = (str(classes.get(number)).lower() for number in (0, 1))
    return len(classes) == 2 and first.startswith(("pos", "正", "积极")) and second.startswith(("neg", "负", "消极"))


def _from_policy(settings: Settings, strings: Sequence[str], names: dict[str, Any]) -> tuple[Any, Any, str]:
    """The policy's own entry: a model of the hub, or one from scratch that nothing was taught."""
    policy, where = load_policy(settings.policy, None, strings, settings.seed)
    if not where.endswith("untrained"):
        return _opened(where, settings.seed, names)
    config = policy.model.config
    config.update(names)
    return AutoModelForSequenceClassification.from_config(config), policy.tokenizer, where


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
