"""Learning from good and bad: the laws, the ways of the data, the reference, what is watched, and failures
that are caught."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from parity import test_preferences as parity
from safetensors.numpy import load_file

import tiny
from tunesmith import adapters, errors, events
from tunesmith.data import formats
from tunesmith.data.formats import (
    Completion,
    Conversation,
    Demonstration,
    Document,
    Judged,
    Message,
    Preference,
)
from tunesmith.evaluation import evaluate as evaluation
from tunesmith.evaluation.tasks import preference
from tunesmith.learning.objective import ranked
from tunesmith.learning.objectives.apo import APOZeroUnpaired
from tunesmith.learning.objectives.dpo import DPO
from tunesmith.learning.objectives.judged import Judging
from tunesmith.learning.objectives.kto import KTO
from tunesmith.learning.objectives.orpo import ORPO
from tunesmith.model import loading as model
from tunesmith.preflight.goldens import compared as goldens
from tunesmith.runs import checkpoints
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import CURSOR, MANIFEST, REFERENCE, Run
from tunesmith.settings.config import load
from tunesmith.tokens.batches import Cut, Group, Plan
from tunesmith.tokens.template import Tokens
from tunesmith.training import caution, loop, preparation, reference, story


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "reference"


def labelled(count: int = 30) -> list[dict]:
    return [row | {"label": index % 3 != 0} for index, row in enumerate(tiny.conversations(count))]


def paired(count: int = 20) -> list[dict]:
    """Pairs whose answers differ in length."""
    made = []
    for row in tiny.conversations(count):
        asked, said = row["conversations"][0]["content"], row["conversations"][1]["content"]
        made.append({"prompt": asked, "chosen": said, "rejected": f"no {said} no no"})
    return made


@pytest.fixture
def train(tiny_model, tmp_path):
    """Trains on labelled rows (or pairs); returns the run and what was said."""

    def go(out: str, rows: list[dict] | None = None, resume: Run | None = None, **blocks):
        data = tmp_path / "rows.jsonl"
        if rows is not None or not data.exists():
            tiny.write_rows(data, labelled() if rows is None else rows)
        given_blocks = {
            "model": {"path": str(tiny_model)},
            "data": {"train": str(data), "valid": 0.2},
            "objective": {"kind": "kto"},
            "batch": {"sequences": 7},
            "loop": {"steps": 5, "samples": 0},
            "optimizer": {"learning_rate": 1e-2},
        }
        for block, values in blocks.items():
            given_blocks[block] = given_blocks.get(block, {}) | values
        said: list[events.Event] = []
        config = RunConfig(**given_blocks)
        run = story.train(config, out=None if resume else tmp_path / out, resume=resume, notify=said.append)
        return run, said

    return go


def weights(run: Run) -> dict[str, np.ndarray]:
    return load_file(checkpoints.choose(run, "last") / "adapters.safetensors")


def steps_of(said: list[events.Event]) -> list[events.StepDone]:
    return [event for event in said if isinstance(event, events.StepDone)]


def notices(said: list[events.Event]) -> list[str]:
    return [event.what for event in said if isinstance(event, events.Notice)]


PLAIN = {"kind": "sgd", "learning_rate": 1.0}
"""Updates in proportion to the gradient. Adam's are as large for a gradient of 1e-9 as for one of 1, so that
rounding shows."""


def assert_same(first: Run, second: Run, within: float = 5e-4) -> None:
    left, right = weights(first), weights(second)
    for name, value in left.items():
        np.testing.assert_allclose(right[name], value, rtol=0, atol=within * abs(value).max(), err_msg=name)


# Laws

OBJECTIVES = [
    {"kind": "kto"},
    {"kind": "apo_zero_unpaired"},
    {"kind": "kto", "sft_weight": 0.5},
    {"kind": "dpo"},
    {"kind": "orpo"},
    {"kind": "simpo"},
    {"kind": "dpo", "loss": "ipo"},
]


def rows_for(objective: dict) -> list[dict]:
    return labelled() if objective["kind"] in ("kto", "apo_zero_unpaired") else paired()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: "-".join(map(str, one.values())))
def test_how_an_update_is_cut_changes_nothing(train, objective):
    whole, said = train(
        "whole", rows_for(objective), objective=objective, optimizer=PLAIN, batch={"tokens": 3000}
    )
    assert steps_of(said)[-1].metrics
    for out, cut in (
        ("ones", {"micro": 1}),
        ("packed", {"pack": True, "tokens": 300}),
        ("small", {"tokens": 40}),
    ):
        other, heard = train(out, objective=objective, optimizer=PLAIN, batch=cut)
        assert_same(whole, other, within=2e-5)
        for one, two in zip(steps_of(said), steps_of(heard), strict=True):
            assert two.loss == pytest.approx(one.loss, rel=1e-4)
            assert two.metrics == pytest.approx(one.metrics, rel=1e-3, abs=1e-4)


def test_the_compiled_step_gives_the_same(train):
    plain, _ = train("plain")
    compiled, _ = train("compiled", loop={"compile": True})
    assert_same(plain, compiled)


def groups_of(count: int, seed: int) -> list[Group]:
    random = np.random.Generator(np.random.PCG64(seed))
    made = []
    for index in range(count):
        asked, said = (random.integers(1, 90, random.integers(1, 6)) for _ in range(2))
        ids = np.concatenate([asked, said]).astype(np.int32)
        targets = np.concatenate([np.zeros(len(asked)), np.ones(len(said))]).astype(np.float32)
        made.append(Group((Tokens(ids, targets),), f"x:{index}", bool(index % 2)))
    return made


def content(groups: list[Group]) -> Counter:
    return Counter(
        (tuple(one.ids.tolist()), tuple(one.targets.tolist())) for group in groups for one in group.sequences
    )


@given(st.integers(1, 9), st.integers(0, 50), st.integers(0, 99), st.randoms())
def test_mismatched_pairs_depend_on_the_rows_and_the_update_alone(count, seed, salt, random):
    groups, spare = groups_of(count, seed), groups_of(1, 1000)
    found, notes = KTO().twins(groups, salt, spare, 99)
    shuffled = groups.copy()
    random.shuffle(shuffled)
    assert content(KTO().twins(shuffled, salt, spare, 99)[0]) == content(found)
    assert len(found) == count and not notes
    # Every prompt once, and no row with its own completion.
    asked = Counter(tuple(one.ids[one.targets == 0].tolist()) for group in found for one in group.sequences)
    assert asked == Counter(
        tuple(one.ids[one.targets == 0].tolist()) for group in groups for one in group.sequences
    )
    assert not content(found) & content(groups)


def test_museum_trl_kto_no_row_is_its_own_mismatch():
    """TRL pairs inside a micro-batch: a lone last row meets itself (TRL 1911: the middle row of an odd
    number), and z0 takes its reward for divergence."""
    one, *_ = groups_of(1, 0)
    for alike in ([one], [one, one]):
        found, notes = KTO().twins(alike, 1, (), 99)
        assert found == [] and notes.total() == len(alike)
    assert len(KTO().twins([one], 1, groups_of(1, 5), 99)[0]) == 1
    same, _ = KTO().twins([one, one, *groups_of(1, 5)], 1, (), 99)
    assert not content(same) & content([one])


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=9), st.integers(0, 9))
def test_a_mismatched_pair_has_another_prompt_and_another_answer(made, salt):
    """Rows share prompts (two answers to one question) and answers (one refusal for many); neither makes a
    matched pair."""
    groups = [
        Group(
            (
                Tokens(
                    np.array([asked, asked, 50 + said, 60 + said], np.int32),
                    np.array([0, 0, 1, 1], np.float32),
                ),
            ),
            "",
            True,
        )
        for asked, said in made
    ]
    found, notes = KTO().twins(groups, salt, (), 99)
    assert len(found) + notes.total() == len(groups)
    matched = set(made)
    for group in found:
        asked, _, said, _ = group.sequences[0].ids.tolist()
        assert any(
            said - 50 == b and asked != a and any(x == asked and y != b for x, y in matched)
            for a, b in matched
        )
    lonely = sum(all(a == c or b == d for c, d in made) for a, b in made)
    assert notes.total() == lonely


def test_pairs_are_drawn_anew_in_every_epoch():
    groups = groups_of(8, 3)
    drawn = [frozenset(content(KTO().twins(groups, salt, (), 99)[0])) for salt in range(6)]
    assert len(set(drawn)) > 3


def test_a_mismatched_pair_is_cut_at_the_longest_row():
    asked, said = (
        Group(
            (Tokens(np.arange(1, 9, dtype=np.int32), np.array([0] * n + [1] * (8 - n), np.float32)),),
            str(n),
            True,
        )
        for n in (6, 2)
    )
    found, notes = KTO().twins([asked, said], 0, (), 9)
    assert {len(one.sequences[0].ids) for one in found} == {4, 9}
    assert notes == {"mismatched pairs cut at batch.length": 1}


# Planted failures: what the goldens and laws above are for


@pytest.mark.parametrize(
    "fault", ["self-pair", "prompt counted", "mean", "weights swapped", "reference after"]
)
def test_a_planted_failure_is_caught(monkeypatch, tmp_path, fault):
    name = "kto_weighted"
    if fault == "self-pair":
        monkeypatch.setattr(
            goldens, "mismatched", lambda groups: [Group(group.sequences, group.source) for group in groups]
        )
    elif fault == "prompt counted":
        monkeypatch.setattr(
            goldens,
            "tokens",
            lambda asked, said: Tokens(
                np.array([*asked, *said], np.int32),
                np.array([0] + [1] * (len(asked) + len(said) - 1), np.float32),
            ),
        )
    elif fault == "mean":
        real = Judging.losses
        monkeypatch.setattr(Judging, "losses", lambda self, logps, fields: real(self, logps / 5, fields))
    elif fault == "weights swapped":
        one = goldens.OBJECTIVES[name]
        swapped = one.model_copy(
            update={"desirable_weight": one.undesirable_weight, "undesirable_weight": one.desirable_weight}
        )
        monkeypatch.setitem(goldens.OBJECTIVES, name, swapped)
    else:
        monkeypatch.setattr(
            reference.Reference,
            "fill",
            lambda self, groups: [
                group._replace(
                    reference=tuple(
                        value + 1.0
                        for value in (self.values.get(tokens.digest) for tokens in group.sequences)
                    )
                )
                for group in groups
            ],
        )
    with pytest.raises(AssertionError):
        parity.test_loss_and_gradients_are_those_of_trl(name, False)


# The reference


def test_museum_mlx_tune_kto_the_reference_is_the_model_before_training(train, cache):
    """mlx-tune and mlx-forge take the model in training for its own reference, so that every reward stays
    0."""
    _, said = train("one")
    last = [event for event in said if isinstance(event, events.Validated)][-1]
    assert abs(last.metrics["margin"]) > 0.01 and last.metrics["reward_desirable"] != 0
    assert any("reference: 67 sequences measured, 0 cached" in text for text in notices(said)), notices(said)
    first = next(event for event in said if isinstance(event, events.Validated))
    assert (
        abs(first.metrics["margin"]) < 1e-4
        and abs(first.metrics["kl"]) < 1e-4
        and first.metrics["accuracy"] == 0.5
    )
    _, again = train("two")
    assert any("reference: 0 sequences measured, 67 cached" in text for text in notices(again))
    _, other = train(
        "three", loop={"seed": 1}
    )  # another split and other pairs: rows are known, pairs are not
    measured, known = map(
        int, re.findall(r"reference: (\d+) sequences measured, (\d+) cached", " ".join(notices(other)))[0]
    )
    assert known >= 30 and measured > 20
    assert len(list(cache.iterdir())) == 1


def test_a_short_run_measures_the_rows_it_comes_to(train):
    _, said = train("short", loop={"steps": 1})  # 7 rows and their pairs, 6 held-out rows and theirs
    assert any("reference: 26 sequences measured" in text for text in notices(said)), notices(said)


def test_another_base_gives_another_reference(train, tiny_model, tmp_path, cache):
    train("one")
    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    tiny.write_model(other, json.loads((other / "config.json").read_text())["vocab_size"], seed=5)
    _, said = train("two", model={"path": str(other)})
    assert any("67 sequences measured, 0 cached" in text for text in notices(said))
    assert len(list(cache.iterdir())) == 2


@pytest.mark.parametrize("harm", ["torn", "renamed", "poisoned"])
def test_a_spoilt_cache_is_not_used(train, cache, harm):
    train("one")
    (file,) = cache.iterdir()
    if harm == "torn":
        file.write_bytes(file.read_bytes()[:-3])
    elif harm == "renamed":
        stale = reference.Reference("0" * 32)
        stale.write(file)
    else:
        held = reference.Reference(file.stem)
        held.read(file)
        held.values = dict.fromkeys(held.values, float("nan"))
        held.write(file)
    _, said = train("two")
    assert any("67 sequences measured, 0 cached" in text for text in notices(said))
    assert any("measured again" in text for text in notices(said))


class Stop(Exception):
    pass


def interrupted(train, out: str, after: int) -> None:
    """A run whose process died after ``after`` updates were saved."""
    seen: list[int] = []
    real = loop.Loop._save

    def save(self, cursor):
        real(self, cursor)
        seen.append(cursor.step)
        if cursor.step == after:
            raise Stop

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Stop):
        patch.setattr(loop.Loop, "_save", save)
        train(out, loop={"save_every": 1, "steps": 6})


@pytest.mark.parametrize("lost", ["nothing", "cache", "both"])
def test_a_resumed_run_ends_in_the_same_bytes(train, tmp_path, cache, lost):
    whole, _ = train("whole", loop={"save_every": 1, "steps": 6})
    interrupted(train, "halves", 3)
    if lost != "nothing":
        shutil.rmtree(cache)
    run = Run(tmp_path / "halves")
    if lost == "both":  # measured anew, by the model before training, although a checkpoint is there
        (run.path / REFERENCE).unlink()
    resumed, said = train("halves", resume=run, loop={"save_every": 1, "steps": 6})
    assert resumed is not None
    if lost == "both":
        assert any("sequences measured" in text for text in notices(said))
        held, before = (reference.Reference(reference_name(one)) for one in (whole, resumed))
        held.read(whole.path / REFERENCE)
        before.read(resumed.path / REFERENCE)
        assert before.values == pytest.approx(held.values, abs=1e-4) and len(held.values) > 60
        assert_same(whole, resumed)
    else:
        for name in ("adapters.safetensors", "optimizer.safetensors"):
            assert (checkpoints.choose(whole, "last") / name).read_bytes() == (
                checkpoints.choose(resumed, "last") / name
            ).read_bytes()


def test_a_run_that_began_with_another_rounding_keeps_its_own_reference(tiny_model, tmp_path):
    net = model.load(model.ModelSpec(path=str(tiny_model))).net
    facts = {"base": "x"}
    row = Group((Tokens(np.array([3, 5, 8], np.int32), np.array([0, 1, 1], np.float32)),), "")
    for code, known in (2, 1), (1, 0):
        own = reference.Reference(reference.name(facts, code), {row.sequences[0].digest: -7.0})
        own.write(tmp_path / "own")
        found = reference.measure(
            net,
            [row],
            Cut(64),
            reference.name(facts),
            own=tmp_path / "own",
            earlier=reference.earlier_names(facts),
        )
        assert (found.cached, found.measured) == (known, 1 - known)
        assert (found.values[row.sequences[0].digest] == -7.0) == bool(known)


def reference_name(run: Run) -> str:
    from safetensors import safe_open

    with safe_open(run.path / REFERENCE, framework="numpy") as file:
        return file.metadata()["name"]


# Ways of the data

ASKED = (Message("user", "who?"),)


def said(text: str) -> Conversation:
    return Conversation((*ASKED, Message("assistant", text)))


EXAMPLES: list[formats.Example] = [
    Judged(said("good"), True, source="a:1"),
    Judged(said("bad"), False, source="a:2"),
    Demonstration(said("fine"), source="a:3"),
    Preference(said("better"), said("worse"), source="a:4"),
    Document("text", source="a:5"),
    Completion("asked", "said", False, source="a:6"),
    Completion("asked", "else", source="a:7"),
]


def test_what_kto_takes():
    found = KTO().select(EXAMPLES)
    assert [
        (one.source, getattr(one, "desirable", getattr(one, "label", None))) for one in found.examples
    ] == [("a:1", True), ("a:2", False), ("a:3", True), ("a:6", False), ("a:7", True)]
    assert sorted(example.source for example, _ in found.left_out) == ["a:4", "a:5"]
    assert found.notes == {"a row without a label taken as desirable": 2}
    taken = KTO(unlabelled="leave_out", pairs="judge").select(EXAMPLES)
    assert [one.source for one in taken.examples] == ["a:1", "a:2", "a:4", "a:4", "a:6"]
    assert [one.desirable for one in taken.examples if one.source == "a:4"] == [True, False]
    assert taken.notes == {"a pair taken as a desirable and an undesirable row": 1}


def test_what_dpo_takes():
    found = DPO().select(EXAMPLES)
    assert [one.source for one in found.examples] == ["a:4"] and len(found.left_out) == 6
    made = DPO(judged="pair").select(EXAMPLES)
    assert [(one.chosen, one.rejected) for one in made.examples] == [
        (said("better"), said("worse")),
        (said("good"), said("bad")),
    ]
    assert sorted(one.source for one, _ in made.left_out) == ["a:3", "a:5", "a:6", "a:7"]


@pytest.mark.parametrize(
    ("objective", "rows", "message"),
    [
        (
            "kto",
            [row | {"label": True} for row in tiny.conversations(12)],
            "10 are desirable and 0 undesirable",
        ),
        ("kto", paired(), "0 are desirable and 0 undesirable, 16 are pairs"),
        ("dpo", labelled(), "DPO needs pairs of a chosen and a rejected answer"),
        ("orpo", labelled(), "objective=kto learns from labelled rows as they are"),
    ],
)
def test_data_that_cannot_serve_is_refused(train, objective, rows, message):
    with pytest.raises(errors.DataError, match=message):
        train("run", rows, objective={"kind": objective})


def test_pairs_and_labels_serve_each_other(train):
    _, first = train("judged", paired(), objective={"kind": "kto", "pairs": "judge"})
    assert steps_of(first)[0].units == 7
    same = [
        {
            "messages": [{"role": "user", "content": str(at)}, {"role": "assistant", "content": text}],
            "label": text == "yes",
        }
        for at in range(12)
        for text in ("yes", "no no")
    ]
    _, second = train("paired", same, objective={"kind": "dpo", "judged": "pair"})
    assert steps_of(second)[-1].metrics.keys() >= {"reward_chosen", "reward_rejected", "margin", "accuracy"}


# Weights of the classes


def judged(good: int, bad: int) -> list[Group]:
    return [group._replace(label=index < good) for index, group in enumerate(groups_of(1, 0) * (good + bad))]


@pytest.mark.parametrize(
    ("good", "bad", "given_weights", "expected", "fits"),
    [
        (746, 254, {}, (1.0, 746 / 254 * 0.75), True),
        (100, 100, {}, (1.0, 1.0), True),
        (120, 100, {}, (1.0, 1.0), True),
        (50, 100, {}, (2.0, 1.0), True),
        (746, 254, {"undesirable_weight": 2.5}, (1.0, 2.5), True),
        (746, 254, {"undesirable_weight": 1.0}, (1 / 746 * 254 * 4 / 3, 1.0), True),
        (746, 254, {"desirable_weight": 1.0, "undesirable_weight": 1.0}, (1.0, 1.0), False),
    ],
)
def test_weights_keep_the_classes_in_balance(good, bad, given_weights, expected, fits):
    made, (remark,) = KTO(**given_weights).settled(judged(good, bad))
    assert (made.desirable_weight, made.undesirable_weight) == pytest.approx(expected)
    ratio = made.desirable_weight * good / (made.undesirable_weight * bad)
    assert (1 - 1e-9 <= ratio <= 4 / 3 + 1e-9) == fits == (remark.level == "info")
    assert ("OUTSIDE" in remark.text) != fits


def test_an_imitation_weight_learns_the_good_beside_it(train):
    _, plain = train("plain")
    _, both = train("both", objective={"kind": "kto", "sft_weight": 1.0})
    assert steps_of(both)[0].loss > steps_of(plain)[0].loss + 1
    gained = [
        steps_of(heard)[-1].metrics["logp_desirable"] - steps_of(heard)[0].metrics["logp_desirable"]
        for heard in (plain, both)
    ]
    assert gained[1] > gained[0]


# Settings


def test_defaults_suit_the_objective(tmp_path):
    def resolved(*sets: str):
        return load(RunConfig, sets=["model.path=m", "data.train=d", *sets])

    sft, kto = resolved(), resolved("objective=kto")
    assert (sft.spec.optimizer.learning_rate, kto.spec.optimizer.learning_rate) == (1e-4, 5e-5)
    assert kto.origins["optimizer.learning_rate"] == "default of kto" and kto.spec.batch.sequences == 16
    kept = resolved(
        "objective=kto", "optimizer.learning_rate=1e-4", "adapter.dropout=0.05", "batch.sequences=8"
    )
    assert kept.spec.optimizer.learning_rate == 1e-4
    said = " ".join(kept.spec.warnings())
    assert (
        "SFT's is too much" in said
        and "adapter.dropout is SFT's" in said
        and "batch.sequences 8 is few" in said
    )
    assert not kto.spec.warnings()
    full = resolved("objective=kto", "adapter=full")
    assert full.spec.optimizer.learning_rate == 5e-6 and not full.spec.warnings()
    for wrong in ("batch=8", "optimizer=true", "optimizer=adamx"):
        with pytest.raises(errors.ConfigError, match=wrong.partition("=")[0]):
            resolved("objective=kto", wrong)
    preset = load(RunConfig, preset="mistral-7b-m4-24gb", sets=["data.train=d", "objective=kto"]).spec
    assert preset.optimizer.learning_rate == 1e-4 and "SFT's is too much" in " ".join(preset.warnings())


@pytest.mark.parametrize(
    ("blocks", "message"),
    [
        ({"template": {"prompt_weight": 0.1}}, "compares answers, not prompts"),
        ({"loop": {"best": "margn"}}, "kto has loss, perplexity, adherence, reward_desirable"),
        ({"objective": {"kind": "sft"}, "loop": {"best": "margin"}}, "sft has loss, perplexity"),
        ({"objective": {"kind": "dpo", "label_smoothing": 0.1}}, "belong together"),
    ],
)
def test_contradictions_are_refused(blocks, message):
    values = {"model": {"path": "m"}, "data": {"train": "d"}, "objective": {"kind": "kto"}} | blocks
    with pytest.raises(ValueError, match=message):
        RunConfig(**values)


# What is watched


def test_the_best_checkpoint_can_follow_any_number(train):
    run, said = train("run", loop={"best": "margin", "validate_every": 1})
    margins = [event.metrics["margin"] for event in said if isinstance(event, events.Validated)]
    best = [event.best for event in said if isinstance(event, events.Validated)]
    assert best == [value > max(margins[:at], default=-1e9) for at, value in enumerate(margins)]
    index = json.loads((run.path / "checkpoints" / "index.json").read_text())
    assert index["metric"] == "validation margin" and index["best_value"] == max(margins)
    cursor = json.loads((checkpoints.choose(run, "last") / CURSOR).read_text())
    assert cursor["best_step"] == int(np.argmax(margins))


def test_warnings_are_said_once():
    heard: list[events.Notice] = []
    seen = caution.Watch()
    bad = {"reward_desirable": -0.5, "reward_undesirable": -0.1, "margin": -0.4, "kl": 99.0}
    for _ in range(caution.WINDOW - 1):
        seen.step(bad, heard.append)
    assert heard == []
    for _ in range(9):
        seen.step(bad, heard.append)
    assert len(heard) == 3 and all(one.level == "warning" and one.hint for one in heard)
    assert "desirable answers became less likely" in heard[0].what and "kl 99" in heard[1].what
    fine = caution.Watch()
    for _ in range(20):
        fine.step(
            {"reward_desirable": 0.5, "reward_undesirable": -0.1, "margin": 0.6, "kl": 1.0}, heard.append
        )
    caution.Watch(compared=False).validation({"reward_chosen": -3.0}, heard.append)
    assert len(heard) == 3


def test_without_run_of_one_class_are_counted(train):
    groups = judged(3, 1)
    assert caution.lonely(Plan((1,) * 4, 2, Cut(9), 0), groups) == 1
    _, said = train("run", batch={"sequences": 2})
    assert any("rows of one class only" in text for text in notices(said))


def test_ranked_is_the_share_of_pairs():
    assert ranked(np.array([1.0, 3.0]), np.array([2.0, 0.0])) == 0.75
    assert ranked(np.array([1.0]), np.array([1.0 + 1e-6])) == 0.5


# On top of another run


def assert_goes_on(first: Run, before: events.Validated) -> None:
    """What the second run says of the held-out rows before its first update is what the first said at its
    best checkpoint."""
    seen = [one for one in events.read(first.path / "events.jsonl") if isinstance(one, events.Validated)]
    best = next(one for one in seen if one.step == int(checkpoints.choose(first, "best").name))
    assert before.perplexity == pytest.approx(best.perplexity, rel=1e-4)
    assert abs(before.perplexity - seen[0].perplexity) > 0.01 * best.perplexity, "and not what the base says"


def test_training_goes_on_from_an_adapter(train):
    first, _ = train("sft", objective={"kind": "sft"})
    on, said = train("kto", adapter={"start": str(first.path)})
    start = checkpoints.choose(first, "best")
    manifest = json.loads((on.path / MANIFEST).read_text())
    assert manifest["lineage"]["start"]["run"] == "sft" and manifest["lineage"]["start"]["objective"] == "sft"
    before = next(event for event in said if isinstance(event, events.Validated))
    assert abs(before.metrics["margin"]) < 1e-4, "the reference is the adapter that it starts from"
    assert_goes_on(first, before)
    moved = [
        abs(weights(on)[name] - value).max()
        for name, value in load_file(start / "adapters.safetensors").items()
    ]
    assert 0 < max(moved) < 0.2
    assert evaluation.evaluate(on, tasks=["preference", "perplexity"]).scores


def test_an_adapter_is_merged_into_the_base(train):
    first, _ = train("sft", objective={"kind": "sft"})
    on, said = train(
        "kto", model={"path": first.config.model.path, "adapter": str(first.path)}, adapter={"rank": 4}
    )
    manifest = json.loads((on.path / MANIFEST).read_text())
    assert manifest["lineage"]["merged"]["objective"] == "sft"
    assert manifest["hashes"]["base"] != json.loads((first.path / MANIFEST).read_text())["hashes"]["base"]
    before = next(event for event in said if isinstance(event, events.Validated))
    assert abs(before.metrics["margin"]) < 1e-4
    assert_goes_on(first, before)
    scores = {
        (score.task, score.name): score for score in evaluation.evaluate(on, tasks=["perplexity"]).scores
    }
    assert scores["perplexity", "loss"].delta is not None


def test_an_adapter_that_does_not_fit_is_refused(train, tiny_model, tmp_path):
    first, _ = train("sft", objective={"kind": "sft"})
    with pytest.raises(errors.ConfigError, match=r"adapter\.rank is 4, there 16"):
        train("other", adapter={"start": str(first.path), "rank": 4})
    with pytest.raises(errors.ModelError, match="neither a run nor a checkpoint"):
        train("none", adapter={"start": str(tmp_path)})
    other = tmp_path / "other-base"
    shutil.copytree(tiny_model, other)
    tiny.write_model(other, json.loads((other / "config.json").read_text())["vocab_size"], seed=5)
    with pytest.raises(errors.ModelError, match="trained on another base"):
        train("base", model={"path": str(other)}, adapter={"start": str(first.path)})


# From the loop to the report: every number again, by the textbook


def told() -> list[dict]:
    """Good rows say yes, bad ones say no."""
    rows = []
    for index, row in enumerate(tiny.conversations(40)):
        asked, good = row["conversations"][0], index % 2 == 0
        rows.append(
            {
                "messages": [asked, {"role": "assistant", "content": "yes yes" if good else "no no no"}],
                "label": good,
            }
        )
    return rows


def logp(net, one: Tokens) -> float:
    logits = net(mx.array(one.ids)[None, :-1])[0]
    each = (logits - mx.logsumexp(logits, axis=-1, keepdims=True))[
        mx.arange(len(one.ids) - 1), mx.array(one.ids[1:])
    ]
    return float((each * mx.array(one.targets[1:])).sum())


def test_an_update_of_kto_is_that_of_the_formula(train):
    run, said = train(
        "run", rows=told(), loop={"steps": 3, "save_every": 1}, objective={"undesirable_weight": 1.3}
    )
    prepared = preparation.prepare(run.config)
    groups = [prepared.train[member] for member in prepared.plan.members(2)]
    pairs, _ = KTO().twins(groups, 3, (), 4096)
    base = model.load(run.config.model).net
    tuned = model.load(run.config.model).net
    adapters.load(tuned, run.checkpoint(2))
    ratios, mismatched = (
        np.array([logp(tuned, one.sequences[0]) - logp(base, one.sequences[0]) for one in some])
        for some in (groups, pairs)
    )
    kl = mismatched.mean()
    z0, good = max(0.0, kl), np.array([group.label for group in groups])
    high = prepared.objective.desirable_weight
    sign, weight = np.where(good, 1, -1), np.where(good, high, 1.3)
    loss = (weight * (1 - 1 / (1 + np.exp(-0.1 * sign * (ratios - z0))))).mean()
    done = steps_of(said)[2]
    assert abs(kl) > 0.1 and abs(ratios).max() > 0.1
    assert done.loss == pytest.approx(loss, rel=1e-4)
    assert done.metrics["kl"] == pytest.approx(kl, rel=1e-3)
    assert done.metrics["kl_error"] == pytest.approx(
        mismatched.std(ddof=1) / len(mismatched) ** 0.5, rel=1e-3
    )
    assert done.metrics["reward_desirable"] == pytest.approx(0.1 * ratios[good].mean(), rel=1e-3)
    assert done.metrics["margin"] == pytest.approx(
        0.1 * (ratios[good].mean() - ratios[~good].mean()), rel=1e-3
    )
    assert done.metrics["accuracy"] == (ratios[good][:, None] > ratios[~good][None]).mean()


def test_what_is_learned_shows_with_the_right_sign(train):
    run, said = train("kto", rows=told(), loop={"steps": 12})
    last = [event for event in said if isinstance(event, events.Validated)][-1]
    assert (
        last.metrics["margin"] > 0.1
        and last.metrics["accuracy"] > 0.9
        and last.metrics["reward_undesirable"] < 0
    )
    scores = {score.name: score for score in evaluation.evaluate(run, tasks=["preference"]).scores}
    assert (
        scores["accuracy"].value > 0.9 and scores["accuracy"].low is not None and scores["accuracy"].low > 0.3
    )
    assert scores["ratio_margin"].value == pytest.approx(10 * last.metrics["margin"], rel=1e-3)
    assert scores["ratio_good"].value > scores["ratio_bad"].value and scores["ratio_bad"].value < 0
    _, said = train("dpo", rows=paired(), objective={"kind": "dpo"}, loop={"steps": 8})
    done = steps_of(said)[-1].metrics
    assert done["margin"] > 0.1 and done["accuracy"] > 0.9 and done["reward_chosen"] > done["reward_rejected"]
    assert done["logp_chosen"] > done["logp_rejected"]


def test_an_sft_run_is_asked_too(train):
    run, _ = train("sft", rows=told(), objective={"kind": "sft"})
    scores = {score.name: score for score in evaluation.evaluate(run).scores}
    assert scores["ratio_good"].value > 0 and "accuracy" in scores and "loss" in scores


def test_what_is_not_compared_is_said(train, tmp_path):
    run, _ = train("kto", rows=told())
    heard: list[events.Event] = []
    data = tiny.write_rows(tmp_path / "more.jsonl", [*told(), *paired(3)])
    evaluation.evaluate(run, data=[str(data)], tasks=["preference"], notify=heard.append)
    assert any("only labelled rows are compared" in text for text in notices(heard))
    heard.clear()
    long = [
        {"messages": [{"role": "user", "content": "word " * 5000}, told()[1]["messages"][1]], "label": False}
    ]
    data = tiny.write_rows(tmp_path / "long.jsonl", [*told(), *long])
    scores = evaluation.evaluate(run, data=[str(data)], tasks=["preference"], notify=heard.append).scores
    assert scores and any("preference: not measured" in text for text in notices(heard))


def test_a_conversation_taken_apart_is_judged_where_its_sides_part():
    turns = (Message("user", "a"), Message("assistant", "shared"), Message("user", "b"))
    sides = [Conversation((*turns, Message("assistant", text))) for text in ("good", "bad")]
    for one in KTO(pairs="judge").select([Preference(*sides)]).examples:
        assert isinstance(one, Judged)
        assert [message.learn for message in one.conversation.messages] == [None, False, None, None]


def test_what_the_held_out_rows_cannot_say_is_no_best(train, tmp_path):
    good = tiny.write_rows(
        tmp_path / "good.jsonl", [row | {"label": True} for row in tiny.conversations(50)[40:]]
    )
    with pytest.raises(
        errors.ConfigError, match=r"loop\.best is margin, and the held-out rows do not give it"
    ):
        train("run", data={"valid": (str(good),)}, loop={"best": "margin"})


def test_a_stop_before_the_first_update_keeps_what_was_measured(train, tmp_path, cache, monkeypatch):
    whole, _ = train("whole")
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(reference, "SAVED_EVERY", 20)
    measured = reference.measure

    def stopping(*words, **options):
        return measured(*words, **options | {"stopped": lambda: any(cache.glob("*"))})

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(reference, "measure", stopping)
        train("halves")
    run = Run(tmp_path / "halves")
    assert run.manifest["status"] == "interrupted"
    resumed, said = train("halves", resume=run)
    known = next(text for text in notices(said) if " cached" in text)
    assert int(re.findall(r"(\d+) cached", known)[0]) >= 20
    assert resumed is not None and resumed.manifest["status"] == "completed"
    assert_same(whole, resumed)


def test_a_cursor_from_before_there_was_more_than_the_loss_is_read(train):
    run, _ = train("run", objective={"kind": "sft"})
    path = checkpoints.choose(run, "last") / CURSOR
    found = json.loads(path.read_text())
    found["best_loss"] = found.pop("best_value")
    path.write_text(json.dumps(found))
    assert checkpoints.read(run, 5).best_value == found["best_loss"]


# The task


def compared(good: list[float], bad: list[float], pair: bool = False) -> list[preference.AnswerRatio]:
    made = [
        preference.AnswerRatio(f"g:{at}", True, 0.0, value, 3.0, at if pair else None)
        for at, value in enumerate(good)
    ]
    return made + [
        preference.AnswerRatio(f"b:{at}", False, 0.0, value, 3.0, at if pair else None)
        for at, value in enumerate(bad)
    ]


def test_the_task_counts_pairs_with_intervals():
    found = {one.name: one for one in preference.scores(compared([1.0, 2.0, 3.0, 5.0], [0.0, 2.5, -1.0]), 0)}
    accuracy, margin = found["accuracy"], found["ratio_margin"]
    assert accuracy.value == pytest.approx(10 / 12) and margin.value == pytest.approx(2.75 - 0.5)
    assert (
        accuracy.low is not None
        and accuracy.high is not None
        and accuracy.low < accuracy.value <= accuracy.high <= 1
    )
    assert accuracy.delta == pytest.approx(accuracy.value - 0.5) and accuracy.n == 7
    pairs = {
        one.name: one for one in preference.scores(compared([1.0, 0.0, 3.0], [0.0, 1.0, 3.0], pair=True), 0)
    }
    assert pairs["accuracy"].value == 0.5 and pairs["accuracy"].n == 3
    assert preference.scores(compared([1.0], []), 0) == []


def test_the_interval_of_few_answers_covers():
    """200 samples of six good and six bad, one apart: the margin's interval covers 1 as often as it says."""
    random = np.random.default_rng(0)
    drawn = [compared(random.normal(1, 1, 6).tolist(), random.normal(0, 1, 6).tolist()) for _ in range(200)]
    margins = [
        {one.name: one for one in preference.scores(items, at)}["ratio_margin"]
        for at, items in enumerate(drawn)
    ]
    assert (
        0.93
        <= np.mean(
            [one.low <= 1 <= one.high for one in margins if one.low is not None and one.high is not None]
        )
        <= 0.99
    )


def test_few_answers_that_always_win_prove_little():
    (accuracy, *_) = preference.scores(compared([2.0, 3.0, 4.0], [0.0, 1.0, 1.5]), 0)
    assert accuracy.value == 1.0 and accuracy.p is not None and accuracy.p >= 0.25, (
        "three of three heads are seen in a quarter"
    )


def test_a_likelihood_that_is_no_number_names_its_row():
    tokens = Tokens(np.arange(4, dtype=np.int32), np.ones(4, np.float32))
    task = preference.Preferred([Group((tokens,), f"rows.jsonl:{at}", at % 2 == 0) for at in range(4)])
    assert [one.value for one in task.score([(-1.0, 4.0)] * 4)] == [-1.0] * 4
    with pytest.raises(errors.EvaluationError, match=r"1 of 4 values are not finite\n.*rows.jsonl:2: nan"):
        task.score([(-1.0, 4.0), (-1.0, 4.0), (float("nan"), 4.0), (-1.0, 4.0)])


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(st.floats(-5, 5), min_size=2, max_size=8), st.lists(st.floats(-5, 5), min_size=2, max_size=8))
def test_no_difference_is_chance(good, bad):
    (accuracy, *_), (turned, *_) = (
        preference.scores(compared(*sides), 1) for sides in ((good, bad), (bad, good))
    )
    assert accuracy.value + turned.value == pytest.approx(1)


@pytest.mark.parametrize("objective", [APOZeroUnpaired(), KTO(), ORPO()])
def test_losses_stay_finite_far_out(objective):
    fields = (
        np.array([[1.0, 1.0, 0.0, 0.0, 0.0], [-1.0, 1.0, 0.0, 0.0, 0.0]])
        if isinstance(objective, Judging)
        else np.ones((2, 2))
    )
    for value in (-1e4, -1e-9, 0.0, 1e4 if isinstance(objective, Judging) else -1.0):

        def total(logps):
            return objective.losses(logps, mx.array(fields.astype(np.float32))).sum()

        found, slope = mx.value_and_grad(total)(mx.array([value, value]))
        assert np.isfinite(found.item()) and np.isfinite(np.array(slope)).all()


def test_rows_in_a_batch_may_stand_in_any_order(train, monkeypatch):
    first, said = train("first")
    real = Plan.members
    monkeypatch.setattr(Plan, "members", lambda self, step: real(self, step)[::-1])
    second, heard = train("second")
    assert_same(first, second)
    assert replace(steps_of(said)[-1], at=0).loss == pytest.approx(steps_of(heard)[-1].loss, rel=1e-4)
