"""What every handler gets: the models, the worker, and everything that applies to all requests.

`Service` is a value without HTTP. Modules with routes import it; what it imports has no routes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from tunesmith.engine.requests import Request
from tunesmith.serving import access
from tunesmith.serving.access import AccessLog
from tunesmith.serving.keys import Key
from tunesmith.serving.limits import ServerLimits
from tunesmith.serving.served import Models, Served
from tunesmith.serving.worker import Answering, Worker


@dataclass
class Service:
    """``keys``: empty: anyone on this machine may ask. ``fallback``: names of models that answer if the one
    that was asked cannot, in this order."""

    models: Models
    worker: Worker
    limits: ServerLimits
    keys: tuple[Key, ...] = ()
    fallback: tuple[str, ...] = ()
    log: AccessLog = field(default_factory=AccessLog)

    def served(self, name: str | None, user: str | None = None) -> Served:
        """The model that answers to ``name``: its own, or of an A/B route, where a ``user`` always gets the
        same one. Raises UnknownModel, or Rejection if the key may not ask it."""
        return self.models.resolve(name)

    def ask(self, served: Served, request: Request) -> Answering:
        """Put ``request`` to ``served`` into the queue; measured, and noted in the access log. Raises as
        `Worker.ask` does."""
        record = access.current()
        record.model, record.adapter = served.name, served.adapter
        return self.worker.ask(replace(request, adapter=served.adapter, digest=served.digest))
