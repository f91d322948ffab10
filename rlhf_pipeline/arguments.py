"""The command line as the user types it, as Hydra wants it, and back."""

import math
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException
from omegaconf import OmegaConf

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.settings import STAGES, TRAINED, trainer_fields

_PACKAGE = Path(__file__).parent
# In a wheel the configurations lie inside the package, in a checkout beside it.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

# Sections that take keys their defaults do not list: Settings checks them, so Hydra need not ask for a '+'.
_OPEN = re.compile(r"^(trainer|policy|reward|data|ptx|evaluate|collect|chat|plan|hub|report|labeler|stages)\.[\w.]+=")
# Settings that are paths or names: what the shell handed over is the value, whatever signs it holds.
_PATHS = re.compile(
    r"(?:stages\.\w+\.)?(?:[\w.]*path|name|labels|runs|compare|against|sweep|(?:evaluate|collect)\.policies)"
)
_KL_BUDGET = re.compile(r"^\+*sweep\.kl_budget=")
_OWN_CHOICE = re.compile(r"^(policy|reward|data)=")
_GROUPS = ("policy", "reward", "data", "labeler", "experiment")
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
    settings, options = _parted(_sweeps_spelt_out(_prompts_quoted(argv)))
    settings = [
        f"hydra.sweeper.kl_budget={_kl_budget(word, options)}" if _KL_BUDGET.match(word) else word for word in settings
    ]
    settings = [_readable(word, swept="-m" in options) for word in settings]
    if "-m" in options and _shows(options):  # of one job: without what is swept
        settings = [word for word in settings if not _parsed(word).is_sweep_override()]
        options.remove("-m")
    settings = [f"++{word}" if _OPEN.match(word) else word for word in settings]
    settings = ["~experiment" if word in ("experiment=null", "experiment=none") else word for word in settings]
    before = ["", *options]
    options = [
        os.path.abspath(word) if before[i] in ("--config-path", "-cp") else word for i, word in enumerate(options)
    ]
    options = [
        re.sub(r"^--config-path=(.*)", lambda p: f"--config-path={os.path.abspath(p[1])}", word) for word in options
    ]
    if any(word.startswith(("--config-name", "-cn")) for word in options):
        return settings + options
    settings = [re.sub(r"^labeler=", _LABELER, word) for word in settings if word != "labeler=null"]
    if any(map(_OWN_CHOICE.match, settings)) and not any("experiment" in word.partition("=")[0] for word in settings):
        settings.append("~experiment")
    if {"--help", "-h"} & {*options} and not any(word.startswith("stage=") for word in settings):
        settings.append("stage=pipeline")
    return settings + options


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
        args.append(f"chat.prompt=[{','.join(prompts)}]")
    return args


def _parted(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings and, apart from them, the options: Hydra wants no setting behind one."""

    def refuse(message: str) -> NoReturn:
        known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            near = suggest(found[1], known)
            raise UserError(f"there is no option {found[1]}. {near}Known: --prompt, {', '.join(known)}.")
        option = re.split(r"[/:]", message.removeprefix("argument "))[0]
        takes = next((a.choices for a in parser._actions if option in a.option_strings and a.choices), ["a value"])
        raise UserError(f"{option} takes {' or '.join(takes)}.")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    argv = ["-m" if word == "--multirun" else word for word in argv]
    settings, options = parser.parse_intermixed_args(argv).overrides, []
    rest = iter(settings)
    following = next(rest, None)
    for word in argv:
        if word == following:
            following = next(rest, None)
        elif word not in options or word != "-m":
            options.append(word)
    return settings, options


def _parsed(word: str) -> Override:
    return OverridesParser.create().parse_override(word)


def _readable(word: str, swept: bool) -> str:
    """A setting in Hydra's grammar, which takes letters of other languages and most signs in quotes alone."""
    key, equals, value = word.partition("=")
    if not equals and not word.startswith("~"):
        hint = f"stage={word}" if word in STAGES else "name=demo"
        raise UserError(f"'{word}' is no setting; a setting is key=value, as in {hint}.")
    name = key.lstrip("+~")
    if equals and not re.fullmatch(r"[\w./@$-]+", name, re.ASCII):
        raise UserError(f"'{word}': there is no setting '{name}'; a setting is key=value, as in name=demo.")
    if _PATHS.fullmatch(name):
        if value in ("", "''", '""'):
            raise UserError(f"{word} leaves nothing to work with; give a value, or {name}=null.")
        return f"{key}={_literally(value, swept)}"
    if name in ("stage", *_GROUPS) and (not value if equals else name != "experiment"):
        raise UserError(f"{word} leaves nothing to work with; give one by its name, as in {name}=<name>.")
    try:
        read = _parsed(word)
        if name in ("stage", *_GROUPS) and equals and not read.is_sweep_override():
            none = read.value() is None and name in ("experiment", "labeler")
            if not none and not isinstance(read.value(), str):
                raise UserError(f"{word}: {name}= takes one name, as in {name}=<name>.")
    except HydraException:
        if name in ("stage", *_GROUPS):  # which is none of those that there are
            return f"{key}={quoted(value)}"
        if value.startswith(("{", "[{")) and _is_yaml(value):  # Hydra takes no key or text of other letters; YAML does
            inner = QuotedString(value, Quote.double).with_quotes()
            return f"{key}={QuotedString(f'${{oc.create:{inner}}}', Quote.single).with_quotes()}"
        listed = value.startswith("[") and value.endswith("]")
        quotes = ",".join(f'"{part.strip()}"' for part in (value[1:-1].split(",") if listed else [value]))
        example = f"{key}=[{quotes}]" if listed else f"{key}={quotes}"
        raise UserError(
            f"{word} cannot be read; put quotes around what is not plain letters and numbers, as in "
            + shlex.quote('reward.words=["好"]' if re.search("[\"']", value) else example)
            + "."
        ) from None
    return word


def _literally(value: str, swept: bool) -> str:
    """A path or a name, or several, as a setting's value.

    What is there by that name is meant. Else lists, quotes and interpolations keep their meaning, and sweeps with -m.
    """
    if _is_there(value):
        return _plainly(value)
    try:
        read = _parsed(f"x={value}")
    except HydraException:
        read = None
    in_its_grammar = r"""^\[\]$|['"]|\$\{""" + (r"|\]\s*,\s*\[|^\w+\(" if swept else "")
    if read and re.search(in_its_grammar, value):
        return value
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(map(_plainly, _parts(value[1:-1])))}]"
    return ",".join(map(_plainly, _parts(value) if swept else [value]))


def _parts(text: str) -> list[str]:
    """What commas part, but for the commas in the names of files that are there."""
    words, found = text.split(","), list[str]()
    while words:
        count = next((n for n in range(len(words), 1, -1) if _is_there(",".join(words[:n]).strip())), 1)
        word = ",".join(words[:count])
        found.append(word if _is_there(word) else word.strip())
        del words[:count]
    return found


def _is_there(path: str) -> bool:
    return os.path.lexists(os.path.expanduser(path))


def _plainly(text: str) -> str:
    """A text as a setting's value, in quotes only where Hydra would read another text."""
    try:
        read = _parsed(f"x={text}").value()
    except HydraException:
        return quoted(text)
    plain = read == text and text and "${" not in text and not text.endswith("\\")
    return text if plain or (read is None and not _is_there(text)) else quoted(text)


def _is_yaml(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), dict | list)
    except yaml.YAMLError:
        return False


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
    return [*args, *added, "-m"]


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


def typed(key: str, text: str) -> str:
    """A path or a name as a word of the command line, in quotes only where it would be read as something else."""
    ambiguous = re.search(r"""^['"[]|\$\{""", text)
    return f"{key}={quoted(text) if ambiguous else text}"


def as_typed(override: str) -> str:
    """An override of Hydra's as the user would say it."""
    word = override.removeprefix("++").replace(_LABELER, "labeler=")
    key, _, value = word.partition("=")
    if value.startswith(created := "'${oc.create:"):
        yaml_text = str(_parsed(f"x={value}").value()).removeprefix(created[1:]).removesuffix("}")
        return f"{key}={_parsed(f'x={yaml_text}').value()}"
    if value.startswith("'") and "${" not in value and _PATHS.fullmatch(key):
        text = _parsed(f"x={value}").value()
        return typed(key, text) if isinstance(text, str) else word
    return word
