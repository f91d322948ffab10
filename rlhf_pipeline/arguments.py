"""The command line as the user types it, as Hydra wants it, and back."""

import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString

from rlhf_pipeline.errors import UserError

# Sections that take keys their defaults do not list: Settings checks them, so Hydra need not ask for a '+'.
_OPEN = re.compile(r"^(trainer|policy|reward|data|ptx|evaluate|collect|chat|plan|hub|report|labeler|stages)\.[\w.]+=")
_OWN_CHOICE = re.compile(r"^(policy|reward|data)=")
# labeler= chooses among the rewards: to Hydra, that group in another place.
_LABELER = "reward@labeler="


def complete(argv: Sequence[str]) -> list[str]:
    """What the user typed, as Hydra wants it.

    `--prompt` is a setting. Open sections take any key. A policy, reward or data of the user's own leaves the demo's
    experiment: its learning rates were chosen for the demo's models. A folder of configurations is one below the
    current folder, where Hydra would look below this package.
    """
    argv = _prompts_quoted(argv)
    args = [f"++{arg}" if _OPEN.match(arg) else arg for arg in argv]
    before = ["", *args]
    args = [os.path.abspath(arg) if before[i] in ("--config-path", "-cp") else arg for i, arg in enumerate(args)]
    args = [re.sub(r"^--config-path=(.*)", lambda p: f"--config-path={os.path.abspath(p[1])}", arg) for arg in args]
    args = ["~experiment" if arg in ("experiment=null", "experiment=none") else arg for arg in args]
    if any(arg.startswith(("--config-name", "-cn")) for arg in args):
        return args
    args = [re.sub(r"^labeler=", _LABELER, arg) for arg in args]
    if any(map(_OWN_CHOICE.match, args)) and not any("experiment" in arg.partition("=")[0] for arg in args):
        args.insert(_end_of_settings(args), "~experiment")
    if any(arg in ("--help", "-h") for arg in args) and not any(arg.startswith("stage=") for arg in args):
        args.append("stage=pipeline")
    return args


def _prompts_quoted(argv: Sequence[str]) -> list[str]:
    """The command line with `--prompt TEXT`, as often as it is said, as one setting, whatever the texts hold."""
    args, prompts, words = [], [], iter(argv)
    for word in words:
        name, joined, text = word.partition("=")
        if name != "--prompt":
            args.append(word)
        elif joined or (text := next(words, "")):
            prompts.append(quoted(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")))
        else:
            raise UserError("--prompt takes a text, as in --prompt 'I saw this'.")
    if prompts:
        args.insert(_end_of_settings(args), f"chat.prompt=[{','.join(prompts)}]")
    return args


def quoted(text: str) -> str:
    """A text as a setting's value, whatever it holds."""
    # To OmegaConf ${ begins the name of a setting, unless there is an odd number of backslashes before it.
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(plain, Quote.single).with_quotes()


def _end_of_settings(args: Sequence[str]) -> int:
    """Before the first option: Hydra wants no setting behind one."""
    return next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))


def as_typed(override: str) -> str:
    """An override of Hydra's as the user would say it."""
    return override.removeprefix("++").replace(_LABELER, "labeler=")


def swept_overrides(argv: Sequence[str], job: Sequence[str]) -> list[str]:
    """The overrides of `job` that differ between the jobs of the multirun that `argv` asked for."""
    parsed: list[Override] = OverridesParser.create().parse_overrides([a for a in argv if "=" in a and a[0] != "-"])
    fixed = {
        f"{o.key_or_group}@{o.package}" if o.package else o.key_or_group for o in parsed if not o.is_sweep_override()
    }
    return [o for o in job if o.lstrip("+").partition("=")[0] not in fixed]
