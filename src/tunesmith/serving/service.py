"""What every handler gets: the models, the worker, and everything that applies to all requests.

`Service` is a value without HTTP. Modules with routes import it; what it imports has no routes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from tunesmith import events
from tunesmith.engine.requests import NewToken, Request
from tunesmith.events import Sink
from tunesmith.serving import access
from tunesmith.serving.ab import Routes
from tunesmith.serving.access import AccessLog, AccessRecord
from tunesmith.serving.guardrails import Guard
from tunesmith.serving.keys import Doorkeeper, Key
from tunesmith.serving.lexicon import Lexicons
from tunesmith.serving.limits import ServerLimits
from tunesmith.serving.metrics import Metrics
from tunesmith.serving.question import Question
from tunesmith.serving.rejections import Rejection
from tunesmith.serving.served import Models, Served
from tunesmith.serving.streams import Answering
from tunesmith.serving.votes import RememberedAnswers
from tunesmith.serving.worker import Worker


@dataclass
class Service:
    """``doorkeeper``: without keys, anyone on this machine may ask. ``fallback``: names of models that answer
    if the one that was asked cannot, in this order. ``ab``: names under which one of several models answers.
    ``answers``: those that can be voted on. ``votes_file``: where votes go. ``loopback``: whether
    only this machine can connect."""

    models: Models
    worker: Worker
    limits: ServerLimits
    metrics: Metrics
    doorkeeper: Doorkeeper = field(default_factory=Doorkeeper)
    guard: Guard = field(default_factory=Guard)
    fallback: tuple[str, ...] = ()
    log: AccessLog = field(default_factory=AccessLog)
    loopback: bool = False
    notify: Sink = events.silent
    ab: Routes = field(default_factory=Routes)
    answers: RememberedAnswers = field(default_factory=RememberedAnswers)
    votes_file: Path = field(kw_only=True)
    lexicons: Lexicons = field(default_factory=Lexicons)
    exchanges: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """HTTP requests that were admitted and have not ended, by their ids: adapters, by their names in the
    engine, that they may ask."""
    _tasks: set[asyncio.Task[None]] = field(default_factory=set, repr=False)

    def answerer(self, question: Question) -> tuple[Served, str | None]:
        """The model that answers, and the A/B test that chose it or None. Raises as `served` does."""
        name, test = self.ab.resolve(question)
        if test is not None and self.allows_names((test,)):
            return self.hold(self.models.resolve(name)), test
        return self.served(name or None), test

    def served(self, name: str | None) -> Served:
        """The model with this name, or the first if it is None. Raises UnknownModel, or Rejection if the key
        may not ask it."""
        served = self.models.resolve(name)
        if not self.allows_names(served.names):
            message = f"the key {access.current().key} may not ask {served.name}"
            raise Rejection(403, message, "model", "model_not_allowed")
        return self.hold(served)

    @contextmanager
    def exchange(self, record: AccessRecord) -> Iterator[None]:
        """Inside, the HTTP request of ``record`` is under way."""
        self.exchanges[record.id] = ()
        try:
            yield
        finally:
            del self.exchanges[record.id]

    def hold(self, served: Served) -> Served:
        """Keep the adapter of ``served`` until the running HTTP request has ended, even if it is dropped
        meanwhile."""
        request_id = access.current().id
        if served.adapter is not None and request_id in self.exchanges:
            self.exchanges[request_id] += (served.adapter,)
        return served

    @property
    def in_use(self) -> set[str]:
        """Adapters, by their names in the engine, that HTTP requests or the engine need."""
        held = {adapter for adapters in [*self.exchanges.values()] for adapter in adapters}
        return held | self.worker.in_use

    def allows_names(self, names: Iterable[str]) -> bool:
        """Whether the key of this request may ask what has ``names``."""
        key = self._key(access.current().key)
        return key is None or not key.models or not set(key.models).isdisjoint(names)

    def needed(self, name: str) -> str | None:
        """What needs the model ``name`` to be served, or None."""
        served = self.models.resolve(name)
        if any(self.models.resolve(other) is served for other in self.fallback):
            return "--fallback"
        tests = (
            test
            for test in self.ab.names
            for model in self.ab.models(test)
            if self.models.resolve(model) is served
        )
        return next((f"the A/B test {test}" for test in tests), None)

    def _key(self, name: str | None) -> Key | None:
        return next((key for key in self.doorkeeper.keys if key.name == name), None)

    def ask(self, served: Served, request: Request) -> Answering:
        """Put ``request`` to ``served`` into the queue; its tokens are measured and logged. Raises as
        `Worker.ask` does."""
        record = access.current()
        self.metrics.prompt_tokens.labels(served.name).inc(len(request.ids))
        request = replace(request, adapter=served.adapter, digest=served.digest)
        return self.worker.ask(request, RequestMeasures(self.metrics, record, served.name))

    def background(self, work: Coroutine[None, None, None]) -> None:
        """Let ``work`` go on after the request that began it."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def note(self, record: AccessRecord, endpoint: str) -> None:
        """Count an HTTP request that has ended, and write it to the access log."""
        model = record.model or "none"
        self.metrics.requests.labels(endpoint, model, str(record.status)).inc()
        if record.model is not None:
            self.metrics.seconds.labels(model).observe(record.seconds)
        if record.error is not None:
            self.metrics.errors.labels(model, record.error).inc()
        self.log.write(record)


class RequestMeasures:
    """Measures one request to the engine. Used on the event loop."""

    def __init__(self, metrics: Metrics, record: AccessRecord, model: str) -> None:
        self._metrics, self._record, self._model = metrics, record, model
        # Looked up once: every token is counted.
        self._next_token = metrics.next_token.labels(model)
        self._answer_tokens = metrics.answer_tokens.labels(model)
        self._last = time.monotonic()
        self._begun = False

    def token(self, token: NewToken) -> None:
        now = time.monotonic()
        passed, self._last = now - self._last, now
        if self._begun:
            self._next_token.observe(passed)
        else:
            self._begun = True
            self._first(token, passed)
        self._record.answer_tokens += 1
        self._answer_tokens.inc()
        if token.finish is not None:
            self._record.ended = token.finish

    def _first(self, token: NewToken, seconds: float) -> None:
        metrics, model = self._metrics, self._model
        metrics.first_token.labels(model).observe(seconds)
        metrics.prefix_lookups.labels(model, str(token.cached > 0).lower()).inc()
        metrics.cached_tokens.labels(model).inc(token.cached)
        self._record.cached_tokens += token.cached
        if self._record.first_token_s is None:
            self._record.first_token_s = round(seconds, 6)
