"""Where the events of a run are shown to people: a live panel or plain lines, ``training.log``, TensorBoard.

Everything here is a sink (``Event -> None``) and can be rebuilt from ``events.jsonl``. Standard output is
left alone: results go there. Memory is shown in GB (1e9 bytes), losses in the unit of the objective."""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from tunesmith import events
from tunesmith.errors import SetupError
from tunesmith.events import Event, Sink

OF_UPDATES = (events.StepDone, events.Instruments, events.RowLosses)
"""Events of single updates: people are shown the first only, now and then; the log has all."""

QUIET_S = 2.0
"""Other long work is not shown before it has taken so long."""


def duration(seconds: float) -> str:
    """``4 s``, ``3 m 05 s`` or ``2 h 07 m``."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return (
        f"{whole // 60} m {whole % 60:02d} s"
        if whole < 3600
        else f"{whole // 3600} h {whole % 3600 // 60:02d} m"
    )


def size(n_bytes: float) -> str:
    """Bytes as ``1.23 GB``, or ``4.5 MB`` below a gigabyte."""
    return f"{n_bytes / 1e9:.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:.1f} MB"


def _line(text: str, limit: int = 10_000) -> str:
    """One printable line: white space joined, control characters (a terminal would obey them) written out."""
    joined = " ".join(text.split())
    joined = joined if len(joined) <= limit else joined[: limit - 1] + "…"
    return "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in joined)


def _count(value: object) -> str:
    if isinstance(value, dict):
        return f"({', '.join(f'{name} {_count(inner)}' for name, inner in value.items())})" if value else "0"
    return (
        f"{value:.4g}" if isinstance(value, float) else f"{value:,}" if isinstance(value, int) else str(value)
    )


def _speed(steps: Sequence[events.StepDone]) -> float:
    seconds = sum(step.seconds for step in steps)
    return (
        sum(step.units if step.learned is None else step.learned for step in steps) / seconds
        if seconds
        else 0.0
    )


def facts(steps: Sequence[events.StepDone]) -> dict[str, str]:
    """The facts of the last of ``steps``; the speed is over all of them."""
    last = steps[-1]
    return (
        _watched(last.metrics)
        | {
            "learning rate": f"{last.learning_rate:.3g}",
            "gradient norm": f"{last.gradient_norm:.3g}" + (" clipped" if last.clipped else ""),
            "speed": f"{_speed(steps):,.0f} learned tokens/s",
            "memory": _memory(last.memory),
        }
        | (
            {"shapes": ", ".join(f"{count:,} {name}" for name, count in last.shapes.items())}
            if last.shapes
            else {}
        )
    )


SHOWN = ("margin", "accuracy", "kl")


def _watched(metrics: Mapping[str, float]) -> dict[str, str]:
    """What of an objective's metrics fits into a line."""
    return {name: f"{metrics[name]:.3g}" for name in SHOWN if name in metrics}


def _memory(readings: Mapping[str, int]) -> str:
    return ", ".join(f"{size(n_bytes)} {name}" for name, n_bytes in readings.items())


def readable(event: Event, total: int | None = None) -> str:
    """The event as one plain line without escape codes. ``total``: planned updates, shown beside the step."""
    match event:
        case events.Notice(what=what, where=where, level=level, count=count, hint=hint):
            text = ("warning: " if level == "warning" else "") + (f"{where}: {what}" if where else what)
            text += (f" (×{count:,})" if count != 1 else "") + (f" · hint: {hint}" if hint else "")
        case events.RunStarted():
            text = f"run {event.run}: {event.steps:,} updates · {event.trainable:,} of {event.total:,} weights train"
            text += "".join(f" · {name} {_count(value)}" for name, value in event.counts.items())
        case events.Working():
            text = f"{event.label}: {event.done:,} of {event.total:,}"
        case events.Resumed():
            text = f"resumed after update {event.step:,}; {event.redone:,} later ones are done again"
        case events.Probed():
            text = f"largest micro-batch: {event.rows:,} rows, {event.tokens:,} tokens · {duration(event.seconds)}"
            text += f" · memory {_memory(event.memory)}"
        case events.StepDone():
            text = f"step {event.step:,}" + (f"/{total:,}" if total is not None else "")
            text += f" · epoch {event.epoch:.2f} · loss {event.loss:.4f}"
            text += "".join(f" · {name} {value}" for name, value in facts([event]).items())
        case events.StepSkipped():
            text = f"warning: step {event.step:,} skipped, loss {event.loss}, gradient norm {event.gradient_norm}"
            text += f" ({event.in_a_row} in a row) · rows {', '.join(event.rows)}"
        case events.Validated():
            text = f"validation at step {event.step:,}: loss {event.loss:.4f} · perplexity {event.perplexity:.4g}"
            text += "".join(f" · {name} {value}" for name, value in _watched(event.metrics).items())
            tokens = "" if event.metrics else f", {event.units:,.0f} learned tokens"
            text += f" · {event.rows:,} rows{tokens} in {duration(event.seconds)}"
            text += " · best so far" if event.best else ""
        case events.Sampled():
            text = f"sample at step {event.step:,}: {_line(event.prompt, 160)} → {_line(event.answer, 160)}"
        case events.Growth():
            name, norm = max(event.norms.items(), key=lambda item: item[1], default=("no weight", 0.0))
            text = (
                f"growth at step {event.step:,}: {len(event.norms):,} weights, largest {norm:.4g} in {name}"
            )
            text += f" · {event.relative[name]:.2%} of its base" if name in event.relative else ""
            text += (
                f" · effective rank {event.effective_rank[name]:.3g}" if name in event.effective_rank else ""
            )
        case events.Instruments():
            name, norm = max(event.gradient.items(), key=lambda item: item[1], default=("no weight", 0.0))
            text = f"weights at step {event.step:,}: largest gradient {norm:.4g} in {name}"
            name, ratio = max(event.ratios.items(), key=lambda item: item[1], default=("no weight", 0.0))
            text += f" · largest update {ratio:.2%} of its weight in {name}"
        case events.RowLosses():
            name, loss = max(event.losses.items(), key=lambda item: item[1], default=("no row", 0.0))
            text = f"rows of step {event.step:,}: {len(event.losses):,}, highest loss {loss:.4f} nats a token at {name}"
        case events.Activations():
            name, highest = max(event.largest.items(), key=lambda item: item[1], default=("no layer", 0.0))
            text = f"activations at step {event.step:,}: {len(event.rms):,} layers, largest {highest:.4g} in {name}"
            text += f", root mean square {event.rms[name]:.4g} there" if name in event.rms else ""
        case events.Saved():
            text = f"saved step {event.step:,} to {event.path} ({size(event.bytes)} in {event.seconds:.1f} s)"
        case events.RunEnded():
            text = f"{event.status.replace('_', ' ')} at step {event.step:,} after {duration(event.seconds)}"
            text += f": {event.why}" if event.why else ""
        case _:
            text = events.to_json(event)
    return _line(text)


def log(stream: TextIO) -> Sink:
    """The sink behind ``training.log``: local time, then ``readable(event)``; flushed after each line."""

    def write(event: Event) -> None:
        stream.write(f"{time.strftime('%Y-%m-%d %H:%M:%S', time.localtime(event.at))} {readable(event)}\n")
        stream.flush()

    return write


class State:
    """What the display knows. Speed and time to go come from this session only, so a resumed run counts
    anew."""

    def __init__(self) -> None:
        self.total: int | None = None
        self.recent: deque[events.StepDone] = deque(maxlen=20)
        self.done, self.began, self.ended = 0, 0.0, False  # updates seen, and when the first of them started
        self.validations: list[events.Validated] = []
        self.work: list[events.Working] = []  # other long work: the first and the last word of it

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
        """Validations and saves so far are spread over the updates that are left."""
        if not self.recent or self.total is None or self.ended:
            return ""
        last = self.recent[-1]
        pace = (last.at - self.began) / self.done
        return f" · {duration((self.total - last.step) * pace - min(now - last.at, pace))} to go"

    def working(self) -> str:
        """Count, rate and end of the other long work; empty while it is younger than QUIET_S."""
        if len(both := self.work) < 2 or (took := both[-1].at - both[0].at) <= QUIET_S:
            return ""
        first, work = both
        if work.done >= work.total:
            return f"{readable(work)} in {duration(took)}"
        rate = max(work.done - first.done, 1) / took
        left = (work.total - work.done) / rate
        end = time.strftime("%H:%M:%S", time.localtime(work.at + left))
        return f"{readable(work)} · {rate:,.1f}/s · {duration(left)} to go, ends {end}"

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
        rows.add_row("loss", f"{step.loss:.4f}")
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

    every: seconds between two plain lines about updates, or about other long work (which is silent for its
    first QUIET_S); the first and last update and all other events are always shown."""
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


@contextmanager
def tensorboard(folder: Path) -> Iterator[Sink]:
    """A sink that writes TensorBoard files into ``folder``. Raises SetupError where tensorboardX is
    missing."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        hint = "pip install tensorboardX, or leave the sink out"
        raise SetupError("the TensorBoard sink needs the package tensorboardX", hint=hint) from error
    writer = SummaryWriter(str(folder))

    def numbers(event: Any, group: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(f"{group}/{name}", value, event.step, walltime=event.at)

    def write(event: Event) -> None:
        nonlocal writer
        match event:
            case events.Resumed():
                # TensorBoard then hides what an earlier, killed session wrote beyond the checkpoint.
                writer.close()
                writer = SummaryWriter(str(folder), purge_step=event.step + 1)
            case events.Sampled():
                # Four spaces make it a code block: an answer's own Markdown must not format the page.
                text = f"    {event.prompt}\n\n→ {event.answer}".replace("\n", "\n    ")
                writer.add_text(f"samples/{_line(event.prompt, 60)}", text, event.step, walltime=event.at)
            case events.StepDone(loss=loss, learning_rate=rate, gradient_norm=norm):
                known = {"loss": loss, "learning_rate": rate, "gradient_norm": norm, "padding": event.padding}
                numbers(event, "train", known | {"tokens_per_second": _speed([event])} | event.metrics)
                numbers(event, "memory", event.memory)
                numbers(event, "seconds", event.stages)
            case events.Validated():
                numbers(event, "valid", {"loss": event.loss, "perplexity": event.perplexity} | event.metrics)
            case events.Instruments():
                numbers(event, "gradient", event.gradient)
                numbers(event, "update_ratio", event.ratios)
            case events.RowLosses(losses=losses) if losses:
                numbers(event, "rows", {"lowest": min(losses.values()), "highest": max(losses.values())})
            case events.Growth():
                numbers(event, "growth", event.norms)
                numbers(event, "relative_growth", event.relative)
                numbers(event, "effective_rank", event.effective_rank)
                if event.histogram:
                    _histogram(writer, event)
            case events.Activations():
                numbers(event, "activation_rms", event.rms)
                numbers(event, "activation_largest", event.largest)

    try:
        yield write
    finally:
        writer.close()


def _histogram(writer: Any, event: events.Growth) -> None:
    """The sum that TensorBoard asks for is that of the middles of the bins: the entries themselves are not
    kept."""
    edges, counts = event.histogram["edges"], event.histogram["counts"]
    middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
    total = sum(count * middle for count, middle in zip(counts, middles, strict=True))
    squares = sum(norm**2 for norm in event.norms.values())
    writer.add_histogram_raw(
        "change",
        edges[0],
        edges[-1],
        sum(counts),
        total,
        squares,
        edges[1:],
        counts,
        event.step,
        walltime=event.at,
    )
