"""What a run was made from: versions, machine, hashes of the inputs; and whether they are still the same."""

from __future__ import annotations

import json
import platform
import shlex
from collections.abc import Mapping
from datetime import UTC, date, datetime
from importlib.metadata import version
from typing import Any

from tunesmith.errors import DataError, ModelError, ResumeMismatch
from tunesmith.machine import backend
from tunesmith.model import kernels
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import MANIFEST, PLAN, RESTORE, Run
from tunesmith.settings.config import flat
from tunesmith.tokens.renderers import Recorded

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
"""Keys that may differ when a run is resumed, because they move no weight. Another model.path must hold the
same model, by its hash."""


def facts(
    config: RunConfig,
    hashes: Mapping[str, Any],
    ranks: int = 1,
    lineage: Mapping[str, Any] | None = None,
    accepted: Mapping[str, str] | None = None,
    day: date | None = None,
) -> dict[str, Any]:
    """The manifest of a run that starts now. accepted: findings that ``audit.accept`` allowed, rule →
    message. day: the date that the template saw; preparing may have begun before midnight."""
    device = backend.setup()
    packages = ("tunesmith", "mlx", "mlx-lm", "transformers", "mistral-common", "numpy")
    return {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        **({} if day is None else {"day": day.isoformat()}),
        "versions": {"python": platform.python_version()}
        | {package: version(package) for package in packages},
        "machine": {
            "system": platform.platform(),
            "device": device.name,
            "kind": device.kind,
            "blas": device.blas,
            "cpu": ", ".join(words for words in (backend.cpu_settings(), kernels.recorded()) if words),
            "ranks": ranks,
        },
        "seed": config.loop.seed,
        "hashes": dict(hashes),
        "lineage": dict(lineage or {}),
        "accepted": dict(accepted or {}),
    }


def recorded(run: Run) -> Recorded:
    """What ``run`` recorded of its renderer. Raises DataError if a date in its manifest is not one."""
    facts = run.manifest
    begun = facts.get("day") or facts.get("created") or datetime.now(UTC).isoformat()
    try:
        day = datetime.fromisoformat(begun).date()
    except ValueError as error:
        place = str(run.path / MANIFEST)
        raise DataError(f"{begun!r} is not a date", where=place, hint=RESTORE) from error
    template = facts.get("hashes", {}).get("template")
    try:
        plan = json.loads((run.path / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        plan = None  # a resumed run writes it again
    thinking = isinstance(plan, dict) and plan.get("thinking") is True
    return Recorded(str(template), day, thinking)


def require_same(run: Run, config: RunConfig, hashes: Mapping[str, Any]) -> None:
    """Raises ResumeMismatch, with the differences, if settings or inputs changed that would move a weight."""
    old, new = flat(run.config.model_dump(mode="json")), flat(config.model_dump(mode="json"))
    changed = [key for key in sorted(old | new) if old.get(key) != new.get(key) and key not in SAFE_TO_CHANGE]
    lines = [f"{key}: {old.get(key)!r} → {new.get(key)!r}" for key in changed]
    was, now = flat(run.hashes), flat(dict(hashes))
    lines += [
        f"{key}: {was.get(key)} → {now.get(key)}" for key in sorted(was | now) if was.get(key) != now.get(key)
    ]
    if lines:
        hint = "put it back, or start a new run; only " + ", ".join(sorted(SAFE_TO_CHANGE)) + " may change"
        if {"loop.steps", "loop.epochs"} & set(changed):
            hint += f". To train further, begin a run with --set adapter.start={shlex.quote(str(run.path))}"
        raise ResumeMismatch(
            "the run cannot go on exactly, because this has changed:\n  " + "\n  ".join(lines),
            where=str(run.path),
            hint=hint,
        )


def moved(run: Run, now: Mapping[str, Any]) -> list[str]:
    """A warning if the machine or the software changed since the run began; the resumed bytes may then
    differ."""
    recorded = run.manifest
    was = flat({"versions": recorded.get("versions", {}), "machine": recorded.get("machine", {})})
    current = flat(dict(now))
    was.setdefault("machine.ranks", 1)  # runs made before ranks were recorded
    changed = [f"{key} {was[key]} → {current.get(key)}" for key in was if current.get(key) != was[key]]
    return (
        [f"resumed elsewhere, the result may differ in its last digits: {', '.join(changed)}"]
        if changed
        else []
    )


def require_base(run: Run, base: str, template: str) -> None:
    """Raises ModelError if the base weights or the template are not those that the run was trained with."""
    hashes = run.hashes
    changed = [name for name, value in (("base", base), ("template", template)) if hashes[name] != value]
    if changed:
        message = f"the {' and the '.join(changed)} changed since this run was trained: "
        message += "its adapter fits another model"
        raise ModelError(message, where=run.config.model.path, hint="put it back, or train again")
