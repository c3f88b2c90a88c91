"""The curves of a run in the terminal, while it trains or after, from ``events.jsonl`` alone.

It only reads, so any number of watchers may watch a run. The curves differ by their marks and are readable
without colour; NO_COLOR is respected. plotext draws, rich shows the live screen."""

from __future__ import annotations

import math
import textwrap
import time
from collections import deque
from collections.abc import Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple, TextIO

from rich.cells import cell_len
from rich.console import Console
from rich.live import Live
from rich.text import Text

from tunesmith import events
from tunesmith.display import charts, console
from tunesmith.errors import DataError
from tunesmith.runs.directory import EVENTS, Run

SMOOTH = 20
"""The smoothed curve forgets over a SMOOTHth of the updates so far, but not over fewer than five."""
LEAST_CHART = 7
"""A chart with fewer lines shows nothing and is left out."""
QUIET_S = 120.0
"""A run that should be training and has logged nothing for so long, and for ten updates, may have been
killed."""
_END = 64  # bytes before the position: if they changed, a resumed run cut the log


class Log:
    """The events of a run so far. A log that was cut when its run resumed is read again; an unfinished last
    line is read once it is complete."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._restart()

    def _restart(self) -> None:
        self.events: list[events.Event] = []
        self.strange, self._place, self._end = 0, 0, b""

    def poll(self) -> bool:
        """Read new events. Returns whether there are any."""
        try:
            stream = self.path.open("rb")
        except FileNotFoundError:
            return False
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=str(self.path)) from error
        with stream:
            stream.seek(self._place - len(self._end))
            if anew := stream.read(len(self._end)) != self._end:
                self._restart()
                stream.seek(0)
            new = stream.read()
        new = new[: new.rfind(b"\n") + 1]
        self._place, self._end = self._place + len(new), (self._end + new)[-_END:]
        for line in new.splitlines():
            event, whole = events.from_json(line)
            self.strange += not whole
            self.events += [event] if event is not None else []
        return anew or bool(new)


class Series(NamedTuple):
    """One curve. ``mark``: a character, or a code of plotext's. ``joined``: points are joined by lines."""

    x: Sequence[float]
    y: Sequence[float]
    mark: str
    colour: str
    joined: bool = False


def frame(run_dir: str | Path, width: int, height: int, colour: bool, now: float | None = None) -> str:
    """At most ``height`` lines of at most ``width`` cells. now: seconds since the epoch. Raises DataError if
    there is no run."""
    run = Run.open(run_dir)
    log = Log(run.path / EVENTS)
    log.poll()
    return draw(run, log, width, height, colour, time.time() if now is None else now)


def watch(run_dir: str | Path, stream: TextIO, *, every: float = 1.0, once: bool = False) -> None:
    """Show the run on ``stream``, read anew each ``every`` seconds, until it has ended; once if it is not a
    terminal.

    An interrupt ends the display, not the run. Raises DataError if there is no run.
    """
    run = Run.open(run_dir)
    screen = Console(file=stream)  # reads NO_COLOR, TERM and COLUMNS by itself
    log = Log(run.path / EVENTS)
    live = stream.isatty() and not screen.is_dumb_terminal and not once

    def drawn() -> str:
        width, height = screen.size
        colour = stream.isatty() and not screen.no_color and not screen.is_dumb_terminal
        return draw(run, log, width, max(1, height - 1), colour, time.time())

    if not live:
        log.poll()
        stream.write(
            drawn().encode(stream.encoding or "utf-8", "replace").decode(stream.encoding or "utf-8") + "\n"
        )
        stream.flush()
        return
    try:
        with Live(console=screen, auto_refresh=False, redirect_stdout=False, redirect_stderr=False) as place:
            while True:
                status = run.status  # before the log: so that the last events of an ended run are seen
                log.poll()
                place.update(Text.from_ansi(drawn()), refresh=True)
                if status != "running":
                    return
                time.sleep(every)
    except KeyboardInterrupt:
        return


def draw(run: Run, log: Log, width: int, height: int, colour: bool, now: float) -> str:
    """The frame of the events that ``log`` has read."""
    state, steps, validations = console.State(), list[events.StepDone](), list[events.Validated]()
    said: deque[events.Event] = deque(maxlen=2)
    sample: events.Sampled | None = None
    for event in log.events:
        state.take(event)
        if isinstance(event, events.StepDone):
            steps.append(event)
        elif isinstance(event, events.Validated):
            validations.append(event)
        elif isinstance(event, events.Notice | events.StepSkipped | events.RunEnded):
            said.append(event)
        elif isinstance(event, events.Sampled):
            sample = event
    status = run.status.replace("_", " ")
    head = [
        console.line(f"{run.path.resolve().name} · {status}")
        + _place(state, steps, now if status == "running" else None)
    ]
    if not steps:
        head.append("no update yet" if status == "running" else "no update was made")
    if status == "running" and log.events:
        silent = now - log.events[-1].at
        if silent > max(QUIET_S, 10 * max((step.seconds for step in steps[-20:]), default=0.0)):
            head.append(
                f"no event for {console.duration(silent)}: it may be busy, or killed; go on with: {run.hint}"
            )
    if log.strange:
        head.append(f"{log.strange:,} lines of {EVENTS} are not understood (another version of tunesmith?)")
    tail = _numbers(steps, validations)
    tail += [console.readable(event) for event in said]
    if sample is not None:
        tail.append(console.readable(sample))
    head = [part for line in head for part in _wrapped(line, width)]
    tail = [part for line in tail for part in _wrapped(line, width)]
    room = height - len(head) - len(tail)
    body = _charts(steps, validations, width, room) if steps and room >= LEAST_CHART and width >= 24 else []
    text = "\n".join(line.rstrip() for line in [*head, *body, *tail][:height])
    if colour:
        return text
    import plotext

    return "\n".join(line.rstrip() for line in plotext.uncolorize(text).split("\n"))


def _place(state: console.State, steps: Sequence[events.StepDone], now: float | None) -> str:
    if not steps:
        return ""
    last = steps[-1]
    of = "" if state.total is None else f"/{state.total:,}"
    return f" · step {last.step:,}{of} · epoch {last.epoch:.2f}{'' if now is None else state.to_go(now)}"


def _numbers(steps: Sequence[events.StepDone], validations: Sequence[events.Validated]) -> list[str]:
    """The last numbers in words, as the charts show only their course."""
    lines: list[str] = []
    if steps:
        facts = console.facts(steps[-20:])
        lines.append(
            " · ".join(
                [
                    f"loss {console.task_loss(steps[-1])}",
                    *(f"{name} {value}" for name, value in facts.items()),
                ]
            )
        )
    if validations:
        last, best = validations[-1], [event for event in validations if event.best][-1:]
        text = f"validation {last.loss:.4f} at step {last.step:,} · perplexity {last.perplexity:.4g}"
        lines.append(text + "".join(f" · best {event.loss:.4f} at step {event.step:,}" for event in best))
    return lines


def _charts(
    steps: Sequence[events.StepDone], validations: Sequence[events.Validated], width: int, height: int
) -> list[str]:
    """The loss; below it, if there is room, learning rate, gradient norm and speed side by side."""
    x = [float(step.step) for step in steps]
    task = [step for step in steps if step.task_units > 0]
    places, losses = [float(step.step) for step in task], [step.task_loss for step in task]
    span = max(5, len(steps) // SMOOTH)
    title = (
        "loss: · each update, ● validation"
        if len(task) < 3
        else f"loss: · each update, ━ over {span}, ● validation"
    )
    curves = [Series(*_thinned(places, losses, 2 * width), "·", "gray")]
    if len(task) > 2:
        curves.append(Series(*_thinned(places, smoothed(losses, span), 2 * width), "hd", "blue", joined=True))
    curves.append(
        Series(
            [float(event.step) for event in validations], [event.loss for event in validations], "●", "orange"
        )
    )
    many = min(3, width // 30)
    below = height // 3 if many and height >= 2 * LEAST_CHART + 2 else 0
    lines = _chart(title, curves, width, height - below)
    if below:
        speed = [
            (step.units if step.learned is None else step.learned) / max(step.seconds, 1e-9) for step in steps
        ]
        others = [
            ("gradient norm", [step.gradient_norm for step in steps]),
            ("learned tokens/s", speed),
            ("learning rate", [step.learning_rate for step in steps]),
        ][:many]
        each = width // len(others)
        drawn = [
            _chart(name, [Series(*_thinned(x, y, 2 * each), "hd", "blue", joined=True)], each, below)
            for name, y in others
        ]
        lines += ["".join(row) for row in zip_longest(*drawn, fillvalue=" " * each)]
    return lines


def smoothed(values: Sequence[float], span: int) -> list[float]:
    """Exponential means with weight 2 / (span + 1) on the newest, corrected for the start; values that are
    not finite are skipped."""
    keep = 1 - 2 / (span + 1)
    total, weight, means = 0.0, 0.0, []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        means.append(total / weight if weight else math.nan)
    return means


def _thinned(x: Sequence[float], y: Sequence[float], most: int) -> tuple[list[float], list[float]]:
    points = charts.thinned([(a, b) for a, b in zip(x, y, strict=True) if math.isfinite(b)], most)
    return [a for a, _ in points], [b for _, b in points]


def _chart(title: str, curves: Sequence[Series], width: int, height: int) -> list[str]:
    """``height`` lines of ``width`` cells, with colours."""
    import plotext

    figure = plotext.figure
    figure.clear()
    figure.theme("colorless")
    figure.plot_size(width, height)
    figure.title(_cut(title, width - 2))
    for curve in curves:
        if not curve.x:
            continue
        drawn = figure.signal(list(curve.x), list(curve.y), marker=plotext.marker(curve.mark, curve.colour))
        if curve.joined and len(curve.x) > 1:
            drawn.lines(True)
        figure.draw(drawn)
    return str(figure.build()).split("\n")[:height]


def _wrapped(text: str, width: int) -> list[str]:
    """At most two lines of at most ``width`` cells."""
    return [_cut(line, width) for line in textwrap.wrap(text, width, max_lines=2, placeholder="…")]


def _cut(text: str, width: int) -> str:
    """One line of at most ``width`` cells, with an ellipsis if it was longer."""
    if cell_len(text) <= width:
        return text
    line = Text(text)
    line.truncate(width, overflow="ellipsis")
    return line.plain
