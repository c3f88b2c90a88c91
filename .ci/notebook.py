"""Runs docs/first-fine-tune.ipynb in a new folder, and writes it again with what its cells show."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

from tunesmith.machine.backend import cache_folder

NOTEBOOK = Path(__file__).parents[1] / "docs" / "first-fine-tune.ipynb"


def executed(folder: Path, parameters: str | None = None) -> NotebookNode:
    """The notebook with the outputs of a run in ``folder``. ``parameters``: another source for the cell with
    this tag. Raises CellExecutionError for the first cell that fails."""
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source = parameters or cell.source
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=None, record_timing=False, resources=place).execute()
    for cell in notebook.cells:
        cell.update(within(folder.resolve(), cell))
    return notebook


def within(folder: Path, shown: Any) -> Any:
    """What is shown, with paths relative to ``folder`` or to the user's, and the cache where it is unless the
    user has another."""
    if isinstance(shown, str):
        shown = shown.replace(f"{cache_folder()}/", "~/.cache/tunesmith/")
        return shown.replace(f"{folder}/", "").replace(f"{Path.home()}/", "~/")
    if isinstance(shown, list):
        return [within(folder, one) for one in shown]
    return type(shown)({k: within(folder, v) for k, v in shown.items()}) if isinstance(shown, dict) else shown


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        nbformat.write(executed(Path(folder)), NOTEBOOK)
