"""Python source as data: which files, where a function's head ends, where a sampled body ends, and what parses."""

import ast
import os
import warnings
from pathlib import Path

import pytest

from rlhf_pipeline.data import load_data
from rlhf_pipeline.data.python_code import functions, goes_on, parses, source_files
from rlhf_pipeline.errors import UserError

MODULE = '''import os

@staticmethod
def name(self) -> dict[str, int]:  # the signature's own comment
    """What it is called.

    On two lines.
    """
    # why
    return {"a": 1,
            "b": 2}

async def wait(self, until=lambda x: x,
               *, or_else="a:b"):
    # a comment first
    @until
    def inner():
        return or_else
# a comment at column 0
    return await inner()

def nothing(self):
    """Only a docstring."""

def later(self): ...

def one_line(): return 1

class A:
    def method(self):
        return 1

def \u00e4(text):
    s = """
at column 0
"""
    return s
'''


def test_functions_at_column_0_are_heads_and_bodies() -> None:
    found = dict(functions(MODULE))
    assert [head.split("(")[0] for head in found] == ["def name", "async def wait", "def \u00e4"]
    name, wait, last = found.items()
    assert name[0].startswith('def name(self) -> dict[str, int]:  # the signature\'s own comment\n    """What')
    assert name[0].endswith('\n    On two lines.\n    """\n')
    assert name[1] == '    # why\n    return {"a": 1,\n            "b": 2}\n'
    assert wait[0] == 'async def wait(self, until=lambda x: x,\n               *, or_else="a:b"):\n'
    assert wait[1].startswith("    # a comment first\n    @until\n    def inner():\n")
    assert wait[1].endswith("\n# a comment at column 0\n    return await inner()\n")
    assert last[1] == '    s = """\nat column 0\n"""\n    return s\n'


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        *((source, []) for source in (
            "def f(:\n", "x = 1\0\n", "def f(): \\\n    return 1\n", 'def f():\n    """a"""; return 1\n',
            "def f():\n    pass\n    ...\n", "def f(" + "a, " * 400 + "):\n    return 1\n")),
        ("def f():\r\n  return 1", [("def f():\n", "  return 1\n")]),
        ('def f():\n  (\n  "a"\n  )\n  return 1\n', [('def f():\n  (\n  "a"\n  )\n', "  return 1\n")]),
    ],
)  # fmt: skip
def test_functions_without_such_parts_are_left_out(source: str, expected: list[tuple[str, str]]) -> None:
    assert functions(source) == expected


HEAD, DOCUMENTED = "def f():\n", 'def f(a):\n    """What it does."""\n'
# A body ends before what stands at column 0, and before an unfinished line. It has a statement that is no bare string.
WHOLE = [
    "    return 1\n\n\n# about g\ndef g(:\n    pass\n",
    "    if a:\n        b()\n# no end\n    return 1\nx y",
    '    s = """\nx y\n"""\n    return s\ny z',
    "    s = r'''\\'''\nx\n'''\ny z",
    "    f(\na,\n)\n    g('(', \"#[\")\n    # it's {\nx y",
    "    a = 1 + \\\n2\n    s = 'b\\\nc'\nx y",
    "    return 1\n)\n",
    "    a\n\fdef g(: pass",
    "    a = 1\n    b = a +",
    "    a = 1\n\n# so\n",
]
BROKEN = ["    a = 1", "", "    s = 'never closed\nx", "def g():\n    pass\n", '    s = """\nx = 1\ndef f(): pass\n']
MORE = ["    return a\n", "    pass\ndef (", "\n    # so\n    return a\n    b ="]
NONE = [
    "", "\n\n", "    # a comment\n", "    'another string'\n", "x = 1\n", "return a\n", "    return (a\nb\n",
    "    return a\n      b\n", "        return a\n", "    return a\0\n", "    '\ud800'; a\n", "    print a\n",
    "    a = " + "(" * 300 + ")" * 300 + "\n", "    " + "-" * 100_000 + "1\n", "    " + "a." * 100_000 + "b\n",
]  # fmt: skip


@pytest.mark.parametrize(
    ("head", "completion", "expected"),
    [(head, completion, expected)
     for head, texts, expected in ((HEAD, WHOLE, True), (HEAD, BROKEN, False), (DOCUMENTED, MORE, True),
                                   (DOCUMENTED, NONE, False))
     for completion in texts],
)  # fmt: skip
def test_a_body_that_is_whole_and_does_something_parses(head: str, completion: str, expected: bool) -> None:
    assert parses(head, completion) is expected


def test_parsing_runs_nothing_and_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert parses("def f():\n", "    return '\\d' is 1\n")
        assert parses("def f(a=exit()):\n", "    import os; os.abort()\n")
    assert capfd.readouterr() == ("", "")


def test_the_whole_standard_library_goes_there_and_back() -> None:
    files = dict(source_files(None))
    assert len(files) > 300
    assert "json/decoder.py" in files
    folders = {folder for name in files for folder in name.split("/")[:-1]}
    assert not folders & {"test", "tests", "idle_test", "site-packages", "pydoc_data", "encodings"}
    found = [pair for text in files.values() for pair in functions(text)]
    assert len(found) > 2000
    for head, body in found:
        assert [type(node).__name__.endswith("FunctionDef") for node in ast.parse(head + body).body] == [True]
        assert head.startswith(("def ", "async def "))
        assert head.endswith("\n")
    assert all(parses(head, f"{body}\n\n# next\nx = = 1\n") for head, body in found[::10])


def test_a_folder_of_ones_own(tmp_path: Path) -> None:
    folder = tmp_path / "src"
    for name in ("b.py", "a/c.py", "tests/d.py", ".venv/e.py", "site-packages/f.py", "a/__pycache__/g.py", "h.pyi"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"{name[:1]} = '{name}'\n")
    (folder / "i.py").write_bytes("# coding: latin-1\ni = 'ü'\n".encode("latin-1"))
    (folder / "j.py").write_text(" \n")
    (folder / "k.py").write_bytes((folder / "b.py").read_bytes())
    (folder / "m.py").mkdir()
    outside = tmp_path / "outside.py"
    outside.write_text("secret = 1\n")
    (folder / "o.py").symlink_to(outside)
    found = list(source_files(folder))
    assert [name for name, _ in found] == ["a/c.py", "b.py", "i.py", "tests/d.py"]
    assert found[2][1] == "# coding: latin-1\ni = 'ü'\n"
    splits = load_data({"name": "python_code", "path": str(folder)}, seed=0)
    assert {row.text for row in (*splits.train, *splits.test)} == {text for _, text in found}


def test_what_cannot_be_read_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.py").write_bytes(b"a = '\xff'\n")
    (tmp_path / "b.py").write_text("# coding: no-such\n")
    (tmp_path / "c.py").write_text("# coding: rot13\n")
    (tmp_path / "d.py").write_text("d = 1\n")
    os.symlink(tmp_path / "gone.py", tmp_path / "e.py")
    os.symlink(tmp_path / "f.py", tmp_path / "f.py")
    os.mkfifo(tmp_path / "g.py")
    (tmp_path / "h.py").write_text("# coding: unicode_escape\nh = '\\ud83d'\n")
    (tmp_path / "i.py").write_bytes(b"i = 1\n" * 2_000_000)
    assert [name for name, _ in source_files(tmp_path)] == ["d.py"]
    assert "8 files cannot be read and are skipped, such as a.py" in caplog.text
    (tmp_path / "d.py").unlink()
    for path in (tmp_path, tmp_path / "a.py", tmp_path / "gone"):
        with pytest.raises(UserError, match=r"no Python source that can be read; give a folder of .py files"):
            source_files(path)


@pytest.mark.parametrize(
    ("prompt", "completion", "expected"),
    [
        ("def f(a):\n", "    return a\n\nprint(", True),
        ("def f(a):\n", "return a\n", False),
        ("def f(a):", "\n    return a\n", True),
        ("def f(a):", "\nreturn a\n", False),
        ("def f(a):", " return a\n", True),
        ('def f(a):\n    """Say so."""\n', "    return a\n", True),
        ('def f(a):\n    """Say so."""\n', "", False),
        ("x = 1\n", "y = 2\nz = (", True),
        ("x = 1\n", "y = = 2\n", False),
        ("x = 1\n", "y = 2", False),
        ("So ", "= 2\n", True),
        ("So ", "what?\n", False),
    ],
)
def test_what_goes_on_as_python(prompt: str, completion: str, expected: bool) -> None:
    assert goes_on(prompt, completion) is expected
