"""The registry of rewards: text in, floats out. The same object serves PPO and evaluation."""

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf_pipeline.errors import NotFinishedError, UserError
from rlhf_pipeline.hub import explained, open_pretrained
from rlhf_pipeline.registry import Registry, suggest

if TYPE_CHECKING:
    from torch import Tensor

Function = Callable[[Sequence[str], Sequence[str]], Sequence[float]]


@dataclass(frozen=True)
class Reward:
    """What a person would say of responses, as numbers: more is better, `neutral` is neither good nor bad."""

    function: Function
    name: str
    neutral: float = 0.0

    def __call__(self, prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
        """One finite number a completion; anything else is a `UserError` that names the reward."""
        try:
            scores = [float(score) for score in self.function(prompts, completions)]
        except TypeError as error:
            raise UserError(f"reward={self.name} must give a list of numbers: {error}.") from error
        if len(scores) != len(completions):
            raise UserError(f"reward={self.name} gave {len(scores)} numbers for {len(completions)} completions.")
        for prompt, completion, score in zip(prompts, completions, scores, strict=True):
            if not math.isfinite(score):
                raise UserError(f"reward={self.name} gave {score} for {prompt + completion!r:.200}; it must be finite.")
        return scores


registry: Registry[Reward] = Registry("reward")

# What stage=reward can train.
TRAINABLE = ("classifier", "preference_model", "imdb_sentiment", "dianping_sentiment")

Scale = Literal["logit", "probability", "log_odds"]
Seen = Literal["response", "prompt_response"]


@registry.register
def classifier(
    where: str | None,
    *,
    path: str | None = None,
    label: str = "positive",
    scale: Scale = "logit",
    text: Seen = "prompt_response",
    batch_size: int = 64,
    max_length: int = 512,
    base: Literal["policy", "encoder"] = "policy",
    size: Literal["tiny", "mini", "small"] = "tiny",
) -> Reward:
    """A text classifier's score of the class that is *named* `label`, whatever its index or case.

    `base` and `size` say what stage=reward trains where no `path` is given: the language model of this run
    with a head (GPT-1's way), or an encoder from scratch, of that size.
    """
    where = path or where
    if where is None:
        raise NotFinishedError("reward=classifier has no model yet; run stage=reward first, or give reward.path=.")
    return _classifier_reward(where, label, scale, text, batch_size, max_length)


@registry.register
def imdb_sentiment(
    where: str | None,
    *,
    path: str | None = None,
    label: str = "positive",
    scale: Scale = "logit",
    text: Seen = "prompt_response",
    batch_size: int = 64,
    max_length: int = 512,
) -> Reward:
    """The DistilBERT of TRL's classic demo: the raw logit of POSITIVE for query and response."""
    return _classifier_reward(path or where or "lvwerra/distilbert-imdb", label, scale, text, batch_size, max_length)


@registry.register
def dianping_sentiment(
    where: str | None,
    *,
    path: str | None = None,
    label: str = "positive",
    scale: Scale = "logit",
    text: Seen = "response",
    batch_size: int = 64,
    max_length: int = 512,
) -> Reward:
    """A Chinese RoBERTa trained on Dianping reviews, of the response alone."""
    return _classifier_reward(
        path or where or "liam168/c2-roberta-base-finetuned-dianping-chinese",
        label,
        scale,
        text,
        batch_size,
        max_length,
    )


@registry.register
def preference_model(
    where: str | None, *, path: str | None = None, batch_size: int = 64, max_length: int = 512
) -> Reward:
    """A reward model trained on preferences by stage=reward: the scalar of its head."""
    where = path or where
    if where is None:
        raise NotFinishedError(
            "reward=preference_model has no model yet; run stage=reward first, or give reward.path=."
        )
    scorer = Scorer.open(where, batch_size, max_length, append_eos=True)
    if scorer.labels != 1:
        raise UserError(f"{where} is a classifier of {scorer.labels} classes; a preference model has one score.")
    return Reward(lambda prompts, answers: scorer.pairs(prompts, answers)[:, 0].tolist(), scorer.where)


@registry.register
def toy_sentiment(where: str | None) -> Reward:
    """The sentiment of a toy review by the rules of its grammar: the truth that a trained reward only estimates."""
    from rlhf_pipeline.toy_reviews import true_sentiment

    return Reward(lambda prompts, answers: [true_sentiment(p + a) for p, a in zip(prompts, answers, strict=True)],
                  "toy_sentiment", 0.5)  # fmt: skip


@registry.register
def python(where: str | None, *, path: str) -> Reward:
    """A function of your own: `my_rewards.py:politeness`, called as `f(prompts, completions) -> list[float]`."""
    file, _, function = path.rpartition(":")
    source = Path(file).expanduser()
    if not source.is_file():
        raise UserError(f"reward.path={path}: there is no file {file!r}; write it as my_rewards.py:politeness.")
    spec = importlib.util.spec_from_file_location(source.stem, source)
    if spec is None or spec.loader is None:
        raise UserError(f"reward.path={path}: {file} is no Python file; write it as my_rewards.py:politeness.")
    module = importlib.util.module_from_spec(spec)
    sys.modules[source.stem] = module  # as an import would: dataclasses in it look there
    spec.loader.exec_module(module)
    if not callable(getattr(module, function, None)):
        known = [name for name, value in vars(module).items() if callable(value) and name[0] != "_"]
        raise UserError(f"{file} has no function '{function}'. {suggest(function, known)}It has: {', '.join(known)}.")
    return Reward(getattr(module, function), f"python:{function}")


@registry.register
def length(where: str | None, *, target: int = 20) -> Reward:
    """Closeness of a response's length to `target` words: 0 at the target, -1 where it is missed by all of it."""
    return Reward(lambda _, answers: [-abs(len(a.split()) - target) / target for a in answers], "length", -0.5)


@registry.register
def keywords(where: str | None, *, words: list[str]) -> Reward:
    """How many of `words` a response holds, case ignored."""
    pattern = re.compile("|".join(re.escape(word) for word in words), re.IGNORECASE)
    return Reward(lambda _, answers: [float(len({m.lower() for m in pattern.findall(a)})) for a in answers],
                  "keywords", 0.5)  # fmt: skip


@registry.register
def repetition(where: str | None, *, n: int = 3) -> Reward:
    """Minus the share of a response's word n-grams that it has said before."""

    def repeated(answer: str) -> float:
        said = answer.split()
        grams = [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]
        return len(set(grams)) / len(grams) - 1 if grams else 0.0

    return Reward(lambda _, answers: [repeated(a) for a in answers], "repetition", -0.5)


def load_reward(choice: dict[str, Any], upstream: Path | None) -> tuple[Reward, str]:
    """The reward chosen by hand, else the one stage=reward made, else the entry's own; and where it came from."""
    reward = registry.build(choice, str(upstream) if upstream else None)
    return reward, reward.name


class Scorer:
    """A sequence classifier of any family, with its own tokenizer: texts in, logits out."""

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, max_length: int, append_eos: bool = False) -> None:
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        positions = getattr(model.config, "max_position_embeddings", max_length)
        self.model, self.tokenizer, self.batch_size = model.eval(), tokenizer, batch_size
        # TRL's RewardTrainer ends every text with EOS, and the head learns to read it there.
        self.ending = [tokenizer.eos_token_id] if append_eos else []
        self.where = str(model.name_or_path)
        self.max_length, self.labels = min(max_length, positions), int(model.config.num_labels)

    @classmethod
    def open(cls, path: str, batch_size: int, max_length: int, append_eos: bool = False) -> "Scorer":
        """Open a classifier from a folder or the hub, on the GPU where there is one."""
        import torch
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        from rlhf_pipeline.rundir import model_folder

        where = model_folder(path)
        with explained(where, "reward.path"):
            tokenizer = AutoTokenizer.from_pretrained(where)
        model = open_pretrained(AutoModelForSequenceClassification, where, "reward.path")
        return cls(
            model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, batch_size, max_length, append_eos
        )

    def logits(self, texts: Sequence[str]) -> "Tensor":
        """(len(texts), classes). Sorted by length inside, so that little is padded; the end of a long text is cut."""
        import torch

        room = self.max_length - len(self.ending)
        ids = self.tokenizer(list(texts), truncation=True, max_length=room)["input_ids"] if texts else []
        # A text of no tokens still gets a score: that of the token that ends one.
        empty = [
            self.tokenizer.eos_token_id if self.tokenizer.eos_token_id is not None else self.tokenizer.sep_token_id
        ]
        ids = [row + self.ending or empty for row in ids]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        found = torch.zeros(len(ids), self.labels)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            batch = self.tokenizer.pad({"input_ids": [ids[i] for i in part]}, padding_side="right", return_tensors="pt")
            with torch.no_grad():
                out = self.model(
                    **{k: v.to(self.model.device) for k, v in batch.items() if k in ("input_ids", "attention_mask")}
                )
            found[part] = out.logits.float().cpu()
        return found

    def pairs(self, prompts: Sequence[str], answers: Sequence[str]) -> "Tensor":
        """Logits of each prompt with its answer."""
        return self.logits([prompt + answer for prompt, answer in zip(prompts, answers, strict=True)])


def class_named(labels: dict[int, str], wanted: str, where: str) -> int:
    """The index of the class with a name, case ignored; the usual short forms count."""
    short = {"pos": "positive", "neg": "negative"}
    names = {index: short.get(str(name).lower(), str(name).lower()) for index, name in labels.items()}
    found = [index for index, name in names.items() if name == short.get(wanted.lower(), wanted.lower())]
    if len(found) != 1:
        raise UserError(
            f"{where} has no class named '{wanted}'; reward.label= takes one of: {', '.join(labels.values())}."
        )
    return int(found[0])


def _classifier_reward(where: str, label: str, scale: Scale, seen: Seen, batch_size: int, max_length: int) -> Reward:
    scorer = Scorer.open(where, batch_size, max_length)
    index = class_named(scorer.model.config.id2label, label, scorer.where)

    def score(prompts: Sequence[str], answers: Sequence[str]) -> list[float]:
        logits = scorer.logits(list(answers)) if seen == "response" else scorer.pairs(prompts, answers)
        if scale == "logit":
            chosen = logits[:, index]
        elif scale == "probability":
            chosen = logits.softmax(-1)[:, index]
        else:
            log_p = logits.log_softmax(-1)
            others = [i for i in range(logits.shape[1]) if i != index]
            chosen = log_p[:, index] - log_p[:, others].logsumexp(-1)
        values: list[float] = chosen.tolist()
        return values

    return Reward(score, scorer.where, 0.5 if scale == "probability" else 0.0)
