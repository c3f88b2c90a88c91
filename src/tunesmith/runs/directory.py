"""What a run is and where it lives: its settings, every file name, and checkpoints that survive a kill at any
moment.

Everything is written to a temporary name, flushed to disk and renamed, so a file or a checkpoint is whole or
absent. A checkpoint's ``cursor.json`` holds the SHA-256 of its other files; a torn one is found by it and the
one before is used."""

from __future__ import annotations

import errno
import json
import os
import platform
import shlex
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, model_validator

from tunesmith.adapters.specs import DoRA, Full, LoRA
from tunesmith.auditing import AuditSpec
from tunesmith.data.formats import DataSpec
from tunesmith.data.sources import sha256
from tunesmith.errors import CorruptCheckpoint, DataError, DiskFull, ModelError, ResumeMismatch
from tunesmith.events import Notice, Sink, silent
from tunesmith.files import flush, write_json, write_text
from tunesmith.learning.objectives.apo import APOZeroUnpaired
from tunesmith.learning.objectives.dpo import DPO
from tunesmith.learning.objectives.kto import KTO
from tunesmith.learning.objectives.orpo import ORPO
from tunesmith.learning.objectives.sft import SFT
from tunesmith.learning.objectives.simpo import SimPO
from tunesmith.learning.optimizer import OptimizerSpec
from tunesmith.machine import backend
from tunesmith.model.loading import ModelSpec
from tunesmith.settings.config import Spec, dump, load
from tunesmith.tokens.batches import BatchSpec
from tunesmith.tokens.template import TemplateSpec

CONFIG, ORIGIN, MANIFEST, EVENTS, LOG = (
    "config.yaml",
    "origin.json",
    "manifest.json",
    "events.jsonl",
    "training.log",
)
DATA, EVALS, CHECKPOINTS, FROZEN, REFERENCE = (
    "data",
    "evals",
    "checkpoints",
    "frozen",
    "reference.safetensors",
)
DROPPED, VALID, SHOWN, PLAN = "data/dropped.jsonl", "data/valid.jsonl", "data/rendered.json", "data/plan.json"
AUDIT = "data/audit.json"
ADAPTERS, ADAPTER_CONFIG, OPTIMIZER, CURSOR = (
    "adapters.safetensors",
    "adapter_config.json",
    "optimizer.safetensors",
    "cursor.json",
)

SAFE_TO_CHANGE = frozenset(
    {
        "loop.save_every",
        "loop.keep_last",
        "loop.tensorboard",
        "loop.instrument_every",
        "loop.activations",
        "model.path",
    }
)
"""Keys that may differ when a run is resumed: none of them moves a weight. Another path has to be the same
model, by its hash."""


class LoopSpec(Spec):
    """How long to train, and what to do on the way."""

    epochs: float = Field(default=1.0, gt=0, description="passes over the training rows")
    steps: int | None = Field(
        default=None, ge=1, description="optimizer updates; where given, epochs does not count"
    )
    validate_every: int = Field(
        default=50, ge=0, description="updates between validations; 0: first and last only"
    )
    save_every: int = Field(default=100, ge=0, description="updates between checkpoints; 0: the last only")
    keep_last: int = Field(default=3, ge=1, description="checkpoints kept beside the best")
    keep_best: bool | None = Field(
        default=None,
        description="save and keep the best checkpoint by validation; null: where rows are held out",
    )
    best: str = Field(
        default="loss",
        description="what best means: loss, perplexity, or what the objective watches (margin, accuracy, …)",
    )
    early_stop: int | None = Field(
        default=None, ge=1, description="stop after so many validations without a new best"
    )
    sample_every: int = Field(
        default=0, ge=0, description="updates between sample answers; 0: first and last only"
    )
    samples: int = Field(default=3, ge=0, description="validation prompts answered as samples")
    sample_tokens: int = Field(default=128, ge=1, description="longest sample answer, in tokens")
    instrument_every: int = Field(
        default=10,
        ge=0,
        description="updates between measurements of each weight's gradient and change; 0: never",
    )
    activations: bool = Field(
        default=False, description="at validations, also measure the output of each layer"
    )
    checkpoint_gradients: bool = Field(
        default=False,
        description="recompute each layer in the backward pass: about half of the memory beside the weights, 1.2 to 1.5 the time",
    )
    cache_frozen: bool = Field(
        default=False,
        description="keep on disk, while training, what the frozen layers below the adapter say to each row",
    )
    compile: bool | None = Field(
        default=None,
        description="compile the step for the shapes that come most often; null: on a GPU, where rows are not packed",
    )
    seed: int = Field(
        default=0, ge=0, description="decides the split, the order of rows, the adapter and its dropout"
    )
    tensorboard: bool = Field(
        default=False, description="also write TensorBoard files (needs the tensorboard extra)"
    )


class RunConfig(Spec):
    """Everything that decides a run."""

    model: ModelSpec
    data: DataSpec
    audit: AuditSpec = Field(default_factory=lambda: AuditSpec.model_validate({}))
    template: TemplateSpec = Field(default_factory=lambda: TemplateSpec.model_validate({}))
    objective: SFT | KTO | APOZeroUnpaired | DPO | ORPO | SimPO = Field(default_factory=SFT)
    adapter: LoRA | DoRA | Full = Field(default_factory=lambda: LoRA.model_validate({}))
    batch: BatchSpec = Field(default_factory=BatchSpec)
    optimizer: OptimizerSpec = Field(default_factory=OptimizerSpec)
    loop: LoopSpec = Field(default_factory=LoopSpec)

    @model_validator(mode="after")
    def _consistent(self) -> RunConfig:
        if self.data.valid in (0, ()):
            if self.loop.early_stop is not None:
                raise ValueError("loop.early_stop needs validation rows, and data.valid is 0")
            if self.loop.keep_best:
                raise ValueError("loop.keep_best needs validation rows, and data.valid is 0")
            if self.loop.best != "loss":
                raise ValueError("loop.best needs validation rows, and data.valid is 0")
        if self.loop.early_stop is not None and self.loop.validate_every == 0:
            raise ValueError("loop.early_stop needs loop.validate_every above 0")
        if self.loop.best not in (names := ("loss", "perplexity", *self.objective.watched)):
            raise ValueError(f"loop.best is {self.loop.best}; {self.objective.kind} has {', '.join(names)}")
        if self.template.prompt_weight and self.objective.kind != "sft":
            raise ValueError(
                f"template.prompt_weight is for sft: {self.objective.kind} compares answers, not prompts"
            )
        if self.loop.compile and self.batch.pack:
            raise ValueError(
                "loop.compile and batch.pack exclude each other: nearly every packed row would be a new shape"
            )
        return self

    def anchored(self) -> RunConfig:
        """The same with absolute paths, so that a run can be resumed from any folder; runs become their best
        checkpoints."""

        def anchor(path: str) -> str:
            return str(Path(path).expanduser().resolve()) if Path(path).expanduser().exists() else path

        data = {"train": tuple(map(anchor, self.data.train))}
        data |= {"valid": tuple(map(anchor, self.data.valid))} if isinstance(self.data.valid, tuple) else {}
        paths = {
            "path": anchor(self.model.path),
            "tokenizer": self.model.tokenizer and anchor(self.model.tokenizer),
        }
        model = self.model.model_copy(
            update=paths | {"adapter": _checkpoint(self.model.adapter, "model.adapter")}
        )
        adapter = self.adapter.model_copy(update={"start": _checkpoint(self.adapter.start, "adapter.start")})
        return self.model_copy(
            update={"data": self.data.model_copy(update=data), "model": model, "adapter": adapter}
        )

    def warnings(self) -> list[str]:
        """Choices that are allowed and poor, each with its reason."""
        found: list[str] = []
        full = self.adapter.kind == "full"
        rate = self.optimizer.learning_rate
        suits = {**self.objective.suits, **(self.objective.suits.get("full", {}) if full else {})}
        suited = suits.get("optimizer.learning_rate")
        if suited is not None:
            kind, usual = self.objective.kind, suited
            if rate >= 2 * usual:
                found.append(
                    f"optimizer.learning_rate {rate:g} is high for {kind}: {usual:g} is usual; SFT's is too much for it"
                )
            if self.objective.needs_reference and getattr(self.adapter, "dropout", 0.0) > 0:
                found.append(
                    "adapter.dropout is SFT's: it makes the log-ratios to the reference noisy; 0 is usual here"
                )
            if self.batch.sequences < self.objective.suits["batch.sequences"]:
                many = self.objective.suits["batch.sequences"]
                found.append(f"batch.sequences {self.batch.sequences} is few for {kind}: {many} is usual")
        elif full and rate > 5e-5:
            found.append(
                f"optimizer.learning_rate {rate:g} is high for full weights: 1e-5 is usual, LoRA's is ten times it"
            )
        if not full and suited is None and self.optimizer.kind.startswith("adam") and rate > 1e-3:
            found.append(f"optimizer.learning_rate {rate:g} is high for LoRA: 1e-4 to 2e-4 is usual")
        if not full and suited is None and rate < 1e-5:
            found.append(
                f"optimizer.learning_rate {rate:g} is low for LoRA: it likes about ten times full weights' rate"
            )
        if not full and self.batch.sequences > 32:
            found.append(
                f"batch.sequences {self.batch.sequences} is large: LoRA learns better from batches under 32"
            )
        if self.data.valid in (0, ()):
            found.append(
                "data.valid is 0: nothing is held out, so there is no validation, no sample and no evaluation"
            )
        if self.optimizer.max_norm is None:
            found.append("optimizer.max_norm is null: one bad row can throw the adapter far off")
        if full and self.model.quantize is not None:
            found.append(
                "model.quantize with full weights: the quantised layers stay frozen, only the rest is trained"
            )
        return found


@dataclass
class Cursor:
    """Where training stands after ``step`` updates: all state beside the adapter and the optimizer."""

    step: int = 0
    best_step: int | None = None
    best_value: float | None = None  # of what `LoopSpec.best` names
    stale: int = 0  # validations since the best
    skipped: int = 0  # updates that the guard skipped, in a row
    tokens: int | None = None  # on the device at once, where the plan's budget was too much
    elapsed_s: float = 0.0
    events_bytes: int = 0  # events.jsonl up to here belongs to this checkpoint
    sha256: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A run directory."""

    path: Path

    @property
    def config(self) -> RunConfig:
        return load(RunConfig, files=[self.path / CONFIG]).spec

    def settings(self, model: str | None = None) -> RunConfig:
        """`config`, with the base model at ``model`` where it was moved; `require_base` sees whether it is
        the same one."""
        config = self.config
        was = Path(config.model.path)
        if model is None and was.is_absolute() and not was.exists():
            hint = f"name where it lies now: --model PATH, or to train on: {self.hint} --set model.path=PATH"
            raise ModelError("the model of this run is not there any more", where=str(was), hint=hint)
        return (
            config
            if model is None
            else config.model_copy(update={"model": config.model.model_copy(update={"path": model})})
        )

    @property
    def manifest(self) -> dict[str, Any]:
        return json.loads((self.path / MANIFEST).read_text(encoding="utf-8"))

    @property
    def hint(self) -> str:
        return f"tunesmith train --resume {shlex.quote(str(self.path))}"

    @classmethod
    def open(cls, path: str | Path) -> Run:
        """The run at ``path``. Raises DataError where there is none."""
        folder = Path(path)
        if not (folder / MANIFEST).is_file():
            what = "no run here: " + (
                f"{MANIFEST} is missing" if folder.is_dir() else "there is no such folder"
            )
            raise DataError(what, where=str(path), hint="runs live in ./runs/<name>")
        return cls(folder)

    @classmethod
    def create(
        cls, path: Path, config: RunConfig, origins: Mapping[str, str], manifest: Mapping[str, Any]
    ) -> Run:
        """A new run directory: it appears whole, with its settings, or not at all. Refuses one that
        exists."""
        require_free(path)
        draft = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}"
        try:
            for folder in (DATA, CHECKPOINTS):
                (draft / folder).mkdir(parents=True)
        except OSError as error:
            raise DataError(
                f"cannot be made: {error.strerror}", where=str(path), hint="choose another --out"
            ) from error
        write_text(draft / CONFIG, dump(config))
        write_json(draft / ORIGIN, dict(origins))
        write_json(draft / MANIFEST, {**manifest, "status": "running"})
        draft.rename(path)
        return cls(path)

    def mark(self, status: str) -> None:
        write_json(self.path / MANIFEST, {**self.manifest, "status": status})

    def require_same(self, config: RunConfig, hashes: Mapping[str, Any]) -> None:
        """Raises ResumeMismatch with a diff where settings or inputs differ in what would move a weight."""
        old, new = flat(self.config.model_dump(mode="json")), flat(config.model_dump(mode="json"))
        changed = [
            key for key in sorted(old | new) if old.get(key) != new.get(key) and key not in SAFE_TO_CHANGE
        ]
        lines = [f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in changed]
        was, now = flat(self.manifest["hashes"]), flat(dict(hashes))
        lines += [
            f"{key}: {was.get(key)} → {now.get(key)}"
            for key in sorted(was | now)
            if was.get(key) != now.get(key)
        ]
        if lines:
            raise ResumeMismatch(
                "the run cannot go on exactly, because this has changed:\n  " + "\n  ".join(lines),
                where=str(self.path),
                hint="put it back, or start a new run; only "
                + ", ".join(sorted(SAFE_TO_CHANGE))
                + " may change",
            )

    # Checkpoints

    def checkpoint(self, step: int) -> Path:
        return self.path / CHECKPOINTS / f"{step:06d}"

    def checkpoints(self) -> list[int]:
        """Steps that have a checkpoint folder, ascending."""
        folder = self.path / CHECKPOINTS
        return sorted(
            int(entry.name) for entry in folder.iterdir() if entry.is_dir() and entry.name.isdigit()
        )

    def save(self, cursor: Cursor, write: Callable[[Path], None], needed: int) -> int:
        """A checkpoint for ``cursor.step``; ``write`` fills a folder. Returns its size in bytes.

        Raises DiskFull before anything is touched when ``needed`` bytes (and a margin) are not free, and when
        the disk fills up meanwhile; the checkpoints before it stay as they were."""
        final = self.checkpoint(cursor.step)
        free = shutil.disk_usage(self.path).free
        margin = needed + (16 << 20)
        if free < margin:
            raise self._full(f"a checkpoint needs {margin / 1e6:.0f} MB and {free / 1e6:.0f} MB are free")
        draft = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}")
        try:
            draft.mkdir()
            write(draft)
            cursor.sha256 = {file.name: sha256(file) for file in sorted(draft.iterdir())}
            write_json(draft / CURSOR, asdict(cursor))
            for file in draft.iterdir():
                flush(file)
            draft.rename(final)
            flush(final.parent)
        except BaseException:
            shutil.rmtree(draft, ignore_errors=True)
            raise
        return sum(file.stat().st_size for file in final.iterdir())

    @contextmanager
    def room(self) -> Iterator[None]:
        """Inside, a write that the disk has no room for is told as DiskFull."""
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise
            raise self._full(str(error)) from error

    def moved(self, now: Mapping[str, Any]) -> list[str]:
        """What is not the same machine or software as when the run began: then the bytes may differ."""
        was, found = flat({key: self.manifest[key] for key in ("versions", "machine")}), flat(dict(now))
        was.setdefault("machine.ranks", 1)  # before there were several
        changed = [f"{key} {was[key]} → {found.get(key)}" for key in was if found.get(key) != was[key]]
        return (
            [f"resumed elsewhere, the result may differ in its last digits: {', '.join(changed)}"]
            if changed
            else []
        )

    def require_base(self, base: str, template: str) -> None:
        """Raises ModelError where the base weights or the template are not those that the run was trained
        with."""
        hashes = self.manifest["hashes"]
        changed = [name for name, value in (("base", base), ("template", template)) if hashes[name] != value]
        if changed:
            what = f"the {' and the '.join(changed)} changed since this run was trained: its adapter fits another model"
            raise ModelError(what, where=self.config.model.path, hint="put it back, or train again")

    def _full(self, what: str) -> DiskFull:
        return DiskFull(
            f"the disk is full: {what}",
            where=str(self.path),
            hint=f"nothing before it is lost; make room, then: {self.hint}",
        )

    def retain(self, cursor: Cursor, spec: LoopSpec) -> None:
        """Remove checkpoints beyond the last ``keep_last`` and the best, and write the index."""
        steps = self.checkpoints()
        kept = set(steps[-spec.keep_last :]) | ({cursor.best_step} if spec.keep_best is not False else set())
        for step in steps:
            if step not in kept:
                doomed = self.checkpoint(step)
                aside = doomed.with_name(
                    f".{doomed.name}.{uuid.uuid4().hex[:8]}"
                )  # a kill half way leaves no half checkpoint
                doomed.rename(aside)
                shutil.rmtree(aside)
        write_json(
            self.path / CHECKPOINTS / "index.json",
            {
                "last": steps[-1] if steps else None,
                "best": cursor.best_step,
                "metric": f"validation {spec.best}",
                "best_value": cursor.best_value,
                "kept": [step for step in steps if step in kept],
            },
        )

    def cursor(self, step: int) -> Cursor:
        """The cursor of a checkpoint whose files all match their checksums. Raises CorruptCheckpoint, naming
        the file."""
        folder = self.checkpoint(step)
        try:
            found = json.loads((folder / CURSOR).read_text(encoding="utf-8"))
            old = {"best_value": found.pop("best_loss")} if "best_loss" in found else {}  # its name before
            cursor = Cursor(**found, **old)
            complete = {ADAPTERS, ADAPTER_CONFIG, OPTIMIZER} <= cursor.sha256.keys() and cursor.step == step
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CorruptCheckpoint(f"cannot be read: {error}", where=str(folder / CURSOR)) from error
        if not complete:
            raise CorruptCheckpoint("does not describe this checkpoint", where=str(folder / CURSOR))
        for name, expected in cursor.sha256.items():
            if not (folder / name).is_file():
                raise CorruptCheckpoint("is missing", where=str(folder / name))
            if sha256(folder / name) != expected:
                raise CorruptCheckpoint("does not match its checksum", where=str(folder / name))
        return cursor

    def newest(self, report: Callable[[CorruptCheckpoint], None]) -> Cursor | None:
        """The cursor of the newest whole checkpoint, None where there is none; each torn one is reported and
        set aside."""
        for step in reversed(self.checkpoints()):
            try:
                return self.cursor(step)
            except CorruptCheckpoint as error:
                report(error)
                torn = self.checkpoint(step)
                torn.rename(torn.with_name(f"torn-{torn.name}-{uuid.uuid4().hex[:8]}"))
        return None

    def choose(self, which: str | int | Literal["best", "last"] = "best", notify: Sink = silent) -> Path:
        """The folder of a checkpoint: ``best`` (the last where that is not kept, which is told), ``last``, or
        a step."""
        steps = self.checkpoints()
        if not steps:
            wait = "while it trains, wait; else: " if self.manifest["status"] == "running" else ""
            raise DataError("has no checkpoint yet", where=str(self.path), hint=wait + self.hint)
        if which == "best":
            last = self.cursor(steps[-1])
            step = last.best_step if last.best_step in steps else steps[-1]
            if last.best_step not in (step, None):
                place = f"at step {last.best_step}, which is not kept" if last.best_step else "the base's"
                what = f"the best validation {self.config.loop.best} so far is {place}; step {step} is used"
                notify(Notice(what, level="warning"))
        elif which == "last":
            step = steps[-1]
        else:
            step = int(which) if str(which).isdigit() else None
            if step not in steps:
                kept = ", ".join(map(str, steps))
                raise DataError(
                    f"has no checkpoint {which}", where=str(self.path), hint=f"best, last, or a step: {kept}"
                )
        assert step is not None
        self.cursor(step)
        return self.checkpoint(step)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Only one process trains a run. The lock is the kernel's: it goes when the process does."""
        import fcntl

        with (self.path / ".lock").open("w") as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise DataError("another process is training this run", where=str(self.path)) from error
            for left in (self.path / CHECKPOINTS).glob(".*"):  # drafts of a process that was killed
                shutil.rmtree(left) if left.is_dir() else left.unlink()
            yield


def _checkpoint(path: str | None, where: str) -> str | None:
    """The checkpoint folder that ``path`` means: itself, or the best of a run. Raises ModelError where there
    is none."""
    if path is None:
        return None
    folder = Path(path).expanduser()
    if (folder / MANIFEST).is_file():
        return str(Run(folder).choose("best").resolve())
    if not (folder / ADAPTERS).is_file():
        raise ModelError(
            "is neither a run nor a checkpoint", where=f"{where}: {path}", hint="give the folder of one"
        )
    return str(folder.resolve())


def lineage(checkpoint: str, base: str) -> dict[str, Any]:
    """Where an adapter comes from, for the manifest. Raises ModelError where it was trained on another base
    than ``base``."""
    folder = Path(checkpoint)
    if not (folder / ADAPTERS).is_file():
        raise ModelError(
            "the adapter to go on from is gone", where=checkpoint, hint="put it back, or start a new run"
        )
    found: dict[str, Any] = {"checkpoint": checkpoint, "sha256": sha256(folder / ADAPTERS)}
    run = Run(folder.parent.parent)
    if (run.path / MANIFEST).is_file():
        facts = run.manifest
        if facts["hashes"]["base"] != base:
            below = facts.get("lineage", {}).get("merged", {}).get("checkpoint", "null")
            hint = f"give the model it was made for, with model.adapter={below}"
            raise ModelError("this adapter was trained on another base", where=checkpoint, hint=hint)
        found |= {
            "run": run.path.name,
            "objective": run.config.objective.kind,
            "data": facts["hashes"]["data"],
        }
        found |= {key: facts[key] for key in ("lineage",) if facts.get(key)}
    return found


def require_free(path: Path) -> None:
    """Raises DataError where a run cannot be made at ``path``: it exists, or what is above it is no folder to
    write in."""
    if path.exists():
        raise DataError(
            "exists already",
            where=str(path),
            hint=f"choose another --out, or --resume {shlex.quote(str(path))}",
        )
    above = next(folder for folder in path.absolute().parents if folder.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise DataError(
            f"cannot be made: {above} is not a folder to write in",
            where=str(path),
            hint="choose another --out",
        )


def name(config: RunConfig, day: date) -> str:
    """``2026-11-21-mistral-sft-7f3a``: the day, the model, the objective, and what tells two runs of a day
    apart."""
    stem = Path(config.model.path).name.lower()
    stem = (
        "".join(letter if letter.isalnum() else "-" for letter in stem)
        .strip("-")
        .split(".")[0][:24]
        .strip("-")
    )
    return f"{day.isoformat()}-{stem or 'model'}-{config.objective.kind}-{uuid.uuid4().hex[:4]}"


def facts(
    config: RunConfig,
    hashes: Mapping[str, Any],
    ranks: int = 1,
    lineage: Mapping[str, Any] | None = None,
    accepted: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The manifest of a run that starts now. accepted: findings that ``audit.accept`` let pass, rule → what
    it says."""
    device = backend.setup()
    packages = ("tunesmith", "mlx", "mlx-lm", "transformers", "mistral-common", "numpy")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
        "machine": {
            "system": platform.platform(),
            "device": device.name,
            "kind": device.kind,
            "blas": device.blas,
            "cpu": backend.cpu_settings(),
            "ranks": ranks,
        },
        "seed": config.loop.seed,
        "hashes": dict(hashes),
        "lineage": dict(lineage or {}),
        "accepted": dict(accepted or {}),
    }


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted keys."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            leaves |= flat(value, f"{prefix}{key}.")
        else:
            leaves[prefix + key] = value
    return leaves
