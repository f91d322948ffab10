"""Where the benchmarks keep their figures: results/<what>-<machine>-<commit>.json, a file for each machine and commit.

A file holds named figures. Each says how it was measured (date, load, versions, command), because another run at the
same commit adds its figures to the file. `rows` reads them back, and a benchmark's own `*_table(rows)` makes Markdown
of them, for the terminal and for READMEs.
"""

import json
import os
import re
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

from rlhf_pipeline.files import read_json, write_json

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"
Row = dict[str, Any]


def add_options(parser: ArgumentParser) -> None:
    """`--results`, and `--quick`, whose figures are kept only if a folder is named."""
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: does the benchmark work?")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}; with --quick none")


class Kept:
    """The file of one benchmark on this machine; its circumstances are those of the moment it is opened."""

    def __init__(self, what: str, asked: Namespace, device: str = "cpu") -> None:
        """`asked`: what `add_options` gave. `device`: the machine's name is that of its GPU, unless this is cpu."""
        hardware, versions = _asked()
        self.gpu, cores = hardware["gpu"], len(os.sched_getaffinity(0))  # those that this process may use
        self.machine = self.gpu if self.gpu and device != "cpu" else f"{hardware['cpu']}, {cores} cores"
        self.circumstances: Row = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "load": round(os.getloadavg()[0], 2),
            "cpu": hardware["cpu"],
            "cores": cores,
            "gpu": self.gpu,
            "versions": versions,
            "command": " ".join(["python", *sys.argv]),
        }
        slug = re.sub(r"[^a-z0-9]+", "-", self.machine.lower()).strip("-")
        self.commit = commit()
        folder = asked.results or (None if asked.quick else RESULTS)
        self.path: Path | None = folder and folder / f"{what}-{slug}-{self.commit}.json"
        if self.circumstances["load"] > cores / 2:
            say(
                f"the machine is busy (load {self.circumstances['load']} on {cores} cores): these figures will be rough"
            )

    def add(self, name: str, figures: Row) -> Row:
        """Keep figures by name, in place of those of an earlier run at this commit; they come back as a row."""
        row = {**self.circumstances, **figures}
        of = {"machine": self.machine, "commit": self.commit}
        if self.path:
            before = read_json(self.path).get("figures", {})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**of, "figures": {**before, name: row}})
        return {"name": name, **of, **row}


def _asked() -> tuple[Row, Row]:
    """Hardware and versions, asked for in a process of its own, so that this one leaves the card alone."""
    ask = "import json; from rlhf_pipeline.runs import lineage as l; print(json.dumps([l.hardware(), l.versions()]))"
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", ask], capture_output=True, text=True, check=True, env={**os.environ, "PYTHONPATH": paths}
    )
    hardware, versions = json.loads(done.stdout)
    return hardware, versions


def rows(what: str, folder: Path = RESULTS) -> list[Row]:
    """A benchmark's kept figures; see `rows_of`."""
    return rows_of(map(read_json, sorted(folder.glob(f"{what}-*.json"))))


def rows_of(files: Iterable[Row]) -> list[Row]:
    """The figures in files of one benchmark: of each machine and name the newest, in the order of measurement."""
    every = [
        {"name": name, "machine": file["machine"], "commit": file["commit"], **figures}
        for file in files
        for name, figures in file["figures"].items()
    ]
    newest = {(row["machine"], row["name"]): row for row in sorted(every, key=lambda row: str(row["date"]))}
    return list(newest.values())


def commit() -> str:
    """The commit of this checkout, abbreviated; `-dirty` after it where a file differs from it."""
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A table in Markdown."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def by_machine(found: Sequence[Row], make: Callable[[Sequence[Row]], str]) -> str:
    """`make(rows)` for each machine, with a line below that says what was measured, where and when."""
    parts = []
    for machine in dict.fromkeys(row["machine"] for row in found):
        own = [row for row in found if row["machine"] == machine]
        parts += [make(own), f"Measured on {machine}; {'; '.join(dict.fromkeys(map(_how, own)))}."]
    return "\n\n".join(parts)


def _how(row: Row) -> str:
    of = ", ".join(f"{name} {row['versions'].get(name, 'none')}" for name in ("torch", "transformers", "trl"))
    return f"{of}, commit {row['commit']}, {row['date'][:10]}, load {row['load']} at the start, n = {row['n']}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """A median and its range: `2.18 (2.10 to 2.31)`."""
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least} to {most})"


def say(what: str) -> None:
    """Progress, apart from the tables."""
    print(what, file=sys.stderr, flush=True)
