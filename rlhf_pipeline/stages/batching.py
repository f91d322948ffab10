"""Batches of rows of like length, so that little of a batch is padding, in an order that a resumed run meets again."""

import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from torch.utils.data import Sampler
from transformers import Trainer
from trl import RewardTrainer, SFTTrainer

# Rows are drawn into pools at random and only then sorted, so that an epoch's batches are not the last one's:
# pools of 50 batches, of fewer where that would make fewer than 4 pools, but of at least 8.
_POOL, _POOLS, _SMALLEST = 50, 4, 8


class EpochSampler(Sampler[int]):
    """Every row once, in an order that depends on `seed` and `epoch` alone, each `batch` of rows of like length.

    With equal lengths the order is a plain shuffle. transformers' own sampler draws from the global generator, which
    is not where it was when a run goes on in a later epoch.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"batches {self.seed} {self.epoch()}")
        order = list(range(len(self)))
        draw.shuffle(order)
        count = len(self) // self.batch  # of whole batches; the rows left over come last, as the loader cuts them off
        pool = min(_POOL, max(_SMALLEST, count // _POOLS)) * self.batch
        pools = [order[i : min(i + pool, count * self.batch)] for i in range(0, count * self.batch, pool)]
        alike = [row for rows in pools for row in sorted(rows, key=self.lengths.__getitem__)]
        batches = [alike[i : i + self.batch] for i in range(0, len(alike), self.batch)]
        draw.shuffle(batches)
        return iter([row for rows in batches for row in rows] + order[len(alike) :])


def row_lengths(rows: Dataset) -> list[int]:
    """Tokens of each row, of a pair's longer side; the column `length` where there is one."""
    if "length" in rows.column_names:
        return list(rows["length"])
    columns = [name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in rows.column_names]
    found: list[int] = []
    for part in rows.with_format("arrow").iter(10_000):
        found += map(max, zip(*(pc.list_value_length(part[name]).to_pylist() for name in columns), strict=True))
    return found


class _Ordered:
    """A trainer that after a resume, in whatever epoch, goes on as if it had never been cut off."""

    args: Any
    state: Any
    train_dataset: Any

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(rows)  # type: ignore[misc]
        lengths = row_lengths(rows) if strategy == "group_by_length" else [0] * len(rows)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # The trainer's own count, not `set_epoch`: accelerate does not hand that down on resuming on several processes.
        epoch = lambda: int(self.state.epoch or 0)  # noqa: E731
        return EpochSampler(lengths, self.args.train_batch_size * self.args.world_size, seed, epoch)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)  # type: ignore[misc]
        return EpochSampler(row_lengths(eval_dataset), self.args.eval_batch_size * self.args.world_size, 0, lambda: 0)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Measure, and leave the generators as they were: a run resumed after an evaluation does not repeat it."""
        with torch.random.fork_rng([self.args.device] if self.args.device.type == "cuda" else []):
            return super().evaluate(*args, **kwargs)  # type: ignore[misc]


class OrderedTrainer(_Ordered, Trainer):
    """transformers' Trainer in such an order, for classifiers.

    Their loss is a batch's mean. transformers takes a model that accepts any keyword for one whose loss is divided by
    the rows of all accumulated batches, and would add up their means.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.model_accepts_loss_kwargs = False


class OrderedSFTTrainer(_Ordered, SFTTrainer):
    """TRL's SFTTrainer in such an order."""


class OrderedRewardTrainer(_Ordered, RewardTrainer):
    """TRL's RewardTrainer in such an order; a pair is as long as its longer side."""
