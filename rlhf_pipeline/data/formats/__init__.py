"""Files <-> rows: every file format is parsed here, once, and every fault names the file and the line."""

from rlhf_pipeline.data.formats.acl_imdb import read_acl_imdb
from rlhf_pipeline.data.formats.files import read_rows
from rlhf_pipeline.data.formats.judgements import Judged, read_judgements
from rlhf_pipeline.data.formats.typed import read_demonstrations, read_dialogues, read_labelled, read_texts

__all__ = [
    "Judged",
    "read_acl_imdb",
    "read_demonstrations",
    "read_dialogues",
    "read_judgements",
    "read_labelled",
    "read_rows",
    "read_texts",
]
