"""``tunesmith.export``: write an artefact, reload it in a fresh process, and accept it only if it says what
the live adapter says."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from tunesmith import events
from tunesmith.errors import DataError, ExportError
from tunesmith.events import Notice, Sink
from tunesmith.exports import fidelity, fresh, kind, weights
from tunesmith.exports.fidelity import Carried, Distances, Ended, Probe, Stops
from tunesmith.exports.kind import ArtefactNotes, ExportKind, Tuned
from tunesmith.files import draft, remove_drafts, workspace, write_json
from tunesmith.runs import checkpoints, opening
from tunesmith.runs.directory import EXPORTS, Run
from tunesmith.tokens.template import Renderer

RECORD = "export.json"
ROWS = 64
"""Held-out rows that an artefact is measured on."""


@dataclass(frozen=True)
class Exported:
    """An artefact at ``path``, what was measured of it, and why it was rejected (empty: it was not)."""

    path: Path
    kind: str
    checkpoint: str
    rows: int
    size_bytes: int
    distances: Distances
    stops: Stops
    weights: Carried
    written: ArtefactNotes
    reasons: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        weights = {
            "tensors": len(self.weights.gains),
            "least": dict(sorted(self.weights.gains.items(), key=lambda item: item[1])[:3]),
            "survived_rounding": self.written.survived,
        }
        return {
            "kind": self.kind,
            "tunesmith": version("tunesmith"),
            "path": str(self.path),
            "checkpoint": self.checkpoint,
            "accepted": not self.reasons,
            "reasons": list(self.reasons),
            "remarks": list(self.written.remarks),
            "rows": self.rows,
            "size_bytes": self.size_bytes,
            "kl": asdict(self.distances),
            "answers": asdict(self.stops),
            "weights": weights,
        }

    @property
    def lines(self) -> list[str]:
        """What was measured, for people."""
        kl, stops = self.distances, self.stops
        survived = "" if kl.survived is None else f", {kl.survived:.1%} of the adapter's effect survived"
        lines = [
            f"KL divergence from the live adapter, {kl.n} tokens of {self.rows} rows: mean {kl.mean:.2g}, "
            f"median {kl.median:.2g}, p95 {kl.p95:.2g}, p99 {kl.p99:.2g}, max {kl.max:.2g} nats",
            f"the base's is {kl.base:.2g}{survived}",
            f"equal top tokens {kl.top:.2%}, RMS Δp {kl.rms_p:.2g}",
            f"answers: {stops.equal} of {stops.n} the same, "
            f"{stops.artefact} end by themselves, live {stops.live}",
        ]
        if self.written.survived is not None:
            lines.append(f"rounding left {self.written.survived:.1%} of the change of the weights")
        return [*lines, *self.written.remarks]


def export(
    run: str | Path,
    *,
    to: str,
    out: str | Path | None = None,
    rows: int = ROWS,
    checkpoint: str = "best",
    model: str | None = None,
    notify: Sink = events.silent,
) -> Exported:
    """Write the run's model as the kind ``to`` and measure it against the live adapter.

    out: folder of the artefact (default: ``exports/<kind>`` in the run). rows: held-out rows that it is
    measured on. model: path of the run's model, if it was moved since training. Raises ExportError if the
    kind cannot express the run, or if the artefact is rejected: it is then kept under a name that ends with
    ``.rejected``."""
    chosen, opened = kind.named(to), Run.open(run)
    target = opened.path / EXPORTS / chosen.name if out is None else Path(out)
    rejected = target.with_name(f"{target.name}.rejected")
    _require_free(target, rejected)
    folder = checkpoints.choose(opened, checkpoint, notify)
    source = opening.of_run(opened, folder, model)
    target.parent.mkdir(parents=True, exist_ok=True)
    for name in (target.name, rejected.name):
        remove_drafts(target.parent, name)
    with checkpoints.held(folder), workspace(target) as work:
        artefact = work / "artefact"
        artefact.mkdir()
        exported = _made(chosen, source, work, artefact, rows, notify)
        place = rejected if exported.reasons else target
        if exported.reasons and place.exists():  # an earlier one
            shutil.rmtree(place)
        exported = replace(exported, path=place)
        write_json(artefact / RECORD, exported.to_json())
        with draft(place) as temporary:
            artefact.rename(temporary)
    if exported.reasons:
        raise _rejected(exported, chosen)
    return exported


def _require_free(target: Path, rejected: Path) -> None:
    """Raises DataError if the artefact's place is taken, or that of a rejected one by something else."""
    taken = target if target.exists() else rejected
    if taken.exists() and (taken == target or not (rejected / RECORD).is_file()):
        hint = "choose another --out, or remove it"
        raise DataError("exists already", where=str(taken), hint=hint)


def _rejected(exported: Exported, chosen: ExportKind) -> ExportError:
    reasons = "\n".join(f"  {reason}" for reason in exported.reasons)
    hint = "it is kept for inspection"
    if chosen.more_precise is not None:
        hint += f"; the next more precise kind is --to {chosen.more_precise}"
    return ExportError(f"the artefact was rejected:\n{reasons}", where=str(exported.path), hint=hint)


def _made(
    chosen: ExportKind, source: opening.Source, work: Path, artefact: Path, limit: int, notify: Sink
) -> Exported:
    """Write the artefact and measure it."""
    assert source.run is not None and source.config is not None and source.checkpoint is not None
    run, config = source.run, source.config
    opened = source.open(notify)
    every = fidelity.rows(run, config, opened.renderer, limit)
    trained = fidelity.trained_ends(every, opened.renderer.eos_ids)
    ends = _ends(opened.renderer, trained)
    tuned = Tuned(run, config, source.model, source.checkpoint, opened.loaded, opened.renderer, ends)
    chosen.accepts(tuned)
    net = opened.loaded.net
    width = net(mx.zeros((1, 2), mx.int32)).shape[-1]
    probes = fidelity.thinned(every, width)
    notify(Notice(f"measuring base and live adapter on {len(probes)} rows"))
    fidelity.log_probabilities(net, probes, work / "base.npy")
    base = weights.sketch(net)
    opened.attach()
    fidelity.log_probabilities(net, probes, work / "live.npy")
    live = weights.sketch(net)
    answers = fidelity.answers(net, probes, opened.renderer.eos_ids)
    notify(Notice(f"writing {chosen.name}: {chosen.what}"))
    written = chosen.write(tuned, artefact, notify)
    del net, opened, tuned  # the fresh process needs the memory
    mx.clear_cache()
    notify(Notice("reloading it in a fresh process"))
    heard = _reloaded(chosen, source, work, artefact, limit, probes, every)
    with np.load(work / fresh.SKETCH) as sketches:
        arrived = fidelity.carried(base, live, dict(sketches))
    measured = fidelity.distances(
        *(np.load(work / name, "r") for name in ("live.npy", "base.npy", fresh.LOGPROBS))
    )
    stopping = fidelity.stops(answers, [Ended(*pair) for pair in heard["answers"]], trained, heard["ends"])
    reasons = fidelity.reasons(measured, stopping, arrived, chosen.tolerance, written.survived)
    size = sum(file.stat().st_size for file in artefact.rglob("*") if file.is_file())
    return Exported(
        artefact,
        chosen.name,
        source.checkpoint.name,
        len(probes),
        size,
        measured,
        stopping,
        arrived,
        written,
        tuple([*heard["problems"], *reasons]),
    )


def _ends(renderer: Renderer, trained: Sequence[int]) -> tuple[int, ...]:
    """The tokens that end an answer, first those that end rows; of these first the one that ends texts."""
    texts = [token for token in trained if token == renderer.text_end_id]
    return tuple(dict.fromkeys((*texts, *trained, *renderer.eos_ids)))


def _reloaded(
    chosen: ExportKind,
    source: opening.Source,
    work: Path,
    artefact: Path,
    limit: int,
    probes: list[Probe],
    every: list[Probe],
) -> dict[str, Any]:
    """What the fresh process measured."""
    assert source.run is not None
    job = {
        "kind": chosen.name,
        "folder": str(artefact.resolve()),
        "run": str(source.run.path.resolve()),
        "source": source.model.model_dump(mode="json"),
        "rows": limit,
        "probes": probes,
        "all": [probe.ids for probe in every],
    }
    (work / fresh.JOB).write_text(json.dumps(job), encoding="utf-8")
    fresh.run(work)
    return json.loads((work / fresh.RESULT).read_text("utf-8"))
