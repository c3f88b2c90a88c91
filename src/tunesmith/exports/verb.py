"""``tunesmith.export``: write an artefact, reload it in a fresh process, and accept it only if it says what
the live adapter says."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith import events, reports
from tunesmith.errors import ConfigError, DataError, ExportError
from tunesmith.events import Sink
from tunesmith.exports import headlines, kind
from tunesmith.exports.gate import ROWS, Gate, Scope
from tunesmith.exports.kind import ExportKind
from tunesmith.files import draft, remove_drafts, workspace
from tunesmith.runs import artefacts, checkpoints, opening
from tunesmith.runs.artefacts import RECORD, REJECTED, Exported
from tunesmith.runs.directory import EXPORTS, Run


def export(
    run: str | Path,
    *,
    to: str,
    out: str | Path | None = None,
    rows: int = ROWS,
    checkpoint: str = "best",
    model: str | None = None,
    evaluate: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    notify: Sink = events.silent,
) -> Exported:
    """Write the run's model as the kind ``to`` and measure it against the live adapter.

    out: folder of the artefact (default: ``exports/<kind>`` in the run, whose report is renewed). rows:
    held-out rows that it is measured on. model: path of the run's model, if it was moved since training.
    evaluate: also ask both the tasks on the held-out rows, or the ``tasks`` named, each on the first
    ``limit`` rows and items. Raises ExportError if the kind cannot express the run, or if the artefact is
    rejected: it is then kept under a name that ends with ``.rejected``."""
    chosen, opened, measured = kind.named(to), Run.open(run), scope(rows, evaluate, tasks, limit)
    chosen.require_installed()
    target = opened.path / EXPORTS / chosen.name if out is None else Path(out)
    opened.remove_drafts()
    for name in (target.name, rejected(target).name):
        remove_drafts(target.parent, name)
    require_free(target)
    folder = checkpoints.choose(opened, checkpoint, notify)
    source = opening.of_run(opened, folder, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    with checkpoints.held(folder), workspace(target) as work:
        gate = Gate(source, measured, work, notify)
        exported = place(gate, chosen, work, target)
    if target.parent.resolve() == (opened.path / EXPORTS).resolve():
        reports.write(opened.path)
    if not exported.accepted:
        raise _rejection(exported, chosen)
    return exported


def scope(rows: int, evaluate: bool, tasks: Sequence[str], limit: int | None) -> Scope:
    """evaluate without tasks: those that answer whether the run learned its task. Raises ConfigError for a
    limit of tasks that are not asked."""
    if limit is not None and not evaluate and not tasks:
        raise ConfigError("no task is asked that it limits", where="--limit", hint="add --evaluate")
    return Scope(rows, tuple(tasks) or (headlines.of_the_task() if evaluate else ()), limit)


def place(gate: Gate, chosen: ExportKind, work: Path, target: Path) -> Exported:
    """Make the artefact in ``work`` and move it to ``target``, or if it is rejected beside it."""
    artefact = work / "artefact"
    artefact.mkdir()
    try:
        exported = gate.make(chosen, artefact)
        final = target if exported.accepted else rejected(target)
        if not exported.accepted and final.exists():  # an earlier one
            shutil.rmtree(final)
        exported = replace(exported, path=final)
        artefacts.write(exported, artefact)
        with draft(final) as temporary:
            artefact.rename(temporary)
    finally:
        shutil.rmtree(artefact, ignore_errors=True)
    return exported


def rejected(target: Path) -> Path:
    """Where a rejected artefact is kept."""
    return target.with_name(target.name + REJECTED)


def require_free(target: Path) -> None:
    """Raises DataError if the artefact's place is taken, or that of a rejected one by something else."""
    taken = target if target.exists() else rejected(target)
    if taken.exists() and (taken == target or not (taken / RECORD).is_file()):
        hint = "choose another --out, or remove it"
        raise DataError("exists already", where=str(taken), hint=hint)


def _rejection(exported: Exported, chosen: ExportKind) -> ExportError:
    reasons = "\n".join(f"  {reason}" for reason in exported.reasons)
    hint = "it is kept for inspection"
    if chosen.more_precise is not None:
        hint += f"; the next more precise kind is --to {chosen.more_precise}"
    return ExportError(f"the artefact was rejected:\n{reasons}", where=str(exported.path), hint=hint)
