"""MLX is set up once, the user's folders stay untouched, and real data is found or its tests are skipped by
name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tunesmith.machine import backend

os.environ["HF_HUB_OFFLINE"] = "1"
# The same examples everywhere, and none that fails since the machine was busy: what is refused is refused
# again.
settings.register_profile("steady", deadline=None, derandomize=True)
settings.load_profile("steady")
backend.setup()

import tiny  # noqa: E402

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"


@pytest.fixture
def data_dir():
    """``data_dir("formats/x.json")``: a file of the real data, or the test is skipped by the file's name."""

    def find(name: str) -> Path:
        if not (DATA / name).exists():
            pytest.skip(f"real data is absent: {name}")
        return DATA / name

    return find


@pytest.fixture
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
