"""What stops a run: signals, and failures before step 1."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tunesmith.errors import OutOfMemory, RankLost
from tunesmith.events import Notice, Sink
from tunesmith.machine import backend
from tunesmith.machine.ranks import Ranks
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
