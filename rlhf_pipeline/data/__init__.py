"""Data: the sets that settings choose from, the records they hold, the files they are read from, and their tokens."""

from rlhf_pipeline.data.sets import (
    TAKES,
    Splits,
    begun_by,
    check_kind,
    fingerprint,
    hub_set,
    joined,
    kind,
    load_data,
    registry,
    texts,
    whole,
)

__all__ = [
    "TAKES",
    "Splits",
    "begun_by",
    "check_kind",
    "fingerprint",
    "hub_set",
    "joined",
    "kind",
    "load_data",
    "registry",
    "texts",
    "whole",
]
