"""Registries of functions by name: a function's signature is its configuration."""

import difflib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Generic, TypeVar

from rlhf_pipeline.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Range:
    """The numbers that a setting takes: `Annotated[int, Range(1)]`. A value must be greater than `above`, if given."""

    least: float | None = None
    most: float | None = None
    above: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a number is finite and in the range."""
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        return low and (self.most is None or value <= self.most) and math.isfinite(value)

    def __str__(self) -> str:
        if self.least is not None and self.most is not None:
            return f"from {self.least:.10g} to {self.most:.10g}"
        low = f"above {self.above:.10g}" if self.above is not None else f"of at least {self.least:.10g}"
        return f"{low}, at most {self.most:.10g}" if self.most is not None else low


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `Did you mean 'x'? ` if a known word is similar to `word`, else an empty string."""
    found = difflib.get_close_matches(word, list(known), n=1)
    return f"Did you mean '{found[0]}'? " if found else ""


def alternatives(word: str, known: Collection[str]) -> str:
    """Return the words known instead of `word`: `Did you mean 'x'? Known: x, y.`"""
    return f"{did_you_mean(word, known)}Known: {', '.join(known) or 'none'}."


_WORDS: dict[Any, str] = {
    types.NoneType: "null", bool: "true or false", int: "a whole number", float: "a number", str: "text",
    list: "a list", dict: "settings, as in {key: value}",
}  # fmt: skip


def describe(kind: Any) -> str:
    """Describe a type to the user: `a whole number`, `a number or null`, `'k1' or 'k3'`, `a list (text each)`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin is Annotated:
        return f"{describe(args[0])} {args[1]}"
    if origin is typing.Literal:
        return " or ".join(map(as_written, args))
    if origin in (types.UnionType, typing.Union):
        return " or ".join(map(describe, args))
    if origin in (list, tuple):
        return f"a list{f' of {len(args)}' if origin is tuple else ''} ({describe(args[0])} each)"
    return _WORDS.get(origin or kind, "any value")


def as_written(value: Any) -> str:
    """Return a value as the user would write it."""
    return json.dumps(value) if value is None or isinstance(value, bool) else repr(value)


def has_type(value: Any, kind: Any) -> bool:
    """Whether a value from a YAML file has the annotated type `kind`."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if kind is Any:
        return True
    if origin is Annotated:
        return has_type(value, args[0]) and args[1].holds(value)
    if origin is typing.Literal:
        return value in args
    if origin in (types.UnionType, typing.Union):
        return any(has_type(value, part) for part in args)
    if origin is list:
        return isinstance(value, list) and all(has_type(item, args[0]) for item in value)
    if origin is tuple:
        return isinstance(value, list | tuple) and len(value) == len(args) and all(map(has_type, value, args))
    if kind in (int, float):
        return isinstance(value, int | kind) and not isinstance(value, bool)
    return isinstance(value, origin or kind)


def check_value(setting: str, value: Any, kind: Any) -> None:
    """Refuse a setting's value that has the wrong type."""
    if not has_type(value, kind):
        raise UserError(f"{setting} is {as_written(value)}; it takes {describe(kind)}.")


def check_settings(prefix: str, values: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Refuse unknown settings and values of the wrong type; `known` maps names to types."""
    for key, value in values.items():
        if key not in known:
            raise UserError(f"there is no setting '{prefix}{key}'. {alternatives(key, known)}")
        check_value(f"{prefix}{key}", value, known[key])


@contextmanager
def prefix_errors(setting: str) -> Iterator[None]:
    """Put the setting's name before the errors of the block."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{setting}: {error}") from error


@contextmanager
def rename_in_errors(setting: str, kind: str) -> Iterator[None]:
    """Replace `kind` by `setting` in the errors of the block, as labeler=... for a reward that labels."""
    try:
        yield
    except UserError as error:
        raise type(error)(re.sub(rf"\b{kind}(?=[.=])", setting, str(error))) from error


class Registry(Generic[T]):
    """Functions by name. A configuration may set a function's keyword-only arguments.

    `common` are fields that every choice may have. The caller of `build` reads them, the function does not.
    """

    def __init__(self, kind: str, common: Mapping[str, Any] | None = None) -> None:
        self.kind = kind
        self.common = dict(common or {})
        self.entries: dict[str, Callable[..., T]] = {}

    def register(self, function: Callable[..., T]) -> Callable[..., T]:
        """Add a function under its own name."""
        self.entries[function.__name__] = function
        return function

    def fields(self, name: str) -> dict[str, Any]:
        """Return the fields that a configuration may set for an entry, and their types; empty for an unknown entry."""
        if name not in self.entries:
            return {}
        parameters = inspect.signature(self.entries[name]).parameters.values()
        hints = typing.get_type_hints(self.entries[name], include_extras=True)
        return self.common | {p.name: hints[p.name] for p in parameters if p.kind is p.KEYWORD_ONLY}

    def check(self, choice: Mapping[str, Any]) -> None:
        """Refuse an unknown name, an unknown field, or a value of the wrong type."""
        name = choice.get("name")
        if name not in self.entries:
            raise UserError(f"no {self.kind} is called '{name}'. {alternatives(str(name), sorted(self.entries))}")
        with prefix_errors(f"{self.kind}={name}"):
            check_settings(f"{self.kind}.", {key: x for key, x in choice.items() if key != "name"}, self.fields(name))
            for parameter in inspect.signature(self.entries[name]).parameters.values():
                needed = parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty
                if needed and parameter.name not in choice:
                    raise UserError(f"it needs {self.kind}.{parameter.name}, which is not set.")

    def build(self, choice: Mapping[str, Any], *args: Any) -> T:
        """Call the entry that `choice['name']` names, with `args` before its configured fields."""
        self.check(choice)
        own = {k: v for k, v in choice.items() if k != "name" and k not in self.common}
        return self.entries[choice["name"]](*args, **own)
