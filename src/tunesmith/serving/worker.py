"""The thread that owns MLX and the engine, and what keeps it going.

Requests come from the event loop and wait in a queue; between two steps of the engine the thread takes as
many as have a row and memory. If the thread dies or hangs, the requests under way end with an error, and
another thread starts a new engine on the same weights. If memory runs out, the batch is halved and the
requests are asked again: their tokens are a function of the request alone, so those that were delivered
already are skipped."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, TypeVar, cast

import mlx.core as mx

from tunesmith.engine.engine import Engine
from tunesmith.engine.prefixes import Prefixes
from tunesmith.engine.requests import NewToken, Request
from tunesmith.errors import ServeError, TunesmithError
from tunesmith.events import Notice, Sink
from tunesmith.machine import backend
from tunesmith.serving.limits import ServerLimits
from tunesmith.serving.rejections import Draining, EngineDied, Overloaded, TimedOut, TooLarge
from tunesmith.serving.streams import Answering, Observer, TokenStream

T = TypeVar("T")
MakeEngine: TypeAlias = Callable[[int, Prefixes | None], Engine]
"""(batch size, cache of prompts) → an engine that has not been entered."""
LOOK_S = 0.2
"""Time between two looks of the supervisor."""
LONGEST_PAUSE_S = 30.0
"""Longest time before a new start, if the engine dies again and again."""
QUIET_S = 60.0
"""An engine that lived so long is started anew without a pause."""
STOP_S, STORE_S = 10.0, 60.0
"""Longest time that the thread has to end, and to end and store prefixes in a folder."""


@dataclass(eq=False)
class _Job:
    """A function for MLX's thread, and the future of its result.
    ``cost``: bytes that it needs while it runs."""

    function: Callable[[], Any]
    done: asyncio.Future[Any]
    cost: int = 0


@dataclass(eq=False)
class _Life:
    """One thread with its engine. ``beat``: when the current step or job began; None while it waits.
    ``given_up``: another life has taken its place, and it must not touch the model again."""

    rows: dict[int, TokenStream] = field(default_factory=dict)
    cancelled: deque[TokenStream] = field(default_factory=deque)
    """Added to in any thread, taken from in its own."""
    submitting: TokenStream | None = None
    job: _Job | None = None
    beat: float | None = None
    allowed_s: float = 0.0
    given_up: bool = False
    ready: bool = False
    job_ran: bool = False
    """Whether a job has run since memory was measured last."""
    began: float = field(default_factory=time.monotonic)
    thread: threading.Thread | None = None

    @property
    def streams(self) -> list[TokenStream]:
        """Of the requests under way, and of the one that is being submitted, which may be named twice."""
        submitting = self.submitting
        return [*self.rows.values(), *([] if submitting is None else [submitting])]


class Worker:
    """``batch_size``: most requests under way at once. ``memory``: bytes that the process may use; None: nine
    tenths of what the machine has. ``prefix_bytes``: how many of them are for prompts that were read; None: a
    tenth. ``notify``: is called on the event loop.

    All methods are called on the event loop."""

    def __init__(
        self,
        limits: ServerLimits,
        *,
        batch_size: int,
        memory: int | None,
        prefix_bytes: int | None,
        notify: Sink,
    ) -> None:
        self.limits, self.batch_size, self._notify = limits, batch_size, notify
        self.memory = memory if memory is not None else backend.memory_limit() * 9 // 10
        self.prefix_bytes = self.memory // 10 if prefix_bytes is None else prefix_bytes
        self.weights = 0
        """Bytes in use without any request, measured when the engine starts and when it is idle."""
        self.reserved = self.prefix_bytes
        """Bytes promised to the cache of prompts and to what is being loaded."""
        self.restarts: Counter[str] = Counter()
        """Starts after the first, by reason: died or hung."""
        self.out_of_memory = 0
        self.draining = False
        """Whether clients are told that the server is ending."""
        self._make_engine: MakeEngine | None = None
        self._engine: Engine | None = None
        self._prefixes: Prefixes | None = None
        self._prefix_folder: Path | None = None
        self._waiting: deque[TokenStream] = deque()
        self._jobs: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._stopping = False
        self._life = _Life()
        """Has no thread until `start`."""
        self._supervisor: asyncio.Task[None] | None = None
        self._pace = 0.0
        self._first_start: asyncio.Future[None] | None = None
        """Of the first engine."""

    @property
    def in_use(self) -> set[str]:
        """Adapters, by their names in the engine, that requests need which are under way or wait."""
        with self._changed:  # else a request on its way between the two would be missed
            streams = [*self._life.streams, *self._waiting]
        return {stream.request.adapter for stream in streams if stream.request.adapter is not None}

    def ask(self, request: Request, observer: Observer | None = None) -> Answering:
        """Put ``request`` into the queue. Raises Overloaded if it is full, TooLarge if the request would not
        fit even alone, ModelError if it is not valid, Draining or EngineDied if there is no engine for it.
        What was admitted before the server drains is still taken then."""
        engine = self._running_engine()
        request.require(0)
        cost = engine.cost(request)
        self._require_room(cost, "its keys and values", "shorten the prompt, or ask for fewer tokens")
        stream = TokenStream(request, cost, observer)
        loop = asyncio.get_running_loop()
        for seconds, what in (
            (self.limits.first_token_s, "the first token"),
            (self.limits.total_s, "the answer"),
        ):
            stream.timers.append(loop.call_later(seconds, self._time_out, stream, seconds, what))
        with self._changed:
            self._waiting.append(stream)
            self._changed.notify()
        return Answering(stream, self._cancel)

    def admit(self, cost: int) -> None:
        """Raises as `ask` does if jobs of at most ``cost`` bytes cannot be run for a request now."""
        self._running_engine()
        self._require_room(cost, "its hidden states", "shorten the input")

    def _running_engine(self) -> Engine:
        if self._stopping:
            raise Draining("the server has ended")
        if self._engine is None or not self.healthy:
            raise EngineDied("the engine is being started", hint="ask again in a few seconds")
        return self._engine

    def _require_room(self, cost: int, purpose: str, hint: str) -> None:
        """Raises TooLarge if ``cost`` bytes would not fit even alone, Overloaded if the queue is full."""
        if self.weights + self.reserved + cost > self.memory:
            message = (
                f"needs {cost / 1e6:,.0f} MB for {purpose}, beside {self.weights / 1e6:,.0f} MB of "
                f"weights and {self.reserved / 1e6:,.0f} MB for prompts that were read; the server may use "
                f"{self.memory / 1e6:,.0f} MB"
            )
            raise TooLarge(f"the request {message}", hint=hint)
        if self.n_waiting >= self.limits.queue:
            message = f"{self.n_waiting} requests are waiting, as many as the server allows"
            raise Overloaded(message, self._retry_after())

    def run(self, function: Callable[[], T], cost: int = 0) -> Awaitable[T]:
        """The result of ``function``, called on MLX's thread between two steps of the engine, as soon as
        ``cost`` bytes are free beside the requests under way, or none is under way."""
        done: asyncio.Future[T] = asyncio.get_running_loop().create_future()
        with self._changed:
            self._jobs.append(_Job(function, done, cost))
            self._changed.notify()
        return done

    @contextmanager
    def reserve(self, n_bytes: int) -> Iterator[None]:
        """Inside, the memory belongs to what is being loaded: requests are admitted if they fit beside it,
        except that one which was queued before is taken when it is alone. Raises TooLarge if it is not
        free."""
        used = self.weights + self.kv_bytes + self.reserved
        if used + n_bytes > self.memory:
            message = (
                f"needs {n_bytes / 1e6:,.0f} MB; {used / 1e6:,.0f} of {self.memory / 1e6:,.0f} MB are used"
            )
            raise TooLarge(message, hint="drop an adapter, or start the server with a higher --memory")
        self.reserved += n_bytes
        try:
            yield
        finally:
            self.reserved -= n_bytes
            with self._changed:
                self._changed.notify()

    def forget(self, digest: str) -> None:
        """Free the prompts that the weights of ``digest`` have read. Called on MLX's thread."""
        if self._prefixes is not None:
            self._prefixes.forget(digest)

    @property
    def healthy(self) -> bool:
        """Whether the engine runs."""
        life = self._life
        return life.ready and not life.given_up and life.thread is not None and life.thread.is_alive()

    @property
    def n_waiting(self) -> int:
        """Requests that wait for the engine, or for memory for a job."""
        return len(self._waiting) + sum(job.cost > 0 for job in list(self._jobs))

    @property
    def n_rows(self) -> int:
        """Requests under way."""
        return len(self._life.rows)

    @property
    def busy(self) -> bool:
        """Whether there are requests or jobs, under way or waiting."""
        return bool(self._waiting or self.n_rows or self._jobs or self._life.job)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that the requests under way may need."""
        return _padded([stream.cost for stream in list(self._life.rows.values())])

    async def start(self) -> None:
        """Start the thread. It has no engine until `serve`; `run` works at once."""
        self._loop = asyncio.get_running_loop()
        self._begin_life()
        self._supervisor = asyncio.create_task(self._supervise())

    async def serve(self, make_engine: MakeEngine, prefix_folder: Path | None = None) -> None:
        """Answer requests with the engine that ``make_engine`` makes, in MLX's thread. ``prefix_folder``: as
        `Prefixes` takes it. Raises what ``make_engine`` raises, or ServeError if the weights leave no memory
        for requests."""
        self._first_start = asyncio.get_running_loop().create_future()
        self._make_engine, self._prefix_folder = make_engine, prefix_folder
        with self._changed:
            self._changed.notify()
        await self._first_start
        if self.weights + self.reserved >= self.memory:
            message = (
                f"no memory is left for requests: the weights take {self.weights / 1e9:.2f} GB, prompts that "
                f"were read {self.reserved / 1e9:.2f} GB, and the server may use {self.memory / 1e9:.2f} GB"
            )
            raise ServeError(message, where="--memory", hint="a smaller model, or fewer adapters")

    async def stop(self) -> None:
        """End the thread; what is not finished ends with Draining."""
        self.draining = True
        if self._supervisor is not None:
            self._supervisor.cancel()
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._fail(Draining("the server has ended"), waiting=True)
        thread = self._life.thread
        if thread is not None:
            seconds = STOP_S if self._prefix_folder is None else STORE_S
            await asyncio.get_running_loop().run_in_executor(None, thread.join, seconds)

    def _begin_life(self) -> None:
        if self._stopping:
            return
        life = self._life = _Life()
        life.thread = threading.Thread(target=self._live, args=(life,), name="tunesmith-engine", daemon=True)
        life.thread.start()

    async def _supervise(self) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            life = self._life
            if life.given_up:
                continue
            beat = life.beat
            if life.thread is not None and not life.thread.is_alive():
                self._replace(life, "died", "its thread has ended")
            elif beat is not None and time.monotonic() - beat > life.allowed_s:
                self._replace(life, "hung", f"one step took longer than {life.allowed_s:.0f} s")

    def _died(self, life: _Life, error: BaseException) -> None:
        """The thread has ended with ``error``. If it is the first, there is nothing to go on with."""
        if self._first_start is not None and not self._first_start.done():
            self._first_start.set_exception(error)
            self._stopping = True
        self._replace(life, "died", f"{type(error).__name__}: {error}")

    def _replace(self, life: _Life, reason: str, why: str) -> None:
        """Give up ``life``, and start another after a pause that grows with each early death."""
        if life.given_up or self._stopping:
            return
        life.given_up = True
        if reason == "hung" and life.thread is not None and life.thread.ident is not None:
            # It ends as soon as it comes back to Python, before it could touch the model again.
            exception = ctypes.py_object(SystemExit)
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(life.thread.ident), exception)
        self.restarts[reason] += 1
        lived = time.monotonic() - life.began
        self._pace = 0.0 if lived > QUIET_S else min(LONGEST_PAUSE_S, max(0.1, self._pace * 2))
        hint = f"a new engine starts in {self._pace:.1f} s"
        self._notify(Notice(f"the engine has {reason}: {why}", level="warning", where="engine", hint=hint))
        self._fail(EngineDied(f"the engine has {reason} while it answered", hint="ask again"), waiting=False)
        if life.job is not None and not life.job.done.done():
            life.job.done.set_exception(EngineDied(f"the engine has {reason}: {why}"))
        self._loop.call_later(self._pace, self._begin_life)

    def _fail(self, error: ServeError, *, waiting: bool) -> None:
        """End the requests under way, and also those that wait."""
        with self._changed:
            streams = self._life.streams
            if waiting:
                streams += self._waiting
                self._waiting.clear()
        for stream in streams:
            stream.fail(error)

    def _time_out(self, stream: TokenStream, seconds: float, what: str) -> None:
        stream.fail(TimedOut(f"{what} took longer than {seconds:g} s", hint="ask for fewer tokens"))
        self._drop(stream)

    def _cancel(self, stream: TokenStream) -> None:
        """May be called by the garbage collector, in any thread."""
        if not stream.over:
            stream.over = True
            with suppress(RuntimeError):  # the loop is closed
                self._loop.call_soon_threadsafe(stream.end)
            self._drop(stream)

    def _drop(self, stream: TokenStream) -> None:
        """Free the row of a request that has ended early, or its place in the queue."""
        with self._changed, suppress(ValueError):
            self._waiting.remove(stream)
        self._life.cancelled.append(stream)
        with self._changed:
            self._changed.notify()

    def _retry_after(self) -> int:
        """Seconds, guessed: half of the longest time that a request has waited."""
        oldest = self._waiting[0].begun if self._waiting else time.monotonic()
        return max(1, min(60, round((time.monotonic() - oldest) / 2)))

    def _live(self, life: _Life) -> None:
        engine: Engine | None = None
        try:
            while not (self._stopping or life.given_up):
                if engine is None and self._make_engine is not None:
                    engine = self._started(life, self._make_engine)
                self._run_jobs(life)
                if engine is None:
                    self._sleep(life)
                    continue
                self._forget_cancelled(life, engine)
                self._admit(life, engine)
                if not life.rows:
                    self._rest(life)
                    continue
                try:
                    with self._beating(life, self.limits.hang_s):
                        tokens = engine.advance()
                except Exception as error:
                    if not backend.is_out_of_memory(error) or life.given_up:
                        raise
                    self._shrink(life, engine, error)
                    engine = None
                else:
                    self._deliver(life, tokens)
            self._close(life, engine)
        except BaseException as error:
            life.beat = None
            self._close(life, engine)
            if not life.given_up:
                with suppress(RuntimeError):  # the loop is closed
                    self._loop.call_soon_threadsafe(self._died, life, error)
        finally:
            # Else MLX ends them after Python takes the thread for ended, while the process may be ending.
            mx.clear_streams()

    def _close(self, life: _Life, engine: Engine | None) -> None:
        """Leave the engine and store its prefixes, unless another life has taken over the model."""
        if engine is not None and not life.given_up:
            with suppress(Exception):
                engine.__exit__(None, None, None)
            if self._prefixes is not None:
                with suppress(Exception):
                    self._prefixes.close()

    def _started(self, life: _Life, make_engine: MakeEngine) -> Engine:
        with self._beating(life, self.limits.load_s):
            self._prefixes = None
            if self.prefix_bytes:
                self._prefixes = Prefixes(self.prefix_bytes, self._prefix_folder)
            gc.collect()  # of the engine before
            engine = make_engine(self.batch_size, self._prefixes)
            engine.__enter__()
            self.weights = backend.memory()["active"]
        if not life.given_up:
            self._engine = engine
            life.ready = True
            if self._first_start is not None:
                self._loop.call_soon_threadsafe(_settle, self._first_start, None, None)
        return engine

    def _run_jobs(self, life: _Life) -> None:
        while not life.given_up and (job := self._next_job(life)):
            if job.done.cancelled():
                life.job = None
                continue
            result, failure = None, None
            try:
                with self._beating(life, self.limits.load_s):
                    result = job.function()
            except Exception as error:
                failure = error
            life.job_ran = True
            self._loop.call_soon_threadsafe(_settle, job.done, result, failure)
            life.job = None

    def _next_job(self, life: _Life) -> _Job | None:
        """Take the first job that can be run now out of the queue."""
        with self._changed:
            free = self.memory - self.weights - self.reserved - self.kv_bytes
            for job in self._jobs:
                if not life.rows or job.cost <= max(free, 0) or job.done.cancelled():
                    life.job = job  # before it leaves the queue: whenever the thread ends, it is known
                    self._jobs.remove(job)
                    return job
        return None

    @contextmanager
    def _beating(self, life: _Life, allowed_s: float) -> Iterator[None]:
        life.allowed_s = allowed_s
        life.beat = time.monotonic()
        try:
            yield
        finally:
            life.beat = None

    def _rest(self, life: _Life) -> None:
        """Wait; the memory of what is loaded can be measured now."""
        if life.job_ran:
            life.job_ran = False
            self.weights = backend.memory()["active"] - (self._prefixes.n_bytes if self._prefixes else 0)
        self._sleep(life)

    def _sleep(self, life: _Life) -> None:
        """Wait until there is something to do."""
        with self._changed:
            if not (self._waiting or self._jobs or self._stopping or life.given_up):
                self._changed.wait(1.0)

    def _forget_cancelled(self, life: _Life, engine: Engine) -> None:
        if not life.cancelled:
            return
        cancelled = [life.cancelled.popleft() for _ in range(len(life.cancelled))]
        numbers = [number for number, stream in life.rows.items() if stream in cancelled]
        if numbers:
            engine.cancel(numbers)
            for number in numbers:
                del life.rows[number]

    def _admit(self, life: _Life, engine: Engine) -> None:
        """Submit the requests that have a row and memory, in their order."""
        while stream := self._next(life):
            try:
                with self._beating(life, self.limits.hang_s):
                    [number] = engine.submit([stream.request])
            except TunesmithError as error:
                self._loop.call_soon_threadsafe(stream.fail, error)
            else:
                life.rows[number] = stream
            life.submitting = None

    def _next(self, life: _Life) -> TokenStream | None:
        """Take the first request out of the queue, if it has a row and memory now; alone it is always
        taken."""
        with self._changed:
            while self._waiting and self._waiting[0].over:
                self._waiting.popleft()
            if not self._waiting or len(life.rows) >= self.batch_size:
                return None
            if life.rows and self._jobs:
                return None  # else the memory that a job waits for would never be free
            first = self._waiting[0]
            free = self.memory - self.weights - self.reserved
            if life.rows and _padded([first.cost, *(row.cost for row in life.rows.values())]) > free:
                return None
            life.submitting = first  # before it leaves the queue: whenever the thread ends, it is known
            return self._waiting.popleft()

    def _deliver(self, life: _Life, tokens: list[NewToken]) -> None:
        made: list[tuple[TokenStream, NewToken]] = []
        differing: list[TokenStream] = []
        for token in tokens:
            stream = life.rows.get(token.request)
            if stream is None:
                continue
            if stream.n_repeated == len(stream.sent):
                stream.sent.append(token.token)
                stream.n_repeated += 1
                made.append((stream, token))
            elif stream.sent[stream.n_repeated] == token.token:
                stream.n_repeated += 1
            else:
                differing.append(stream)
        if made and not life.given_up:
            self._loop.call_soon_threadsafe(_put, made)
        for stream in differing:
            failure = EngineDied("memory ran out, and computed again the answer differs", hint="ask again")
            self._loop.call_soon_threadsafe(stream.fail, failure)
            life.cancelled.append(stream)
        for token in tokens:
            if token.finish is not None:
                life.rows.pop(token.request, None)

    def _shrink(self, life: _Life, engine: Engine, error: Exception) -> None:
        """Halve the batch after ``error``, and ask again what was under way. A request that ran out of memory
        alone ends with an error, and says nothing about the batch; one whose constraint has seen tokens
        already ends too."""
        with suppress(Exception):
            engine.__exit__(None, None, None)
        traceback.clear_frames(error.__traceback__)  # they hold arrays of the pass that failed
        mx.clear_cache()
        rows = list(life.rows.values())
        self.out_of_memory += 1
        alone = len(rows) == 1
        if not alone:
            self.batch_size = max(1, min(self.batch_size, len(rows)) // 2)
        again: list[TokenStream] = []
        for stream in rows:
            if alone or (stream.request.constraint is not None and stream.sent):
                failure = EngineDied("memory ran out", hint="shorten the prompt, or ask for fewer tokens")
                self._loop.call_soon_threadsafe(stream.fail, failure)
            else:
                stream.n_repeated = 0
                again.append(stream)
        with self._changed:
            self._waiting.extendleft(reversed(again))
        life.rows = {}
        text = f"memory ran out: at most {self.batch_size} requests are under way at once from now on"
        if alone:
            text = "memory ran out for a request that was alone, which ends"
        notice = Notice(text, level="warning", where="engine", hint=str(error)[:200])
        self._loop.call_soon_threadsafe(self._notify, notice)


def _padded(costs: Sequence[int]) -> int:
    """Bytes of the keys and values of a batch: each row is as long as the longest."""
    return len(costs) * max(costs, default=0)


def _put(made: list[tuple[TokenStream, NewToken]]) -> None:
    for stream, token in made:
        stream.put(token)


def _settle(done: asyncio.Future[Any], result: object, failure: Exception | None) -> None:
    if done.done():
        return
    if failure is None:
        done.set_result(cast("Any", result))
    else:
        done.set_exception(failure)
