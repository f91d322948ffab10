"""Figures that benchmarks keep, and the tables made of them."""

from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from conftest import benchmark

HARDWARE = {"cpu": "Some CPU", "gpu": "Some GPU", "cores": 2}


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    kept = benchmark("kept")
    monkeypatch.setattr(kept, "_asked", lambda: (HARDWARE, {"torch": "2.0"}))
    monkeypatch.setattr(kept, "commit", lambda: "abc")
    return kept


def options(kept: ModuleType, *words: str) -> Namespace:
    parser = ArgumentParser()
    kept.add_options(parser)
    return parser.parse_args(words)


def test_another_run_at_a_commit_adds_to_its_file(kept: ModuleType, tmp_path: Path) -> None:
    for name, value in (("one", 1), ("two", 2), ("one", 3)):
        kept.Kept("speed", options(kept, "--results", str(tmp_path))).add(name, {"n": 5, "value": value})
    (file,) = tmp_path.iterdir()
    assert file.name.startswith("speed-some-cpu-")
    assert file.name.endswith("-abc.json")
    assert {row["name"]: row["value"] for row in kept.rows("speed", tmp_path)} == {"one": 3, "two": 2}
    assert all({"date", "load", "command", "versions", "n"} <= set(row) for row in kept.rows("speed", tmp_path))


def test_the_newest_figure_of_a_machine_counts(
    kept: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for commit, device, value in (("zzz", "cpu", 1), ("abc", "cpu", 2), ("abc", "cuda", 3)):
        monkeypatch.setattr(kept, "commit", lambda commit=commit: commit)
        opened = kept.Kept("speed", options(kept, "--results", str(tmp_path)), device)
        opened.circumstances["date"] = f"2026-01-0{value}"
        opened.add("one", {"n": 1, "value": value})
    assert [row["value"] for row in kept.rows("speed", tmp_path)] == [2, 3]
    text = kept.by_machine(kept.rows("speed", tmp_path), lambda own: kept.table(["x"], [[str(own[0]["value"])]]))
    assert "| 2 |" in text
    assert "Measured on Some GPU; torch 2.0" in text


def test_quick_figures_are_kept_only_where_a_folder_is_named(kept: ModuleType, tmp_path: Path) -> None:
    assert kept.Kept("speed", options(kept, "--quick")).path is None
    assert kept.Kept("speed", options(kept, "--quick", "--results", str(tmp_path))).path.parent == tmp_path
    assert kept.Kept("speed", options(kept)).path.parent == kept.RESULTS


def side(*seconds: float) -> dict[str, Any]:
    return {"seconds": list(seconds), "peak": 2**30, "parts": [{} for _ in seconds]}


def test_ppo_table_pairs_the_rounds(kept: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    import ppo_speed

    work = ppo_speed.asdict(ppo_speed.WORKS["small_b16"])
    sides = {"TRL": side(2, 4, 9), "ours": side(1, 1, 3)}
    row = kept.Kept("ppo", options(kept, "--quick")).add(
        "small", {"n": 3, "work": work, "sides": sides, "gflop": 10.0, "matmul_gflops": 20.0}
    )
    table = ppo_speed.ppo_table([row])
    assert "| ours | 1 | 3.00 (2.00 to 4.00) | 1.00 | 100% | 50% |" in table
    assert "n = 3" in table
