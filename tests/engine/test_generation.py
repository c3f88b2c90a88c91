"""Prompts that begin alike are read once, and answered as each alone."""

from __future__ import annotations

import mlx.nn as nn
import pytest
from adapters.test_layers import fresh
from mlx_lm.models.cache import make_prompt_cache
from model.families import made

from tunesmith.engine import batching, generation, scoring
from tunesmith.errors import ModelError

BEGINNING = [(7 * place) % 61 + 1 for place in range(100)]
PROMPTS = [[*BEGINNING, *range(1, 2 + number), 3 + number] for number in range(7)]


class Counted(nn.Module):
    """``positions``: read so far, padding included; what is read to know the model is not counted."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net, self.positions = net, 0
        generation.generate(self, [[1, 2]], max_tokens=1, eos_ids=[])
        self.positions = 0

    def make_cache(self):
        return make_prompt_cache(self.net)

    def __call__(self, ids, cache=None):
        self.positions += ids.size
        return self.net(ids, cache=cache)


def test_prompts_that_begin_alike_are_answered_as_each_alone_and_their_beginning_is_read_once():
    options = {"max_tokens": 6, "eos_ids": []}
    alone = [generation.generate(fresh(), [prompt], **options)[0] for prompt in PROMPTS]
    assert len({tuple(answer.ids) for answer in alone}) > 3
    net = Counted(fresh())
    assert generation.generate(net, PROMPTS, **options) == alone
    assert net.positions < 100 + 2 * sum(len(prompt) - 100 for prompt in PROMPTS) + 7 * 6
    reversed_prompts = [prompt[50:] for prompt in PROMPTS]
    assert generation.generate(fresh(), reversed_prompts, **options) == [
        generation.generate(fresh(), [prompt], **options)[0] for prompt in reversed_prompts
    ]


@pytest.mark.parametrize(
    "name", ["llama", "gemma3", "qwen3_5", "lfm2", "granitemoehybrid", "mamba", "llama4"]
)
def test_families_answer_as_each_alone_after_a_beginning_that_is_read_once(name):
    """Also where the beginning is longer than a sliding window, and where a recurrent state is copied."""
    net = Counted(made(name, **{"sliding_window": 16} if name == "gemma3" else {}))
    options = {"max_tokens": 6, "eos_ids": []}
    alone = [generation.generate(net, [prompt], **options)[0] for prompt in PROMPTS]
    net.positions = 0
    assert generation.generate(net, PROMPTS, **options) == alone
    if batching.batches(net):
        assert net.positions < 100 + 2 * sum(len(prompt) - 100 for prompt in PROMPTS) + 7 * 6
    else:
        assert net.positions >= sum(map(len, PROMPTS))


def test_random_answers_are_drawn_as_without_a_beginning_that_is_read_once(monkeypatch):
    net = Counted(fresh())
    options = {"max_tokens": 6, "eos_ids": [], "temperature": 1.0, "top_p": 0.9, "seed": 3}
    answers = generation.generate(net, PROMPTS, **options)
    shared = net.positions
    monkeypatch.setattr(scoring, "WORTH", 10**9)
    assert generation.generate(net, PROMPTS, **options) == answers
    assert net.positions > 3 * shared, "the second time each prompt was read as a whole"
    assert generation.generate(net, PROMPTS, **options | {"seed": 4}) != answers


@pytest.mark.parametrize("prompts", [[BEGINNING] * 5, [BEGINNING, BEGINNING[:99], BEGINNING]])
def test_equal_prompts_and_a_prompt_that_is_the_beginning_of_another(prompts):
    options = {"max_tokens": 6, "eos_ids": []}
    alone = [generation.generate(fresh(), [prompt], **options)[0] for prompt in prompts]
    assert generation.generate(fresh(), prompts, **options) == alone


def test_a_beginning_is_not_shared_where_rows_have_passes_of_their_own(monkeypatch):
    monkeypatch.setattr(batching, "batches", lambda net: False)
    net = Counted(fresh())
    generation.generate(net, PROMPTS, max_tokens=1, eos_ids=[])
    assert net.positions >= sum(map(len, PROMPTS))


def test_nothing_is_read_of_prompts_that_are_refused():
    net = Counted(fresh())
    with pytest.raises(ModelError, match="empty prompt"):
        generation.generate(net, [*PROMPTS, []], eos_ids=[])
    with pytest.raises(ModelError):
        generation.generate(net, [[*BEGINNING, 10**6], *PROMPTS], eos_ids=[])
    assert net.positions < len(BEGINNING)
    assert generation.generate(net, [], eos_ids=[]) == []


def test_no_row_passes_the_last_learned_position():
    """A row that may have no further token does not stay in a batch whose others go on."""
    net = made(
        "gpt2",
        n_positions=32,
        n_ctx=32,
        n_embd=32,
        n_head=2,
        n_layer=1,
        layer_norm_epsilon=1e-5,
        vocab_size=64,
    )
    asked: list[int] = []

    class Recorded(nn.Embedding):
        def __call__(self, x):
            asked.append(int(x.max().item()))
            return super().__call__(x)

    net.model.wpe = Recorded(*net.model.wpe.weight.shape)
    prompts = [[1 + place % 7 for place in range(28)], *([3, number] for number in range(1, 6))]
    generation.generate(net, prompts, max_tokens=20, eos_ids=[], batch_size=8)
    assert max(asked) == 31
