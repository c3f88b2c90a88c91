"""``data.order``: every order has each row once an epoch, and only the first epoch is sorted."""

from __future__ import annotations

import shutil

import numpy as np
import pytest

import tiny
import tunesmith
from tunesmith import events
from tunesmith.exports import training_rows
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run
from tunesmith.training import preparation

SETS = [
    "loop.epochs=2",
    "batch.sequences=4",
    "batch.micro=2",
    "adapter.rank=2",
    "adapter.dropout=0.1",
    "optimizer.learning_rate=1e-6",
    "loop.validate_every=0",
    "loop.samples=0",
    "loop.save_every=1",
    "loop.keep_last=99",
    "audit.before_training=false",
]
ORDERS = ("shuffled", "length", "difficulty")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> dict[str, Run]:
    """One run of each order, of two epochs of 18 rows, with a learning rate that moves nothing that is
    looked at."""
    folder = tmp_path_factory.mktemp("orders")
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(22))
    runs: dict[str, Run] = {}
    for order in ORDERS:
        settings = tunesmith.configure(
            model=str(tiny_model), data=[str(rows)], sets=[*SETS, f"data.order={order}"]
        )
        tunesmith.train(settings, out=folder / order)
        runs[order] = Run.open(folder / order)
    return runs


def epochs(run: Run) -> list[dict[str, float]]:
    """By epoch: row → its loss, in the order of the updates; within an update in that of the plan."""
    learned: list[dict[str, float]] = [{}, {}]
    for event in events.read(run.path / "events.jsonl"):
        if isinstance(event, events.RowLosses):
            learned[event.epoch - 1] |= event.losses
    return learned


def final(run: Run) -> list[bytes]:
    folder = checkpoints.choose(run, "last")
    return [(folder / name).read_bytes() for name in ("adapters.safetensors", "optimizer.safetensors")]


@pytest.mark.parametrize("order", ORDERS)
def test_each_row_is_learned_once_an_epoch(runs, order):
    first, second = epochs(runs[order])
    assert len(first) == 18 and first.keys() == second.keys()


@pytest.mark.parametrize("order", ORDERS[1:])
def test_only_the_first_epoch_is_sorted(runs, order):
    shuffled, ordered = epochs(runs["shuffled"]), epochs(runs[order])
    assert list(ordered[1]) == list(shuffled[1])
    assert list(ordered[0]) != list(shuffled[0])


def test_the_shortest_rows_come_first(runs):
    prepared = preparation.prepare(runs["length"].config)
    lengths = {group.source: group.tokens for group in prepared.train}
    first = [lengths[source] for source in epochs(runs["length"])[0]]
    assert first == sorted(first) and first[0] < first[-1]


def test_the_easiest_rows_come_first(runs):
    """The adapter starts as the base, and the learning rate is tiny: a row's loss is its difficulty, but for
    dropout."""
    prepared = training_rows.prepare(runs["difficulty"], runs["difficulty"].config, "test", "", events.silent)
    first = [group.source for group in training_rows.first_epoch(prepared)]
    assert first == list(epochs(runs["difficulty"])[0])
    losses = np.array([epochs(runs["difficulty"])[0][source] for source in first])
    assert np.corrcoef(losses, np.arange(len(losses)))[0, 1] > 0.9


@pytest.mark.parametrize("order", ORDERS[1:])
@pytest.mark.parametrize("step", [0, 2, 7])
def test_a_run_in_order_is_resumed_to_the_byte(runs, tmp_path, monkeypatch, order, step):
    """Also if the cache of references is gone."""
    died = Run.open(shutil.copytree(runs[order].path, tmp_path / "died"))
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "empty"))
    for later in runs[order].checkpoints():
        if later > step:
            shutil.rmtree(died.checkpoint(later))
    died.mark("running")
    tunesmith.train(resume=died.path)
    assert final(died) == final(runs[order])


def test_difficulties_are_measured_once(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(12))
    texts: list[str] = []

    def hear(event: events.Event) -> None:
        if isinstance(event, events.Notice) and event.what.startswith("difficulty"):
            texts.append(event.what)

    for name, rank in (("a", 2), ("b", 4)):
        sets = [*SETS, "data.order=difficulty", "loop.steps=3", f"adapter.rank={rank}"]
        settings = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=sets)
        tunesmith.train(settings, out=tmp_path / name, notify=hear)
    assert texts[0].endswith("10 sequences measured, 0 cached")
    assert texts[1].endswith("0 sequences measured, 10 cached")


@pytest.mark.parametrize(("order", "rows"), [("length", "longest"), ("difficulty", "hardest")])
def test_a_run_that_ends_within_its_first_epoch_is_warned_of(tiny_model, tmp_path, order, rows):
    file = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(20))
    sets = [*SETS, f"data.order={order}", "loop.steps=2"]
    settings = tunesmith.configure(model=str(tiny_model), data=[str(file)], sets=sets)
    notices: list[events.Event] = []
    preparation.prepare(settings.spec, notices.append)
    assert any(isinstance(notice, events.Notice) and f"the {rows} rows" in notice.what for notice in notices)
