"""Stores the benchmarks' figures in results/<what>-<machine>-<commit>.json, one file per machine and commit.

A file contains named figures. Each records how it was measured (date, load, versions, command), because another run at
the same commit adds its figures to the file. `rows_of` reads them back. A benchmark's own `*_table(rows)` turns them
into Markdown, for the terminal and for READMEs.
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
    """Add `--results`, and `--quick`, whose figures are kept only with `--results`."""
    parser.add_argument("--quick", action="store_true", help="tiny shapes, few rounds: only checks that it works")
    parser.add_argument("--results", type=Path, help=f"default: {RESULTS.relative_to(ROOT)}; with --quick none")


class Kept:
    """The results file of one benchmark on this machine. Its circumstances are those when it is opened."""

    def __init__(self, what: str, asked: Namespace, device: str = "cpu") -> None:
        """`asked`: the parsed options of `add_options`. The machine is named by its GPU, unless `device` is cpu."""
        hardware, versions = _asked()
        self.gpu, cores = hardware["gpu"], len(os.sched_getaffinity(0))  # that this process may use
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
        if (load := self.circumstances["load"]) > cores / 2:
            say(f"the machine is busy (load {load} on {cores} cores): these figures are imprecise")

    def add(self, name: str, figures: Row) -> Row:
        """Keep figures by name; they replace those of an earlier run at this commit. Returns them as a row."""
        row = {**self.circumstances, **figures}
        of = {"machine": self.machine, "commit": self.commit}
        if self.path:
            before = read_json(self.path).get("figures", {})
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, {**of, "figures": {**before, name: row}})
        return {"name": name, **of, **row}


def _asked() -> tuple[Row, Row]:
    """Read hardware and versions in a new process, so that this one does not open the GPU."""
    ask = "import json; from rlhf_pipeline.runs import lineage as l; print(json.dumps([l.hardware(), l.versions()]))"
    done = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True, check=True, env=environment())
    hardware, versions = json.loads(done.stdout)
    return hardware, versions


def environment(*folders: Path) -> dict[str, str]:
    """Return the environment of a process that imports from this checkout, installed or not, and from folders."""
    paths = [*map(str, (ROOT, *folders)), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def rows_of(files: Iterable[Row]) -> list[Row]:
    """Return the newest figures for each machine and name in one benchmark's files, in order of measurement."""
    every = [
        {"name": name, "machine": file["machine"], "commit": file["commit"], **figures}
        for file in files
        for name, figures in file["figures"].items()
    ]
    newest = {(row["machine"], row["name"]): row for row in sorted(every, key=lambda row: str(row["date"]))}
    return list(newest.values())


def commit() -> str:
    """Return the abbreviated commit of this checkout, with `-dirty` if a file differs from it."""
    ask = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude", "*"]
    try:
        return subprocess.run(ask, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def table(header: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def by_machine(make: Callable[[Sequence[Row]], str]) -> Callable[[Sequence[Row]], str]:
    """Decorate a table: one per machine, with a line below that says where, when and with which versions."""

    def every(found: Sequence[Row]) -> str:
        parts = []
        for machine in dict.fromkeys(row["machine"] for row in found):
            own = [row for row in found if row["machine"] == machine]
            parts += [make(own), f"Measured on {machine}; {'; '.join(dict.fromkeys(map(_how, own)))}."]
        return "\n\n".join(parts)

    return every


def _how(row: Row) -> str:
    of = ", ".join(f"{name} {row['versions'].get(name, 'none')}" for name in ("torch", "transformers", "trl"))
    return f"{of}, commit {row['commit']}, {row['date'][:10]}, load {row['load']} at the start, n = {row['n']}"


def spread(values: Sequence[float], digits: int = 2) -> str:
    """A median and its range: `2.18 (2.10 to 2.31)`."""
    middle, least, most = (f"{value:.{digits}f}" for value in (median(values), min(values), max(values)))
    return middle if least == most else f"{middle} ({least} to {most})"


def say(what: str) -> None:
    """Print progress to stderr; the tables go to stdout."""
    print(what, file=sys.stderr, flush=True)
