"""Results and progress in a notebook: HTML for Jupyter and what reads its outputs, on light and dark grounds.

A result whose class is a `NotebookResult` is shown by the view that is registered for the class. Views are
made where everything is known that they show; so `runs.directory.Run` gets its view from `reports`.
Progress is one display that is updated in place. IPython is used if the program runs in its kernel, and never
imported otherwise."""

from __future__ import annotations

import functools
import inspect
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import resources
from typing import Any, Protocol, TypeVar

from markupsafe import Markup, escape

from tunesmith import events
from tunesmith.display import charts, console
from tunesmith.display.charts import Line
from tunesmith.display.text import escaped, many, visible
from tunesmith.errors import TunesmithError
from tunesmith.events import Event, Sink

EVERY_S = 0.5
"""The display of progress is updated at most this often."""
PLAIN = 200
"""Letters of the text that stands for a result."""
LATEST, KEPT = 3, 200
"""Messages that are shown during the work, and that are kept until its end."""
_Kind = TypeVar("_Kind")
_VIEWS: dict[type, Callable[[Any], Markup]] = {}


class NotebookResult:
    """Base of what a notebook shows as HTML: by its registered view, or by ``repr`` if there is none."""

    __slots__ = ()

    def _repr_html_(self) -> str | None:
        inside = _viewed(self)
        return None if inside is None else cell(inside)

    def _repr_mimebundle_(self, include: object = None, exclude: object = None) -> dict[str, str]:
        """IPython prefers this: the text that stands for the HTML where that is not shown is short."""
        inside = _viewed(self)
        if inside is None:
            return {"text/plain": repr(self)}
        return {"text/html": cell(inside), "text/plain": visible(inside.striptags(), PLAIN)}


def _viewed(result: NotebookResult) -> Markup | None:
    view = _VIEWS.get(type(result))
    try:
        return None if view is None else view(result)
    except TunesmithError as error:  # the result's files are gone or damaged
        return verdict(str(error), "error")


def register(kind: type[_Kind], view: Callable[[_Kind], Markup]) -> None:
    """Make ``view`` what a notebook shows of a result of this class."""
    _VIEWS[kind] = view


def cell(inside: Markup) -> str:
    """An output of a notebook that brings its own style and needs no script and no request."""
    style = (resources.files("tunesmith.display") / "cell.css").read_text("utf-8")
    return escaped(Markup('<style>{}</style><div class="tunesmith">{}</div>').format(Markup(style), inside))


def verdict(text: str, tone: str) -> Markup:
    """tone: good, warning, error or note, as a coloured line beside the text."""
    return Markup('<p class="verdict {}">{}</p>').format(tone, text)


def table(head: Sequence[str], rows: Iterable[Sequence[object]], numbers: Sequence[int] = ()) -> Markup:
    """``numbers``: columns that are set flush right."""
    classes = [Markup(' class="number"') if place in numbers else "" for place in range(len(head))]
    top = Markup("").join(
        Markup('<th scope="col"{}>{}</th>').format(kind, name)
        for kind, name in zip(classes, head, strict=True)
    )
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(
                Markup("<td{}>{}</td>").format(kind, value) for kind, value in zip(classes, row, strict=True)
            )
        )
        for row in rows
    )
    whole = '<table class="tunesmith-table"><thead><tr>{}</tr></thead><tbody>{}</tbody></table>'
    return charts.SCROLL.format(Markup(whole).format(top, body))


def folded(title: str, inside: Markup) -> Markup:
    """What the reader opens; nothing if there is nothing inside."""
    return Markup("<details><summary>{}</summary>{}</details>").format(title, inside) if inside else inside


def soft(text: str) -> Markup:
    return Markup('<p class="soft">{}</p>').format(text)


class CellOutput(Protocol):
    """An output of a cell that can be replaced."""

    def update(self, obj: dict[str, str], *, raw: bool) -> None: ...


def running() -> bool:
    """Whether this program is the kernel of a notebook."""
    shells = sys.modules.get("ipykernel.zmqshell")
    ipython = sys.modules.get("IPython")
    return bool(shells and ipython and isinstance(ipython.get_ipython(), shells.ZMQInteractiveShell))


def quieten() -> None:
    """Silence what other packages say in a notebook when they are loaded: that torch is missing, and that
    ipywidgets are."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    warnings.filterwarnings("ignore", message="IProgress not found")


def with_progress(verb: Callable[..., Any]) -> Callable[..., Any]:
    """``verb``; in a notebook with a display of its progress in each call that does not give ``notify``."""
    if not running() or "notify" not in inspect.signature(verb).parameters:
        return verb

    @functools.wraps(verb)
    def shown(*arguments: Any, **options: Any) -> Any:
        if "notify" in options:
            return verb(*arguments, **options)
        with sink(_display) as notify:
            return verb(*arguments, **options, notify=notify)

    return shown


def _display(content: dict[str, str]) -> CellOutput:
    return sys.modules["IPython"].display.display(content, raw=True, display_id=True)


@contextmanager
def sink(display: Callable[[dict[str, str]], CellOutput]) -> Iterator[Sink]:
    """A sink that shows work in one output: progress with its rate and end and the loss so far, at the end
    what is left to say. ``display`` makes the output, when there is something to show."""
    progress, handle, shown_at = Progress(), None, 0.0

    def show(ended: bool) -> None:
        nonlocal handle, shown_at
        inside = progress.ended() if ended else progress.html()
        if not inside and handle is None:
            return
        content = {"text/html": cell(inside), "text/plain": escaped(progress.line)}
        shown_at = time.time()
        if handle is None:
            handle = display(content)
        else:
            handle.update(content, raw=True)

    def take(event: Event) -> None:
        progress.take(event)
        if time.time() - shown_at >= EVERY_S:
            show(ended=False)

    try:
        yield take
    finally:
        show(ended=True)


class Progress:
    """What is shown of the events so far."""

    def __init__(self) -> None:
        self._state = console.State()
        self._losses: list[tuple[int, float]] = []
        self._messages: list[str] = []
        self._left_out = 0
        self.line = ""
        """The latest news in one line."""

    def take(self, event: Event) -> None:
        self._state.take(event)
        if isinstance(event, events.StepDone):
            self.line = console.readable(event, self._state.total)
            if event.task_units > 0:
                self._losses.append((event.step, event.task_loss))
        elif isinstance(event, events.Working):
            self.line = self._state.working() or self.line
        elif not isinstance(event, console.OF_UPDATES):
            self.line = console.readable(event)
            self._messages.append(self.line)
            if len(self._messages) > KEPT:
                del self._messages[0]
                self._left_out += 1

    def html(self) -> Markup:
        """During the work: a bar, numbers, the loss of training, and the latest messages."""
        parts = [*self._bar(), _lines(self._messages[-LATEST:])]
        if len(self._losses) > 1:
            places, losses = zip(*self._losses, strict=True)
            validations = self._state.validations
            held_out = [event.step for event in validations], [event.loss for event in validations]
            curves = [Line("training, each update", places, losses), Line("held out", *held_out, "marks", 1)]
            parts.append(charts.lines("Loss", curves))
        return Markup("").join(parts)

    def ended(self) -> Markup:
        """Afterwards: warnings, the last line, and all messages for whoever opens them."""
        warnings = [text for text in self._messages if text.startswith("warning: ")]
        rest = [text for text in self._messages if text not in warnings]
        last = [self.line] if self.line and self.line not in self._messages else rest[-1:]
        more = [f"… {many(self._left_out, 'earlier message')}"] if self._left_out else []
        all_messages = _lines([*more, *rest]) if len(rest) > 1 else Markup("")
        title = many(self._left_out + len(rest), "message")
        return _lines([*warnings, *last]) + folded(title, all_messages)

    def _bar(self) -> Iterator[Markup]:
        state = self._state
        if work := state.working():
            last = state.work[-1]
            yield _bar(last.done, last.total) + soft(work)
        elif state.recent and state.total:
            last = state.recent[-1]
            facts = "".join(f" · {name} {value}" for name, value in console.facts(list(state.recent)).items())
            yield _bar(last.step, state.total) + soft(
                f"step {last.step:,}/{state.total:,}{state.to_go(time.time())}"
                f" · loss {console.task_loss(last)}{facts}"
            )


def _bar(done: int, total: int) -> Markup:
    share = 100 * min(1.0, done / total) if total else 100
    return Markup('<div class="progress"><div style="width:{}%"></div></div>').format(f"{share:.1f}")


def _lines(texts: Sequence[str]) -> Markup:
    return Markup("<pre>{}</pre>").format(escape("\n".join(texts))) if texts else Markup("")
