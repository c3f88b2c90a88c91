"""Prefixes serve only the weights that made them, never change an answer, and keep within their limits."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from adapters.test_layers import fresh, move

from tunesmith import adapters
from tunesmith.adapters import LoRA
from tunesmith.engine import caches
from tunesmith.engine.engine import Engine
from tunesmith.engine.prefixes import Prefixes
from tunesmith.engine.requests import NewToken, Request

STEM = [int(token) for token in np.random.Generator(np.random.PCG64(7)).integers(0, 64, 90)]


def layers(ids: list[int], bits: int | None = None) -> list:
    """The cache of a row that has read ``ids``."""
    from mlx_lm.models.cache import make_prompt_cache

    cache = make_prompt_cache(fresh())
    fresh()(mx.array([ids]), cache=cache)
    return cache


def size_of(count: int) -> int:
    return sum(layer.nbytes for layer in layers(STEM[:count]))


def answered(engine: Engine, *requests: Request) -> list[list[NewToken]]:
    numbers = engine.submit(requests)
    said: dict[int, list[NewToken]] = {number: [] for number in numbers}
    while tokens := engine.step():
        for token in tokens:
            said[token.request].append(token)
    return [said[number] for number in numbers]


def request(ids: list[int], **options) -> Request:
    return Request(ids, max_tokens=6, **{"digest": "base"} | options)


def ids_of(tokens: list[NewToken]) -> list[int]:
    return [token.token for token in tokens]


def test_a_cache_without_room_for_more_is_smaller_and_continues_alike():
    before, after = layers(STEM[:20]), layers(STEM[:20])
    caches.fit(after)
    assert sum(layer.nbytes for layer in after) * 256 == sum(layer.nbytes for layer in before) * 20
    for ids in (STEM[20:22], STEM[22:23]):
        first, second = (fresh()(mx.array([ids]), cache=cache) for cache in (before, after))
        assert mx.array_equal(first, second)


def test_the_longest_beginning_is_found_and_trimmed():
    prefixes = Prefixes(1 << 30)
    prefixes.add("a", STEM[:20], layers(STEM[:20]))
    prefixes.add("a", [*STEM[:30], 1, 1], layers([*STEM[:30], 1, 1]))
    found, length = prefixes.find("a", STEM[:50]) or ([], 0)
    assert length == 30 and {layer.offset for layer in found} == {30}
    assert prefixes.length("a", STEM[:50]) == 30 and prefixes.length("b", STEM) == 0
    assert prefixes.find("a", [63 - STEM[0]]) is None and prefixes.find("b", STEM) is None


def test_what_a_longer_prefix_covers_is_dropped():
    prefixes = Prefixes(1 << 30)
    prefixes.add("a", STEM[:20], layers(STEM[:20]))
    prefixes.add("b", STEM[:20], layers(STEM[:20]))
    prefixes.add("a", STEM[:40], layers(STEM[:40]))
    assert prefixes.n_bytes == size_of(20) + size_of(40)
    prefixes.add("a", STEM[:30], layers(STEM[:30]))
    assert prefixes.n_bytes == size_of(20) + size_of(40) and prefixes.length("a", STEM) == 40


def test_the_least_recently_used_leave_first():
    """Not the oldest: mlx-lm's cache evicts what was inserted first, although it is used all the time."""
    prefixes = Prefixes(2 * size_of(20))
    for first in (1, 2):
        prefixes.add("a", [first, *STEM[:19]], layers([first, *STEM[:19]]))
    assert prefixes.find("a", [1, *STEM[:19]])
    prefixes.add("a", [3, *STEM[:19]], layers([3, *STEM[:19]]))
    assert [bool(prefixes.length("a", [first])) for first in (1, 2, 3)] == [True, False, True]
    assert prefixes.n_bytes <= prefixes.limit
    Prefixes(10).add("a", STEM, layers(STEM))  # larger than the limit: not kept


def test_a_token_that_begins_every_prompt_is_not_use_of_a_prefix():
    prefixes = Prefixes(3 * size_of(20))
    for tail in range(5):
        ids = [9, *[tail] * 19]
        assert prefixes.find("a", [*ids, 0]) is None
        prefixes.add("a", ids, layers(ids))
    assert [bool(prefixes.find("a", [9, *[tail] * 19])) for tail in range(5)] == [False, False] + [True] * 3


def test_the_newest_of_equal_matches_is_used():
    prefixes = Prefixes(2 * size_of(40))
    for tail in (1, 2, 3):
        prefixes.add("a", [*STEM[:30], *[tail] * 10], layers([*STEM[:30], *[tail] * 10]))
        assert prefixes.length("a", STEM) == 30
        prefixes.find("a", STEM)
    assert [prefixes.length("a", [*STEM[:30], *[tail] * 10]) for tail in (1, 2, 3)] == [30, 40, 40]


@pytest.mark.parametrize("error", [OSError, RuntimeError])
def test_a_prefix_that_cannot_be_written_is_dropped(tmp_path, monkeypatch, error):
    def failing(*_):
        raise error("no space left")

    monkeypatch.setattr("mlx_lm.models.cache.save_prompt_cache", failing)
    prefixes = Prefixes(size_of(20), tmp_path)
    for first in range(2):
        prefixes.add("a", [first, *STEM[:19]], layers([first, *STEM[:19]]))
    assert prefixes.n_bytes == size_of(20) and not [*tmp_path.iterdir()]
    prefixes.close()
    assert prefixes.n_bytes == 0 and not any(prefixes.length("a", [first]) for first in range(2))


def test_a_cache_that_cannot_be_trimmed_serves_as_a_whole_only():
    from mlx_lm.models.cache import RotatingKVCache

    prefixes, cache = Prefixes(1 << 30), RotatingKVCache(16)
    cache.update_and_fetch(mx.zeros((1, 1, 40, 8)), mx.zeros((1, 1, 40, 8)))
    prefixes.add("a", STEM[:40], [cache])
    assert prefixes.length("a", STEM[:39]) == 0 and prefixes.length("a", STEM[:41]) == 40


def test_a_hit_of_the_whole_prompt_still_answers():
    """Museum: mlx-lm 1215, an exact hit of the prompt cache gave an empty answer."""
    prefixes = Prefixes(1 << 30)
    with Engine(fresh(), prefixes=prefixes) as engine:
        (first,) = answered(engine, request(STEM))
        (again,) = answered(engine, request(STEM))
        (short,) = answered(engine, request(STEM[:1]))
    assert ids_of(again) == ids_of(first) and len(ids_of(first)) == 6 == len(short)
    assert [token.cached for token in first + again] == [0] * 6 + [89] + [0] * 5


def test_the_next_turn_of_a_chat_is_read_after_the_last_one():
    prefixes = Prefixes(1 << 30)
    with Engine(fresh(), prefixes=prefixes) as engine:
        (first,) = answered(engine, request(STEM))
        turn = [*STEM, *ids_of(first), *STEM[:10]]
        (second,) = answered(engine, request(turn))
    assert second[0].cached == 90 + 5  # all but the last token, which no pass has read
    with Engine(fresh()) as engine:
        assert ids_of(second) == ids_of(*answered(engine, request(turn)))


def test_prompts_that_begin_alike_are_read_once():
    """Of several that arrive together, the others wait for the first one's prefix."""
    prefixes = Prefixes(1 << 30)
    prompts = [[*STEM, tail, tail] for tail in range(5)]
    with Engine(fresh(), prefixes=prefixes, prefill_tokens=1000) as engine:
        shared = answered(engine, *(request(prompt) for prompt in prompts))
    assert [tokens[0].cached for tokens in shared] == [0, 90, 90, 90, 90]
    with Engine(fresh()) as engine:
        assert [ids_of(tokens) for tokens in answered(engine, *(request(prompt) for prompt in prompts))] == [
            ids_of(tokens) for tokens in shared
        ]


def test_no_prompt_waits_for_a_prefix_that_is_too_large_to_be_kept():
    with Engine(fresh(), prefixes=Prefixes(1000), prefill_tokens=1000) as engine:
        engine.submit([request([*STEM, tail, tail]) for tail in range(3)])
        engine.advance()
        assert sum(len(batch.rows) for batch in engine._decoding) == 3


def test_what_a_prompt_waits_for_is_found_once(monkeypatch):
    """A search at each step takes 0.1 s where 64 prompts wait and 300 prefixes are known."""
    prefixes, searches = Prefixes(1 << 30), []
    length = prefixes.length
    monkeypatch.setattr(prefixes, "length", lambda key, ids: searches.append(key) or length(key, ids))
    with Engine(fresh(), prefixes=prefixes, prefill_tokens=4) as engine:
        engine.submit([request([*STEM, tail, tail]) for tail in range(6)])
        for _ in range(10):
            assert engine.advance() == []
        assert len(searches) == 5
        engine.cancel([0])
        (first, *_) = engine.step()
        assert first.request == 1 and len(searches) > 5, "another one is read then"


def test_prefixes_are_never_shared_across_adapters(tmp_path):
    """Museum: llama.cpp 26207, vllm 42125 and 30931, a prefix was reused under another adapter; also under
    the same name with other weights, and without a digest."""
    values = {}
    for number, name in enumerate(["first", "second"]):
        spec, net = LoRA(rank=8, alpha=64, targets="all-linear"), fresh()
        spec.attach(net, number)
        adapters.save(move(net, number), spec, tmp_path / name)
        values[name] = adapters.read(tmp_path / name)
    prefixes = Prefixes(1 << 30)
    net = fresh()
    with adapters.routed(net, values) as routing, Engine(net, routing=routing, prefixes=prefixes) as engine:
        requests = [request(STEM), *(request(STEM, adapter=name, digest=f"sha-{name}") for name in values)]
        together = [answered(engine, by_name)[0] for by_name in requests]
        (unnamed,) = answered(engine, request(STEM, adapter="second", digest=None))
    assert [tokens[0].cached for tokens in [*together, unnamed]] == [0] * 4
    for name, tokens in zip([None, *values], together, strict=True):
        net = fresh()
        if name is not None:
            values[name].attach(net)
        with Engine(net) as engine:
            assert ids_of(*answered(engine, request(STEM))) == ids_of(tokens)
    assert len({tuple(ids_of(tokens)) for tokens in together}) == 3


def test_other_conversations_are_not_restored():
    """Museum: llama.cpp 27148, a prompt got the state of another conversation."""
    prefixes, others = Prefixes(1 << 30), [[*STEM[:40], 1 + turn, *STEM[50:]] for turn in range(3)]
    with Engine(fresh(), prefixes=prefixes) as engine:
        said = [answered(engine, request(prompt))[0] for prompt in others]
    assert [tokens[0].cached for tokens in said] == [0, 40, 40]
    for prompt, tokens in zip(others, said, strict=True):
        with Engine(fresh()) as engine:
            assert ids_of(*answered(engine, request(prompt))) == ids_of(tokens)


def test_a_folder_outlives_the_process(tmp_path):
    prefixes = Prefixes(1 << 30, tmp_path)
    with Engine(fresh(), prefixes=prefixes) as engine:
        (first,) = answered(engine, request(STEM))
    prefixes.close()
    assert prefixes.n_bytes == 0 and len([*tmp_path.iterdir()]) == 1
    with Engine(fresh(), prefixes=Prefixes(1 << 30, tmp_path)) as engine:
        (again,) = answered(engine, request([*STEM[:80], 7]))
        (same,) = answered(engine, request(STEM))
    assert again[0].cached == 80 and ids_of(same) == ids_of(first)
    with Engine(fresh(), prefixes=Prefixes(1 << 30, tmp_path)) as engine:
        assert answered(engine, request(STEM, digest="other"))[0][0].cached == 0


def test_a_folder_keeps_within_its_limit(tmp_path):
    prefixes = Prefixes(size_of(20), tmp_path, folder_limit=2 * size_of(20))
    for first in range(5):
        prefixes.add("a", [first, *STEM[:19]], layers([first, *STEM[:19]]))
    prefixes.close()
    assert len([*tmp_path.iterdir()]) == 2
    assert [bool(Prefixes(1 << 30, tmp_path).length("a", [first])) for first in range(5)] == [False] * 3 + [
        True
    ] * 2
    prefixes.forget("a")
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("damage", ["cut", "empty", "noise", "header"])
def test_a_damaged_file_is_passed_over(tmp_path, damage):
    prefixes = Prefixes(1 << 30, tmp_path)
    prefixes.add("base", STEM, layers(STEM))
    prefixes.close()
    (path,) = tmp_path.iterdir()
    content = path.read_bytes()
    damaged = {"cut": content[:-500], "empty": b"", "noise": b"\xff" * 4000, "header": content[:700]}[damage]
    Path(path).write_bytes(damaged)
    with Engine(fresh(), prefixes=Prefixes(1 << 30, tmp_path)) as engine:
        (said,) = answered(engine, request([*STEM, 3]))
    assert said[0].cached == 0 and len(said) == 6
