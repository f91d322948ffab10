"""The words of a command line: from what the user types to what Hydra reads, and back."""

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

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import suggest
from rlhf_pipeline.settings import trainer_fields
from rlhf_pipeline.stages import STAGES

_PACKAGE = Path(__file__).parent
# In a wheel the configurations lie inside the package, in a checkout beside it.
CONF = _PACKAGE / "conf" if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent / "conf"

# Sections that take keys their defaults do not list: Settings checks them, so Hydra need not ask for a '+'.
_OPEN = re.compile(r"^(trainer|policy|reward|data|ptx|evaluate|collect|chat|plan|hub|report|labeler|stages)\.[\w.]+=")
# Settings that are paths or names: what the shell handed over is the value, whatever signs it holds.
_PATHS = re.compile(
    r"(?:stages\.\w+\.)?(?:[\w.]*path|name|labels|runs|compare|against|sweep|(?:evaluate|collect)\.policies)"
)
_OWN_CHOICE = re.compile(r"^(policy|reward|data)=")
_GROUPS = ("stage", "policy", "reward", "data", "labeler", "experiment")
_LABELER = "reward@labeler="  # Hydra's form of labeler=: the reward group in another place
_RECORDED = ("--config-name", "-cn")
_SHOWING = {"--cfg", "-c", "--help", "-h", "--info", "-i"}


def read(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings and the options of a command line, in Hydra's grammar.

    `--prompt` is a setting. `sweep=kl` is a multirun over what conf/sweeps/kl.yaml says. Choosing a policy, reward or
    data drops the demo's experiment, as its learning rates suit the demo's models. `--config-path` is relative to the
    current folder, not to this package.
    """
    settings, options = _split(_with_sweeps(_with_prompts(argv)))
    shows = bool(_SHOWING & {word.split("=")[0] for word in options})
    settings = [_kl_budget(word, shows or "-m" in options) for word in settings]
    settings = [_readable(word, swept="-m" in options) for word in settings]
    _check_once(settings)
    if "-m" in options and shows:  # a sweep is shown as one job, without what is swept
        settings = [word for word in settings if not parse(word).is_sweep_override()]
        options.remove("-m")
    settings = [f"++{word}" if _OPEN.match(word) else word for word in settings]
    settings = ["~experiment" if word in ("experiment=null", "experiment=none") else word for word in settings]
    for number, word in enumerate(options):
        if options[number - 1 : number] in (["--config-path"], ["-cp"]):
            options[number] = os.path.abspath(word)
        elif word.startswith("--config-path="):
            options[number] = f"--config-path={os.path.abspath(word.partition('=')[2])}"
    if is_recorded(options):
        return settings, options
    settings = [re.sub(r"^labeler=", _LABELER, word) for word in settings if word != "labeler=null"]
    if any(map(_OWN_CHOICE.match, settings)) and not any("experiment" in word.partition("=")[0] for word in settings):
        settings.append("~experiment")
    if {"--help", "-h"} & {*options} and not any(word.startswith("stage=") for word in settings):
        settings.append("stage=pipeline")
    return settings, options


def _check_once(settings: Sequence[str]) -> None:
    keys = [word.lstrip("+").partition("=")[0] for word in settings]
    for key in keys:
        if keys.count(key) > 1:
            raise UserError(f"{key}= is given {keys.count(key)} times; give it once.")


def is_recorded(options: Sequence[str]) -> bool:
    """Whether a recorded configuration is run again: it is complete by itself."""
    return any(word.startswith(_RECORDED) for word in options)


def parse(word: str) -> Override:
    """A setting as Hydra reads it."""
    try:
        return OverridesParser.create().parse_override(word)
    except RecursionError:
        raise UserError(f"{word[:40]}... is nested too deeply.") from None


def _with_prompts(argv: Sequence[str]) -> list[str]:
    """`--prompt TEXT`, as often as it is said, becomes one setting."""
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


def _split(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The settings, and the options."""

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


# -- one setting in Hydra's grammar, which takes letters of other languages and most signs only in quotes


def _readable(word: str, swept: bool) -> str:
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")
    if not equals and not word.startswith("~"):
        hint = f"stage={word}" if word in STAGES else "name=demo"
        raise UserError(f"'{word}' is no setting; a setting is key=value, as in {hint}.")
    if equals and not re.fullmatch(r"[\w./@$-]+", name, re.ASCII):
        raise UserError(f"'{word}': there is no setting '{name}'; a setting is key=value, as in name=demo.")
    if _PATHS.fullmatch(name):
        if value in ("", "''", '""'):
            raise UserError(f"{word} leaves nothing to work with; give a value, or {name}=null.")
        return f"{key}={_literal(value, swept)}"
    if name in _GROUPS or name.startswith("hydra/"):
        return _choice(word, key, name, value)
    try:
        parse(word)
        return word
    except HydraException:
        if value.startswith(("{", "[{")) and _is_yaml(value):  # YAML takes keys and texts of other letters
            inner = QuotedString(value, Quote.double).with_quotes()
            return f"{key}={QuotedString(f'${{oc.create:{inner}}}', Quote.single).with_quotes()}"
    listed = value.startswith("[") and value.endswith("]")
    quotes = ",".join(f'"{part.strip()}"' for part in (value[1:-1].split(",") if listed else [value]))
    example = f"{key}=[{quotes}]" if listed else f"{key}={quotes}"
    raise UserError(
        f"{word} cannot be read; put quotes around what is not plain letters and numbers, as in "
        + shlex.quote('reward.words=["好"]' if re.search("[\"']", value) else example)
        + "."
    )


def _choice(word: str, key: str, name: str, value: str) -> str:
    """A choice of a group's entry, by its name."""
    if not value and ("=" in word or name != "experiment"):
        raise UserError(f"{word} leaves nothing to work with; give one by its name, as in {name}=<name>.")
    try:
        read = parse(word)
    except HydraException:  # no entry has such a name: Hydra will say which there are
        return f"{key}={quoted(value)}"
    choices = getattr(read.value(), "list", [read.value()]) if read.is_sweep_override() else [read.value()]
    if not value or all(isinstance(choice, str | QuotedString) for choice in choices):
        return word
    if read.value() is None and name in ("experiment", "labeler"):
        return word
    raise UserError(f"{word}: {name}= takes one name, as in {name}=<name>.")


def _literal(value: str, swept: bool) -> str:
    """A path or a name, or several, as a setting's value.

    If a file has that very name, it is meant. Else lists, quotes and interpolations keep their meaning, and sweeps
    with -m.
    """
    if _is_there(value):
        return _plain(value)
    try:
        read = parse(f"x={value}")
    except HydraException:
        read = None
    in_its_grammar = r"""^\[\]$|['"]|\$\{""" + (r"|\]\s*,\s*\[|^\w+\(" if swept else "")
    if read and re.search(in_its_grammar, value):
        return value
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(map(_plain, _parts(value[1:-1])))}]"
    return ",".join(map(_plain, _parts(value) if swept else [value]))


def _parts(text: str) -> list[str]:
    """Split at commas, but not at those in the names of files that are there."""
    words, found = text.split(","), list[str]()
    while words:
        count = next((n for n in range(len(words), 1, -1) if _is_there(",".join(words[:n]).strip())), 1)
        word = ",".join(words[:count])
        found.append(word if _is_there(word) else word.strip())
        del words[:count]
    return found


def _is_there(path: str) -> bool:
    return os.path.lexists(os.path.expanduser(path))


def _plain(text: str) -> str:
    """A text as a setting's value, quoted only where Hydra would read another text."""
    try:
        read = parse(f"x={text}").value()
    except HydraException:
        return quoted(text)
    plain = read == text and text and "${" not in text and not text.endswith("\\")
    return text if plain or (read is None and not _is_there(text)) else quoted(text)


def _is_yaml(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), dict | list)
    except yaml.YAMLError:
        return False


# -- sweeps


def _with_sweeps(argv: Sequence[str]) -> list[str]:
    """Add the settings of the named sweeps, where the user gives none. In stage=evaluate, sweep= is a past multirun."""
    said = dict(word.lstrip("+").split("=", 1) for word in argv if "=" in word and word[0] != "-")
    stage, names = said.get("stage"), said.get("sweep", "").strip("[]").split(",")
    if names in ([""], ["null"]) or stage in (None, "evaluate") or is_recorded(argv):
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
    if _SHOWING & {word.split("=")[0] for word in args}:
        return args  # one job is shown
    return [*args, *(f"{key}={value}" for key, value in found.items() if key not in said), "-m"]


def _is_of(stage: str, key: str) -> bool:
    section, _, field = key.partition(".")
    has_trainer = stage in STAGES and STAGES[stage].makes is not None
    return section != "trainer" or (has_trainer and field in trainer_fields(stage))


def _kl_budget(word: str, sweeps: bool) -> str:
    """`sweep.kl_budget=` as the sweeper's setting; any other word as it is."""
    key, _, value = word.lstrip("+").partition("=")
    if key != "sweep.kl_budget":
        return word
    if not sweeps:
        raise UserError(f"{word} goes with a sweep of stage=ppo, as in sweep=kl, or with -m and several values.")
    try:
        budget = float(value)
    except ValueError:
        budget = math.nan
    if not 0 < budget < math.inf:
        raise UserError(f"{word}: it takes a number above 0, a KL in nats, as in sweep.kl_budget=5.")
    return f"hydra.sweeper.kl_budget={budget}"


# -- and back


def quoted(text: str) -> str:
    """A text as a setting's value, whatever it holds."""
    # To OmegaConf ${ begins the name of a setting, unless there is an odd number of backslashes before it.
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(plain, Quote.single).with_quotes()


def typed(key: str, text: str) -> str:
    """A path or a name as a word of the command line, quoted only where it would be read as something else."""
    ambiguous = re.search(r"""^['"[]|\$\{""", text)
    return f"{key}={quoted(text) if ambiguous else text}"


def as_typed(override: str) -> str:
    """A word in Hydra's grammar as the user would say it."""
    word = override.removeprefix("++").replace(_LABELER, "labeler=")
    key, _, value = word.partition("=")
    if value.startswith(created := "'${oc.create:"):
        yaml_text = str(parse(f"x={value}").value()).removeprefix(created[1:]).removesuffix("}")
        return f"{key}={parse(f'x={yaml_text}').value()}"
    if value.startswith("'") and "${" not in value and _PATHS.fullmatch(key):
        text = parse(f"x={value}").value()
        return typed(key, text) if isinstance(text, str) else word
    return word
