"""The full examination: stages find what is wrong, a stage that crashes is one line, and the file has nothing
private."""

from __future__ import annotations

import getpass
import json
import re
import socket
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from tunesmith import events
from tunesmith.cli import app
from tunesmith.machine import backend
from tunesmith.preflight import doctor
from tunesmith.preflight.goldens import compared as goldens
from tunesmith.preflight.thorough import laws, report, results, speed, stages
from tunesmith.preflight.thorough.speed import Scale

SMALL = Scale(small=True)


def examined(stage: str) -> tuple[results.StageResult, list[dict]]:
    lines: list[dict] = []
    return stages.examined(stage, SMALL, lines.append), lines


def in_process(monkeypatch) -> None:
    """Stages run in this process, which has loaded everything already."""

    def run(stage, small, notify=events.silent):
        return stages.examined(stage, Scale(small), lambda line: None)

    monkeypatch.setattr(report, "run", run)


@pytest.mark.parametrize("stage", [name for name in report.STAGES if name != "serving"])
def test_a_stage_holds_and_counts_its_units(stage):
    result, lines = examined(stage)
    assert result["status"] == "ok", result["reason"]
    assert all(map(results.holds, result["deviations"])), result["deviations"]
    assert result["deviations"] or result["figures"]
    assert all(np.isfinite(figure["value"]) and figure["value"] > 0 for figure in result["figures"])
    assert lines[0] == {"units": lines[-1]["done"]}


def test_every_stage_has_a_title():
    assert report.STAGES.keys() == stages.STAGES.keys()


def test_the_server_is_measured_as_users_start_it():
    result, lines = examined("serving")
    assert result["status"] == "ok", result["reason"]
    assert [found["error"] for found in result["deviations"]] == [0]
    assert {figure["name"] for figure in result["figures"]} >= {"serving.tokens", "serving.first_token.p95"}
    assert lines[0] == {"units": 2} and lines[-1] == {"done": 2}


@pytest.mark.parametrize("law", laws.laws(), ids=lambda law: law.name.replace(" ", "_"))
def test_a_law_notices_a_small_error(law):
    """Of one part in ten thousand, in the value alone."""
    off = law._replace(computed=lambda *arrays: law.computed(*arrays) * (1 + 1e-4))
    limit = laws.LIMITS[mx.float32]
    assert laws.error(law, mx.float32) <= limit < laws.error(off, mx.float32)
    lost = law._replace(computed=lambda *arrays: law.computed(*arrays) * mx.array(float("nan")))
    assert np.isnan(laws.error(lost, mx.float32))


def test_the_goldens_notice_another_adapter(monkeypatch):
    exact = goldens.attach

    def attach(net):
        exact(net)
        net.layers[0].self_attn.q_proj.scale = net.layers[0].self_attn.q_proj.scale * 1.01

    monkeypatch.setattr(goldens, "attach", attach)
    result, _ = examined("goldens")
    broken = [found["what"] for found in result["deviations"] if not results.holds(found)]
    assert {"sft: gradients", "kto: gradients", "simpo: gradients"} <= set(broken)


def test_an_error_that_is_not_finite_is_a_failure():
    lost = results.deviation("x", float("nan"), 1.0)
    assert lost["error"] is None and not results.holds(lost)
    assert not results.holds(results.deviation("x", float("inf"), 1.0))
    assert results.holds(results.deviation("x", 1.0, 1.0))


def test_a_stage_that_raises_is_a_failure_with_its_reason(monkeypatch):
    def broken(scale, tick):
        raise RuntimeError("[metal] no device")

    monkeypatch.setitem(stages.STAGES, "laws", stages.Stage(lambda scale: 1, broken))
    result, _ = examined("laws")
    assert (result["status"], result["reason"]) == ("fail", "RuntimeError: [metal] no device")


def test_a_machine_without_the_memory_skips_the_stage(monkeypatch):
    room = speed.room()
    full_room = type(room)(room.ceiling, room.ceiling, room.program, room.swap)
    monkeypatch.setattr(speed, "room", lambda: full_room)
    result, _ = examined("wide")
    assert result["status"] == "skipped" and "0.0 GB are free" in str(result["reason"])


CRASHES = {
    "os._exit(3)": "its process crashed: exit status 3: native words",
    "os.kill(os.getpid(), 9)": "its process crashed: signal 9: native words",
    "time.sleep(600)": "it was ended after 2 s: signal 9: native words",
}


@pytest.mark.parametrize("end", CRASHES)
def test_a_stage_whose_process_dies_or_hangs_is_one_failed_line(monkeypatch, tmp_path, end):
    """A module of the same name stands before the real one: it prints what is no message, and ends."""
    package = tmp_path / "tunesmith" / "preflight" / "thorough"
    package.mkdir(parents=True)
    for folder in (package, package.parent, package.parent.parent):
        (folder / "__init__.py").write_text("")
    words = "import os, sys, time\nprint('not a message'); print('[]', flush=True)\n"
    words += "print('{\"units\": 2}', flush=True); print('{\"done\": 1}', flush=True)\n"
    (package / "stages.py").write_text(
        f"{words}sys.stderr.write('native words\\n'); sys.stderr.flush()\n{end}\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(report, "LONGEST_S", 2.0 if "sleep" in end else 600.0)
    told: list[events.Event] = []
    result = report.run("laws", True, told.append)
    assert result["status"] == "fail" and result["reason"] is not None
    expected = CRASHES[end]
    assert result["reason"] == expected or ("2 s" in expected and result["reason"].startswith("it was ended"))
    assert [(event.done, event.total) for event in told if isinstance(event, events.Working)][-1] == (1, 2)


def test_a_real_process_gives_what_this_one_gives():
    told: list[events.Event] = []
    result = report.run("laws", True, told.append)
    assert result["status"] == "ok" and len(result["deviations"]) == len(examined("laws")[0]["deviations"])
    done = [event for event in told if isinstance(event, events.Working)][-1]
    assert done.done == done.total == len(result["deviations"])


def test_figures_are_compared_in_the_direction_that_is_better():
    figures = [results.figure("a", 220.0, "tokens/s"), results.figure("b", 2.0, "GB")]
    figures += [results.figure("c", 105.0, "tokens/s"), results.figure("unknown", 1.0, "s")]
    figures += [results.figure("d", 3e-7, "relative"), results.figure("e", 5e-7, "relative")]
    stage: results.StageResult = {
        "stage": "update",
        "status": "ok",
        "reason": None,
        "seconds": 1.0,
        "deviations": [],
        "figures": figures,
        "notes": [],
    }
    machine = {
        "machine": "m",
        "source": "docs",
        "figures": {"a": 110.0, "b": 1.0, "c": 100.0, "d": 2e-7, "e": 2e-7},
    }
    rows = report.compared([stage], [machine])
    assert [(row["name"], row["ratio"], row["verdict"]) for row in rows] == [
        ("a", 2.0, "better"),
        ("b", 0.5, "worse"),
        ("c", 1.05, "alike"),
        ("d", 0.667, "alike"),
        ("e", 0.4, "worse"),
    ]
    shown = report.render(report.full([], stages=()) | {"stages": [stage], "compared": rows})
    for line in ("better: 2.00 times as good as 110 on m", "worse: 0.50 times as good as 1 on m"):
        assert line in shown
    assert "e        5e-07 relative" in shown and "d        3e-07 relative" in shown
    assert re.search(r"105 tokens/s\n +as 100 on m\n", shown)


def test_the_known_figures_are_those_of_the_documentation():
    root = Path(__file__).parents[2]
    counted = 0
    for machine in report.known():
        page = (root / machine["source"]).read_text("utf-8")
        for name, value in machine["figures"].items():
            shown = f"{value:.0f}" if value > 10 else f"{value:g}"
            rows = [row for row in page.splitlines() if row.startswith(f"| {name} |")]
            assert re.search(rf"(?<![\d.,]){shown}(?![\d.,])", rows[0] if rows else page), name
            counted += 1
    assert counted >= 17


def test_the_deviations_of_the_documentation_are_those_of_this_machine():
    """None is ten times as large: another processor rounds otherwise, and may be exact by chance."""
    if backend.setup().kind == "gpu":
        pytest.skip("the page has those of a CPU")
    found: dict[str, float] = {}
    figures: list[results.MeasuredFigure] = []
    for stage in ("goldens", "laws"):
        result, _ = examined(stage)
        figures += result["figures"]
        for entry in result["deviations"]:
            objective, _, part = entry["what"].removesuffix(", float32").partition(": ")
            preference = part and objective != "sft"
            what = f"13 preference objectives: {part.replace('loss', 'losses')}" if preference else objective
            what = f"SFT: {part}" if objective == "sft" else what
            found[what] = max(found.get(what, 0.0), entry["error"] or 0.0)
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text("utf-8")
    shown = {
        name: float(value) for name, value in re.findall(r"^\| (.+?) \| .+ \| (\d\.\de-\d+) \|$", page, re.M)
    }
    assert shown.keys() == found.keys() and len(shown) == 12
    assert all(found[what] < 10 * value for what, value in shown.items()), found
    documented = {name: value for machine in report.known() for name, value in machine["figures"].items()}
    assert {figure["name"] for figure in figures} == {"goldens.deviation", "laws.float32.deviation"}
    assert max(shown.values()) == documented["goldens.deviation"]
    assert all(0.1 < figure["value"] / documented[figure["name"]] < 10 for figure in figures)


def test_a_deviation_that_is_not_finite_has_no_figure():
    fine, lost = results.deviation("a", 2e-7, 1e-5), results.deviation("b", float("nan"), 1e-5)
    assert results.largest([fine], "x") == [{"name": "x", "value": 2e-7, "unit": "relative"}]
    assert results.largest([fine, lost], "x") == []


def test_nothing_private_is_in_the_report(monkeypatch):
    home, user, host = str(Path.home()), getpass.getuser(), socket.gethostname()
    texts = [f"{home}/lib/libmkl_rt.so.2", f"{user}@{host}: cannot open /Volumes/Secret disk/x/y.json: no"]
    clean = report.scrubbed({"a": texts, "b": [{"c": texts[0]}], "n": 1.5, "none": None})
    words = json.dumps(clean)
    assert home not in words and "Volumes" not in words and "libmkl_rt.so.2" in words and "y.json" in words
    for name in report.private_names():
        assert name not in words
    assert clean["n"] == 1.5 and clean["none"] is None
    monkeypatch.setattr(report.platform, "node", lambda: "anna-mac.local")
    assert {"anna-mac", "anna-mac.local"} <= report.private_names()
    for names in (["anna-mac", "anna-mac.local"], ["anna-mac.local", "anna-mac"]):
        with monkeypatch.context() as patch:
            patch.setattr(report, "private_names", lambda names=names: names)
            assert report.scrubbed("on anna-mac.local, of anna-mac") == "on …, of …"
    assert report.scrubbed("12.5 tokens/s, and/or") == "12.5 tokens/s, and/or"


def test_the_file_is_written_and_its_keys_are_documented(monkeypatch, tmp_path):
    in_process(monkeypatch)
    monkeypatch.setattr(doctor.thorough, "full", small_full := _small(report.full))
    out = tmp_path / "machine.json"
    done = CliRunner().invoke(app, ["doctor", "--full", "--no-overfit", "--out", str(out), str(tmp_path)])
    assert done.exit_code == 0, done.output
    written = json.loads(out.read_text("utf-8"))
    assert small_full.calls == 1 and written["schema"] == report.SCHEMA and written["ok"]
    assert set(written) == set(report.FullReport.__annotations__)
    assert [stage["stage"] for stage in written["stages"]] == ["laws", "products"]
    assert str(tmp_path) not in json.dumps(written) and socket.gethostname() not in json.dumps(written)
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text("utf-8")
    for keys in (written, written["machine"], written["stages"][0], written["checks"][0]):
        assert all(f"`{key}`" in page or f".{key}`" in page for key in keys), keys
    assert all(f"`{stage}`" in page for stage in report.STAGES)
    assert "everything holds on this machine" in done.output and f"written to {out}" in done.output
    assert "numbers of float64" in done.output and "products.float32" in done.output


class _small:
    """`report.full` with two small stages."""

    def __init__(self, full) -> None:
        self.full, self.calls = full, 0

    def __call__(self, checks, *, notify):
        self.calls += 1
        return self.full(checks, small=True, stages=("laws", "products"), notify=notify)


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--out", "x.json"], "without --full"), (["--full", "--out", "no/such/x.json"], "cannot be written")],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(monkeypatch, words, message):
    monkeypatch.setattr(report, "full", lambda *_, **__: pytest.fail("measured"))
    done = CliRunner().invoke(app, ["doctor", *words])
    assert message in str(done.exception) + done.output


def test_what_does_not_hold_is_shown_and_is_no_success(monkeypatch):
    in_process(monkeypatch)

    def wrong(scale, tick):
        found = [results.deviation("attention", 0.5, 1e-5), results.deviation("a program", 1.0, 0.0)]
        return {"deviations": found, "figures": [], "notes": ["on two layers"]}

    monkeypatch.setitem(stages.STAGES, "laws", stages.Stage(lambda scale: 1, wrong))
    found = report.full([], small=True, stages=("laws",))
    text = report.render(found)
    assert not found["ok"] and "FAIL" in text and "something does not hold" in text
    assert "attention: off by 5.0e-01, allowed 1e-05" in text and "does not hold: a program" in text
    assert "0 of 2 hold" in text and "on two layers" in text
    assert not report.full([{"name": "x", "status": "fail", "value": "", "hint": None}], stages=())["ok"]
