"""What an export wrote and measured: one `Exported` an artefact, as ``export.json`` inside it.

An artefact of a run lies in ``exports/<kind>``, a rejected one in ``exports/<kind>.rejected``. Nothing else
writes these files. A record of an earlier release lacks fields: they are None, or the default of the
field."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tunesmith.errors import EvaluationError
from tunesmith.files import checked, read_json, write_json
from tunesmith.runs.directory import EXPORTS
from tunesmith.runs.records import Score

RECORD, REJECTED = "export.json", ".rejected"
OWN_READER = "tunesmith"
"""`Exported.judged_by` if tunesmith's own reader judged."""
FAINT = 1e-9
"""An adapter whose KL divergence from the base is less changes nothing that could be lost."""


@dataclass(frozen=True)
class Distances:
    """KL divergence of an artefact from the live adapter in nats a token, over ``n`` places.

    ``low``, ``high``: 95 % interval of the mean over rows, None if one row allows none. ``top``: share of
    equal top tokens. ``rms_p``: root mean square difference of the probability of the live top token.
    ``base``: mean KL divergence of the live adapter from the base. ``from_base``: that of the artefact.
    ``survived``: the second as a share of the first."""

    n: int
    mean: float
    median: float
    p95: float
    p99: float
    max: float
    top: float
    rms_p: float
    base: float
    from_base: float
    survived: float | None
    low: float | None = None
    high: float | None = None

    @property
    def lost(self) -> float:
        """KL divergence from the live adapter as a share of the base's; 0 if the adapter does nothing."""
        return self.mean / self.base if self.base > FAINT else 0.0


@dataclass(frozen=True)
class Stops:
    """``n`` prompts that were answered. ``live`` and ``artefact``: answers that ended by themselves.
    ``equal``: answers with the same ids. ``undeclared``: tokens that end a trained answer and do not end the
    artefact's. ``lost`` and ``gained``: answers that end only live, and only of the artefact."""

    n: int
    live: int
    artefact: int
    equal: int
    undeclared: tuple[int, ...]
    lost: int = 0
    gained: int = 0


@dataclass(frozen=True)
class CarriedSummary:
    """``tensors``: how many the adapter changes. ``least``: those that hold the smallest part of their
    change. ``survived_rounding``: share of the change that rounding left, None if nothing was rounded."""

    tensors: int
    least: Mapping[str, float] = field(default_factory=dict)
    survived_rounding: float | None = None


@dataclass(frozen=True)
class Cost:
    """What it takes to use an artefact on this machine. ``load_s``: until its weights are in memory.
    ``memory_bytes``: the most that MLX or llama.cpp held while one answer was generated, weights included.
    ``speed``: tokens generated a second, one answer at a time, the prompt's time included; its interval is
    over rounds."""

    load_s: float
    memory_bytes: int
    speed: Score


@dataclass(frozen=True)
class Quantised:
    """How the matrices of a file of k-quants were written. ``types``: how many there are of each type.
    ``narrow``: those of a larger type than the kind has for them, since their rows do not fill blocks of 256
    values. ``weighed``: those whose errors were weighed by the importance matrix, which was measured on
    ``tokens`` tokens of ``rows`` training rows."""

    types: Mapping[str, int]
    narrow: int
    weighed: int
    rows: int
    tokens: int


@dataclass(frozen=True, kw_only=True)
class Exported:
    """An artefact at ``path``, what was measured of it, and why it was rejected (empty: it was not).

    ``loss``: on the held-out rows, its difference is that from the live adapter. ``scores``: headlines of the
    tasks that were asked for, with their differences from the live adapter. ``rows_limit``: the rows that
    were asked for, of which there may be fewer. ``adapter_sha256`` and ``base_sha256``: of the checkpoint's
    weights and of the base, as the run recorded them. All three are None in a record of an earlier
    release. ``judged_by``: the program whose log-probabilities ``distances`` and ``loss`` are of.
    ``unread_by``: the release of llama.cpp that should have judged and could not. ``own_reading``: distances
    by tunesmith's own reader if llama.cpp judged. ``quantised``: None if the kind has no importance
    matrix."""

    path: Path
    kind: str
    checkpoint: str
    rows: int
    size_bytes: int
    distances: Distances
    stops: Stops
    weights: CarriedSummary
    reasons: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    cost: Cost | None = None
    loss: Score | None = None
    scores: tuple[Score, ...] = ()
    tunesmith: str = ""
    rows_limit: int | None = None
    adapter_sha256: str | None = None
    base_sha256: str | None = None
    judged_by: str = OWN_READER
    unread_by: str | None = None
    own_reading: Distances | None = None
    quantised: Quantised | None = None

    @property
    def accepted(self) -> bool:
        return not self.reasons

    def to_json(self) -> dict[str, Any]:
        """The content of ``export.json``."""
        return {
            "kind": self.kind,
            "tunesmith": self.tunesmith,
            "path": str(self.path),
            "checkpoint": self.checkpoint,
            "accepted": self.accepted,
            "reasons": list(self.reasons),
            "remarks": list(self.remarks),
            "adapter_sha256": self.adapter_sha256,
            "base_sha256": self.base_sha256,
            "rows": self.rows,
            "rows_limit": self.rows_limit,
            "size_bytes": self.size_bytes,
            "judged_by": self.judged_by,
            "unread_by": self.unread_by,
            "kl": asdict(self.distances),
            "own_reading": self.own_reading and asdict(self.own_reading),
            "quantised": self.quantised and asdict(self.quantised),
            "answers": asdict(self.stops),
            "weights": asdict(self.weights),
            "cost": self.cost and asdict(self.cost),
            "loss": self.loss and asdict(self.loss),
            "scores": [asdict(score) for score in self.scores],
        }


def write(exported: Exported, folder: Path) -> None:
    """Write the record into the artefact's ``folder``."""
    write_json(folder / RECORD, exported.to_json())


def load(folder: Path) -> Exported:
    """The record of the artefact in ``folder``, wherever the folder was moved. Raises EvaluationError if it
    cannot be read."""
    path = folder / RECORD
    hint = "remove the artefact and export it again"
    content = read_json(path, dict[str, Any], EvaluationError, hint)
    stated = {_FIELDS.get(key, key): value for key, value in content.items() if key != "accepted"}
    return checked(stated | {"path": folder}, Exported, str(path), EvaluationError, hint)


_FIELDS = {"kl": "distances", "answers": "stops"}
"""Key in the file → field."""


def read(run_dir: Path) -> tuple[list[Exported], list[EvaluationError]]:
    """The artefacts in a run directory, the accepted ones first, and an error for each record that cannot be
    read."""
    artefacts: list[Exported] = []
    unreadable: list[EvaluationError] = []
    for path in sorted((run_dir / EXPORTS).glob(f"[!.]*/{RECORD}")):
        try:
            artefacts.append(load(path.parent))
        except EvaluationError as error:
            unreadable.append(error)
    return sorted(artefacts, key=lambda artefact: not artefact.accepted), unreadable
