"""The notebooks run from top to bottom, at a small size, and use public names only."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("*.ipynb"))


@pytest.mark.real
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(path, monkeypatch):
    monkeypatch.setenv("SCOPE_TOUR_SCALE", "0.35")
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(
        notebook, timeout=900, startup_timeout=300, resources={"metadata": {"path": str(path.parent)}}
    ).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = [data for cell in code for output in cell.outputs if (data := output.get("data"))]
    assert len(shown) >= 8
    assert any("application/vnd.plotly.v1+json" in data for data in shown)
    assert any("<" in data.get("text/html", "") for data in shown)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_stored_without_outputs_and_uses_public_names(path):
    notebook = nbformat.read(path, as_version=4)
    source = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    assert all(not cell.get("outputs") for cell in notebook.cells)
    assert not re.search(r"\b_\w+|\._\w+", source)
