"""Batches of rows of similar length, to need little padding, in an order that a resumed run repeats."""

import functools
import random
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

import pyarrow.compute as pc
import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, Sampler
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from rlhf_pipeline.models.likelihood import Losses, next_token_losses
from rlhf_pipeline.models.networks import language_model, trunk
from rlhf_pipeline.processes import sharding

# Rows are drawn into random pools and then sorted within each pool, so that each epoch has other batches.
# A pool has 50 batches. It has fewer if there would be fewer than 4 pools, but at least 8.
_POOL, _POOLS, _SMALLEST = 50, 4, 8


class EpochSampler(Sampler[int]):
    """Yields every row once. Each `batch` has rows of similar length. The order depends on `seed` and `epoch` alone.

    With equal lengths the order is a plain shuffle. transformers' own sampler draws from the global generator, whose
    state is different when a run resumes in a later epoch.
    """

    def __init__(self, lengths: Sequence[int], batch: int, seed: int, epoch: Callable[[], int]) -> None:
        self.lengths, self.batch, self.seed, self.epoch = lengths, batch, seed, epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"batches {self.seed} {self.epoch()}")
        order = list(range(len(self)))
        draw.shuffle(order)
        count = len(self) // self.batch  # of whole batches; the other rows come last, as the loader's smaller batch
        pool = min(_POOL, max(_SMALLEST, count // _POOLS)) * self.batch
        pools = [order[i : min(i + pool, count * self.batch)] for i in range(0, count * self.batch, pool)]
        alike = [row for rows in pools for row in sorted(rows, key=self.lengths.__getitem__)]
        batches = [alike[i : i + self.batch] for i in range(0, len(alike), self.batch)]
        draw.shuffle(batches)
        return iter([row for rows in batches for row in rows] + order[len(alike) :])


class RankBatchSampler(BatchSampler):
    """One process's rows of each batch of all processes. Every row goes to exactly one process.

    The last batch may be smaller, so a process may get no rows of it.
    """

    def __init__(self, rows: Sampler[int], batch: int, drop_last: bool, rank: int, processes: int) -> None:
        super().__init__(rows, batch, drop_last)
        self.rank, self.processes = rank, processes

    def __iter__(self) -> Iterator[list[int]]:
        for batch in super().__iter__():
            yield batch[self.rank :: self.processes]


def row_lengths(rows: Dataset) -> list[int]:
    """Return the tokens of each row, for a pair of its longer side; from the column `length` if there is one."""
    if "length" in rows.column_names:
        return list(rows["length"])
    columns = [name for name in ("input_ids", "chosen_ids", "rejected_ids") if name in rows.column_names]
    found: list[int] = []
    for part in rows.with_format("arrow").iter(10_000):
        found += map(max, zip(*(pc.list_value_length(part[name]).to_pylist() for name in columns), strict=True))
    return found


class ResumableTrainer(Trainer):
    """A trainer that after a resume, in any epoch, continues as if it had not stopped.

    A step's loss is the mean over all rows or all tokens of the step. The held-out loss is the mean over all held-out
    rows or tokens. Neither depends on the number of micro-batches or processes.
    """

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler[int] | None:
        rows = self.train_dataset if train_dataset is None else train_dataset
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "group_by_length"):
            return super()._get_train_sampler(rows)
        lengths = row_lengths(rows) if strategy == "group_by_length" else [0] * len(rows)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # The trainer's own epoch, because accelerate does not pass on `set_epoch` when several processes resume.
        epoch = lambda: int(self.state.epoch or 0)  # noqa: E731
        step = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return EpochSampler(lengths, step, seed, epoch)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler[int] | None:
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_eval_sampler(eval_dataset)
        return EpochSampler(row_lengths(eval_dataset), self.args.eval_batch_size * self.args.world_size, 0, lambda: 0)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return Trainer's loader; with several processes, each gets its own rows."""
        args = self.args
        if args.world_size == 1 or args.train_sampling_strategy == "batch_rebalance":
            return super().get_train_dataloader()
        order = self._get_train_sampler()
        return self._shared(self.train_dataset, order, args.train_batch_size, args.dataloader_drop_last)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Return Trainer's loader; with several processes, each gets its own rows."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        if self.args.world_size == 1 or not isinstance(rows, Dataset):
            return super().get_eval_dataloader(eval_dataset)
        return self._shared(rows, self._get_eval_sampler(rows) or range(len(rows)), self.args.eval_batch_size, False)

    def _shared(self, rows: Dataset, order: Any, size: int, drop_last: bool) -> DataLoader[Any]:
        """Return a loader without accelerate, which would fill the last batch up with repeated rows."""
        args, world = self.args, self.args.world_size

        def collate(own: list[dict[str, Any]]) -> dict[str, Any]:
            return self.data_collator(own) if own else self._uncounted(self.data_collator([rows[0]]))

        return DataLoader(
            rows,
            batch_sampler=RankBatchSampler(order, size * world, drop_last, args.process_index, world),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )

    def _uncounted(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Return a batch that adds nothing to the loss: a process without rows must still take part in the step."""
        for name in ("labels", "shift_labels"):
            if name in batch:
                batch[name] = torch.full_like(batch[name], -100)
        return batch

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train as Trainer does, with different dropout on each process."""
        if self.args.world_size > 1:
            set_seed(self.args.seed, device_specific=True)
        return super().train(*args, **kwargs)

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate, and restore the random state: a run that resumes after an evaluation does not repeat it."""
        device = self.args.device
        with torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type):
            return super().evaluate(*args, **kwargs)

    def prediction_step(self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None) -> Any:
        """Return the loss of a batch of all processes, and record it with its number of rows or tokens."""
        inputs = self._prepare_inputs(inputs)
        count = self._get_num_items_in_batch([inputs], self.args.device)
        if count is None:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, inputs, num_items_in_batch=count)
        loss = self.accelerator.reduce(loss.detach(), "mean")
        self.measured.append((float(loss), float(count.flatten()[0])))
        return loss, None, None

    def evaluation_loop(self, *args: Any, metric_key_prefix: str = "eval", **kwargs: Any) -> Any:
        """Weigh each batch's loss by its rows or tokens; transformers takes the mean of the batches' means."""
        self.measured: list[tuple[float, float]] = []
        found = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if total := sum(count for _, count in self.measured):
            found.metrics[f"{metric_key_prefix}_loss"] = sum(loss * count for loss, count in self.measured) / total
        return found

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        super()._save_checkpoint(*args, **kwargs)
        self.accelerator.wait_for_everyone()  # each process adds its random state; only then is the folder complete


class SumLossTrainer(ResumableTrainer):
    """A trainer whose loss is a sum over rows, divided by all rows of the step. Its metrics are computed likewise."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.loss_is_scaled_for_ga = True
        self.noted: dict[str, list[Tensor]] = defaultdict(list)  # by metric, each batch's sum and count

    def _counts(self, batch: dict[str, Any]) -> Tensor:
        """Return the divisors of the sums over a batch, the number of rows first: (sums,)."""
        raise NotImplementedError

    def _get_num_items_in_batch(self, batch_samples: Sequence[dict[str, Any]], device: torch.device) -> Tensor:
        """Return the counts, summed over all micro-batches of a step and all processes."""
        counts = torch.stack([self._counts(batch) for batch in batch_samples]).sum(0).to(device)
        return self.accelerator.reduce(counts, "sum")

    def _counts_of(self, inputs: dict[str, Any], step: Tensor | None) -> Tensor:
        """Return the counts of a batch's step, divided by the processes, because their gradients are averaged."""
        return (self._counts(inputs) if step is None else step) / self.accelerator.num_processes

    @property
    def mode(self) -> str:
        """The prefix of the metrics' names: `eval_` during evaluation."""
        return "" if self.model.training else "eval_"

    def note(self, figures: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Keep a batch's metrics for the next log, each as a sum and its divisor."""
        for name, (total, count) in figures.items():
            self.noted[self.mode + name].append(torch.stack([total.detach().float(), count.float()]))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the metrics, averaged over the batches of all processes since the last log."""
        for name in [name for name in self.noted if name.startswith("eval_") == bool(self.mode)]:
            total, count = self.accelerator.reduce(torch.stack(self.noted.pop(name)).sum(0), "sum").tolist()
            logs[name] = total / max(count, 1)
        super().log(logs, start_time)


class OrderedSFTTrainer(ResumableTrainer, SFTTrainer):
    """TRL's SFTTrainer in this order. Its loss is the mean over the predicted tokens.

    The head is applied to these tokens alone, and their logits are not kept. TRL 1.16 does this on a GPU only.
    """

    def __init__(self, model: Any, args: SFTConfig, **options: Any) -> None:
        if args.label_smoothing_factor and args.loss_type == "chunked_nll":
            args.loss_type = "nll"  # TRL 1.12's default loss, chunked_nll, does not support smoothing
        super().__init__(model, args, **options)
        # A row's first token is not predicted. transformers looks for "ForCausalLM" in the class's name to know this,
        # and "GPT2LMHeadModel" does not contain it.
        self._loss_shifts_labels = True
        # Sharded weights are complete only inside the model's own forward pass, which TRL's loss uses.
        other = args.loss_type == "dft" or args.use_liger_kernel or self.label_smoother or self.compute_loss_func
        self.fused = not (other or self.aux_loss_enabled) and sharding() not in ("zero3", "fsdp")
        if self.fused:
            add_losses(language_model(self.model))

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:  # fmt: skip
        """Return the mean -log p over the tokens of the step."""
        if not self.fused or return_outputs or "labels" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        sums: Losses = model(**inputs, losses=True)
        entropy, right, count = self.accelerator.reduce(torch.stack([x.float() for x in sums[1:]]), "sum").tolist()
        kept = self._metrics["train" if self.model.training else "eval"]
        kept["entropy"].append(entropy / max(count, 1))
        kept["mean_token_accuracy"].append(right / max(count, 1))
        if num_items_in_batch is None:
            return sums.loss / sums.tokens.clamp(min=1)
        return sums.loss / num_items_in_batch * self.accelerator.num_processes  # gradients are averaged


def add_losses(model: Any) -> None:
    """Make `model(..., labels=labels, losses=True)` return `Losses`. Labels (batch, time) are -100 at ignored tokens.

    The losses are computed inside the model's forward pass, so that DDP and an adapter around it take part.
    """
    own = model.forward

    @functools.wraps(type(model).forward)
    def forward(self: Any, *given: Any, losses: bool = False, **inputs: Any) -> Any:
        if not losses:
            return own(*given, **inputs)
        targets = inputs.pop("labels")[:, 1:]
        states = trunk(self)(*given, **inputs, use_cache=False).last_hidden_state[:, :-1]
        counted = targets != -100
        return next_token_losses(self, states[counted], targets[counted])

    model.forward = MethodType(forward, model)
