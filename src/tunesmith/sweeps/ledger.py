"""``sweep.json``: what a sweep is made of, how far each trial is, and what came of it.

It is written whole after every change, so that a sweep can be killed at any moment. Finished trials are known
again by their settings: a file that was changed is refused with the difference, one with more trials goes
on."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from tunesmith.errors import ConfigError, listing
from tunesmith.files import read_json, write_json
from tunesmith.settings.config import JSON
from tunesmith.sweeps.spec import SweepSpec
from tunesmith.sweeps.trials import SweepPlan, Trial

LEDGER, JOURNAL = "sweep.json", "optuna.journal"
GENERATOR = "tunesmith sweep"
HINT = "put it back from a copy, or start another sweep with --out"

TrialState = Literal["waiting", "running", "interrupted", "finished", "stopped", "failed"]
"""``stopped``: by racing. ``failed``: its process ended with an error, and the next call tries again."""


@dataclass
class TrialEntry:
    """A trial in ``sweep.json``. ``words``: of its command. ``reason``: why it was stopped or failed.
    ``evaluated``: it was measured on the sweep's tasks. ``setting``: label of its setting."""

    name: str
    setting: str
    seed: int | None
    words: list[str]
    settings: dict[str, JSON]
    state: TrialState = "waiting"
    reason: str = ""
    evaluated: bool = False

    @property
    def ended(self) -> bool:
        return self.state in ("finished", "stopped")


@dataclass
class Ledger:
    """The content of ``sweep.json``. ``spec``: the file as it was read, complete. ``results``: empty until
    some trial has one."""

    generator: str
    created: float
    spec: dict[str, JSON]
    trials: list[TrialEntry]
    results: dict[str, JSON] = field(default_factory=dict)

    def write(self, folder: Path) -> None:
        write_json(folder / LEDGER, asdict(self))

    def entry(self, name: str) -> TrialEntry:
        return next(entry for entry in self.trials if entry.name == name)


def opened(folder: Path, spec: SweepSpec, plan: SweepPlan, file: Path) -> tuple[Ledger, SweepPlan]:
    """The ledger of ``folder``, new or continued, and ``plan`` with the names that its trials already have.

    Raises ConfigError if a trial that was begun is no longer what ``file`` says, or if ``folder`` holds
    something else."""
    written: dict[str, JSON] = spec.model_dump(mode="json")
    path = folder / LEDGER
    require_own(folder)
    if not path.exists():
        entries = [_entry(trial, plan) for trial in plan.trials]
        return Ledger(GENERATOR, time.time(), written, entries), plan
    before = read_json(path, Ledger, ConfigError, HINT)
    renamed = _renamed(before, plan)
    _require_same(before, written, renamed, file)
    known = {entry.name: entry for entry in before.trials}
    entries = [_continued(trial, renamed, known.get(trial.name)) for trial in renamed.trials]
    if any(before.spec.get(key) != written[key] for key in ("evaluate", "evaluation")):
        for entry in entries:  # on other tasks, or otherwise
            entry.evaluated = False
    return Ledger(GENERATOR, before.created, written, entries, before.results), renamed


def require_own(folder: Path) -> None:
    """Raises ConfigError if ``folder`` holds something else than a sweep."""
    if not folder.exists() or (folder / LEDGER).exists():
        return
    if not folder.is_dir() or any(not path.name.startswith((".", JOURNAL)) for path in folder.iterdir()):
        message = "exists already and is not a sweep"
        raise ConfigError(message, where=str(folder), hint="name another folder with --out")


def _entry(trial: Trial, plan: SweepPlan) -> TrialEntry:
    label = plan.settings[trial.setting].label
    settings: dict[str, JSON] = json.loads(json.dumps(trial.settings))
    return TrialEntry(trial.name, label, trial.seed, list(trial.words), settings)


def _continued(trial: Trial, plan: SweepPlan, known: TrialEntry | None) -> TrialEntry:
    entry = _entry(trial, plan)
    if known is not None:
        entry.words, entry.state, entry.reason, entry.evaluated = (
            known.words,
            known.state,
            known.reason,
            known.evaluated,
        )
    return entry


def _renamed(before: Ledger, plan: SweepPlan) -> SweepPlan:
    """``plan`` with the names of trials that are already known by their settings."""
    trials: list[Trial] = []
    taken = {entry.name for entry in before.trials}
    for trial in plan.trials:
        same = next((entry for entry in before.trials if not _differing(entry, trial)), None)
        if same is not None:
            trials.append(replace(trial, name=same.name))
            continue
        name, count = trial.name, 1
        while name in taken:
            count += 1
            name = f"{trial.name}-{count}"
        taken.add(name)
        trials.append(replace(trial, name=name))
    return replace(plan, trials=tuple(trials))


def _differing(entry: TrialEntry, trial: Trial) -> list[str]:
    """The settings that are not the same. A setting that one side does not know is of another release."""
    now = json.loads(json.dumps(trial.settings))
    return [
        f"{key} was {json.dumps(value)} and is {json.dumps(now[key])}"
        for key, value in entry.settings.items()
        if key in now and now[key] != value
    ]


def _require_same(before: Ledger, written: dict[str, JSON], plan: SweepPlan, file: Path) -> None:
    kept = {trial.name for trial in plan.trials}
    gone = [entry for entry in before.trials if entry.name not in kept]
    problems = [_gone(entry, plan.trials) for entry in gone]
    racing = before.spec.get("racing")
    if racing != written["racing"]:
        problems.append(f"racing was {json.dumps(racing)} and is {json.dumps(written['racing'])}")
    if problems:
        hint = "restore what was changed (trials may be added), or start another sweep with --out"
        message = f"the sweep was begun with other settings:\n{listing(problems)}"
        raise ConfigError(message, where=str(file), hint=hint)


def _gone(entry: TrialEntry, trials: Sequence[Trial]) -> str:
    """A trial that is not in the file any more, with what changed in the one most like it."""
    differences = [_differing(entry, trial) for trial in trials if trial.seed == entry.seed]
    fewest = min(differences, key=len, default=[])
    changed = "; ".join(fewest) if 0 < len(fewest) <= 3 else "it is not in the file any more"
    return f"{entry.name}: {changed}"
