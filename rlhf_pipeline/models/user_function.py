"""A function in a file or package of the user's own: found by its path, its failures said plainly."""

import asyncio
import importlib
import importlib.util
import inspect
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import suggest

_FORM = "write it as my_rewards.py:politeness or my_package.my_module:politeness"


_FORMS = "write def f(prompts, completions), or def f(completions, **kwargs) as for TRL's GRPO and RLOO"


def reward_at(path: str) -> Callable[[Sequence[str], Sequence[str]], Any]:
    """The reward function that `path` names, to be called with prompts and completions, whatever its signature.

    A function that names `completions`, or takes any keyword, is called by keyword, as TRL's GRPO and RLOO call it. If
    it cannot read strings, it gets messages, TRL's conversational form. Any other is called by position.
    """
    function = function_at(path)
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some that are written in C have none
        return lambda prompts, completions: _whole(function(prompts, completions))
    parameters = signature.parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    if "completions" not in named and _binds(signature, "prompts", "completions"):
        return lambda prompts, completions: _whole(function(prompts, completions))
    names = [name for name in ("prompts", "completions", "completion_ids") if any_name or name in named]
    if not _binds(signature, **dict.fromkeys(names)) or not {"completions", "completion_ids"} & {*names}:
        raise UserError(f"reward.path={path} takes {signature}, and there are prompts and completions alone; {_FORMS}.")

    def ask(prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        given = {"prompts": prompts, "completions": completions, "completion_ids": _NoIds(path)}
        return _whole(function(**{name: given[name] for name in names}))

    def ask_in_messages(prompts: Sequence[str], completions: Sequence[str]) -> Any:
        return ask(*([[{"role": role, "content": text}] for text in texts]
                     for role, texts in (("user", prompts), ("assistant", completions))))  # fmt: skip

    forms = [ask, ask_in_messages]  # until the first call shows which one it reads

    def call(prompts: Sequence[str], completions: Sequence[str]) -> Any:
        try:
            found = forms[0](prompts, completions)
        except (TypeError, AttributeError, LookupError):  # the last of an empty answer
            with suppress(Exception):  # the first error is the one to tell
                found = forms[1](prompts, completions)
                forms[:] = forms[1:]
                return found
            raise
        del forms[1:]
        return found

    return call


def _whole(given: Any) -> Any:
    """What a function gave, once a coroutine has been waited for and an iterator run through."""
    given = asyncio.run(given) if inspect.iscoroutine(given) else given
    return list(given) if isinstance(given, Iterator) else given


class _NoIds:
    """Stands for GRPO's `completion_ids`: a function may take them, but not look at them."""

    def __init__(self, path: str) -> None:
        self.path = path

    def _refuse(self, *_: object) -> Any:
        raise UserError(f"reward.path={self.path} reads completion_ids, and rewards see texts alone; read completions.")

    __iter__ = __len__ = __getitem__ = _refuse


def _binds(signature: inspect.Signature, *args: Any, **names: Any) -> bool:
    try:
        signature.bind(*args, **names)
    except TypeError:
        return False
    return True


def function_at(path: str) -> Callable[..., Any]:
    """What `file.py:function` or `package.module:function` names."""
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise UserError(f"reward.path={path} names no function; {_FORM}.")
    if str(Path.cwd()) not in sys.path:  # a console script does not look there
        sys.path.append(str(Path.cwd()))
    module = _from_file(path, place) if place.endswith(".py") else _from_package(path, place)
    function = getattr(module, name, None)
    if not callable(function):
        own = [n for n, value in vars(module).items() if getattr(value, "__module__", None) == module.__name__]
        known = [n for n in own if callable(getattr(module, n)) and n[0] != "_"]
        near = suggest(name, known)
        raise UserError(f"{place} has no function '{name}'. {near}It has: {', '.join(known) or 'none'}.")
    found: Callable[..., Any] = function
    return found


def _from_file(path: str, place: str) -> ModuleType:
    source = Path(place).expanduser()
    if not source.is_file():
        raise UserError(f"reward.path={path}: there is no file {place!r}; {_FORM}.")
    name = f"reward_path_{source.stem}"  # so that a file may be called random.py
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import would: dataclasses in it look there
    with plainly(f"reward.path={path}"):
        spec.loader.exec_module(module)
    return module


def _from_package(path: str, place: str) -> ModuleType:
    try:
        with plainly(f"reward.path={path}"):
            return importlib.import_module(place)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{place}.".startswith(f"{cause.name}."):
            raise UserError(
                f"reward.path={path}: there is no module '{cause.name}' in the current folder, nor is it installed; "
                f"{_FORM}."
            ) from error
        raise


@contextmanager
def plainly(what: str) -> Iterator[None]:
    """Make what goes wrong in the user's code a `UserError` that names the exception and the line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error)  # str() has the place too
        reason = textwrap.shorten(f"{type(error).__name__}: {said}", 300).rstrip(":")
        place = _line_of(error)
        raise UserError(f"{what} raised {reason}{f' ({place})' if place else ''}.") from error


def _line_of(error: BaseException) -> str:
    """The file and the line of the user's code from which an exception came; nothing where none of it was run."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f"{error.filename}, line {error.lineno}"
    others = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen")
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if not frame.filename.startswith(others)]
    return f"{own[-1].filename}, line {own[-1].lineno}" if own else ""
