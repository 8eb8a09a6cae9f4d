"""The notebooks in examples/ run from top to bottom, on a tiny model."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
SMALL = "SETTINGS = dict(samples=4, seq_len=32, epochs=1, eval_windows=2)"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(file, tiny, text, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as tests/conftest.py
    notebook = nbformat.read(file, as_version=4)
    tags = [cell.metadata.get("tags", []) for cell in notebook.cells]
    ours = f"MODEL, TEXT = {str(tiny)!r}, {str(text)!r}\n{SMALL}"
    notebook.cells.insert(tags.index(["parameters"]) + 1, nbformat.v4.new_code_cell(ours))
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": tmp_path}}).execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.execution_count for cell in code) and any(cell.outputs for cell in code)
