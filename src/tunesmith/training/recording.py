"""Where the events of a run go: to its log files, and to whoever listens."""

from __future__ import annotations

from contextlib import ExitStack

from tunesmith import events
from tunesmith.display import console
from tunesmith.display.tensorboard import board_sink
from tunesmith.events import Event, Notice, Sink
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.directory import EVENTS, LOG, Run


class Early:
    """A sink that passes events on and keeps the notices, until the run has a log to write them to."""

    def __init__(self, notify: Sink) -> None:
        self.notices: list[Notice] = []
        self.muted = False
        self._notify = notify

    def __call__(self, event: Event) -> None:
        if isinstance(event, Notice):
            self.notices.append(event)
        self.listener(event)

    @property
    def listener(self) -> Sink:
        return events.silent if self.muted else self._notify


def record(
    run: Run, cursor: Cursor, steps: int, tensorboard: bool, early: Early, open_files: ExitStack
) -> Sink:
    """A sink that writes to the run directory, ``early`` notices first, and passes events on."""
    resuming = (run.path / EVENTS).exists()
    redone = _cut_back(run, cursor, early) if resuming else 0
    sinks = [
        events.jsonl(open_files.enter_context((run.path / EVENTS).open("a", encoding="utf-8"))),
        console.log(open_files.enter_context((run.path / LOG).open("a", encoding="utf-8"))),
    ]
    if tensorboard:
        sinks.append(open_files.enter_context(board_sink(run.path / "tensorboard")))
    write = events.tee(sinks)
    for notice in early.notices:
        write(notice)
    notify = early.listener

    def emit(event: Event) -> None:
        if not isinstance(event, events.Working):
            write(event)
        notify(event)

    if resuming:
        emit(events.Resumed(cursor.step, redone, steps))
        run.mark("running")
    return emit


def _cut_back(run: Run, cursor: Cursor, early: Early) -> int:
    """Remove from the log what came after the checkpoint. Returns the number of updates removed."""
    path = run.path / EVENTS
    with path.open("rb+") as stream:
        # A power cut can leave the log shorter than the checkpoint says.
        whole = stream.read(cursor.events_bytes).rfind(b"\n") + 1
        if whole < cursor.events_bytes:
            text = "the log lost its end before the checkpoint"
            early.notices.append(Notice(text, level="warning", where=str(path)))
        redone = sum(line.startswith(b'{"kind": "StepDone"') for line in stream)
        stream.truncate(whole)
    return redone
