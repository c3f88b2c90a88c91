"""`plan` estimates a run from headers and row lengths, and proposes what makes it fit."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors.numpy import load_file
from typer.testing import CliRunner

import gguf_files
import tiny
import tunesmith
from tunesmith.cli import app
from tunesmith.errors import ConfigError
from tunesmith.machine import memory
from tunesmith.model import loading, outlines
from tunesmith.preflight import capacity, fitting
from tunesmith.runs.config import RunConfig
from tunesmith.training import anatomy, forecast

QUICK = ["audit.before_training=false", "loop.samples=0"]


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    return tiny.write_rows(path, tiny.conversations(24))


def settings(model, rows, *sets):
    return tunesmith.configure(model=str(model), data=[str(rows)], sets=[*QUICK, *sets])


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_the_plan_of_a_dry_run_is_that_of_the_verb(tiny_model, rows):
    planned, rehearsed = (verb(settings(tiny_model, rows)) for verb in (tunesmith.plan, tunesmith.rehearse))
    assert planned.counts == rehearsed.counts
    assert planned.forecast.memory == rehearsed.forecast.memory


def test_the_verb_prints_tables_and_json(tiny_model, rows):
    words = ["plan", "--model", tiny_model, "--data", rows, *(w for text in QUICK for w in ("--set", text))]
    text = run(*words).stdout
    for part in ("memory:", "  weights ", "  in all ", "disk:", "  checkpoints ", "time:", "  an update "):
        assert part in text
    tree = json.loads(run(*words, "--json").stdout)
    assert tree["steps"] == 3 and tree["forecast"]["basis"] == "shapes" and tree["proposal"] is None


def test_two_measured_updates_correct_the_plan(tiny_model, rows, tmp_path):
    config = settings(tiny_model, rows, "adapter.targets=all-linear", "data.valid=0")
    measured = tunesmith.plan(config, measure=True).forecast
    trained = tunesmith.train(config, out=tmp_path / "run")
    outcome = tunesmith.runs.forecasts.read(trained).measured
    assert measured.basis == "measured updates"
    assert measured.peak.value == pytest.approx(outcome.peak, rel=0.1)


@pytest.mark.parametrize("kind", ["kto", "dpo"])
def test_objectives_with_a_reference_are_measured_too(tiny_model, tmp_path, kind):
    if kind == "kto":
        examples = [row | {"label": place % 2 == 0} for place, row in enumerate(tiny.conversations(24))]
    else:
        examples = [{"prompt": f"cat {n}", "chosen": f"mat {n}", "rejected": f"my {n}"} for n in range(24)]
    data = tiny.write_rows(tmp_path / "rows.jsonl", examples)
    planned = tunesmith.plan(settings(tiny_model, data, f"objective.kind={kind}"), measure=True)
    assert planned.forecast.update_s.value > 0
    moments = [planned.forecast.moment, *(term.name for term in planned.forecast.beside)]
    assert "the reference pass" in moments


def total(forecast):
    return forecast.needed.high


def test_changes_are_proposed_in_order_until_it_fits(tiny_model, rows, monkeypatch):
    machine = forecast.room()  # what the process holds grows by more than a tiny model needs
    monkeypatch.setattr(forecast, "room", lambda: machine)
    config = settings(tiny_model, rows, "batch.tokens=600", "data.valid=0", "adapter.targets=all-linear")
    before = tunesmith.plan(config).forecast
    limit = f"{(before.program + 0.75 * before.peak.value) / 1e9:.6f}GB"
    proposal = tunesmith.plan(config, fit=limit).proposal
    assert proposal.met and proposal.sets[0].startswith("batch.micro=")
    nothing = tunesmith.plan(config, fit="1KB").proposal
    keys = [text.partition("=")[0] for text in nothing.sets]
    assert not nothing.met and "loop.checkpoint_gradients" in keys
    if "batch.length" in keys:
        assert keys.index("batch.length") > keys.index("loop.checkpoint_gradients")
    assert total(nothing.forecast) < total(before)


def test_a_length_that_keeps_the_rows_is_proposed_where_half_of_it_would_not(tiny_model, tmp_path):
    """The prompts are longer than half of the longest row, which would leave no answer in any row."""
    examples = tiny.conversations(40)
    for place, row in enumerate(examples):
        row["conversations"] = [
            {"role": "user", "content": "the cat sat on my mat " * 40 + str(place)},
            {"role": "assistant", "content": "the mat " * (100 if place == 7 else 4)},
        ]
    data = tiny.write_rows(tmp_path / "rows.jsonl", examples)
    config = settings(tiny_model, data, "data.valid=0", "loop.checkpoint_gradients=true")
    whole = tunesmith.plan(config)
    proposal = tunesmith.plan(config, fit="1KB").proposal
    (length,) = [int(text.removeprefix("batch.length=")) for text in proposal.sets if "length" in text]
    assert length % 64 == 0
    kept = tunesmith.plan(settings(tiny_model, data, "data.valid=0", *proposal.sets))
    assert whole.counts["rows_train"] == 40
    assert kept.counts["rows_train"] == 39  # all but the longest


def test_rows_in_the_order_of_difficulty_are_planned_for_as_if_the_longest_came_together(
    tiny_model, tmp_path
):
    examples = tiny.conversations(24)
    for place, row in enumerate(examples):
        row["conversations"][-1]["content"] = "mat " * (150 if place % 6 == 0 else 2)
    data = tiny.write_rows(tmp_path / "rows.jsonl", examples)
    sets = ["data.valid=0", "batch.sequences=4", "batch.micro=4", "batch.tokens=2000"]
    planned, heard = {}, []
    for order in ("shuffled", "length", "difficulty"):
        config = settings(tiny_model, data, *sets, f"data.order={order}")
        planned[order] = tunesmith.plan(config, notify=heard.append)
    peaks = {order: plan.forecast.peak.value for order, plan in planned.items()}
    assert peaks["difficulty"] == pytest.approx(peaks["length"], rel=1e-6)
    assert peaks["difficulty"] > peaks["shuffled"]
    largest = planned["difficulty"].counts["largest_micro_batch"]
    assert largest == planned["length"].counts["largest_micro_batch"]
    assert largest["tokens"] > planned["shuffled"].counts["largest_micro_batch"]["tokens"]
    assert len([event for event in heard if getattr(event, "where", "") == "data.order"]) == 1
    rehearsed = tunesmith.rehearse(config)
    assert rehearsed.counts == planned["difficulty"].counts


def test_what_is_proposed_is_what_the_settings_then_need(tiny_model, rows):
    config = settings(tiny_model, rows, "batch.tokens=600", "data.valid=0")
    proposal = tunesmith.plan(config, fit="1KB").proposal
    changed = settings(tiny_model, rows, "batch.tokens=600", "data.valid=0", *proposal.sets)
    assert tunesmith.plan(changed).forecast.memory == proposal.forecast.memory


def test_proposals_are_compared_at_one_rate(tiny_model, rows, monkeypatch):
    rates = iter([1e11])  # a second measurement would raise StopIteration
    monkeypatch.setattr(forecast, "product_rate", lambda: next(rates))
    config = settings(tiny_model, rows, "loop.epochs=50")
    assert tunesmith.plan(config, fit="1KB", fit_time="0.001s").proposal.sets


def test_fewer_updates_are_proposed_for_time(tiny_model, rows):
    config = settings(tiny_model, rows, "loop.epochs=50")
    expected = tunesmith.plan(config).forecast.total_s.value
    proposal = tunesmith.plan(config, fit_time=f"{expected / 10:.6f}s").proposal
    assert any(text.startswith("loop.steps=") for text in proposal.sets)


def test_the_command_that_is_printed_trains(tiny_model, rows, tmp_path):
    words = ["--model", tiny_model, "--data", rows, *(w for text in QUICK for w in ("--set", text))]
    words += ["--set", "batch.tokens=600", "--set", "loop.steps=1"]
    printed = run("plan", *words, "--fit", "1KB").stdout.splitlines()[-1].split()
    assert printed[:2] == ["tunesmith", "train"] and "batch.micro=1" in printed
    assert run(*printed[1:], "--out", tmp_path / "run").exit_code == 0


def test_swap_is_named_where_it_may_be_used(tiny_model, rows, monkeypatch):
    def table(ceiling: int) -> str:
        monkeypatch.setattr(forecast, "room", lambda: memory.Room(ceiling, 0, 0, int(8e9)))
        return "\n".join(tunesmith.plan(settings(tiny_model, rows)).lines())

    assert "this machine has 0.5 MB, other programs hold 0.0 MB; the rest is swapped, up to 8.00 GB" in table(
        500_000
    )
    assert "swap" not in table(int(16e9))


def test_a_limit_that_nothing_meets_is_named_with_what_it_counts(tiny_model, rows):
    words = ["--model", tiny_model, "--data", rows, *(w for text in QUICK for w in ("--set", text))]
    printed = run("plan", *words, "--set", "batch.tokens=600", "--fit", "1MB", "--fit-time", "1s").stdout
    assert "no changes meet 1.0 MB for the whole process and 1 s; these come nearest:" in printed


@pytest.mark.parametrize("text", ["16", "GB", "-1GB", "0GB", "8h"])
def test_a_limit_is_a_number_with_a_unit(text):
    with pytest.raises(ConfigError, match="is not a number with one of"):
        fitting.limits(text, None)
    assert fitting.limits("16GB", "8h") == (16e9, 28800.0)


def test_the_header_of_a_gguf_file_is_enough(tmp_path, rows, monkeypatch):
    folder = tiny.write_llama(tmp_path / "model")
    path = gguf_files.write_gguf(tmp_path / "tiny.gguf", folder)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    outline = outlines.outlined(loading.ModelSpec(path=str(path)), made(tmp_path / "outline"))
    shapes = loading.load(outline, lazily=True).net.parameters()
    whole = loading.load(loading.ModelSpec(path=str(path))).net.parameters()
    flat = [[(name, value.shape, value.dtype) for name, value in leaves(tree)] for tree in (shapes, whole)]
    assert flat[0] == flat[1]


def test_planning_a_gguf_file_converts_nothing(tmp_path, rows, monkeypatch):
    folder = tiny.write_llama(tmp_path / "model")
    path = gguf_files.write_gguf(tmp_path / "tiny.gguf", folder)
    monkeypatch.setenv("TUNESMITH_CACHE", str(tmp_path / "cache"))
    planned = tunesmith.plan(settings(path, rows)).forecast
    assert not (tmp_path / "cache").exists()
    weights = next(term for term in planned.memory if term.name == "weights")
    assert weights.amount.value == sum(
        value.nbytes for value in load_file(folder / "model.safetensors").values()
    )


def leaves(tree):
    from mlx.utils import tree_flatten

    return tree_flatten(tree)


def made(folder):
    folder.mkdir()
    return folder


def test_a_model_of_the_hub_is_planned_from_its_headers(tiny_model, rows, monkeypatch):
    """The hub client fetches settings, and gives the headers of the weights."""
    import shutil
    from types import SimpleNamespace

    import huggingface_hub

    def fetch(name, *, local_files_only=False, allow_patterns=(), local_dir=None, **_):
        if local_files_only:
            raise OSError("not here")
        assert not any("safetensors" in pattern for pattern in allow_patterns)
        for file in tiny_model.glob("*.json"):
            shutil.copy(file, local_dir)

    def headers(name, **_):
        whole = (tiny_model / "model.safetensors").read_bytes()
        tree = json.loads(whole[8 : 8 + int.from_bytes(whole[:8], "little")])
        tree.pop("__metadata__", None)
        tensors = {key: SimpleNamespace(**value) for key, value in tree.items()}
        return SimpleNamespace(files_metadata={"model.safetensors": SimpleNamespace(tensors=tensors)})

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", headers)
    local = tunesmith.plan(settings(tiny_model, rows)).forecast
    assert tunesmith.plan(settings("owner/name", rows)).forecast.memory == local.memory


def test_the_record_shows_the_errors_of_all_runs(tiny_model, rows, tmp_path):
    tunesmith.train(settings(tiny_model, rows, "loop.steps=1"), out=tmp_path / "runs" / "first")
    record = tunesmith.track_record(tmp_path / "runs")
    (error,) = record.errors
    measured = error.plan.measured
    assert error.peak == pytest.approx(error.plan.predicted.peak.value / measured.peak - 1)
    lines = run("plan", "--record", "--folder", tmp_path / "runs").stdout.splitlines()
    assert "first" in lines[1] and lines[-1].startswith("peak of memory: ")
    (tmp_path / "runs" / "first" / "plan.json").write_text("{")
    heard = []
    assert tunesmith.track_record(tmp_path / "runs", heard.append).errors == ()
    assert heard[0].where.endswith("plan.json") and "no run needs it" in heard[0].hint


def test_the_record_takes_no_settings():
    result = run("plan", "--record", "--model", "m")
    assert isinstance(result.exception, ConfigError) and "takes no --model" in str(result.exception)


def test_a_folder_of_runs_is_for_the_record_only():
    result = run("plan", "--model", "m", "--folder", "runs")
    assert isinstance(result.exception, ConfigError) and "is for --record" in str(result.exception)


def test_no_row_longer_than_the_models_context_is_named(tiny_model, tmp_path):
    shutil.copytree(tiny_model, tmp_path / "short")
    file = tmp_path / "short" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 500}))
    short = capacity.settings(str(tmp_path / "short"))[0]
    assert (short.row, short.tokens) == (500, 500)
    tree = {"model": {"path": str(tiny_model)}, "data": {"train": ("rows",)}, "adapter": {"kind": "lora"}}
    outline = forecast.Outline.of(RunConfig.model_validate(tree))
    parts = anatomy.of(outline.net, outline.settings)
    less = capacity._needed(parts, 500, False) - 1
    assert capacity._longest(parts, False, less, 500) == 384


def test_the_doctor_says_which_settings_fit(tiny_model, monkeypatch):
    rows = {row.name: row for row in capacity.settings(str(tiny_model))}
    lora, recomputed = (rows[f"LoRA on all linear layers{end}"] for end in ("", ", layers recomputed"))
    assert recomputed.bytes < lora.bytes and "full weights, layers recomputed" in rows
    assert lora.row == 2048 and lora.tokens == recomputed.tokens == lora.context == 4096
    assert "rows as long as the model's context, 4,096 tokens, fit" in lora.text()
    monkeypatch.setattr(capacity, "room", lambda: tunesmith.machine.memory.Room(10_000, 0, 0, 0))
    checks = tunesmith.doctor(".", plan=str(tiny_model), overfit=False)["checks"]
    assert [check["value"] for check in checks if check["name"] == "plan"] == ["no setting fits"]
