"""What a run needs is known before its first update, and is what it needs."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import mlx.core as mx
import pytest
from adapters import mixtures
from mlx.utils import tree_flatten

import tiny
import tunesmith
from tunesmith import adapters
from tunesmith.errors import DataError, OutOfMemory
from tunesmith.machine import memory
from tunesmith.model import loading
from tunesmith.runs import forecasts
from tunesmith.runs.forecasts import Amount
from tunesmith.training import anatomy, footprint, forecast
from tunesmith.training.footprint import Micro

QUICK = ["audit.before_training=false", "loop.samples=0", "data.valid=0"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.conversations(24))


def settings(model, rows, *sets):
    return tunesmith.configure(model=str(model), data=[str(rows)], sets=[*QUICK, *sets])


def lines_heard(config, **options):
    heard = []
    run = tunesmith.train(config, notify=lambda event: heard.append(getattr(event, "what", "")), **options)
    return run, [text for text in heard if text.startswith("plan: ")]


SETTINGS = {
    "LoRA": ["adapter.kind=lora"],
    "DoRA": ["adapter.kind=dora", "adapter.targets=all-linear"],
    "full": ["adapter.kind=full", "optimizer.learning_rate=1e-5"],
    "recomputed": ["loop.checkpoint_gradients=true", "adapter.targets=all-linear"],
    "packed": ["batch.pack=true", "batch.tokens=256"],
}


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory):
    """Large enough that the allocator's rounding of each array does not count: with 64 hidden values it is up
    to a quarter of the peak."""
    folder = tmp_path_factory.mktemp("wide")
    tiny.write_model(folder, tiny.write_tokenizer(folder), hidden=128)
    return folder


@pytest.mark.parametrize("name", SETTINGS)
def test_the_peak_of_a_run_is_near_its_forecast(wide_model, rows, tmp_path, name):
    config = settings(wide_model, rows, "loop.steps=2", *SETTINGS[name])
    other = mx.zeros((5_000_000,))  # of another model in this process
    mx.eval(other)
    run, said = lines_heard(config, out=tmp_path / "run")
    plan = forecasts.read(run)
    assert plan.measured.peak == pytest.approx(plan.predicted.peak.value, rel=0.25)
    assert other.nbytes > plan.predicted.peak.value
    assert (plan.measured.steps, plan.measured.status) == (2, "completed")
    assert len(said) == 1 and "of memory at the peak" in said[0]


def test_the_parts_of_the_peak_add_up_to_it(tiny_model, rows):
    predicted = tunesmith.plan(settings(tiny_model, rows)).forecast
    assert sum(term.amount.value for term in predicted.memory) == pytest.approx(predicted.peak.value)
    assert predicted.peak.low < predicted.peak.value < predicted.peak.high
    assert predicted.needed.value == predicted.peak.value + predicted.program


def test_weights_and_state_are_exact(tiny_model, rows):
    predicted = tunesmith.plan(settings(tiny_model, rows, "adapter.rank=4")).forecast
    net = loading.load(loading.ModelSpec(path=str(tiny_model))).net
    frozen = sum(value.nbytes for _, value in tree_flatten(net.parameters()))
    attached = adapters.LoRA(rank=4).attach(net, 0)
    parts = {term.name: term.amount.value for term in predicted.memory}
    assert parts["weights"] == frozen
    assert parts["trained weights"] == 4 * attached.trainable
    assert parts["optimizer state"] == 8 * attached.trainable


def test_a_forecast_reads_no_weights(tiny_model, rows, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    expected = tunesmith.plan(settings(folder, rows)).forecast
    whole = (folder / "model.safetensors").read_bytes()
    header = 8 + int.from_bytes(whole[:8], "little")
    (folder / "model.safetensors").write_bytes(whole[:header] + b"\xff" * (len(whole) - header))  # NaN
    assert tunesmith.plan(settings(folder, rows)).forecast.memory == expected.memory
    with pytest.raises(tunesmith.errors.ModelError):
        tunesmith.rehearse(settings(folder, rows))


def test_experts_count_as_they_are_held_and_as_they_are_computed():
    net = mixtures.fresh("qwen3_moe")
    held = sum(value.nbytes for _, value in tree_flatten(net.parameters()))
    adapters.LoRA(rank=2, targets=("q_proj",)).attach(net, 0)
    shapes = anatomy.of(net, {"num_experts_per_tok": 2})
    experts = 2 * 3 * 32 * 96  # layers, projections, weights of one
    assert shapes.weights_bytes == held
    assert shapes.held_weights - shapes.active_weights == experts * (4 - 2)


def test_more_tokens_layers_and_logits_need_more(tiny_model):
    net = loading.load(loading.ModelSpec(path=str(tiny_model))).net
    adapters.LoRA(rank=4).attach(net, 0)
    shapes = anatomy.of(net, {})

    def total(tokens, learned, recomputed=False, of=shapes):
        return footprint.training(of, Micro(tokens, learned), recomputed=recomputed, several=False).total

    assert total(200, 50) > total(100, 50) and total(100, 100) > total(100, 10)
    assert total(4096, 10, recomputed=True) < total(4096, 10)
    assert total(100, 50, of=replace(shapes, first=1)) < total(100, 50)
    assert total(100, 5, of=replace(shapes, separable=False)) > total(100, 5)


def small_machine(monkeypatch, ceiling):
    monkeypatch.setattr(forecast, "room", lambda: memory.Room(int(ceiling), 0, 0, 0))


def test_a_run_that_cannot_fit_is_refused_unless_told(tiny_model, rows, tmp_path, monkeypatch):
    small_machine(monkeypatch, 6e5)
    config = settings(tiny_model, rows, "loop.steps=1")
    with pytest.raises(OutOfMemory, match=r"at least, and this machine has 0\.6 MB") as caught:
        tunesmith.train(config, out=tmp_path / "run")
    assert "plan --fit 1MB" in caught.value.hint  # not 0GB, which plan refuses
    assert "--anyway" in caught.value.hint and not (tmp_path / "run").exists()
    assert tunesmith.train(config, out=tmp_path / "run", anyway=True).status == "completed"


def test_a_large_model_is_refused_before_its_weights_are_read(tiny_model, rows, tmp_path, monkeypatch):
    small_machine(monkeypatch, 5e5)
    monkeypatch.setattr(tunesmith.training.story, "open_model", lambda *_: pytest.fail("weights were read"))
    with pytest.raises(OutOfMemory):
        tunesmith.train(settings(tiny_model, rows, "loop.steps=1"), out=tmp_path / "run")


def test_what_may_not_fit_is_said(tiny_model, rows, tmp_path, monkeypatch):
    needed = tunesmith.plan(settings(tiny_model, rows)).forecast.peak.value
    monkeypatch.setattr(forecast, "room", lambda: memory.Room(int(4 * needed), int(3.2 * needed), 0, 0))
    heard = []
    config = settings(tiny_model, rows, "loop.steps=1")
    tunesmith.train(
        config, out=tmp_path / "run", notify=lambda event: heard.append(getattr(event, "what", ""))
    )
    assert any(text.startswith("it may not fit, since other programs hold") for text in heard)


def test_a_resumed_run_keeps_its_forecast_and_its_highest_peak(tiny_model, rows, tmp_path):
    config = settings(tiny_model, rows, "loop.steps=2", "loop.save_every=1")
    run = tunesmith.train(config, out=tmp_path / "run")
    first = forecasts.read(run)
    forecasts.write(run, first.predicted, replace(first.measured, peak=10**12, steps=1))
    shutil.rmtree(run.checkpoint(2))
    run.mark("interrupted")
    tunesmith.train(resume=run.path)
    after = forecasts.read(run)
    assert after.predicted == first.predicted
    assert (after.measured.peak, after.measured.steps) == (10**12, 2)


def test_a_damaged_forecast_is_named_and_stops_no_run(tiny_model, rows, tmp_path):
    run = tunesmith.train(
        settings(tiny_model, rows, "loop.steps=2", "loop.save_every=1"), out=tmp_path / "run"
    )
    path = run.path / "plan.json"
    path.write_text('{"version": 1}')
    with pytest.raises(DataError, match=r"plan\.json: cannot be read: the key predicted is missing"):
        forecasts.read(run)
    shutil.rmtree(run.checkpoint(2))
    run.mark("interrupted")
    heard = []
    tunesmith.train(resume=run.path, notify=lambda event: heard.append(getattr(event, "what", "")))
    assert any("it is written anew" in text for text in heard)
    assert forecasts.read(run).measured.status == "completed"


def test_a_run_of_an_earlier_release_has_no_forecast(tiny_model, rows, tmp_path):
    run = tunesmith.train(settings(tiny_model, rows, "loop.steps=1"), out=tmp_path / "run")
    (run.path / "plan.json").unlink()
    assert forecasts.read(run) is None
    assert tunesmith.track_record(tmp_path).errors == ()


def test_an_interval_covers_what_lies_in_it():
    amount = Amount(2.0, 1.0, 3.0)
    assert amount.covers(1.0) and amount.covers(3.0) and not amount.covers(3.1)
    assert amount + amount == Amount(4.0, 2.0, 6.0)


def test_the_file_holds_what_was_written(tiny_model, rows, tmp_path):
    run = tunesmith.train(settings(tiny_model, rows, "loop.steps=1"), out=tmp_path / "run")
    plan = forecasts.read(run)
    tree = json.loads((run.path / "plan.json").read_text())
    assert tree["predicted"]["peak"]["value"] == plan.predicted.peak.value
    assert tree["measured"]["peak"] == plan.measured.peak <= mx.get_peak_memory()


def test_the_time_counts_every_batch_of_answers(tiny_model, rows, monkeypatch):
    monkeypatch.setattr(forecast, "product_rate", lambda: 1e11)
    sets = ["data.valid=0.2", "loop.steps=12", "loop.validate_every=4", "loop.save_every=3"]

    def total(*further):
        return tunesmith.plan(settings(tiny_model, rows, *sets, *further)).forecast.total_s.value

    none = total()
    a_batch = (total("loop.samples=1") - none) / 2  # first and last
    assert a_batch > 0
    assert total("loop.adherence_prompts=3") - none == pytest.approx(4 * a_batch)
    assert total("loop.adherence_prompts=17") - none == pytest.approx(8 * a_batch)
    assert total("loop.prompts=[hello]") - none == pytest.approx((2 + 4) * a_batch)


def test_the_pass_that_measures_difficulty_has_its_name(tiny_model, rows, monkeypatch):
    monkeypatch.setattr(forecast, "product_rate", lambda: 1e11)
    shuffled, ordered = (
        tunesmith.plan(settings(tiny_model, rows, f"data.order={order}")).forecast
        for order in ("shuffled", "difficulty")
    )
    new = {term.name for term in ordered.beside} | {ordered.moment}
    names = new - {term.name for term in shuffled.beside} - {shuffled.moment}
    assert names == {"measuring difficulty"} and ordered.total_s.value > shuffled.total_s.value
