"""What stops a run: signals and failures, before step 1 and after it."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from tunesmith.errors import OutOfMemory, RankLost, TunesmithError
from tunesmith.events import Notice, Sink
from tunesmith.machine import backend
from tunesmith.machine.ranks import Ranks
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.directory import Run


@contextmanager
def before_training(run: Run | None, notify: Sink) -> Iterator[None]:
    """Mark ``run`` as interrupted or failed if the block is. What was measured stays for a resumed run."""
    try:
        yield
    except BaseException as error:
        if run is not None:
            stopped = isinstance(error, KeyboardInterrupt)
            run.mark("interrupted" if stopped else "failed")
            if stopped:
                text = f"stopped before step 1, what was measured is kept; go on with: {run.hint}"
                notify(Notice(text, level="warning"))
        if isinstance(error, RuntimeError | MemoryError) and backend.is_out_of_memory(error):
            message = f"the device ran out of memory: {error}"
            raise OutOfMemory(
                message, where="before step 1", hint="lower batch.tokens, in a new run"
            ) from error
        raise


@dataclass
class Ending:
    """How training ended, and why if it did not complete; a failure if nothing else is said."""

    status: str = "failed"
    reason: str | None = None


@contextmanager
def explained(ending: Ending, cursor: Cursor, hint: str) -> Iterator[None]:
    """Write to ``ending`` why the block was left, if an exception ends it. ``hint``: how the run goes on."""
    try:
        yield
    except TunesmithError as error:
        ending.reason = error.what
        raise
    except KeyboardInterrupt:
        ending.status = "interrupted"
        ending.reason = f"at once, before the step was finished; go on with: {hint}"
        raise
    except (RuntimeError, MemoryError) as error:
        ending.reason = f"{type(error).__name__}: {error}"
        if not backend.is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"the device ran out of memory: {error}",
            where=f"after step {cursor.step}",
            hint=f"lower batch.tokens or loop.sample_tokens, in a new run; or try: {hint}",
        ) from error


@contextmanager
def interruptible(among: Ranks) -> Iterator[threading.Event]:
    """An event that SIGINT and SIGTERM set, so that the step is finished and saved.

    A second signal interrupts at once (SIGTERM: only if there is one rank)."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number: int, frame: object) -> None:
        # `mlx.launch` repeats SIGTERM once a rank is gone
        if stop.is_set() and (number == signal.SIGINT or among.size == 1):
            raise KeyboardInterrupt
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    except RankLost:  # this process ends by itself, after it has said why
        before[signal.SIGTERM] = signal.SIG_IGN
        raise
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
