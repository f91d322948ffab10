"""Comparisons of answers, to train reward models. The compared answers to a prompt are one row."""

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from datasets import Dataset, concatenate_datasets
from torch import Tensor, nn
from trl import RewardConfig, RewardTrainer
from trl.trainer.utils import pad

from rlhf_pipeline.data import check_kind, row_type
from rlhf_pipeline.data.records import Demonstration, Dialogue, Preference, Prompt, Ranking, Row, answers, whole_text
from rlhf_pipeline.data.sets import group_by_shared_answers
from rlhf_pipeline.data.templates import visible_prompt
from rlhf_pipeline.errors import UserError
from rlhf_pipeline.progress import parts
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.training.batching import SumLossTrainer

_COLUMNS = ("texts", "better", "worse", "margin", "length")
_PART = 200  # rows tokenized at once
_MOST = 16  # answers in one example of pairs, at most
_PARTS = 4  # of similar length, in which the texts of a batch are scored


@dataclass(frozen=True, slots=True)
class Comparison:
    """One prompt, its different answers, and the preferences: (better, worse, margin), as indices of `answers`."""

    prompt: Prompt
    answers: tuple[str, ...]
    pairs: tuple[tuple[int, int, float], ...]

    @property
    def best(self) -> str:
        """The answer with the most preferences minus rejections."""
        worth = Counter(better for better, _, _ in self.pairs)
        worth.subtract(worse for _, worse, _ in self.pairs)
        return self.answers[max(range(len(self.answers)), key=lambda place: worth[place])]

    def texts(self, tokenizer: Any) -> list[str]:
        """The prompt as rewards see it, with each answer."""
        prompt = visible_prompt(tokenizer, self.prompt)
        return [prompt + answer for answer in self.answers]


def preferences_of(out: RunDir, choice: dict[str, Any]) -> dict[str, Any]:
    """Return the data to learn preferences from: the file in data.path, else the labels from stage=collect.

    In rounds of human feedback, these are the labels of all rounds so far.
    """
    if row_type(choice["name"]) == Preference | Ranking and choice.get("path"):
        return choice
    if paths := out.labels():
        said = choice if choice["name"] == "preferences" else {"name": "preferences"}
        return {**said, "path": [str(path) for path in paths]}
    check_kind(choice["name"], out.stage)
    return choice


def comparisons_of(rows: Sequence[Preference | Ranking], margin: float = 0.0) -> list[Comparison]:
    """Make one example of all C(K, 2) pairs of a ranking, and one of all pairs that share answers to a prompt.

    Ties make no pair. Pairs without shared answers become separate examples, even with the same prompt. So do pairs
    that share answers but have more than 16 answers in total: the batch would be too large, and each pair's weight too
    small. The margin is the pair's own, or else `margin` for every rank between the two.
    """
    heads = group_by_shared_answers([row.prompt for row in rows], rows)
    together: dict[tuple[str, int], list[tuple[str, str, float]]] = {}
    for number, row in enumerate(rows):
        if isinstance(row, Ranking):
            ranked = zip(row.ranks or range(len(row.responses)), row.responses, strict=True)
            every = itertools.combinations(ranked, 2)
            found = [(a, b, margin * (j - i)) for (i, a), (j, b) in every if a != b and i != j]
        else:
            own = margin if row.margin is None else row.margin
            found = [(row.chosen, row.rejected, own)] if row.chosen != row.rejected else []
        key = ("ranking", number) if isinstance(row, Ranking) else ("pairs", heads[number])
        together.setdefault(key, []).extend(found)
    examples: list[Comparison] = []
    for (form, number), found in together.items():
        one_group = form == "ranking" or len({answer for pair in found for answer in pair[:2]}) <= _MOST
        examples += [_comparison(rows[number].prompt, part) for part in ([found] if one_group else zip(found)) if part]
    return examples


def _comparison(prompt: Prompt, found: Sequence[tuple[str, str, float]]) -> Comparison:
    answers = tuple(dict.fromkeys(answer for better, worse, _ in found for answer in (better, worse)))
    place = {answer: number for number, answer in enumerate(answers)}
    return Comparison(prompt, answers, tuple((place[better], place[worse], by) for better, worse, by in found))


def as_demonstration(row: Row | Comparison, tokenizer: Any) -> str:
    """Return a row as a demonstration: its prompt and its best answer, or its plain text."""
    match row:
        case Comparison():
            return visible_prompt(tokenizer, row.prompt) + row.best
        case Preference() | Ranking() | Demonstration():
            return visible_prompt(tokenizer, row.prompt) + answers(row)[0]
        case Dialogue(turns=turns):
            return visible_prompt(tokenizer, turns[:-1]) + turns[-1].text
    return whole_text(row)


def encode_with_eos(texts: Sequence[str], tokenizer: Any, longest: int) -> list[list[int]]:
    """Return the token ids of each text and EOS, at most `longest`, cut on the tokenizer's `truncation_side`.

    The stage sets it to left by default: a long prompt loses its beginning, and the answer stays. A tokenizer without
    an EOS ends texts in its own way.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    ids = tokenizer(list(texts), truncation=True, max_length=longest - len(end))["input_ids"]
    return [row + end for row in ids]


def tokenize_comparisons(
    rows: Sequence[Comparison], tokenizer: Any, longest: int, name: str = "train"
) -> tuple[Dataset, list[Comparison], int]:
    """Return rows for `Collator`, their comparisons, and the number of pairs that are left out.

    A row has a prompt's `texts`, its pairs as indices of them, and the length of the longest text. Pairs whose answers
    are the same tokens once cut to `longest` are left out. `name` is the split, train or eval.
    """
    kept, made, count = list[Comparison](), list[Dataset](), sum(len(row.pairs) for row in rows)
    for part in parts(rows, _PART, "tokenize", "prompt"):
        ids = iter(encode_with_eos([text for row in part for text in row.texts(tokenizer)], tokenizer, longest))
        values = []
        for row in part:
            of = dict(zip(row.answers, ids, strict=False))
            pairs = [(row.answers[better], row.answers[worse], by) for better, worse, by in row.pairs]
            if apart := [pair for pair in pairs if of[pair[0]] != of[pair[1]]]:
                kept.append(_comparison(row.prompt, apart))
                texts = [of[answer] for answer in kept[-1].answers]
                values.append((texts, *zip(*kept[-1].pairs, strict=True), max(map(len, texts))))
        if values:
            made.append(Dataset.from_list([dict(zip(_COLUMNS, row, strict=True)) for row in values]))
    same = count - sum(len(row.pairs) for row in kept)
    what = "training" if name == "train" else "held-out"
    cut = f"{same} of {count} {what} pairs have identical answers once cut to {longest} tokens"
    if not made:
        raise UserError(
            f"{cut}, so nothing is left; raise trainer.max_length (up to the model's positions), or cut the other "
            f"end: reward.truncation_side={'right' if tokenizer.truncation_side == 'left' else 'left'}."
        )
    if same:
        print(f"{cut} (trainer.max_length, reward.truncation_side); they are left out", flush=True)
    return concatenate_datasets(made), kept, same


@dataclass(frozen=True)
class Collator:
    """Turns rows into one batch: all texts, (texts, time), and the pairs as indices of them, (pairs,)."""

    padding: int
    multiple: int | None = None

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """`weight` is 1 / pairs of the row, so that all pairs of a row count as one example."""
        texts = [torch.tensor(ids) for row in rows for ids in row["texts"]]
        first = list(itertools.accumulate((len(row["texts"]) for row in rows), initial=0))
        places = {
            side: torch.tensor([start + i for start, row in zip(first, rows, strict=False) for i in row[side]])
            for side in ("better", "worse")
        }
        return {
            "input_ids": pad(texts, self.padding, "right", self.multiple),
            "attention_mask": pad([torch.ones_like(ids) for ids in texts], 0, "right", self.multiple),
            **places,
            "margin": torch.tensor([m for row in rows for m in row["margin"]], dtype=torch.float),
            "weight": torch.tensor([1 / len(row["margin"]) for row in rows for _ in row["margin"]]),
        }


class ComparisonTrainer(SumLossTrainer, RewardTrainer):
    """TRL's RewardTrainer for any number of answers per prompt (Ouyang et al. 2022, section 3.5).

    Each answer goes through the model once. All pairs of a row come from its scores, in one batch, as one example. As
    separate pairs, the model would train on each answer many times and overfit.
    """

    def __init__(
        self, model: Any, args: RewardConfig, tokenizer: Any, train: Sequence[Comparison], test: Sequence[Comparison]
    ) -> None:  # fmt: skip
        self.rows, self.left_out = {"train": train, "eval": test}, dict[str, int]()
        numbers = {name: Dataset.from_dict({"row": range(len(rows))}) for name, rows in self.rows.items()}
        super().__init__(
            model, args, train_dataset=numbers["train"], eval_dataset=numbers["eval"], processing_class=tokenizer
        )
        self.data_collator = Collator(tokenizer.pad_token_id, args.pad_to_multiple_of)

    def _prepare_dataset(self, dataset: Dataset, tokenizer: Any, args: RewardConfig, name: str) -> Dataset:
        """Tokenize the split `name`, after TRL has set up the tokenizer. TRL would drop rows that are too long."""
        found, self.rows[name], self.left_out[name] = tokenize_comparisons(
            self.rows[name], tokenizer, args.max_length, name
        )
        return found

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = list(_COLUMNS)

    def _counts(self, batch: dict[str, Tensor]) -> Tensor:
        return batch["weight"].sum().round()[None]

    def _uncounted(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {**batch, "weight": torch.zeros_like(batch["weight"])}

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:  # fmt: skip
        """Return the mean over rows of the mean over their pairs of -log sigmoid(r_better - r_worse - margin)."""
        scores = self.score_texts(model, inputs["input_ids"], inputs["attention_mask"])
        better, worse, weight = scores[inputs["better"]], scores[inputs["worse"]], inputs["weight"]
        loss = -(weight * nn.functional.logsigmoid(better - worse - inputs["margin"])).sum()
        if self.args.center_rewards_coefficient is not None:
            loss = loss + self.args.center_rewards_coefficient * (weight * (better + worse) ** 2).sum()
        with torch.no_grad():
            self._note(scores, inputs, better - worse)
        loss = loss / self._counts_of(inputs, num_items_in_batch)[0]
        return (loss, {"logits": scores[:, None]}) if return_outputs else loss

    def score_texts(self, model: nn.Module, ids: Tensor, mask: Tensor) -> Tensor:
        """Score all texts, (texts,), in parts of similar length, each cut to its longest text: padding takes time.

        Several processes score all texts at once, because DDP expects one forward pass per step.
        """
        whole = self.accelerator.num_processes > 1 or self.args.pad_to_multiple_of is not None
        lengths = mask.sum(1)
        order = lengths.argsort()
        found = []
        for part in order.chunk(1 if whole else _PARTS):
            width = ids.shape[1] if whole else int(lengths[part].max())
            rows = {"input_ids": ids[part, :width], "attention_mask": mask[part, :width]}
            found.append(model(**rows, use_cache=False).logits.squeeze(-1).float())
        return torch.cat(found)[order.argsort()]

    def _note(self, scores: Tensor, inputs: dict[str, Tensor], difference: Tensor) -> None:
        """Keep TRL's metrics for the next log. A process without rows takes part but adds nothing."""
        prompts = self._counts(inputs)[0]
        weighted = {"accuracy": difference > 0, "margin": difference}
        figures = {name: ((inputs["weight"] * value).sum(), prompts) for name, value in weighted.items()}
        counted = scores if prompts else scores[:0]
        self.note({**figures, "mean_reward": (counted.sum(), scores.new_tensor(len(counted)))})
        ends = torch.stack([scores.min(), scores.max()]) if prompts else scores.new_tensor([math.inf, -math.inf])
        every = self.accelerator.gather(ends[None])
        kept = self._metrics["train" if self.model.training else "eval"]
        kept["min_reward"].append(every[:, 0].min().item())
        kept["max_reward"].append(every[:, 1].max().item())
