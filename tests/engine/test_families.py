"""The laws hold too where layers have sliding windows, recurrent states or chunks: each answer is the one
that whole passes give, whatever shares its batch and its prefix."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from model.families import made
from scipy.special import log_softmax

from tunesmith.engine import batching
from tunesmith.engine.engine import Engine
from tunesmith.engine.prefixes import Prefixes
from tunesmith.engine.requests import NewToken, Request

FAMILIES = {
    "gemma3": {"KVCache", "RotatingKVCache"},
    "qwen3_5": {"ArraysCache", "KVCache"},
    "llama4": {"ChunkedKVCache", "KVCache"},
    "recurrent_gemma": {"ArraysCache", "RotatingKVCache"},
}
STEM = np.random.Generator(np.random.PCG64(1)).integers(0, 96, 80).tolist()
WINDOW = 16


@pytest.fixture(scope="module", params=FAMILIES)
def net(request) -> nn.Module:
    window = {"sliding_window": WINDOW} if request.param == "gemma3" else {}
    net = made(request.param, **window)
    assert {type(layer).__name__ for layer in make_prompt_cache(net)} == FAMILIES[request.param]
    return net


def require_own_answers(net: nn.Module, requests: list[Request], tokens: list[NewToken]) -> None:
    """Each token is nearly as likely as a whole pass says, and nearly the likeliest."""
    for number, request in enumerate(requests):
        ids = list(request.ids)
        own = [token for token in tokens if token.request == number]
        assert len(own) == request.max_tokens
        for token in own:
            logprobs = log_softmax(np.array(net(mx.array([ids]))[0, -1], np.float64))
            assert token.logprob == pytest.approx(logprobs[token.token], abs=1e-3), (number, len(ids))
            assert logprobs[token.token] > logprobs.max() - 1e-3
            ids.append(token.token)


@pytest.mark.parametrize("batch_size, prefill_tokens", [(1, 7), (3, 3), (5, 3), (5, 7), (5, 40), (5, 1000)])
def test_rows_of_any_chunk_and_batch_get_their_own_answers(net, batch_size, prefill_tokens):
    """Museum: mlx-lm's BatchRotatingKVCache reads several tokens wrongly after single ones."""
    lengths = (62, 5, 40, 1, 17, 30, 58)
    requests = [
        Request([*STEM[:length], 3 + place], max_tokens=8 - place, logprobs=0)
        for place, length in enumerate(lengths)
    ]
    with Engine(net, batch_size, prefill_tokens=prefill_tokens) as engine:
        engine.submit(requests)
        tokens = [token for step in iter(engine.step, []) for token in step]
    require_own_answers(net, requests, tokens)


def test_a_row_that_joins_while_another_fills_its_window_gets_its_own_answer(net):
    """Museum: after single tokens of three rows, the mask for two tokens of two rows hid one token too many
    of the row that mlx-lm's BatchRotatingKVCache pads on the left."""
    requests = [
        Request([*STEM[:length], 3 + place], max_tokens=4, logprobs=0)
        for place, length in enumerate((70, 18, 30))
    ]
    with Engine(net, 8, prefill_tokens=5) as engine:
        engine.submit(requests[:2])
        tokens = [token for _ in range(5) for token in engine.advance()]
        engine.submit(requests[2:])
        tokens += [token for step in iter(engine.step, []) for token in step]
    require_own_answers(net, requests, tokens)


def test_what_cannot_be_trimmed_is_not(net):
    """Museum: mlx-lm 1494, ChunkedKVCache says it can be trimmed where it dropped what would come back."""
    prefixes, tokens, requests = Prefixes(1 << 30), [], []
    with Engine(net, 3, prefixes=prefixes) as engine:
        for length, tail in ((70, 1), (70, 2), (50, 3), (79, 4), (30, 5), (12, 6), (14, 7)):
            requests.append(Request([*STEM[:length], tail], max_tokens=4, logprobs=0, digest="base"))
            engine.submit(requests[-1:])
            tokens += [token for step in iter(engine.step, []) for token in step]
    require_own_answers(net, requests, tokens)
    assert tokens[4].cached == 70 == requests[1].ids.index(2, 70), "what is a whole prefix serves"


def test_a_prompt_waits_only_for_a_prefix_that_will_serve_it(net):
    if not batching.batches(net):
        pytest.skip("it reads one prompt at a time anyway")
    alike = [Request([*STEM, 3 + place], max_tokens=4, digest="base") for place in range(3)]
    apart = [Request([*STEM[:70], 3 + place, 4], max_tokens=4, digest="base") for place in range(3)]
    with Engine(net, 4, prefill_tokens=4000, prefixes=Prefixes(1 << 30)) as engine:
        engine.submit(apart)
        engine.advance()
        assert sum(len(batch.rows) for batch in engine._decoding) == 3, "all were read at once"
    with Engine(net, 4, prefill_tokens=4000, prefixes=Prefixes(1 << 30)) as engine:
        engine.submit(alike)
        tokens = [token for step in iter(engine.step, []) for token in step]
        assert sorted(token.cached for token in tokens if token.cached) == [80, 80], "a whole prefix serves"


def test_cost_covers_what_a_window_holds_while_a_long_prompt_is_read(net):
    request = Request([*STEM] * 12, max_tokens=4)
    with Engine(net, 1, prefill_tokens=700) as engine:
        cost = engine.cost(request)
        engine.submit([request])
        engine.advance()
        assert engine._reading is not None
        assert cost // 3 < sum(layer.nbytes for layer in engine._reading.layers) <= cost
