"""Bugs of programs that estimate memory, one test each."""

from __future__ import annotations

import pytest
from adapters import mixtures
from safetensors.numpy import load_file

import tiny
import tunesmith
from tunesmith.runs import forecasts
from tunesmith.training import anatomy
from tunesmith.training.footprint import Micro
from tunesmith.training.forecast import Outline
from tunesmith.training.pace import UpdatePace

QUICK = ["audit.before_training=false", "loop.samples=0", "data.valid=0"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.conversations(24))


def settings(model, rows, *sets):
    return tunesmith.configure(model=str(model), data=[str(rows)], sets=[*QUICK, *sets])


def test_museum_llmfit_230_a_mixture_is_held_whole_and_computed_in_part(tmp_path):
    """A mixture of experts was sized by the weights that one token meets."""
    folder = mixtures.write(tmp_path / "model")
    config = settings(folder, "rows.jsonl", "adapter.targets=q_proj").spec
    outline = Outline.of(config)
    shapes = anatomy.of(outline.net, outline.settings)
    stored = sum(value.nbytes for value in load_file(folder / "model.safetensors").values())
    assert shapes.weights_bytes == stored
    everyone = anatomy.of(outline.net, outline.settings | {"num_experts_per_tok": 4})
    seconds = [UpdatePace(each, False, 1e9).micro(Micro(64, 64), 64) for each in (shapes, everyone)]
    assert seconds[0] < seconds[1] and everyone.weights_bytes == stored


def test_museum_ollama_17201_logits_and_activations_are_counted(tiny_mistral, rows, tmp_path):
    """2.4 GB of a compute buffer were left out of an estimate that knew weights and cache."""
    run = tunesmith.train(settings(tiny_mistral, rows, "loop.steps=1"), out=tmp_path / "run")
    plan = forecasts.read(run)
    parts = {term.name: term.amount.value for term in plan.predicted.memory}
    exact = sum(parts[name] for name in ("weights", "trained weights", "optimizer state"))
    above = plan.measured.peak - exact
    assert parts["logits and loss"] > 0.3 * above
    assert plan.predicted.peak.value - exact == pytest.approx(above, rel=0.3)


def test_museum_mlx_1406_memory_does_not_grow_out_of_the_estimate(rows, tmp_path):
    """Memory grew over the first 60 iterations, past what the first had needed."""
    (tmp_path / "model").mkdir()
    tiny.write_model(tmp_path / "model", tiny.write_tokenizer(tmp_path / "model"), hidden=256)
    config = settings(tmp_path / "model", rows, "loop.steps=70", "batch.sequences=2")
    plan = forecasts.read(tunesmith.train(config, out=tmp_path / "run"))
    assert plan.measured.steps == 70
    assert plan.measured.peak <= plan.predicted.peak.high
