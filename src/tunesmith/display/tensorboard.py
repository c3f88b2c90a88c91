"""The numbers of a run as TensorBoard files."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import singledispatchmethod
from pathlib import Path
from typing import Any

from tunesmith import events
from tunesmith.display import console
from tunesmith.errors import SetupError
from tunesmith.events import Event, Sink


@contextmanager
def board_sink(folder: Path) -> Iterator[Sink]:
    """A sink that writes TensorBoard files into ``folder``. Raises SetupError if tensorboardX is missing."""
    try:
        from tensorboardX import SummaryWriter
    except ImportError as error:
        hint = "pip install tensorboardX, or leave the sink out"
        raise SetupError("the TensorBoard sink needs the package tensorboardX", hint=hint) from error

    def open_writer(purge_step: int | None = None) -> Any:
        return SummaryWriter(str(folder), purge_step=purge_step)

    board = Board(open_writer)
    try:
        yield board.write
    finally:
        board.writer.close()


class Board:
    """The files of one run. ``open_writer``: a new writer, which hides what an earlier one wrote from a step
    on."""

    def __init__(self, open_writer: Any) -> None:
        self.open_writer = open_writer
        self.writer = open_writer()

    @singledispatchmethod
    def write(self, event: Event) -> None:
        """Events of other kinds have no numbers."""

    @write.register
    def _resumed(self, event: events.Resumed) -> None:
        # A session that was killed may have written updates beyond its last checkpoint; they are done again.
        self.writer.close()
        self.writer = self.open_writer(event.step + 1)

    @write.register
    def _sampled(self, event: events.Sampled) -> None:
        # Indented by four spaces it is a code block: an answer's own Markdown must not format the page.
        text = f"    {event.prompt}\n\n→ {event.answer}".replace("\n", "\n    ")
        tag = f"samples/{console.line(event.prompt, 60)}"
        self.writer.add_text(tag, text, event.step, walltime=event.at)

    @write.register
    def _step_done(self, event: events.StepDone) -> None:
        update = {
            "loss": event.loss,
            "learning_rate": event.learning_rate,
            "gradient_norm": event.gradient_norm,
            "padding": event.padding,
            "tokens_per_second": console.speed([event]),
        }
        if event.mixed_loss is not None:
            update |= {"task_loss": event.task_loss, "mixed_loss": event.mixed_loss}
        self._numbers(event, "train", update | event.metrics)
        self._numbers(event, "memory", event.memory)
        self._numbers(event, "seconds", event.stages)

    @write.register
    def _validated(self, event: events.Validated) -> None:
        numbers = {"loss": event.loss, "perplexity": event.perplexity} | event.metrics
        if event.adherence is not None:
            numbers["adherence"] = event.adherence
        self._numbers(event, "valid", numbers)

    @write.register
    def _instruments(self, event: events.Instruments) -> None:
        self._numbers(event, "gradient", event.gradient)
        self._numbers(event, "update_ratio", event.ratios)

    @write.register
    def _row_losses(self, event: events.RowLosses) -> None:
        if losses := event.losses.values():
            self._numbers(event, "rows", {"lowest": min(losses), "highest": max(losses)})

    @write.register
    def _held_out_losses(self, event: events.HeldOutLosses) -> None:
        if losses := event.losses.values():
            self._numbers(event, "held_out_rows", {"lowest": min(losses), "highest": max(losses)})

    @write.register
    def _growth(self, event: events.Growth) -> None:
        self._numbers(event, "growth", event.norms)
        self._numbers(event, "relative_growth", event.relative)
        self._numbers(event, "effective_rank", event.effective_rank)
        if "edges" in event.histogram and "counts" in event.histogram:
            self._histogram(event, event.histogram["edges"], event.histogram["counts"])

    @write.register
    def _activations(self, event: events.Activations) -> None:
        self._numbers(event, "activation_rms", event.rms)
        self._numbers(event, "activation_largest", event.largest)

    def _numbers(self, event: Any, group: str, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(f"{group}/{name}", value, event.step, walltime=event.at)

    def _histogram(self, event: events.Growth, edges: list[float], counts: list[float]) -> None:
        """The entries are not kept, so their sum is taken as if each lay in the middle of its bin."""
        middles = [(low + high) / 2 for low, high in itertools.pairwise(edges)]
        self.writer.add_histogram_raw(
            "change",
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(count * middle for count, middle in zip(counts, middles, strict=True)),
            sum_squares=sum(norm**2 for norm in event.norms.values()),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=event.step,
            walltime=event.at,
        )
