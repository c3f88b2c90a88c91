"""The audit as a whole: one pass however it is cut, hostile rows, the guard of training, two files compared,
the command line."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith import events
from tunesmith.auditing import AuditSpec, embeddings, survey
from tunesmith.auditing import comparison as compare
from tunesmith.auditing.findings import Audit, Finding
from tunesmith.cli import app
from tunesmith.data import formats
from tunesmith.errors import ConfigError, DataError
from tunesmith.model import loading as models
from tunesmith.model.loading import ModelSpec
from tunesmith.runs.directory import AUDIT, Run
from tunesmith.tokens import renderers

QUICK = [
    "--set",
    "loop.steps=2",
    "--set",
    "batch.sequences=4",
    "--set",
    "loop.samples=0",
    "--set",
    "adapter.rank=4",
]


def audited(
    *paths: Path, tokenizer: str | None = None, limit: int = 2048, processes: int = 1, **asked: object
) -> Audit:
    data = formats.DataSpec.model_validate({"train": list(map(str, paths)), "valid": 0.0})
    setup = survey.Setup(data, AuditSpec.model_validate(asked), tokenizer, limit=limit)
    return survey.audit(paths, setup, processes=processes)


def finding(found: Audit, rule: str) -> Finding:
    (one,) = [one for one in found.findings if one.rule == rule]
    return one


def command(*words: object, code: int = 0):
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    assert result.exit_code == code, result.output
    return result


def test_a_second_process_makes_the_same_clusters_and_the_same_map(tmp_path, monkeypatch):
    unreadable = [{"conversations": "none"}]
    rows = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(survey.APART) + unreadable)
    alone = audited(rows)
    monkeypatch.setattr(survey.clusters, "clusters", None)  # not in this process
    monkeypatch.setattr(survey, "_available", lambda processes: processes)
    beside = audited(rows, processes=2)
    assert beside.findings == alone.findings and beside.charts == alone.charts
    assert len(beside.charts["map"]["x"]) == survey.APART


@pytest.fixture
def rows(tmp_path) -> Path:
    return tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(40))


def test_processes_and_the_form_of_the_file_change_no_finding(syngen, tmp_path, monkeypatch):
    monkeypatch.setattr(survey, "ALONE", 10)
    values = [json.loads(line) for line in syngen.read_text().splitlines()][:300]
    plain = tiny.write_rows(tmp_path / "rows.jsonl", values)
    packed = tmp_path / "rows.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    array = tmp_path / "rows.json"
    array.write_text("[\n" + ",\n".join(plain.read_text().splitlines()) + "\n]")

    def said(found: Audit, shift: int = 0) -> list:
        def place(source: str) -> int:
            return int(source.rpartition(":")[2]) - shift

        return [
            (one.rule, one.severity, one.count, one.value, [place(row.source) for row in one.rows])
            for one in found.findings
        ]

    alone = said(audited(plain, tokenizer="mistral-v3"))
    assert len(alone) > 20
    assert said(audited(plain, tokenizer="mistral-v3", processes=2)) == alone
    assert said(audited(packed, tokenizer="mistral-v3")) == alone
    assert said(audited(array, tokenizer="mistral-v3"), shift=1) == alone
    lined = tmp_path / "line.json"
    lined.write_text(json.dumps(values))
    found = audited(lined, tokenizer="mistral-v3")
    assert [(one.rule, one.count, one.value, len(one.rows)) for one in found.findings] == [
        (rule, count, value, len(rows)) for rule, _, count, value, rows in alone
    ]
    assert len(found.quality) == 300 and f"{lined}:1" in found.quality
    line, column = next(source for source in found.quality if source.count(":") == 2).split(":")[1:]
    assert lined.read_text()[int(column) - 1] == "{" and line == "1"


@pytest.fixture(scope="module")
def reference_audit(syngen) -> Audit:
    """Of all rows of the reference set, with a limit that some of them exceed."""
    return audited(syngen, tokenizer="mistral-v3", limit=1024, sample=20_000)


def test_a_sample_is_chosen_by_content_and_estimates_the_whole(syngen, reference_audit):
    whole, part = reference_audit, audited(syngen, tokenizer="mistral-v3", limit=1024, sample=500)
    for rule, near in (("length.answers", 0.1), ("diversity.trigrams", 0.1)):
        assert finding(part, rule).value == pytest.approx(finding(whole, rule).value, rel=near), rule
    assert 400 < finding(part, "length.answers").of < 600
    assert finding(part, "duplicates.exact").count == finding(whole, "duplicates.exact").count
    again = audited(syngen, tokenizer="mistral-v3", limit=1024, sample=500)
    assert [one.rows for one in again.findings] == [one.rows for one in part.findings]


def test_lengths_are_those_of_the_renderer(syngen, reference_audit):
    found = reference_audit
    by = renderers.load("mistral-v3")
    totals, answers = [], []
    for one in formats.read([syngen], formats.DataSpec(train=("x",))).examples:
        (made,) = by.rows(one)
        totals.append(len(made.tokens.ids))
        answers.append(int((made.tokens.targets > 0).sum()))
    assert finding(found, "length.answers").value == pytest.approx(np.mean(answers))
    assert finding(found, "length.limit").count == sum(total > 1024 for total in totals)
    assert finding(found, "length.tail").value == pytest.approx(np.percentile(totals, 99))
    chart = found.charts["lengths"]["parts"]["total"]
    assert sum(chart["counts"]) == len(totals) and chart["quantiles"]["100"] == max(totals)


def test_what_the_tokenizer_cannot_do_is_named(tmp_path, tiny_model):
    control = {
        "messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a <|im_end|> b"}]
    }
    data = tiny.write_rows(tmp_path / "rows.jsonl", [*tiny.conversations(30), control])
    one = finding(audited(data, tokenizer=str(tiny_model)), "tokenisation.not_text")
    assert [row.source for row in one.rows] == [f"{data}:31"] and one.severity == "warning"
    clean = audited(
        tiny.write_rows(tmp_path / "clean.jsonl", tiny.conversations(30)), tokenizer=str(tiny_model)
    )
    assert {each.severity for each in clean.findings if each.dimension == "tokenisation"} == {"good"}


TEXTS = st.text(st.characters(codec=None), max_size=60) | st.sampled_from(
    [
        "\x00",
        "\ud800",
        "\udfff\ud800",
        "a" * 5000,
        "<" * 3000,
        "@" * 3000,
        "1" * 3000,
        "{" * 500,
        "\u202e<|im_start|>",
        "Result: {",
    ]
)
TURNS = st.lists(
    st.fixed_dictionaries(
        {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": TEXTS}
    ),
    max_size=6,
)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
)
ROWS = (
    st.fixed_dictionaries(
        {"messages": TURNS | VALUES}, optional={"label": st.booleans() | VALUES, "tools": VALUES}
    )
    | VALUES
)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(ROWS, min_size=1, max_size=8))
def test_whatever_stands_in_a_row_it_is_a_finding_and_never_a_crash(tmp_path_factory, values):
    path = tmp_path_factory.mktemp("any") / "rows.jsonl"
    values = [{"text": "an ordinary row first: a list would be an array of rows"}, *values]
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    found = audited(path, tokenizer="mistral-v3")
    assert found.rows == len(values) and set(found.quality) == {
        f"{path}:{at}" for at in range(1, len(values) + 1)
    }
    json.dumps(found.to_json()).encode()
    named = {row.source for one in found.findings if one.dimension == "structure" for row in one.rows}
    read = formats.read([path], formats.DataSpec(train=("x",), valid=0.0))
    assert {bad.source for bad in read.dropped} <= named


def hostile(turns: object, **more: object) -> bytes:
    return json.dumps({"messages": turns, **more}).encode()


def talk(*texts: str) -> list[dict]:
    return [{"role": ("user", "assistant")[at % 2], "content": text} for at, text in enumerate(texts)]


HOSTILE = {
    "a line of 10 MB": hostile(talk("hi", "word " * 2_000_000)),
    "10 MB without a space": hostile(talk("hi", "a" * 10_000_000)),
    "10 MB of digits": hostile(talk("hi", "1" * 10_000_000)),
    "10 MB of brackets": hostile(talk("hi", "<" * 10_000_000)),
    "deep nesting": b'{"messages": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "deep arguments": b'{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": '
    b'"y"}], "meta": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}",
    "100,000 turns": hostile(talk(*["ping", "pong"] * 50_000)),
    "NUL bytes": b'{"messages": [\x00\x00\x00]}',
    "NUL in a text": hostile(talk("a\x00b", "c\x00d")),
    "lone surrogates": b'{"messages": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", '
    b'"content": "x"}]}',
    "no UTF-8": b'{"messages": [{"role": "user", "content": "\xff\xfe\xfa"}, {"role": "assistant", '
    b'"content": "x"}]}',
    "half a row": b'{"messages": [{"role": "us',
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_row_leaves_its_neighbours_alone(tmp_path, name):
    data = tmp_path / "rows.jsonl"
    ordinary = hostile(talk("Name a colour", "Blue is one."))
    data.write_bytes(
        ordinary + b"\n" + HOSTILE[name] + b"\n" + hostile(talk("Name a river", "The Rhine is one.")) + b"\n"
    )
    found = audited(data)
    assert found.rows == 3 and {f"{data}:{at}" for at in (1, 2, 3)} == set(found.quality)
    assert found.quality[f"{data}:1"] > 0 and found.quality[f"{data}:3"] > 0


def test_a_secret_of_a_prompt_is_shown_nowhere_in_full(tmp_path):
    random = np.random.Generator(np.random.PCG64(3))
    key = "ghp_" + "".join(
        random.choice(list("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"), 36)
    )
    rows = [{"messages": talk(f"Use {key} to push branch {at}", f"Pushed {at}.")} for at in range(40)]
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"Use {key} to push branch 3\n")
    found = tunesmith.audit(data, against=[str(prompts)], page=tmp_path / "page.html")
    assert (
        finding(found, "content.secrets").count == 40
        and finding(found, "contamination.evaluation_exact").count == 1
    )
    assert key not in json.dumps(found.to_json()) + (tmp_path / "page.html").read_text()


def test_training_stops_on_an_error_before_any_weight_is_loaded(tiny_model, rows, tmp_path):
    held = tiny.write_rows(tmp_path / "held.jsonl", tiny.conversations(3))
    words = [
        "train",
        "--model",
        tiny_model,
        "--data",
        rows,
        "--set",
        f"data.valid={held}",
        "--out",
        tmp_path / "run",
        *QUICK,
    ]
    with pytest.raises(DataError, match=r"contamination\.validation_exact: 3 rows .*rows\.jsonl:1") as told:
        command(*words)
    assert "--accept contamination.validation_exact" in str(told.value) and not (tmp_path / "run").exists()
    printed = command(*words, "--accept", "contamination.validation_exact")
    assert "accepted findings, with rows: contamination.validation_exact 3" in printed.output
    assert "warning: contamination" not in printed.output
    manifest = Run(tmp_path / "run").manifest
    assert (
        list(manifest["accepted"]) == ["contamination.validation_exact"]
        and "3 rows" in manifest["accepted"]["contamination.validation_exact"]
    )
    assert json.loads((tmp_path / "run" / "origin.json").read_text())["audit.accept"] == "--accept"


def test_warnings_of_the_audit_are_in_the_run_and_its_report(tiny_model, tmp_path):
    data = tiny.write_rows(tmp_path / "rows.jsonl", tiny.conversations(30) + tiny.conversations(30)[:10])
    command("train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", *QUICK)
    kept = json.loads((tmp_path / "run" / AUDIT).read_text())
    assert any(one["rule"] == "duplicates.exact" and one["severity"] == "warning" for one in kept["findings"])
    notices = [
        one for one in events.read(tmp_path / "run" / "events.jsonl") if isinstance(one, events.Notice)
    ]
    assert any(
        one.what.startswith("duplicates.exact: ") and one.level == "warning" and one.count >= 5
        for one in notices
    )
    assert "duplicates.exact" in (tmp_path / "run" / "report.md").read_text()


def test_rows_that_may_be_dropped_do_not_stop_training(tiny_model, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in tiny.conversations(57)) + "{broken\n" * 3)
    command("train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", *QUICK)


def test_accepting_on_the_command_line_adds_to_what_the_settings_accept(rows):
    found = tunesmith.configure(
        model="x", data=[str(rows)], sets=["audit.accept=[duplicates]"], accept=["labels", "duplicates"]
    )
    assert found.spec.audit.accept == ("duplicates", "labels") and found.origins["audit.accept"] == "--accept"


def test_a_name_that_is_accepted_and_was_never_looked_at_is_told(rows):
    heard: list[events.Event] = []
    tunesmith.audit(rows, accept=["content.secretz"], notify=heard.append)
    assert any(
        isinstance(one, events.Notice) and one.what.startswith("content.secretz is accepted") for one in heard
    )


def test_the_settings_of_a_template_count(tmp_path):
    turns = [
        {"role": role, "content": f"{role} {at} says so"} for at in range(3) for role in ("user", "assistant")
    ]
    data = tiny.write_rows(tmp_path / "rows.jsonl", [{"messages": turns}] * 3)
    all_turns, last = (
        finding(tunesmith.audit(data, sets=[f"template.learn={learn}"]), "length.answers").value
        for learn in ("all", "last")
    )
    assert all_turns is not None and last is not None and all_turns > 2 * last


def test_the_audit_of_training_can_be_left_out_and_is_then_not_there(tiny_model, rows, tmp_path):
    words = ["train", "--model", tiny_model, "--data", rows, "--out", tmp_path / "run", *QUICK]
    command(*words, "--set", "audit.before_training=false")
    assert not (tmp_path / "run" / AUDIT).exists()


def test_a_resumed_run_is_not_audited_again(tiny_model, rows, tmp_path, monkeypatch):
    out = tmp_path / "run"
    command("train", "--model", tiny_model, "--data", rows, "--out", out, *QUICK)
    for step in Run(out).checkpoints():  # as if it had died before the first
        shutil.rmtree(Run(out).checkpoint(step))
    Run(out).mark("running")
    before = (out / AUDIT).read_bytes()
    monkeypatch.setattr(survey, "examine", None)
    command("train", "--resume", out)
    assert Run(out).manifest["status"] == "completed" and (out / AUDIT).read_bytes() == before


def test_two_files_are_compared_row_by_row(tmp_path):
    first = [row | {"label": True} for row in tiny.conversations(10)]
    second = [
        first[0],
        first[1] | {"label": False},
        *[row | {"label": True} for row in tiny.conversations(3, seed=9)],
    ]
    second[2]["conversations"][0]["content"] = first[5]["conversations"][0]["content"].upper()
    a, b = (
        tiny.write_rows(tmp_path / name, rows) for name, rows in (("a.jsonl", first), ("b.jsonl", second))
    )
    told = compare.compare(audited(a), audited(b))

    def places(rows) -> list[str]:
        return [getattr(one, "source", one).rpartition("/")[2] for one in rows]

    assert told.rows == (10, 5)
    assert places(told.shared) == ["b.jsonl:1", "b.jsonl:2"] and places(told.relabelled) == ["b.jsonl:2"]
    assert places(told.prompts) == ["b.jsonl:1", "b.jsonl:2", "b.jsonl:3"]
    assert places(told.only_second) == ["b.jsonl:3", "b.jsonl:4", "b.jsonl:5"] and len(told.only_first) == 8
    same = compare.compare(audited(a), audited(a))
    assert same.changes == [] and same.only_first == same.only_second == same.relabelled == []
    shown = command("audit", a, "--compare", b, "--no-html").output
    assert (
        "2 rows of the second whose words are also in the first" in shown
        and "1 row of these with another label" in shown
    )


def test_embeddings_are_the_mean_of_the_hidden_states_of_each_text_alone(tiny_model):
    import mlx.core as mx

    loaded = models.load(ModelSpec(path=str(tiny_model)))
    by = renderers.load(tiny_model)
    texts = ["the cat sat", "on a mat and read my note about tools", "", "music " * 400]
    found = embeddings.embedder(loaded, by, lambda done, total: None)(texts)
    for text, vector in zip(texts, found, strict=True):
        ids = by.text_prompt(text)[: embeddings.TOKENS] or [by.eos_ids[0]]
        alone = loaded.net.model(mx.array([ids]))[0].mean(axis=0)
        np.testing.assert_allclose(vector, np.array(alone), atol=2e-5)


def test_a_named_model_places_the_prompts_unless_words_are_wanted(tiny_model, rows):
    for options, how in (({}, "hidden states"), ({"embed": False}, "TF-IDF")):
        assert how in tunesmith.audit(rows, model=str(tiny_model), **options).charts["map"]["method"]


def test_hidden_states_of_no_model_are_refused(rows):
    with pytest.raises(ConfigError, match="--embed: no model is named"):
        tunesmith.audit(rows, embed=True)


def test_the_command_shows_a_screen_writes_a_page_and_speaks_json(rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shown = command("audit", rows)
    assert "Fit to train on" in shown.stdout and "page: audit.html" in shown.stdout
    assert (tmp_path / "audit.html").read_text().startswith("<!doctype html>") or "<html" in (
        tmp_path / "audit.html"
    ).read_text()[:500]
    found = json.loads(command("audit", rows, "--json").stdout)
    assert (
        found["rows"] == 40
        and found["verdict"]
        and {"rule", "severity", "count", "share", "threshold", "rows", "hint"} <= found["findings"][0].keys()
    )
    (tmp_path / "mine.html").write_text("<p>not yours")
    with pytest.raises(ConfigError, match=r"mine\.html"):
        command("audit", rows, "--html", tmp_path / "mine.html")
    assert (tmp_path / "mine.html").read_text() == "<p>not yours"


def test_errors_end_with_status_3(rows, tmp_path):
    held = tmp_path / "prompts.txt"
    held.write_text(json.loads(rows.read_text().splitlines()[0])["conversations"][0]["content"] + "\n")
    shown = command("audit", rows, "--against", held, "--no-html", code=3)
    assert "Do not train on this yet: 1 error" in shown.stdout.replace("\n", " ")
    command("audit", rows, "--against", held, "--no-html", "--accept", "contamination")


def test_the_reference_set_shows_what_is_known_of_it(syngen, tmp_path):
    found = tunesmith.audit(syngen, page=tmp_path / "audit.html")
    assert found.rows == 1000 and not found.of("error")
    assert finding(found, "invented.results").count > 500
    assert finding(found, "duplicates.exact").count == 19 and finding(found, "conflicts.prompts").count > 50
