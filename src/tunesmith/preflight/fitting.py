"""Which changes make a run fit a limit of memory or time? The cheapest first: micro-batch, tokens, recomputed
layers, 8 then 4 bits, and length, which alone changes what is learned."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from tunesmith.display.console import duration, size
from tunesmith.errors import ConfigError, TunesmithError
from tunesmith.runs.config import RunConfig
from tunesmith.runs.forecasts import Forecast
from tunesmith.training import preparation
from tunesmith.training.forecast import Needs, Outline

SIZES = {"kb": 1e3, "mb": 1e6, "gb": 1e9, "tb": 1e12, "kib": 2**10, "mib": 2**20, "gib": 2**30}
TIMES = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}
LEAST_LENGTH = 128
"""Rows are not cut shorter than this."""
PERCENTILES = (99, 95, 90, 75, 50)
"""Of the lengths of the rows: lengths at which so many percent of them stay whole, in steps of `ROUNDED`."""
ROUNDED = 64
WORTH = 0.99
"""A change is proposed if it leaves at most this share."""


class RunLimits(NamedTuple):
    """``memory`` of the whole process in bytes and ``time_s`` in seconds, or None if there is none."""

    memory: float | None
    time_s: float | None

    def met(self, forecast: Forecast) -> bool:
        """By the high end of the interval of memory, and by the expected time."""
        return self.fits(forecast) and (self.time_s is None or forecast.total_s.value <= self.time_s)

    def fits(self, forecast: Forecast) -> bool:
        return self.memory is None or forecast.needed.high <= self.memory

    def text(self) -> str:
        """The limits in words."""
        memory = [] if self.memory is None else [f"{size(self.memory)} for the whole process"]
        return " and ".join(memory + ([] if self.time_s is None else [duration(self.time_s)]))


def limits(fit: str | None, fit_time: str | None) -> RunLimits | None:
    """Raises ConfigError for a text that is not a number with a unit."""
    if fit is None and fit_time is None:
        return None
    return RunLimits(
        None if fit is None else _number(fit, SIZES, "--fit", "16GB"),
        None if fit_time is None else _number(fit_time, TIMES, "--fit-time", "8h"),
    )


def _number(text: str, units: Mapping[str, float], option: str, example: str) -> float:
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([a-z]+)\s*", text.lower())
    if match is None or match[2] not in units or float(match[1]) <= 0:
        known = ", ".join(units)
        raise ConfigError(f"{text!r} is not a number with one of {known}", where=option, hint=f"as {example}")
    return float(match[1]) * units[match[2]]


@dataclass(frozen=True)
class Proposal:
    """``sets``: changes of settings, as for ``--set``. ``forecast``: with them. ``met``: whether ``limits``
    are."""

    sets: tuple[str, ...]
    forecast: Forecast
    met: bool
    limits: RunLimits

    def to_json(self) -> dict[str, object]:
        return {"sets": list(self.sets), "met": self.met, "forecast": asdict(self.forecast)}


def propose(needs: Needs, limits: RunLimits, rate: float) -> Proposal:
    """The first changes with which ``limits`` are met, or all that help if they are not. rate: as of
    `Needs.forecast`; one for all, so that two forecasts differ by their settings alone."""
    forecast, sets = needs.forecast(rate), {}
    for saves_memory in (True, False):
        for changes in _changes(needs, limits, rate, saves_memory):
            if limits.met(forecast) or (saves_memory and limits.fits(forecast)):
                break
            changed = _changed(needs, changes)
            if changed is None:
                continue
            after = changed.forecast(rate)
            if not _helps(forecast, after, limits, saves_memory):
                continue
            needs, forecast, sets = changed, after, sets | changes
    texts = tuple(f"{key}={str(value).lower()}" for key, value in sets.items())
    return Proposal(texts, forecast, limits.met(forecast), limits)


def _helps(before: Forecast, after: Forecast, limits: RunLimits, saves_memory: bool) -> bool:
    if saves_memory:
        return after.peak.value < WORTH * before.peak.value
    most = limits.memory or after.ceiling
    return after.total_s.value < WORTH * before.total_s.value and after.needed.high <= most


def _changes(needs: Needs, limits: RunLimits, rate: float, saves_memory: bool) -> Iterator[dict[str, Any]]:
    """Changes in the order of what they cost. Each is of the settings as they were when the search began."""
    config, plan = needs.config, needs.prepared.plan
    longest = max(plan.lengths) * plan.cut.each
    if saves_memory:
        rows = config.batch.micro or config.batch.sequences
        yield from ({"batch.micro": count} for count in _halves(rows, 1))
        yield from ({"batch.tokens": tokens} for tokens in _halves(plan.cut.tokens, longest))
        if not config.loop.checkpoint_gradients:
            yield {"loop.checkpoint_gradients": True}
        if config.adapter.kind != "full":
            yield from ({"model.quantize": bits} for bits in (8, 4))
    elif config.loop.checkpoint_gradients:
        yield {"loop.checkpoint_gradients": False}
    if not saves_memory:
        yield from ({"batch.tokens": plan.cut.tokens * 2**power} for power in (1, 2, 3))
    shortened = {"template.too_long": "cut"}
    yield from (
        {"batch.length": length, **shortened} for length in _lengths(plan.lengths, config.batch.length)
    )
    if not saves_memory and limits.time_s is not None:
        share = limits.time_s / max(needs.forecast(rate).total_s.value, 1e-9)
        yield from (
            {"loop.steps": steps}
            for steps in (max(1, int(plan.steps * share * left)) for left in (1.0, 0.8, 0.6, 0.4))
            if steps < plan.steps
        )


def _lengths(rows: Sequence[int], most: int) -> list[int]:
    """Lengths below those of ``rows`` and below ``most``, the longest first: percentiles, and halves of the
    longest row. Halves alone may leave out more rows than ``data.max_dropped`` allows where a percentile
    leaves out none."""
    longest = min(most, max(rows) + 1)  # the last token of a row is not counted
    quantiles = np.percentile(rows, PERCENTILES, method="higher") + 1
    lengths = {-(-int(length) // ROUNDED) * ROUNDED for length in quantiles} | set(
        _halves(longest, LEAST_LENGTH)
    )
    return sorted((length for length in lengths if LEAST_LENGTH <= length < longest), reverse=True)


def _halves(value: int, least: int) -> Iterator[int]:
    while value > least:
        value = max(least, value // 2)
        yield value


def _changed(needs: Needs, changes: Mapping[str, Any]) -> Needs | None:
    """``needs`` with ``changes``, or None if the settings or the model do not allow them."""
    try:
        config = _with(needs.config, changes)
        prepared = needs.prepared
        if "batch.length" in changes:
            prepared = preparation.prepare(config, audited=True)
        else:
            prepared = preparation.replanned(prepared, config)
        if "model.quantize" in changes:
            fresh = Outline.of(config).needs(prepared)
        else:
            fresh = needs.replanned(config, prepared)
    except (TunesmithError, ValueError):
        return None
    return replace(fresh, calibration=needs.calibration)


def _with(config: RunConfig, changes: Mapping[str, Any]) -> RunConfig:
    """Raises pydantic's ValueError if the settings do not go together."""
    tree = config.model_dump(mode="json")
    for key, value in changes.items():
        section, name = key.split(".")
        tree[section][name] = value
    return RunConfig.model_validate(tree)
