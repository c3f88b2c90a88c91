"""Efficiency: the same work on both sides, ratios of sums for speed, percentiles with intervals for
latency."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from tunesmith.engine import generation
from tunesmith.evaluation.statistics import judge
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import EvaluationSpec, Material
from tunesmith.evaluation.tasks import efficiency as module
from tunesmith.evaluation.tasks.efficiency import (
    BATCHES,
    LATENCY_ROUNDS,
    LENGTHS,
    PERCENTILES,
    PROMPT,
    ROUNDS,
    SPOKEN,
    WARM_UP,
    Efficiency,
    Timed,
    build,
)
from tunesmith.machine.ranks import Ranks
from tunesmith.model import loading as model
from tunesmith.runs.records import ExampleScore
from tunesmith.tokens import renderers, template
from tunesmith.tokens.batches import BatchSpec


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return model.load(model.ModelSpec(path=str(tiny_model)))


@pytest.fixture(scope="module")
def task(tiny_model) -> Efficiency:
    renderer = renderers.load(tiny_model)
    (found,) = build(Material([], [], [], renderer, template.TemplateSpec(), BatchSpec()))
    assert isinstance(found, Efficiency)
    return found


def timed(speed: dict[int, list[float]], latency: list[list[float]], memory: float = 1e9) -> list[Timed]:
    found = [
        Timed(f"round {at}", "speed", size, each, 10)
        for size, rounds in speed.items()
        for at, each in enumerate(rounds)
    ]
    found += [Timed(f"round {at}", "memory", 16, memory + at, 1) for at in range(3)]
    return found + [
        Timed(f"prompt {at}", "latency", 8 + at, one, 1) for at, each in enumerate(latency) for one in each
    ]


def test_both_sides_do_the_same_work_and_all_of_it(loaded, task, tiny_model, monkeypatch):
    asked: list[tuple] = []
    real = generation.generate

    def spied(net, prompts, **options):
        made = real(net, prompts, **options)
        asked.append((tuple(map(tuple, prompts)), sum(len(one.ids) for one in made)))
        return made

    monkeypatch.setattr(generation, "generate", spied)
    told: list = []
    sides = []
    for side in ("base", "tuned"):
        sides.append(task.measure(Subject(loaded.net, renderers.load(tiny_model), side, notify=told.append)))
        assert all(one.value > 0 for one in sides[-1])
    half = len(asked) // 2
    assert asked[:half] == asked[half:] and half == (ROUNDS + 1) * len(BATCHES)
    # Past any end token: every sequence speaks for as long.
    spoken = [WARM_UP] * len(BATCHES) + [SPOKEN] * ROUNDS * len(BATCHES)
    assert all(
        tokens == len(prompts) * each and {len(one) for one in prompts} == {PROMPT}
        for (prompts, tokens), each in zip(asked[:half], spoken, strict=True)
    )
    assert [(one.source, one.kind, one.size, one.units) for one in sides[0]] == [
        (one.source, one.kind, one.size, one.units) for one in sides[1]
    ]
    kinds = Counter(one.kind for one in sides[0])
    assert kinds == {
        "speed": ROUNDS * len(BATCHES),
        "memory": ROUNDS,
        "latency": len(LENGTHS) * LATENCY_ROUNDS,
    }
    weights = sum(
        value.nbytes for _, value in __import__("mlx.utils").utils.tree_flatten(loaded.net.parameters())
    )
    assert all(one.value >= weights for one in sides[0] if one.kind == "memory")
    assert {(one.label, one.done) for one in told if one.done == one.total} >= {
        (f"{side}: {what}", total)
        for side in ("base", "tuned")
        for what, total in (("speed", half), ("latency", LATENCY_ROUNDS * len(LENGTHS)))
    }


@pytest.mark.parametrize(
    ("limit", "rounds", "prompts"), [(1, 1, 1), (3, 3, 3), (12, ROUNDS, 12), (99, ROUNDS, 30)]
)
def test_a_limit_shortens_it(limit, rounds, prompts, loaded, task, tiny_model, monkeypatch):
    """Fewer rounds of speed, and fewer prompts of latency, from the shortest to the longest."""
    renderer = renderers.load(tiny_model)
    material = Material(
        [], [], [], renderer, template.TemplateSpec(), BatchSpec(), EvaluationSpec(limit=limit)
    )
    (limited,) = build(material)
    made = limited.measure(Subject(loaded.net, renderer, "base"))
    kinds = Counter(timed.kind for timed in made)
    assert kinds["speed"] == rounds * len(BATCHES) and kinds["memory"] == rounds
    lengths = sorted({timed.size for timed in made if timed.kind == "latency"})
    assert kinds["latency"] == prompts * LATENCY_ROUNDS and lengths[-1] == max(LENGTHS)
    assert limit == 1 or lengths[0] == min(LENGTHS)
    assert (limited.identity == task.identity) == (limit >= len(LENGTHS))
    names = {score.name for score in limited.summarise(None, limited.score(made), 0)}
    assert names == {meaning.number for meaning in Efficiency.meanings}


def test_speed_is_tokens_over_seconds_of_all_rounds(task):
    (one, *_), base = task.score(timed({1: [0.1, 0.3]}, [[1.0]])), task.score(timed({1: [0.2, 0.2]}, [[1.0]]))
    assert one.units == 10
    scores = {one.name: one for one in task.summarise(base, task.score(timed({1: [0.1, 0.3]}, [[1.0]])), 0)}
    speed = scores["speed_batch_1"]
    assert speed.value == pytest.approx(20 / (1.0 + 3.0)) and speed.delta == pytest.approx(0) and speed.n == 2
    assert (speed.better, speed.unit) == (None, "tokens/s") and "speed_batch_4" not in scores
    assert scores["peak_memory"].value == 1e9 + 1 and scores["peak_memory"].better == "lower"
    assert scores["first_token_p50"].n == 1 and scores["first_token_p50"].low is None


def test_percentiles_are_numpys_with_an_interval_around_them(task):
    chance = np.random.default_rng(0)
    base = chance.gamma(2, 1, (30, 2))
    tuned = base * 1.5
    sides = [task.score(timed({1: [0.1, 0.2]}, each.tolist())) for each in (base, tuned)]
    found = {one.name: one for one in task.summarise(sides[0], sides[1], 0)}
    alone = {one.name: one for one in task.summarise(None, sides[1], 0)}
    for rank in PERCENTILES:
        one = found[f"first_token_p{rank}"]
        assert one.value == pytest.approx(np.percentile(tuned, rank)) and one.base == pytest.approx(
            np.percentile(base, rank)
        )
        assert (
            one.low is not None and one.high is not None and one.low <= one.value <= one.high and one.n == 30
        )
        assert one.delta_low is not None and one.delta_low > 0 and one.p is not None and one.p < 0.05
        assert one.sources is None and one.better is None and one.unit == "s"
        assert (alone[one.name].low, alone[one.name].high, alone[one.name].delta) == (one.low, one.high, None)


def test_the_interval_of_the_median_covers_it_about_as_often_as_it_says(task):
    held = 0
    for seed in range(200):
        each = np.random.default_rng(seed).exponential(1, (30, 1))
        score = task._percentile(50, [each], seed)
        held += score.low <= np.log(2) <= score.high
    assert 0.90 <= held / 200 <= 0.99


def test_a_side_against_itself_is_no_difference(task):
    side = task.score(
        timed(
            {size: [0.1, 0.2, 0.15] for size in BATCHES},
            np.random.default_rng(1).gamma(2, 1, (30, 2)).tolist(),
        )
    )
    for one in task.summarise(side, side, 0):
        assert one.delta == 0 and one.p == 1.0 and (one.delta_low, one.delta_high) == (0.0, 0.0), one.name


def test_a_load_on_one_side_is_no_verdict_but_memory_has_one(task):
    base = timed(
        {size: [0.1, 0.11, 0.12, 0.1, 0.11] for size in BATCHES},
        np.random.default_rng(1).gamma(2, 1, (30, 2)).tolist(),
    )
    busy = [one._replace(value=one.value * (1.01 if one.kind == "memory" else 1.5)) for one in base]
    scores = judge(task.summarise(task.score(base), task.score(busy), 0))
    assert [one.name for one in scores if one.verdict] == ["peak_memory"]
    assert all(one.delta for one in scores) and len(scores) == len(BATCHES) + 1 + len(PERCENTILES)


def test_of_several_ranks_the_first_measures_alone(loaded, task, tiny_model):
    other = Subject(loaded.net, renderers.load(tiny_model), "base", ranks=Ranks(None, 1, 2))
    assert task.score(task.measure(other)) == []


def test_what_is_asked_is_in_the_identity(task, tiny_model, monkeypatch):
    before = task.identity
    assert Efficiency(renderers.load(tiny_model)).identity == before
    monkeypatch.setattr(module, "SPOKEN", SPOKEN + 1)
    assert task.identity != before


def test_the_order_of_measurements_is_free(task):
    made = timed({1: [0.1, 0.3], 4: [0.02, 0.05]}, np.random.default_rng(2).gamma(2, 1, (5, 2)).tolist())
    straight, turned = (task.summarise(None, task.score(one), 0) for one in (made, made[::-1]))
    assert [(one.name, pytest.approx(one.value)) for one in straight] == [
        (one.name, one.value) for one in turned
    ]
    assert isinstance(task.score(made)[0], ExampleScore)
