"""llama.cpp judges GGUF files of the demo model after a short run: what it computes from them is close to the
live adapter, and to what tunesmith's own reader computes."""

from __future__ import annotations

from pathlib import Path

import pytest
from real.test_real import tuned

from tunesmith.demo import __main__ as demo
from tunesmith.demo import data as demo_data
from tunesmith.exports.table import export_table

pytest.importorskip("xllamacpp")
pytestmark = [pytest.mark.real, pytest.mark.parity, pytest.mark.filterwarnings("ignore")]

KINDS = ("gguf-q8_0", "gguf-q4_0", "gguf-q4_k_m", "gguf-lora")
MATRICES = 210
"""In the blocks of SmolLM2-135M."""


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    return tuned(demo.fetch_model(folder), folder, demo_data.generate(), loop__steps=12)


def test_llama_cpp_accepts_what_is_written_for_it(run, tmp_path):
    table = export_table(run, KINDS, out=tmp_path / "out", rows=3)
    artefacts = {entry.kind: entry.exported for entry in table.entries if entry.exported is not None}
    assert set(artefacts) == set(KINDS)
    for kind, artefact in artefacts.items():
        assert artefact.judged_by.startswith("llama.cpp"), artefact.remarks
        # Four bits for every matrix may cost a model as small as this one more than the gate allows.
        assert artefact.accepted or kind == "gguf-q4_0", (kind, artefact.reasons)
        own = artefact.own_reading
        assert own is not None and abs(artefact.distances.mean - own.mean) < 0.02 + own.mean / 5, kind
        assert artefact.cost is not None and artefact.cost.memory_bytes > 50e6
    quantised = artefacts["gguf-q4_k_m"].quantised
    assert quantised is not None and quantised.weighed == MATRICES and quantised.narrow > 0
