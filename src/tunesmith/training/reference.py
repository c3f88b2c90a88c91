"""Log-probabilities by the model before training, of every sequence that an objective compares with; measured
once and cached.

A value is identified by what it was computed from: the cache file by the base weights, their precision, the
adapter that training starts from, and the versions of the code that computes; a value inside it by the tokens
and which of them are learned. Any change gives another name, so a stale value cannot be found. The run keeps
its own copy, so that it resumes to the byte."""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.nn as nn
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from tunesmith import events
from tunesmith.adapters.files import PEFT_WEIGHTS
from tunesmith.adapters.specs import Full
from tunesmith.data.sources import sha256
from tunesmith.display.console import duration
from tunesmith.engine import scoring
from tunesmith.errors import TrainingError
from tunesmith.events import Notice, Sink
from tunesmith.files import write_bytes
from tunesmith.machine import backend
from tunesmith.machine.ranks import ONE, Ranks
from tunesmith.model import kernels
from tunesmith.model.loading import Loaded
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import ADAPTER_CONFIG, ADAPTERS
from tunesmith.tokens.batches import Cut, Group
from tunesmith.tokens.template import Tokens
from tunesmith.training.preparation import Prepared

CODE = 3
"""Changed whenever the same weights and tokens could give another value."""
SAME_BUT_ROUNDED = (2,)
"""Values of CODE for which only the last digits differed, since prompts of one length were not computed at
once: a run that began with them keeps its own."""
RECORDED = {"mlx": False, "operations": True, "compiled": "compiled"}
"""How a name tells the kernels; 0.1.0 knew the first two."""
SAVED_EVERY = 16  # sequences: what an interruption can lose


def name(facts: Mapping[str, Any], code: int = CODE) -> str:
    """The name under which values made from ``facts`` are kept: 32 hex digits."""
    device = backend.setup()
    versions = {
        "code": code,
        "mlx": version("mlx"),
        "mlx-lm": version("mlx-lm"),
        "device": device.kind,
        "blas": device.blas,
    }
    whole = dict(facts) | versions | {"kernels": RECORDED[kernels.choice()]}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:32]


def earlier_names(facts: Mapping[str, Any]) -> list[str]:
    """The names that a run's own values from ``facts`` may have beside `name`."""
    return [name(facts, code) for code in SAME_BUT_ROUNDED]


@dataclass
class Reference:
    """``values``: digest of a sequence → Σ weight · log p in nats by the model before training."""

    name: str | None  # None: `read` takes a file of any name
    values: dict[bytes, float] = field(default_factory=dict)
    measured: int = 0
    cached: int = 0

    def fill(self, groups: Iterable[Group]) -> list[Group]:
        """``groups`` with their reference. Raises TrainingError if one was not measured."""
        try:
            return [
                group._replace(reference=tuple(self.values[sequence.digest] for sequence in group.sequences))
                for group in groups
            ]
        except KeyError as error:
            raise TrainingError(
                "a row has no log-probability from before training", hint="start a new run"
            ) from error

    def read(self, path: Path, earlier: Sequence[str] = ()) -> str | None:
        """Add the values in ``path``, whose name may also be one of ``earlier``. Returns what is wrong with
        the file, or None if it is in order or missing."""
        try:
            if not path.exists():
                return None
            with safe_open(path, framework="numpy") as file:
                found = (file.metadata() or {}).get("name")
                if self.name is not None and found not in (self.name, *earlier):
                    return "was made from another base, adapter or version"
                digests, values = file.get_tensor("digests"), file.get_tensor("logps")
        except (SafetensorError, OSError, KeyError) as error:
            return f"cannot be read: {error}"
        if digests.dtype != np.uint8 or digests.shape != (len(values), 32) or not np.isfinite(values).all():
            return "does not have the expected content"
        self.values |= dict(zip(map(bytes, digests), values.tolist(), strict=True))
        return None

    def write(self, path: Path, only: Iterable[bytes] | None = None) -> None:
        """Whole or not at all."""
        chosen = sorted(self.values if only is None else set(only))
        tensors = {
            "digests": np.frombuffer(b"".join(chosen), np.uint8).reshape(-1, 32),
            "logps": np.array([self.values[key] for key in chosen], dtype=np.float64),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        write_bytes(path, save(tensors, metadata={"name": self.name or ""}))


def measure(
    net: nn.Module,
    groups: Sequence[Group],
    cut: Cut,
    name: str,
    *,
    own: Path | None = None,
    earlier: Sequence[str] = (),
    ranks: Ranks = ONE,
    stopped: Callable[[], bool] = bool,
    notify: Sink = events.silent,
) -> Reference:
    """The reference of all sequences of ``groups`` by ``net`` as it is now: before step 1, before a
    checkpoint is restored.

    own: where the run keeps its values, whose name may be one of ``earlier``; they come first. Then the
    shared cache; the rest is computed, ranks share the work, and finished values are saved every few
    sequences. Raises KeyboardInterrupt soon after ``stopped()`` is true on any rank."""
    cache = backend.cache_folder() / "reference" / f"{name}.safetensors"
    reference = Reference(name)
    if ranks.writes:
        # the run's own values take precedence
        _read_known(reference, {cache: ()} | ({own: earlier} if own else {}), notify)
    wanted = {sequence.digest: sequence for group in groups for sequence in group.sequences}
    keys = sorted(wanted)
    _share_known(reference, keys, ranks)
    missing = sorted(
        (key for key in keys if key not in reference.values), key=lambda key: (-len(wanted[key].ids), key)
    )
    done, uncached = 0, False
    tick = events.ticker(notify, "reference: the model before training")
    for part in _parts(missing, wanted, SAVED_EVERY * ranks.size):
        if ranks.total_float(np.array([float(stopped())])).any():
            raise KeyboardInterrupt

        def ahead(now: int, of: int, done: int = done) -> None:
            if ranks.size == 1 and stopped():
                raise KeyboardInterrupt
            tick(min(done + now * ranks.size, len(missing)), len(missing))

        sizes = np.array([len(family) for family in part])
        mine = np.repeat(np.arange(len(part)) % ranks.size == ranks.rank, sizes)
        together = [key for family in part for key in family]
        singles = [
            Group((wanted[key],), "") for key, own_share in zip(together, mine, strict=True) if own_share
        ]
        logps = np.zeros(len(together))
        logps[mine] = [logp for ((logp, _),) in scoring.sequence_sums(net, singles, cut, ahead)]
        reference.values |= dict(zip(together, ranks.total_float(logps).tolist(), strict=True))
        done += len(together)
        if ranks.writes and not uncached:
            uncached = _merge(reference, cache, notify)
    reference.measured = len(missing)
    if ranks.writes and own is not None:
        reference.write(own, keys)
    return reference


def _read_known(reference: Reference, paths: Mapping[Path, Sequence[str]], notify: Sink) -> None:
    """Take the values of ``paths``, the later ones first, each with the names that it may also have; a file
    that cannot be used is measured again, with a notice."""
    for path, earlier in paths.items():
        if problem := reference.read(path, earlier):
            text = f"reference log-probabilities measured again: {path.name} {problem}"
            notify(Notice(text, level="warning"))


def _share_known(reference: Reference, keys: Sequence[bytes], ranks: Ranks) -> None:
    """Give every rank the values of ``keys`` that the first rank has, and no others."""
    known = ranks.total_float(np.array([key in reference.values for key in keys], dtype=np.float64)) > 0
    values = ranks.total_float(np.array([reference.values.get(key, 0.0) for key in keys]))
    reference.values = {
        key: float(value) for key, value, is_known in zip(keys, values, known, strict=True) if is_known
    }
    reference.cached = len(reference.values)


def _parts(keys: Sequence[bytes], wanted: Mapping[bytes, Tokens], size: int) -> Iterator[list[list[bytes]]]:
    """``keys`` in parts of ``size`` or more, those with one prompt together; after any part the rest is cut
    in the same way."""
    part: list[list[bytes]] = []
    for members in scoring.families([wanted[key] for key in keys]):
        part.append([keys[member] for member in members])
        if sum(map(len, part)) >= size:
            yield part
            part = []
    if part:
        yield part


def _merge(reference: Reference, cache: Path, notify: Sink) -> bool:
    """Add the values to the shared cache, which keeps those of other runs. True, and a warning, if it cannot
    be written."""
    both = Reference(reference.name)
    both.read(cache)
    both.values |= reference.values
    try:
        both.write(cache)
    except OSError as error:
        text = f"the reference is not cached for other runs: {error}"
        hint = "make the cache folder writable, or name another: TUNESMITH_CACHE=FOLDER"
        notify(Notice(text, level="warning", where=str(cache.parent), hint=hint))
        return True
    return False


def compared(
    prepared: Prepared,
    config: RunConfig,
    loaded: Loaded,
    *,
    own: Path | None,
    among: Ranks,
    stopped: Callable[[], bool],
    notify: Sink,
) -> Prepared:
    """``prepared`` with the reference of every row, by the model as it is now, and of every mismatched pair
    to come."""
    started = time.perf_counter()
    counted: Counter[str] = Counter()
    used = _used(prepared)
    everything = [*used.values(), *prepared.valid]
    for step in (None, *range(prepared.plan.steps)):
        pairs, notes = _pairs(prepared, config, step)
        everything += pairs
        counted += notes
    for note, count in sorted(counted.items()):
        notify(Notice(note, count=count))
    cut = Cut.forward(config.batch, everything)
    decisive = facts(config, loaded)
    measured = measure(
        loaded.net,
        everything,
        cut,
        name(decisive),
        own=own,
        earlier=earlier_names(decisive),
        ranks=among,
        stopped=stopped,
        notify=notify,
    )
    text = f"reference: {measured.measured:,} sequences measured, {measured.cached:,} cached"
    notify(Notice(f"{text}, {duration(time.perf_counter() - started)}"))
    known = dict(zip(used, measured.fill(used.values()), strict=True))
    train = [known.get(member, group) for member, group in enumerate(prepared.train)]
    return replace(prepared, train=train, valid=measured.fill(prepared.valid), reference=measured)


def facts(config: RunConfig, loaded: Loaded) -> dict[str, Any]:
    """What decides the log-probabilities of the model before training, beside the tokens."""
    decisive: dict[str, Any] = {"base": _digest(loaded.path, "*.json", "*.safetensors")}
    decisive["model"] = config.model.model_dump(include={"quantize", "group_size", "dtype"})
    # Layers that are trained in full may have another precision than those beside an adapter.
    decisive["adapter"] = config.adapter.model_dump(include={"kind", "full_modules"})
    if config.adapter.start is not None and not isinstance(config.adapter, Full):
        if config.adapter.dtype != "float32":  # the adapter that is started from was rounded
            decisive["adapter"]["dtype"] = config.adapter.dtype
    for role, folder in (("merged", config.model.adapter), ("start", config.adapter.start)):
        decisive[role] = folder and _digest(Path(folder), ADAPTERS, PEFT_WEIGHTS, ADAPTER_CONFIG)
    return decisive


def _used(prepared: Prepared) -> dict[int, Group]:
    """The training rows that the run uses, by index: a short run does not measure the others."""
    plan = prepared.plan
    first_epoch = range(min(plan.steps, plan.steps_per_epoch))
    members = {member for step in first_epoch for member in plan.members(step)}
    return {member: prepared.train[member] for member in sorted(members)}


def twins(prepared: Prepared, config: RunConfig, step: int | None) -> list[Group]:
    """The mismatched pairs of update ``step``, or (None) of the validation rows, with their reference if it
    is measured."""
    pairs, _ = _pairs(prepared, config, step)
    return pairs if prepared.reference is None else prepared.reference.fill(pairs)


def count(prepared: Prepared, config: RunConfig) -> int:
    """Number of sequences that the updates that are looked at compare with the model before training; 0 if
    the objective does not."""
    if not prepared.objective.needs_reference:
        return 0
    pairs = [pair for step in (None, *prepared.plan.looked_at) for pair in _pairs(prepared, config, step)[0]]
    return len(
        {
            sequence.digest
            for group in (*_used(prepared).values(), *prepared.valid, *pairs)
            for sequence in group.sequences
        }
    )


def _pairs(prepared: Prepared, config: RunConfig, step: int | None) -> tuple[list[Group], Counter[str]]:
    if step is None:
        return prepared.objective.twins(prepared.valid, 0, (), config.batch.length)
    groups = [prepared.train[member] for member in prepared.plan.members(step)]
    return prepared.objective.twins(groups, step + 1, prepared.train, config.batch.length)


def _digest(folder: Path, *patterns: str) -> str:
    """Hash of every byte of these files, so that any change shows."""
    files = sorted({file for pattern in patterns for file in folder.glob(pattern)})
    return hashlib.sha256(" ".join(f"{file.name} {sha256(file)}" for file in files).encode()).hexdigest()
