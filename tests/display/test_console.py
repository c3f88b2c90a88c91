"""What people see of a run: plain lines that cannot act on a terminal, few enough to read, and nothing left
out."""

from __future__ import annotations

import dataclasses
import io
import re
import sys
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import processes
from tunesmith import events
from tunesmith.display import console
from tunesmith.display.tensorboard import board_sink
from tunesmith.errors import SetupError

MEMORY = {"resident": 3_100_000_000, "active": 2_000_000_000, "peak": 2_500_000_000}


def step_done(step: int, at: float, *, seconds: float = 1.0) -> events.StepDone:
    stages = {"gradients": 0.75, "other": 0.25}
    return events.StepDone(
        step,
        step / 10,
        2.5,
        500.0,
        600,
        1e-4,
        0.75,
        step == 2,
        seconds,
        MEMORY,
        padding=0.125,
        stages=stages,
        at=at,
    )


def one_of_each(text: str) -> list[events.Event]:
    return [
        events.Notice(text, level="warning", count=3, where=text, hint=text),
        events.RunStarted(
            text, 10, 5, 100, {"rows_read": 7, "rows_dropped": {text: 2}, "padding_share": 0.25}
        ),
        events.Working(text, 3, 9),
        events.Resumed(4, 2, 100),
        step_done(2, 0.0),
        events.StepSkipped(3, "nan", "inf", [text, text], 1),
        events.Validated(5, 1.0, 2.718281828, 900.0, 12, 3.0, True),
        events.Sampled(5, text, text, text),
        events.Growth(
            5, {text: 0.5}, {text: 0.25}, {text: 3.5}, {"edges": [-1.0, 0.0, 1.0], "counts": [3.0, 5.0]}
        ),
        events.Saved(5, text, 2_000_000, 0.5),
        events.Probed(3, 2100, 4.0, MEMORY),
        events.RunEnded("stopped_early", 5, 61.0, text),
        events.Instruments(5, {text: 3.0}, {text: 2.0}, {text: 0.5}),
        events.RowLosses(5, 1, {text: 1.5}, {text: 7.0}),
        events.HeldOutLosses(5, {text: 1.5}, {text: 7.0}),
        events.Activations(5, {text: 1.25}, {text: 8.0}),
    ]


def test_an_update_without_rows_of_the_task_shows_no_loss_of_them():
    mixed = dataclasses.replace(step_done(3, 0.0), mixed_loss=2.25, mixed_units=500.0)
    assert mixed.task_units == 0
    assert "epoch 0.30 · loss – · mixed rows loss 2.2500" in console.readable(mixed)
    assert "loss 2.5000 · mixed rows loss 2.2500" not in console.readable(mixed)
    both = dataclasses.replace(mixed, mixed_units=250.0)
    assert "epoch 0.30 · loss 2.7500 · mixed rows loss 2.2500" in console.readable(both)


def test_every_kind_of_event_is_readable():
    kinds = {type(event) for event in one_of_each("x")}
    assert kinds == {*events.KINDS.values(), events.Working}
    lines = [console.readable(event) for event in one_of_each("x")]
    assert lines[0] == "warning: x: x (×3) · hint: x"
    assert lines[1] == (
        "run x: 10 updates · 5 of 100 weights are trained · rows: 7 read, 2 left out (x 2)"
        " · tokens: 25.0% of a batch is padding"
    )
    assert lines[4] == (
        "step 2 · epoch 0.20 · loss 2.5000 · learning rate 0.0001 · gradient norm 0.75 clipped"
        " · speed 500 learned tokens/s · memory 3.10 GB resident, 2.00 GB active, 2.50 GB peak"
    )
    assert lines[5] == "warning: step 3 skipped, loss nan, gradient norm inf (1 in a row) · rows x, x"
    assert lines[6] == (
        "validation at step 5: loss 1.0000 · perplexity 2.718 · 12 rows, 900 learned tokens in 3 s"
        " · best so far"
    )
    assert (
        lines[10] == "largest micro-batch: 3 rows, 2,100 tokens · 4 s"
        " · memory 3.10 GB resident, 2.00 GB active, 2.50 GB peak"
    )
    assert lines[11] == "stopped early at step 5 after 1 m 01 s: x"
    growth = "growth at step 5: 1 adapted layer, largest norm 0.5 in x · 25.00% of its base"
    assert lines[8] == f"{growth} · effective rank 3.5"
    assert lines[12:] == [
        "weights at step 5: largest gradient 3 in x · largest update 25.00% of its weight in x",
        "rows of step 5: 1, highest loss 1.5000 nats a token at x",
        "held-out rows at step 5: 1, highest loss 1.5000 at x",
        "activations at step 5: 1 layers, largest 8 in x, root mean square 1.25 there",
    ]


@given(st.text(max_size=40) | st.just("\x1b[2J\r\nnext\x07 line\u2028\u202e"))
def test_no_text_of_the_data_reaches_the_terminal_as_a_command(text):
    for event in one_of_each(text):
        assert console.readable(event).isprintable()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (59.6, "1 m 00 s"), (185, "3 m 05 s"), (7620, "2 h 07 m"), (-3, "0 s")],
)
def test_durations(seconds, text):
    assert console.duration(seconds) == text


def plain(log: list[events.Event], **options) -> list[str]:
    stream = io.StringIO()
    with console.sink(stream, **options) as show:
        for event in log:
            show(event)
    return stream.getvalue().splitlines()


def test_plain_lines_are_few_and_everything_but_updates_is_shown():
    log: list[events.Event] = [events.RunStarted("r", 100, 1, 2, {}, at=0.0)]
    log += [step_done(step, float(step)) for step in range(1, 101)]
    quiet = (*console.OF_UPDATES, events.Working, events.RunStarted)
    others = [event for event in one_of_each("x") if not isinstance(event, quiet)]
    log[60:60] = [
        event
        for event in one_of_each("x")
        if isinstance(event, events.Instruments | events.RowLosses | events.HeldOutLosses)
    ]
    log[50:50] = [dataclasses.replace(event, at=50.0) for event in others]
    lines = plain(log, every=10.0)
    steps = [int(match[1]) for line in lines if (match := re.match(r"step (\d+)/100 ", line))]
    assert steps == [1, 11, 21, 31, 41, 51, 61, 71, 81, 91, 100]
    assert [line for line in lines if not line.startswith("step ")] == [
        console.readable(event) for event in [log[0], *others]
    ]
    assert "\x1b" not in "".join(lines)
    assert lines[2].endswith("1 m 29 s to go")


def test_time_to_go_counts_this_session_only_and_includes_validation():
    # Resumed after 50; ten updates of one second and ten seconds of validation leave 40 updates of two
    # seconds.
    log = [step_done(50 + index, 1000.0 + 2 * index - 1) for index in range(1, 11)]
    log[-1] = dataclasses.replace(log[-1], at=1020.0)
    log[0] = dataclasses.replace(log[0], at=1001.0)
    assert plain([events.Resumed(50, 0, 100, at=999.0), *log], every=0.0)[-1].endswith("1 m 20 s to go")


def test_other_work_is_silent_at_first_then_tells_rate_and_end():
    def work(seconds: float, done: int) -> events.Working:
        return events.Working("rendering", done, 100, at=seconds)

    assert plain([work(0.0, 0), work(1.0, 60), work(1.9, 100)]) == []
    lines = plain([work(0.0, 0), *(work(float(at), 10 * at) for at in range(1, 11))])
    assert lines[0].startswith("rendering: 30 of 100 · 10.0/s · 7 s to go, ends ")
    assert [line.split(" ·")[0] for line in lines[1:]] == [
        "rendering: 80 of 100",
        "rendering: 100 of 100 in 10 s",
    ]
    slow = plain([work(0.0, 0), work(64.0, 20), work(5000.0, 40)])
    assert slow[0].startswith("rendering: 20 of 100 · 3.2 s each · 4 m 16 s to go, ends ")
    assert slow[1].startswith("rendering: 40 of 100 · 2 m 05 s each · ")
    # Of ten answers at once the first has ended, and all are half done.
    partly = [events.Working("answers", 1, 10, share, at=10.0) for share in (None, 0.5)]
    ends = [plain([dataclasses.replace(one, done=0, at=0.0, share=None), one])[0] for one in partly]
    assert [end.split(" to go")[0] for end in ends] == [
        "answers: 1 of 10 · 10.0 s each · 1 m 30 s",
        "answers: 1 of 10 · 2.0 s each · 10 s",
    ]
    # The same label again is new work, with its own quiet time.
    assert len(plain([work(0.0, 0), work(10.0, 100), work(20.0, 5), work(21.0, 10)])) == 1
    # What was done before the first word of it has no known duration.
    assert " · 5.0/s · " in plain([work(0.0, 50), work(4.0, 70)])[0]


def test_work_takes_from_its_start_and_not_from_the_first_part_that_is_done():
    heard: list[events.Event] = []
    tick = events.ticker(heard.append, "judging")
    time.sleep(0.3)
    tick(2, 4)
    tick(4, 4)
    assert [one.done for one in heard if isinstance(one, events.Working)] == [0, 2, 4]
    assert heard[1].at - heard[0].at >= 0.29
    again: list[events.Event] = []
    events.ticker(again.append, "judging")(0, 4)
    assert len(again) == 1, "who begins at none says so"


def test_progress_tells_of_work_outside_a_run(monkeypatch):
    def told() -> str:
        stream = io.StringIO()
        with console.sink(stream) as show:
            update = events.ticker(show, "reading")
            for done in (0, 5, 10):
                update(done, 10)
        return stream.getvalue()

    assert told() == ""
    monkeypatch.setattr(console, "QUIET_S", 0.0)
    assert re.search(r"^reading: 10 of 10 in 0 s$", told(), re.MULTILINE)


def test_the_log_has_a_time_and_a_line_for_each_event():
    stream = io.StringIO()
    write = console.log(stream)
    for event in one_of_each("x"):
        write(event)
    lines = stream.getvalue().splitlines()
    assert len(lines) == len(one_of_each("x"))
    for line, event in zip(lines, one_of_each("x"), strict=True):
        assert re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) and line[20:] == console.readable(event)


def on_terminal(log: list[events.Event], monkeypatch, **environ: str) -> str:
    """What a terminal of 100 columns receives."""
    with processes.terminal(monkeypatch, **environ) as (stream, received), console.sink(stream) as show:
        for event in log:
            show(event)
    return b"".join(received).decode()


COLOUR = re.compile(r"\x1b\[[0-9;]*m")
RUN: list[events.Event] = [
    events.RunStarted("r", 10, 1, 2, {}),
    events.Validated(0, 3.0, 20.0, 900.0, 12, 3.0, True),
    step_done(1, 1.0),
    events.Validated(2, 2.0, 7.4, 900.0, 12, 3.0, True),
    events.Notice("[bold]careful[/bold]", level="warning"),
    step_done(4, 4.0),
]


def test_the_panel_shows_all_that_is_asked_for(monkeypatch):
    seen = COLOUR.sub("", on_terminal(RUN, monkeypatch))
    for words in (
        "step",
        "4/10",
        "epoch 0.40",
        "to go",
        "━",
        "2.5000",
        "2.0000 at step 2, from 3.0000 at step 0",
        "0.0001",
        "0.75",
        "500 learned tokens/s",
        "3.10 GB resident, 2.00 GB active, 2.50 GB peak",
    ):
        assert words in seen, words
    assert "warning: [bold]careful[/bold]" in seen  # shown as it is, not as markup
    assert "validation at step 2" in seen


def test_the_last_panel_of_a_run_that_ended_promises_nothing(monkeypatch):
    log = [
        *RUN,
        *(events.Working("validating", done, 9, at=10.0 * done) for done in (1, 2)),
        events.RunEnded("failed", 4, 9.0),
    ]
    last = COLOUR.sub("", on_terminal(log, monkeypatch)).rpartition("╭")[2]
    assert "4/10" in last and "to go" not in last and "validating" not in last


def test_no_color_and_dumb_terminals_are_respected(monkeypatch):
    def colours(text: str) -> list[str]:
        return [code for code in COLOUR.findall(text) if re.search(r"\b(3[0-7]|38|4[0-7]|9[0-7])\b", code)]

    assert colours(on_terminal(RUN, monkeypatch))
    assert colours(on_terminal(RUN, monkeypatch, NO_COLOR="1")) == []
    dumb = on_terminal(RUN, monkeypatch, TERM="dumb")
    assert "\x1b" not in dumb and "step 1/10 · " in dumb


def test_the_panel_leaves_the_terminal_as_it_was_after_an_error(monkeypatch):
    def broken():
        yield RUN[0]
        raise KeyboardInterrupt

    stdout = sys.stdout
    with pytest.raises(KeyboardInterrupt):
        on_terminal(broken(), monkeypatch)  # type: ignore[arg-type]
    assert sys.stdout is stdout


def test_tensorboard_files_hold_the_numbers(tmp_path):
    pytest.importorskip("tensorboardX")
    from tensorboardX.proto.event_pb2 import Event as Record
    from tensorboardX.record_writer import RecordWriter  # noqa: F401  (the package is whole)

    with board_sink(tmp_path) as write:
        for event in one_of_each("x"):
            write(event)
    found: dict[str, Any] = {}
    for path in sorted(tmp_path.iterdir()):
        data = path.read_bytes()
        while data:  # TFRecord: length (8), checksum (4), record, checksum (4)
            length = int.from_bytes(data[:8], "little")
            record = Record.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            for value in record.summary.value:
                kind = value.WhichOneof("value")
                found[value.tag] = value.tensor.string_val[0] if kind == "tensor" else getattr(value, kind)
    assert found["train/loss"] == 2.5 and found["train/tokens_per_second"] == 500.0
    assert found["train/learning_rate"] == pytest.approx(1e-4) and found["train/gradient_norm"] == 0.75
    assert found["memory/peak"] == 2.5e9 and found["valid/loss"] == 1.0
    assert found["valid/perplexity"] == pytest.approx(2.718281828) and found["growth/x"] == 0.5
    assert any(tag.startswith("samples/x") for tag in found)
    assert (found["gradient/x"], found["update_ratio/x"], found["rows/highest"]) == (3.0, 0.25, 1.5)
    assert (found["relative_growth/x"], found["effective_rank/x"]) == (0.25, 3.5)
    assert (found["activation_rms/x"], found["activation_largest/x"]) == (1.25, 8.0)
    assert found["train/padding"] == 0.125 and found["seconds/gradients"] == 0.75
    assert list(found["change"].bucket) == [3.0, 5.0] and list(found["change"].bucket_limit) == [0.0, 1.0]
    assert found["change"].sum == 1.0 and found["change"].sum_squares == 0.25


def test_a_missing_tensorboard_is_told(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(SetupError, match="pip install tensorboardX"), board_sink(tmp_path):
        pass
