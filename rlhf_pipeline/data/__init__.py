"""Data: the sets that settings choose from, the records they hold, the files they are read from, and their tokens."""

from rlhf_pipeline.data.sets import Splits, begun_by, check_kind, fingerprint, kind, load_data, registry, texts

__all__ = ["Splits", "begun_by", "check_kind", "fingerprint", "kind", "load_data", "registry", "texts"]
