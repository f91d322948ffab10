"""Data sets: the registry, the typed rows, the readers of files, and tokenization."""

from rlhf_pipeline.data.sets import (
    Splits,
    check_kind,
    count_known_prompts,
    fingerprint,
    load_data,
    registry,
    row_type,
    texts,
)

__all__ = ["Splits", "check_kind", "count_known_prompts", "fingerprint", "load_data", "registry", "row_type", "texts"]
