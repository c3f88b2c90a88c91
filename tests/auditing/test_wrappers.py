"""`audit --model` places prompts by the text model inside a multimodal one."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from model.families import WRAPPERS, write_wrapper

import tiny
import tunesmith
from tunesmith.auditing import embeddings
from tunesmith.model import loading
from tunesmith.tokens import renderers


@pytest.fixture(params=WRAPPERS)
def folder(request, tmp_path):
    return write_wrapper(request.param, tmp_path / "model")


def test_a_vector_is_the_mean_of_the_hidden_states_of_the_text_model(folder):
    loaded = loading.load(loading.ModelSpec(path=str(folder)))
    renderer = renderers.load(folder)
    texts = ["the cat", "read my note about tools, files and timers", "you"]
    vectors = embeddings.embedder(loaded, renderer, lambda done, count: None)(texts)
    for text, vector in zip(texts, vectors, strict=True):
        hidden = loaded.net.language_model.model(mx.array([renderer.text_prompt(text)]))
        np.testing.assert_allclose(vector, np.array(hidden[0].mean(axis=0)), atol=1e-5)


def test_the_audit_and_its_page_are_made(folder, tmp_path):
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(24))
    page = tmp_path / "audit.html"
    audit = tunesmith.audit(str(rows), model=str(folder), processes=1, page=page)
    assert audit.findings and page.stat().st_size > 10_000
