"""Each request is answered as if it were alone, whatever else is in the batch, joins it or leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np
import pytest
from adapters.test_layers import fresh, move
from scipy.special import log_softmax

from tunesmith import adapters
from tunesmith.adapters import DoRA, LoRA
from tunesmith.engine import batching
from tunesmith.engine.engine import UNLIMITED, Engine
from tunesmith.engine.requests import Request
from tunesmith.engine.rows import RowBatch
from tunesmith.errors import ModelError

SPECS = {
    "low": LoRA(rank=2, targets=("q_proj", "v_proj")),
    "wide": LoRA(rank=8, alpha=64, targets="all-linear"),
    "lengths": DoRA(rank=4, targets=("all-linear", "lm_head")),
}
NAMES = [None, *SPECS, None, "wide", "low", "lengths"]


class Alternating:
    """A constraint: even and odd tokens in turn, and only the end token 63 after ``most``; the mask before is
    shorter than the logits."""

    def __init__(self, most: int = 3) -> None:
        self.most, self.tokens = most, []

    def allowed(self) -> np.ndarray:
        if len(self.tokens) >= self.most:
            return np.arange(64) == 63
        return np.arange(60) % 2 == len(self.tokens) % 2

    def advance(self, token: int) -> None:
        self.tokens.append(token)


@pytest.fixture(autouse=True, params=["batched", "separate"])
def way(request, monkeypatch) -> None:
    """The laws hold where requests share passes, and where each request has passes of its own."""
    if request.param == "separate":
        monkeypatch.setattr(batching, "batches", lambda net: False)


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


@pytest.mark.parametrize("batch_size", [4, 8])
def test_rows_that_ended_may_stay_for_a_while_and_change_no_answer(alone, monkeypatch, batch_size):
    """Ends at several times, by an end token and by length; the batch is copied less often."""
    copies: list[int] = []
    keep = RowBatch.keep

    def counted(self: RowBatch, places: Sequence[int]) -> None:
        copies.append(len(places) < len(self.rows))
        keep(self, places)

    monkeypatch.setattr(RowBatch, "keep", counted)
    requests = [
        replace(request(place, end_ids=(alone[0][2],)), max_tokens=2 + (place * 5 + 7) % 9)
        for place in range(24)
    ]
    answers, changes = [], []
    for idle in (0.0, 0.5):
        copies.clear()
        with Engine(fresh(), batch_size, idle=idle) as engine:
            answers.append(finished(engine, engine.submit(requests)))
        changes.append(sum(copies))
    assert answers[0] == answers[1] and len({len(answer) for answer in answers[0]}) > 4
    assert len(answers[0][0]) < requests[0].max_tokens, "it ends by its end token"
    if batching.batches(fresh()):
        assert changes[1] < 0.8 * changes[0]


def test_short_prompts_are_read_in_one_pass_where_nobody_waits_for_a_token(alone, monkeypatch):
    """Rows that join others later have all keys and values copied."""
    joins: list[int] = []
    join = RowBatch.join
    monkeypatch.setattr(RowBatch, "join", lambda self, other: (joins.append(1), join(self, other)))
    answers, counts = [], []
    for idle in (0.0, 0.25):
        with Engine(fresh(), 24, prefill_tokens=UNLIMITED, idle=idle) as engine:
            joins.clear()  # those of the trial whether rows can share passes
            answers.append(finished(engine, engine.submit([request(place) for place in range(24)])))
        counts.append(len(joins))
    assert answers[0] == answers[1]
    if batching.batches(fresh()):
        assert counts == [2, 0]


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


OPTIONS = {
    "top_k": {"temperature": 2.0, "top_k": 2},
    "top_p": {"temperature": 2.0, "top_p": 0.1},
    "min_p": {"temperature": 2.0, "min_p": 0.5},
    "seed": {"temperature": 2.0, "seed": 1},
    "stream": {"temperature": 2.0, "stream": 1},
    "repetition_penalty": {"repetition_penalty": 3.0},
    "presence_penalty": {"presence_penalty": 50.0},
    "frequency_penalty": {"frequency_penalty": 50.0},
    "logit_bias": {"logit_bias": {9: 100.0}},
}


def inside_of_filter(logits: np.ndarray, request: Request) -> np.ndarray:
    """(V,) bool: the tokens that top_k, top_p and min_p leave."""
    scaled = logits.astype(np.float64) / request.temperature
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    order = np.argsort(-shares)
    before = np.cumsum(shares[order]) - shares[order]
    inside = np.zeros(len(shares), bool)
    inside[order] = before < request.top_p
    if request.top_k:
        inside[order[request.top_k :]] = False
    return inside & (shares >= request.min_p * shares.max())


@pytest.mark.parametrize("option", ["top_k", "top_p", "min_p"])
def test_every_drawn_token_is_inside_of_the_filter(option):
    given, net, outside = OPTIONS[option], fresh(), 0
    filtered = [request(place, stream=place, **given) for place in range(16)]
    free = [request(place, stream=place, temperature=2.0) for place in range(16)]
    with Engine(net, 16) as engine:
        numbers = engine.submit([*filtered, *free])
        answers = finished(engine, numbers)
    for asked, answer in zip([*filtered, *free], answers, strict=True):
        logits = np.array(net(mx.array([[*asked.ids, *answer]]))[0])[len(asked.ids) - 1 : -1]
        inside = [
            inside_of_filter(row, filtered[0])[token] for row, token in zip(logits, answer, strict=True)
        ]
        if asked in filtered:
            assert all(inside)
        outside += inside.count(False)
    assert outside > 20, "without the filter others are drawn"


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_has_an_effect(option):
    given = OPTIONS[option]
    without = {name: value for name, value in given.items() if name == "temperature" and option != name}
    with Engine(fresh()) as engine:
        numbers = engine.submit([request(7, **without), request(7, **given)])
        plain, changed = finished(engine, numbers)
    assert plain != changed
    if option in ("presence_penalty", "frequency_penalty"):
        assert len(set(changed)) == 9 > len(set(plain))
    if option == "logit_bias":
        assert changed == [9] * 9


@pytest.mark.parametrize(
    "options, message",
    [
        ({"temperature": -1.0}, "temperature is -1.0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": 0.0}, "top_p is 0.0"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": float("inf")}, "presence_penalty is inf"),
        ({"frequency_penalty": 2000.0}, "frequency_penalty is 2000.0"),
        ({"logprobs": -1}, "logprobs is -1"),
        ({"logit_bias": {3: float("nan")}}, "logit_bias of token 3 is nan"),
        ({"logit_bias": {64: 1.0}}, "ids outside of the token embedding"),
        ({"constraint": Alternating()}, "a constraint without an end token"),
    ],
)
def test_options_out_of_their_range_are_refused_and_nothing_begins(options, message):
    with Engine(fresh()) as engine:
        with pytest.raises(ModelError, match=message):
            engine.submit([request(0), request(1, **options)])
        assert not engine.busy and engine.step() == []


@pytest.mark.parametrize("options", [{"logit_bias": {9: 100.0}, "temperature": 0.5}, {"constraint": True}])
def test_logprobs_are_those_of_the_model_before_options(options):
    net = fresh()
    if "constraint" in options:
        options = {"constraint": Alternating(9), "end_ids": [63]}
    with Engine(net) as engine:
        engine.submit([request(3), request(2, logprobs=4, **options)])
        tokens = [token for step in iter(engine.step, []) for token in step if token.request == 1]
    ids = [*request(2).ids]
    for token in tokens:
        exact = log_softmax(np.array(net(mx.array([ids]))[0, -1], np.float64))
        assert token.token == 9 or "constraint" in options
        assert token.logprob == pytest.approx(exact[token.token], abs=1e-4)
        assert [id for id, _ in token.top] == np.argsort(-exact)[:4].tolist()
        ids.append(token.token)


def test_a_long_prompt_delays_nobodys_token_by_more_than_one_chunk(way):
    net, passes = fresh(), []
    with Engine(net, 8, prefill_tokens=20) as engine:
        forward = engine._forward

        def counted(rows, tokens, layers):
            passes.append(tokens.shape)
            return forward(rows, tokens, layers)

        engine._forward = counted
        short = engine.submit([Request([1, 2, 3], max_tokens=60)])
        while not engine.advance():
            pass
        long = engine.submit([Request([5] * length, max_tokens=2) for length in (300, 250, 7)])
        waits = 0
        for _ in range(45):
            passes.clear()
            tokens = engine.advance()
            assert [token.request for token in tokens][:1] == short, "it gets a token each time"
            chunks = [rows * width for rows, width in passes if width > 1]
            assert len(chunks) <= 1 and sum(chunks) <= 20
            waits += not any(token.request in long for token in tokens)
    assert waits > 20


def test_busy_says_whether_something_is_left():
    with Engine(fresh(), 1, prefill_tokens=2) as engine:
        assert not engine.busy
        numbers = engine.submit([request(0), request(7)])
        assert engine.busy and engine.advance() == []
        assert len(finished(engine, numbers)[1]) == 9 and not engine.busy
        engine.submit([request(0), request(7)])
        engine.advance()
        engine.cancel([2, 3])
        assert not engine.busy


def test_cost_is_what_the_cache_of_a_row_takes(way):
    net = fresh()
    bound = Request([1] * 300, max_tokens=100)
    with Engine(net) as engine:
        cost = engine.cost(bound)
        engine.submit([bound])
        while not engine.advance():
            pass
        used = sum(layer.nbytes for layer in engine._decoding[0].layers)
    assert used == cost == 3 * 2 * 2 * 16 * 4 * 512  # layers, keys and values, heads, width, bytes, positions
    with Engine(net) as engine:
        assert engine.cost(Request([1], max_tokens=1)) == cost // 2


def test_a_cancelled_request_frees_its_memory():
    with Engine(fresh(), prefill_tokens=10_000) as engine:
        engine.submit([request(0)])
        engine.step()
        mx.clear_cache()
        before = mx.get_active_memory()
        (number,) = engine.submit([Request([3] * 6000, max_tokens=50)])
        for _ in range(4):
            engine.step()
        assert mx.get_active_memory() > before + (4 << 20)
        engine.cancel([number])
        engine.step()
        assert mx.get_active_memory() < before + (1 << 20)


def test_sixteen_answers_at_once_do_not_leak(values):
    """Museum: mlx-lm 965, words of one answer in another with 16 requests at once."""
    requests = [Request([1 + place] * (3 + place), max_tokens=12) for place in range(16)]
    singles = []
    for single in requests:
        with Engine(fresh(), 1) as engine:
            singles += finished(engine, engine.submit([single]))
    with Engine(fresh(), 16) as engine:
        assert finished(engine, engine.submit(requests)) == singles


def test_plain_and_constrained_rows_share_a_batch():
    """Museum: omlx 1798, plain and structured rows in one batch crashed."""
    plain = [request(place) for place in range(3)]
    bound = Alternating(5)
    with Engine(fresh()) as engine:
        alone = [finished(engine, engine.submit([single]))[0] for single in plain]
        both = [*plain, Request([3, 4], [63], 20, constraint=bound)]
        *free, structured = finished(engine, engine.submit(both))
    assert free == alone
    assert [token % 2 for token in structured[:-1]] == [0, 1, 0, 1, 0] and structured[-1] == 63
    assert bound.tokens == structured[:-1]
