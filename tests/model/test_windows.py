"""A layer with a sliding window sees that many tokens and no more, whichever way its row is computed."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.cache import make_prompt_cache
from model.families import made

from tunesmith.engine import batching, generation
from tunesmith.model import abilities, kernels, layouts, windows

WINDOW, LAYERS, LENGTH = 6, 2, 40
REACH = LAYERS * (WINDOW - 1) + 1
"""Tokens on which a logit depends: each layer looks back over WINDOW - 1 more."""
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}
WINDOWED = {
    "llama": {"model_type": "mistral"},
    "gemma2": {"layer_types": ["sliding_attention"] * LAYERS},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3_moe": {
        "use_sliding_window": True,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "norm_topk_prob": True,
        "rope_theta": 1e4,
    },
    "mixtral": EXPERTS,
    "phi3": {},
    "phimoe": EXPERTS,
    "starcoder2": {"norm_epsilon": 1e-5},
    "mistral3": {"model_type": "mistral"},
}


def ids(rows: int = 2) -> mx.array:
    return mx.array(np.random.default_rng(3).integers(0, 96, (rows, LENGTH)))


def windowed(name: str, window: int | None = WINDOW):
    mx.random.seed(1)  # mlx-lm's layers draw their biases
    return made(name, num_hidden_layers=LAYERS, sliding_window=window, **WINDOWED[name])


def close(values: mx.array, expected: mx.array) -> None:
    np.testing.assert_allclose(np.array(values), np.array(expected), atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", WINDOWED)
def test_a_logit_depends_on_the_tokens_inside_the_windows_and_on_all_of_them(name):
    net = windowed(name)
    logits = net(ids())
    for end in (REACH, REACH + 1, LENGTH):
        close(net(ids()[:, end - REACH : end])[:, -1], logits[:, end - 1])
    less = net(ids()[:, LENGTH - REACH + 1 :])[:, -1]
    assert np.abs(np.array(less - logits[:, -1])).max() > 1e-4
    close(windowed(name, None)(ids()[:, :WINDOW]), logits[:, :WINDOW])


@pytest.mark.parametrize("parts", [[1] * LENGTH, [17] + [1] * 23, [3, 20, 1, 16]])
@pytest.mark.parametrize("name", WINDOWED)
def test_a_row_read_in_parts_has_the_logits_of_the_whole_row(name, parts):
    net = windowed(name)
    cache, start, logits = make_prompt_cache(net), 0, []
    for part in parts:
        logits.append(net(ids()[:, start : start + part], cache=cache))
        start += part
    close(mx.concatenate(logits, axis=1), net(ids()))


@pytest.mark.parametrize("ends", [(40,), (5, 40), (6, 12, 40), (13, 27, 40)])
@pytest.mark.parametrize("name", [name for name in WINDOWED if name != "gemma2"])
def test_packed_rows_have_their_own_logits(name, ends):
    net = windowed(name)
    assert abilities.packs(net)
    packed = net(ids()[:1], cache=kernels.packed(net, ends))
    starts = (0, *ends[:-1])
    alone = [net(ids()[:1, start:end]) for start, end in zip(starts, ends, strict=True)]
    close(packed, mx.concatenate(alone, axis=1))


@pytest.mark.parametrize("name", [name for name in WINDOWED if name != "gemma2"])
@pytest.mark.parametrize("prompt", [3, 20])
def test_answers_after_a_prompt_that_is_kept_have_the_logits_of_the_whole_row(name, prompt):
    net = windowed(name)
    row, answers = ids(1), ids(3)[:, prompt:]
    assert abilities.continues(net)
    after = net(answers, cache=kernels.prompt(net, row[:, :prompt]))
    whole = mx.concatenate([mx.broadcast_to(row[:, :prompt], (3, prompt)), answers], axis=1)
    close(after, net(whole)[:, prompt:])


@pytest.mark.parametrize("name", WINDOWED)
def test_batched_answers_are_single_ones(name):
    net = windowed(name)
    assert batching.batches(net)
    prompts = [[(7 * place + 3 * at) % 96 for at in range(1 + 5 * place)] for place in range(4)]
    together = generation.generate(net, prompts, max_tokens=12, eos_ids=[], batch_size=3)
    for prompt, answer in zip(prompts, together, strict=True):
        row = list(prompt)
        for _ in range(12):
            row.append(int(mx.argmax(net(mx.array([row]))[0, -1]).item()))
        assert answer.ids == row[len(prompt) :]


def test_gradients_do_not_reach_beyond_the_windows():
    net = windowed("mixtral")
    table = net.model.embed_tokens.weight

    def last(weight: mx.array) -> mx.array:
        net.model.embed_tokens.weight = weight
        return net(mx.arange(LENGTH)[None])[0, -1].sum()

    slope = np.abs(np.array(mx.grad(last)(table))).max(axis=1)[:LENGTH]
    assert not slope[: LENGTH - REACH].any() and slope[LENGTH - REACH :].all()


QWEN = {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 4096, "num_hidden_layers": 4}


@pytest.mark.parametrize(
    ("settings", "layers"),
    [
        ({"use_sliding_window": False}, []),
        ({"use_sliding_window": None}, []),
        ({}, []),
        ({"max_window_layers": 4}, []),
        ({"max_window_layers": 2}, [2, 3]),
        ({"layer_types": ["full_attention", "sliding_attention"] * 2}, [1, 3]),
        ({"max_window_layers": 0, "sliding_window": None}, []),
        ({"model_type": "qwen3", "max_window_layers": 3}, [3]),
        ({"model_type": "qwen3_moe", "max_window_layers": 3}, [0, 1, 2, 3]),
        ({"model_type": "qwen2_moe", "max_window_layers": 3}, [0, 2]),
        ({"model_type": "dots1", "use_sliding_window": None, "max_window_layers": 3}, [3]),
        ({"model_type": "gemma2", "use_sliding_window": None}, [0, 2]),
        ({"model_type": "gemma3_text"}, []),
        ({"model_type": "smollm3"}, [3]),
        ({"model_type": "smollm3", "no_rope_layers": [0, 1, 1, 0]}, [0, 3]),
        ({"model_type": "mistral3", "text_config": {"model_type": "mistral"}}, [0, 1, 2, 3]),
        ({"model_type": "mistral3", "text_config": {"model_type": "ministral3"}}, []),
        ({"model_type": "qwen2_vl", "text_config": {"max_window_layers": 2}}, [2, 3]),
    ],
)
def test_the_layers_with_a_window_are_those_of_transformers(settings, layers):
    found, window = windows.windowed_layers({**QWEN, **settings})
    assert found == layers and window == (4096 if layers else window)


def test_mistral_and_gemma_2_have_a_window_of_4096_if_their_settings_do_not_say():
    for kind in ("mistral", "gemma2"):
        assert windows.windowed_layers({"model_type": kind, "num_hidden_layers": 1}) == ([0], 4096)
    assert windows.windowed_layers({"model_type": "mixtral", "num_hidden_layers": 1}) == ([], 0)


def test_layer_types_do_not_reach_mlx_lms_mistral():
    """Its class would fail if no layer attends to all positions, and give the others no window."""
    assert "layer_types" not in layouts.translate(
        {"model_type": "mistral", "layer_types": ["full_attention"]}
    )
