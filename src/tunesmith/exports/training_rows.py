"""The training rows of a run, read and rendered as when it was trained.

A composed run was not trained: its training rows are those of its sources' files whose prompts it does not
hold out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tunesmith.data import formats
from tunesmith.data.examples import Example
from tunesmith.errors import ExportError, TunesmithError
from tunesmith.events import Sink
from tunesmith.runs import manifest
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import COMPOSED, VALID, Run
from tunesmith.tokens.batches import Group

if TYPE_CHECKING:
    from tunesmith.training.preparation import Prepared


def prepare(run: Run, config: RunConfig, kind: str, instead: str, notify: Sink) -> Prepared:
    """The rows of both sides. Raises ExportError, in the name of ``kind``, if the files or their tokens are
    no longer the same. instead: what to do then."""
    from tunesmith.training import ordering, preparation  # load the audit, which most kinds do not need

    composed = run.status == COMPOSED
    try:
        prepared = preparation.prepare(
            config,
            notify,
            audited=True,
            recorded=manifest.recorded(run),
            held_out=_held_out(run, config) if composed else None,
        )
        preparation.require_same(run, prepared)
        if config.data.order == "difficulty" and not composed:
            prepared = ordering.recorded(prepared, run.path)
    except TunesmithError as error:
        message = f"{kind}: the rows of the run cannot be made again: {error.what}"
        raise ExportError(message, where=error.where, hint=error.hint) from error
    read, recorded = dict(prepared.hashes["data"]).items(), run.hashes["data"].items()
    # The held-out files of a composed run's sources are recorded, and not read again.
    if changed := sorted(read - recorded if composed else read ^ recorded):
        message = f"{kind}: changed since the run was trained, so its tokens cannot be made again"
        raise ExportError(message, where=changed[0][0], hint=f"put the file back, or {instead}")
    return prepared


def _held_out(run: Run, config: RunConfig) -> list[Example]:
    path = run.path / VALID
    if not path.is_file() or not path.stat().st_size:
        return []
    return formats.read([str(path)], config.data.model_copy(update={"format": "auto"})).examples


def first_epoch(prepared: Prepared) -> list[Group]:
    """The training rows in the order in which the first epoch learns them."""
    return [prepared.train[index] for index in prepared.plan.order(0)]
