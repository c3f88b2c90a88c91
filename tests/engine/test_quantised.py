"""Keys and values in 8 or 4 bits give each row of a batch what it gets alone, and nearly what it gets in
float32."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from adapters.test_layers import fresh
from engine.test_laws import network
from mlx_lm.models.cache import QuantizedKVCache, RotatingKVCache
from scipy.special import log_softmax, softmax

from tunesmith.engine.engine import Engine
from tunesmith.engine.prefixes import Prefixes
from tunesmith.engine.quantised import QuantisedRows
from tunesmith.engine.requests import NewToken, Request
from tunesmith.errors import ModelError

RANDOM = np.random.Generator(np.random.PCG64(2))
PROMPTS = [RANDOM.integers(0, 64, length).tolist() for length in (3, 40, 1, 300, 17)]


def requests(**options) -> list[Request]:
    return [Request(prompt, max_tokens=7, digest="base", **options) for prompt in PROMPTS]


def answered(engine: Engine, numbers: list[int]) -> list[list[NewToken]]:
    said: dict[int, list[NewToken]] = {number: [] for number in numbers}
    while tokens := engine.step():
        for token in tokens:
            said[token.request].append(token)
    return [said[number] for number in numbers]


def answers(engine: Engine, numbers: list[int]) -> list[list[int]]:
    return [[token.token for token in tokens] for tokens in answered(engine, numbers)]


@pytest.mark.parametrize("bits", [8, 4])
def test_rows_of_a_batch_get_what_each_gets_alone(bits):
    """Museum: mlx-lm 1467, grouped-query attention, a quantised cache and padding crashed from two rows
    on."""
    net = network()
    alone = []
    for request in requests():
        with Engine(net, 1, kv_bits=bits) as engine:
            alone += answers(engine, engine.submit([request]))
    prefixes, hits = Prefixes(1 << 30), 0
    for size, budget in ((5, 10_000), (2, 30), (5, 30)):
        with Engine(net, size, kv_bits=bits, prefill_tokens=budget, prefixes=prefixes) as engine:
            tokens = answered(engine, engine.submit(requests()))
        assert [[token.token for token in own] for own in tokens] == alone
        hits += sum(own[0].cached > 0 for own in tokens)
    assert hits > 5 and prefixes.find("base", PROMPTS[1]) is None, "bits are part of the key"


def test_probabilities_are_those_of_one_sequence_of_mlx_lm():
    errors = {}
    net, ids = network(), mx.array([PROMPTS[3]])
    full = net(ids)[0, -1]
    for bits in (8, 4):
        cache = [QuantizedKVCache(32, bits) for _ in net.layers]
        net(ids[:, :-1], cache=cache)
        logits = np.array(net(ids[:, -1:], cache=cache)[0, -1], np.float64)
        with Engine(net, kv_bits=bits) as engine:
            engine.submit([Request(PROMPTS[0], max_tokens=9), Request(PROMPTS[3], max_tokens=1, logprobs=64)])
            (token,) = [token for step in iter(engine.step, []) for token in step if token.request == 1]
        top = np.array([value for _, value in sorted(token.top)])
        np.testing.assert_allclose(top, log_softmax(logits), atol=2e-3)
        errors[bits] = np.abs(softmax(logits) - softmax(np.array(full, np.float64))).sum()
    assert 0 < errors[8] < errors[4] / 4


def test_bits_save_memory():
    long = Request([1] * 1000, max_tokens=24)
    costs = []
    for bits in (None, 8, 4):
        with Engine(network(), kv_bits=bits) as engine:
            costs.append(engine.cost(long))
            engine.submit([long])
            engine.step()
            assert sum(layer.nbytes for layer in engine._decoding[0].layers) == costs[-1]
    full, eight, four = costs
    assert eight < 0.33 * full and four < 0.2 * full


def test_what_cannot_be_quantised_is_refused_with_the_reason():
    with pytest.raises(ModelError, match="kv_bits is 3"), Engine(network(), kv_bits=3):
        pass
    with pytest.raises(ModelError, match="heads of 16 and 16 values cannot be kept in 8 bits"):
        Engine(fresh(), kv_bits=8).__enter__()
    net = network()
    net.make_cache = lambda: [RotatingKVCache(8) for _ in net.layers]
    with pytest.raises(ModelError, match="has a RotatingKVCache, which cannot be kept in 4 bits"):
        Engine(net, kv_bits=4).__enter__()


def test_rows_can_be_trimmed():
    """Speculation takes back what was drafted in vain."""
    rows = QuantisedRows([0, 2], 32, 8)
    states = mx.random.normal((2, 1, 6, 32), key=mx.random.key(1))
    rows.update_and_fetch(states, states)
    assert rows.trim(2) == 2 and rows.offset.tolist() == [4, 2] and rows.size() == 4
