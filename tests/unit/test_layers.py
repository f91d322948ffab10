"""Which module may import which: lower layers know nothing of higher ones, and heavy libraries stay inside."""

import ast
from pathlib import Path

from conftest import ROOT

PACKAGE = ROOT / "rlhf_pipeline"
# A module imports only from those before it (at module level).
LAYERS = [
    ["texts"],
    ["errors", "terminal", "stages.__init__", "stages.STAGES", "stages.Stage", "stages.FOLDERS",
     "stages.POLICIES", "stages.TRAINED"],
    ["processes", "files", "registry", "usage"], ["progress"],
    ["hub", "limits", "models.networks", "models.precision",
     "evaluation.accuracy", "evaluation.metrics", "runs.checkpoints", "runs.lineage"],
    ["data", "models.sampling"],
    ["models", "report"], ["plan"], ["settings"], ["report.cards"], ["runs"],
    ["report.tables", "report.publish", "report.observers", "ppo", "runs.models"],
    ["evaluation", "training"], ["feedback"],
    ["evaluation.frontier"], ["evaluation.algorithms"], ["stages"], ["words"], ["composition"],
    ["report.summary", "sweeps.jobs", "inputs"], ["report.rounds", "sweeps"], ["stages.compare"], ["cli", "plugins"],
]  # fmt: skip
HEIGHT = {module: level for level, layer in enumerate(LAYERS) for module in layer}


def stands(name: str) -> str:
    """The part of the package that a module is counted to."""
    parts = name.removeprefix("rlhf_pipeline.").split(".")
    return ".".join(parts[:2]) if ".".join(parts[:2]) in HEIGHT else parts[0]


def imports(path: Path, everywhere: bool) -> set[str]:
    """Modules that a file imports, at its top or anywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = ast.walk(tree) if everywhere else iter(tree.body)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{name.name}" for name in node.names}
    return found


def test_a_module_imports_only_from_lower_layers() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = stands(".".join(path.relative_to(PACKAGE).with_suffix("").parts))
        if own in ("__init__", "__main__"):
            continue
        assert own in HEIGHT, f"{own} stands in no layer"
        for name in imports(path, everywhere=False):
            other = stands(name) if name.startswith("rlhf_pipeline.") else own
            assert other == own or HEIGHT[other] < HEIGHT[own], f"{path.name} imports {name}"


def test_only_stages_and_ppo_import_trl_and_only_the_command_line_hydra() -> None:
    for path in PACKAGE.rglob("*.py"):
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        roots = {name.split(".")[0] for name in imports(path, everywhere=True)}
        assert "trl" not in roots or own in ("stages", "training", "ppo"), path
        assert not roots & {"hydra", "omegaconf"} or own in ("cli", "composition", "words", "plugins"), path
