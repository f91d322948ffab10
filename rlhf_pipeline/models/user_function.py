"""Load a reward function from a file or package of the user, and report its errors with file and line."""

import importlib
import importlib.util
import inspect
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import did_you_mean

Texts = Sequence[str]


def accepted_arguments(function: Callable[..., Any], named: Mapping[str, Any], placed: int = 2) -> dict[str, Any]:
    """Return the part of `named` that a function takes by keyword, if its first `placed` parameters go by position."""
    parameters = [*inspect.signature(function).parameters.values()]
    filled = {p.name for p in parameters[:placed] if p.kind is p.POSITIONAL_OR_KEYWORD}
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters)
    names = {p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    return {name: value for name, value in named.items() if name not in filled and (any_name or name in names)}


def load_function(path: str) -> tuple[Callable[..., Any], list[str]]:
    """Return the reward function at `path`, as f(prompts, completions, **columns), and the columns that it needs.

    A function that names `completions`, or takes any keyword, is called by keyword, as TRL's GRPO and RLOO do. If it
    cannot read strings, it gets messages, TRL's conversational form. Any other function gets prompts and completions
    by position. All its other arguments are columns of the data set.
    """
    function = _function_at(path)
    with explain_user_errors(f"reward.path={path}"):
        signature = inspect.signature(function)
    parameters, given = signature.parameters, ["prompts", "completions", "completion_ids"]
    any_name = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    by_place = "completions" not in parameters
    try:
        signature.bind_partial(None, None)
    except TypeError:
        by_place = False
    if by_place:
        given = [*parameters][:2]
    elif "completions" not in parameters and not any_name:
        raise UserError(
            f"reward.path={path} has the signature {signature}, without completions; write "
            "def f(prompts, completions), or def f(completions, **kwargs) as for TRL's GRPO and RLOO."
        )
    own = [p for p in parameters.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    needs = [p.name for p in own if p.default is p.empty and p.name not in given]

    def ask(prompts: Sequence[Any], completions: Sequence[Any], columns: Mapping[str, Any]) -> Any:
        if by_place:
            found = function(prompts, completions, **accepted_arguments(function, columns))
        else:
            named = {**columns, "prompts": prompts, "completions": completions, "completion_ids": None}
            found = function(**accepted_arguments(function, named, placed=0))
        if inspect.iscoroutine(found):
            import asyncio  # slow to import, and few functions need it

            found = asyncio.run(found)
        return list(found) if isinstance(found, Iterator) else found

    def ask_in_messages(prompts: Texts, completions: Texts, columns: Mapping[str, Any]) -> Any:
        asked = [[{"role": "user", "content": text}] for text in prompts]
        return ask(asked, [[{"role": "assistant", "content": text}] for text in completions], columns)

    # The first call shows which form the function reads.
    forms = [ask] if by_place else [ask, ask_in_messages]

    def call(prompts: Texts, completions: Texts, /, **columns: Any) -> Any:
        with explain_user_errors(f"reward=python reward.path={path}"):
            try:
                found = forms[0](prompts, completions, columns)
                del forms[1:]
            except (TypeError, AttributeError, LookupError):  # the last: it indexed an empty answer
                with suppress(Exception):  # if both fail, the first error is reported
                    found = forms[1](prompts, completions, columns)
                    del forms[0]
                    return found
                raise
            return found

    return call, needs


def _function_at(path: str) -> Callable[..., Any]:
    """Return the function at `file.py:function` or `package.module:function`."""
    place, _, name = path.rpartition(":")
    if not place or not name:
        raise UserError(f"reward.path={path} names no function; write it as my_rewards.py:f or my_package.my_module:f.")
    if str(Path.cwd()) not in sys.path:  # a console script does not have it there
        sys.path.append(str(Path.cwd()))
    with explain_user_errors(f"reward.path={path}"):
        module = _from_file(Path(place).expanduser()) if place.endswith(".py") else importlib.import_module(place)
    function: Any = getattr(module, name, None)
    if callable(function):
        return function
    known = [n for n, v in vars(module).items() if callable(v) and getattr(v, "__module__", "") == module.__name__]
    raise UserError(
        f"{place} has no function '{name}'. {did_you_mean(name, known)}It has: {', '.join(known) or 'none'}."
    )


def _from_file(source: Path) -> ModuleType:
    name = f"reward_path_{source.stem}"  # the prefix lets a file be called random.py
    spec: Any = importlib.util.spec_from_file_location(name, source)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # as an import does: its dataclasses look there
    spec.loader.exec_module(module)
    return module


@contextmanager
def explain_user_errors(what: str) -> Iterator[None]:
    """Turn errors in the user's code into a `UserError` that names the exception and the line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        said = error.msg if isinstance(error, SyntaxError) else str(error)  # str() would repeat the place
        reason = textwrap.shorten(f"{type(error).__name__}: {said}", 300).rstrip(":")
        raise UserError(f"{what} raised {reason}{_line_of(error)}.") from error


def _line_of(error: BaseException) -> str:
    """Return the last line of the user's own code in an exception's traceback, as ` (file, line 3)`, or nothing."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f" ({error.filename}, line {error.lineno})"
    others = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen")
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(others)]
    return f" ({own[-1].filename}, line {own[-1].lineno})" if own else ""
