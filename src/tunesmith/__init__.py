"""Fine-tune language models on your own machine, with proof that it worked.

Each verb of the command line is a function here, under the same name and with the same meaning. A verb's
module is loaded when the verb is first used, so that ``import tunesmith`` loads neither MLX nor transformers.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from tunesmith.machine import backend

if TYPE_CHECKING:
    from tunesmith.preflight.audit import audit
    from tunesmith.preflight.doctor import doctor
    from tunesmith.preflight.plan import plan
    from tunesmith.preflight.show import show
    from tunesmith.reports.verbs import compare, evaluate, report, train, watch
    from tunesmith.runs.configure import configure, init
    from tunesmith.runs.talk import chat, generate

__all__ = [
    "audit",
    "chat",
    "compare",
    "configure",
    "doctor",
    "evaluate",
    "generate",
    "init",
    "plan",
    "report",
    "show",
    "train",
    "watch",
]

VERBS = {
    "audit": "tunesmith.preflight.audit",
    "chat": "tunesmith.runs.talk",
    "compare": "tunesmith.reports.verbs",
    "configure": "tunesmith.runs.configure",
    "doctor": "tunesmith.preflight.doctor",
    "evaluate": "tunesmith.reports.verbs",
    "generate": "tunesmith.runs.talk",
    "init": "tunesmith.runs.configure",
    "plan": "tunesmith.preflight.plan",
    "report": "tunesmith.reports.verbs",
    "show": "tunesmith.preflight.show",
    "train": "tunesmith.reports.verbs",
    "watch": "tunesmith.reports.verbs",
}
"""Verb → the module that defines a function of this name."""

# The one thing done at import: MLX binds its BLAS when it is loaded, by whichever module of the package.
backend.prepare()


def __getattr__(name: str) -> Callable[..., Any]:
    """The verb ``name``. Raises SetupError if MLX cannot be loaded; ``doctor`` reports that instead."""
    if name not in VERBS:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    if name != "doctor":
        backend.setup()
    verb = globals()[name] = getattr(import_module(VERBS[name]), name)
    return verb
