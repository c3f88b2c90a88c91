"""Benchmarks: the harness's questions and metrics, our model's numbers, local files, and nothing left
behind."""

from __future__ import annotations

import functools
import json
import logging
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
import typer.main
from mlx.utils import tree_map

import tiny
from processes import TWO_RANKS
from tunesmith.cli import app
from tunesmith.engine import generation
from tunesmith.errors import DataError, EvaluationError, SetupError
from tunesmith.evaluation.harness import catalogue
from tunesmith.evaluation.harness.requests import (
    HarnessRequest,
    _families,
    _passes,
    continuations,
    language_model,
    likelihoods,
    longest,
)
from tunesmith.evaluation.statistics import summarise
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.tasks import EvaluationSpec, Material, benchmarks
from tunesmith.events import Notice, Working
from tunesmith.model import loading as model
from tunesmith.tokens import renderers, template
from tunesmith.tokens.batches import BatchSpec

pytest.importorskip("lm_eval", reason="the extra benchmarks is absent")

QUESTIONS = [
    f"{word} and the {other}?" for word in ("cat", "mat", "note") for other in ("timer", "file", "music")
]


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return model.load(model.ModelSpec(path=str(tiny_model))).net, renderers.load(tiny_model)


@pytest.fixture
def subject(loaded):
    return Subject(*loaded, "base", BatchSpec(), 4)


@functools.cache
def renderer() -> template.Renderer:
    with tempfile.TemporaryDirectory() as folder:
        tiny.write_tokenizer(Path(folder))
        (Path(folder) / "config.json").write_text('{"model_type": "llama"}')
        return renderers.load(folder)


def material(folder: Path | None, *names: str, notify=lambda event: None, **settings) -> Material:
    spec = EvaluationSpec(
        benchmarks=names, benchmark_data=None if folder is None else str(folder), **settings
    )
    return Material(
        everything=[],
        imitated=[],
        rows=[],
        renderer=renderer(),
        template=template.TemplateSpec(),
        batch=BatchSpec(),
        spec=spec,
        notify=notify,
    )


def write(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    tiny.write_rows(path, rows)


def choices(count: int, seed: int) -> list[list[str]]:
    random, words = np.random.default_rng(seed), tiny.WORDS.split()
    return [[" ".join(random.choice(words, random.integers(1, 4))) for _ in range(4)] for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("benchmarks")
    for at, subject in enumerate(("anatomy", "philosophy", "marketing")):
        for split, count in (("dev", 5), ("test", 6)):
            rows = zip(QUESTIONS, choices(count, at), strict=False)
            write(
                folder / "mmlu" / subject / f"{split}.jsonl",
                [
                    {"question": q, "subject": subject, "choices": c, "answer": (i + at) % 4}
                    for i, (q, c) in enumerate(rows)
                ],
            )
    endings = zip(QUESTIONS, choices(7, 9), strict=False)
    write(
        folder / "hellaswag_validation_7.jsonl",
        [
            {
                "ind": i,
                "activity_label": "Reading",
                "ctx_a": "A cat sat.",
                "ctx_b": "the cat",
                "ctx": q,
                "endings": c,
                "label": str(i % 4),
            }
            for i, (q, c) in enumerate(endings)
        ],
    )
    sums = [{"question": f"{q} {i}", "answer": f"so {i}\n#### {i}"} for i, q in enumerate(QUESTIONS)]
    write(folder / "gsm8k_test.jsonl", sums[:4])
    write(folder / "gsm8k_train.jsonl", sums[4:])
    return folder


def naive(net, request: HarnessRequest) -> tuple[float, bool]:
    """One request alone, all logits, float64."""
    ids = request.context + request.said
    logits = np.array(net(mx.array([ids[:-1]]))[0], np.float64)[len(request.context) - 1 :]
    logps = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    rows = np.arange(len(request.said))
    return float(logps[rows, request.said].sum()), bool((logits.argmax(-1) == request.said).all())


def some_requests(net, seed: int) -> list[HarnessRequest]:
    """Few-shot choices of one token, endings of several, doubles, a greedy continuation, and one alone."""
    random = np.random.default_rng(seed)

    def ids(count: int) -> tuple[int, ...]:
        return tuple(int(one) for one in random.integers(3, 300, count))

    shots, found = ids(150), []
    for _ in range(3):
        context = shots + ids(int(random.integers(5, 40)))
        found += [HarnessRequest(context, ids(1)) for _ in range(4)]
        found += [HarnessRequest(context, ids(int(random.integers(1, 6)))) for _ in range(3)]
        found += [found[-1], HarnessRequest(context, found[-1].said[:1]), HarnessRequest(context, ())]
        likeliest = int(net(mx.array([context]))[0, -1].argmax())
        found.append(HarnessRequest(context, (likeliest,)))
    return [*found, HarnessRequest((5,), ids(3)), HarnessRequest(ids(1), ids(1))]


@pytest.mark.parametrize("batch", [BatchSpec(), BatchSpec(tokens=32, micro=1), BatchSpec(tokens=2000)])
def test_likelihoods_are_those_of_each_request_alone_however_they_are_cut_and_shared(loaded, batch):
    net, _ = loaded
    asked = some_requests(net, 0)
    kept = [kept for kept, members in _families(_passes(asked)) if len(members) > 1]
    assert kept and min(kept) >= 150  # the solved examples are computed once
    expected = [naive(net, one) for one in asked]
    assert {greedy for _, greedy in expected} == {True, False}
    for order in (range(len(asked)), range(len(asked))[::-1]):
        found = likelihoods(net, [asked[at] for at in order], batch)
        assert [one.greedy for one in found] == [expected[at][1] for at in order]
        np.testing.assert_allclose([one.logp for one in found], [expected[at][0] for at in order], atol=1e-4)


def test_every_request_is_in_one_pass_and_sharing_never_computes_more(loaded):
    asked = some_requests(loaded[0], 1)
    passes = _passes(asked)
    assert sorted(index for one in passes for index in one.requests) == list(range(len(asked)))
    for one in passes:
        assert all(
            (asked[index].context + asked[index].said)[: len(one.ids)][: len(asked[index].context)]
            == one.ids[: len(asked[index].context)]
            for index in one.requests
        )
    assert len(passes) <= 3 * 5 + 2  # four choices of one token are one pass
    families = _families(passes)
    assert [member for _, members in families for member in members] == list(range(len(passes)))
    assert all(kept <= passes[member].first for kept, members in families for member in members)
    tokens = sum(
        kept + sum(len(passes[member].ids) - kept for member in members) for kept, members in families
    )
    assert tokens < sum(len(one.ids) for one in passes)


def test_text_is_what_the_model_says_up_to_the_first_stop_string(subject):
    prompts = [subject.renderer.text_prompt(text) for text in QUESTIONS]
    ids = generation.generate(subject.net, prompts, max_tokens=24, eos_ids=subject.renderer.eos_ids)
    whole = [
        subject.renderer.decode([token for token in one.ids if token not in subject.renderer.control_ids])
        for one in ids
    ]
    until = [[text[len(text) // 2 :][:2], text[-1:]] if at % 3 else [] for at, text in enumerate(whole)]
    ends = [
        min([text.find(stop) for stop in stops if stop in text], default=len(text))
        for text, stops in zip(whole, until, strict=True)
    ]
    assert 0 < sum(end < len(text) for end, text in zip(ends, whole, strict=True)) < len(whole)
    said = continuations(subject, prompts, until, [24] * len(prompts), "text")
    assert said == [text[:end] for text, end in zip(whole, ends, strict=True)]


def test_an_answer_ends_at_its_stop_string_and_not_at_its_limit(subject):
    prompt = subject.renderer.text_prompt(QUESTIONS[0])
    first = generation.generate(subject.net, [prompt], max_tokens=6, eos_ids=subject.renderer.eos_ids)[0].ids
    stop = subject.renderer.decode(first)[-1:]
    seen: list[int] = []
    whole = type(subject.renderer).decode

    class Counting(type(subject.renderer)):
        def decode(self, ids):
            seen.append(len(ids))
            return whole(self, ids)

    renderer = object.__new__(Counting)
    renderer.__dict__ = subject.renderer.__dict__
    counting = Subject(subject.net, renderer, "base", BatchSpec(), 4)
    continuations(counting, [prompt], [[stop]], [5000], "text")
    assert len(seen) < 20


def test_scores_are_the_harness_own_for_our_model(subject, folder):
    from lm_eval.evaluator import evaluate

    names = ("mmlu", "hellaswag", "gsm8k")
    tasks = benchmarks.build(material(folder, *names, shots=0, limit=3))
    assert [task.name for task in tasks] == [f"benchmark.{name}" for name in names]
    for task in tasks:
        scores = task.score(task.measure(subject))
        theirs = evaluate(
            language_model(subject, "oracle"),
            {"tasks": {part.task.task_name: part.task for part in task._parts}},
            limit=3,
            bootstrap_iters=0,
        )
        samples = [one for name in theirs["samples"] for one in theirs["samples"][name]]
        keys = {statistic.name: statistic.name.partition(", ") for statistic in task.statistics}
        for key, (metric, _, filter) in keys.items():
            theirs_now = [float(one[metric]) for one in samples if one["filter"] == (filter or "none")]
            assert [one.detail[key] for one in scores] == theirs_now
        assert (
            len(scores)
            == len({one.source for one in scores})
            == len({(one["doc_hash"], one["prompt_hash"]) for one in samples})
        )


def test_a_document_can_be_read_side_by_side_and_a_right_answer_is_its_reference(subject, folder):
    task = benchmarks.build(material(folder, "hellaswag"))[0]
    scores = task.score(task.measure(subject))
    assert scores[0].prompt == "Reading: A cat sat. The cat"
    rows = [json.loads(line) for line in (folder / "hellaswag_validation_7.jsonl").read_text().splitlines()]
    assert [one.reference for one in scores] == [row["endings"][int(row["label"])] for row in rows]
    assert [one.answer == one.reference for one in scores] == [one.value == 1.0 for one in scores]
    assert {one.value for one in scores} == {0.0, 1.0}
    assert [statistic.name for statistic in task.statistics if statistic.headline] == ["acc_norm"]


def test_solved_examples_stand_before_the_question_and_never_the_question_itself(folder):
    task = benchmarks.build(material(folder, "mmlu:anatomy", "gsm8k", shots=3))
    assert [one.name for one in task] == ["benchmark.mmlu_anatomy", "benchmark.gsm8k"]
    for one in task:
        for asked in one._parts[0].documents:
            prompt = asked.requests[0].args[0]
            assert prompt.endswith(asked.prompt) and prompt.count("Answer:") == 4
    dev = [json.loads(line) for line in (folder / "mmlu/anatomy/dev.jsonl").read_text().splitlines()]
    assert f"D. {dev[0]['choices'][3]}\nAnswer: A\n\n" in task[0]._parts[0].documents[0].requests[0].args[0]


def test_identity_is_that_of_documents_shots_and_limit(folder, tmp_path):
    def identity(folder=folder, **settings):
        return benchmarks.build(material(folder, "mmlu:anatomy", **settings))[0].identity

    rows = [json.loads(line) for line in (folder / "mmlu/anatomy/test.jsonl").read_text().splitlines()]
    write(tmp_path / "mmlu/anatomy/test.jsonl", rows)
    assert identity() == identity() == identity(tmp_path)
    rows[-1]["answer"] = (rows[-1]["answer"] + 1) % 4
    write(tmp_path / "mmlu/anatomy/test.jsonl", rows)
    assert len({identity(), identity(shots=2), identity(limit=5), identity(tmp_path)}) == 4


def test_a_group_is_shown_by_category_and_subject_and_says_what_is_not_there(subject, folder):
    events: list = []
    task = benchmarks.build(material(folder, "mmlu", limit=4, notify=events.append))[0]
    assert task.parts == ("category", "subject")
    notices = {one.what.split(":")[1][:20]: one for one in events if isinstance(one, Notice)}
    assert notices[" no file for abstrac"].count == 54 and notices[" only the first 4 do"].count == 6
    assert any(isinstance(one, Working) for one in events)
    scores = task.score(task.measure(subject))
    found = {one.part: one for one in summarise(task, scores, scores, 0)}
    assert {part for part in found if part} == {
        "category=humanities",
        "category=other",
        "category=stem",
        "subject=anatomy",
        "subject=philosophy",
        "subject=marketing",
    }
    assert found[None].n == 12 and found[None].delta == 0 and found["subject=anatomy"].n == 4
    stem = benchmarks.build(material(folder, "mmlu:stem"))[0]
    assert (stem.name, len(stem._parts)) == ("benchmark.mmlu_stem", 1)


@pytest.mark.parametrize(
    ("names", "settings", "said"),
    [
        (["hellasweg"], {}, "did you mean hellaswag"),
        (["mmlu:anatomi"], {}, "did you mean anatomy"),
        (["mmlu:astronomy"], {}, "mmlu_astronomy_test.jsonl, mmlu/astronomy/test.jsonl"),
        (["hellaswag"], {"shots": 1}, "hellaswag_train.jsonl"),
        (["mmlu:anatomy"], {"shots": 6}, "exceeds the 5"),
        (["humaneval"], {}, "humaneval_test.jsonl"),
        (["mbpp"], {}, "runs code"),
    ],
)
def test_what_cannot_be_asked_is_told_with_the_name_of_what_is_missing(folder, names, settings, said):
    with pytest.raises(EvaluationError) as error:
        benchmarks.build(material(folder, *names, **settings))
    assert said in str(error.value) and error.value.hint


def test_files_that_are_not_as_the_hub_has_them(tmp_path):
    write(tmp_path / "piqa_validation.jsonl", [{"goal": "open a file", "label": 0}])
    with pytest.raises(EvaluationError, match="not as the hub's"):
        benchmarks.build(material(tmp_path, "piqa"))
    (tmp_path / "piqa_validation.jsonl").write_text(
        '{"goal": "a", "sol1": "b", "sol2": "c", "label": 0}\n[1]\n'
    )
    with pytest.raises(DataError, match=r"piqa_validation.jsonl:2: is not a JSON object"):
        benchmarks.build(material(tmp_path, "piqa"))
    (tmp_path / "piqa_validation.jsonl").rename(tmp_path / "piqa_validation_10.jsonl")
    write(tmp_path / "piqa_validation_20.jsonl", [])
    with pytest.raises(EvaluationError, match="more than one file"):
        benchmarks.build(material(tmp_path, "piqa"))
    with pytest.raises(EvaluationError, match="is not a folder"):
        benchmarks.build(material(tmp_path / "nowhere", "piqa"))


def test_a_document_with_a_control_token_is_left_out_before_the_model_is_asked(subject, folder, tmp_path):
    rows = [json.loads(line) for line in (folder / "hellaswag_validation_7.jsonl").read_text().splitlines()]
    rows[1]["ctx_b"] += " <|im_end|>"
    rows[4]["endings"][2] = "<|im_start|>"
    write(tmp_path / "hellaswag_validation.jsonl", rows)
    told: list = []
    (task,) = benchmarks.build(material(tmp_path, "hellaswag", notify=told.append))
    left = [one for one in told if isinstance(one, Notice) and "documents are left out" in one.what]
    assert sum(one.count for one in left) == 2 and {one.level for one in left} == {"warning"}
    scores = task.score(task.measure(subject))
    assert [one.source for one in scores] == [f"hellaswag/{at}" for at in (0, 2, 3, 5, 6)]


def test_a_likelihood_that_is_no_number_is_an_error_and_no_choice(subject, folder, tiny_model):
    net = model.load(model.ModelSpec(path=str(tiny_model))).net
    net.update(tree_map(lambda weight: weight * mx.nan, net.parameters()))
    (task,) = benchmarks.build(material(folder, "hellaswag", limit=2))
    with pytest.raises(EvaluationError, match=r"8 of 8 values are not finite\n.*hellaswag/0: nan"):
        task.measure(Subject(net, subject.renderer, "tuned"))


def test_hints_name_options_of_the_command():
    code = "".join(
        (Path(benchmarks.__file__).parents[1] / name).read_text("utf-8")
        for name in (
            "tasks/benchmarks.py",
            "harness/catalogue.py",
            "tasks/drift.py",
            "suites/__init__.py",
            "tasks/programs.py",
        )
    )
    assert "evaluation." not in code.replace("tunesmith.evaluation.", "")
    command = typer.main.get_command(app).commands["evaluate"]
    named = set(re.findall(r"[\"' ](--[a-z-]+[a-z])", code))
    assert {"--benchmark", "--benchmark-data", "--shots", "--limit"} <= named
    assert named <= {option for one in command.params for option in one.opts}


def test_two_ranks_say_what_one_does(subject, folder, tiny_model):
    code = f"""
import sys
sys.path.insert(0, "tests")
from evaluation.tasks.test_benchmarks import benchmarks, material, model, renderers, BatchSpec, Path, Subject
from tunesmith.machine import ranks
tasks = benchmarks.build(material(Path({str(folder)!r}), "mmlu:anatomy", "gsm8k", shots=0, limit=3))
among = ranks.join()
net = model.load(model.ModelSpec(path={str(tiny_model)!r})).net
subject = Subject(net, renderers.load({str(tiny_model)!r}), "base", BatchSpec(), 4, ranks=among)
found = [task.measure(subject) for task in tasks]
Path(sys.argv[1] + str(among.rank)).write_text(repr(found))
"""
    (folder / "ranks").mkdir()
    launch = [*TWO_RANKS, sys.executable, "-c", code]
    done = subprocess.run(
        [*launch, str(folder / "ranks/of")],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        timeout=300,
        env={**os.environ, "PYTHONPATH": "src"},
    )
    assert done.returncode == 0, done.stderr
    first, second = (eval((folder / f"ranks/of{rank}").read_text()) for rank in (0, 1))
    tasks = benchmarks.build(material(folder, "mmlu:anatomy", "gsm8k", shots=0, limit=3))
    (choices, texts), found = (task.measure(subject) for task in tasks), first
    assert first == second and found[1] == texts and any(text for (text,) in texts)
    for one, other in zip(found[0], choices, strict=True):
        assert [greedy for _, greedy in one] == [greedy for _, greedy in other]
        np.testing.assert_allclose([logp for logp, _ in one], [logp for logp, _ in other], atol=1e-4)


def test_without_the_harness_the_hint_is_the_extra(folder, monkeypatch):
    import importlib.metadata as metadata

    installed = metadata.version

    def without(found: str | None):
        def version(name: str) -> str:
            if name in {"lm-eval", "lm_eval"} and found is None:
                raise PackageNotFoundError(name)
            return found if found and name in {"lm-eval", "lm_eval"} else installed(name)

        return version

    monkeypatch.setattr(metadata, "version", without(None))
    project = tomllib.loads(Path(__file__).parents[3].joinpath("pyproject.toml").read_text())["project"]
    (needed,) = project["optional-dependencies"]["benchmarks"]
    with pytest.raises(SetupError, match=re.escape(f"pip install '{needed}'")):
        benchmarks.build(material(folder, "hellaswag"))
    monkeypatch.setattr(metadata, "version", without("0.4.2"))
    with pytest.raises(SetupError, match=r"0\.4\.2 is installed"):
        benchmarks.build(material(folder, "hellaswag"))


def test_no_name_no_task(folder):
    told: list = []
    assert benchmarks.build(material(folder, notify=told.append)) == []
    assert "none is named" in told[0].what


def test_the_hub_offline_is_an_error_with_a_way_out():
    with pytest.raises(EvaluationError, match="could not be fetched from the hub") as error:
        benchmarks.build(material(None, "hellaswag"))
    assert "--benchmark-data" in str(error.value.hint)


def test_nothing_is_left_behind_and_nothing_is_printed(subject, folder, capfd):
    import datasets

    logger = logging.getLogger("lm_eval")
    before = dict(os.environ), list(logger.handlers), logger.propagate, datasets.are_progress_bars_disabled()
    training = subject.net.training
    told: list = []
    subject.notify = told.append
    task = benchmarks.build(material(folder, "hellaswag", "gsm8k", limit=2, notify=told.append))
    for one in task:
        one.score(one.measure(subject))
    after = dict(os.environ), list(logger.handlers), logger.propagate, datasets.are_progress_bars_disabled()
    assert before == after and subject.net.training == training
    assert capfd.readouterr() == ("", "")
    working = [one for one in told if isinstance(one, Working) and "benchmark.gsm8k" in one.label]
    assert working[-1].done == working[-1].total == 2


def test_what_the_harness_warns_of_is_a_notice_with_a_count():
    told: list = []
    with catalogue.warnings_as_notices(told.append):
        logging.getLogger("lm_eval.api.task").warning("odd")
        logging.getLogger("lm_eval.api.task").warning("odd")
    assert [(one.what, one.count, one.level) for one in told] == [("lm-eval: odd", 2, "warning")]


@pytest.mark.parity  # torch is only hidden where it is
def test_torch_is_not_needed(folder, tiny_model):
    code = f"""
import importlib.machinery as machinery, sys
found = machinery.PathFinder.find_spec
hide = lambda cls, name, *rest: None if name.partition(".")[0] == "torch" else found(name, *rest)
machinery.PathFinder.find_spec = classmethod(hide)
sys.path.insert(0, "tests")
from evaluation.tasks.test_benchmarks import benchmarks, material, model, renderers, BatchSpec, Path, Subject
(task,) = benchmarks.build(material(Path({str(folder)!r}), "mmlu:anatomy"))
net = model.load(model.ModelSpec(path={str(tiny_model)!r})).net
subject = Subject(net, renderers.load({str(tiny_model)!r}), "base", BatchSpec(), 4)
print(len(task.score(task.measure(subject))))
assert "torch" not in sys.modules and "lm_eval.api.model" in sys.modules
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": "src"},
    )
    assert (done.returncode, done.stdout) == (0, "6\n"), done.stderr


def test_ifeval_is_scored_by_our_own_checks(subject, tmp_path):
    asked = {
        "key": 1,
        "prompt": "Write all in lower case, without commas.",
        "instruction_id_list": ["punctuation:no_comma", "startend:end_checker"],
        "kwargs": [{}, {"end_phrase": "the end"}],
    }
    odd = {"key": 2, "prompt": "?", "instruction_id_list": ["no:such"], "kwargs": [{}]}
    write(tmp_path / "ifeval_train.jsonl", [asked, odd])
    told: list = []
    task = benchmarks.build(material(tmp_path, "ifeval", notify=told.append))[0]
    assert [one.count for one in told if isinstance(one, Notice) and "not asked" in one.what] == [1]

    def score(text: str) -> list[float]:
        (one,) = task.score([(text,)])
        return [float(one.detail[level]) for level in catalogue.LEVELS]

    assert score("a cat sat\nthe end") == [1, 1, 1, 1]
    assert score("a cat, sat\nthe end") == [0, 0.5, 1, 1]  # loosely: without its first line
    assert score("a, cat\nthe end, bye") == [0, 0, 0, 0]
    assert task.statistics[0].headline and task.statistics[0].name == "prompt_level_strict_acc"


def test_all_that_is_longer_than_the_model_reads_is_cut_and_told(subject, monkeypatch):
    assert longest(subject.net) == 4096
    monkeypatch.setattr(subject.net.args, "max_position_embeddings", room := 64)
    told: list = []
    subject.notify = told.append
    lm = language_model(subject, "long")
    context, said = tuple(range(3, 300)) * 20, (7, 8)
    ((logp, _),) = lm._loglikelihood_tokens([(("", ""), list(context), list(said))])
    expected, _ = naive(subject.net, HarnessRequest(context[-(room - 1) :], said))
    assert logp == pytest.approx(expected, abs=1e-3)
    assert any(
        isinstance(one, Notice) and "cut at the beginning" in one.what and one.count == 1 for one in told
    )


def test_rolling_likelihood_is_that_of_all_its_tokens(subject):
    from lm_eval.api.instance import Instance

    text = " ".join(QUESTIONS)
    ids = tuple(subject.renderer.text_prompt(text))
    (found,) = language_model(subject, "text").loglikelihood_rolling(
        [Instance("loglikelihood_rolling", {}, (text,), 0)]
    )
    assert found == pytest.approx(
        naive(subject.net, HarnessRequest((subject.renderer.eos_ids[-1],), ids))[0], abs=1e-3
    )


def test_the_real_files_are_found_and_can_be_asked(data_dir):
    folder = data_dir("benchmarks")
    names = (
        "hellaswag",
        "arc_easy",
        "arc_challenge",
        "winogrande",
        "piqa",
        "truthfulqa",
        "ifeval",
        "bbh:navigate",
        "gsm8k",
    )
    tasks = benchmarks.build(material(folder, *names, limit=3))
    assert all(len(part.documents) == 3 for task in tasks for part in task._parts)
    assert {task.name: sum(len(part.task.task_docs) for part in task._parts) for task in tasks} == {
        "benchmark.hellaswag": 2000,
        "benchmark.arc_easy": 2376,
        "benchmark.arc_challenge": 1172,
        "benchmark.winogrande": 1267,
        "benchmark.piqa": 1838,
        "benchmark.truthfulqa_mc1": 817,
        "benchmark.truthfulqa_mc2": 817,
        "benchmark.ifeval": 541,
        "benchmark.bbh_cot_fewshot_navigate": 250,
        "benchmark.gsm8k": 1319,
    }
