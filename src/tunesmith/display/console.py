"""How a run is shown while it happens: a live panel or plain lines, and ``training.log``.

Each is a sink (``Event -> None``), and all that it shows can be rebuilt from ``events.jsonl``. Nothing is
written to standard output, which is for results. Memory is in GB (1e9 bytes), losses in the objective's
unit."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import singledispatch
from typing import TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunesmith import events
from tunesmith.display import counts
from tunesmith.display.text import many
from tunesmith.events import QUIET_S, Event, Sink

OF_UPDATES = (events.StepDone, events.Instruments, events.RowLosses, events.HeldOutLosses)
"""Events of single updates and rows. Of these the display shows only ``StepDone``, every few seconds; the log
has all."""


def duration(seconds: float) -> str:
    """``4 s``, ``3 m 05 s`` or ``2 h 07 m``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} m"


def size(n_bytes: float) -> str:
    """Bytes as ``1.23 GB``, or ``4.5 MB`` below a gigabyte."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def pace(per_second: float) -> str:
    """``12.5/s``, or ``3.2 s each`` if less than one a second is done."""
    if per_second >= 1:
        return f"{per_second:,.1f}/s"
    seconds = 1 / per_second
    return f"{f'{seconds:.1f} s' if seconds < 60 else duration(seconds)} each"


def line(text: str, limit: int = 10_000) -> str:
    """One printable line: white space joined, control characters (a terminal would obey them) escaped."""
    joined = " ".join(text.split())
    joined = joined if len(joined) <= limit else joined[: limit - 1] + "…"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in joined)


def speed(steps: Sequence[events.StepDone]) -> float:
    """Learned tokens a second over all ``steps``."""
    seconds = sum(step.seconds for step in steps)
    learned = sum(step.units if step.learned is None else step.learned for step in steps)
    return learned / seconds if seconds else 0.0


def task_loss(step: events.StepDone) -> str:
    """The mean loss of the task's rows; "–" if the update has none of them."""
    return f"{step.task_loss:.4f}" if step.task_units > 0 else "–"


def facts(steps: Sequence[events.StepDone]) -> dict[str, str]:
    """The facts of the last of ``steps``; the speed is over all of them."""
    last = steps[-1]
    shown = {} if last.mixed_loss is None else {"mixed rows": f"loss {last.mixed_loss:.4f}"}
    shown |= _shown_metrics(last.metrics) | {
        "learning rate": f"{last.learning_rate:.3g}",
        "gradient norm": f"{last.gradient_norm:.3g}" + (" clipped" if last.clipped else ""),
        "speed": f"{speed(steps):,.0f} learned tokens/s",
        "memory": _memory(last.memory),
    }
    if last.shapes:
        shown["shapes"] = ", ".join(f"{count:,} {name}" for name, count in last.shapes.items())
    return shown


SHOWN_METRICS = ("margin", "accuracy", "kl")


def _shown_metrics(metrics: Mapping[str, float]) -> dict[str, str]:
    """Those of an objective's metrics that fit into a line."""
    return {name: f"{metrics[name]:.3g}" for name in SHOWN_METRICS if name in metrics}


def _memory(readings: Mapping[str, int]) -> str:
    return ", ".join(f"{size(n_bytes)} {name}" for name, n_bytes in readings.items())


def readable(event: Event, total: int | None = None) -> str:
    """The event as one plain line without escape codes. ``total``: planned updates, shown beside the step."""
    if isinstance(event, events.StepDone) and total is not None:
        return line(_step(event, f"/{total:,}"))
    return line(_text(event))


@singledispatch
def _text(event: Event) -> str:
    return events.to_json(event)


@_text.register
def _notice(event: events.Notice) -> str:
    text = "warning: " if event.level == "warning" else ""
    text += f"{event.where}: {event.what}" if event.where else event.what
    text += f" (×{event.count:,})" if event.count != 1 else ""
    return text + (f" · hint: {event.hint}" if event.hint else "")


@_text.register
def _run_started(event: events.RunStarted) -> str:
    weights = f"{event.trainable:,} of {event.total:,} weights are trained"
    return f"run {event.run}: {event.steps:,} updates · {weights}{counts.opening(event.counts)}"


@_text.register
def _working(event: events.Working) -> str:
    return f"{event.label}: {event.done:,} of {event.total:,}"


@_text.register
def _resumed(event: events.Resumed) -> str:
    return f"resumed after update {event.step:,}; {event.redone:,} later ones are done again"


@_text.register
def _probed(event: events.Probed) -> str:
    text = (
        f"largest micro-batch: {many(event.rows, 'row')}, {event.tokens:,} tokens · {duration(event.seconds)}"
    )
    return f"{text} · memory {_memory(event.memory)}"


@_text.register
def _step(event: events.StepDone, of_total: str = "") -> str:
    text = f"step {event.step:,}{of_total} · epoch {event.epoch:.2f} · loss {task_loss(event)}"
    return text + "".join(f" · {name} {value}" for name, value in facts([event]).items())


@_text.register
def _step_skipped(event: events.StepSkipped) -> str:
    text = f"warning: step {event.step:,} skipped, loss {event.loss}, gradient norm {event.gradient_norm}"
    return f"{text} ({event.in_a_row} in a row) · rows {', '.join(event.rows)}"


@_text.register
def _validated(event: events.Validated) -> str:
    text = f"validation at step {event.step:,}: loss {event.loss:.4f} · perplexity {event.perplexity:.4g}"
    text += "".join(f" · {name} {value}" for name, value in _shown_metrics(event.metrics).items())
    if event.adherence is not None:
        text += f" · adherence {event.adherence:.1f} ({duration(event.adherence_seconds)})"
    tokens = "" if event.metrics else f", {event.units:,.0f} learned tokens"
    text += f" · {event.rows:,} rows{tokens} in {duration(event.seconds)}"
    return text + (" · best so far" if event.best else "")


@_text.register
def _sampled(event: events.Sampled) -> str:
    return f"sample at step {event.step:,}: {line(event.prompt, 160)} → {line(event.answer, 160)}"


@_text.register
def _growth(event: events.Growth) -> str:
    if not event.norms:
        return f"growth at step {event.step:,}: of adapters only, and here the weights are trained in full"
    name, norm = _largest(event.norms, "no weight")
    text = f"growth at step {event.step:,}: {many(len(event.norms), 'adapted layer')}, "
    if not norm:
        return text + "none has changed yet"
    text += f"largest norm {norm:.4g} in {name}"
    text += f" · {event.relative[name]:.2%} of its base" if name in event.relative else ""
    return text + (
        f" · effective rank {event.effective_rank[name]:.3g}" if name in event.effective_rank else ""
    )


@_text.register
def _instruments(event: events.Instruments) -> str:
    gradient, norm = _largest(event.gradient, "no weight")
    updated, ratio = _largest(event.ratios, "no weight")
    text = f"weights at step {event.step:,}: largest gradient {norm:.4g} in {gradient}"
    return f"{text} · largest update {ratio:.2%} of its weight in {updated}"


@_text.register
def _row_losses(event: events.RowLosses) -> str:
    source, loss = _largest(event.losses, "no row")
    return (
        f"rows of step {event.step:,}: {len(event.losses):,}, "
        f"highest loss {loss:.4f} nats a token at {source}"
    )


@_text.register
def _held_out_losses(event: events.HeldOutLosses) -> str:
    source, loss = _largest(event.losses, "no row")
    return f"held-out rows at step {event.step:,}: {len(event.losses):,}, highest loss {loss:.4f} at {source}"


@_text.register
def _activations(event: events.Activations) -> str:
    name, highest = _largest(event.largest, "no layer")
    text = f"activations at step {event.step:,}: {len(event.rms):,} layers, largest {highest:.4g} in {name}"
    return text + (f", root mean square {event.rms[name]:.4g} there" if name in event.rms else "")


@_text.register
def _saved(event: events.Saved) -> str:
    return f"saved step {event.step:,} to {event.path} ({size(event.bytes)} in {event.seconds:.1f} s)"


@_text.register
def _run_ended(event: events.RunEnded) -> str:
    text = f"{event.status.replace('_', ' ')} at step {event.step:,} after {duration(event.seconds)}"
    return text + (f": {event.why}" if event.why else "")


def _largest(values: Mapping[str, float], if_empty: str) -> tuple[str, float]:
    return max(values.items(), key=lambda item: item[1], default=(if_empty, 0.0))


def log(stream: TextIO) -> Sink:
    """The sink behind ``training.log``: local time, then ``readable(event)``; flushed after each line."""

    def write(event: Event) -> None:
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event.at))} {readable(event)}\n")
        stream.flush()

    return write


class State:
    """What the display knows. Speed and remaining time are those of this session, so a resumed run starts
    both again."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.recent: deque[events.StepDone] = deque(maxlen=20)
        self.done, self.began, self.ended = 0, 0.0, False  # updates seen, and when the first of them started
        self.validations: list[events.Validated] = []
        self.work: list[events.Working] = []  # first and last event of the other long work

    def take(self, event: Event) -> None:
        if isinstance(event, events.Working):
            same = self.work and self.work[-1].label == event.label and event.done > self.work[-1].done
            self.work = [self.work[0], event] if same else [event]
            return
        self.ended = isinstance(event, events.RunEnded)
        self.work = [] if isinstance(event, events.StepDone | events.RunEnded) else self.work
        if isinstance(event, events.RunStarted | events.Resumed):
            self.total, self.done = event.steps, 0
            self.recent.clear()
        elif isinstance(event, events.Validated):
            self.validations.append(event)
        elif isinstance(event, events.StepDone):
            self.began = self.began if self.done else event.at - event.seconds
            self.recent.append(event)
            self.done += 1

    def to_go(self, now: float) -> str:
        """Remaining time; validations and saves so far are spread over the updates that are left."""
        if not self.recent or self.total is None or self.ended:
            return ""
        last = self.recent[-1]
        each = (last.at - self.began) / self.done
        return f" · {duration((self.total - last.step) * each - min(now - last.at, each))} to go"

    def working(self) -> str:
        """Count, pace and expected end of the other long work; empty if it is younger than QUIET_S."""
        work = self.work  # the display's thread reads while the loop replaces it
        if len(work) < 2:
            return ""
        first, last = work
        seconds = last.at - first.at
        if seconds <= QUIET_S:
            return ""
        if last.done >= last.total:
            return f"{readable(last)} in {duration(seconds)}"
        each_second = max(last.progress - first.progress, 1 / last.total) / seconds
        left, per_second = (1 - last.progress) / each_second, last.total * each_second
        end = time.strftime("%H:%M:%S", time.localtime(last.at + left))
        return f"{readable(last)} · {pace(per_second)} · {duration(left)} to go, ends {end}"

    def panel(self) -> Panel | Text:
        recent = list(self.recent)  # the display's thread reads while the loop adds
        if not recent:
            return Text(self.working())
        step, rows = recent[-1], Table.grid(padding=(0, 2), expand=True)
        rows.add_column(width=14, style="dim")
        rows.add_column(ratio=1)
        rows.add_row("", ProgressBar(total=self.total, completed=step.step))
        of = "" if self.total is None else f"/{self.total:,}"
        rows.add_row("step", f"{step.step:,}{of} · epoch {step.epoch:.2f}{self.to_go(time.time())}")
        rows.add_row("loss", task_loss(step))
        if self.validations:
            first, last = self.validations[0], self.validations[-1]
            since = f", from {first.loss:.4f} at step {first.step:,}" if first is not last else ""
            rows.add_row("validation", f"{last.loss:.4f} at step {last.step:,}{since}")
        for name, value in facts(recent).items():
            rows.add_row(name, value)
        if work := self.working():
            rows.add_row("now", Text(work))
        return Panel(rows, title="training", title_align="left")


@contextmanager
def sink(stream: TextIO, *, every: float = 5.0) -> Iterator[Sink]:
    """A sink that shows a run on ``stream``: a live panel on a terminal, else plain lines. NO_COLOR is
    respected.

    every: seconds between two plain lines about updates, or about other long work (not shown in its first
    QUIET_S); the first and last update and all other events are always shown."""
    state, shown_at = State(), float("-inf")
    console = Console(file=stream)  # reads NO_COLOR and TERM by itself

    def plain(event: Event) -> None:
        nonlocal shown_at
        state.take(event)
        if isinstance(event, OF_UPDATES[1:]):
            return
        text = state.working() if isinstance(event, events.Working) else readable(event, state.total)
        if isinstance(event, events.StepDone | events.Working):
            ends = (
                event.done >= event.total if isinstance(event, events.Working) else event.step == state.total
            )
            if not text or (event.at - shown_at < every and not ends):
                return
            shown_at = event.at
            text += state.to_go(event.at) if isinstance(event, events.StepDone) else ""
        stream.write(f"{text}\n")
        stream.flush()

    def above_panel(event: Event) -> None:
        state.take(event)
        if not isinstance(event, (*OF_UPDATES, events.Working)):
            text = readable(event)
            console.print(Text(text, style="yellow" if text.startswith("warning") else ""))

    if stream.isatty() and not console.is_dumb_terminal:
        with Live(get_renderable=state.panel, console=console, refresh_per_second=4, redirect_stdout=False):
            yield above_panel
    else:
        yield plain
