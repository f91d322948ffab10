"""Data sets: the registry, the typed rows, the readers of files, and tokenization."""

from rlhf_pipeline.data.sets import Splits, begun_by, check_kind, fingerprint, kind, load_data, registry, texts

__all__ = ["Splits", "begun_by", "check_kind", "fingerprint", "kind", "load_data", "registry", "texts"]
