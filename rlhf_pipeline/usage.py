"""The text of `--help`, and the folder of the configurations. Imports nothing slow: help comes at once."""

import sys
from collections.abc import Sequence
from pathlib import Path

from rlhf_pipeline.terminal import safe_output

_PACKAGE = Path(__file__).parent
# In a wheel the configurations are inside the package, in a checkout next to it.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"
_HELP = """\
rlhf_pipeline: InstructGPT's three steps for a GPT-2.

Choices:
{choices}

Examples:
python -m rlhf_pipeline stage=pipeline                      the demo, offline, in minutes
python -m rlhf_pipeline stage=ppo trainer.kl_coef=0.1       one stage; trainer.* are TRL's own fields
python -m rlhf_pipeline stage=chat name=demo                talk to the newest policy of a run
python -m rlhf_pipeline stage=ppo sweep=kl name=coefs       a sweep: sweep=kl, seeds, optuna (conf/sweeps)
python -m rlhf_pipeline -m stage=ppo trainer.kl_coef=0.02,0.1 seed=1,2 name=coefs    a sweep over any settings
python -m rlhf_pipeline stage=sft --cfg job                 print the settings; `stages` has those of the experiment
"""


def asks_for_help(argv: Sequence[str]) -> bool:
    """Whether a command line has --help or -h, other than as the text of --prompt."""
    before = ["", *argv]
    return any(word in ("--help", "-h") and before[i] != "--prompt" for i, word in enumerate(argv))


def show_usage() -> None:
    """Print the choices of every group and some commands."""
    groups = sorted(folder for folder in CONF.iterdir() if folder.is_dir() and folder.name != "hydra")
    choices = {group.name: sorted(path.stem for path in group.glob("*.yaml")) for group in groups}
    text = _HELP.format(choices="\n".join(f"{name}: {', '.join(found)}" for name, found in choices.items()))
    try:
        with safe_output():
            print(text, flush=True)
    except OSError as error:
        print(f"error: the help cannot be written: {error.strerror}.", file=sys.stderr)
        sys.exit(2)
