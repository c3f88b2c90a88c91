"""Why a request is not answered, as the error that HTTP clients get: a status, and OpenAI's shape or
Anthropic's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.errors import ModelError, ServeError, TemplateError, TunesmithError
from tunesmith.model.vocabulary import UnknownIds
from tunesmith.serving.guardrails import PromptBlocked

BY_STATUS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
"""HTTP status → the ``type`` of the error; any other is a ``server_error`` from 500 on, or an
``invalid_request_error``."""
ANTHROPIC = "/v1/messages"
"""The paths that begin so speak Anthropic's protocol."""
ANTHROPIC_BY_STATUS = {
    400: "invalid_request_error",
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
}
"""The same in Anthropic's protocol; any other is an ``api_error``."""


@dataclass(eq=False)
class Rejection(Exception):
    """An error for the client. ``param``: the field of the body that is wrong. ``code``: a word that programs
    can compare."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.message

    @property
    def kind(self) -> str:
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        return BY_STATUS.get(self.status, other)

    @property
    def body(self) -> dict[str, dict[str, str | None]]:
        return {"error": {"message": self.message, "type": self.kind, "param": self.param, "code": self.code}}

    @property
    def anthropic_body(self) -> dict[str, Any]:
        kind = ANTHROPIC_BY_STATUS.get(self.status, "api_error")
        return {"type": "error", "error": {"type": kind, "message": self.message}}

    def body_for(self, path: str) -> dict[str, Any]:
        """The body in the shape of the protocol that ``path`` speaks."""
        is_anthropic = path == ANTHROPIC or path.startswith(f"{ANTHROPIC}/")
        return self.anthropic_body if is_anthropic else self.body


class Overloaded(ServeError):
    """The queue is full. ``retry_after``: seconds after which a place is likely to be free."""

    def __init__(self, what: str, retry_after: int) -> None:
        super().__init__(what, hint=f"ask again in {retry_after} s")
        self.retry_after = retry_after


class TooLarge(ServeError):
    """It does not fit in the memory that the server may use."""


class EngineDied(ServeError):
    """The engine stopped while it answered; it is started anew."""


class TimedOut(ServeError):
    """The answer took longer than the server allows."""


class Draining(ServeError):
    """The server is about to end and takes no new requests."""


class UnknownModel(ServeError):
    """No model that is served has this name."""


def rejection_of(error: Exception) -> Rejection:
    """The answer to a request that ended with ``error``. It gives no details of an unexpected error."""
    if isinstance(error, Rejection):
        return error
    if isinstance(error, Overloaded):
        retry = {"Retry-After": str(error.retry_after)}
        return Rejection(429, str(error), code="overloaded", headers=retry)
    if isinstance(error, UnknownModel):
        return Rejection(404, str(error), "model", "model_not_found")
    if isinstance(error, PromptBlocked):
        return Rejection(400, str(error), code="content_filter")
    if isinstance(error, TooLarge):
        return Rejection(400, str(error), code="request_too_large")
    if isinstance(error, TimedOut):
        return Rejection(504, str(error), code="timeout")
    if isinstance(error, EngineDied | Draining):
        code = "engine_died" if isinstance(error, EngineDied) else "draining"
        return Rejection(503, str(error), code=code, headers={"Retry-After": "5"})
    if isinstance(error, UnknownIds):  # its hint is for whoever trains or serves the model
        return Rejection(400, f"{error.where}: {error.what}", code="invalid_request")
    if isinstance(error, ModelError | TemplateError):
        return Rejection(400, str(error), code="invalid_request")
    if isinstance(error, TunesmithError):
        return Rejection(500, str(error), code="failed")
    return Rejection(500, "the server failed to answer; its log says why", code="failed")
