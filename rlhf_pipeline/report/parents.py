"""Where a stage came from: the stages before it, from the first to this one."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf_pipeline.report.files import members, only
from rlhf_pipeline.report.markup import show, text
from rlhf_pipeline.report.words import Words

MOST, DEEPEST = 40, 9  # stages that are looked up; steps by which they are set in


def _stage_of(where: object, runs: Path | None) -> Path | None:
    """The stage's folder that a parent (its model, its labels) lies in; None where that is no stage of ours."""
    if not isinstance(where, str) or not where:
        return None
    for start in (Path(), *([runs.parent] if runs else [])):  # as it was said then, and beside this very run
        path = start / where
        for folder in (path, path.parent):
            if (folder / "run.json").is_file():
                return folder.resolve()
    return None


def _runs(folder: Path, run: Mapping[str, Any]) -> Path | None:
    """The folder of all runs, by where this one lies in it."""
    above, depth = folder.resolve().parents, len(Path(str(run.get("name") or "")).parts)
    return above[depth] if depth < len(above) else None


def lineage(folder: Path, run: Mapping[str, Any], words: Words) -> str:
    """A small tree: each stage after those it was made from, set in by how far it is from the first."""
    lines: list[str] = []
    levels: dict[Path, int] = {}
    runs = _runs(folder, run)

    def visit(place: Path, record: Mapping[str, Any]) -> int:
        if place in levels or len(levels) >= MOST:
            return levels.get(place, 0)
        levels[place], level, taken = 0, 0, []
        for role, made in members(record.get("parents")).items():
            where = members(made).get("path", made)
            before = _stage_of(where, runs)
            if before and before != place:
                level = max(level, visit(before, only(before / "run.json", [])) + 1)
            taken.append(f"{text(role)} {text(f'{before.parent.name}/{before.name}') if before else show(where)}")
        levels[place] = level
        here = f" ({words('this stage')})" if place == folder.resolve() else ""
        data = members(record.get("data"))
        about = [text(Path(str(record.get("name") or "")).name), *([show(data["name"])] if "name" in data else [])]
        about += [f"{words('from')} {', '.join(taken)}"] if taken else []
        told = f'<b>{show(record.get("stage"))}</b>{here} <span class="soft">{" · ".join(about)}</span>'
        lines.append(f'<li class="d{min(level, DEEPEST)}">{told}</li>\n')
        return level

    visit(folder.resolve(), run)
    return f'<ol class="tree">\n{"".join(lines)}</ol>\n' if len(lines) > 1 else ""
