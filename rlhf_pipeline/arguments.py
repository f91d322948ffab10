"""The command line as the user types it, as Hydra wants it, and back."""

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Quote, QuotedString
from omegaconf import OmegaConf

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.settings import TRAINED, trainer_fields

_PACKAGE = Path(__file__).parent
# In a wheel the configurations lie inside the package, in a checkout beside it.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

# Sections that take keys their defaults do not list: Settings checks them, so Hydra need not ask for a '+'.
_OPEN = re.compile(r"^(trainer|policy|reward|data|ptx|evaluate|collect|chat|plan|hub|report|labeler|stages)\.[\w.]+=")
_KL_BUDGET = re.compile(r"^\+*sweep\.kl_budget=")
_OWN_CHOICE = re.compile(r"^(policy|reward|data)=")
# Of a configuration, two values of which one is for small models: ${by_size:1.0e-3,5.0e-4}
OmegaConf.register_new_resolver(
    "by_size",
    lambda small, large, _root_: small if _root_.policy.get("size") in ("tiny", "mini", "mid") else large,
    replace=True,
)
# labeler= chooses among the rewards: to Hydra, that group in another place.
_LABELER = "reward@labeler="


def complete(argv: Sequence[str]) -> list[str]:
    """What the user typed, as Hydra wants it.

    `--prompt` is a setting. Open sections take any key. A policy, reward or data of the user's own leaves the demo's
    experiment: its learning rates were chosen for the demo's models. A folder of configurations is one below the
    current folder, where Hydra would look below this package. `sweep=kl` is a multirun over what
    conf/sweeps/kl.yaml says.
    """
    argv = _sweeps_spelt_out(_multirun_last(_prompts_quoted(argv)))
    argv = [f"hydra.sweeper.kl_budget={_kl_budget(arg, argv)}" if _KL_BUDGET.match(arg) else arg for arg in argv]
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


def _multirun_last(argv: Sequence[str]) -> list[str]:
    """The command line with `-m` behind the settings, wherever it was: they cannot be parted by an option.

    Where settings are only shown, those of one job are: without what is swept.
    """
    words = [word for word in argv if word not in ("-m", "--multirun")]
    if len(words) == len(argv):
        return words
    return [word for word in words if not _is_swept(word)] if _shows(words) else [*words, "-m"]


def _is_swept(word: str) -> bool:
    """Whether a word gives a setting several values."""
    return word[:1] != "-" and "=" in word and OverridesParser.create().parse_override(word).is_sweep_override()


def _shows(argv: Sequence[str]) -> bool:
    """Whether settings are asked to be shown, and nothing is run."""
    return any(word.split("=")[0] in ("--cfg", "-c", "--help", "-h", "--info", "-i") for word in argv)


def _sweeps_spelt_out(argv: Sequence[str]) -> list[str]:
    """The command line with the settings of the sweeps that it names; what is said beside them goes over theirs.

    Of stage=evaluate, `sweep=` is a multirun that has been.
    """
    said = dict(re.sub("^[+]*", "", word).split("=", 1) for word in argv if "=" in word and word[0] != "-")
    stage, names = said.get("stage"), said.get("sweep", "").strip("[]").split(",")
    if (
        names in ([""], ["null"])
        or stage in (None, "evaluate")
        or any(w.startswith(("--config-name", "-cn")) for w in argv)
    ):
        return list(argv)
    args = [word for word in argv if not word.lstrip("+").startswith("sweep=")]
    found: dict[str, str] = {}
    for name in map(str.strip, names):
        path = CONF / "sweeps" / f"{name}.yaml"
        if not path.is_file():
            known = sorted(file.stem for file in path.parent.glob("*.yaml"))
            raise UserError(
                f"no sweep is called '{name}'. {suggest(name, known)}Known: {', '.join(known)}. "
                "stage=evaluate alone takes a multirun here, by its name or folder."
            )
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
        fitting = {key: str(value) for key, value in own.items() if _is_of(str(stage), key)}
        if not fitting:
            raise UserError(f"sweep={name} varies {', '.join(own)}, which stage={stage} has not.")
        found |= fitting
    if _shows(args):
        return args  # of which one job is shown
    added = [f"{key}={value}" for key, value in found.items() if key not in said]
    end = _end_of_settings(args)
    return _multirun_last([*args[:end], *added, *args[end:], "-m"])


def _kl_budget(word: str, argv: Sequence[str]) -> float:
    """The budget that a word of the command line sets; a sweep alone has one."""
    if "-m" not in argv and not _shows(argv):
        raise UserError(f"{word} goes with a sweep of stage=ppo, as in sweep=kl, or with -m and several values.")
    try:
        budget = float(word.partition("=")[2])
    except ValueError:
        budget = math.nan
    if not 0 < budget < math.inf:
        raise UserError(f"{word}: it takes a number above 0, a KL in nats, as in sweep.kl_budget=5.")
    return budget


def _is_of(stage: str, key: str) -> bool:
    """Whether a stage has a setting, as far as it is one of a trainer."""
    section, _, field = key.partition(".")
    return section != "trainer" or (stage in TRAINED and field in trainer_fields(stage))


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
