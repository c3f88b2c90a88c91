"""Guesses change no token: greedy or drawn, with adapters, constraints, joins, cancels, cached prefixes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from adapters.test_layers import fresh, move
from mlx.utils import tree_map
from mlx_lm.models import llama
from model.families import made

from tunesmith import adapters
from tunesmith.adapters import DoRA, LoRA
from tunesmith.engine import batching, speculation
from tunesmith.engine.engine import Engine
from tunesmith.engine.prefixes import Prefixes
from tunesmith.engine.requests import Request
from tunesmith.engine.speculation import DraftModel, Pace, PromptLookup, Speculation, TimedPass, next_phase
from tunesmith.errors import ModelError

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
        monkeypatch.setattr(batching, "batches", lambda net: False)


@pytest.fixture(autouse=True)
def always(monkeypatch) -> None:
    """Guesses are made from the third token on, whatever they cost."""
    monkeypatch.setattr(speculation, "ENOUGH", 2)
    monkeypatch.setattr(speculation, "RECENT", 4)
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


class Allowed:
    """A constraint: tokens of the other parity than the last, and only the end token 63 after ``most``."""

    def __init__(self, most: int) -> None:
        self.most, self.seen = most, list[int]()

    def allowed(self) -> np.ndarray:
        if len(self.seen) == self.most:
            return np.arange(64) == 63
        return np.arange(64) % 2 != (self.seen[-1] % 2 if self.seen else 0)

    def advance(self, token: int) -> None:
        assert self.allowed()[token]
        self.seen.append(token)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_constrained_tokens_are_those_without_guesses(temperature):
    def constrained() -> Request:
        return asked(constraint=Allowed(15), end_ids=[63], temperature=temperature, seed=2)

    expected = plain(constrained())
    assert expected[-1] == 63 and len(expected) == 16
    with Engine(fresh(), speculation=Speculation(Oracle([*asked().ids], expected))) as engine:
        assert answers(engine, [constrained()]) == [expected]


@pytest.mark.parametrize("joins", range(1, 12, 2))
@pytest.mark.parametrize("leaves", ["ends", "is cancelled"])
def test_others_join_and_leave_and_change_no_token(values, joins, leaves):
    first = asked(adapter="low", temperature=0.7, seed=4, max_tokens=40)
    second = asked(3, adapter="lengths", max_tokens=8)
    expected, others = plain(first, values), plain(second, values)
    net = fresh()
    oracle = Oracle([*first.ids], expected)
    with adapters.routed(net, values) as routing:
        with Engine(net, routing=routing, speculation=Speculation(oracle)) as engine:
            number = engine.submit([first])[0]
            said: dict[int, list[int]] = {number: []}
            for step in range(60):
                if step == joins:
                    other = engine.submit([second])[0]
                    said[other] = []
                if step == joins + 5 and leaves == "is cancelled":
                    engine.cancel([other])
                for token in engine.step():
                    said[token.request].append(token.token)
    assert said[number] == expected
    assert said[other] == others[: len(said[other])] and (leaves == "is cancelled") == (len(said[other]) < 8)
    assert oracle.asked > 3


def test_the_first_is_cancelled_while_its_guesses_are_in_the_cache():
    first, second = asked(), asked(4)
    expected = plain(second)
    with Engine(fresh(), speculation=Speculation(Oracle([*first.ids], plain(first)))) as engine:
        for steps in range(3, 12):
            number = engine.submit([first])[0]
            for _ in range(steps):
                engine.step()
            other = engine.submit([second])[0]
            engine.cancel([number])
            tokens = []
            while new := engine.step():
                assert all(token.request == other for token in new)
                tokens += [token.token for token in new]
            assert tokens == expected


@pytest.mark.parametrize("ends", [None, 7, 12])
def test_a_kept_prefix_holds_no_guess(ends):
    first = asked(digest="base", max_tokens=20)
    expected = plain(first)
    if ends is not None:
        first = asked(digest="base", max_tokens=20, end_ids=[expected[ends]])
        expected = expected[: expected.index(expected[ends]) + 1]
    longer = Request([*first.ids, *expected, 9, 9], max_tokens=12, digest="base")
    wanted = plain(Request(longer.ids, max_tokens=12))
    prefixes, speculating = Prefixes(1 << 24), Speculation(Oracle([*first.ids], [*expected, *range(40, 60)]))
    with Engine(fresh(), prefixes=prefixes, speculation=speculating) as engine:
        assert answers(engine, [first]) == [expected]
        number = engine.submit([longer])[0]
        new = engine.step()
        assert new[0].cached >= len(first.ids) + len(expected) - 2
        tokens = [new[0].token]
        while new := engine.step():
            tokens += [token.token for token in new if token.request == number]
    assert tokens == wanted


def wide(n_ids: int = 64) -> llama.Model:
    """A random llama whose heads are wide enough to be quantised."""
    net = llama.Model(
        llama.ModelArgs(
            model_type="llama",
            hidden_size=128,
            num_hidden_layers=2,
            intermediate_size=96,
            num_attention_heads=4,
            num_key_value_heads=2,
            rms_norm_eps=1e-5,
            vocab_size=n_ids,
        )
    )
    random = np.random.Generator(np.random.PCG64(3))
    net.update(
        tree_map(lambda p: mx.array(random.normal(0, 0.2, p.shape).astype(np.float32)), net.parameters())
    )
    return net


@pytest.mark.parametrize("bits", [8, 4])
def test_tokens_are_those_without_guesses_where_keys_and_values_are_quantised(bits):
    with Engine(wide(), kv_bits=bits) as engine:
        expected = answers(engine, [asked()])
    oracle = Oracle([*asked().ids], expected[0])
    with Engine(wide(), kv_bits=bits, speculation=Speculation(oracle)) as engine:
        assert answers(engine, [asked()]) == expected
    assert oracle.asked > 2


def test_a_request_that_wants_no_guesses_gets_none():
    oracle = Oracle([*asked().ids], plain(asked()))
    with Engine(fresh(), speculation=Speculation(oracle)) as engine:
        answers(engine, [asked(draft=False)])
    assert oracle.asked == 0


LONGCAT = {
    "attention_method": "MLA",
    "zero_expert_type": "identity",
    "ffn_hidden_size": 64,
    "moe_topk": 2,
    "expert_ffn_hidden_size": 32,
    "n_routed_experts": 4,
    "zero_expert_num": 1,
    "num_layers": 2,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "routed_scaling_factor": 1.0,
    "rope_theta": 10000.0,
    "mla_scale_q_lora": True,
    "mla_scale_kv_lora": True,
    "attention_bias": False,
}
FORGETTING = {"gemma3": {"sliding_window": 16}, "qwen3_5": {}, "llama4": {}}


@pytest.mark.parametrize("family", FORGETTING)
def test_a_cache_that_forgets_gets_no_guesses(family):
    """The prompt is longer than the window, so that a guess would take the place of a position."""
    net = made(family, **FORGETTING[family])
    request = Request([(11 * step) % 64 for step in range(80)], max_tokens=12)
    with Engine(net) as engine:
        expected = answers(engine, [request])
    oracle = Oracle([*request.ids], expected[0])
    with Engine(net, speculation=Speculation(oracle)) as engine:
        assert answers(engine, [request]) == expected
    assert oracle.asked == 0
    with pytest.raises(ModelError, match="this draft model cannot be used"):
        DraftModel(net, 64)


def test_two_caches_in_one_layer_take_guesses():
    net = made("longcat_flash", **LONGCAT)
    with Engine(net) as engine:
        expected = answers(engine, [asked()])
    oracle = Oracle([*asked().ids], expected[0])
    with Engine(net, speculation=Speculation(oracle)) as engine:
        assert answers(engine, [asked()]) == expected
    assert oracle.asked > 2


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_draft_model_changes_no_token_and_its_own_likeness_is_accepted_whole(temperature):
    request = asked(temperature=temperature, max_tokens=40)
    expected = plain(request)
    speculating = Speculation(DraftModel(fresh(), 64))
    with Engine(fresh(), speculation=speculating) as engine:
        twice = [request, asked(2), request, request]
        assert answers(engine, twice) == [expected, plain(asked(2)), expected, expected]
    pace = speculating.paces[None]
    if temperature == 0:
        assert pace.guessed and pace.accepted == pace.guessed


@pytest.fixture
def way_once(request) -> None:
    """For tests of guessers alone: one way is enough."""
    if request.node.callspec.params["way"] == "separate":
        pytest.skip("no engine")


@pytest.mark.usefixtures("way_once")
def test_a_draft_model_reads_and_guesses_only_ids_that_both_models_know():
    smaller = DraftModel(wide(40), 64)
    assert smaller.guess([1, 2, 40], 3) == [] and len(smaller.guess([1, 2, 39], 3)) == 3
    net = wide(64)
    net.model.embed_tokens.weight = (
        net.model.embed_tokens.weight * mx.where(mx.arange(64) < 40, 0.1, 9)[:, None]
    )
    assert min(DraftModel(net, 64).guess([1, 2, 3], 4)) >= 40
    assert max(DraftModel(net, 40).guess([1, 2, 3], 4)) < 40


@pytest.mark.usefixtures("way_once")
@pytest.mark.parametrize("fails_at", [1, 2, 3])
def test_a_draft_model_that_failed_guesses_as_a_new_one(fails_at, monkeypatch):
    draft, passes = DraftModel(wide(), 64), []
    draft.guess([1, 2, 3, 4, 5], 3)
    whole = llama.Model.__call__

    def failing(net, ids, cache):
        passes.append(ids)
        if len(passes) == fails_at:
            raise MemoryError
        return whole(net, ids, cache=cache)

    with monkeypatch.context() as patch, pytest.raises(MemoryError):
        patch.setattr(llama.Model, "__call__", failing)
        draft.guess([1, 2, 9, 9, 9], 3)
    text = [1, 2, 3, 4, 5, 6]
    assert draft.guess(text, 4) == DraftModel(wide(), 64).guess(text, 4)


def test_an_adapter_that_replaces_another_under_its_name_is_measured_anew(values):
    speculating = Speculation(PromptLookup())
    with adapters.routed(fresh(), values) as routing:
        with Engine(routing._net, routing=routing, speculation=speculating) as engine:
            answers(engine, [asked(adapter="low", digest=digest) for digest in ("old", "new")])
    assert speculating.paces["old"] is not speculating.paces["new"] and "low" not in speculating.paces


def test_prompt_lookup_guesses_what_followed_before():
    lookup = PromptLookup(longest=3, shortest=2)
    assert lookup.guess([1, 2, 3, 4, 9, 1, 2], 3) == [3, 4, 9]
    assert lookup.guess([1, 2, 3, 4, 9, 1, 2, 3], 1) == [4]
    assert lookup.guess([1, 2, 3, 4, 9, 1, 2, 3, 7], 4) == []
    assert lookup.guess([5, 6, 5, 6, 5], 5) == [6, 5, 6, 5, 6], "a new text; what repeats goes on"
    assert lookup.guess([2, 2], 2) == []


def test_speed_is_of_tokens_a_second_and_outliers_count_little(monkeypatch):
    monkeypatch.undo()
    enough = speculation.ENOUGH
    plain_seconds = [0.1] * enough
    assert speculation.speed(plain_seconds[1:], [TimedPass(3, 0.2, 4)] * enough) is None
    assert speculation.speed(plain_seconds, [TimedPass(3, 0.2, 4)] * (enough - 1)) is None
    assert speculation.speed(plain_seconds, [TimedPass(3, 0.2, 4)] * enough) == pytest.approx(1.5)
    without = [TimedPass(1, 0.125, 0)] * (speculation.RECENT - 1)
    assert speculation.speed(plain_seconds, without) is None
    assert speculation.speed(plain_seconds, [*without, without[0]]) == pytest.approx(0.8)
    interrupted = [*[TimedPass(1, 0.1, 1)] * (2 * enough - 1), TimedPass(1, 60.0, 1)]
    assert 0.8 < (speculation.speed(plain_seconds, interrupted) or 0) < 1


@pytest.mark.parametrize(
    ("phase", "plain", "faster", "tokens", "expected"),
    [
        ("measuring", 3, None, 3, "measuring"),
        ("measuring", 8, None, 9, "trying"),
        ("trying", 8, None, 9, "trying"),
        ("trying", 8, 1.04, 9, "resting"),
        ("trying", 8, 1.06, 9, "guessing"),
        ("guessing", 8, 1.01, 9, "guessing"),
        ("guessing", 8, 0.99, 9, "resting"),
        ("guessing", 8, 2.0, 1024, "measuring"),
        ("resting", 8, 0.5, 255, "resting"),
        ("resting", 8, 0.5, 256, "measuring"),
    ],
)
def test_phases(monkeypatch, phase, plain, faster, tokens, expected):
    monkeypatch.undo()
    assert next_phase(phase, plain, faster, tokens, 256) == expected


def test_rests_double_until_a_trial_succeeds(monkeypatch):
    monkeypatch.undo()
    pace = Pace()

    def trial(seconds: float) -> None:
        while pace.phase != "trying":
            pace.plain.append(0.1)
            pace.advance(1)
        while pace.phase == "trying":
            pace.passes.append(TimedPass(2, seconds, 3))
            pace.advance(2)

    rests = []
    for _ in range(3):
        trial(1.0)
        assert pace.phase == "resting"
        rests.append(pace.rest)
    assert rests == [256, 512, 1024]
    trial(0.05)
    assert pace.phase == "guessing" and pace.faster == pytest.approx(4)
    while pace.phase == "guessing":
        pace.passes.append(TimedPass(1, 0.5, 3))
        pace.advance(1)
    assert (pace.phase, pace.rest) == ("resting", 256)
