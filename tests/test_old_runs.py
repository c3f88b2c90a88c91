"""Runs of 0.1.0 stay valid: they open, report, compare, go on to the same bytes, and are evaluated from what
is kept.

Only files and public verbs are used here, so that nothing inside needs to stay where it is.
``fixtures/README.md`` says what the runs are; equal bytes are asked where the packages and the machine are
those that made them, else equality to a few last digits."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import forks
import numpy as np
import pytest
from safetensors.numpy import load_file

import processor
import tunesmith

KEPT = Path(__file__).parent / "fixtures" / "runs-0.1.0"
FACTS = json.loads((KEPT / "facts.json").read_text())
PLACEHOLDER = b"@ROOT@"
RUNS, FINISHED = ("sft-lora", "kto", "full-modules"), ("sft-lora", "kto")
STEPS = {"sft-lora": 12, "kto": 6, "full-modules": 4}
WHOLE = 8
"""Updates of full-modules, which was stopped after 4."""
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
PAGES = ("report.html", "report.md", "report.json", "report.png", "curves.png", "model_card.md")


@pytest.fixture
def root(tmp_path, monkeypatch) -> Path:
    """The runs as they were left, under a folder of their own, with what was kept of the evaluations beside
    them."""
    place = tmp_path.resolve() / "old"
    shutil.copytree(KEPT, place)
    # it counts bytes of the log, and another root has another length
    for cursor in place.glob("*/checkpoints/*/cursor.json"):
        found = json.loads(cursor.read_text())
        begun = (cursor.parents[2] / "events.jsonl").read_bytes()[: found["events_bytes"]]
        found["events_bytes"] = len(begun.replace(PLACEHOLDER, str(place).encode()))
        cursor.write_text(json.dumps(found))
    for path in place.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and PLACEHOLDER in (content := path.read_bytes()):
            path.write_bytes(content.replace(PLACEHOLDER, str(place).encode()))
    monkeypatch.setenv("TUNESMITH_CACHE", str(place / "cache"))
    return place


@pytest.fixture(scope="module", autouse=True)
def kernels_of_then() -> Iterator[None]:
    """0.1.0 had no compiled kernels."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TUNESMITH_KERNELS", "operations")
        yield


@pytest.fixture(scope="module")
def here(tmp_path_factory, tiny_model) -> dict:
    """The manifest of a run of one update, made here and now."""
    folder = tmp_path_factory.mktemp("here")
    (folder / "rows.jsonl").write_text(
        json.dumps({"prompt": "the cat", "completion": " sat on a mat"}) + "\n"
    )
    sets = ["loop.steps=1", "data.valid=0", "audit.before_training=false", "adapter.rank=2"]
    settings = tunesmith.configure(model=str(tiny_model), data=[str(folder / "rows.jsonl")], sets=sets)
    tunesmith.train(settings, out=folder / "run")
    return read(folder / "run" / "manifest.json")


@pytest.fixture(scope="module")
def elsewhere(here) -> list[str]:
    """What can move a last digit and is not as it was where the runs were made; empty: bytes have to be the
    same."""
    packages = ("mlx", "mlx-lm", "numpy")
    was = {name: FACTS["versions"][name] for name in packages} | FACTS["machine"]
    now = {name: version(name) for name in packages} | {
        name: here["machine"][name] for name in FACTS["machine"]
    }
    was |= {"vectors": FACTS["vectors"], "compiler": FACTS["compiler"]}
    now |= {"vectors": processor.vectors(), "compiler": processor.compiler()}
    return [f"{name} {was[name]} → {now[name]}" for name in was if was[name] != now[name]]


def read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def log(run: Path, kind: str) -> list[dict]:
    lines = (run / "events.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["kind"] == kind]


def content(run: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*")) if path.is_file()
    }


def evaluations(run: Path) -> dict[str, dict]:
    return {path.parent.name: read(path) for path in sorted(run.glob("evals/*/score.json"))}


def near(value):
    """``value``, each of whose floats equals others within rounding: NumPy's exponentials differ in the last
    digit between processors with AVX2 and AVX-512."""
    if isinstance(value, dict):
        return {key: near(part) for key, part in value.items()}
    if isinstance(value, list):
        return [near(part) for part in value]
    return pytest.approx(value, rel=1e-12) if isinstance(value, float) else value


def assert_same(folder: Path, expected: Path, elsewhere: list[str]) -> None:
    """Adapter and optimizer, to the byte where nothing is ``elsewhere``."""
    for name in ("adapters.safetensors", "optimizer.safetensors"):
        if not elsewhere:
            assert (folder / name).read_bytes() == (expected / name).read_bytes(), name
        found, wanted = load_file(folder / name), load_file(expected / name)
        assert found.keys() == wanted.keys()
        for tensor, value in wanted.items():
            np.testing.assert_allclose(found[tensor], value, **CLOSE, err_msg=f"{name} {tensor}, {elsewhere}")


@pytest.mark.parametrize("kind", RUNS)
def test_it_is_reported_anew(root, kind):
    """Every file of the report, with the numbers of the log and of the evaluations, and not a byte of the run
    changed."""
    run = root / kind
    before = content(run)
    assert tunesmith.report(run) == run / "report.md"
    after = content(run)
    assert all(after[name] for name in PAGES) and {name: after[name] for name in before} == before
    found = read(run / "report.json")
    assert found["status"] == ("interrupted" if kind == "full-modules" else "completed")
    assert found["updates"]["done"] == STEPS[kind] == len(log(run, "StepDone")) and found["unread"] == []
    assert found["verdict"] and found["manifest"] == read(run / "manifest.json")
    losses = [event["loss"] for event in log(run, "Validated")]
    assert [one["loss"] for one in found["validation"]] == losses and len(losses) > 1
    scores = [score for name, one in evaluations(run).items() for score in one["scores"]]

    def key(score: dict) -> tuple:
        return (score["task"], score["name"], score["part"] or "")

    assert [(key(one), one["value"], one["n"]) for one in sorted(found["scores"], key=key)] == [
        (key(one), one["value"], one["n"]) for one in sorted(scores, key=key)
    ]
    assert {one["task"] for one in scores} == {*FACTS["asked"][kind]["tasks"]}


@pytest.mark.parametrize("kind", RUNS)
def test_what_was_measured_is_not_asked_again(root, kind, here):
    """Neither base nor tuned: every number and answer is there again as it was, and nothing new is kept."""
    # Whatever can change a score is part of the name under which it is kept.
    changed = [name for name, was in FACTS["versions"].items() if name != "numpy" and version(name) != was]
    changed += ["device"] if here["machine"]["kind"] != FACTS["machine"]["kind"] else []
    if changed:
        pytest.skip(f"measured with another {', '.join(changed)}: rightly asked again")
    run, known = root / kind, sorted((root / "cache").rglob("*.json"))
    before = evaluations(run)
    texts = {path: path.read_bytes() for path in run.glob("evals/*/examples.jsonl")}
    found = tunesmith.evaluate(run, checkpoint="last", **FACTS["asked"][kind])
    assert found is not None
    after = evaluations(run)
    assert after.keys() == before.keys()
    for name, one in after.items():
        assert one["kept"] == {"base": True, "tuned": True}, name
        assert {**near(one), "kept": 0, "at": 0} == {**before[name], "kept": 0, "at": 0}
    assert {path: path.read_bytes() for path in texts} == texts
    assert sorted((root / "cache").rglob("*.json")) == known
    told = {(one["task"], one["name"], one["part"]): one["value"] for one in found.summary()["scores"]}
    assert near(told) == {
        (one["task"], one["name"], one["part"]): one["value"]
        for kept in before.values()
        for one in kept["scores"]
    }


@pytest.mark.parametrize("kind", RUNS)
def test_measured_again_the_numbers_are_the_same(root, kind):
    """Of what is not generated: a likeliest token can change with a last digit."""
    run = root / kind
    tasks = [name for name in FACTS["asked"][kind]["tasks"] if name in ("perplexity", "preference")]
    before = evaluations(run)
    tunesmith.evaluate(
        run, checkpoint="last", tasks=tasks, max_tokens=FACTS["asked"][kind]["max_tokens"], fresh=True
    )
    after = evaluations(run)
    assert after.keys() == before.keys()
    for name in (name for name, one in after.items() if one["task"] in tasks):
        assert (
            after[name]["kept"] == {"base": False, "tuned": False}
            and after[name]["identity"] == before[name]["identity"]
        )
        for new, old in zip(after[name]["scores"], before[name]["scores"], strict=True):
            assert (new["name"], new["part"], new["n"], new["verdict"]) == (
                old["name"],
                old["part"],
                old["n"],
                old["verdict"],
            )
            for number in (number for number in ("value", "delta") if old[number] is not None):
                assert new[number] == pytest.approx(old[number], rel=1e-4, abs=1e-4), (
                    name,
                    new["name"],
                    number,
                )


def test_two_are_compared(root, tmp_path):
    """On the same prompts, by the difference of their own scores."""
    tunesmith.compare([root / "sft-lora", root / "kto"], out=tmp_path / "comparison")
    found = read(tmp_path / "comparison" / "compare.json")
    assert [run["status"] for run in found["runs"]] == ["completed", "completed"] and found["verdict"]
    assert "objective.kind" in {row["key"] for row in found["settings"]}
    (side,) = found["against"]
    compared = {one["task"]: one for one in side["compared"]}
    assert compared.keys() == {"perplexity", "preference"}  # what both were asked
    own = [evaluations(root / kind)["perplexity@1"]["scores"] for kind in FINISHED]
    (sft,), (kto,) = (
        [one["value"] for one in scores if (one["name"], one["part"]) == ("loss", None)] for scores in own
    )
    (loss,) = (
        one for one in compared["perplexity"]["scores"] if (one["name"], one["part"]) == ("loss", None)
    )
    assert loss["delta"] == pytest.approx(kto - sft, rel=1e-6) and loss["n"] == 5
    assert len(compared["perplexity"]["prompts"]) == len(
        (root / "kto" / "data" / "valid.jsonl").read_text().splitlines()
    )


def test_the_interrupted_one_goes_on_to_the_same_end(root, elsewhere):
    run = root / "full-modules"
    assert read(run / "manifest.json")["status"] == "interrupted"
    before = [*log(run, "StepDone"), *log(run, "Validated")]
    tunesmith.train(resume=run)
    assert read(run / "manifest.json")["status"] == "completed"
    assert_same(run / "checkpoints" / f"{WHOLE:06d}", root / "full-modules-expected", elsewhere)
    # The log goes on where the checkpoint left it: nothing lost, nothing twice.
    assert [event["step"] for event in log(run, "StepDone")] == [*range(1, WHOLE + 1)]
    assert [event["step"] for event in log(run, "Resumed")] == [STEPS["full-modules"]]
    assert all(event in [*log(run, "StepDone"), *log(run, "Validated")] for event in before)
    assert read(run / "report.json")["status"] == "completed"


def test_with_the_compiled_kernels_it_goes_on_nearly_the_same(root, monkeypatch):
    """And a notice says that they were not there when the run began."""
    monkeypatch.setenv("TUNESMITH_KERNELS", "on")
    run = root / "full-modules"
    told: list[str] = []
    tunesmith.train(resume=run, notify=lambda event: told.append(str(getattr(event, "what", ""))))
    assert_same(run / "checkpoints" / f"{WHOLE:06d}", root / "full-modules-expected", ["kernels"])
    assert any("the result may differ in its last digits" in text for text in told), told


def test_one_that_died_goes_on_with_its_own_reference(root, elsewhere):
    """What the model said before training is read from the run, not measured again; the end is that of the
    run itself."""
    run, whole = root / "kto", KEPT / "kto"
    last = run / "checkpoints" / f"{STEPS['kto']:06d}"
    shutil.rmtree(last)
    manifest = read(run / "manifest.json")
    (run / "manifest.json").write_text(json.dumps(manifest | {"status": "running"}))
    told: list[str] = []
    tunesmith.train(resume=run, notify=lambda event: told.append(str(getattr(event, "what", ""))))
    assert_same(last, whole / "checkpoints" / last.name, elsewhere)
    if not elsewhere:
        assert any(text.startswith("reference: 0 sequences measured") for text in told), told
        assert (run / "reference.safetensors").read_bytes() == (whole / "reference.safetensors").read_bytes()
    assert read(run / "manifest.json")["status"] == "completed"


@pytest.mark.parametrize("kind", FINISHED)
def test_to_resume_a_finished_one_changes_nothing(root, kind):
    before = content(root / kind)
    tunesmith.train(resume=root / kind)
    after = content(root / kind)
    assert {name: after[name] for name in before} == before
    assert after.keys() - before.keys() == set(PAGES), "the report was missing, and is written"
    tunesmith.train(resume=root / kind)
    assert content(root / kind) == after


def test_training_goes_on_from_its_adapter(root, tmp_path):
    """A new run may begin where an old one ended, and says so."""
    sets = [
        "objective=kto",
        "loop.steps=1",
        "loop.samples=0",
        f"adapter.start={root / 'sft-lora'}",
        "adapter.rank=2",
    ]
    sets += ["adapter.targets=[q_proj, v_proj, lm_head]", f'data.valid=["{root / "data" / "valid.jsonl"}"]']
    settings = tunesmith.configure(
        model=str(root / "model"), data=[str(root / "data" / "rows.jsonl")], sets=sets
    )
    tunesmith.train(settings, out=tmp_path / "new")
    begun = read(tmp_path / "new" / "manifest.json")["lineage"]["start"]
    assert (begun["run"], begun["objective"]) == ("sft-lora", "sft")


@pytest.mark.parametrize("kind", ["hf", "mlx"])
def test_it_is_exported(root, kind, tmp_path):
    exported = tunesmith.export(root / "sft-lora", to=kind, out=tmp_path / "out", rows=2)
    assert exported.rows == 2 and exported.distances.mean < 1e-6


def test_the_command_line_opens_it(root):
    """Its report is written first, since the fixture has none."""
    words = [sys.executable, "-m", "tunesmith", "train", "--resume", str(root / "sft-lora"), "--json"]
    for said in ("only its report is written", "there is nothing to do"):
        done = forks.run(words)
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["status"] == "completed" and said in done.stderr
    assert (root / "sft-lora" / "report.html").is_file()
