"""What Hydra says of a wrong command line, in this program's own words."""

import re

from rlhf_pipeline.registry import suggest
from rlhf_pipeline.settings import STAGES, Settings


def plain(error: Exception) -> str:
    """Hydra's and OmegaConf's messages without what only a Hydra user would understand."""
    lines = [line.rstrip() for line in str(error).splitlines() if line.strip()]
    if "hydra/launcher/submitit" in lines[0]:
        return "hydra/launcher=submitit_... needs an extra: pip install 'rlhf_pipeline[slurm]'."
    missing = re.search(r"Could not find '(\w+)/([^']*)'", lines[0])
    if missing and len(lines) > 2:
        known = [line.strip() for line in lines[2:] if line[0] == "\t" and "provider=" not in line]
        near = suggest(missing[2], known)
        return f"no {missing[1]} is called '{missing[2]}'. {near}Known: {', '.join(known)}."
    text = "\n".join(line for line in lines if not re.match(r"\s*(full_key|object_type|set_struct|To append)", line))
    if "LexerNoViableAlt" in text or "mismatched input" in text:
        return (
            f"{lines[0].partition(': ')[2]} cannot be read; put quotes around what is not plain letters and numbers, "
            "as in 'reward.words=[\"好\"]'."
        )
    match = re.search(r"Could not override '([\w.]+)'", text)
    if match:
        known = [f.name for f in Settings.__dataclass_fields__.values()]
        return f"there is no setting '{match[1]}'. {suggest(match[1], known)}Known: {', '.join(known)}."
    if "must specify 'stage'" in text:
        return f"say which stage: stage=<{'|'.join(STAGES)}>, as in 'python -m rlhf_pipeline stage=sft'."
    return text
