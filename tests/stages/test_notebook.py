"""The notebook of the demo: it runs from top to bottom, offline, in miniature."""

import json
import sys
from html import unescape
from pathlib import Path

import pytest
from conftest import MINIATURE, ROOT

NOTEBOOK = ROOT / "tests" / "notebooks" / "demo.ipynb"


def test_no_output_is_kept() -> None:
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    ran = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(ran) > 5
    assert not [cell["id"] for cell in ran if cell["outputs"] or cell["execution_count"] is not None]


@pytest.mark.slow
def test_it_runs_from_top_to_bottom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="pip install -e '.[notebook]'")
    import nbformat

    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_DATA_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))  # nothing in the home folder
    monkeypatch.setenv("SIZE", " ".join(MINIATURE))
    monkeypatch.delenv("LAUNCH", raising=False)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # a kernel need not have the Python of its environment there
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    client = nbclient.NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()

    run = tmp_path / "runs" / "demo"
    for stage in ("pretrain", "sft", "reward", "ppo", "evaluate"):
        record = json.loads((run / stage / "run.json").read_text())
        assert record["status"] == "done"
        assert record["versions"]["python"] == sys.version.split()[0]
    evaluation = json.loads((run / "evaluate" / "evaluation.json").read_text())
    shown = {cell["id"]: cell for cell in notebook.cells}
    table = shown["table"]["outputs"][0]["data"]["text/html"]
    for name, row in evaluation["metrics"].items():
        assert f"<th>{name}</th>" in table
        assert f"<td>{round(row['reward_mean'], 3):.3f}</td>" in table
    answers = unescape(shown["answers"]["outputs"][0]["data"]["text/html"])
    for sample in evaluation["samples"][:8]:
        assert sample["prompt"] in answers
        assert all(said.strip() in answers for said in sample["responses"].values())
    page = unescape(shown["report"]["outputs"][0]["data"]["text/html"])
    assert (run / "ppo" / "report.html").read_text(encoding="utf-8") in page
