"""Translate the words of a command line from the user's form to Hydra's grammar, and back."""

import os
import re
from argparse import Namespace
from collections.abc import Sequence
from typing import Annotated, NoReturn

import yaml
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, Quote, QuotedString
from hydra.errors import HydraException

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import Range, alternatives, check_value
from rlhf_pipeline.settings import SECTIONS, trainer_fields
from rlhf_pipeline.stages import STAGES
from rlhf_pipeline.usage import CONF

# Sections that take keys their defaults do not list. Settings checks the keys, so Hydra need not require a '+'.
_OPEN = re.compile(rf"^(trainer|policy|reward|data|ptx|labeler|stages|{'|'.join(SECTIONS)})\.[\w.]+=")
# Settings that are paths or names. Their value is the shell's text, whatever characters it has.
_PATHS = re.compile(
    r"(?:stages\.\w+\.)?(?:[\w.]*path|name|labels|runs|compare|against|sweep|(?:evaluate|collect)\.policies)"
)
_GROUPS = ("stage", "policy", "reward", "data", "labeler", "experiment")
_ENTRY = re.compile(r"['\"].*|(?!(?:null|true|false|nan|inf)$)[a-z]\w*", re.ASCII | re.IGNORECASE)  # text to Hydra
_LABELER = "reward@labeler="  # Hydra's form of labeler=, the reward group under another key


def read_command_line(argv: Sequence[str]) -> tuple[list[str], Namespace]:
    """Return the settings of a command line in Hydra's grammar, and its options.

    `--prompt` becomes a setting. `sweep=kl` becomes a multirun over the values in conf/sweeps/kl.yaml. Choosing a
    policy, reward or data drops the demo's experiment, because its learning rates suit the demo's models.
    `--config-path` is relative to the current folder, not to this package.
    """
    options = _parsed(_with_prompts(argv))
    shows = bool(options.cfg or options.help or options.info)
    settings = options.overrides if options.config_name else _with_sweeps(options, shows)
    settings = [_readable(_kl_budget(word, shows or options.multirun), options.multirun) for word in settings]
    keys = [word.lstrip("+").partition("=")[0] for word in settings]
    if twice := next((key for key in keys if keys.count(key) > 1), None):
        raise UserError(f"{twice}= is given {keys.count(twice)} times; give it once.")
    if options.multirun and shows:  # a sweep is shown as one job, without the swept settings
        settings = [word for word in settings if not parse(word).is_sweep_override()]
        options.multirun = False
    settings = [f"++{word}" if _OPEN.match(word) else word for word in settings]
    settings = ["~experiment" if word in ("experiment=null", "experiment=none") else word for word in settings]
    if options.config_path:
        options.config_path = os.path.abspath(options.config_path)
    if options.config_name:  # a recorded configuration is complete by itself
        return settings, options
    settings = [re.sub(r"^labeler=", _LABELER, word) for word in settings if word != "labeler=null"]
    if {"policy", "reward", "data"} & {*keys} and not any("experiment" in key for key in keys):
        settings.append("~experiment")
    return settings, options


def as_words(options: Namespace) -> list[str]:
    """Return options as words for Hydra."""
    given = {f"--{name.replace('_', '-')}": x for name, x in vars(options).items() if x and name != "overrides"}
    return [word for name, value in given.items() for word in ([name] if value is True else [name, value])]


def parse(word: str) -> Override:
    """Parse a setting in Hydra's grammar."""
    try:
        return OverridesParser.create().parse_override(word)
    except RecursionError:
        raise UserError(f"{word[:40]}... is nested too deeply.") from None


def _with_prompts(argv: Sequence[str]) -> list[str]:
    """Turn all `--prompt TEXT` options into one setting."""
    args, prompts, words = [], [], iter(argv)
    for word in words:
        name, joined, text = word.partition("=")
        if name != "--prompt":
            args.append(word)
        elif joined or (text := next(words, "")):
            prompts.append(quoted(text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")))
        else:
            raise UserError("--prompt takes a text, as in --prompt 'I saw this'.")
    return [*args, f"chat.prompt=[{','.join(prompts)}]"] if prompts else args


def _parsed(argv: Sequence[str]) -> Namespace:
    """Return the options, with the settings as `overrides`."""

    def refuse(message: str) -> NoReturn:
        known = [name for action in parser._actions for name in action.option_strings if name.startswith("--")]
        if found := re.match(r"unrecognized arguments: (\S+)", message):
            raise UserError(f"there is no option {found[1]}. {alternatives(found[1], ['--prompt', *known])}")
        raise UserError(f"{message.removeprefix('argument ')}.")

    parser = get_args_parser()
    parser.error = refuse  # type: ignore[method-assign]
    return parser.parse_intermixed_args(argv)


# -- one setting in Hydra's grammar, which takes non-ASCII letters and most punctuation only in quotes


def _readable(word: str, swept: bool) -> str:
    key, equals, value = word.partition("=")
    name = key.lstrip("+~")
    if not (equals or word.startswith("~")) or not re.fullmatch(r"[\w./@$-]+", name, re.ASCII):
        hint = f"stage={word}" if word in STAGES else "name=demo"
        raise UserError(f"'{word}' is not a setting; a setting is key=value, as in {hint}.")
    is_path, is_choice = bool(_PATHS.fullmatch(name)), name in _GROUPS or name.startswith("hydra/")
    if (is_path or is_choice) and value in ("", "''", '""') and word != "~experiment":
        raise UserError(f"{word} leaves {name} without a value; write {name}=<value>.")
    if is_path:
        return f"{key}={_literal(value, swept)}"
    optional = value == "null" and name not in ("stage", "policy", "reward", "data")
    entries = value.split(",") if swept else [value]
    if is_choice and equals and not optional and not all(map(_ENTRY.fullmatch, entries)):  # as 2, which is not text
        return f"{key}={_literal(value, swept) if swept and value != 'null' else quoted(value)}"
    if _is_in_grammar(word):
        return word
    if value.startswith(("{", "[")) and _is_yaml(value):  # YAML takes non-ASCII keys and texts
        inner = QuotedString(value, Quote.double).with_quotes()
        return f"{key}={QuotedString(f'${{oc.create:{inner}}}', Quote.single).with_quotes()}"
    return f"{key}={quoted(value)}"


def _literal(value: str, swept: bool) -> str:
    """Return one or more paths or names as a setting's value.

    If a file has exactly this name, the value is that file. Otherwise lists, quotes and interpolations keep their
    meaning, and so do sweeps with -m.
    """
    if os.path.lexists(os.path.expanduser(value)):
        return quoted(value)
    in_its_grammar = r"""^(\[\]|null)$|['"]|\$\{""" + (r"|\]\s*,\s*\[|^\w+\(" if swept else "")
    if re.search(in_its_grammar, value) and _is_in_grammar(f"x={value}"):
        return value
    if value.startswith("[") and value.endswith("]"):
        return f"[{','.join(quoted(part.strip()) for part in value[1:-1].split(','))}]"
    return ",".join(quoted(part.strip()) for part in value.split(",")) if swept else quoted(value)


def _is_in_grammar(word: str) -> bool:
    try:
        parse(word)
    except HydraException:
        return False
    return True


def _is_yaml(text: str) -> bool:
    try:
        return isinstance(yaml.safe_load(text), dict | list)
    except yaml.YAMLError:
        return False


# -- sweeps


def _with_sweeps(options: Namespace, shows: bool) -> list[str]:
    """Add the named sweeps' settings that the user does not give. In stage=evaluate, sweep= is a past multirun."""
    words: list[str] = options.overrides
    said = dict(word.lstrip("+").split("=", 1) for word in words if "=" in word)
    stage, names = said.get("stage"), said.get("sweep", "").strip("[]").split(",")
    if names in ([""], ["null"]) or stage in (None, "evaluate"):
        return words
    words = [word for word in words if not word.lstrip("+").startswith("sweep=")]
    fields = trainer_fields(stage) if stage in STAGES and STAGES[stage].makes else {}
    options.multirun = True
    for name in map(str.strip, names):
        path = CONF / "sweeps" / f"{name}.yaml"
        if not path.is_file():
            known = sorted(file.stem for file in path.parent.glob("*.yaml"))
            here = "Only stage=evaluate takes a multirun here, by its name or folder."
            raise UserError(f"no sweep is called '{name}'. {alternatives(name, known)} {here}")
        own = yaml.safe_load(path.read_text(encoding="utf-8"))
        fitting = [key for key in own if not key.startswith("trainer.") or key.removeprefix("trainer.") in fields]
        if not fitting:
            raise UserError(f"sweep={name} varies {', '.join(own)}, which stage={stage} does not have.")
        words += [f"{key}={own[key]}" for key in fitting if key not in said and not shows]
    return words


def _kl_budget(word: str, sweeps: bool) -> str:
    """Turn `sweep.kl_budget=` into the sweeper's setting; return any other word unchanged."""
    key, _, value = word.lstrip("+").partition("=")
    if key != "sweep.kl_budget":
        return word
    if not sweeps:
        raise UserError(f"{word} needs a sweep of stage=ppo: add sweep=kl, or -m and several values.")
    number = parse(f"x={value}")
    check_value(key, value if number.is_sweep_override() else number.value(), Annotated[float, Range(above=0)])
    return f"hydra.sweeper.kl_budget={value}"


# -- from Hydra's grammar to the user's form


def quoted(text: str) -> str:
    """Quote any text as a setting's value."""
    # OmegaConf interpolates after ${, unless an odd number of backslashes is before it.
    plain = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(plain, Quote.single).with_quotes()


def setting_word(key: str, text: str) -> str:
    """Return a path or name as a word of the command line, quoted only if it would be read as something else."""
    ambiguous = re.search(r"""^['"[]|\$\{""", text)
    return f"{key}={quoted(text) if ambiguous else text}"


def as_user_types(override: str) -> str:
    """Return a word in Hydra's grammar as the user would type it."""
    word = override.removeprefix("++").replace(_LABELER, "labeler=")
    key, _, value = word.partition("=")
    text = parse(f"x={value}").value() if value.startswith("'") else None
    if not isinstance(text, str):
        return word
    if text.startswith(created := "${oc.create:"):
        yaml_text = text.removeprefix(created).removesuffix("}")
        return f"{key}={parse(f'x={yaml_text}').value()}"
    plain = setting_word(key, text)
    return plain if text and _readable(plain, False) == word else word
