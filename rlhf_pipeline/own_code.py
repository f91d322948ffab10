"""A function in a file or package of the user's own: found by its path, its failures said plainly."""

import importlib
import importlib.util
import sys
import sysconfig
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_pipeline.errors import UserError
from rlhf_pipeline.registry import suggest

_FORM = "write it as my_rewards.py:politeness or my_package.my_module:politeness"


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
        raise UserError(f"{what} raised {reason} ({_line_of(error)}).") from error


def _line_of(error: BaseException) -> str:
    """The file and the line of the user's code from which an exception came."""
    if isinstance(error, SyntaxError) and error.filename and Path(error.filename).is_file():
        return f"{error.filename}, line {error.lineno}"
    others = (str(Path(__file__).parent), sysconfig.get_path("stdlib"), sysconfig.get_path("purelib"), "<frozen")
    frames = traceback.extract_tb(error.__traceback__)
    last = ([frame for frame in frames if not frame.filename.startswith(others)] or frames)[-1]
    return f"{last.filename}, line {last.lineno}"
