"""A prompt that several answers share is computed once, and gives what each answer with its own copy
gives."""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from training.test_speed_laws import Recurrent

from tunesmith import adapters
from tunesmith.engine import scoring
from tunesmith.model import abilities, kernels
from tunesmith.model import loading as model
from tunesmith.tokens.batches import Cut, Group
from tunesmith.tokens.template import Tokens
from tunesmith.training import reference


@pytest.fixture(scope="module")
def net(tiny_model) -> nn.Module:
    """The tiny model with an adapter that does something, its dropout off in evaluation."""
    net = model.load(model.ModelSpec(path=str(tiny_model))).net
    adapters.LoRA(rank=4, dropout=0.3).attach(net, 0)
    random = np.random.default_rng(0)
    # Not of unit size: such an adapter makes of the rounding of one kernel or another more than what is
    # looked for.
    drawn = [
        (key, mx.array(random.normal(0, 0.3, value.shape), mx.float32))
        for key, value in adapters.trainable(net).items()
    ]
    net.load_weights(drawn, strict=False)
    return net


def answers(prompts: list[int], each: int, seed: int) -> list[Group]:
    """``each`` answers to prompts of these lengths; the first two answers of a prompt are a pair."""
    random = np.random.default_rng(seed)
    made: list[Group] = []
    for length in prompts:
        asked = random.integers(1, 90, length)
        rows = []
        for _ in range(each):
            said = random.integers(1, 90, random.integers(1, 9))
            weights = np.where(
                np.arange(length + len(said)) < length, 0, random.random(length + len(said)) + 0.1
            )
            rows.append(Tokens(np.concatenate([asked, said]).astype(np.int32), weights.astype(np.float32)))
        made += [Group(tuple(rows[:2]), ""), *(Group((row,), "") for row in rows[2:])]
    random.shuffle(made)  # type: ignore[arg-type]
    return made


def flat(sums: list[list[tuple[float, float]]]) -> np.ndarray:
    return np.array([pair for group in sums for pair in group])


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(1, 4), st.booleans(), st.integers(0, 99)
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_shared_prompt_changes_nothing(net, prompts, each, pack, seed):
    groups = answers(prompts, each, seed)
    with pytest.MonkeyPatch.context() as patch:
        found = []
        for worth in (1 << 30, 1):
            patch.setattr(scoring, "WORTH", worth)
            found.append(flat(scoring.sequence_sums(net, groups, Cut(60, pack=pack, each=2))))
    assert found[1] == pytest.approx(found[0], rel=1e-5, abs=1e-5)


def test_the_prompt_is_computed_once_where_it_pays(net, monkeypatch):
    vars(net).pop("_abilities", None)  # tried anew
    seen: list[int] = []
    kept = kernels.prompt
    monkeypatch.setattr(kernels, "prompt", lambda net, ids: seen.append(ids.shape[1]) or kept(net, ids))
    counted: list[tuple[int, int]] = []
    scoring.sequence_sums(net, answers([193, 100], 2, 0), Cut(300), lambda now, of: counted.append((now, of)))
    assert seen[1:] == [192]  # the first is the trial; 99 tokens are not worth two passes
    assert counted[-1] == (4, 4)


def test_a_model_that_cannot_go_on_after_a_prompt_takes_whole_rows(net, monkeypatch):
    groups = answers([120], 3, 1)
    whole = flat(scoring.sequence_sums(net, groups, Cut(300)))

    def refuse(self: kernels.PromptCache, length: int, **options: object) -> None:
        raise ValueError("layers with a sliding window cannot keep a prompt")

    monkeypatch.setattr(kernels.PromptCache, "make_mask", refuse)
    vars(net).pop("_abilities", None)  # tried anew
    assert not abilities.continues(net)
    assert flat(scoring.sequence_sums(net, groups, Cut(300))) == pytest.approx(whole, rel=1e-5)

    assert not abilities.continues(Recurrent())


def test_an_interrupted_reference_goes_on_to_the_same_bytes(net, monkeypatch, tmp_path):
    groups = [Group((one,), "") for group in answers([110, 100, 5, 90, 99], 5, 2) for one in group.sequences]
    monkeypatch.setattr(reference, "SAVED_EVERY", 6)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "whole"))
    whole = reference.measure(net, groups, Cut(300), "x")
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "halves"))
    measured, calls = scoring.sequence_sums, [0]

    def stopping(*words, **options):
        calls[0] += 1
        if calls[0] == 3:
            raise KeyboardInterrupt
        return measured(*words, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(scoring, "sequence_sums", stopping)
        reference.measure(net, groups, Cut(300), "x")
    again = reference.measure(net, groups, Cut(300), "x")
    assert again.cached > 10 and again.measured >= 5 and again.values == whole.values
