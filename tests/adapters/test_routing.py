"""A batch whose rows have different adapters, or none, equals each row alone with only that adapter."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import pytest
from adapters.test_attachment import state
from adapters.test_layers import close, fresh, move
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import make_prompt_cache

from tunesmith import adapters
from tunesmith.adapters import DoRA, DoRALinear, Full, LoRA, LoRALinear, routing
from tunesmith.errors import ModelError

SPECS = {
    "low": LoRA(rank=2, targets=("q_proj", "v_proj")),
    "wide": LoRA(rank=16, alpha=64, targets="all-linear"),
    "lengths": DoRA(rank=4, targets=("all-linear", "lm_head")),
    "upper": DoRA(rank=3, layers=1, targets="mlp.*"),
    "stabilised": LoRA(rank=4, layers=2, rank_stabilised=True, targets=("o_proj", "lm_head"), dropout=0.5),
}
BASES = {"plain": {}, "bias": {"bias": True}, "4 bits": {"bits": 4}, "bfloat16": {"dtype": mx.bfloat16}}
NAMES = [None, *SPECS]
TOKENS = 7


@pytest.fixture(scope="module")
def values(tmp_path_factory):
    """Adapter values by base and name; each is moved off its start."""
    folder = tmp_path_factory.mktemp("adapters")
    found = {}
    for base, options in BASES.items():
        for number, (name, spec) in enumerate(SPECS.items()):
            net = fresh(**options)
            spec.attach(net, number)
            place = folder / base / name
            adapters.save(move(net, number), spec, place)
            found[base, name] = adapters.read(place)
    return found


def ids(rows: int) -> mx.array:
    return (mx.arange(rows * TOKENS).reshape(rows, TOKENS) * 37 + 11) % 64


@pytest.fixture(scope="module")
def alone(values):
    """(base, name, row) → the logits of row ``row`` of `ids` with only that adapter."""
    found = {}
    for base, options in BASES.items():
        net = fresh(**options)
        for name in NAMES:
            handle = values[base, name].attach(net) if name else None
            for row in range(6):
                found[base, name, row] = net(ids(6)[row : row + 1])[0]
                mx.eval(found[base, name, row])
            if handle:
                handle.detach()
    return found


def tolerance(base: str) -> float:
    # In bfloat16 three random layers amplify the rounding of other batch shapes; one layer is tested apart.
    return 1e-1 if base == "bfloat16" else 2e-5


@pytest.mark.parametrize("base", BASES)
@settings(max_examples=12, deadline=None)
@given(names=st.lists(st.sampled_from(NAMES), min_size=1, max_size=6), order=st.permutations(list(SPECS)))
def test_each_row_is_what_it_is_alone(base, values, alone, names, order):
    net = fresh(**BASES[base])
    with adapters.routed(net, {name: values[base, name] for name in order}) as lanes:
        lanes.select(names)
        logits = net(ids(6)[: len(names)])
        for row, name in enumerate(names):
            close(logits[row], alone[base, name, row], tolerance(base))


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("backwards", [False, True])
def test_sorted_and_unsorted_places_agree(base, backwards, values, alone):
    """mlx 3960: gather_mm once read wrong strides where the indices were sorted."""
    names = NAMES[::-1] if backwards else NAMES
    net = fresh(**BASES[base])
    with adapters.routed(net, {name: values[base, name] for name in SPECS}) as lanes:
        lanes.select(names)
        logits = net(ids(6))
        for row, name in enumerate(names):
            close(logits[row], alone[base, name, row], tolerance(base))


@pytest.mark.parametrize("base", BASES)
def test_one_name_serves_all_rows_and_any_shape(base, values, alone):
    net = fresh(**BASES[base])
    with adapters.routed(net, {name: values[base, name] for name in SPECS}) as lanes:
        for name in NAMES:
            lanes.select(name)
            logits = net(ids(6))
            for row in range(6):
                close(logits[row], alone[base, name, row], tolerance(base))


@pytest.mark.parametrize("base", ["plain", "4 bits"])
def test_rows_keep_their_adapters_through_a_cache(base, values, alone):
    """A prompt, then tokens one at a time; half-way a row leaves the batch."""
    names = ["wide", None, "lengths", "low"]
    net = fresh(**BASES[base])
    with adapters.routed(net, {name: values[base, name] for name in SPECS}) as lanes:
        lanes.select(names)
        cache = make_prompt_cache(net)
        rows = list(range(len(names)))
        parts = {row: [] for row in rows}
        for start, end in [(0, 3), (3, 4), (4, 5), (5, 7)]:
            if start == 4:
                rows = [0, 2, 3]
                lanes.select([names[row] for row in rows])
                for layer in cache:
                    layer.keys, layer.values = (held[mx.array(rows)] for held in (layer.keys, layer.values))
            logits = net(ids(6)[mx.array(rows), start:end], cache=cache)
            for place, row in enumerate(rows):
                parts[row].append(logits[place])
        for row in rows:
            close(mx.concatenate(parts[row]), alone[base, names[row], row], tolerance(base))


@pytest.mark.parametrize("base", BASES)
def test_after_detaching_the_net_is_exactly_what_it_was(base, values):
    net = fresh(**BASES[base])
    before, logits = state(net), net(ids(6))
    with adapters.routed(net, {name: values[base, name] for name in SPECS}) as lanes:
        assert mx.array_equal(net(ids(6)), logits), "until one is chosen, rows meet the base"
        lanes.select(NAMES)
        assert not mx.array_equal(net(ids(6)), logits)
        lanes.select(None)
        assert mx.array_equal(net(ids(6)), logits)
        lanes.select(["wide", *NAMES[1:]])
    assert state(net) == before and mx.array_equal(net(ids(6)), logits)
    with adapters.routed(net, {}) as lanes:
        lanes.select([None, None])
        assert mx.array_equal(net(ids(6)), logits)


@pytest.mark.parametrize("spec", [Full(targets=("mlp",)), LoRA(rank=2, full_modules=("norm",))])
def test_whole_modules_are_refused(spec, values, tmp_path):
    net = fresh()
    spec.attach(net, 0)
    adapters.save(net, spec, tmp_path)
    net = fresh()
    before = state(net)
    both = {"low": values["plain", "low"], "whole": adapters.read(tmp_path)}
    with pytest.raises(ModelError, match=r"(?s)'whole' trains whole modules.*attach it alone"):
        adapters.Routing(net, both)
    assert state(net) == before


def test_names_and_rows_that_do_not_fit_are_refused(values):
    net = fresh()
    with adapters.routed(net, {name: values["plain", name] for name in ("low", "wide")}) as lanes:
        with pytest.raises(ModelError, match=r"(?s)no adapter 'tall'.*'low', 'wide'"):
            lanes.select(["low", "tall"])
        lanes.select(["low", "wide"])
        with pytest.raises(ModelError, match="a pass of 3 rows, but adapters are chosen for 2"):
            net(ids(3))


def test_one_layer_rounds_to_bfloat16_as_it_does_alone():
    linear = nn.Linear(64, 48)
    linear.weight = mx.random.uniform(-0.125, 0.125, (48, 64), key=mx.random.key(100))
    linear.bias = mx.random.uniform(-0.125, 0.125, (48,), key=mx.random.key(500))
    linear.set_dtype(mx.bfloat16)
    updates = [None, *(kind(linear, 4, 2.0, 0.0, mx.random.key(3)) for kind in (LoRALinear, DoRALinear))]
    for update in updates[1:]:
        update.lora_b = mx.random.normal(update.lora_b.shape, key=mx.random.key(4)) * 0.1
    selection = routing.Selection()
    layer = routing.RoutedLinear(linear, updates, selection)
    x = mx.random.normal((3, 5, 64), key=mx.random.key(5)).astype(mx.bfloat16)
    selection.places = mx.array([2, 0, 1])
    y = layer(x)
    assert y.dtype == mx.bfloat16
    for row, place in enumerate([2, 0, 1]):
        close(y[row], (updates[place] or linear)(x[row : row + 1])[0], 2**-7)


def test_adapters_are_changed_in_place_and_stay_if_one_does_not_fit(values, alone):
    net = fresh()
    before = state(net)
    lanes = routing.Routing(net, {"low": values["plain", "low"]})
    lanes.change({name: values["plain", name] for name in ("wide", "lengths")})
    names = ["wide", None, "lengths"]
    whole = adapters.Adapter(Full(), {}, "whole")
    for _ in range(2):
        lanes.select(names)
        logits = net(ids(6)[:3])
        for row, name in enumerate(names):
            close(logits[row], alone["plain", name, row], tolerance("plain"))
        with pytest.raises(ModelError, match="whole modules"):
            lanes.change({"whole": whole})
    with pytest.raises(ModelError, match="'low'"):
        lanes.select("low")
    lanes.detach()
    assert state(net) == before


@pytest.mark.parametrize("restores", [True, False])
def test_a_change_that_fails_half_way_leaves_no_half(values, alone, monkeypatch, restores):
    net = fresh()
    before = state(net)
    low = values["plain", "low"]
    lanes = routing.Routing(net, {"low": low})
    whole, calls = routing.RoutedLinear.__init__, []

    def failing(layer, *arguments):
        calls.append(layer)
        if len(calls) == 3 or (len(calls) > 3 and not restores):
            raise MemoryError
        whole(layer, *arguments)

    monkeypatch.setattr(routing.RoutedLinear, "__init__", failing)
    with pytest.raises(MemoryError):
        lanes.change({"wide": values["plain", "wide"]})
    if restores:
        lanes.select("low")
        close(net(ids(1))[0], alone["plain", "low", 0], tolerance("plain"))
    else:
        with pytest.raises(ModelError, match="no adapter 'low'"):
            lanes.select("low")
    lanes.detach()
    assert state(net) == before
    calls.clear()
    with pytest.raises(MemoryError):
        routing.Routing(net, {"wide": values["plain", "wide"]})
    assert state(net) == before
