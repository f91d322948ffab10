"""Prompts as token ids, and an update's seeds, which depend only on (seed, update), so a resumed run repeats them."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_pipeline.errors import UserError


class Prompts(NamedTuple):
    """Prompts as token ids without padding, and the other columns of their data set."""

    ids: list[list[int]]
    columns: dict[str, list[Any]]

    def pick(self, rows: Sequence[int]) -> "Prompts":
        """Return the prompts at the indices `rows`."""
        return Prompts([self.ids[i] for i in rows], {k: [v[i] for i in rows] for k, v in self.columns.items()})


def read_prompts(rows: Any, tokenizer: PreTrainedTokenizerBase, collator: Any = None) -> Prompts:
    """Read prompts from lists of token ids or from a data set with `input_ids`. Padding on either side is removed."""
    if not hasattr(rows, "column_names") and (not len(rows) or not isinstance(rows[0], Mapping)):
        return Prompts([list(row) for row in rows], {})
    rows = list(rows) if hasattr(rows, "column_names") else [rows[i] for i in range(len(rows))]
    names = dict.fromkeys(name for row in rows for name in row)
    if "input_ids" not in names:
        raise UserError(f"the prompts' data set has no column input_ids; it has {', '.join(names)}.")
    found = []
    for row in rows:
        if collator is not None:
            row = {name: values[0] for name, values in collator([row]).items()}
        found.append(_without_padding(row["input_ids"], row.get("attention_mask"), tokenizer))
    others = [name for name in names if name not in ("input_ids", "attention_mask")]
    return Prompts(found, {name: [row.get(name) for row in rows] for name in others})


def _without_padding(ids: Any, mask: Any, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Remove padding, found by `mask`; without one, by the pad token, unless that is the EOS."""
    row, pad = [int(i) for i in ids], tokenizer.pad_token_id
    if mask is not None:
        return [token for token, kept in zip(row, mask, strict=True) if kept]
    if pad is None or pad == tokenizer.eos_token_id:
        return row
    kept_at = [place for place, token in enumerate(row) if token != pad]
    return row[kept_at[0] : kept_at[-1] + 1] if kept_at else []


def derive_seed(seed: int, use: str, update: int) -> int:
    """Return a different seed for each use and update."""
    return random.Random(f"{seed} {use} {update}").getrandbits(63)


def prompts_of_update(count: int, rows: int, update: int, seed: int) -> list[int]:
    """Return which of `count` prompts an update uses. Each pass over all prompts has a new random order."""
    chosen: list[int] = []
    while len(chosen) < rows:
        turn, offset = divmod(update * rows + len(chosen), count)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(derive_seed(seed, "prompts", turn)))
        chosen += order[offset : offset + rows - len(chosen)].tolist()
    return chosen
