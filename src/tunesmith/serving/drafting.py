"""What guesses the tokens of an answer that is under way alone: its own text, a smaller model, or nothing."""

from __future__ import annotations

from collections.abc import Callable

from tunesmith import events
from tunesmith.engine.speculation import (
    CACHE_FORGETS,
    DraftModel,
    PromptLookup,
    Speculation,
    require_same_tokens,
    takes_guesses,
)
from tunesmith.events import Notice, Sink
from tunesmith.model import vocabulary
from tunesmith.runs import opening
from tunesmith.serving.served import Models

OFF, PROMPT = "off", "prompt"
"""No guesses; guesses from the prompt and the answer so far."""


def speculation_maker(
    draft: str, models: Models, notify: Sink = events.silent
) -> Callable[[], Speculation | None]:
    """Makes the speculation of an engine for ``models``. ``draft``: `OFF`, `PROMPT`, or where a smaller model
    lies. A notice says so if speculation is off for the model. Raises what `opening.find` raises, and
    ModelError if that model has other tokens."""
    if draft == OFF:
        return lambda: None
    if not takes_guesses(models.loaded.net):
        notify(Notice(f"speculation is off for this model: {CACHE_FORGETS}", where="--draft"))
        return lambda: None
    if draft == PROMPT:
        return lambda: Speculation(PromptLookup())
    opened = opening.find(draft, notify=notify).open(notify)
    for served in models.entries:
        require_same_tokens(served.renderer, opened.renderer)
    n_ids = vocabulary.limits(models.loaded.net).ids
    return lambda: Speculation(DraftModel(opened.loaded.net, n_ids))
