"""Each request is answered as if it were alone, whatever else is in the batch, joins it or leaves it."""

from __future__ import annotations

import mlx.core as mx
import pytest
from adapters.test_layers import fresh, move

from tunesmith import adapters
from tunesmith.adapters import DoRA, LoRA
from tunesmith.engine.engine import Engine
from tunesmith.engine.requests import Request
from tunesmith.errors import ModelError
from tunesmith.model import abilities

SPECS = {
    "low": LoRA(rank=2, targets=("q_proj", "v_proj")),
    "wide": LoRA(rank=8, alpha=64, targets="all-linear"),
    "lengths": DoRA(rank=4, targets=("all-linear", "lm_head")),
}
NAMES = [None, *SPECS, None, "wide", "low", "lengths"]


@pytest.fixture(autouse=True, params=["batched", "separate"])
def way(request, monkeypatch) -> None:
    """The laws hold with mlx-lm's batches, and where each request has passes of its own."""
    if request.param == "separate":
        monkeypatch.setattr(abilities, "batches", lambda net: False)


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, adapters.Adapter]:
    """Adapters that were moved off their start, so that each answers in its own way."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, spec) in enumerate(SPECS.items()):
        net = fresh()
        spec.attach(net, number)
        adapters.save(move(net, number), spec, folder / name)
    return {name: adapters.read(folder / name) for name in SPECS}


def request(place: int, **options) -> Request:
    """Prompts of 3 to 10 tokens; the same place gives the same prompt."""
    return Request([(37 * place + 11 * at) % 64 for at in range(3 + place % 8)], max_tokens=9, **options)


def finished(engine: Engine, numbers: list[int]) -> list[list[int]]:
    """The tokens of the requests ``numbers``, after all have ended."""
    said: dict[int, list[int]] = {}
    while tokens := engine.step():
        for number, token, *_ in tokens:
            said.setdefault(number, []).append(token)
    return [said.get(number, []) for number in numbers]


@pytest.fixture(scope="module")
def alone(values) -> list[list[int]]:
    """The answer to request ``place`` of the model with only its adapter attached."""
    answers = []
    for place, name in enumerate(NAMES):
        net = fresh()
        if name is not None:
            values[name].attach(net)
        with Engine(net) as engine:
            answers += finished(engine, engine.submit([request(place)]))
    assert len({tuple(answer) for answer in answers}) > 4, "the adapters make a difference"
    return answers


@pytest.mark.parametrize("batch_size", [1, 3, 8])
@pytest.mark.parametrize("backwards", [False, True])
def test_mixed_adapters_answer_as_each_alone(values, alone, batch_size, backwards):
    places = [*range(len(NAMES))][:: -1 if backwards else 1]
    net = fresh()
    with adapters.routed(net, values) as routing, Engine(net, batch_size, routing) as engine:
        numbers = engine.submit([request(place, adapter=NAMES[place]) for place in places])
        assert finished(engine, numbers) == [alone[place] for place in places]


def test_requests_that_join_midway_change_no_answer(values, alone):
    net = fresh()
    with adapters.routed(net, values) as routing, Engine(net, 8, routing) as engine:
        numbers = engine.submit([request(place, adapter=NAMES[place]) for place in range(3)])
        early = [token for _ in range(4) for token in engine.step()]
        numbers += engine.submit([request(place, adapter=NAMES[place]) for place in range(3, len(NAMES))])
        said = {number: [token for of, token, *_ in early if of == number] for number in numbers}
        late = finished(engine, numbers)
    assert [said[number] + rest for number, rest in zip(numbers, late, strict=True)] == alone


def test_a_cancelled_request_frees_its_row_and_changes_no_other(values, alone):
    net = fresh()
    with adapters.routed(net, values) as routing, Engine(net, 8, routing) as engine:
        numbers = engine.submit([request(place, adapter=NAMES[place]) for place in range(len(NAMES))])
        early = [token for _ in range(3) for token in engine.step()]
        engine.cancel([numbers[1], numbers[4]])
        engine.cancel([numbers[1]])  # once more does nothing
        late = finished(engine, numbers)
    said = {number: [token for of, token, *_ in early if of == number] for number in numbers}
    for place, number in enumerate(numbers):
        whole = said[number] + late[place]
        assert whole == (alone[place][: len(said[number])] if place in (1, 4) else alone[place])
    assert late[1] == late[4] == []


def test_draws_depend_on_the_requests_seed_and_stream_alone(values):
    drawn = [
        request(place, adapter=NAMES[place], temperature=1.0, seed=3, stream=place)
        for place in range(len(NAMES))
    ]
    answers = []
    for batch_size, wanted in ((8, drawn), (2, drawn[::-1])):
        net = fresh()
        with adapters.routed(net, values) as routing, Engine(net, batch_size, routing) as engine:
            answers.append(finished(engine, engine.submit(wanted)))
    assert answers[0] == answers[1][::-1]
    again = [request(0, temperature=1.0, seed=3, stream=stream) for stream in range(6)]
    with Engine(fresh()) as engine:
        assert len({tuple(answer) for answer in finished(engine, engine.submit(again))}) == 6


def test_end_tokens_are_each_requests_own(alone):
    ends = alone[0][4]
    with Engine(fresh()) as engine:
        numbers = engine.submit([request(0), request(0, end_ids=[ends])])
        free, ended = finished(engine, numbers)
    assert free == alone[0] and ended == free[: free.index(ends) + 1]


def test_an_adapter_that_is_not_here_is_refused_and_nothing_begins(values):
    with Engine(fresh()) as engine:
        with pytest.raises(ModelError, match="there is no adapter 'low'"):
            engine.submit([request(0), request(1, adapter="low")])
        assert engine.step() == []
    net = fresh()
    with adapters.routed(net, values) as routing, Engine(net, 8, routing) as engine:
        with pytest.raises(ModelError, match="there is no adapter 'lows'"):
            engine.submit([request(0), request(1, adapter="lows")])
        assert engine.step() == []


def test_after_an_engine_the_net_answers_as_the_base(values):
    net, ids = fresh(), mx.array([[1, 2, 3]])
    base = net(ids)
    with adapters.routed(net, values) as routing:
        with Engine(net, 8, routing) as engine:
            finished(engine, engine.submit([request(0, adapter="wide"), request(1, adapter="low")]))
        assert mx.array_equal(net(ids), base)
