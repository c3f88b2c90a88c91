"""The command line as a user meets it: output on stdout, progress on stderr, clear errors, documented exit
codes."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import forks
import pytest
import yaml
from typer.testing import CliRunner

import tiny
import tunesmith
from tunesmith import events
from tunesmith.cli import app
from tunesmith.errors import ConfigError, DataError, ModelError, TunesmithError
from tunesmith.machine import backend
from tunesmith.runs import checkpoints
from tunesmith.runs.directory import Run

QUICK = [
    "--set",
    "loop.steps=3",
    "--set",
    "batch.sequences=4",
    "--set",
    "loop.sample_tokens=8",
    "--set",
    "adapter.rank=4",
]


def run(*words: object, code: int = 0, **options):
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False, **options)
    assert result.exit_code == code, result.output
    return result


@pytest.fixture(scope="module")
def rows(tmp_path_factory) -> Path:
    return tiny.write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", tiny.conversations(24))


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tiny_model, rows) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    run("train", "--model", tiny_model, "--data", rows, "--out", out, *QUICK)
    return out


def test_a_run_leaves_behind_what_the_readme_says(trained):
    names = {str(path.relative_to(trained)) for path in trained.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "origin.json",
        "manifest.json",
        "events.jsonl",
        "training.log",
        "report.md",
        "report.json",
        "report.html",
        "report.png",
        "model_card.md",
        "curves.png",
        "data/dropped.jsonl",
        "data/valid.jsonl",
        "data/plan.json",
        "data/rendered.json",
        "checkpoints/index.json",
        "checkpoints/000003/adapters.safetensors",
        "checkpoints/000003/adapter_config.json",
        "checkpoints/000003/optimizer.safetensors",
        "checkpoints/000003/cursor.json",
    } <= names
    assert not [path for path in names if Path(path).suffix in (".pkl", ".pt", ".bin", ".npz")]
    manifest = Run(trained).manifest
    assert manifest["status"] == "completed" and set(manifest["hashes"]) == {"data", "template", "base"}
    assert json.loads((trained / "origin.json").read_text())["adapter.rank"] == "--set"
    rendered = json.loads((trained / "data" / "rendered.json").read_text())
    assert len(rendered) == 5 and any(weight for _, weight in rendered[0]["tokens"])


def test_train_prints_results_on_stdout_and_progress_on_stderr(tiny_model, rows, tmp_path):
    result = run("train", "--model", tiny_model, "--data", rows, "--out", tmp_path / "a", "--json", *QUICK)
    assert json.loads(result.stdout)["status"] == "completed"
    assert "step 3/3" in result.stderr and "validation" in result.stderr and "\x1b" not in result.stderr


def test_dry_run_counts_and_writes_nothing(tiny_model, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    counts = json.loads(run("train", "--model", tiny_model, "--data", rows, "--dry-run", "--json").stdout)
    assert {
        "rows_read",
        "rows_dropped",
        "rows_train",
        "rows_valid",
        "tokens",
        "supervised_tokens",
        "padding_share",
        "steps",
        "trainable",
    } <= counts.keys()
    assert counts["rows_read"] == 24 and counts["trainable"] == 2 * (16 * (64 + 64) + 16 * (64 + 32))
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_without_json_is_a_table_for_people(tiny_model, rows):
    lines = run("train", "--model", tiny_model, "--data", rows, "--dry-run").stdout.splitlines()
    assert "rows                24 read, 19 to train on, 5 held out" in lines
    assert any(re.fullmatch(r"weights +7,168 of 101,568 are trained .*", line) for line in lines)
    assert lines[-1] == "nothing was trained: the same command without --dry-run trains"
    assert not any("{" in line or "_train" in line or "None" in line for line in lines)


def test_a_broken_line_is_told_with_its_place_its_fault_and_what_to_do(tiny_model, rows, tmp_path):
    broken = tmp_path / "broken.jsonl"
    lines = rows.read_text().splitlines()
    broken.write_text("\n".join([*lines[:20], '{"messages": [oops', *lines[20:]]) + "\n")
    result = run("train", "--model", tiny_model, "--data", broken, "--dry-run")
    (line,) = [line for line in result.stderr.splitlines() if "rows left out" in line]
    assert line.startswith(
        f"warning: {broken}:21: rows left out: json: expected one whole JSON object a line"
    )
    assert "at column 15" in line and "hint: mend the line" in line


def test_bad_lines_are_named_kept_and_stop_the_run_when_many(tiny_model, rows, tmp_path):
    bad = tmp_path / "bad.jsonl"
    lines = rows.read_text().splitlines()
    bad.write_text("\n".join([*lines, "{oops", '{"conversations": []}']) + "\n")
    words = ["train", "--model", tiny_model, "--data", bad, "--out", tmp_path / "run", *QUICK]
    with pytest.raises(DataError) as caught:
        run(*words)
    assert (
        "bad.jsonl:25" in str(caught.value)
        and "bad.jsonl:26" in str(caught.value)
        and "hint" in str(caught.value)
    )
    assert not (tmp_path / "run").exists()
    run(*words, "--set", "data.max_dropped=0.2")
    dropped = [
        json.loads(line) for line in (tmp_path / "run" / "data" / "dropped.jsonl").read_text().splitlines()
    ]
    assert [row["source"].rsplit(":", 1)[-1] for row in dropped] == ["25", "26"]
    told = [
        event for event in events.read(tmp_path / "run" / "events.jsonl") if isinstance(event, events.Notice)
    ]
    assert sum(event.count for event in told if event.what.startswith("rows left out")) == 2


def test_undesirable_rows_are_left_out_and_counted(tiny_model, tmp_path):
    labelled = [row | {"label": index % 3 != 0} for index, row in enumerate(tiny.conversations(30))]
    data = tiny.write_rows(tmp_path / "rows.jsonl", labelled)
    counts = json.loads(run("train", "--model", tiny_model, "--data", data, "--dry-run", "--json").stdout)
    assert counts["rows_dropped"] == {"undesirable": 10} and counts["rows_train"] + counts["rows_valid"] == 20
    assert counts["rows_valid"] == 4  # a fifth of each label
    run("train", "--model", tiny_model, "--data", data, "--out", tmp_path / "run", *QUICK)
    dropped = [
        json.loads(line) for line in (tmp_path / "run" / "data" / "dropped.jsonl").read_text().splitlines()
    ]
    assert sorted(int(row["source"].rsplit(":", 1)[-1]) for row in dropped) == list(range(1, 31, 3))
    log = [
        event for event in events.read(tmp_path / "run" / "events.jsonl") if isinstance(event, events.Notice)
    ]
    (notice,) = [event for event in log if event.what == "rows left out: undesirable"]
    assert notice.count == 10 and "objective=kto" in notice.hint


def test_sft_says_that_it_learns_only_the_chosen_answers_of_pairs(tiny_model, tmp_path):
    pairs = [{"prompt": f"the cat {n}", "chosen": f"yes {n}", "rejected": "no"} for n in range(10)]
    words = ["train", "--model", tiny_model, "--data", tiny.write_rows(tmp_path / "pairs.jsonl", pairs)]
    words += ["--dry-run", "--json"]
    (note,) = json.loads(run(*words).stdout)["notes"].items()
    assert note == ("pairs of which only the chosen answer is learned: objective=dpo compares both", 10)
    assert json.loads(run(*words, "--set", "objective=dpo").stdout)["notes"] == {}


def test_one_path_is_not_taken_letter_by_letter(trained):
    assert tunesmith.configure(model="m", data="mine.jsonl").spec.data.train == ("mine.jsonl",)
    assert len(tunesmith.generate(trained, "the cat", max_tokens=2)) == 1


def test_the_reference_preset_trains_on_the_reference_data_at_small_scale(tiny_mistral, syngen, tmp_path):
    words = [
        "train",
        "--preset",
        "mistral-7b-m4-24gb",
        "--model",
        tiny_mistral,
        "--data",
        syngen,
        "--out",
        tmp_path / "run",
    ]
    small = ["--set", "model.quantize=null", "--set", "adapter.rank=4", "--set", "optimizer.warmup_steps=1"]
    counts = json.loads(run(*words, *small, "--dry-run", "--json").stdout)
    assert counts["rows_read"] == 1000 and counts["rows_dropped"]["undesirable"] == 254
    kept = counts["rows_train"] + counts["rows_valid"]
    assert kept + sum(counts["rows_dropped"].values()) == 1000 and kept >= 740
    assert abs(counts["rows_valid"] / kept - 0.2) < 0.02
    few = tiny.write_rows(
        tmp_path / "few.jsonl", [json.loads(line) for line in syngen.read_text().splitlines()[:40]]
    )
    words[words.index("--data") + 1] = few
    run(*words, *small, "--set", "loop.steps=2", "--set", "loop.sample_tokens=4")
    assert Run.open(tmp_path / "run").manifest["status"] == "completed"


def test_show_prints_what_is_learned(tiny_model, tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes, you"}]
    data = tiny.write_rows(tmp_path / "x.jsonl", [{"messages": turns}])
    shown = run("show", data, "--model", tiny_model).stdout
    assert "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n⟦yes, you<|im_end|>⟧" in shown
    row = json.loads(run("show", data, "--tokenizer", "mistral-v3", "--json").stdout)
    assert row["ids"][:2] == [1, 3] and row["ids"][-1] == 2
    assert row["targets"] == [0.0] * (row["ids"].index(4) + 1) + [1.0] * (
        len(row["ids"]) - row["ids"].index(4) - 1
    )


def test_show_counts_the_rows_that_it_leaves_out_beside_those_that_it_shows(tiny_model, tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yes, you"}]
    data = tiny.write_rows(tmp_path / "x.jsonl", [{"messages": turns}] * 3)
    data.write_text("{\n" + data.read_text())
    summary = run("show", data, "--model", tiny_model, "--limit", "2").stderr
    assert "2 rows shown of the first 2 that can be read, 1 left out" in summary


def test_generate_and_chat_speak_as_the_run(trained, tiny_model):
    words = ["generate", trained, "the cat", "--prompt", "read my note", "--max-tokens", 8, "--json"]
    answers = [json.loads(line) for line in run(*words).stdout.splitlines()]
    assert [answer["prompt"] for answer in answers] == ["the cat", "read my note"]
    assert answers == [json.loads(line) for line in run(*words, "--checkpoint", "3").stdout.splitlines()]
    folder = [
        json.loads(line)
        for line in run("generate", trained / "checkpoints" / "000003", *words[2:]).stdout.splitlines()
    ]
    assert folder == answers
    said = run("chat", trained, "--max-tokens", 8, input="the cat\n\n").stdout
    assert said.rstrip("\n") == answers[0]["answer"].rstrip("\n")
    base = run("generate", trained, "--prompt", "the cat", "--max-tokens", 8, "--base").stdout
    assert base == run("generate", tiny_model, "--prompt", "the cat", "--max-tokens", 8).stdout


def test_an_interrupted_evaluation_says_what_is_kept(trained, monkeypatch):
    def stop(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(tunesmith, "evaluate", stop)
    done = CliRunner().invoke(app, ["evaluate", str(trained)])
    assert done.exit_code == 130
    assert done.stderr == "interrupted; what was measured is kept, and the same command goes on\n"


@pytest.mark.parametrize(
    ("status", "hint"), [("running", "hint: while it trains, wait; else: "), ("interrupted", "hint: ")]
)
def test_a_run_without_a_checkpoint_says_what_to_do(trained, tmp_path, status, hint):
    young = Path(shutil.copytree(trained, tmp_path / "young", ignore=shutil.ignore_patterns("0*")))
    Run.open(young).mark(status)
    with pytest.raises(DataError, match=f"has no checkpoint yet\n{re.escape(hint)}tunesmith train --resume"):
        checkpoints.choose(Run.open(young))
    with pytest.raises(DataError, match="nowhere: not a run: there is no such folder"):
        Run.open("nowhere")


def test_evaluate_scores_base_and_tuned_on_the_held_out_rows(trained):
    found = json.loads(run("evaluate", trained, "--json").stdout)
    assert {score["task"].partition(".")[0] for score in found["scores"]} >= {
        "perplexity",
        "adherence",
        "drift",
        "efficiency",
    }
    scores = {
        score["name"]: score
        for score in found["scores"]
        if score["task"] == "perplexity" and score["part"] is None
    }
    log = [event for event in events.read(trained / "events.jsonl") if isinstance(event, events.Validated)]
    assert scores["loss"]["value"] == pytest.approx(log[-1].loss, rel=1e-5)
    assert scores["loss"]["base"] == pytest.approx(log[0].loss, rel=1e-5)
    assert scores["perplexity"]["value"] == pytest.approx(2.718281828459045 ** log[-1].loss, rel=1e-5)
    before = (trained / "evals" / "perplexity@1" / "score.json").read_text()
    run("evaluate", trained, "--limit", 1, "--no-base", "--task", "perplexity")
    assert (trained / "evals" / "perplexity@1" / "score.json").read_text() == before, (
        "a part replaced the evidence"
    )
    assert (trained / "evals" / "perplexity@1+first1+tuned" / "score.json").exists()
    assert (
        len((trained / "evals" / "perplexity@1" / "examples.jsonl").read_text().splitlines()) == log[0].rows
    )


def test_evaluate_answers_tool_calls(tiny_model, trained, tmp_path):
    turns = [
        {"role": "user", "content": "note milk"},
        {"role": "assistant", "content": 'tool_call: note\narguments: {"a": 1}'},
    ]
    data = tiny.write_rows(tmp_path / "calls.jsonl", [{"conversations": turns}, *tiny.conversations(2)])
    found = json.loads(
        run("evaluate", trained, "--data", data, "--max-tokens", 6, "--no-base", "--json").stdout
    )
    scores = {score["name"]: score for score in found["scores"]}
    assert (
        scores["well_formed"]["n"] == 1
        and scores["well_formed"]["value"] == 0
        and scores["tool_calls"]["delta"] is None
    )


def test_init_writes_settings_that_load(tmp_path, tiny_model, rows):
    text = run("init", "--preset", "smollm2-demo", "--model", tiny_model, "--data", rows).stdout
    (tmp_path / "run.yaml").write_text(text)
    settings = tunesmith.configure(config=[tmp_path / "run.yaml"])
    assert settings.spec.adapter.targets == ("all-linear",) and settings.spec.model.path == str(tiny_model)
    assert text.count("#") > 60 and "required" in run("init").stdout
    assert "smollm2-demo" in run("init", "--presets").stdout
    assert "smollm2-demo" in json.loads(run("init", "--presets", "--json").stdout)
    assert "batch" in json.loads(run("init", "--schema").stdout)["properties"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["train", "--model", "m", "--data", "x", "--set", "adapter.rnak=8"], 2, "adapter.rank"),
        (["train", "--model", "m", "--data", "x", "--set", "adapter.rank=0"], 2, "adapter.rank"),
        (["train", "--preset", "mistral-7b-m4-24gb", "--data", "x", "--set", "data.valid=0"], 2, "keep_best"),
        (["train", "--preset", "mistral", "--data", "x"], 2, "mistral-7b"),
        (["train", "--model", "m", "--data", "nowhere.jsonl"], 3, "nowhere.jsonl"),
        (["train", "--resume", "nowhere"], 3, "nowhere"),
        (["train", "--model", "m", "--data", "x", "--out", "/dev/null/x/y"], 3, "/dev/null/x/y"),
        (["train", "--model", "m", "--data", "x", "--out", "/proc", "--dry-run"], 3, "exists already"),
        (["generate", "nowhere", "--prompt", "x"], 5, "nowhere"),
        (["generate", "runs/nosuch", "x"], 3, "runs/nosuch: is not a run"),
        (["generate", "nowhere", "--prompt", "x", "--base"], 2, "plain model"),
    ],
)
def test_errors_say_what_where_and_a_hint_without_a_traceback(words, code, told, tmp_path):
    done = forks.run([sys.executable, "-m", "tunesmith", *words], cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert told in done.stderr and "Traceback" not in done.stderr and done.stdout == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux chooses a BLAS")
def test_the_fast_blas_is_opened_before_mlx_by_the_program_and_by_the_api(tiny_model, rows, tmp_path):
    """Whatever imports MLX first decides: a module loaded a line too early makes everything fifty times
    slower."""
    program = [
        sys.executable,
        "-m",
        "tunesmith",
        "train",
        "--model",
        tiny_model,
        "--data",
        rows,
        "--out",
        tmp_path / "a",
        *QUICK,
    ]
    settings = f"model={str(tiny_model)!r}, data=[{str(rows)!r}], sets={QUICK[1::2]!r}"
    api = f"import tunesmith; tunesmith.train(tunesmith.configure({settings}), out='b')"
    chosen = backend.setup().blas
    assert backend.prepare.__wrapped__()[0] == "unknown", "what is said when MLX came first"
    for module in ("runs.directory", "training.story", "reports", "demo.__main__", "adapters.layers"):
        code = (
            f"import tunesmith.{module}; from tunesmith.machine import backend; print(backend.setup().blas)"
        )
        told = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout.strip()
        assert told == chosen, module
    for command, name in ((program, "a"), ([sys.executable, "-c", api], "b")):
        subprocess.run(list(map(str, command)), check=True, capture_output=True, cwd=tmp_path)
        assert Run.open(tmp_path / name).manifest["machine"]["blas"] == chosen != "unknown"


def test_a_base_that_has_changed_is_refused(tiny_model, rows, tmp_path):
    model = tmp_path / "model"
    shutil.copytree(tiny_model, model)
    run("train", "--model", model, "--data", rows, "--out", tmp_path / "run", *QUICK)
    tiny.write_model(model, json.loads((model / "config.json").read_text())["vocab_size"], seed=5)
    for words in (["evaluate", tmp_path / "run"], ["generate", tmp_path / "run", "--prompt", "x"]):
        with pytest.raises(ModelError, match="the base changed since this run was trained"):
            run(*words)


def test_a_checkpoint_that_is_not_there_is_named(trained):
    with pytest.raises(DataError, match="no checkpoint foo"):
        run("generate", trained, "--prompt", "x", "--checkpoint", "foo")


def test_a_run_is_resumed_from_any_folder(tiny_model, rows, tmp_path, monkeypatch):
    monkeypatch.chdir(rows.parent)
    run("train", "--model", tiny_model, "--data", rows.name, "--out", tmp_path / "run", *QUICK)
    Run(tmp_path / "run").mark("running")
    monkeypatch.chdir(tmp_path)
    assert "completed" in run("train", "--resume", "run").stderr


def test_the_rejected_side_of_a_preference_is_neither_learned_nor_measured(tiny_model, tmp_path):
    long = " ".join(["note"] * 200)
    pairs = [{"prompt": f"the cat {at}", "chosen": f"yes {at}", "rejected": long} for at in range(10)]
    data = tiny.write_rows(tmp_path / "pairs.jsonl", pairs)
    words = [
        "train",
        "--model",
        tiny_model,
        "--data",
        data,
        "--dry-run",
        "--json",
        "--set",
        "batch.length=64",
    ]
    counts = json.loads(run(*words).stdout)
    assert counts["rows_dropped"] == {} and counts["sequences_train"] == 8


def test_an_answer_left_out_of_a_conversation_leaves_its_other_answers_and_every_count_right(
    tiny_mistral, tmp_path
):
    rows = []
    for at in range(12):
        last = " ".join(["music"] * (90 if at % 4 == 0 else 2))
        turns = [
            ("system", "be kind"),
            ("user", f"hi {at}"),
            ("assistant", "yes"),
            ("user", "and?"),
            ("assistant", last),
        ]
        rows.append({"messages": [{"role": role, "content": content} for role, content in turns]})
    data = tiny.write_rows(tmp_path / "rows.jsonl", rows)
    words = [
        "--model",
        tiny_mistral,
        "--data",
        data,
        "--set",
        "template.too_long=drop",
        "--set",
        "batch.length=60",
    ]
    words += ["--set", "data.max_dropped=0.3"]
    counts = json.loads(run("train", *words, "--dry-run", "--json").stdout)
    assert counts["rows_train"] + counts["rows_valid"] == 12 and counts["rows_dropped"] == {}
    assert counts["sequences_train"] + counts["sequences_valid"] == 24 - 3
    assert counts["notes"]["answers left out: too_long"] == 3
    run("train", *words, "--out", tmp_path / "run", *QUICK)
    found = json.loads(run("evaluate", tmp_path / "run", "--task", "perplexity", "--json").stdout)
    log = [
        event
        for event in events.read(tmp_path / "run" / "events.jsonl")
        if isinstance(event, events.Validated)
    ]
    loss = next(score for score in found["scores"] if score["name"] == "loss")
    assert loss["value"] == pytest.approx(log[-1].loss, rel=1e-5)


def test_show_reads_the_settings_that_train_reads(tiny_model, tmp_path, monkeypatch):
    turns = [("user", "a"), ("assistant", "yes"), ("user", "b"), ("assistant", "you")]
    row = {"messages": [{"role": role, "content": content} for role, content in turns]}
    data = tiny.write_rows(tmp_path / "x.jsonl", [row])
    assert run("show", data, "--model", tiny_model).stdout.count("⟦") == 2
    monkeypatch.setenv("TUNESMITH_TEMPLATE__LEARN", "last")
    assert run("show", data, "--model", tiny_model).stdout.count("⟦") == 1


def test_resume_takes_no_other_settings(trained):
    with pytest.raises(ConfigError, match="takes its settings from the run"):
        run("train", "--resume", trained, "--model", "x")


def test_resuming_a_finished_run_changes_nothing(trained):
    before = (trained / "events.jsonl").read_bytes()
    run("train", "--resume", trained)
    assert (trained / "events.jsonl").read_bytes() == before


def test_contradictions_and_poor_choices():
    base = {"model": "m", "data": ["x"]}
    with pytest.raises(ConfigError, match="early_stop"):
        tunesmith.configure(**base, sets=["data.valid=0", "loop.early_stop=2"])
    with pytest.raises(ConfigError, match="larger than sequences"):
        tunesmith.configure(**base, sets=["batch.micro=9"])
    (nothing,) = tunesmith.configure(**base, sets=["data.valid=0"]).spec.warnings()
    assert "nothing is held out" in nothing
    with pytest.raises(ConfigError, match="validate_every"):
        tunesmith.configure(**base, sets=["loop.early_stop=2", "loop.validate_every=0"])
    with pytest.raises(ConfigError, match="betas"):
        tunesmith.configure(**base, sets=["optimizer.betas=[0.9, 1.0]"])
    with pytest.raises(ConfigError, match="exclude each other"):
        tunesmith.configure(**base, sets=["loop.compile=true", "batch.pack=true"])
    high = tunesmith.configure(**base, sets=["adapter=full"]).spec.warnings()
    assert len(high) == 1 and "1e-5 is usual" in high[0]


def test_the_environment_is_a_layer(tiny_model, rows, monkeypatch):
    monkeypatch.setenv("TUNESMITH_LOOP__STEPS", "7")
    assert (
        json.loads(run("train", "--model", tiny_model, "--data", rows, "--dry-run", "--json").stdout)["steps"]
        == 7
    )


def test_every_command_in_the_readme_exists():
    root = Path(__file__).resolve().parents[2]
    text = (root / "README.md").read_text()
    verbs = set(re.findall(r"^tunesmith (\w+)", text, re.MULTILINE))
    known = {command.name or command.callback.__name__ for command in app.registered_commands}
    known |= {group.typer_instance.info.name for group in app.registered_groups}
    assert {"doctor", "show", "train", "evaluate", "chat"} <= verbs <= known
    makefile = (root / "Makefile").read_text()
    targets = set(re.findall(r"make (\w+)", text))
    assert {"demo", "test"} <= targets and all(
        re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets
    )
    for name in tunesmith.__all__:
        assert callable(getattr(tunesmith, name))
    functions = {"list_runs", "lineage", "prune"}  # of runs, runs show, runs prune
    assert known - {"init", "runs"} | functions <= set(tunesmith.__all__)
    assert yaml.safe_load(tunesmith.init(model="m", data=["x"]))["model"]["path"] == "m"
    assert issubclass(ConfigError, TunesmithError)
