"""Shared by the tests: the command line as a function, a miniature run, and real data if there is some."""

import csv
import importlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

# The command line sets the same. This must come before the libraries are imported.
os.environ.update(
    HYDRA_FULL_ERROR="1", HF_HUB_DISABLE_TELEMETRY="1", TRL_EXPERIMENTAL_SILENCE="1", TRANSFORMERS_VERBOSITY="error"
)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models here are too small for several threads

ROOT = Path(__file__).parents[1]
CommandLine = Callable[..., int]
Refused = Callable[[str], str]


def benchmark(name: str) -> ModuleType:
    """Import a script of tests/benchmarks. These scripts import each other by name."""
    if (folder := str(ROOT / "tests" / "benchmarks")) not in sys.path:
        sys.path.append(folder)
    return importlib.import_module(name)


def jsonl(path: Path, *rows: object) -> Path:
    """Write JSON lines, of any values."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def sheet(path: Path, *rows: dict[str, Any]) -> Path:
    """Write CSV or TSV as Label Studio does: sorted columns, all text quoted, lists and objects as JSON."""
    with path.open("w", newline="", encoding="utf-8") as file:
        names = sorted({key for row in rows for key in row})
        mark = "\t" if path.suffix == ".tsv" else ","
        writer = csv.DictWriter(file, names, quoting=csv.QUOTE_NONNUMERIC, delimiter=mark)
        writer.writeheader()
        for row in rows:
            cells = {k: json.dumps(v, ensure_ascii=False) if isinstance(v, list | dict) else v for k, v in row.items()}
            writer.writerow(cells)
    return path


def read_words(*typed: str) -> list[str]:
    """Return a command line in Hydra's grammar: settings first, then options."""
    from rlhf_pipeline.words import as_words, read_command_line

    settings, options = read_command_line(typed)
    return [*settings, *as_words(options)]


def settings_of(*typed: str) -> Any:
    """Return the settings that a command line gives."""
    from rlhf_pipeline import composition

    return composition.settings_of(read_words(*typed))


def once(*words: str) -> list[str]:
    """Return settings, the last of each key: a command line takes each once."""
    return [*{word.lstrip("+").partition("=")[0]: word for word in words}.values()]


def change(path: Path, **values: object) -> None:
    """Set values of a file of JSON or YAML."""
    path.write_text(json.dumps({**yaml.safe_load(path.read_text()), **values}))


def cut_off(folder: Path) -> None:
    """Leave a finished stage as a kill would: no model, its newest checkpoint half-written, rows beyond it logged."""
    shutil.rmtree(folder / "model")
    newest = max(folder.glob("checkpoints/checkpoint-*"), key=lambda path: int(path.name.rpartition("-")[2]))
    (newest / "complete").unlink()
    change(folder / "run.json", status="running")


def logged(folder: Path) -> list[dict[str, Any]]:
    """Return what a stage has logged, without the clock."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


# The demo at a size that takes seconds.
MINIATURE = (
    "data.limit=300",
    "policy.vocabulary=400",
    # The result must not depend on how a batch is split. In native bf16 it would. And with Adam's default epsilon, a
    # gradient that is only rounding error would cause a full step.
    *(f"++stages.{stage}.trainer.bf16=false" for stage in ("pretrain", "sft", "reward", "ppo")),
    *(f"++stages.{stage}.trainer.adam_epsilon=1e-5" for stage in ("pretrain", "sft", "reward", "ppo")),
    "++stages.pretrain.trainer.num_train_epochs=1",
    "++stages.pretrain.trainer.save_steps=4",
    "++stages.pretrain.trainer.logging_steps=2",
    "++stages.sft.data.limit=200",
    "++stages.sft.trainer.save_steps=2",
    "++stages.sft.trainer.logging_steps=1",
    "++stages.reward.trainer.num_train_epochs=1",
    "++stages.reward.trainer.save_steps=4",
    "++stages.reward.trainer.logging_steps=2",
    "++stages.ppo.trainer.total_episodes=96",
    "++stages.ppo.trainer.per_device_train_batch_size=8",
    "++stages.ppo.trainer.response_length=8",
    "++stages.ppo.trainer.save_steps=2",
    "evaluate.prompts=24",
)


@pytest.fixture(scope="session")
def command_line() -> CommandLine:
    """Run `rlhf_pipeline ARGS` in this process and the current folder; returns the exit status."""
    from rlhf_pipeline import cli

    def call(*args: str) -> int:
        before, sys.argv = sys.argv, ["rlhf_pipeline", *args]
        try:
            cli.main()
        except SystemExit as leaving:
            return int(leaving.code or 0)
        finally:
            sys.argv = before
        return 0

    return call


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(command_line: CommandLine, workplace: Path, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Run a command that must be refused, in an empty folder; returns its error message."""

    def call(asked: str) -> str:
        assert command_line(*shlex.split(asked)) == 2
        said = str(capsys.readouterr().err)
        assert "Traceback" not in said
        return said

    return call


@pytest.fixture(scope="session")
def miniature(tmp_path_factory: pytest.TempPathFactory, command_line: CommandLine) -> Path:
    """The folder of a finished miniature run of the demo. Tests that change it must copy it first."""
    folder, before = tmp_path_factory.mktemp("miniature"), Path.cwd()
    os.chdir(folder)
    try:
        assert command_line("stage=pipeline", *MINIATURE) == 0
    finally:
        os.chdir(before)
    return folder / "runs" / "demo"


@pytest.fixture
def run(miniature: Path, workplace: Path) -> Path:
    """A copy of the miniature run in the current folder."""
    return Path(shutil.copytree(miniature, workplace / "runs" / "demo"))


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data that RLHF_SHARED names; without it the test is skipped."""
    folder = os.environ.get("RLHF_SHARED")
    if not folder:
        pytest.skip("RLHF_SHARED is not set to a folder of real data")
    return Path(folder)


@pytest.fixture(scope="session")
def hub(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Environment variables with which a process uses a stand-in for the hub, on loopback."""
    root = tmp_path_factory.mktemp("hub")
    make = [sys.executable, str(shared / "hub" / "make_root.py"), str(root), str(shared / "data")]
    environment = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    made = subprocess.run(make, capture_output=True, text=True, env={**environment, "HUB_WIDTH": "48"}, check=False)
    assert made.returncode == 0, made.stderr
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with (root / "requests.log").open("w") as log:
        server = subprocess.Popen([sys.executable, str(shared / "hub" / "hub.py"), str(root), str(port)], stderr=log)
        try:
            for _ in range(100):
                with socket.socket() as probe:
                    if probe.connect_ex(("127.0.0.1", port)) == 0:
                        break
                time.sleep(0.1)
            home = tmp_path_factory.mktemp("hf_home")
            yield {
                **environment,
                "HF_ENDPOINT": f"http://127.0.0.1:{port}",
                "HF_HOME": str(home),
                "REQUESTS_LOG": str(root / "requests.log"),
            }
        finally:
            server.terminate()
            server.wait()
