"""Python source as data: the files of a folder, their functions as (head, body), and whether a body parses.

This module never runs the code that it reads.
"""

import ast
import logging
import os
import re
import sysconfig
import warnings
from fnmatch import fnmatch
from importlib.util import decode_source
from pathlib import Path

from rlhf_pipeline.data.plain_rows import LARGEST_ROW, checked, content
from rlhf_pipeline.errors import UserError

_LOG = logging.getLogger(__name__)
# Installed, compiled and hidden files (.git, .venv) are not the folder's own source.
_NEVER = ("site-packages", "dist-packages", "__pycache__", ".*")
# Left out of the standard library: its tests, which are as long as all the rest, and files that are generated or differ
# between machines. encodings is a hundred tables with the same four functions; pydoc_data is the manual as one dict.
_NOT_OF_LIBRARY = (
    "test", "tests", "idle_test", "config-*", "encodings", "pydoc_data",
    "_sysconfigdata*", "sitecustomize.py", "usercustomize.py", "html/entities.py",
)  # fmt: skip
_LONGEST_HEAD = 1000  # characters
_AT_COLUMN_0 = re.compile(r"^\f*[^\s#]", re.MULTILINE)


def source_files(folder: Path | None) -> list[tuple[str, str]]:
    """Return (relative name, text) of a folder's Python files, by name. None means Python's standard library.

    Empty files, exact duplicates, links that lead out of the folder and files that cannot be decoded are left out.
    """
    root = Path(sysconfig.get_path("stdlib")) if folder is None else folder
    unwanted = _NEVER if folder else (*_NEVER, *_NOT_OF_LIBRARY)
    names = []
    for here, folders, files in os.walk(root):  # does not follow linked folders
        folders[:] = [name for name in folders if not any(fnmatch(name, pattern) for pattern in unwanted)]
        names += [(Path(here) / name).relative_to(root).as_posix() for name in files if name.endswith(".py")]
    found: dict[str, str] = {}
    unreadable = []
    for name in sorted(name for name in names if not any(fnmatch(name, pattern) for pattern in unwanted)):
        path = root / name
        try:
            text = _source(path) if path.resolve().is_relative_to(root.resolve()) else ""
        except (OSError, RuntimeError, SyntaxError, LookupError, ValueError, UserError):
            unreadable.append(name)  # not a file, a link to itself, or an unknown or wrong encoding
            continue
        if text.strip():
            found.setdefault(text, name)
    if unreadable:
        _LOG.warning("%s: %d files cannot be read and are skipped, such as %s.", root, len(unreadable), unreadable[0])
    if not found:
        raise UserError(
            f"{root} has no Python source that can be read; give a folder of .py files, or leave out data.path= for "
            "Python's standard library."
        )
    return [(name, text) for text, name in found.items()]


def _source(path: Path) -> str:
    """Decode a file by its own coding cookie."""
    text = decode_source(content(path, LARGEST_ROW))
    if why := checked(text)[1]:
        raise ValueError(why)
    return text


def functions(source: str) -> list[tuple[str, str]]:
    """Return (head, body) of each function that starts at column 0.

    The head is the lines of the signature and docstring, without decorators; the body is the lines that follow.
    head + body is the file's own text, and parses. Functions are left out if their head has more than 1,000 characters,
    if their body does nothing, or if they are on one line.
    """
    source = source.replace("\r\n", "\n").replace("\r", "\n")  # `ast` ends a line only at "\n"
    tree = _parsed(source)
    lines = [line + "\n" for line in source.split("\n")]
    nodes = [node for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)] if tree else []
    return [pair for pair in (_cut(node, lines) for node in nodes) if pair and len(pair[0]) <= _LONGEST_HEAD]


def _cut(node: ast.FunctionDef | ast.AsyncFunctionDef, lines: list[str]) -> tuple[str, str] | None:
    documented = _is_string(node.body[0])
    statements = node.body[documented:]
    if all(isinstance(s, ast.Pass | ast.Expr) and ast.unparse(s) in ("pass", "...") for s in statements):
        return None
    own = lines[node.lineno - 1 : node.end_lineno]
    decorators = getattr(statements[0], "decorator_list", [])
    size = most = min(part.lineno for part in (statements[0], *decorators)) - node.lineno
    if documented:
        size = (node.body[0].end_lineno or 0) - node.lineno + 1
    while not documented and size > 0 and re.match(r"\s*(#|$)", own[size - 1]):
        size -= 1  # comments before the first statement belong to the body
    if not 0 < size <= most or own[size - 1].endswith("\\\n"):
        return None
    return "".join(own[:size]), "".join(own[size:])


def parses(head: str, completion: str) -> bool:
    """Return whether a function's head and a completion are valid Python, and the completion adds a statement.

    The body ends before the first line at column 0 that is not a comment and not in a string or bracket. If the text
    ends first, an unfinished last line is left out. A bare string does not count as a statement, because a docstring
    does nothing.
    """
    text = completion.replace("\r\n", "\n").replace("\r", "\n")
    ends = [match.start() for match in _AT_COLUMN_0.finditer(text)]
    for end in (*ends, text.rfind("\n") + 1):
        if tree := _parsed(head + text[:end]):
            own = (node for node in ast.walk(tree) if isinstance(node, ast.stmt) and node.lineno > head.count("\n"))
            return not all(map(_is_string, own))
    return False


def goes_on(prompt: str, completion: str) -> bool:
    """Return whether a completion is Python: a function's body after its head, else more lines of a file.

    If the prompt is not Python, only the completion is checked. The last line counts only if it has a line break.
    """
    if completion.startswith("\n") and not prompt.endswith("\n"):
        prompt, completion = f"{prompt}\n", completion[1:]
    if _parsed(prompt) is None and _parsed(f"{prompt}    pass\n"):
        return parses(prompt, completion)
    if prompt.rstrip().endswith(('"""', "'''")) and re.match(r"(async )?def ", prompt):  # its body is a docstring
        return parses(prompt, completion)
    before = prompt if _parsed(prompt) else ""
    lines = completion[: completion.rfind("\n") + 1]
    return bool(lines.strip()) and _parsed(before + lines) is not None


def _parsed(text: str) -> ast.Module | None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about "\d" and the like, which the parser would print
            return ast.parse(text)
    except (SyntaxError, ValueError, RecursionError, MemoryError):  # null bytes, lone surrogates, nesting too deep
        return None


def _is_string(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
