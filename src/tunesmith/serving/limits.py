"""How much may one request ask for, and how long may it take?"""

from __future__ import annotations

from pydantic import Field

from tunesmith.settings.config import Spec


class ServerLimits(Spec):
    """What the server allows; each is a key of ``--limit KEY=VALUE``."""

    body_mb: float = Field(default=16.0, gt=0, description="largest body of a request, in MB")
    body_s: float = Field(
        default=30.0, gt=0, description="longest time for the head of a request, and then for its body"
    )
    connections: int = Field(default=1000, ge=1, description="most open connections; further ones are closed")
    stall_s: float = Field(
        default=60.0, gt=0, description="longest time that a client may not read its answer; then it is gone"
    )
    messages: int = Field(default=2048, ge=1, description="most messages of a conversation")
    prompt_tokens: int = Field(default=131072, ge=1, description="longest prompt")
    answer_tokens: int = Field(default=16384, ge=1, description="longest answer; more is refused")
    default_answer_tokens: int = Field(
        default=2048, ge=1, description="longest answer if the request names none"
    )
    choices: int = Field(default=16, ge=1, description="most answers to one request (n)")
    queue: int = Field(default=256, ge=1, description="most requests that wait; then 429 with Retry-After")
    first_token_s: float = Field(default=120.0, gt=0, description="longest time to the first token")
    total_s: float = Field(default=900.0, gt=0, description="longest time of an answer")
    hang_s: float = Field(
        default=120.0, gt=0, description="one step of the engine that takes longer means that it hangs"
    )
    load_s: float = Field(
        default=600.0, gt=0, description="longest time to load an adapter, or of another job on the device"
    )
    drain_s: float = Field(
        default=60.0, ge=0, description="after SIGTERM, longest time for what is under way"
    )
