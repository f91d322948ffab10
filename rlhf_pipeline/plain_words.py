"""What Hydra says of a wrong command line, in this program's own words."""

import re

from rlhf_pipeline.registry import suggest
from rlhf_pipeline.settings import STAGES, Settings


def plain(error: Exception) -> str:
    """Hydra's and OmegaConf's messages in one line, without what only a Hydra user would understand."""
    lines = [line.rstrip() for line in str(error).replace("++", "").splitlines() if line.strip()]
    text = " ".join(line for line in lines if not re.match(r"\s*(full_key|object_type|set_struct|To append)", line))
    if "hydra/launcher/submitit" in text:
        return "hydra/launcher=submitit_... needs an extra: pip install 'rlhf_pipeline[slurm]'."
    if found := re.search(r"Could not find '([\w/]+)/([^/']*)'", text):
        known = [line.strip() for line in lines[2:] if line[0] == "\t" and "provider=" not in line]
        near = suggest(found[2], known)
        return f"no {found[1]} is called '{found[2]}'. {near}Known: {', '.join(known)}."
    if found := re.search(r"Could not override '([^']+)'", text):
        settings = list(Settings.__dataclass_fields__)
        return f"there is no setting '{found[1]}'. {suggest(found[1], settings)}Known: {', '.join(settings)}."
    if "must specify 'stage'" in text:
        return f"say which stage: stage=<{'|'.join(STAGES)}>, as in 'python -m rlhf_pipeline stage=sft'."
    if found := re.match(r"Interpolation key '(.*?)' not found", text):
        return f"a value holds ${{{found[1]}}}, and there is no setting '{found[1]}'."
    if found := re.match(r"Ambiguous value for argument '(.*?)=(.*?)' ", text):
        key, values = found[1], found[2]
        return f"{key}={values} has several values: a list is '{key}=[{values}]', and a sweep takes -m as well."
    if found := re.match(r"Error merging override (([\w.]+)=.*)", text):
        return f"{found[1]} is no section of settings; say {found[2]}.<setting>=..."
    if found := re.match(r"Multiple values for ([\w/]+)", text):
        return f"+{found[1]}= would be a second choice; write {found[1]}=..."
    if found := re.search(r"Check that the config directory '(.*)' exists", text):
        return f"--config-path: there is no folder {found[1]}."
    if found := re.match(r"Cannot find primary config '(.*?)'", text):
        return f"--config-name: there is no configuration '{found[1]}' in the folder of --config-path."
    return text
