"""The curves of a run in the terminal: they fit, they follow the log through a resume, and they end when the
run does."""

from __future__ import annotations

import io
import json
import math
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from rich.cells import cell_len

import processes
from tunesmith import events
from tunesmith.errors import DataError
from tunesmith.reports import live

MEMORY = {"resident": 3_100_000_000, "peak": 2_500_000_000}
CODES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")

COLOUR = re.compile(r"\x1b\[(?:[0-9]+;)*(?:3[0-7]|9[0-7]|38;[0-9;]+)m")


def step(number: int, at: float = 0.0, loss: float | None = None) -> events.StepDone:
    value = 3.0 - number / 50 if loss is None else loss
    return events.StepDone(
        number, number / 10, value, 500.0, 600, 1e-4, 0.75, False, 2.0, MEMORY, at=at or 1000.0 + 2 * number
    )


def lines(log: list[events.Event]) -> str:
    return "".join(events.to_json(event) + "\n" for event in log)


@pytest.fixture
def run(tmp_path) -> Path:
    """A run of a hundred updates, forty of them done."""
    folder = tmp_path / "runs" / "cats"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"status": "running"}))
    log: list[events.Event] = [events.RunStarted("cats", 100, 5, 100, {}, at=999.0)]
    log += [
        events.Validated(0, 3.2, 24.5, 9.0, 4, 1.0, True, at=1000.0),
        *(step(number) for number in range(1, 41)),
    ]
    log += [
        events.Validated(40, 2.25, 9.5, 9.0, 4, 1.0, True, at=1081.0),
        events.Notice("mind the \x1b[2Jgap", level="warning", at=1081.0),
        events.Sampled(40, "who sat on the mat?", "the 猫 sat", at=1081.0),
    ]
    (folder / "events.jsonl").write_text(lines(log))
    return folder


def say(run: Path, *log: events.Event) -> None:
    with (run / "events.jsonl").open("a") as stream:
        stream.write(lines(list(log)))


def end(run: Path, status: str = "completed") -> None:
    say(run, events.RunEnded(status, 41, 90.0, at=1085.0))
    (run / "manifest.json").write_text(json.dumps({"status": status}))


def test_a_frame_says_where_the_run_is(run):
    shown = live.frame(run, 110, 40, False, now=1082.0)
    first = shown.split("\n")[0]
    assert (
        first == "cats · running · step 40/100 · epoch 4.00 · 1 m 58 s to go"
    )  # sixty updates of two seconds, the last two ago
    for words in (
        "loss: · each update, ━ over 5, ● validation",
        "gradient norm",
        "learned tokens/s",
        "learning rate",
        "●",
        "·",
        "loss 2.2000",
        "speed 250 learned tokens/s",
        "3.10 GB resident",
        "validation 2.2500 at step 40",
        "perplexity 9.5",
        "who sat on the mat? → the 猫 sat",
        "warning: mind the \\x1b[2Jgap",
    ):
        assert words in " ".join(shown.split()), words
    assert "\x1b" not in shown and "no event for" not in shown
    (chart,) = [line for line in shown.split("\n") if "┤" in line and line.startswith("3.2")]
    assert "●" in chart  # the first validation is the highest of all


@pytest.mark.parametrize("width", [1, 7, 23, 24, 30, 61, 90, 130])
@pytest.mark.parametrize("height", [1, 3, 9, 16, 45])
def test_a_frame_fits_and_colour_adds_nothing_but_colour(run, width, height):
    plain = live.frame(run, width, height, False, now=1082.0)
    assert len(plain.split("\n")) <= height and max(map(cell_len, plain.split("\n"))) <= width
    coloured = live.frame(run, width, height, True, now=1082.0)
    assert [line.rstrip() for line in CODES.sub("", coloured).split("\n")] == plain.split("\n")
    assert ("\x1b[38" in coloured) == ("┤" in plain)


def test_a_frame_is_a_function_of_the_run_alone(run):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert live.frame(run, 90, 30, True, now=5.0) == live.frame(str(run), 90, 30, True, now=5.0)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_a_run_that_has_not_begun_is_waited_for(run):
    (run / "events.jsonl").unlink()
    assert live.frame(run, 80, 24, False) == "cats · running\nno update yet"
    (run / "events.jsonl").write_text(lines([events.RunStarted("cats", 9, 5, 100, {}, at=10.0)]))
    assert live.frame(run, 80, 24, False, now=11.0) == "cats · running\nno update yet"
    end(run, "failed")
    assert "no update was made" in live.frame(run, 80, 24, False)


@pytest.mark.parametrize("losses", [[2.5], [2.5, 2.5, 2.5, 2.5], [math.nan, 2.0, math.inf, 1.0], [math.nan]])
def test_odd_losses_are_drawn_without_a_warning(run, losses):
    (run / "events.jsonl").write_text(
        lines([step(number, loss=loss) for number, loss in enumerate(losses, 1)])
    )
    assert f"step {len(losses)}" in live.frame(run, 80, 40, True, now=1010.0)


def test_updates_without_rows_of_the_task_are_not_in_the_curve_of_their_loss(run):
    before = live._charts([step(n) for n in range(1, 41)], [], 100, 24)
    mixed = replace(step(30), mixed_loss=9.5, mixed_units=500.0)
    steps = [mixed if n == 30 else step(n) for n in range(1, 41)]
    task = [made for made in steps if made is not mixed]
    assert live._charts(steps, [], 100, 24) == live._charts(task, [], 100, 24) != before
    say(run, replace(mixed, step=41))
    assert "loss – · mixed rows loss 9.5" in live.frame(run, 120, 40, False, now=1090.0)


def test_what_is_no_run_is_refused(tmp_path):
    for place in (tmp_path, tmp_path / "missing"):
        with pytest.raises(DataError, match="not a run") as caught:
            live.frame(place, 80, 24, False)
        assert str(place) in str(caught.value)
        with pytest.raises(DataError, match="not a run"):
            live.watch(place, io.StringIO())


def test_a_silent_run_may_have_been_killed(run):
    assert "no event for 16 m 40 s: it may be busy, or killed" in live.frame(run, 200, 24, False, now=2081.0)
    end(run)
    shown = live.frame(run, 200, 24, False, now=2081.0)
    assert "no event for" not in shown and "to go" not in shown and shown.startswith("cats · completed")


# The log


def test_a_log_is_followed_through_torn_lines_a_resume_and_a_stranger(run):
    log = live.Log(run / "events.jsonl")
    assert log.poll() and not log.poll()
    whole = log.events[:]
    assert whole == list(events.read(run / "events.jsonl")) and len(whole) == 45
    path, text = run / "events.jsonl", lines([step(41, at=1083.0)])
    with path.open("a") as stream:
        stream.write(text[:50])
        stream.flush()
        assert not log.poll() and log.events == whole
        stream.write(text[50:])
    assert log.poll() and log.events == [*whole, step(41, at=1083.0)]
    # The resumed run cuts the log at its checkpoint and has written more than was cut before the next look.
    kept = lines(whole[:20])
    path.write_text(kept + lines([events.Resumed(18, 23, 100, at=2000.0)] + [step(19, at=2002.0)] * 60))
    assert log.poll()
    assert log.events == list(events.read(path)) and len(log.events) == 81
    path.write_text(kept)  # and one that is shorter
    assert log.poll() and log.events == whole[:20]
    with path.open("a") as stream:
        future = lines([step(19, at=5.0)]).replace('"loss"', '"colour": "red", "loss"')
        stream.write('{"kind": "FromTheFuture"}\nno json\n7\n' + future)
    assert log.poll() and log.strange == 4 and log.events[20:] == [step(19, at=5.0)]
    assert "4 lines of events.jsonl are not understood" in live.frame(run, 90, 24, False, now=6.0)
    *read, notice = events.read(path)
    assert read == log.events and isinstance(notice, events.Notice) and (notice.count, notice.at) == (4, 5.0)


def test_time_to_go_counts_from_the_last_resume(run):
    say(run, events.Resumed(40, 0, 100, at=90000.0), step(41, at=90010.0), step(42, at=90012.0))
    shown = live.frame(run, 100, 24, False, now=90012.0)
    assert "step 42/100 · epoch 4.20 · 1 m 56 s to go" in shown  # not the day between the sessions


# Curves


def test_smoothing_is_the_weighted_mean_of_what_was():
    values = [3.0, 1.0, math.nan, 2.0]
    keep = 1 - 2 / 6
    expected = (3 * keep**2 + 1 * keep + 2) / (keep**2 + keep + 1)
    found = live.smoothed(values, 5)
    assert found[0] == 3.0 and found[2] == found[1] and found[3] == pytest.approx(expected)
    assert math.isnan(live.smoothed([math.nan], 5)[0])


def test_thinning_loses_no_peak():
    y = [1.0] * 10_000
    y[1234], y[9999], y[7] = 9.0, -3.0, math.inf
    x, kept = live._thinned([float(at) for at in range(len(y))], y, 160)
    assert (
        len(x) <= 160
        and (1234.0, 9.0) in zip(x, kept, strict=True)
        and (9999.0, -3.0) in zip(x, kept, strict=True)
    )
    assert x == sorted(x) and math.inf not in kept
    assert live._thinned([1.0, 2.0], [5.0, 4.0], 160) == ([1.0, 2.0], [5.0, 4.0])


# On a stream


def test_on_what_is_no_terminal_one_frame_is_written(run):
    stream = io.StringIO()
    live.watch(run, stream)
    assert stream.getvalue().startswith("cats · running · step 40/100") and "\x1b" not in stream.getvalue()
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    live.watch(run, narrow)
    narrow.seek(0)
    assert narrow.read().startswith("cats ? running ? step 40/100")


def on_terminal(run: Path, monkeypatch, during=None, once: bool = False, **environ: str) -> str:
    with processes.terminal(monkeypatch, during, **({"LINES": "30"} | environ)) as (stream, received):
        live.watch(run, stream, every=0.02, once=once)
    return b"".join(received).decode()


def test_a_watch_follows_the_run_and_ends_with_it(run, monkeypatch):
    def wait_for(received: list[bytes], words: str) -> None:
        late = time.monotonic() + 120
        while words not in CODES.sub("", b"".join(received).decode(errors="ignore")):
            assert time.monotonic() < late
            time.sleep(0.01)

    def during(received: list[bytes]) -> None:
        wait_for(received, "step 40/100")
        say(run, step(41, at=time.time()))
        wait_for(received, "step 41/100")
        end(run)

    seen = on_terminal(run, monkeypatch, during)
    assert COLOUR.search(seen)
    last = CODES.sub("", seen)
    assert (
        last.rindex("cats · completed · step 41/100") > last.rindex("cats · running")
        and "completed at step 41" in last
    )


def test_no_color_dumb_terminals_and_once_are_respected(run, monkeypatch):
    end(run)
    assert not COLOUR.search(on_terminal(run, monkeypatch, NO_COLOR="1"))
    assert COLOUR.search(on_terminal(run, monkeypatch))
    (run / "manifest.json").write_text(json.dumps({"status": "running"}))
    assert "\x1b" not in on_terminal(run, monkeypatch, TERM="dumb")  # one frame, though the run goes on
    assert "cats · running" in on_terminal(run, monkeypatch, once=True)


def test_an_interrupt_ends_the_watching_quietly(run, monkeypatch):
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(live.time, "sleep", interrupt)
    assert "cats · running" in CODES.sub("", on_terminal(run, monkeypatch))


def test_the_function_of_the_package_outlives_the_training_module():
    """A module of the same name would take its place when it is imported."""
    import tunesmith
    import tunesmith.training

    assert callable(tunesmith.watch) and not (Path(tunesmith.__file__).parent / "watch.py").exists()
