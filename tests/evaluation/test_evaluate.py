"""Before against after: what must not matter does not, nothing is measured twice, and nothing unlike is held
together."""

from __future__ import annotations

import json
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

import tiny
import tunesmith
from processes import TUNESMITH, TWO_RANKS, cache_folder
from tunesmith import errors, events
from tunesmith.engine import generation, scoring
from tunesmith.evaluation import evaluate as evaluation
from tunesmith.evaluation import pairing as paired
from tunesmith.evaluation.tasks import EvaluationSpec
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run

ROWS_ONLY = ("perplexity", "adherence", "tool_calls", "preference")


def rows(count: int) -> list[dict]:
    """Every other row ends in a call, every third is labelled undesirable."""
    made = []
    for index, row in enumerate(tiny.conversations(count)):
        turns = row["conversations"][:2]
        if index % 2:
            turns[1]["content"] = f'tool_call: note_{index % 4}\narguments: {{"text": "{index}"}}'
        made.append({"conversations": turns, "label": index % 3 != 0})
    return made


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("evaluated")
    data = tiny.write_rows(folder / "rows.jsonl", rows(40))
    sets = [
        "loop.steps=4",
        "loop.save_every=2",
        "batch.sequences=4",
        "loop.samples=0",
        "adapter.rank=4",
        "optimizer.learning_rate=0.02",
        "data.valid=0.5",
    ]
    settings = tunesmith.configure(model=str(tiny_model), data=[str(data)], sets=sets)
    run = tunesmith.train(settings, out=folder / "run")
    assert run is not None
    return run.path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TUNESMITH_CACHE", str(cache_folder(tmp_path / "cache")))
    return tmp_path / "cache"


@pytest.fixture
def run(trained, tmp_path) -> Path:
    shutil.copytree(trained, tmp_path / "run", ignore=shutil.ignore_patterns("evals"))
    return tmp_path / "run"


def measured(
    run: Path,
    *,
    tasks=ROWS_ONLY,
    data=(),
    base=True,
    fresh=False,
    notify=events.silent,
    checkpoint="best",
    model=None,
    **options,
):
    found = evaluation.evaluate(
        Run.open(run),
        tasks=tasks,
        data=data,
        base=base,
        fresh=fresh,
        notify=notify,
        checkpoint=checkpoint,
        model=model,
        spec=EvaluationSpec(**{"max_tokens": 12} | options),
    )
    assert found is not None
    return found


def examples(run: Path) -> dict[str, list[dict]]:
    return {
        path.parent.name: [json.loads(line) for line in path.read_text().splitlines()]
        for path in sorted(run.glob("evals/*/examples.jsonl"))
    }


def numbers(found: evaluation.Evaluation) -> dict:
    return {(one.task, one.name, one.part): (one.value, one.base, one.n, one.verdict) for one in found.scores}


def assert_alike(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for key, (value, base, n, _) in one.items():
        assert other[key][2] == n, key
        assert other[key][0] == pytest.approx(value, rel=1e-4, abs=1e-6), key
        assert other[key][1] == (None if base is None else pytest.approx(base, rel=1e-4, abs=1e-6)), key


def test_the_size_of_a_batch_changes_no_score(run):
    large = numbers(measured(run))
    assert len({task for task, _, _ in large}) == 4
    assert_alike(large, numbers(measured(run, batch_size=1, fresh=True)))


def test_the_order_of_rows_changes_no_score(run, tmp_path):
    lines = (run / "data" / "valid.jsonl").read_text().splitlines()
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, order in zip(files, (lines, lines[::-1]), strict=True):
        path.write_text("\n".join(order) + "\n")
    one, other = (numbers(measured(run, data=[str(path)])) for path in files)
    assert_alike(one, other)
    by_prompt = [
        {row["prompt"]: (row["tuned"], row["base"]) for row in of}
        for name, of in examples(run).items()
        if name.startswith("tool_calls@")
    ]
    assert len(by_prompt) == 2 and len(by_prompt[0]) > 5
    assert by_prompt[0] == by_prompt[1]


def test_ranks_change_no_score(run, tmp_path):
    alone = numbers(measured(run))
    shutil.rmtree(run / "evals")
    shutil.rmtree(tmp_path / "cache" / "evaluations")
    words = [*TUNESMITH, "evaluate", str(run), "--max-tokens", "12"]
    words += [word for task in ROWS_ONLY for word in ("--task", task)]

    def together() -> dict:
        done = subprocess.run([*TWO_RANKS, *words, "--json"], capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
        assert len(lines) == 1, "only the first rank speaks"
        found = json.loads(lines[0])["scores"]
        return {
            (one["task"], one["name"], one["part"]): (one["value"], one["base"], one["n"], one["verdict"])
            for one in found
        }

    whole = together()
    assert_alike(alone, whole)
    shutil.rmtree(run / "evals")
    for path in sorted((tmp_path / "cache" / "evaluations").iterdir())[::2]:
        path.unlink()
    assert together() == whole, "what the first rank knows, all know"


def test_nothing_is_measured_twice_but_on_request(run, monkeypatch):
    first = numbers(measured(run))
    asked: list[int] = []
    speak = generation.generate

    def counted(net, prompts, **options):
        asked.append(len(prompts))
        return speak(net, prompts, **options)

    monkeypatch.setattr(generation, "generate", counted)
    heard: list[events.Event] = []
    assert numbers(measured(run, notify=heard.append)) == first and asked == []
    assert sum("is cached" in one.what for one in heard if isinstance(one, events.Notice)) == 8
    assert numbers(measured(run, fresh=True)) == first and sum(asked) > 0
    asked.clear()
    measured(run, max_tokens=11)
    assert sum(asked) > 0, "another length is another question"


def test_tasks_that_ask_the_same_share_the_answer(run, monkeypatch):
    scored: list[int] = []
    sums = scoring.sequence_sums
    monkeypatch.setattr(
        scoring,
        "sequence_sums",
        lambda net, groups, *rest: scored.append(len(groups)) or sums(net, groups, *rest),
    )
    asked: list[int] = []
    speak = generation.generate
    monkeypatch.setattr(
        generation,
        "generate",
        lambda net, ids, **options: asked.append(len(ids)) or speak(net, ids, **options),
    )
    found = measured(run)
    assert {one.task for one in found.scores} == set(ROWS_ONLY)
    rows = len((run / "data" / "valid.jsonl").read_text().splitlines())
    assert sum(scored) <= 2 * rows, "perplexity and preference score each row once a side"
    assert sum(asked) <= 2 * rows, "adherence and tool_calls have one answer to each prompt"


def test_a_torn_file_of_what_is_known_is_measured_again(run, cache):
    first = numbers(measured(run))
    kept = sorted((cache / "evaluations").iterdir())
    assert len(kept) == 8
    for path in kept:
        path.write_text(path.read_text()[:-20])
    assert numbers(measured(run)) == first


def test_a_damaged_evaluation_of_the_run_is_told(run):
    first = numbers(measured(run, tasks=("perplexity",)))
    damaged = run / "evals" / "preference@1" / "score.json"
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_text("{")
    heard: list[events.Event] = []
    assert numbers(measured(run, tasks=("perplexity",), notify=heard.append)).keys() == first.keys()
    notices = [event.what for event in heard if isinstance(event, events.Notice)]
    assert sum("left out of the correction" in what and str(damaged) in what for what in notices) == 1


def test_a_stopped_evaluation_goes_on(run, monkeypatch):
    whole = numbers(measured(run))
    shutil.rmtree(run / "evals")
    evaluation_of = evaluation.CachedMeasure.__call__

    def stopping(self, task, side):
        if side == "tuned" and task.name == "tool_calls":
            raise KeyboardInterrupt
        return evaluation_of(self, task, side)

    monkeypatch.setenv("TUNESMITH_CACHE", str(run / "other-cache"))
    with monkeypatch.context() as patch:
        patch.setattr(evaluation.CachedMeasure, "__call__", stopping)
        with pytest.raises(KeyboardInterrupt):
            measured(run)
    assert "perplexity" in " ".join(examples(run)), "what was done is written"
    heard: list[events.Event] = []
    assert numbers(measured(run, notify=heard.append)) == whole
    known = [one.what for one in heard if isinstance(one, events.Notice) and "is cached" in one.what]
    assert len(known) == 6, "four bases, and the tuned sides that were done"


def test_another_adapter_is_another_measurement(run, tiny_model, tmp_path, cache):
    measured(run)
    checkpoint = checkpoints.choose(Run.open(run))
    known = len(list((cache / "evaluations").iterdir()))
    other = tmp_path / "other"
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows(40))
    sets = ["loop.steps=2", "batch.sequences=4", "loop.samples=0", "adapter.rank=4", "data.valid=0.5"]
    tunesmith.train(tunesmith.configure(model=str(tiny_model), data=[str(data)], sets=sets), out=other)
    assert checkpoint != checkpoints.choose(Run.open(other))
    measured(other)
    assert len(list((cache / "evaluations").iterdir())) == known + 4, (
        "the base is known, four tuned sides are not"
    )


@pytest.mark.parametrize("other", ["model.quantize=4", "model.dtype=float16"])
def test_a_base_that_is_held_otherwise_is_another_base(run, tiny_model, tmp_path, cache, other):
    measured(run, tasks=["perplexity"])
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows(40))
    sets = ["loop.steps=1", "batch.sequences=4", "loop.samples=0", "adapter.rank=4", "data.valid=0.5", other]
    tunesmith.train(
        tunesmith.configure(model=str(tiny_model), data=[str(data)], sets=sets), out=tmp_path / "other"
    )
    measured(tmp_path / "other", tasks=["perplexity"])
    assert len(list((cache / "evaluations").iterdir())) == 4


def test_the_shape_of_the_adapter_is_part_of_it(run, cache):
    measured(run, tasks=["perplexity"])
    folder = Run.open(run).checkpoint(4)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["tunesmith"]["adapter"]["alpha"] *= 2
    (folder / "adapter_config.json").write_text(json.dumps(config))
    cursor = json.loads((folder / "cursor.json").read_text())
    cursor["sha256"]["adapter_config.json"] = evaluation.sha256(folder / "adapter_config.json")
    (folder / "cursor.json").write_text(json.dumps(cursor))
    measured(run, tasks=["perplexity"])
    assert len(list((cache / "evaluations").iterdir())) == 3


def test_other_questions_stand_beside(run, tmp_path):
    """Files of one name in two folders, own suites, and a version that is not this one."""
    measured(run, tasks=["tool_calls"])
    lines = (run / "data" / "valid.jsonl").read_text().splitlines()
    for name, kept in (("a", lines[:6]), ("b", lines[6:])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "test.jsonl").write_text("\n".join(kept) + "\n")
        measured(run, tasks=["tool_calls"], data=[str(tmp_path / name / "test.jsonl")])
    assert len({(row["source"], row["prompt"]) for of in examples(run).values() for row in of}) > 12
    assert len(examples(run)) == 3
    own = next(run.glob("evals/tool_calls@?"))
    old = json.loads((own / "score.json").read_text())
    old |= {
        "version": "1",
        "at": 0.0,
        "scores": [one | {"version": "1", "value": 0.123} for one in old["scores"]],
    }
    shutil.copytree(own, own.with_name("tool_calls@1"))
    (own.with_name("tool_calls@1") / "score.json").write_text(json.dumps(old))
    assert all(
        one.value != 0.123 and one.version != "1" for one in measured(run, tasks=["tool_calls"]).scores
    )


def test_named_rows_are_told_apart_from_those_of_training(run, tmp_path, monkeypatch):
    """By what is in the files, wherever they lie, and where they lay is written whole."""
    (trained,) = Run.open(run).manifest["hashes"]["data"]
    monkeypatch.chdir(tmp_path)
    shutil.copy(trained, tmp_path / "copy.jsonl")
    shutil.copy(run / "data" / "valid.jsonl", tmp_path / "new.jsonl")
    for names, unseen in (
        (["copy.jsonl"], False),
        (["new.jsonl"], True),
        (["new.jsonl", "copy.jsonl"], False),
    ):
        measured(run, tasks=["perplexity"], data=names, limit=3)
        newest = max(run.glob("evals/*/score.json"), key=lambda path: path.stat().st_mtime_ns)
        about = json.loads(newest.read_text())
        assert (about["data"], about["unseen"]) == ([str(tmp_path / name) for name in names], unseen)
    measured(run, tasks=["perplexity"], limit=3)
    assert "unseen" not in json.loads((run / "evals" / "perplexity@1+first3" / "score.json").read_text())
    measured(run, tasks=["perplexity", "drift"], limit=3)
    found, older = paired.recorded(run)
    assert older == [] and len({one.task for one in found}) == 5, "what is written is what a comparison reads"


def test_files_of_held_out_rows_are_not_trained_on(run, tmp_path):
    opened = Run.open(run)
    files = {str(tmp_path / name): name for name in ("train.jsonl", "valid.jsonl", "folder/more.jsonl")}
    for train, learned in ((["train.jsonl"], {"train.jsonl"}), (["folder"], {"folder/more.jsonl"})):
        split = SimpleNamespace(
            data=SimpleNamespace(trained_on=tuple(str(tmp_path / name) for name in train))
        )
        assert evaluation._learned(SimpleNamespace(config=split, hashes={"data": files})) == learned
    assert evaluation._learned(opened) == {*opened.manifest["hashes"]["data"].values()}


def test_another_checkpoint_stands_beside_the_best(run):
    measured(run, tasks=["perplexity"])
    before = (run / "evals" / "perplexity@1" / "examples.jsonl").read_bytes()
    measured(run, tasks=["perplexity"], checkpoint="2")
    assert set(examples(run)) == {"perplexity@1", "perplexity@1+step000002"}
    assert (run / "evals" / "perplexity@1" / "examples.jsonl").read_bytes() == before


def test_what_stands_on_disk_says_what_it_is_of(run):
    measured(run, tasks=["perplexity", "tool_calls"])
    for path in run.glob("evals/*/score.json"):
        found = json.loads(path.read_text())
        assert path.parent.name == f"{found['task']}@{found['version']}" and found["checkpoint"] == "000004"
        assert (
            found["data"] == "data/valid.jsonl"
            and found["settings"]["max_tokens"] == 12
            and len(found["identity"]) == 16
        )
        assert found["family"] == [] and len(found["base"]) == 16
        rows = [json.loads(line) for line in (path.parent / "examples.jsonl").read_text().splitlines()]
        assert len(rows) == found["n"] and all(
            {"base", "tuned", "change", "prompt"} <= row.keys() for row in rows
        )
        assert {row["change"] for row in rows} <= {"improved", "unchanged", "regressed", None}


def test_verdicts_are_corrected_for_all_tasks_of_a_checkpoint(run):
    alone = {(one.task, one.name): one for one in measured(run, tasks=["perplexity"]).scores if one.headline}
    both = {(one.task, one.name): one for one in measured(run, tasks=["tool_calls"]).scores if one.headline}
    assert both
    now = json.loads(next(run.glob("evals/perplexity@*/score.json")).read_text())["scores"]
    (headline,) = [one for one in now if one["headline"] and one["part"] is None]
    before = alone["perplexity", headline["name"]]
    assert before.p is not None and before.p_corrected == pytest.approx(before.p)
    others = [one for (_, name), one in both.items() if one.p is not None]
    assert headline["p_corrected"] == pytest.approx(evaluation.judge([before, *others])[0].p_corrected)
    assert headline["p_corrected"] >= before.p


def test_what_was_asked_otherwise_is_a_family_of_its_own(run):
    """Fewer rows beside all of them: neither raises the other's p."""
    measured(run, tasks=["perplexity"])
    before = {path: path.read_bytes() for path in run.glob("evals/*/score.json")}
    few = measured(run, tasks=["perplexity", "preference"], limit=9)
    assert {path: path.read_bytes() for path in before} == before
    headlines = [one for one in few.scores if one.headline and one.p is not None]
    assert len(headlines) > 1 and headlines[0].p_corrected == pytest.approx(
        evaluation.judge(headlines)[0].p_corrected
    )


def test_a_model_that_was_moved_is_asked_where_it_lies_now(run, tiny_model, tmp_path):
    def pointed(path: Path) -> None:
        text = (run / "config.yaml").read_text()
        assert str(tiny_model) in text
        (run / "config.yaml").write_text(text.replace(str(tiny_model), str(path)))

    before = numbers(measured(run, tasks=["tool_calls"]))
    pointed(tmp_path / "gone")
    for ask in (lambda: tunesmith.evaluate(run), lambda: tunesmith.generate(run, ["hello"])):
        with pytest.raises(
            errors.ModelError, match=r"gone: the model of this run was moved or removed\n.*--model PATH"
        ):
            ask()
    assert numbers(measured(run, tasks=["tool_calls"], model=str(tiny_model))) == before
    assert len(tunesmith.generate(run, ["hello"], model=str(tiny_model), max_tokens=4)) == 1
    other = tiny.write_mistral(tmp_path / "other")
    with pytest.raises(errors.ModelError, match=r"the base .*changed since this run was trained"):
        tunesmith.evaluate(run, model=str(other))
    with pytest.raises(errors.ConfigError, match=r"a plain model has no .* other place"):
        tunesmith.generate(tiny_model, ["hello"], model=str(other))


def test_the_base_against_itself_shows_no_difference(run):
    """An adapter that was not trained: every example is unchanged."""
    net = Run.open(run).checkpoint(4)
    import mlx.core as mx

    tensors = mx.load(str(net / "adapters.safetensors"))
    still = {
        name: mx.zeros_like(value) if name.endswith("lora_b") else value for name, value in tensors.items()
    }
    mx.save_safetensors(str(net / "adapters.safetensors"), still, {"format": "mlx"})
    cursor = json.loads((net / "cursor.json").read_text())
    cursor["sha256"]["adapters.safetensors"] = evaluation.sha256(net / "adapters.safetensors")
    (net / "cursor.json").write_text(json.dumps(cursor))
    found = measured(run, tasks=["perplexity", "adherence", "tool_calls"])
    assert {one.delta for one in found.scores} == {0.0}
    assert {one.verdict for one in found.scores if one.p is not None and one.better} == {
        "no difference shown"
    }
    assert {row["change"] for of in examples(run).values() for row in of} <= {"unchanged", None}


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tasks": ["perplexityy"]}, "no task is called 'perplexityy'"),
        (
            {"tasks": ["drift.safety"]},
            r"no task is called 'drift.safety'(.|\n)*it is part of drift: --task drift",
        ),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokenz": 3}, "max_tokenz"),
        ({"tasks": ["preference"], "base": False}, "nothing could be measured"),
        ({"data": ["none.jsonl"]}, "none.jsonl"),
        ({"data": ["none.jsonl"], "tasks": ["drift"]}, "no task of drift asks rows"),
        ({"tasks": ["benchmarks"]}, "no benchmark is named"),
        ({"tasks": ["perplexity"], "knowledge": ("mine.jsonl",)}, "knowledge: is for drift"),
        ({"tasks": ["perplexity"], "shots": 5}, r"shots: is for benchmarks(.|\n)*--benchmark NAME as well"),
        ({"tasks": ["perplexity"], "benchmarks": ("no_such_benchmark",)}, "no_such_benchmark"),
    ],
)
def test_what_cannot_be_asked_is_refused(run, options, told):
    with pytest.raises(errors.TunesmithError, match=told):
        tunesmith.evaluate(run, **options)


def test_rows_that_are_missing_leave_the_suites(run, monkeypatch):
    (run / "data" / "valid.jsonl").write_text("")
    with pytest.raises(errors.EvaluationError, match="has no held-out rows"):
        measured(run)
    heard: list[events.Event] = []
    found = measured(run, tasks=[*ROWS_ONLY, "efficiency"], limit=2, notify=heard.append)
    assert {one.task for one in found.scores} == {"efficiency"}
    assert any("no rows are held out" in one.what for one in heard if isinstance(one, events.Notice))


def test_a_score_without_a_base_has_no_difference(run):
    found = measured(run, tasks=["perplexity", "preference"], base=False)
    assert all(replace(one, delta=None, p=None, verdict=None) == one for one in found.scores)
    assert {one.task for one in found.scores} == {"perplexity"}
