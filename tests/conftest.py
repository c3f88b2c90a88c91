"""MLX is set up once, the user's folders stay untouched, and real data is found or its tests are skipped by
name."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import forks
import pytest
from hypothesis import settings
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tunesmith.machine import backend

os.environ["HF_HUB_OFFLINE"] = "1"
# The same examples everywhere, and none that fails since the machine was busy: what is refused is refused
# again.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
backend.setup()

import tiny  # noqa: E402
from tunesmith.exports import processes  # noqa: E402

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
LONGEST = [
    "real/test_real.py",
    "real/test_llama_cpp.py",
    "parity/test_gguf_exports.py",
    "parity/test_family_training.py",
    "bench/test_smoke.py",
    "sweeps/test_sweep.py",
    "training/test_laws.py",
    "machine/test_ranks.py",
    "evaluation/test_evaluate.py",
    "documents/test_first_fine_tune.py",
    "cli/test_start.py",
    "exports/test_export.py",
    "auditing/test_audit.py",
    "cli/test_cli.py",
    "training/test_speed_laws.py",
    "model/kernels/test_compiled.py",
    "reports/test_page.py",
    "adapters/test_qalora.py",
    "learning/objectives/test_preferences.py",
    "evaluation/tasks/test_benchmarks.py",
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest files first: the last ones are short, so that no process works on alone."""
    tests = Path(__file__).parent
    place = {tests / name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: place.get(item.path, len(LONGEST)))


@pytest.fixture(scope="session")
def data_dir():
    """``data_dir("formats/x.json")``: a file of the real data, or the test is skipped by the file's name."""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"real data is absent: {name}")
        return DATA / name

    return find


@pytest.fixture(scope="session")
def syngen(data_dir) -> Path:
    return data_dir("syngen_toolset_v1.0.0_claude.jsonl")


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return tiny.write_llama(tmp_path_factory.mktemp("tiny") / "tiny-llama")


@pytest.fixture(scope="session")
def tiny_mistral(tmp_path_factory) -> Path:
    return tiny.write_mistral(tmp_path_factory.mktemp("tiny") / "tiny-mistral")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium, headless; without it, or without playwright, the test is skipped."""
    api = pytest.importorskip("playwright.sync_api")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no chromium, chromium-browser or google-chrome here")
    with api.sync_playwright() as started:
        running = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module", autouse=True)
def quick(request) -> Iterator[None]:
    """Leaves out what takes long and is tested elsewhere: no write waits for the disk, a figure is made and
    saved as one pixel (see `drawn`), and artefacts are reloaded in forks (see `fresh_processes`). The folder
    ``real`` leaves out nothing."""
    if request.path.parent.name == "real":
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        patch.setattr(FigureCanvasAgg, "print_png", _save_pixel)
        patch.setattr(processes, "subprocess", SimpleNamespace(Popen=forks.Ended, PIPE=subprocess.PIPE))
        yield


PRINT_PNG = FigureCanvasAgg.print_png


def _save_pixel(canvas: FigureCanvasAgg, path: Path) -> None:
    Image.new("L", (1, 1)).save(path, "png")


@pytest.fixture
def drawn(quick, monkeypatch) -> None:
    """Figures are drawn."""
    monkeypatch.setattr(FigureCanvasAgg, "print_png", PRINT_PNG)


@pytest.fixture
def fresh_processes(quick, monkeypatch) -> None:
    """An artefact is reloaded by a Python that has just started."""
    monkeypatch.setattr(processes, "subprocess", subprocess)
