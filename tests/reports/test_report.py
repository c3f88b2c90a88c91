"""The report says what the events say, hides nothing, and no text of the data can break its page."""

from __future__ import annotations

import html
import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith import events, reports
from tunesmith.errors import EvaluationError
from tunesmith.runs import artefacts
from tunesmith.runs.artefacts import CarriedSummary, Cost, Distances, Exported, Stops
from tunesmith.runs.records import Score

HOSTILE = "# heading\n```\n````text\n</td></tr></table>\n![x](http://x) | pipe\x1b[31m"


def step_done(step: int, loss: float, *, seconds: float = 2.0, units: float = 100.0) -> events.StepDone:
    memory = {"resident": 3_000_000_000 + step * 1_000_000, "active": 2_000_000_000, "peak": 2_500_000_000}
    rate = 1e-4 * min(1.0, step / 10)
    return events.StepDone(
        step, step / 50, loss, units, 120, rate, 1.0 + 5 / step, step % 9 == 0, seconds, memory
    )


def validated(step: int, loss: float, best: bool = False) -> events.Validated:
    return events.Validated(step, loss, math.exp(loss) if loss < 700 else math.inf, 2000.0, 40, 3.0, best)


def a_run(n_steps: int = 60, *, after: float = 1.0, status: str = "completed") -> list[events.Event]:
    """A run of ``n_steps`` updates whose validation loss goes from 2.0 to ``after``."""
    counts = {
        "rows_read": 50,
        "rows_dropped": {"bad_json": 2},
        "rows_train": 38,
        "rows_valid": 10,
        "padding_share": 0.1,
    }
    log: list[events.Event] = [
        events.RunStarted("runs/x", 60, 1000, 100_000, counts),
        validated(0, 2.0, True),
        events.Sampled(0, HOSTILE, "before " + HOSTILE, "the reference"),
        events.Growth(0, {"layers.0.q_proj": 0.0}),
    ]
    log += [
        step_done(step, 1 + math.exp(-step / 10) + 0.2 * math.sin(7 * step)) for step in range(1, n_steps + 1)
    ]
    log += [
        validated(n_steps, after, after < 2),
        events.Sampled(n_steps, HOSTILE, "after " + HOSTILE, "the reference"),
        events.Growth(n_steps, {f"layers.{index}.q_proj": float(index) for index in range(12)}),
        events.Notice("a clamped value", level="warning", count=2, where="a.jsonl:3"),
        events.Notice("a clamped value", level="warning", count=3, where="a.jsonl:9"),
        events.Notice("split into turns", count=7),
        events.Saved(n_steps, "checkpoints/000060", 1000, 0.5),
        events.RunEnded(status, n_steps, 150.0, "the disk burned" if status == "failed" else None),
    ]
    return log


@pytest.fixture
def run_dir(tmp_path: Path):
    def make(log: list[events.Event]) -> Path:
        folder = tmp_path / "runs" / "a run"
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "data").mkdir()
        (folder / "config.yaml").write_text("model:\n  path: base\nloop:\n  epochs: 2\n")
        (folder / "origin.json").write_text(json.dumps({"model.path": "--model", "loop.epochs": "default"}))
        (folder / "manifest.json").write_text(
            json.dumps({"versions": {"mlx": "0.32.4"}, "status": "completed"})
        )
        (folder / "events.jsonl").write_text("".join(events.to_json(event) + "\n" for event in log))
        return folder

    return make


def told(folder: Path) -> dict[str, Any]:
    return reports.to_json(reports.summarise(folder))


def saved(folder: Path, best: int = 60) -> None:
    index = {"last": 60, "best": best, "metric": "validation loss", "best_value": 1.0, "kept": [40, 60]}
    (folder / "checkpoints" / "index.json").write_text(json.dumps(index))


def test_the_three_files_are_written_and_the_numbers_are_those_of_the_events(run_dir, drawn):
    folder = run_dir(a_run())
    saved(folder)
    page = reports.write(folder)
    assert page == folder / "report.md"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(entry.name for entry in folder.iterdir() if entry.name.startswith(".")) == []
    found = json.loads((folder / "report.json").read_text())
    assert found == json.loads(json.dumps(told(folder)))
    assert found["verdict"] == (
        "After 60 of 60 updates the validation loss fell from 2.0000 to 1.0000 nats a learned token "
        "(-50.0%), "
        "perplexity from 7.389 to 2.718, on 40 held-out rows."
    )
    seconds = {"seconds": 150.0, "training_s": 120.0, "validating_s": 6.0, "saving_s": 0.5}
    assert found["time"] == seconds | {"scoring_s": 0.0}
    assert found["tokens_per_second"] == {"learned": 50.0, "all": 60.0}
    assert found["memory_peak"]["resident"] == 3_060_000_000
    assert found["updates"]["clipped"] == 6
    text = page.read_text()
    for words in (
        "50.0",
        "3.06 GB",
        "2 m 30 s",
        "Kept: 40, 60; last 60; best 60",
        "| rows_dropped.bad_json | 2 |",
    ):
        assert words in text, words
    assert "| model.path | base | --model |" in text


def test_a_loss_that_rose_is_said_so_with_the_best(run_dir):
    log = a_run(after=3.0)
    log.insert(30, validated(26, 1.5, True))
    line = reports.verdict_line(run_dir(log))
    assert "ROSE from 2.0000 to 3.0000" in line and "(+50.0%)" in line
    assert "got worse" in line and "the lowest was 1.5000 at step 26" in line


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_is_worse_and_the_json_stays_valid(run_dir, bad):
    folder = run_dir(a_run(after=bad))
    reports.write(folder)
    text = (folder / "report.json").read_text()
    found = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert "got worse" in found["verdict"] and "fell" not in found["verdict"]
    assert found["validation"][-1]["loss"] == str(bad)


@pytest.mark.parametrize(
    ("log", "begins", "status"),
    [
        (
            a_run(40, status="interrupted"),
            "Interrupted after 40 of 60 updates: the validation loss fell",
            "interrupted",
        ),
        (a_run(40, status="failed"), "FAILED after 40 of 60 updates (the disk burned): the", "failed"),
        (
            a_run()[:20],
            "Not finished, 16 of 60 updates and no end recorded: the validation loss was measured once",
            "unfinished",
        ),
        (
            a_run()[:1],
            "Not finished, 0 of 60 updates and no end recorded: the model is as it was",
            "unfinished",
        ),
        ([], "Not finished, 0 updates and no end recorded: the model is as it was before", "unfinished"),
        (
            [step_done(1, 3.0), step_done(2, 2.0), events.RunEnded("completed", 2, 4.0)],
            "After 2 updates the training loss went from 3.0000 to 2.0000",
            "completed",
        ),
    ],
)
def test_runs_that_did_not_go_well_have_a_report(run_dir, log, begins, status):
    folder = run_dir(log)
    reports.write(folder)
    found = told(folder)
    assert found["verdict"].startswith(begins)
    assert found["status"] == status
    text = (folder / "report.md").read_text()
    assert (f"tunesmith train --resume '{folder}'" in text) == (status != "completed")
    assert "tunesmith chat" not in text  # no checkpoint to talk with


def test_a_run_without_an_event_file_has_a_report(run_dir):
    folder = run_dir([])
    (folder / "events.jsonl").unlink()
    assert reports.write(folder).exists()


def test_samples_cannot_break_the_page(run_dir):
    text = reports.write(run_dir(a_run())).read_text()
    assert "\x1b" not in text
    blocks, rest = [], []
    fence: str | None = None
    for line in text.split("\n"):  # as CommonMark reads fences
        if fence is None and (match := re.match(r"(`{3,})(\w*)$", line)):
            fence = match[1]
            blocks.append("")
        elif fence is not None and re.fullmatch(r"`+", line) and len(line) >= len(fence):
            fence = None
        elif fence is not None:
            blocks[-1] += line + "\n"
        else:
            rest.append(line)
    assert fence is None
    shown = HOSTILE.replace("\x1b", "\\x1b")
    assert [shown + "\n", f"before {shown}\n", f"after {shown}\n", "the reference\n"] == blocks[:4]
    outside = "\n".join(rest)
    assert "# heading" not in outside and outside.count("</td>") == 3 and outside.count("</table>") == 1
    for title in (
        "Notices",
        "Counts",
        "Time and memory",
        "Checkpoints",
        "How to go on",
        "Settings",
        "Made from",
    ):
        assert f"## {title}" in rest


def test_every_notice_is_shown_with_its_count_and_warnings_come_first(run_dir):
    log = [*a_run(), events.StepSkipped(12, "nan", "inf", ["a.jsonl:5", "b.jsonl:6"], 1)]
    log[5:5] = [events.Notice(f"note {index} | `x` <b>", where=f"f:{index}") for index in range(40)]
    text = reports.write(run_dir(log)).read_text()
    lines = [html.unescape(line) for line in text.splitlines() if line.startswith("- **")]
    assert lines[0] == "- **warning**: a clamped value (×5); at a.jsonl:3, a.jsonl:9"
    assert "- **info**: split into turns (×7)" in lines
    assert sum("note " in line for line in lines) == 40
    assert "- **warning**: step 12 skipped: loss nan, gradient norm inf, rows a.jsonl:5, b.jsonl:6" in lines
    assert "<b" not in text and "note 3 \\| \\`x\\`" in text


def test_dropped_rows_scores_growth_and_a_resume_are_in_the_page(run_dir):
    log = a_run()
    log.insert(30, events.Resumed(26, 4, 60))
    folder = run_dir(log)
    rows = [
        {"source": f"d.jsonl:{n}", "reason": "bad_json", "message": "expected {", "raw": "x"}
        for n in range(25)
    ]
    (folder / "data" / "dropped.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = {
        "task": "tool_calls",
        "version": "1",
        "name": "right",
        "value": 0.75,
        "low": 0.5,
        "high": 0.9,
        "n": 40,
    }
    score |= {"delta": 0.7, "delta_low": None, "delta_high": None, "note": "odd"}
    (folder / "evals" / "tool_calls@1").mkdir(parents=True)
    (folder / "evals" / "tool_calls@1" / "score.json").write_text(
        json.dumps({"checkpoint": "000060", "data": "data/valid.jsonl", "scores": [score]})
    )
    text = reports.write(folder).read_text()
    assert "Rows left out: 25, the first 20 of them" in text and "| d.jsonl:19 | bad_json |" in text
    assert (
        "| tool_calls | 1 | 000060 | data/valid.jsonl | right | 40 | 0.75 (0.5 to 0.9) | +0.7 | odd |" in text
    )
    assert "| layers.11.q_proj | 11 |" in text and "layers.1.q_proj" not in text
    assert "after step 26; 4 updates done again" in text


def test_training_loss_is_a_mean_over_tokens_not_over_updates(run_dir):
    log: list[events.Event] = [step_done(step, 2.0, units=10.0) for step in range(1, 41)]
    log[0], log[1] = step_done(1, 4.0, units=30.0), step_done(2, 1.0, units=10.0)
    assert told(run_dir(log))["training_loss"]["first"] == (4.0 * 30 + 1.0 * 10) / 40


def test_a_run_that_has_not_ended_is_not_said_to_have_stopped(run_dir):
    ended = next(event for event in a_run(40, status="interrupted") if isinstance(event, events.RunEnded))
    log = [*a_run(40)[:-1], ended, events.Resumed(40, 0, 60), step_done(41, 1.0)]
    folder = run_dir(log)
    (folder / "manifest.json").write_text(json.dumps({"status": "running"}))
    found = told(folder)
    assert found["status"] == "running" and found["verdict"].startswith(
        "Still running, or killed, after 41 of 60 updates"
    )
    rules = [one["rule"] for one in found["advice"]]
    assert "the run is still running, or was killed" in rules and "the run did not end by itself" not in rules
    text = reports.write(folder).read_text()
    assert (
        f"tunesmith watch '{folder}'" in text
        and f"tunesmith train --resume '{folder}'  # if it was killed" in text
    )


def test_padding_is_a_share_of_positions_and_of_updates_that_know_it(run_dir):
    stages = {"gradients": 1.0}
    log = [
        replace(step_done(1, 1.0), tokens=50),  # an older one: its padding is not known
        replace(step_done(2, 1.0), tokens=900, padding=0.1, stages=stages),
        replace(step_done(3, 1.0), tokens=50, padding=0.5, stages=stages),
    ]
    assert told(run_dir(log))["padding"] == pytest.approx(1 - 950 / 1100)


def test_an_update_that_does_not_know_some_memory_has_a_report(run_dir):
    log = [
        step_done(1, 1.0),
        replace(step_done(2, 1.0), memory={"resident": 4_000_000_000}),
        step_done(3, 1.0),
    ]
    folder = run_dir(log)
    for found in (log, log[:2]):
        (folder / "events.jsonl").write_text("".join(events.to_json(event) + "\n" for event in found))
        reports.write(folder)
        peaks = json.loads((folder / "report.json").read_text())["memory_peak"]
        assert peaks == {"resident": 4_000_000_000, "active": 2_000_000_000, "peak": 2_500_000_000}


def test_a_torn_manifest_is_an_error_with_its_place(run_dir):
    folder = run_dir(a_run())
    (folder / "manifest.json").write_text('{"status": ')
    with pytest.raises(EvaluationError, match=r"manifest\.json: cannot be read"):
        reports.write(folder)


def exported(folder: Path, *reasons: str) -> Exported:
    name = "mlx-4bit.rejected" if reasons else "mlx-4bit"
    speed = Score("export.speed", "1", "speed", 41.5, 40.0, 43.0, 5, unit="tokens/s")
    artefact = Exported(
        path=folder / "exports" / name,
        kind="mlx-4bit",
        checkpoint="000060",
        rows=7,
        size_bytes=83_000_000,
        distances=Distances(9, 0.012, 0.01, 0.1, 0.2, 0.3, 0.97, 0.01, 0.5, 0.49, 0.98, 0.011, 0.014),
        stops=Stops(7, 7, 7, 6, ()),
        weights=CarriedSummary(4, {"a<b": 0.9}),
        reasons=reasons,
        cost=Cost(0.5, 91_000_000, speed),
        loss=Score("export.loss", "1", "loss", 1.2, 1.0, 1.4, 7, 0.034, 0.01, 0.06, unit="nats"),
    )
    artefact.path.mkdir(parents=True)
    artefacts.write(artefact, artefact.path)
    return artefact


def test_exports_are_in_page_text_json_and_card(run_dir):
    folder = run_dir(a_run())
    saved(folder)
    kept, rejected = exported(folder), exported(folder, "it never stops: <i>")
    (folder / "exports" / "broken").mkdir()
    (folder / "exports" / "broken" / "export.json").write_text("{}")
    assert artefacts.read(folder)[0] == [kept, rejected]
    reports.write(folder)
    text, page = (folder / "report.md").read_text(), html.unescape((folder / "report.html").read_text())
    card, content = (folder / "model_card.md").read_text(), json.loads((folder / "report.json").read_text())
    for shown in (text, page, card):
        for part in ("0.012", "0.011 to 0.014", "98.0 %", "97.0 %", "83.0 MB", "91.0 MB", "41.5", "0.034"):
            assert part in shown, part
        assert "it never stops" in shown
    assert "<i>" not in (folder / "report.html").read_text()
    assert [export["accepted"] for export in content["exports"]] == [True, False]
    assert content["exports"][0]["kl"]["mean"] == 0.012
    assert any("broken" in notice for notice in content["unread"])


def test_a_report_is_older_than_an_export_that_came_after_it(run_dir):
    folder = run_dir(a_run())
    reports.write(folder)
    assert reports.is_current(folder)
    exported(folder)
    assert not reports.is_current(folder)
