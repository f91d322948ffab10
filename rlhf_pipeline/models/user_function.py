"""A reward function in a file or package of the user's own: found by its path, its failures said with their line."""

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

Texts = Sequence[str]


def reward_at(path: str) -> Callable[[Texts, Texts], Any]:
    """The reward function that `path` names, made to take prompts and completions whatever its signature.

    A function that names `completions`, or takes any keyword, is called by keyword, as TRL's GRPO and RLOO do. If it
    cannot read strings, it gets messages, TRL's conversational form. Any other function is called by position.
    """
    function = function_at(path)
    with plainly(f"reward.path={path}"):
        signature = inspect.signature(function)
    any_name = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    names = [n for n in ("prompts", "completions", "completion_ids") if any_name or n in signature.parameters]
    if "completions" not in signature.parameters and _binds(signature, "prompts", "completions"):
        return lambda prompts, completions: _whole(function(prompts, completions))
    if "completions" not in names or not _binds(signature, **dict.fromkeys(names)):
        raise UserError(
            f"reward.path={path} takes {signature}, and there are prompts and completions alone; write "
            "def f(prompts, completions), or def f(completions, **kwargs) as for TRL's GRPO and RLOO."
        )

    def ask(prompts: Sequence[Any], completions: Sequence[Any]) -> Any:
        given = {"prompts": prompts, "completions": completions, "completion_ids": None}
        return _whole(function(**{name: given[name] for name in names}))

    def ask_in_messages(prompts: Texts, completions: Texts) -> Any:
        asked = [[{"role": "user", "content": text}] for text in prompts]
        return ask(asked, [[{"role": "assistant", "content": text}] for text in completions])

    forms = [ask, ask_in_messages]  # until the first call shows which one it reads

    def call(prompts: Texts, completions: Texts) -> Any:
        try:
            found = forms[0](prompts, completions)
            del forms[1:]
        except (TypeError, AttributeError, LookupError):  # the last of an empty answer
            with suppress(Exception):  # the first error is the one to tell
                found = forms[1](prompts, completions)
                del forms[0]
                return found
            raise
        return found

    return call


def _whole(given: Any) -> Any:
    """What a function gave, once a coroutine has been waited for and an iterator run through."""
    given = asyncio.run(given) if inspect.iscoroutine(given) else given
    return list(given) if isinstance(given, Iterator) else given


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
        raise UserError(f"reward.path={path} names no function; write it as my_rewards.py:f or my_package.my_module:f.")
    if str(Path.cwd()) not in sys.path:  # a console script does not look there
        sys.path.append(str(Path.cwd()))
    with plainly(f"reward.path={path}"):
        module = _from_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    function = getattr(module, name, None)
    if not callable(function):
        known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
        raise UserError(
            f"{place} has no function '{name}'. {suggest(name, known)}It has: {', '.join(known) or 'none'}."
        )
    found: Callable[..., Any] = function
    return found


def _from_file(source: Path) -> ModuleType:
    name = f"reward_path_{source.stem}"  # so that a file may be called random.py
    spec = importlib.util.spec_from_file_location(name, source)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import would: dataclasses in it look there
    spec.loader.exec_module(module)
    return module


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
        raise UserError(f"{what} raised {reason}{_line_of(error)}.") from error


def _line_of(error: BaseException) -> str:
    """The last line of the user's own code that an exception came through, as ` (file, line 3)`; or nothing."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f" ({error.filename}, line {error.lineno})"
    others = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen")
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
