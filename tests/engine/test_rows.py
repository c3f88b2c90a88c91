"""A batch gives its rows out as they are alone, also in the memory that they hold."""

from __future__ import annotations

import mlx.core as mx
import pytest
from mlx_lm.models.cache import ArraysCache, CacheList

from tunesmith.engine.requests import Request
from tunesmith.engine.rows import EngineRow, RowBatch


@pytest.mark.parametrize("nested", [False, True])
def test_an_extracted_state_holds_no_memory_of_the_other_rows(nested):
    before = mx.get_active_memory()
    states = ArraysCache(2)
    states[0] = mx.random.normal((16, 1000, 20))
    rows = [EngineRow(number, Request([1, 2]), 1) for number in range(16)]
    batch = RowBatch(rows, [CacheList(states) if nested else states])
    states[1] = states[0] + 1
    mx.eval(batch.layers[0].state)
    expected = states[1][3:4] + 0
    layers = batch.extract(3)
    mx.eval(expected, layers[0].state)
    extracted = layers[0].caches[0] if nested else layers[0]
    assert mx.array_equal(extracted[1], expected)
    del batch, states, expected
    assert mx.get_active_memory() - before < 3 * layers[0].nbytes
