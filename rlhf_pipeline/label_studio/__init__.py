"""Label Studio, where people compare the answers: its labelling config, its REST interface, a server of our own.

labeling_config  what the labelling page shows
push, pull       a run's tasks into a server that runs, and what is labelled out of it
serve            such a server in the foreground, on this machine alone
"""

from rlhf_pipeline.label_studio.client import LabelStudio
from rlhf_pipeline.label_studio.config import labeling_config
from rlhf_pipeline.label_studio.projects import pull, push, serve

__all__ = ["LabelStudio", "labeling_config", "pull", "push", "serve"]
