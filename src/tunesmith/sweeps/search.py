"""A search through a space of settings by Optuna: it suggests, the sweep trains, and what came of it is told.

The study is a journal in the sweep's folder. The sampler of each round is seeded by the number of trials
before it, so a search that was stopped goes on as if it had not been (one trial at a time; with several, what
is suggested next depends on which rounds were complete)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from tunesmith.errors import ConfigError, SetupError
from tunesmith.sweeps.ledger import JOURNAL
from tunesmith.sweeps.measured import Metric
from tunesmith.sweeps.outcome import SweepOutcome
from tunesmith.sweeps.spec import SpaceSpec, SweepSpec

if TYPE_CHECKING:
    import optuna


class Search:
    """The study of a sweep. ``changes``: of its trials so far, in order."""

    def __init__(self, folder: Path, spec: SweepSpec, metric: Metric) -> None:
        """Raises ConfigError if ``spec`` has no space, SetupError if Optuna is not installed."""
        if not spec.space:
            hint = "give a space, for example adapter.rank: [8, 32]"
            raise ConfigError("there is nothing to search", where="--optuna", hint=hint)
        try:
            import optuna
            from optuna.storages.journal import JournalFileBackend
        except ImportError as error:
            hint = 'pip install "tunesmith[optuna]"'
            raise SetupError("optuna is not installed", where="--optuna", hint=hint) from error
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.space = spec.space
        folder.mkdir(parents=True, exist_ok=True)
        backend = JournalFileBackend(str(folder / JOURNAL))
        self.study = optuna.create_study(
            storage=optuna.storages.JournalStorage(backend),
            study_name="sweep",
            direction="minimize" if metric.lower_is_better else "maximize",
            load_if_exists=True,
        )

    @property
    def changes(self) -> list[dict[str, object]]:
        """Of every suggestion so far."""
        return [self._changes(trial.params) for trial in self.study.trials]

    @property
    def pending(self) -> bool:
        """Whether something was suggested that has not been told."""
        return any(not trial.state.is_finished() for trial in self.study.trials)

    def suggest(self, count: int) -> None:
        """``count`` more settings to try."""
        from optuna.samplers import TPESampler

        self.study.sampler = TPESampler(seed=len(self.study.trials))
        for _ in range(count):
            trial = self.study.ask()
            for key, space in self.space.items():
                _draw(trial, key, space)

    def tell(self, outcome: SweepOutcome) -> None:
        """The values of the settings that were tried; one without a value has failed."""
        from optuna.trial import TrialState

        values = {_key(setting.changes): setting.value for setting in outcome.settings}
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            value = values.get(_key(self._changes(trial.params)))
            if value is None:
                self.study.tell(trial.number, state=TrialState.FAIL)
            else:
                self.study.tell(trial.number, value)

    def _changes(self, parameters: Mapping[str, object]) -> dict[str, object]:
        return {
            key: json.loads(str(value)) if self.space[key].choices else value
            for key, value in parameters.items()
            if key in self.space
        }


def _draw(trial: optuna.Trial, key: str, space: SpaceSpec) -> None:
    low, high = space.low, space.high
    if low is None or high is None:
        trial.suggest_categorical(key, _texts(space.choices))
    elif isinstance(low, int) and isinstance(high, int):
        trial.suggest_int(key, low, high, log=space.log)
    else:
        trial.suggest_float(key, low, high, log=space.log)


def _texts(choices: Sequence[object]) -> list[str]:
    """As JSON: a study holds numbers and text only."""
    return [json.dumps(choice) for choice in choices]


def _key(changes: Mapping[str, object]) -> str:
    return json.dumps(dict(changes), sort_keys=True)
