"""Guesses change no token of an answer: not greedy, not drawn, not with adapters, joins, cancels and caches."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from adapters.test_layers import fresh, move

from tunesmith import adapters
from tunesmith.adapters import DoRA, LoRA
from tunesmith.engine import speculation
from tunesmith.engine.engine import Engine
from tunesmith.engine.prefixes import Prefixes
from tunesmith.engine.requests import Request
from tunesmith.engine.speculation import DraftModel, Pace, PromptLookup, Reading, Speculation, next_phase
from tunesmith.errors import ModelError
from tunesmith.model import abilities

SPECS = {"low": LoRA(rank=2, targets=("q_proj", "v_proj")), "lengths": DoRA(rank=4, targets="all-linear")}


class Oracle:
    """Guesses the answer that is known, with every third token wrong."""

    def __init__(self, prompt: list[int], answer: list[int]) -> None:
        self.text = [*prompt, *answer]
        self.asked = 0

    def guess(self, tokens, most):
        self.asked += 1
        known = len(tokens)
        guesses = self.text[known : known + most] if self.text[:known] == [*tokens] else [1, 2, 3][:most]
        return [token if (known + place) % 3 else token ^ 1 for place, token in enumerate(guesses)]


@pytest.fixture(autouse=True, params=["batched", "separate"])
def way(request, monkeypatch) -> None:
    if request.param == "separate":
        monkeypatch.setattr(abilities, "batches", lambda net: False)


@pytest.fixture(autouse=True)
def always(monkeypatch) -> None:
    """Guesses are made from the third token on, whatever they cost."""
    monkeypatch.setattr(speculation, "ENOUGH", 2)
    monkeypatch.setattr(speculation, "START", 0.0)
    monkeypatch.setattr(speculation, "STAY", 0.0)


@pytest.fixture(scope="module")
def values(tmp_path_factory) -> dict[str, adapters.Adapter]:
    folder = tmp_path_factory.mktemp("adapters")
    for number, (name, spec) in enumerate(SPECS.items()):
        net = fresh()
        spec.attach(net, number)
        adapters.save(move(net, number), spec, folder / name)
    return {name: adapters.read(folder / name) for name in SPECS}


def asked(place: int = 0, **options) -> Request:
    options = {"max_tokens": 24, **options}
    return Request([(37 * place + 11 * step) % 64 for step in range(5 + place)], **options)


def answers(engine: Engine, requests: list[Request]) -> list[list[int]]:
    """The tokens of requests that come one after the other."""
    all_tokens = []
    for request in requests:
        number = engine.submit([request])[0]
        tokens = []
        while new := engine.step():
            tokens += [token.token for token in new if token.request == number]
        all_tokens.append(tokens)
    return all_tokens


def plain(request: Request, values=None) -> list[int]:
    net = fresh()
    with adapters.routed(net, values or {}) as routing, Engine(net, routing=routing) as engine:
        return answers(engine, [request])[0]


OPTIONS = {
    "greedy": {},
    "drawn": {"temperature": 0.8, "seed": 5, "stream": 2},
    "drawn from few": {"temperature": 1.5, "top_k": 9, "top_p": 0.9, "seed": 1},
    "penalties": {"temperature": 0.5, "seed": 3, "repetition_penalty": 1.3, "frequency_penalty": 0.4},
    "bias and logprobs": {"logit_bias": {3: 2.0}, "logprobs": 2},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=list(OPTIONS))
@pytest.mark.parametrize("adapter", [None, *SPECS])
def test_tokens_are_those_without_guesses(values, options, adapter):
    request = asked(adapter=adapter, **options)
    expected = plain(request, values)
    oracle = Oracle([*request.ids], expected)
    speculating = Speculation(oracle)
    net = fresh()
    with adapters.routed(net, values) as routing:
        with Engine(net, routing=routing, speculation=speculating) as engine:
            assert answers(engine, [request, request]) == [expected, expected]
    assert 0 < oracle.asked < 30, "several tokens come from one pass"
    assert speculating.paces[adapter].accepted > 10
