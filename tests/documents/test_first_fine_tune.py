"""docs/first-fine-tune.ipynb runs from top to bottom, and its outputs are of the kinds that a run gives."""

from __future__ import annotations

import re
from base64 import b64decode
from collections.abc import Iterator
from html import unescape
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest

import tiny

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("nbclient")

ROOT = Path(__file__).parents[2]
PARTS = ("<table", "<svg", "<mark", "<details")
"""What a cell shows as HTML has some of these."""
PATH = re.compile(r"(?<![\w.~:/<…\]\)-])(?:/[\w.-]+){2,}|[A-Z]:\\|file:/")
"""An absolute path, that would be one of the machine of whoever wrote the page."""
FEW = "ROWS = 20\nEPOCHS = 1\nPROMPTS = 2\n"
LARGEST = 150_000
"""Bytes of all pictures."""


@pytest.fixture(scope="module")
def notebook() -> ModuleType:
    spec = spec_from_file_location("notebook", ROOT / ".ci" / "notebook.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Iterator[Path]:
    """Where the notebook runs; the user's settings of IPython and Jupyter are neither read nor written."""
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "work").mkdir()
    yield tmp_path / "work"


def code(notebook) -> list:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def html(output) -> str:
    return output.get("data", {}).get("text/html", "")


def shown(cell) -> list[tuple[object, ...]]:
    """The kind of each output: what Jupyter calls it, its forms, and what its HTML is made of. Work that ends
    at once has no display of progress, so these are left out."""
    return [
        (
            output.output_type,
            output.get("name"),
            *sorted(output.get("data", {})),
            *(part for part in PARTS[:3] if part in html(output)),
        )
        for output in cell.outputs
        if output.output_type != "display_data"
    ]


def same_kinds(committed, run) -> None:
    for number, (before, now) in enumerate(zip(code(committed), code(run), strict=True), 1):
        assert shown(before) == shown(now), f"code cell {number}: run make notebook\n{before.source}"
        if "tunesmith.train(" in now.source:
            assert any("completed at step" in html(output) for output in now.outputs)


def test_every_cell_runs_and_shows_what_the_page_shows(notebook, folder):
    model = tiny.write_llama(folder / "tiny")
    run = notebook.executed(folder, f"MODEL = {str(model)!r}\n{FEW}")
    same_kinds(nbformat.read(notebook.NOTEBOOK, as_version=4), run)


@pytest.mark.real
def test_every_cell_runs_on_the_demo_model(notebook, folder):
    run = notebook.executed(folder, f"MODEL = None\n{FEW}")
    same_kinds(nbformat.read(notebook.NOTEBOOK, as_version=4), run)


def test_the_page_was_run_once_from_top_to_bottom(notebook):
    cells = code(nbformat.read(notebook.NOTEBOOK, as_version=4))
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)) and len(cells) >= 10
    parameters = [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", ())]
    assert len(parameters) == 1 and parameters[0].startswith("MODEL = None")
    assert not [output for cell in cells for output in cell.outputs if output.output_type == "error"]


def test_the_page_shows_tables_curves_a_picture_and_answers(notebook):
    outputs = [
        output for cell in code(nbformat.read(notebook.NOTEBOOK, as_version=4)) for output in cell.outputs
    ]
    pages = [html(output) for output in outputs if html(output)]
    assert all(any(part in page for page in pages) for part in PARTS)
    pictures = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    assert pictures and sum(len(b64decode(picture)) for picture in pictures) < LARGEST
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "tool_call: reminder_add" in said and said.count("\ntuned   ") >= 2
    assert any(re.search(r"<th[^>]*>base</th><th[^>]*>tuned</th>", page) for page in pages)


def test_no_output_has_a_path_of_the_machine_that_made_it(notebook):
    outputs = [cell.outputs for cell in code(nbformat.read(notebook.NOTEBOOK, as_version=4))]
    texts = [unescape(re.sub(r"</?\w[^>]*>", " ", text)) for text in strings(outputs)]
    assert len(texts) >= 20
    assert not [match[0] for text in texts for match in PATH.finditer(text)]


def strings(value: object) -> Iterator[str]:
    """The texts inside, without pictures."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        yield from (text for one in value for text in strings(one))
    elif isinstance(value, dict):
        yield from (text for key, one in value.items() if key != "image/png" for text in strings(one))


@pytest.mark.parametrize(
    ("text", "found"),
    [("/home/ann/runs/a", 1), ("in C:\\runs", 1), ("runs/first/report.html", 0), ("0.3 nats/token/s", 0)],
)
def test_what_is_an_absolute_path(text, found):
    assert len(PATH.findall(text)) == found
