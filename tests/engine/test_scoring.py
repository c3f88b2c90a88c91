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
from tunesmith.model import abilities, kernels, logprobs
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


def answers(prompts: list[int], each: int | list[int], seed: int) -> list[Group]:
    """``each`` answers to prompts of these lengths; the first two answers of a prompt are a pair."""
    random = np.random.default_rng(seed)
    made: list[Group] = []
    counts = [each] * len(prompts) if isinstance(each, int) else each
    for length, count in zip(prompts, counts, strict=True):
        asked = random.integers(1, 90, length)
        rows = []
        for _ in range(count):
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


def apart(sequences: list[Tokens]) -> list[list[int]]:
    """Families of one member: nothing is shared."""
    return [[member] for member in range(len(sequences))]


FAMILIES = st.lists(
    st.tuples(st.sampled_from([1, 2, 3, 7, 19, 40]), st.integers(1, 5)), min_size=1, max_size=7
)


@given(FAMILIES, st.booleans(), st.sampled_from([None, 3, 8]), st.integers(0, 99))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_shared_prompt_changes_nothing(net, prompts, pack, micro, seed):
    groups = answers([length for length, _ in prompts], [each for _, each in prompts], seed)
    cut = Cut(90, micro, pack, each=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "WORTH", 1)
        shared = flat(scoring.sequence_sums(net, groups, cut))
        patch.setattr(scoring, "families", apart)
        whole = flat(scoring.sequence_sums(net, groups, cut))
    assert shared == pytest.approx(whole, rel=1e-5, abs=1e-5)


@pytest.fixture
def passes(net, monkeypatch) -> list[tuple[str, tuple[int, int]]]:
    """The kind and the shape of each pass to come."""
    assert abilities.continues(net)
    seen: list[tuple[str, tuple[int, int]]] = []
    prompt, features = kernels.prompt, logprobs.features

    def prompts_seen(net, ids):
        seen.append(("prompts", ids.shape))
        return prompt(net, ids)

    def features_seen(net, ids, **options):
        seen.append(("answers" if options else "rows", ids.shape))
        return features(net, ids, **options)

    monkeypatch.setattr(kernels, "prompt", prompts_seen)
    monkeypatch.setattr(logprobs, "features", features_seen)
    return seen


def test_prompts_of_one_length_are_computed_at_once(net, passes):
    ticks: list[int] = []
    groups = answers([15] * 12 + [16] * 2, 4, 3)
    scoring.sequence_sums(net, groups, Cut(160), lambda now, of: ticks.append(now))
    prompts = [shape for kind, shape in passes if kind == "prompts"]
    assert set(prompts) == {(3, 14)}, "three families of four answers fit 160 tokens"
    assert len(prompts) >= 3
    whole = [shape for kind, shape in passes if kind == "rows"]
    assert sum(count for count, _ in whole) == 56 - 12 * len(prompts)  # the rest would only add passes
    assert len(ticks) == len(passes) - len(prompts) and ticks[-1] == 56


@given(FAMILIES, st.integers(20, 200), st.sampled_from([None, 3, 8]), st.integers(0, 99))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_more_tokens_are_computed_at_once_than_the_budget_allows(
    net, passes, monkeypatch, prompts, tokens, micro, seed
):
    monkeypatch.setattr(scoring, "WORTH", 1)
    passes.clear()
    groups = answers([length for length, _ in prompts], [each for _, each in prompts], seed)
    scoring.sequence_sums(net, groups, Cut(tokens, micro))
    kept = (1, 0)
    for kind, (count, length) in passes:
        held = 0
        if kind == "prompts":
            kept = count, length
        elif kind == "answers" and kept[0] > 1:
            held = kept[0] * kept[1]
        assert count == 1 or held + count * length <= tokens
        assert count <= (micro or count)
        if held:
            assert held + length <= tokens
            assert count * kept[1] <= scoring.ANSWERS * tokens


def test_a_family_of_many_answers_is_computed_by_itself(net, passes):
    scoring.sequence_sums(net, answers([200] * 3, [9, 2, 2], 4), Cut(2000))
    assert [shape for kind, shape in passes if kind == "prompts"] == [(1, 199), (2, 199)]
    assert max(count for kind, (count, _) in passes if kind == "answers") <= scoring.ANSWERS


def test_the_prompt_is_computed_once_where_it_pays(net, passes):
    counted: list[tuple[int, int]] = []
    scoring.sequence_sums(net, answers([193, 100], 2, 0), Cut(300), lambda now, of: counted.append((now, of)))
    assert [shape for kind, shape in passes if kind == "prompts"] == [(1, 192)]  # 99 tokens are too few
    assert counted[-1] == (4, 4)


def test_a_model_that_follows_the_wrong_one_of_two_prompts_takes_whole_rows(net, passes, monkeypatch):
    monkeypatch.setattr(
        kernels.PromptCache, "before", lambda cache, rows: kernels.PromptCache(cache._kept, 0 * rows)
    )
    monkeypatch.delitem(vars(net), "_abilities")  # tried anew, and again after this test
    scoring.sequence_sums(net, answers([200] * 2, 2, 4), Cut(2000))
    assert not abilities.continues(net)
    assert [shape for kind, shape in passes if kind == "prompts"] == [(1, 3), (2, 3)], "only the trial's"


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
