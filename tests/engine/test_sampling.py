"""Each row's token is chosen as if the row were alone, and each option does what NumPy says it does."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from numpy.testing import assert_allclose
from scipy.special import log_softmax, softmax

from tunesmith.engine.requests import Request
from tunesmith.engine.sampling import Draws, Edits, Scores, _filtered, _ranked, choose

RANDOM = np.random.Generator(np.random.PCG64(5))
LOGITS = RANDOM.normal(0, 2, (6, 300)).astype(np.float32)


def filtered(logits: np.ndarray, request: Request) -> np.ndarray:
    """(V,) bool: the tokens that the filters of ``request`` leave in, by sorting."""
    inside = np.ones(logits.size, bool)
    ranked = np.sort(logits)[::-1]
    if request.top_k:
        inside &= logits >= ranked[min(request.top_k, logits.size) - 1]
    shares = softmax(np.where(inside, logits, -np.inf).astype(np.float64))
    if request.top_p < 1:
        more_likely = np.array([shares[logits > logit].sum() for logit in logits])
        inside &= more_likely < request.top_p
    return inside & (shares >= request.min_p * shares.max())


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 1},
        {"top_k": 7},
        {"top_k": 1000},
        {"top_p": 0.3},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.7},
        {"top_k": 40, "top_p": 0.9, "min_p": 0.05},
        {},
    ],
)
def test_filters_keep_the_tokens_that_numpy_keeps(options):
    request = Request([1], temperature=1.0, **options)
    kept = np.isfinite(np.array(_filtered(mx.array(LOGITS), [request] * len(LOGITS))))
    np.testing.assert_array_equal(kept, [filtered(row, request) for row in LOGITS])
    assert kept.all() == (options in ({}, {"top_k": 1000}))


@pytest.mark.skipif(mx.default_device().type != mx.DeviceType.cpu, reason="NumPy sorts on a CPU only")
def test_a_whole_vocabulary_is_ranked_by_numpy_and_to_the_bit_as_by_mlx(monkeypatch):
    logits = mx.array(RANDOM.normal(0, 3, (4, 5000)).astype(np.float32).round(2))  # with ties
    logits[1, 7:4000] = -mx.inf
    logits[2, :30] = 0.0
    expected = np.array(-mx.sort(-logits, axis=-1))

    def too_slow(*arguments, **options):
        raise AssertionError("MLX takes 30 times as long to sort a vocabulary")

    monkeypatch.setattr(mx, "sort", too_slow)
    np.testing.assert_array_equal(np.array(_ranked(logits, 5000)), expected)


def test_rows_of_a_batch_are_drawn_as_each_alone():
    requests = [
        Request([1], temperature=0.7, top_k=9, seed=1),
        Request([1]),
        Request([1], temperature=1.3, top_p=0.8, seed=2),
        Request([1], temperature=1.0, min_p=0.1, seed=3),
        Request([1], temperature=1.0, seed=4),
        Request([1], temperature=1.0, seed=4, stream=1),
    ]
    draws = [Draws(request) for request in requests]
    for place in (0, 1, 70):
        keys = [draw.key(place) for draw in draws]
        together = choose(mx.array(LOGITS), requests, keys).tolist()
        alone = [
            choose(mx.array(LOGITS[row : row + 1]), [requests[row]], [keys[row]]).item() for row in range(6)
        ]
        assert together == alone and together[1] == LOGITS[1].argmax()


def test_draws_are_those_of_a_chain_of_splits():
    """The keys of 0.1.0, so that seeded answers of old runs stay what they were."""
    request = Request([1], temperature=1.0, seed=8, stream=3)
    entropy = np.random.SeedSequence([8, 3])
    chain = mx.random.key(int(entropy.generate_state(1, np.uint32)[0]))
    draws = Draws(request)
    for place in range(130):
        chain, key = mx.random.split(chain)
        np.testing.assert_array_equal(draws.key(place), np.array(key))
    logits = mx.array(LOGITS[:1])
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    assert (
        choose(logits, [request], [draws.key(129)]).item() == mx.random.categorical(logprobs, key=key).item()
    )


def test_penalties_and_biases_are_those_of_numpy():
    request = Request(
        [4, 9, 9],
        repetition_penalty=1.5,
        presence_penalty=0.25,
        frequency_penalty=-0.5,
        logit_bias={2: 3.0, 9: -100.0},
    )
    edits, generated, logits = Edits(request), [7, 9, 7], LOGITS[0].astype(np.float64)
    for count in range(len(generated) + 1):
        new = mx.array(generated[count - 1 : count]) if count else None
        edited = np.array(edits(mx.array(LOGITS[0]), new))
        expected, counts = logits.copy(), np.bincount(generated[:count], minlength=logits.size)
        seen = sorted({4, 9, *generated[:count]})
        expected[seen] = np.where(logits[seen] > 0, logits[seen] / 1.5, logits[seen] * 1.5)
        expected += 0.5 * counts - 0.25 * (counts > 0)
        expected[2] += 3
        expected[9] -= 100
        assert_allclose(edited, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "option",
    [
        {"presence_penalty": 0.5},
        {"frequency_penalty": 0.5},
        {"logit_bias": {3: 1.0}},
        {"repetition_penalty": 1.1},
    ],
)
def test_penalties_take_no_more_memory_with_each_token(option):
    edits, logits = Edits(Request([1, 2, 3], **option)), mx.array(LOGITS[0])
    token, used = mx.array([5], mx.uint32), []
    for count in range(60):
        token = mx.argmax(edits(logits, token if count else None), keepdims=True).astype(mx.uint32)
        mx.eval(token)
        used.append(mx.get_active_memory())
    assert used[-1] == used[20]


@pytest.mark.parametrize("temperature", [1e-20, 1e-37, 1e-39, 1e-50])
@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.1}])
def test_the_lowest_temperatures_draw_the_likeliest_token(temperature, filters):
    request = Request([1], temperature=temperature, **filters)
    tokens = choose(mx.array(LOGITS), [request] * 6, [Draws(request).key(0)] * 6)
    assert tokens.tolist() == LOGITS.argmax(axis=-1).tolist()


def test_scores_are_those_of_the_raw_logits():
    requests = [Request([1], logprobs=count) for count in (3, None, 0, 5, None, 2)]
    tokens = mx.array([5, 6, 7, 8, 9, 10])
    scores = Scores(mx.array(LOGITS), tokens, requests)
    exact = log_softmax(LOGITS.astype(np.float64), axis=-1)
    for place, request in enumerate(requests):
        logprob, top = scores.of(place)
        if request.logprobs is None:
            assert (logprob, top) == (None, ())
            continue
        assert logprob == pytest.approx(exact[place, 5 + place], abs=2e-6)
        order = np.argsort(-exact[place])[: request.logprobs]
        assert [token for token, _ in top] == order.tolist()
        assert_allclose([value for _, value in top], exact[place][order], atol=2e-6)
    assert scores.kept([3, 5]).of(0) == scores.of(3) and scores.kept([1, 4]).of(1) == (None, ())


def test_scores_of_a_long_vocabulary_are_exact():
    """Museum: MLX's own sum over 152,064 words is not exact on a CPU."""
    logits = mx.random.normal((1, 152_064), key=mx.random.key(3))
    logprob, _ = Scores(logits, mx.array([17]), [Request([1], logprobs=0)]).of(0)
    assert logprob == pytest.approx(log_softmax(np.array(logits, np.float64))[0, 17], abs=2e-6)
