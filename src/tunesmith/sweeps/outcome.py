"""What came of a sweep: the value of each setting with its interval, which differences are shown, which keys
matter, and the cheapest setting that is not shown to be worse than the best.

Cheaper is: fewer trained weights; then less memory; then fewer tokens to compute, padding included. Memory
and tokens within `ALIKE` of the least count as equal. Among equals the setting that changes the fewest keys
of the base is taken, then the first of the file. Measured time does not decide: other programs on the machine
change it by more than many settings do."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tunesmith.display.text import many
from tunesmith.errors import TunesmithError
from tunesmith.settings.config import JSON
from tunesmith.sweeps.contrasts import (
    Compared,
    Contrast,
    LevelPair,
    Panel,
    RowValues,
    SweptKey,
    compare,
    contrast,
    misfits,
    panel,
    seed_variance,
)
from tunesmith.sweeps.ledger import Ledger
from tunesmith.sweeps.measured import Metric, TrialCost, cost, mean_cost, scored, went_up
from tunesmith.sweeps.trials import TRIALS, SweepPlan

ALIKE = 1.05
OPEN = ("waiting", "running", "interrupted")
"""States of trials that the same command goes on with."""
DIVERGED = "its held-out loss ends far above where it began: it diverged"
ONE_SEED = "one seed: the variance between seeds is unknown, and intervals cover the held-out rows only"


@dataclass(frozen=True)
class SettingResult:
    """One setting. ``value``: over its seeds; ``low``, ``high``: its 95 % interval over rows and seeds.
    ``behind``: its mean minus the best one's, None for the best itself or if it was not compared. ``spread``:
    standard deviation between its seeds, None if there are not two. ``state``: finished, stopped, failed or
    unfinished. ``notes``: why it has no value, and what is odd about it."""

    label: str
    changes: Mapping[str, object]
    seeds: int
    state: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    spread: float | None = None
    behind: Contrast | None = None
    cost: TrialCost | None = None
    notes: tuple[str, ...] = ()

    @property
    def worse(self) -> bool:
        """Whether it is shown to be worse than the best."""
        return self.behind is not None and self.behind.shown


@dataclass(frozen=True)
class KeyResult:
    """What one key does, all others equal. ``levels``: value of the key → mean of its settings. ``best``,
    ``worst``: places in ``levels``; ``difference``: between these two. ``note``: why it cannot be said."""

    key: str
    levels: tuple[tuple[str, float | None], ...]
    best: int | None = None
    worst: int | None = None
    difference: Contrast | None = None
    note: str = ""

    @property
    def matters(self) -> bool:
        return self.difference is not None and self.difference.shown


@dataclass(frozen=True)
class SweepOutcome:
    """``verdict``: one line; ``lines``: what else is to be said. ``settings``: in the order of the file.
    ``best``, ``choice``: places of the setting with the best value and of the cheapest that is not shown to
    be worse; None if nothing has a value. ``tests``: how many differences were judged together."""

    name: str
    metric: Metric
    verdict: str
    lines: tuple[str, ...]
    settings: tuple[SettingResult, ...]
    keys: tuple[KeyResult, ...]
    best: int | None
    choice: int | None
    tests: int
    n_seeds: int
    n_rows: int

    def to_json(self) -> dict[str, JSON]:
        """Differences are better where they are below zero if ``lower_is_better``."""
        content = {
            "name": self.name,
            "metric": self.metric.name,
            "lower_is_better": self.metric.lower_is_better,
            "verdict": self.verdict,
            "lines": self.lines,
            "best": None if self.best is None else self.settings[self.best].label,
            "choice": None if self.choice is None else self.settings[self.choice].label,
            "tests": self.tests,
            "seeds": self.n_seeds,
            "rows": self.n_rows,
            "settings": [_setting_content(setting) for setting in self.settings],
            "keys": [_key_content(key) for key in self.keys],
        }
        text = json.dumps(content, default=str)
        return json.loads(text, parse_constant=lambda name: str(float(name)))


def _setting_content(setting: SettingResult) -> dict[str, object]:
    return {
        "label": setting.label,
        "changes": dict(setting.changes),
        "seeds": setting.seeds,
        "state": setting.state,
        "value": setting.value,
        "interval": [setting.low, setting.high],
        "between_seeds": setting.spread,
        "behind": None if setting.behind is None else _contrast_content(setting.behind),
        "worse": setting.worse,
        "cost": None if setting.cost is None else setting.cost._asdict(),
        "notes": list(setting.notes),
    }


def _key_content(key: KeyResult) -> dict[str, object]:
    return {
        "key": key.key,
        "matters": key.matters,
        "levels": [list(level) for level in key.levels],
        "difference": None if key.difference is None else _contrast_content(key.difference),
        "note": key.note,
    }


def _contrast_content(difference: Contrast) -> dict[str, object]:
    return {
        "value": difference.value,
        "error": difference.error,
        "interval": difference.interval,
        "p": difference.p,
        "p_corrected": difference.p_corrected,
        "shown": difference.shown,
    }


@dataclass(frozen=True)
class _Measured:
    """What the finished trials of one setting scored, by seed."""

    values: list[RowValues | None]
    costs: list[TrialCost]
    notes: list[str]
    state: str


def outcome(name: str, folder: Path, plan: SweepPlan, ledger: Ledger, metric: Metric) -> SweepOutcome:
    """Of all trials that have ended so far."""
    measured = [_measured(folder, plan, ledger, metric, place) for place in range(len(plan.settings))]
    _leave_out_misfits(measured, plan)
    usable = [place for place, setting in enumerate(measured) if any(setting.values)]
    if not usable:
        settings = tuple(_result(plan, place, measured[place]) for place in range(len(plan.settings)))
        verdict = "no trial has a result: there is nothing to compare"
        return SweepOutcome(name, metric, verdict, (), settings, (), None, None, 0, len(plan.seeds), 0)
    values = panel([measured[place].values for place in usable], metric.share)
    keys = [_restricted(key, usable) for key in plan.keys]
    compared = compare(values, keys)
    sign = 1 if metric.lower_is_better else -1
    best = int(np.argmin([sign * metric.shown(mean) for mean in compared.means]))
    compared = compared.scaled(metric.slope(float(compared.means[best])))
    settings = list(_results(plan, measured, usable, values, compared, best, metric))
    keys = [key for key in keys if len(key.values) > 1]
    results = tuple(_key_result(key, keys, compared, sign, metric) for key in keys)
    choice = _cheapest(settings, usable, keys, results, best)
    verdict, lines = _said(settings, results, usable[best], choice, metric, values, compared)
    if open_trials := sum(entry.state in OPEN for entry in ledger.trials):
        preliminary = f"{open_trials} of {many(len(ledger.trials), 'trial')} have not ended: preliminary"
        lines = (preliminary, *lines)
    return SweepOutcome(
        name,
        metric,
        verdict,
        lines,
        tuple(settings),
        results,
        usable[best],
        choice,
        compared.tests,
        len(plan.seeds),
        values.values.shape[2],
    )


def _measured(folder: Path, plan: SweepPlan, ledger: Ledger, metric: Metric, place: int) -> _Measured:
    values: list[RowValues | None] = []
    costs: list[TrialCost] = []
    notes: dict[str, list[int | None]] = {}
    entries = [ledger.entry(trial.name) for trial in plan.of(place)]
    for entry in entries:
        run_dir = folder / TRIALS / entry.name
        scores: RowValues | str | None = None
        if entry.state == "finished":
            try:
                scores = scored(run_dir, metric)
                costs += [taken] if (taken := cost(run_dir)) is not None else []
                if went_up(run_dir):
                    notes.setdefault(DIVERGED, []).append(entry.seed)
            except TunesmithError as error:
                scores = error.what
        elif entry.reason:
            notes.setdefault(entry.reason, []).append(entry.seed)
        if isinstance(scores, str):
            notes.setdefault(scores, []).append(entry.seed)
        values.append(None if isinstance(scores, str) else scores)
    states = {entry.state for entry in entries}
    state = next(
        (state for state in ("stopped", "failed") if state in states),
        "finished" if states == {"finished"} else "unfinished",
    )
    if state == "stopped":  # by some seeds alone it is not comparable
        values = [None] * len(values)
    return _Measured(
        values, costs, [_note(text, seeds, len(entries)) for text, seeds in notes.items()], state
    )


def _note(text: str, seeds: Sequence[int | None], count: int) -> str:
    """``text`` with its seeds, if it is not of all."""
    return text if len(seeds) == count else f"seed {', '.join(map(str, seeds))}: {text}"


def _leave_out_misfits(measured: Sequence[_Measured], plan: SweepPlan) -> None:
    for place in misfits([setting.values for setting in measured]):
        measured[place].values[:] = [None] * len(plan.seeds)
        measured[place].notes.append("not compared: its held-out rows or their tokens are others")


def _restricted(key: SweptKey, usable: Sequence[int]) -> SweptKey:
    """``key`` for the settings that have values."""
    levels = [key.levels[place] for place in usable]
    present = sorted(set(levels))
    return SweptKey(
        key.key,
        tuple(key.values[level] for level in present),
        tuple(present.index(level) for level in levels),
    )


def _result(plan: SweepPlan, place: int, measured: _Measured) -> SettingResult:
    setting = plan.settings[place]
    seeds = sum(value is not None for value in measured.values)
    taken = mean_cost(measured.costs) if measured.costs else None
    return SettingResult(
        setting.label, setting.changes, seeds, measured.state, cost=taken, notes=tuple(measured.notes)
    )


def _results(
    plan: SweepPlan,
    measured: Sequence[_Measured],
    usable: Sequence[int],
    values: Panel,
    compared: Compared,
    best: int,
    metric: Metric,
) -> list[SettingResult]:
    pooled = seed_variance(values.means())
    by_seed = values.means()
    results: list[SettingResult] = []
    for place in range(len(plan.settings)):
        result = _result(plan, place, measured[place])
        if place in usable:
            number = usable.index(place)
            own = contrast(values, np.eye(len(usable))[number], pooled)
            ends = own.interval if own is not None else None
            shown = sorted(map(metric.shown, ends)) if ends else [None, None]
            known = [metric.shown(float(mean)) for mean in by_seed[number] if math.isfinite(mean)]
            result = replace(
                result,
                value=metric.shown(float(compared.means[number])),
                low=shown[0],
                high=shown[1],
                spread=float(np.std(known, ddof=1)) if len(known) > 1 else None,
                behind=None if number == best else compared.between(best, number),
            )
        results.append(result)
    return results


def _cheapest(
    settings: Sequence[SettingResult],
    usable: Sequence[int],
    keys: Sequence[SweptKey],
    results: Sequence[KeyResult],
    best: int,
) -> int | None:
    """The place of the cheapest setting that is not shown to be worse than the best, by itself or by the
    value of a key that matters. ``keys`` and ``best`` are by place in ``usable``."""
    candidates: list[tuple[int, TrialCost]] = []
    for number, place in enumerate(usable):
        by_level = any(
            _is_worse_level(key, result, number, best) for key, result in zip(keys, results, strict=True)
        )
        taken = settings[place].cost
        is_compared = number == best or settings[place].behind is not None
        if taken is not None and is_compared and not settings[place].worse and not by_level:
            candidates.append((place, taken))
    if not candidates:
        return None
    fewest = min(taken.trainable for _, taken in candidates)
    candidates = [(place, taken) for place, taken in candidates if taken.trainable == fewest]
    least_memory = min(taken.memory_bytes for _, taken in candidates)
    candidates = [(place, taken) for place, taken in candidates if taken.memory_bytes <= ALIKE * least_memory]
    fewest_tokens = min(taken.tokens for _, taken in candidates)
    equal = [place for place, taken in candidates if taken.tokens <= ALIKE * fewest_tokens]
    return min(equal, key=lambda place: len(settings[place].changes))


def _is_worse_level(key: SweptKey, result: KeyResult, setting: int, best: int) -> bool:
    """Whether ``setting`` has the value of ``key`` that is shown to be worse than the best setting's."""
    levels = (key.levels[best], key.levels[setting])
    return result.matters and levels == (result.best, result.worst)


def _key_result(
    key: SweptKey, keys: Sequence[SweptKey], compared: Compared, sign: int, metric: Metric
) -> KeyResult:
    """The largest difference between two levels of a key, over settings that agree in all else."""
    names = tuple(zip(map(_level, key.values), _level_means(key, keys, compared, metric), strict=True))
    known = {pair: result for pair, result in compared.levels.items() if pair.key == key.key}
    if not known:
        note = "no two settings differ in it alone, so what it does cannot be told from the others"
        return KeyResult(key.key, names, note=note)
    pair, result = max(known.items(), key=_evidence)
    worse_second = sign * result.value > 0
    best, worst = (pair.first, pair.second) if worse_second else (pair.second, pair.first)
    return KeyResult(key.key, names, best, worst, result)


def _level_means(
    key: SweptKey, keys: Sequence[SweptKey], compared: Compared, metric: Metric
) -> list[float | None]:
    """The mean of each value of ``key``, over what the other keys have with all of its values; over all
    settings if there is nothing."""
    others = [other for other in keys if other is not key]
    rest = [tuple(other.levels[place] for other in others) for place in range(len(key.levels))]
    whole = {
        combination
        for combination in rest
        if {level for level, own in zip(key.levels, rest, strict=True) if own == combination}
        == set(range(len(key.values)))
    }
    means: list[float | None] = []
    for level in range(len(key.values)):
        own = [
            float(mean)
            for mean, of, combination in zip(compared.means, key.levels, rest, strict=True)
            if of == level and (combination in whole or not whole)
        ]
        means.append(metric.shown(sum(own) / len(own)) if own else None)
    return means


def _evidence(item: tuple[LevelPair, Contrast]) -> tuple[float, float]:
    _, result = item
    return -(1.0 if result.p is None else result.p), abs(result.value)


def _level(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _said(
    settings: Sequence[SettingResult],
    keys: Sequence[KeyResult],
    best: int,
    choice: int | None,
    metric: Metric,
    values: Panel,
    compared: Compared,
) -> tuple[str, tuple[str, ...]]:
    """The verdict, and the lines that explain it."""
    ranked = [setting for setting in settings if setting.value is not None]
    lines = [_of_key(key, metric) for key in keys]
    if int(values.done.any(axis=0).sum()) == 1:
        lines.append(ONE_SEED)
    lines += [
        f"{setting.label}: {note}" for setting in settings for note in setting.notes if setting.value is None
    ]
    lines += [f"{setting.label}: {note}" for setting in ranked for note in setting.notes]
    if len(ranked) == 1:
        return _alone(ranked[0], metric), tuple(lines)
    leader, chosen = settings[best], settings[best if choice is None else choice]
    if not any(result.shown for result in [*compared.pairs.values(), *compared.levels.values()]):
        weights = {setting.cost.trainable for setting in ranked if setting.cost is not None}
        taken = "smaller" if len(weights) > 1 else "cheapest"
        smaller = f": take the {taken}, {chosen.label}" if choice is not None else ""
        low, high = min(_values(ranked)), max(_values(ranked))
        return (
            f"no difference shown between {len(ranked)} settings ({metric.name} "
            f"{metric.text(low)} to {metric.text(high)}){smaller}",
            tuple([*_bound(leader, chosen, metric), *lines]),
        )
    if chosen is leader:
        behind = [abs(setting.behind.value) for setting in ranked if setting.behind and setting.worse]
        others = (
            "all others are"
            if len(behind) == len(ranked) - 1
            else f"{len(behind)} of {len(ranked) - 1} others are"
        )
        least = f", the nearest by {metric.difference(min(behind))}" if behind else ""
        value = metric.text(leader.value)
        return (
            f"take {leader.label}: {metric.name} {value}; {others} shown to be worse{least}",
            tuple(lines),
        )
    return (
        f"take {chosen.label}, the cheapest that is not shown to be worse than the best ({leader.label})",
        tuple([*_bound(leader, chosen, metric), *lines]),
    )


def _values(settings: Sequence[SettingResult]) -> list[float]:
    return [setting.value for setting in settings if setting.value is not None]


def _alone(setting: SettingResult, metric: Metric) -> str:
    """The verdict on one setting with several seeds, or alone."""
    text = f"{setting.label}: {metric.name} {metric.text(setting.value)}"
    if setting.low is not None and setting.high is not None:
        text += f" [{metric.text(setting.low)}, {metric.text(setting.high)}]"
    if setting.spread is not None:
        text += f", standard deviation between {setting.seeds} seeds {metric.difference(setting.spread)}"
    return text


def _bound(leader: SettingResult, chosen: SettingResult, metric: Metric) -> list[str]:
    """How much worse the chosen setting may yet be."""
    if chosen.behind is None or (ends := chosen.behind.interval) is None:
        return []
    most = ends[1] if metric.lower_is_better else -ends[0]
    return (
        [f"{chosen.label} is worse than {leader.label} by at most {metric.difference(most)} (95 %)"]
        if most > 0
        else []
    )


def _of_key(key: KeyResult, metric: Metric) -> str:
    if key.note:
        return f"{key.key}: {key.note}"
    assert key.difference is not None and key.best is not None and key.worst is not None
    if not key.matters:
        return f"{key.key}: no difference shown"
    best, worst = key.levels[key.best][0], key.levels[key.worst][0]
    p = key.difference.p_corrected
    return (
        f"{key.key} matters: {best} is better than {worst} by {metric.difference(abs(key.difference.value))} "
        f"(p {1.0 if p is None else p:.2g}, corrected)"
    )
