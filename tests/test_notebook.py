"""The notebook of the documentation runs from its first cell to its last, and holds nothing of a former run."""

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).resolve().parent.parent / "docs" / "notebooks" / "first_steps.ipynb"


def test_the_notebook_runs(tmp_path: Path, monkeypatch) -> None:
    # Of the kernel, too.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in cells)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    told = [
        output.data["text/plain"] for cell in cells for output in cell.outputs if output.output_type == "execute_result"
    ]
    shown = [output for cell in cells for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(shown) == 3
    errors = re.findall(r"[\d.]+%", told[-1])
    assert told[-1].strip("'").startswith("EER ")
    # The scores that it computes itself are those of the command.
    assert errors[0] == errors[1]
