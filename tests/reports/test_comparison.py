"""Runs held against each other: like with like only, the right sign, nothing where nothing differs, and text
is only text."""

from __future__ import annotations

import json
import random
import shlex
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from tunesmith import events
from tunesmith.checks.calls import CHECKS
from tunesmith.errors import ConfigError, DataError, EvaluationError
from tunesmith.evaluation import pairing as paired
from tunesmith.evaluation.statistics import Statistic, TaskStatistics, judge, summarise
from tunesmith.evaluation.tasks import EvaluationSpec, about, perplexity, preference
from tunesmith.evaluation.tasks.tool_calls import ToolCalls
from tunesmith.reports import verbs
from tunesmith.reports.comparison import RunComparison, lead
from tunesmith.reports.comparison_page import MACHINE, PAGE, TEXT
from tunesmith.runs.records import ExampleScore, Record, Score

HOSTILE = (
    "<b>b</b></script><img src=x onerror='window.hacked=1'>\"{{7*7}}`<i>` | [x](javascript:1) "
    "\x00\x1b[31m\ud800\u202e\u2028"
)
CALL = {"kind": "call", **dict.fromkeys(CHECKS, True)}


def a_run(folder: Path, *, rate: float = 1e-3, loss: float = 1.0, steps: int = 40, **manifest: Any) -> Path:
    """A run directory with settings, curves and facts."""
    folder.mkdir(parents=True)
    config = {
        "model": {"path": "m"},
        "objective": {"kind": "sft"},
        "optimizer": {"learning_rate": rate},
        "loop": {"seed": 0},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    origins = {"optimizer.learning_rate": "--set", "model.path": "--model"}
    (folder / "origin.json").write_text(json.dumps(origins))
    facts = {
        "hashes": {"data": {str(folder / "d.jsonl"): "ab" * 32}, "base": "cd" * 32, "template": "ef" * 32}
    }
    facts |= {
        "versions": {"tunesmith": "0.1.0"},
        "machine": {"device": "CPU"},
        "status": "completed",
        **manifest,
    }
    (folder / "manifest.json").write_text(json.dumps(facts))
    (folder / "data").mkdir()
    (folder / "data" / "valid.jsonl").write_text('{"text": "held out"}\n')
    counts = {"rows_train": 9, "loss": "nats a learned token"}
    told: list[events.Event] = [events.RunStarted(str(folder), steps, 10, 100, counts)]
    told.append(events.Validated(0, 2 * loss, 7.0, 10.0, 5, 1.0, True))
    for step in range(1, steps + 1):
        memory = {"resident": 3_000_000_000, "active": 1, "peak": 2_000_000_000}
        told.append(
            events.StepDone(
                step, step / steps, loss * (1 + 1 / step), 10.0, 20, rate, 1.0, False, 0.5, memory
            )
        )
    told.append(events.Validated(steps, loss, 3.0, 10.0, 5, 1.0, True))
    told.append(events.RunEnded("completed", steps, 30.0))
    (folder / "events.jsonl").write_text("".join(events.to_json(one) + "\n" for one in told))
    return folder


def evaluated(
    run: Path,
    values: list[float],
    *,
    task: Any = ToolCalls,
    name: str | None = None,
    version: str | None = None,
    identity: str = "1d",
    base: str = "cd",
    order: list[int] | None = None,
    text: str = "prompt",
    details: Any = None,
    family: Sequence[str] = (),
    **more: Any,
) -> Path:
    """Put an evaluation into ``run``, with one example a value, as `evaluation` writes it. ``details``: of
    each example."""
    name, version = name or task.name, version or task.version
    folder = run / "evals" / "+".join([f"{name}@{version}", *family])
    folder.mkdir(parents=True)
    scores = [
        ExampleScore(
            f"{run}/data/valid.jsonl:{at}",
            value,
            1.0,
            details[at] if details else {**CALL, "right_tool": value == 1.0},
            f"{text} {at}",
            f"right {text}",
            f"{text} says {value}",
        )
        for at, value in enumerate(values)
    ]
    lines = [
        {
            "source": one.source,
            "units": one.units,
            "prompt": one.prompt,
            "reference": one.reference,
            "tuned": one.value,
            "tuned_detail": one.detail,
            "tuned_answer": one.answer,
        }
        for one in (scores[at] for at in order or range(len(scores)))
    ]
    (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = TaskStatistics(name, version, task.statistics, getattr(task, "parts", ()) if details else ())
    found = [asdict(score) for score in judge(summarise(known, None, scores, 0))]  # type: ignore[arg-type]
    data = "data/valid.jsonl" if about(name).asks_rows else None
    told = {
        "task": name,
        "version": version,
        "checkpoint": "000040",
        "family": [*family],
        "data": data,
        "identity": identity,
        "settings": {"max_tokens": 256},
        "base": base * 32,
        "at": 1.0,
        "n": len(scores),
        "scores": found,
    }
    (folder / "score.json").write_text(json.dumps(told | more))
    return folder


@pytest.fixture
def runs(tmp_path) -> tuple[Path, Path]:
    """Two runs; the second is right on 30 of 60 prompts that the first gets wrong, and wrong on 3 that it
    gets right."""
    one, other = a_run(tmp_path / "runs" / "one"), a_run(tmp_path / "runs" / "other", rate=2e-3, loss=0.8)
    evaluated(one, [1.0] * 10 + [0.0] * 50)
    evaluated(other, [0.0] * 3 + [1.0] * 37 + [0.0] * 20)
    return one, other


def compared(*paths: Path, **options: Any) -> RunComparison:
    return verbs.compare(paths, out=paths[0].parents[1] / "out", **options)


def headline(found: RunComparison) -> Any:
    of = lead(found.sides[0].pairs)
    assert of is not None
    return of[1]


# What is held against what


def test_a_planted_difference_is_found_with_its_sign_and_the_verdict_says_it(runs):
    found = compared(*runs)
    score = headline(found)
    assert (
        score.delta == pytest.approx(27 / 60) and score.verdict == "improved" and score.sources == (30, 27, 3)
    )
    assert score.delta_low > 0.2 and score.n == 60 and score.test == "McNemar, exact"
    assert found.verdict == "B (other) is better than A (one) at the task" and found.tone == "good"
    assert [(reason.sign, reason.code) for reason in found.reasons] == [
        ("?", "retention_not_compared"),
        ("?", "safety_not_compared"),
        ("i", "cost"),
        ("✓", "task_improved"),
    ]
    retention, safety, cost, task = (reason.text for reason in found.reasons)
    head = "Better at the task: Tool calls right 61.7 % against 16.7 %, "
    assert task.startswith(head + "+45.0 points (95 % interval +")
    assert (retention, safety) == ("What the base knew was not compared", "Safety was not compared")
    assert "took 20 s against 20 s and at most 2.00 GB against 2.00 GB" in cost


def test_the_order_of_the_runs_flips_every_sign_and_nothing_else(runs):
    there, back = compared(*runs), compared(*runs[::-1])
    for one, other in zip(there.sides[0].pairs[0].scores, back.sides[0].pairs[0].scores, strict=True):
        assert one.delta == -other.delta and one.delta_low == pytest.approx(-other.delta_high, abs=1e-12)
        assert one.p == other.p and one.sources == other.sources[::-1] and one.name == other.name
    assert (
        headline(back).verdict == "regressed"
        and back.tone == "warning"
        and back.verdict == "B (one) is worse than A (other) at the task"
        and back.reasons[0].text.startswith(
            "Worse at the task: Tool calls right 16.7 % against 61.7 %, -45.0"
        )
    )


def test_a_run_and_its_copy_show_no_difference_anywhere(runs, tmp_path):
    shutil.copytree(runs[0], copy := tmp_path / "runs" / "copy")
    found = compared(runs[0], copy)
    scores = [score for held in found.sides[0].pairs for score in held.scores]
    assert scores and all(
        score.delta == 0 and score.p == 1 and score.sources[::2] == (0, 0) for score in scores
    )
    assert {score.verdict for score in scores} == {"no difference shown"} and found.tone == "note"
    assert found.settings == [] and found.others == [] and found.sides[0].uncompared == []
    assert found.verdict.startswith("No difference is shown between B (copy) and A (one)")


def test_examples_are_paired_by_what_they_ask_not_where_they_stand(runs, tmp_path):
    plain = compared(*runs)
    other = a_run(tmp_path / "shuffled", rate=2e-3)
    order = list(range(60))
    random.Random(1).shuffle(order)
    evaluated(other, [0.0] * 3 + [1.0] * 37 + [0.0] * 20, order=order)
    mixed = compared(runs[0], other)
    assert mixed.sides[0].pairs[0].scores == plain.sides[0].pairs[0].scores


def test_examples_whose_lines_moved_are_paired_by_their_prompts():
    def side(places: list[int]) -> list[ExampleScore]:
        return [ExampleScore(f"x.jsonl:{at}", at / 10, 1.0, {}, f"prompt {at}", None) for at in places]

    one = side([0, 1, 2])
    other = [
        ExampleScore("y.jsonl:7", each.value + 1, 1.0, {}, each.prompt, None) for each in side([2, 0, 1])
    ]
    pairs = paired.paired(one, other)
    assert pairs is not None and [(a.prompt, round(b.value - a.value, 9)) for a, b in pairs] == [
        (f"prompt {at}", 1.0) for at in (0, 1, 2)
    ]
    assert paired.paired(one, other[:2]) is None and paired.paired(one, side([0, 1, 3])) is None


@pytest.mark.parametrize(
    ("changed", "why"),
    [
        ({"version": "99"}, f"version {ToolCalls.version} and 99"),
        ({"identity": "2e"}, "other rows, prompts or settings (identity 1d and 2e)"),
        ({"base": "99"}, "other bases (cdcdcdcdcdcd and 999999999999)"),
        ({"text": "another"}, "the examples are not the same: 60 and 60, and some have no counterpart"),
    ],
)
def test_what_was_not_asked_alike_is_refused_with_the_reason(tmp_path, changed, why):
    one, other = a_run(tmp_path / "runs" / "one"), a_run(tmp_path / "runs" / "other")
    evaluated(one, [1.0] * 60)
    evaluated(other, [0.0] * 60, **changed)
    told: list[events.Event] = []
    found = compared(one, other, notify=told.append)
    assert found.sides[0].pairs == [] and found.sides[0].uncompared[0][:2] == ("tool_calls", why)
    assert "is not known, since no evaluation of both can be compared" in found.verdict
    assert any(isinstance(one, events.Notice) and why in one.what for one in told)
    for name in (TEXT, PAGE):
        assert why in (found.out / name).read_text(encoding="utf-8")


def test_a_run_that_was_not_evaluated_is_named_with_the_command(runs, tmp_path):
    bare = a_run(tmp_path / "runs" / "it's bare")
    found = compared(runs[0], bare)
    assert found.sides[0].uncompared == [
        (
            "tool_calls",
            "B was not evaluated on it",
            f"tunesmith evaluate '{tmp_path}/runs/it'\"'\"'s bare' --task tool_calls",
        )
    ]
    found = compared(bare, runs[0])
    assert found.sides[0].uncompared[0][1] == "A was not evaluated on it"


def test_a_run_that_was_not_evaluated_is_warned_of_once_with_one_command(runs, tmp_path):
    bare = a_run(tmp_path / "runs" / "bare")
    evaluated(runs[0], [1.0] * 60, name="perplexity")
    heard: list[events.Event] = []
    comparison = compared(runs[0], bare, notify=heard.append)
    assert len(comparison.sides[0].uncompared) == 2
    (warning,) = [
        event for event in heard if isinstance(event, events.Notice) and "not compared" in event.what
    ]
    assert "perplexity" in warning.what and "tool_calls" in warning.what
    assert warning.what.endswith("B was not evaluated on them")
    assert warning.hint is not None and warning.hint.count("tunesmith evaluate") == 1
    assert "--task perplexity" in warning.hint and "--task tool_calls" in warning.hint


def test_runs_that_held_out_other_rows_are_told_to_be_asked_the_same(runs, tmp_path):
    bare = a_run(tmp_path / "runs" / "bare")
    (bare / "data" / "valid.jsonl").write_text('{"text": "held out here"}\n')
    apart = "the runs held out other rows, so both need the same: FILE of rows that neither was trained on"
    commands = "; ".join(f"tunesmith evaluate {run} --task tool_calls --data FILE" for run in (runs[0], bare))
    (one,) = compared(runs[0], bare).sides[0].uncompared
    assert one == ("tool_calls", f"B was not evaluated on it; {apart}", commands)
    evaluated(bare, [1.0] * 60, identity="2e")
    (one,) = compared(runs[0], bare).sides[0].uncompared
    assert one == ("tool_calls", f"other rows, prompts or settings (identity 1d and 2e); {apart}", commands)
    shutil.rmtree(bare / "evals")
    evaluated(bare, [1.0] * 60, base="99")  # rows alike would not mend that
    assert compared(runs[0], bare).sides[0].uncompared == [
        ("tool_calls", "other bases (cdcdcdcdcdcd and 999999999999)", None)
    ]
    shutil.rmtree(bare / "evals")
    evaluated(runs[0], [1.0] * 60, identity="3f", data=["suite.jsonl"], family=["suite"])
    lacking = compared(runs[0], bare).sides[0].uncompared[-1]  # on named rows each is asked the same as it is
    assert lacking[1:] == (
        "B was not evaluated on it",
        f"tunesmith evaluate {bare} --task tool_calls --data suite.jsonl",
    )


def test_held_out_rows_that_are_a_folder_are_an_error_with_its_path_and_the_cure(runs):
    (runs[0] / "data" / "valid.jsonl").unlink()
    (runs[0] / "data" / "valid.jsonl").mkdir()
    with pytest.raises(DataError, match=r"valid\.jsonl: is not a file") as caught:
        compared(*runs)
    assert caught.value.hint is not None and "delete it" in caught.value.hint


def test_a_task_of_another_version_of_tunesmith_is_compared_by_its_headline_alone(runs):
    for run, values in zip(runs, ([1.0] * 4 + [0.0] * 8, [1.0] * 12), strict=True):
        evaluated(run, values, name="of_the_future", version="7")
    held = next(held for held in compared(*runs).sides[0].pairs if held.first.task == "of_the_future")
    assert [(score.name, score.delta) for score in held.scores] == [("tool_calls", pytest.approx(8 / 12))]
    assert held.note and "of its numbers only tool_calls can be compared" in held.note


class Bench:
    """The numbers of a benchmark: its class has none, for they are the harness's."""

    name, version, parts = "benchmark.mmlu_stem", "1.0-1", ("category",)
    statistics = (
        Statistic("acc", lambda one: one.detail["acc"], share=True, better="higher"),  # type: ignore[arg-type,return-value]
        Statistic("acc_norm", lambda one: one.detail["acc_norm"], share=True, better="higher", headline=True),  # type: ignore[arg-type,return-value]
        Statistic(
            "perplexity", lambda one: one.detail["perplexity"], lambda logp: np.exp(-logp), better="lower"
        ),  # type: ignore[arg-type,return-value]
    )


def benchmarked(run: Path, seed: int, right: float, **about: Any) -> None:
    chance = random.Random(seed)
    details = [
        {
            "acc": float(chance.random() < right),
            "acc_norm": float(chance.random() < right),
            "perplexity": -chance.random() - 1,
            "category": "physics" if at < 20 else "biology",
        }
        for at in range(60)
    ]
    evaluated(run, [one["acc_norm"] for one in details], task=Bench, details=details, **about)  # type: ignore[misc]


def test_all_numbers_of_a_benchmark_are_compared_as_its_own_statistics_would(tmp_path):
    one, other = a_run(tmp_path / "runs" / "one"), a_run(tmp_path / "runs" / "other")
    benchmarked(one, 1, 0.2)
    benchmarked(other, 2, 0.8)
    found = compared(one, other)
    (held,) = found.sides[0].pairs
    own = TaskStatistics(Bench.name, Bench.version, Bench.statistics, Bench.parts)
    sides = [paired.scored(side) for side in (held.first, held.second)]
    wanted = summarise(own, *[[replace(each, source=each.source[-2:]) for each in side] for side in sides], 0)  # type: ignore[arg-type]
    assert {each.name for each in held.scores} == {"acc", "acc_norm", "perplexity"} and len(
        wanted
    ) == 5 == len(held.scores)
    for score, right in zip(held.scores, wanted, strict=True):
        assert (score.name, score.part, score.n, score.better, score.unit, score.headline, score.sources) == (
            right.name,
            right.part,
            right.n,
            right.better,
            right.unit,
            right.headline,
            right.sources,
        )
        assert score.value == pytest.approx(right.value) and score.delta == pytest.approx(right.delta)
        assert score.test == right.test
    assert held.note is None and headline(found).name == "acc_norm" and headline(found).verdict == "improved"
    assert found.verdict == "B (other) is better than A (one) at the task"
    assert found.reasons[-1].text.startswith("Better at the task: mmlu_stem, acc_norm ")
    assert "B − A" in (page := page_of(found)) and "Tuned − base" not in page


def test_numbers_of_another_kind_are_not_ranked(runs, tmp_path):
    evaluated(runs[0], [3.0 + at / 10 for at in range(20)], task=perplexity.Perplexity)
    third = a_run(tmp_path / "runs" / "third")
    evaluated(third, [1.0 + at / 10 for at in range(20)], task=perplexity.Perplexity)
    found = compared(*runs, third)
    assert found.verdict.startswith(
        "Of 2 runs compared with A, 2 are shown to be better; they are not ranked, since no one"
    )
    assert "furthest ahead" not in found.verdict and len(found.reasons) == 2
    for side, reason in zip(found.sides, found.reasons, strict=True):
        assert reason.text.startswith(f"{side.verdict} (") and reason.tone == "good"
    evaluated(third, [1.0] * 11 + [0.0] * 49)
    assert "they are not ranked" not in (ranked := compared(*runs, third).verdict) and ranked.endswith(
        "; the furthest ahead: B (other)"
    )


def options(command: str) -> dict[str, Any]:
    """What the command line makes of a command; it raises where an option does not exist."""
    import typer

    from tunesmith.cli import app

    tunesmith, verb, *rest = shlex.split(command)
    group: Any = typer.main.get_command(app)
    given = group.commands[verb].make_context(verb, rest).params
    assert tunesmith == "tunesmith"
    return {
        key: value
        for key, value in given.items()
        if value != group.commands[verb].make_context(verb, ["x"]).params[key]
    }


@pytest.mark.parametrize(
    ("task", "family", "data", "settings", "wanted"),
    [
        (
            "perplexity",
            ["mine-1a2b3c", "first5", "tuned"],
            ["a b/mine.jsonl"],
            {"limit": 5, "max_tokens": 64, "batch_size": 3},
            {"task": ["perplexity"], "data": ["a b/mine.jsonl"], "base": False, "limit": 5, "max_tokens": 64},
        ),
        (
            "benchmark.mmlu_stem",
            [],
            None,
            {"benchmarks": ["arc", "mmlu:stem"], "shots": 5, "benchmark_data": "x", "limit": None},
            {"task": ["benchmarks"], "benchmark": ["mmlu:stem"], "shots": 5, "benchmark_data": Path("x")},
        ),
        (
            "humaneval",
            [],
            None,
            {"benchmarks": ["humaneval"], "allow_code": True},
            {"task": ["benchmarks"], "benchmark": ["humaneval"], "allow_code": True},
        ),
        (
            "drift.chat",
            [],
            None,
            {"chats": ["c.jsonl", "d.jsonl"], "embed": False},
            {"task": ["drift"], "chats": ["c.jsonl", "d.jsonl"], "embed": False},
        ),
        (
            "adherence",
            [],
            "data/valid.jsonl",
            {"chats": ["c.jsonl"], "benchmarks": ["arc"], "shots": 5},
            {"task": ["adherence"]},
        ),
    ],
)
def test_the_command_that_would_mend_it_asks_the_same_and_the_command_line_takes_it(
    task, family, data, settings, wanted
):
    spec = EvaluationSpec(**settings).model_dump(mode="json")
    record = Record(
        folder=Path("it's/evals/folder"),
        task=task,
        version="1",
        family=tuple(family),
        data=tuple(data) if isinstance(data, list) else data,
        settings=spec,
        scores=(),
    )
    found = options(paired.command(record))
    assert str(found.pop("run")) == "it's"
    assert {key: [*value] if isinstance(value, tuple) else value for key, value in found.items()} == wanted


def test_the_best_checkpoint_speaks_rather_than_an_earlier_one(tmp_path):
    one, other = a_run(tmp_path / "runs" / "one"), a_run(tmp_path / "runs" / "other")
    for run, value in ((one, 0.0), (other, 1.0)):
        evaluated(run, [value] * 60, family=["tuned"])
        evaluated(run, [0.0] * 60, family=["step000004"])
    assert headline(compared(one, other)).delta == 1


@pytest.mark.parametrize("numbered", [True, False])
def test_preferences_are_compared_by_their_ratios_to_the_base(runs, numbered):
    """The accuracy of each run is the preference task's own; the gain is that of the run which tells good
    from bad."""
    chance = random.Random(0)
    own: list[list[Score]] = []
    towards: list[list[float]] = []
    for run, gap in zip(runs, (0.0, 2.0), strict=True):
        items = [
            preference.AnswerRatio(
                f"{run}/data/valid.jsonl:{at // 2 if numbered else at}",
                at % 2 == 0,
                -5.0 - at,
                -5.0 - at + (gap if at % 2 == 0 else 0) + chance.gauss(0, 1),
                7.0,
                at // 2 if numbered else None,
            )
            for at in range(80)
        ]
        own.append(preference.scores(items, 0))
        towards.append([item.ratio if item.good else -item.ratio for item in items])
        folder = run / "evals" / f"preference@{preference.VERSION}"
        folder.mkdir()
        lines = [
            {
                "source": one.source,
                "units": 1.0,
                "prompt": None,
                "reference": None,
                "tuned": one.tuned,
                "base": one.base,
                "tuned_detail": {"good": one.good, "pair": one.pair, "tokens": one.tokens},
                "tuned_answer": None,
            }
            for one in items
        ]
        (folder / "examples.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        about = {
            "task": "preference",
            "version": preference.VERSION,
            "checkpoint": "000040",
            "data": "",
            "identity": "3f",
        }
        about |= {
            "family": [],
            "settings": {},
            "base": "cd",
            "n": 80,
            "scores": [asdict(score) for score in own[-1]],
        }
        (folder / "score.json").write_text(json.dumps(about))
    (one,) = [held for held in compared(*runs).sides[0].pairs if held.first.task == "preference"]
    for score, before, after in zip(one.scores, own[0], own[1], strict=False):
        assert score.name == before.name and score.value == pytest.approx(after.value)
        assert (
            score.base == pytest.approx(before.value)
            and score.verdict == "improved"
            and score.delta_low > 0.05
        )
    counts = one.scores[0].sources
    assert counts is not None and counts[0] > counts[2] and sum(counts) == 40
    for side, signed in zip(
        ("first", "second"), towards, strict=True
    ):  # of a bad answer, less likely is better
        assert sorted(getattr(pair, side) for pair in one.examples) == pytest.approx(sorted(signed))
    assert all((pair.change == "improved") is (pair.first < pair.second) for pair in one.examples)
    (back,) = [held for held in compared(*runs[::-1]).sides[0].pairs if held.first.task == "preference"]
    for score, other in zip(one.scores, back.scores, strict=True):
        assert score.delta == -other.delta and other.verdict == "regressed"


def test_a_torn_evaluation_is_an_error_with_its_line(runs):
    path = runs[1] / "evals" / f"tool_calls@{ToolCalls.version}" / "examples.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + '{"source": 1}\n' + "".join(lines[5:]))
    with pytest.raises(
        EvaluationError,
        match=r"examples\.jsonl:5: cannot be read: source: must be a valid string\n"
        "hint: measure it again: tunesmith evaluate",
    ):
        compared(*runs)
    path.write_text("".join(lines[:4]) + lines[4][:30])
    with pytest.raises(EvaluationError, match=r"examples\.jsonl:5: cannot be read: "):
        compared(*runs)
    path.write_text("".join(lines[:4]))
    with pytest.raises(EvaluationError, match="has 4 examples, and 60 were scored"):
        compared(*runs)
    (path.parent / "score.json").write_text('{"task": "tool_calls",\n"version"')
    with pytest.raises(EvaluationError, match=r"score\.json: cannot be read: .*line 2"):
        compared(*runs)


def test_more_comparisons_ask_for_more_evidence(runs, tmp_path):
    alone = headline(compared(*runs))
    third = a_run(tmp_path / "runs" / "third")
    evaluated(third, [1.0] * 12 + [0.0] * 48)
    found = compared(*runs, third)
    assert [side.run.letter for side in found.sides] == ["B", "C"] and found.tests == 2
    assert headline(found).p_corrected == pytest.approx(2 * alone.p) and alone.p_corrected == alone.p
    head = "Of 2 runs compared with A, 1 is shown to be better; "
    assert found.verdict == head + "the furthest ahead: B (other)"
    assert any(reason.text.startswith("Better at the task: ") for reason in found.reasons)
    swapped = compared(*runs, third, against=third)
    assert [run.name for run in swapped.runs] == ["third", "one", "other"]


# What differs beside the scores


def test_settings_and_facts_that_differ_are_named_with_their_origin_and_no_others(runs):
    found = compared(*runs)
    assert [(row.key, row.values, row.origins) for row in found.settings] == [
        ("optimizer.learning_rate", [1e-3, 2e-3], ["--set", "--set"])
    ]
    assert found.others == []  # the same data in another folder is the same data
    other = runs[1].parent / "elsewhere"
    a_run(
        other,
        versions={"tunesmith": "0.2.0"},
        machine={"device": "M4"},
        hashes={"data": {"x": "12" * 32}, "base": "cd" * 32},
    )
    rows = {row.key: row.values for row in compared(runs[0], other).others}
    assert rows["versions.tunesmith"] == ["0.1.0", "0.2.0"] and rows["machine.device"] == ["CPU", "M4"]
    assert rows["data"] == ["ab" * 6, "12" * 6] and "base" not in rows and "held-out rows" not in rows


def test_curves_count_tokens_and_smooth_as_the_report_does(runs):
    found = compared(*runs)
    run = found.runs[0]
    assert run.validation == [(0, 0, 2.0), (40, 800, 1.0)]
    assert run.training[0] == (1, 20, 2.0) and run.training[-1][:2] == (40, 800)
    assert run.training[-1][2] == pytest.approx(1 + (1 / 39 + 1 / 40) / 2)
    for title in (
        "Training loss by step",
        "Training loss by tokens",
        "Validation loss by step",
        "Validation loss by tokens",
    ):
        assert f"<h3>{title} <small>nats a learned token</small></h3>" in page_of(found)


def test_losses_of_other_objectives_are_not_drawn_on_one_axis(runs):
    config = yaml.safe_load((runs[1] / "config.yaml").read_text())
    (runs[1] / "config.yaml").write_text(yaml.safe_dump(config | {"objective": {"kind": "kto"}}))
    page = page_of(compared(*runs))
    assert "Training loss of sft by step" in page and "Training loss of kto by tokens" in page
    assert "Training loss by step" not in page


# What may be compared, and where it goes


def test_one_run_is_not_enough_and_a_folder_must_be_a_run(runs, tmp_path):
    for paths in ([runs[0]], [runs[0], runs[0]]):
        with pytest.raises(DataError, match="one run alone cannot be compared"):
            verbs.compare(paths, out=tmp_path / "out")
    with pytest.raises(DataError, match=r"manifest\.json is missing"):
        verbs.compare([runs[0], tmp_path], out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", [PAGE, TEXT, MACHINE])
def test_only_a_comparison_is_replaced(runs, name):
    out = compared(*runs).out
    assert sorted(path.name for path in out.iterdir()) == ["compare.html", "compare.json", "compare.md"]
    first = (out / PAGE).read_bytes()
    assert (compared(*runs).out / PAGE).read_bytes() == first
    (out / name).write_text("my own")
    with pytest.raises(ConfigError, match="so it is not replaced") as caught:
        compared(*runs)
    assert (
        str(out / name) in str(caught.value)
        and "--out" in str(caught.value)
        and (out / name).read_text() == "my own"
    )
    with pytest.raises(ConfigError, match="is not a folder"):
        verbs.compare(runs, out=out / name)


def test_the_json_has_all_of_it(runs):
    found = compared(*runs)
    told = json.loads((found.out / MACHINE).read_text(encoding="utf-8"))
    assert told == found.to_json() and told["verdict"] == found.verdict
    assert [reason["code"] for reason in told["reasons"]] == [reason.code for reason in found.reasons]
    (side,) = told["against"]
    (tool,) = side["compared"]
    assert tool["changes"] == {"improved": 30, "unchanged": 27, "regressed": 3} and len(tool["prompts"]) == 60
    assert tool["scores"][0]["against"] == pytest.approx(10 / 60) and told["runs"][1]["letter"] == "B"


# The page


def page_of(found: RunComparison) -> str:
    return (found.out / PAGE).read_text(encoding="utf-8")


@pytest.fixture
def hostile(tmp_path) -> RunComparison:
    """A comparison with a hostile text wherever one can be."""
    one = a_run(tmp_path / "runs" / "<img src=x onerror=alert(1)>")
    other = a_run(tmp_path / "runs" / "`| b_*", versions={HOSTILE: HOSTILE})
    for run, values in ((one, [0.0] * 30), (other, [1.0] * 25 + [0.0] * 5)):
        evaluated(run, values, text=HOSTILE)
        evaluated(run, values, text=HOSTILE, name="of a", version="<i>")
    evaluated(other, [1.0], name="<script>", text=HOSTILE)
    config = yaml.safe_load((other / "config.yaml").read_text())
    (other / "config.yaml").write_text(yaml.safe_dump(config | {"<b>key": HOSTILE.replace("\ud800", "")}))
    return compared(one, other)


def test_no_text_is_more_than_text(hostile):
    page = page_of(hostile)
    for markup in ("<img src=x", "<b>b", "<i>", '<script>"', "</script><img"):
        assert markup not in page, markup
    assert page.count("<script") == 2 and "\x1b" not in page and "\u202e" not in page
    text = (hostile.out / TEXT).read_text(encoding="utf-8")
    outside = [line for line in unfenced(text) if "<" in line and not line.startswith("<!--")]
    assert outside == [] and "\x1b" not in text


def unfenced(text: str) -> Iterator[str]:
    fence = ""
    for line in text.splitlines():
        ticks = line[: len(line) - len(line.lstrip("`"))]
        if not fence and len(ticks) >= 3:
            fence = ticks
        elif fence and line == fence:
            fence = ""
        elif not fence:
            yield line


def test_the_page_asks_for_nothing_complains_of_nothing_and_fits_every_width(browser, hostile):
    asked: list[str] = []
    told: list[str] = []
    tab = browser.new_page(viewport={"width": 1280, "height": 900})
    tab.set_default_timeout(120_000)
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("console", lambda message: told.append(message.text))
    tab.on("pageerror", lambda error: told.append(str(error)))
    tab.on("dialog", lambda dialog: told.append(dialog.message))
    tab.goto(page := (hostile.out / PAGE).as_uri())
    tab.eval_on_selector_all("details", "all => all.forEach(one => { one.open = true; })")
    assert tab.evaluate("window.hacked") is None and tab.locator("h1").inner_text().startswith("✓ B (")
    assert tab.locator("svg.plot").count() == 4 and tab.locator(".sides").count() == 40 + 10
    for width in (1280, 700, 360):
        tab.set_viewport_size({"width": width, "height": 900})
        assert tab.evaluate("document.documentElement.scrollWidth") <= width, width
    assert asked == [page] and told == []
