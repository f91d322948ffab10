"""Opening what lies in a folder or on the Hugging Face hub, with failures that say what to do."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rlhf_pipeline.errors import UserError


@contextmanager
def explained(what: str, setting: str) -> Iterator[None]:
    """Turn the dozen ways in which a hub or a folder fails into one line."""
    try:
        yield
    except (OSError, ValueError, RuntimeError) as error:
        reason = (str(error) or type(error).__name__).strip().split("\n")[0][:200]
        raise UserError(
            f"{setting}={what} could not be opened ({reason}). Give a local path or a hub id; behind a firewall set "
            "HF_ENDPOINT to a mirror; with no network run the offline demo: make demo."
        ) from error


def open_pretrained(kind: Any, where: str, setting: str, **options: Any) -> Any:
    """A model by `kind.from_pretrained`, in fp32, from safetensors.

    A checkpoint that only has pickled weights is refused, unless RLHF_ALLOW_PICKLE=1: unpickling can run code.
    """
    pickle_allowed = os.environ.get("RLHF_ALLOW_PICKLE") == "1"
    with explained(where, setting):
        try:
            use = None if pickle_allowed else True
            return kind.from_pretrained(where, dtype="float32", use_safetensors=use, **options)
        except OSError as error:
            if "safetensors" in str(error) and not pickle_allowed:
                raise UserError(
                    f"{setting}={where} has no safetensors weights; if you trust it, set RLHF_ALLOW_PICKLE=1."
                ) from error
            raise
