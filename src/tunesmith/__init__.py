"""Fine-tune language models on your own machine, with proof that it worked.

Each verb of the command line is a function here, under the same name and with the same meaning (``runs`` is
`list_runs`, ``runs show`` is `lineage`, ``runs prune`` is `prune`, ``train --dry-run`` is `rehearse`, and
``plan --record`` is `track_record`). A verb's module is loaded when the verb is first used, so that ``import
tunesmith`` loads neither MLX nor transformers. In a notebook a verb shows its progress, unless it is given
another ``notify``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from typing import TYPE_CHECKING, Any, NoReturn

from tunesmith.errors import SetupError
from tunesmith.machine import backend

if TYPE_CHECKING:
    from tunesmith.exports.push import push
    from tunesmith.exports.verb import export
    from tunesmith.preflight.audit import audit
    from tunesmith.preflight.doctor import doctor
    from tunesmith.preflight.plan import plan, rehearse
    from tunesmith.preflight.show import show
    from tunesmith.preflight.track_record import track_record
    from tunesmith.reports.verbs import compare, compose, evaluate, report, train, watch
    from tunesmith.runs.ancestry import lineage
    from tunesmith.runs.configure import configure, init
    from tunesmith.runs.pruning import prune
    from tunesmith.runs.registry import list_runs, tag
    from tunesmith.runs.talk import chat, generate
    from tunesmith.serving.tally import votes
    from tunesmith.serving.verb import serve
    from tunesmith.sweeps.probe import probe
    from tunesmith.sweeps.verb import sweep

__all__ = [
    "audit",
    "chat",
    "compare",
    "compose",
    "configure",
    "doctor",
    "evaluate",
    "export",
    "generate",
    "init",
    "lineage",
    "list_runs",
    "plan",
    "probe",
    "prune",
    "push",
    "rehearse",
    "report",
    "serve",
    "show",
    "sweep",
    "tag",
    "track_record",
    "train",
    "votes",
    "watch",
]

VERBS = {
    "audit": "tunesmith.preflight.audit",
    "chat": "tunesmith.runs.talk",
    "compare": "tunesmith.reports.verbs",
    "compose": "tunesmith.reports.verbs",
    "configure": "tunesmith.runs.configure",
    "doctor": "tunesmith.preflight.doctor",
    "evaluate": "tunesmith.reports.verbs",
    "export": "tunesmith.exports.verb",
    "generate": "tunesmith.runs.talk",
    "init": "tunesmith.runs.configure",
    "lineage": "tunesmith.runs.ancestry",
    "list_runs": "tunesmith.runs.registry",
    "plan": "tunesmith.preflight.plan",
    "probe": "tunesmith.sweeps.probe",
    "prune": "tunesmith.runs.pruning",
    "push": "tunesmith.exports.push",
    "rehearse": "tunesmith.preflight.plan",
    "report": "tunesmith.reports.verbs",
    "serve": "tunesmith.serving.verb",
    "show": "tunesmith.preflight.show",
    "sweep": "tunesmith.sweeps.verb",
    "tag": "tunesmith.runs.registry",
    "track_record": "tunesmith.preflight.track_record",
    "train": "tunesmith.reports.verbs",
    "votes": "tunesmith.serving.tally",
    "watch": "tunesmith.reports.verbs",
}
"""Verb → the module that defines a function of this name."""
WITHOUT_MLX = frozenset({"doctor", "lineage", "list_runs", "prune", "push", "tag", "votes"})
"""Verbs that do not need MLX; ``doctor`` reports why it cannot be loaded."""

# The one thing done at import: MLX binds its BLAS when it is loaded, by whichever module of the package.
backend.prepare()


def __getattr__(name: str) -> Callable[..., Any]:
    """The verb ``name``. If MLX cannot be loaded, a verb that raises SetupError when it is called, so that
    ``hasattr`` and autocompletion work everywhere."""
    if name not in VERBS:
        raise AttributeError(f"module 'tunesmith' has no attribute {name!r}")
    if name not in WITHOUT_MLX:
        try:
            backend.setup()
        except SetupError as error:
            return _unavailable(name, error)
    notebook = import_module("tunesmith.display.notebook") if "ipykernel" in sys.modules else None
    if notebook is not None:
        notebook.quieten()
    verb = getattr(import_module(VERBS[name]), name)
    globals()[name] = verb if notebook is None else notebook.with_progress(verb)
    return globals()[name]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def _unavailable(name: str, reason: SetupError) -> Callable[..., NoReturn]:
    def verb(*_arguments: object, **_options: object) -> NoReturn:
        raise reason

    verb.__name__ = verb.__qualname__ = name
    verb.__doc__ = f"Not available on this machine: {reason}"
    return verb
