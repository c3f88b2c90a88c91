"""A row's tokens do not depend on what else the engine does: random schedules of joins, leaves, cancels,
cached prefixes and evictions, with mixtures of adapters, greedy, drawn, penalised and constrained rows.

Rounding depends on the shape of a pass, so requests are used whose tokens stay the same if the logits change
by more than rounding does."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapters.test_layers import move
from mlx.utils import tree_map
from mlx_lm.models import llama
from scipy.special import log_softmax

from tunesmith import adapters
from tunesmith.adapters import DoRA, LoRA
from tunesmith.engine import batching
from tunesmith.engine.engine import Engine
from tunesmith.engine.prefixes import Prefixes
from tunesmith.engine.requests import Request
from tunesmith.engine.sampling import Draws, choose

VOCABULARY = 64
END = 5
SPECS = {
    "low": LoRA(rank=2, targets=("q_proj", "v_proj")),
    "wide": LoRA(rank=8, alpha=64, targets="all-linear"),
    "lengths": DoRA(rank=4, targets=("all-linear", "lm_head")),
}
SHAKEN = (1 - 1e-4, 1, 1 + 1e-4)
"""Factors of the logits under which a request of the pool keeps its tokens."""


def network(bits: int | None = None) -> llama.Model:
    """A random llama with heads of 32, so that its keys and values can be quantised."""
    sizes = llama.ModelArgs(
        model_type="llama",
        hidden_size=128,
        num_hidden_layers=2,
        intermediate_size=96,
        num_attention_heads=4,
        rms_norm_eps=1e-5,
        vocab_size=VOCABULARY,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    net, random = llama.Model(sizes), np.random.Generator(np.random.PCG64(3))

    def value(old: mx.array) -> mx.array:
        return mx.array(random.normal(0, 0.2, old.shape).astype(np.float32) + (old.ndim == 1))

    net.update(tree_map(value, net.parameters()))
    if bits is not None:
        nn.quantize(net, group_size=32, bits=bits)
    mx.eval(net.parameters())
    return net.eval()


class Answer(NamedTuple):
    """``likely``: the log-probability of each token to the model itself."""

    request: Request
    tokens: list[int]
    likely: list[float]


class EveryThird:
    """A constraint: each token has the same remainder by three as the last, but for one; after ``most`` an
    end token has to follow."""

    def __init__(self, most: int) -> None:
        self._most, self._tokens = most, []

    def allowed(self) -> np.ndarray | None:
        if len(self._tokens) >= self._most:
            return np.arange(VOCABULARY - 2) == END
        if len(self._tokens) % 4 == 3:
            return None  # anything may follow
        last = self._tokens[-1] if self._tokens else 1
        return np.arange(VOCABULARY - 2) % 3 == last % 3  # shorter than the logits

    def advance(self, token: int) -> None:
        assert len(self._tokens) < self._most
        self._tokens.append(token)


def drafted(place: int) -> Request:
    """The request ``place`` of the pool, before its adapter: prompts of 1 to 60 tokens with common
    beginnings, and options in turn."""
    random = np.random.Generator(np.random.PCG64(place))
    stem = np.random.Generator(np.random.PCG64(place % 4)).integers(0, VOCABULARY, 48)
    ids = [*stem[: random.integers(0, 48)], *random.integers(0, VOCABULARY, random.integers(1, 13))]
    options = [
        {},
        {"temperature": 1.0, "seed": place},
        {"temperature": 0.7, "top_k": 9, "top_p": 0.8, "seed": 3, "stream": place},
        {"repetition_penalty": 1.3, "presence_penalty": 0.5, "frequency_penalty": 0.3},
        {"logit_bias": {3: 2.0, END: 4.0}, "logprobs": 2},
        {"temperature": 1.2, "min_p": 0.05, "frequency_penalty": -0.4, "seed": 9},
    ][place % 6]
    return Request(
        [int(token) for token in ids],
        [END],
        int(random.integers(1, 12)),
        adapter=[None, *SPECS][place % 4],
        digest=[None, *SPECS][place % 4] or "base",
        **options,
    )


def constrained(place: int, request: Request) -> Request:
    """``request`` as it is submitted: a constraint belongs to one submission."""
    return replace(request, constraint=EveryThird(place % 7)) if place % 5 == 0 else request


def alone(net: nn.Module, place: int, request: Request, factor: float) -> tuple[list[int], list[float]]:
    """The tokens of ``request`` by whole passes over all tokens, without engine, cache and batch; and how
    likely each was to the model itself."""
    request, ids, said, likely = constrained(place, request), list(request.ids), [], []
    draws, biases = Draws(request), np.zeros(VOCABULARY)
    for token, bias in request.logit_bias.items():
        biases[token] = bias
    for turn in range(request.max_tokens):
        logits = np.array(net(mx.array([ids]))[0, -1]) * factor
        logprobs = log_softmax(logits.astype(np.float64))
        seen = np.bincount(ids, minlength=VOCABULARY) > 0
        counts = np.bincount(np.array(said, int), minlength=VOCABULARY)
        penalty = request.repetition_penalty
        logits = np.where(seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)
        logits = (
            logits - request.frequency_penalty * counts - request.presence_penalty * (counts > 0) + biases
        )
        if (constraint := request.constraint) is not None:
            if (allowed := constraint.allowed()) is not None:
                logits[~np.append(allowed, [False, False])] = -np.inf
        token = choose(mx.array(logits[None].astype(np.float32)), [request], [draws.key(turn)]).item()
        ids.append(int(token))
        said.append(int(token))
        likely.append(float(logprobs[said[-1]]))
        if token == END:
            break
        if constraint is not None:
            constraint.advance(int(token))
    return said, likely


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, adapters.Adapter]:
    """Adapters that were moved off their start."""
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, spec) in enumerate(SPECS.items()):
        net = network()
        spec.attach(net, number)
        adapters.save(move(net, number), spec, folder / name)
    return {name: adapters.read(folder / name) for name in SPECS}


@pytest.fixture(scope="module", params=[None, 4], ids=["float32", "4 bits"])
def pool(request, values) -> tuple[int | None, dict[int, Answer]]:
    """Bits of the base, and requests with their tokens alone, by place."""
    requests = {place: drafted(place) for place in range(60)}
    answers: dict[int, Answer] = {}
    for name in [None, *SPECS]:
        net = network(request.param)
        if name is not None:
            values[name].attach(net)
        for place, asked in requests.items():
            if asked.adapter == name:
                said = [alone(net, place, asked, factor) for factor in SHAKEN]
                if said[0][0] == said[1][0] == said[2][0]:
                    answers[place] = Answer(asked, *said[1])
    assert len(answers) > 40, "most are well apart"
    assert len({tuple(answer.tokens) for answer in answers.values()}) > 32
    return request.param, answers


def follow(pool, values, seed: int) -> tuple[int, int, int]:
    """Play one random schedule and compare each row with itself alone; returns how many rows ended, how many
    were cancelled, and how many tokens came from the prefix cache."""
    bits, answers = pool
    random = np.random.Generator(np.random.PCG64(seed))
    prefixes = Prefixes(int(random.choice([20_000, 60_000, 1 << 30]))) if random.random() < 0.7 else None
    net, said = network(bits), {}
    places, ended, cancelled, cached = {}, set(), set(), 0
    with (
        adapters.routed(net, values) as routing,
        Engine(
            net,
            int(random.integers(1, 7)),
            routing,
            prefill_tokens=int(random.integers(3, 60)),
            prefixes=prefixes,
        ) as engine,
    ):
        left = int(random.integers(3, 14))
        while left or engine.busy:
            if left and random.random() < 0.4:
                joining = random.choice(list(answers), min(left, int(random.integers(1, 4)))).tolist()
                left -= len(joining)
                numbers = engine.submit([constrained(place, answers[place].request) for place in joining])
                places |= dict(zip(numbers, joining, strict=True))
                said |= {number: [] for number in numbers}
            for token in engine.advance():
                assert token.request not in ended | cancelled
                answer = answers[places[token.request]]
                if answer.request.logprobs is not None:
                    assert token.logprob == pytest.approx(answer.likely[len(said[token.request])], abs=1e-3)
                said[token.request].append(token.token)
                cached += token.cached
                if token.finish is not None:
                    assert token.finish == ("stop" if token.token == END else "length")
                    ended.add(token.request)
            if random.random() < 0.08 and (living := sorted(said.keys() - ended - cancelled)):
                cancelled.add(number := int(random.choice(living)))
                engine.cancel([number])
    assert ended | cancelled == said.keys()
    for number, tokens in said.items():
        expected = answers[places[number]].tokens
        assert tokens == (expected if number in ended else expected[: len(tokens)]), (seed, places[number])
    return len(ended), len(cancelled), cached


@pytest.mark.parametrize("way", ["batched", "separate"])
def test_rows_get_the_tokens_that_each_gets_alone(pool, values, way, monkeypatch):
    if way == "separate":
        monkeypatch.setattr(batching, "batches", lambda net: False)
    totals = np.sum([follow(pool, values, seed) for seed in range(12 if way == "separate" else 40)], axis=0)
    assert (totals > [60, 5, 150]).all(), totals


@pytest.mark.sweep
def test_two_thousand_schedules(pool, values):
    for seed in range(1000, 2000):  # for each of the two bases
        follow(pool, values, seed)
