"""Which prompts an update uses, and the seeds of its draws: functions of (seed, update), so resuming repeats them."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.errors import UserError


class Prompts(NamedTuple):
    """Prompts as token ids without padding, and whatever else their data set says of each."""

    ids: list[list[int]]
    columns: dict[str, list[Any]]

    def pick(self, rows: Sequence[int]) -> "Prompts":
        """Some of them."""
        return Prompts([self.ids[i] for i in rows], {k: [v[i] for i in rows] for k, v in self.columns.items()})


def read_prompts(rows: Any, tokenizer: PreTrainedTokenizerBase, collator: Any = None) -> Prompts:
    """Prompts from lists of token ids, or from a data set with `input_ids`; padding is taken off either side.

    What is padding is told by `attention_mask` where there is one, else by a pad token that is not the EOS.
    """
    if not hasattr(rows, "column_names"):
        if len(rows) and isinstance(rows[0], Mapping):
            rows = Dataset.from_list([dict(rows[i]) for i in range(len(rows))])
        else:
            return Prompts([list(row) for row in rows], {})
    if "input_ids" not in rows.column_names:
        raise UserError(f"the prompts' data set has no column input_ids, only {', '.join(rows.column_names)}.")
    if collator is not None:
        found: list[list[int]] = []
        for start in range(0, len(rows), 512):
            batch = collator([rows[i] for i in range(start, min(start + 512, len(rows)))])
            masks = batch.get("attention_mask")
            for index, ids in enumerate(batch["input_ids"]):
                found.append(_stripped(ids, None if masks is None else masks[index], tokenizer))
    else:
        masks = rows["attention_mask"] if "attention_mask" in rows.column_names else [None] * len(rows)
        found = [_stripped(ids, mask, tokenizer) for ids, mask in zip(rows["input_ids"], masks, strict=True)]
    others = [name for name in rows.column_names if name not in ("input_ids", "attention_mask")]
    return Prompts(found, {name: list(rows[name]) for name in others})


def _stripped(ids: Any, mask: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    row = [int(i) for i in ids]
    if mask is not None:
        return [token for token, kept in zip(row, mask, strict=True) if kept]
    pad = tokenizer.pad_token_id
    if pad is None or pad == tokenizer.eos_token_id:
        return row
    kept_at = [place for place, token in enumerate(row) if token != pad]
    return row[kept_at[0] : kept_at[-1] + 1] if kept_at else []


def derive_seed(seed: int, what: str, update: int) -> int:
    """A seed of its own for each use and update."""
    return random.Random(f"{seed} {what} {update}").getrandbits(63)


def seed_everything(seed: int) -> None:
    """For code that draws from the global generators, such as a reward of the user's."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def prompts_of_update(count: int, rows: int, update: int, seed: int) -> list[int]:
    """Which prompts an update uses: pass after pass over all of them, each in an order of its own."""
    chosen: list[int] = []
    position = update * rows
    while len(chosen) < rows:
        turn, offset = divmod(position + len(chosen), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "prompts", turn)))
        chosen += order[offset : offset + rows - len(chosen)].tolist()
    return chosen
