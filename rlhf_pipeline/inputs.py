"""Check that a stage's files and models exist, before torch is loaded, so that a wrong path fails at once."""

from pathlib import Path

from rlhf_pipeline.data.plain_rows import missing
from rlhf_pipeline.data.sets import hub_set
from rlhf_pipeline.models import rewards
from rlhf_pipeline.runs.directory import RunDir
from rlhf_pipeline.runs.models import locate_model
from rlhf_pipeline.settings import Settings
from rlhf_pipeline.stages import STAGES


def check_files(settings: Settings) -> None:
    """Refuse missing data files, except below `runs`, where an earlier stage may still write them."""
    runs = Path(settings.runs).resolve()
    for choice in (settings.data, settings.ptx):
        for key in ("path", "test_path"):
            named = choice.get(key) or []
            for path in [named] if isinstance(named, str) else named:
                file = Path(path).expanduser()
                if not (file.exists() or hub_set({**choice, "path": path}) or file.resolve().is_relative_to(runs)):
                    raise missing(file, "file")


def check_inputs(settings: Settings, out: RunDir) -> None:
    """Refuse missing files and models, and a reward whose model is not trained yet."""
    if not STAGES[settings.stage].work:  # chat, for example, uses what its run recorded
        return
    check_files(settings)
    reward = rewards.trained_part(settings.reward)
    for choice in (settings.policy, reward if reward["name"] in rewards.TRAINABLE else {}):
        if path := choice.get("path"):
            locate_model(str(path))
    if settings.stage in ("ppo", "compare"):
        rewards.check_has_model(settings.reward, out.upstream("reward", reward=reward))
