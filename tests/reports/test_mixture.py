"""``tunesmith compose``: a mixture is a run that every verb takes, and says what it keeps of each source."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith import events
from tunesmith.adapters.layers import adapted
from tunesmith.cli import app
from tunesmith.errors import ConfigError, CorruptCheckpoint, DataError, EvaluationError, ModelError
from tunesmith.runs import opening

QUICK = ["loop.steps=12", "optimizer.learning_rate=0.01", "data.valid=0.25"]


def train(folder: Path, model: Path, *sets: str, seed: int = 0) -> Path:
    folder.mkdir()
    rows = tiny.write_rows(folder / "rows.jsonl", tiny.conversations(24, seed))
    config = tunesmith.configure(model=str(model), data=[str(rows)], sets=[*QUICK, *sets])
    tunesmith.train(config, out=folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_model) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("sources")
    first = train(folder / "one", tiny_model, "adapter.rank=4", "adapter.targets=all-linear")
    second = train(folder / "two", tiny_model, "adapter.rank=2", "adapter.rank_stabilised=true", seed=1)
    return first, second


@pytest.fixture(scope="module")
def mixture(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("mixture") / "mixed"
    tunesmith.compose({str(runs[0]): 0.7, str(runs[1]): 0.3}, out=out)
    return out


def invoke(*words: str):
    return CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)


def changes(run: Path) -> dict[str, np.ndarray]:
    opened = opening.find(run).open()
    before = {
        name: np.array(module.weight)
        for name, module in opened.loaded.net.named_modules()
        if "weight" in module
    }
    opened.attach()
    return {
        name: np.array(layer.merged_weight()) - before[name]
        for name, layer in adapted(opened.loaded.net).items()
    }


def test_the_command_line_writes_the_weighted_sum(runs, tmp_path):
    out = tmp_path / "deep" / "mixed"
    result = invoke("compose", f"{runs[0]}=1", f"{runs[1]}=-0.5", "--out", out, "--json")
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record["rank"] == 6 and record["retained"] == pytest.approx(1) and len(record["layers"]) == 14
    assert record == json.loads((out / "composition.json").read_text())
    one, two, mixed = map(changes, (*runs, out))
    for name in mixed:
        expected = one[name] - 0.5 * two.get(name, 0)
        np.testing.assert_allclose(mixed[name], expected, atol=1e-5 * np.abs(expected).max())
    manifest = json.loads((out / "manifest.json").read_text())
    lineage = manifest["lineage"]["composed"]
    assert manifest["status"] == "composed"
    assert [(source["run"], source["weight"]) for source in lineage["sources"]] == [
        ("run", 1.0),
        ("run", -0.5),
    ]
    assert all(len(source["sha256"]) == 64 and source["data"] for source in lineage["sources"])
    assert not list(out.parent.glob(".*"))


def test_the_screen_shows_the_median_and_the_three_layers_that_lose_most(runs, tmp_path):
    out = tmp_path / "mixed"
    result = invoke("compose", f"{runs[0]}=1", f"{runs[1]}=1", "--out", out, "--rank", "3")
    assert result.exit_code == 0, result.output
    layers = json.loads((out / "composition.json").read_text())["layers"]
    retained = {layer["name"]: layer["retained"] for layer in layers}
    assert len(retained) == 14 and max(retained.values()) > 1.05 * min(retained.values())
    shown = [line.split() for line in result.stdout.splitlines() if line.startswith("model.layers.")]
    worst = sorted(retained, key=retained.__getitem__)[:3]
    assert [line[0] for line in shown] == worst
    assert [line[1] for line in shown] == [f"{retained[name]:.2%}" for name in worst]
    assert sum(line.startswith("overlap in, out: ") for line in result.stdout.splitlines()) == 1
    (median,) = [line for line in result.stdout.splitlines() if line.startswith("median of 14 layers")]
    assert f"{np.median(list(retained.values())):.2%}" in median
    assert "all are in composition.json, and with --json" in result.stdout


def test_a_folder_that_exists_is_not_to_be_resumed(runs, tmp_path):
    with pytest.raises(DataError, match="exists already") as caught:
        tunesmith.compose({str(runs[0]): 1.0}, out=tmp_path)
    assert caught.value.hint == "choose another --out, or remove it"


def test_every_verb_takes_a_mixture(runs, mixture, tmp_path):
    assert len(tunesmith.generate(mixture, ["my note"], max_tokens=4)) == 1
    assert len(tunesmith.generate(mixture / "checkpoints" / "000000", ["my note"], max_tokens=4)) == 1
    exported = tunesmith.export(mixture, to="hf", rows=2, out=tmp_path / "hf")
    assert exported.distances.mean < 1e-6 < exported.distances.base
    evaluated = tunesmith.evaluate(mixture, tasks=["perplexity"])
    assert evaluated is not None and evaluated.scores[0].n == 12
    report = json.loads((mixture / "report.json").read_text())
    assert report["loss"].startswith("Composed of the adapters of 0.7 × run and 0.3 × run, not trained")
    assert tunesmith.report(mixture).is_file()
    compared = tunesmith.compare([runs[0], mixture], out=tmp_path / "comparison")
    assert compared.lines
    for words in (("report", mixture), ("watch", mixture, "--once"), ("show", mixture)):
        result = invoke(*words)
        assert result.exit_code == 0 or words[0] == "show", result.output


@pytest.mark.parametrize("how", ["adapter.start={}", "model.adapter={}"])
def test_a_mixture_is_trained_further(how, mixture, tiny_model, tmp_path):
    spec = opening.find(mixture).config.adapter
    same = [
        f"adapter.rank={spec.rank}",
        f"adapter.alpha={spec.alpha}",
        f"adapter.targets={json.dumps(spec.targets)}",
    ]
    sets = [how.format(mixture), *(same if "start" in how else ["adapter.rank=2"]), "loop.steps=2"]
    run = train(tmp_path / "further", tiny_model, *sets)
    lineage = json.loads((run / "manifest.json").read_text())["lineage"]
    assert next(iter(lineage.values()))["lineage"]["composed"]["method"] == "linear"


def test_a_mixture_is_not_resumed(mixture):
    with pytest.raises(DataError, match="composed of other runs, not trained"):
        tunesmith.train(resume=mixture)


def test_evaluated_each_source_is_asked_alone_and_in_the_mixture(runs, tmp_path):
    out = tmp_path / "mixed"
    weights = [f"{runs[0]}=1", f"{runs[1]}=0.001"]
    result = invoke("compose", *weights, "--out", out, "--evaluate", "--max-tokens", "8")
    assert result.exit_code == 0, result.output
    assert "Perplexity on held-out rows" in result.stdout and "95 % interval" in result.stdout
    kept = json.loads((out / "composition.json").read_text())["kept"]
    perplexity = [effect for effect in kept if effect["mixed"]["name"] == "perplexity"]
    for effect, run in zip(perplexity, runs, strict=True):
        alone = tunesmith.evaluate(run, tasks=["perplexity"], fresh=True)
        score = next(score for score in alone.scores if score.name == "perplexity")
        assert effect["alone"]["value"] == pytest.approx(score.value, rel=1e-5)
        assert effect["alone"]["delta"] == pytest.approx(score.delta, rel=1e-5)
    first, second = (effect["mixed"] for effect in perplexity)
    assert first["delta"] == pytest.approx(0, abs=0.05) and abs(second["delta"]) > 10 * abs(first["delta"])
    loaded = tunesmith.evaluate(out, tasks=["perplexity"], data=[str(runs[0] / "data" / "valid.jsonl")])
    assert first["value"] == pytest.approx(loaded.scores[0].value, rel=1e-6)


def test_held_out_rows_are_those_of_all_sources_each_once(runs, mixture, tmp_path):
    lines = [(run / "data" / "valid.jsonl").read_text().splitlines() for run in runs]
    assert (mixture / "data" / "valid.jsonl").read_text().splitlines() == [*lines[0], *lines[1]]
    again = shutil.copytree(runs[0], tmp_path / "again")
    tunesmith.compose({runs[0]: 0.5, again: 0.5}, out=tmp_path / "twice")
    assert (tmp_path / "twice" / "data" / "valid.jsonl").read_text().splitlines() == lines[0]


@pytest.mark.parametrize(
    ("words", "where"),
    [(["--limit", "3"], "--limit"), (["--max-tokens", "9"], "--max-tokens"), (["--seed", "1"], "seed")],
)
def test_options_that_would_be_ignored_are_refused(runs, words, where, tmp_path):
    with pytest.raises(ConfigError) as caught:
        invoke("compose", f"{runs[0]}=1", f"{runs[1]}=1", "--out", tmp_path / "mixed", *words)
    assert caught.value.where == where and caught.value.hint and not (tmp_path / "mixed").exists()


def test_a_rank_that_the_layers_do_not_allow_is_said(runs, tmp_path):
    notices: list[events.Event] = []
    weights = {runs[0]: 0.5, runs[1]: 0.5}
    tunesmith.compose(weights, out=tmp_path / "mixed", rank=1000, notify=notices.append)
    told = [notice.what for notice in notices if isinstance(notice, events.Notice)]
    (text,) = [what for what in told if what.startswith("rank ")]
    assert text.endswith("instead of 1000: the narrowest layer takes no more")


def test_a_source_that_was_made_from_another_is_said_to_contain_it(runs, tiny_model, tmp_path):
    spec = opening.find(runs[0]).config.adapter
    same = [f"adapter.rank={spec.rank}", f"adapter.targets={json.dumps(spec.targets)}", "loop.steps=2"]
    later = train(tmp_path / "later", tiny_model, f"adapter.start={runs[0]}", *same)
    notices: list[events.Event] = []
    tunesmith.compose({runs[0]: 1.0, later: -0.5}, out=tmp_path / "less", notify=notices.append)
    told = [notice.what for notice in notices if isinstance(notice, events.Notice)]
    (text,) = [what for what in told if "contains its update" in what]
    assert f"{runs[0]} 1 times, and -0.5 times within {later}" in text
    notices.clear()
    tunesmith.compose({runs[0]: 1.0, runs[1]: -0.5}, out=tmp_path / "apart", notify=notices.append)
    assert not any("contains" in notice.what for notice in notices if isinstance(notice, events.Notice))


def test_rows_that_another_source_was_trained_on_are_left_out(tiny_model, tmp_path):
    """Two runs of one file split it by their seeds: a row that one holds out, the other may learn."""
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(24))
    held_out: list[list[str]] = []
    for seed in (1, 2):
        sets = ["loop.steps=1", "data.valid=0.25", f"loop.seed={seed}"]
        config = tunesmith.configure(model=str(tiny_model), data=[str(rows)], sets=sets)
        tunesmith.train(config, out=tmp_path / str(seed))
        held_out.append((tmp_path / str(seed) / "data" / "valid.jsonl").read_text().splitlines())
    shared = [line for line in held_out[0] if line in held_out[1]]
    assert 0 < len(shared) < len(held_out[0])
    notices: list[events.Event] = []
    weights = {tmp_path / "1": 0.5, tmp_path / "2": 0.5}
    out = tmp_path / "mixed"
    made = tunesmith.compose(weights, out=out, evaluate=True, max_tokens=4, notify=notices.append)
    assert (out / "data" / "valid.jsonl").read_text().splitlines() == shared
    counts = [
        notice.count
        for notice in notices
        if isinstance(notice, events.Notice) and "another source was trained" in notice.what
    ]
    assert counts == [len(lines) - len(shared) for lines in held_out]
    assert {effect.mixed.n for effect in made.effects if effect.mixed.name == "perplexity"} == {len(shared)}


def test_other_bases_are_refused(runs, tiny_model, tmp_path):
    other = shutil.copytree(tiny_model, tmp_path / "other")
    tiny.write_model(other, 320, seed=9)
    stranger = train(tmp_path / "stranger", other, "loop.steps=1")
    with pytest.raises(ModelError, match="another base than"):
        tunesmith.compose({runs[0]: 1, stranger: 1}, out=tmp_path / "out")
    packed = train(tmp_path / "packed", tiny_model, "loop.steps=1", "model.quantize=4")
    with pytest.raises(ModelError, match="quantize is 4"):
        tunesmith.compose({runs[0]: 1, packed: 1}, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["{run}=x"], "'x' is not a weight"),
        (["{run}=nan"], "'nan' is not a weight"),
        (["{run}=0"], "the weight 0"),
        (["{run}=1", "{run}=2"], "named twice"),
        (["{model}=1"], "is not a run"),
        (["{run}=1", "--density", "0.5"], "uses all entries"),
        (["{run}=1", "--method", "mean"], "method"),
        (["{run}=1", "--out", "{run}"], "exists already"),
    ],
)
def test_what_makes_no_sense_is_refused(words, says, runs, tiny_model, tmp_path):
    words = [word.format(run=runs[0], model=tiny_model) for word in words]
    words += [] if "--out" in words else ["--out", str(tmp_path / "out")]
    with pytest.raises((ConfigError, DataError), match=says):
        invoke("compose", *words)
    assert not (tmp_path / "out").exists()


def test_a_trained_run_still_needs_its_optimizer(runs, tmp_path):
    run = shutil.copytree(runs[0], tmp_path / "run")
    folder = sorted((run / "checkpoints").glob("0*"))[-1]
    cursor = json.loads((folder / "cursor.json").read_text())
    del cursor["sha256"]["optimizer.safetensors"]
    (folder / "cursor.json").write_text(json.dumps(cursor))
    with pytest.raises(CorruptCheckpoint, match="does not describe this checkpoint"):
        tunesmith.generate(run, ["my note"])


def test_a_damaged_lineage_is_named_by_the_report(mixture, tmp_path):
    damaged = shutil.copytree(mixture, tmp_path / "damaged")
    manifest = json.loads((damaged / "manifest.json").read_text())
    manifest["lineage"]["composed"]["sources"][1]["weight"] = "much"
    (damaged / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(EvaluationError, match=r"manifest.json(.|\n)*sources\.1\.weight"):
        tunesmith.report(damaged)
