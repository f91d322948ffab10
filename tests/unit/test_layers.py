"""Which module may import which: lower layers know nothing of higher ones, and heavy libraries stay inside."""

import ast
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "rlhf_pipeline"
# A module imports only from those before it (at module level).
LAYERS = [
    ["errors", "scripts"], ["launch", "atomic", "networks"], ["progress"],
    ["registry", "hub", "metrics", "sampling", "precision", "processes", "checkpoints", "reward_model", "limits",
     "lineage", "adapters"],
    ["data", "likelihood", "scorer", "own_code", "report", "trackers"],
    ["policies", "rewards", "plan"], ["settings"], ["cards"], ["rundir"],
    ["tables", "ppo", "made", "publish", "together"], ["evaluation", "feedback"], ["frontier"],
    ["stages"], ["plain_words", "arguments"], ["summary", "jobs"], ["rounds", "sweeps"], ["cli", "plugins"],
]  # fmt: skip


def imports(path: Path, everywhere: bool) -> set[str]:
    """Modules that a file imports, at its top or anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= (
                {f"{node.module}.{name.name}" for name in node.names}
                if node.module == "rlhf_pipeline"
                else {node.module}
            )
    return found


def test_a_module_imports_only_from_lower_layers() -> None:
    height = {module: level for level, layer in enumerate(LAYERS) for module in layer}
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        if own in ("__init__", "__main__"):
            continue
        assert own in height, f"{own} stands in no layer"
        for name in imports(path, everywhere=False):
            other = name.split(".")[1] if name.startswith("rlhf_pipeline.") else own
            assert other == own or height[other] < height[own], f"{path.name} imports {name}"


def test_only_stages_and_ppo_import_trl_and_only_the_command_line_hydra() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        roots = {name.split(".")[0] for name in imports(path, everywhere=True)}
        assert "trl" not in roots or own in ("stages", "ppo"), path
        assert not roots & {"hydra", "omegaconf"} or own in ("cli", "arguments", "plugins"), path
