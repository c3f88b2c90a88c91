"""What came of composing adapters, for the terminal and for machines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from tunesmith.adapters.composition import ComposedLayer, UpdateOverlap
from tunesmith.display import words
from tunesmith.evaluation.interference import KeptEffect
from tunesmith.reports.measures import title, too_few
from tunesmith.runs.composed import ComposedRun


@dataclass(frozen=True)
class MixtureReport:
    """``effects``: what the mixture keeps of each source; empty if it was not evaluated."""

    composed: ComposedRun
    effects: tuple[KeptEffect, ...] = ()

    def to_json(self) -> dict[str, Any]:
        content = self.composed.to_json()
        return content | ({"kept": [effect.to_json() for effect in self.effects]} if self.effects else {})

    @property
    def lines(self) -> list[str]:
        """For people: layers, sources, and what was kept."""
        made = self.composed
        sources = ", ".join(f"{source.weight:g} × {source.name}" for source in made.sources)
        method = made.recipe.method + (
            "" if made.recipe.used_density is None else f" at density {made.recipe.used_density:g}"
        )
        return [
            *_table(made),
            *_pairs(made),
            f"composed: {sources}, by {method}: rank {made.rank} holds {made.retained:.2%} of the update",
            *(line for effect in self.effects for line in _kept(effect)),
        ]


def _table(made: ComposedRun) -> Iterator[str]:
    """One line a layer."""
    width = max(len(layer.name) for layer in made.layers)
    yield f"{'layer':{width}}  retained  overlap in  overlap out  angle  cosine"
    for layer in made.layers:
        yield f"{layer.name:{width}}  {layer.retained:8.2%}{_closest(layer)}"


def _closest(layer: ComposedLayer) -> str:
    """The overlap of the two sources that have the most in common."""
    if not layer.overlaps:
        return "           –            –      –       –"
    most = max(layer.overlaps, key=lambda overlap: overlap.inputs + overlap.outputs)
    return f"  {most.inputs:10.2f}  {most.outputs:11.2f}  {most.angle:4.0f}°  {most.cosine:+6.2f}"


def _pairs(made: ComposedRun) -> Iterator[str]:
    """One line a pair of sources: means over the layers that both have."""
    for first, second in combinations(range(len(made.sources)), 2):
        shared: list[UpdateOverlap] = [
            overlap
            for layer in made.layers
            for overlap in layer.overlaps
            if (overlap.first, overlap.second) == (first, second)
        ]
        names = f"{made.sources[first].name} and {made.sources[second].name}"
        if not shared:
            yield f"{names} adapt no layer in common"
            continue
        inputs, outputs, _, cosine = np.mean([overlap[2:] for overlap in shared], axis=0)
        yield (
            f"{names}: {len(shared)} layers in common, mean overlap of subspaces {inputs:.2f} in, "
            f"{outputs:.2f} out, cosine of the updates {cosine:+.2f}"
        )


def _kept(effect: KeptEffect) -> Iterator[str]:
    alone, mixed = effect.alone, effect.mixed
    unit = mixed.unit
    text = f"{effect.source}: {title(mixed)}: base {words.number(alone.base, unit)}, "
    text += f"alone {words.number(alone.value, unit)}, mixture {words.number(mixed.value, unit)}"
    text += f" ({words.number(mixed.delta, unit, signed=True)}"
    if mixed.delta_low is not None and mixed.delta_high is not None:
        low, high = (
            words.number(end, unit, signed=True, bare=True) for end in (mixed.delta_low, mixed.delta_high)
        )
        text += f", 95 % interval {low} to {high}"
    text += f", n {mixed.n:,}): {_judged(effect)}"
    yield text
    if mixed.sources is not None:
        better, same, worse = mixed.sources
        yield f"  rows: {same + better:,} kept ({better:,} of them better), {worse:,} lost"


def _judged(effect: KeptEffect) -> str:
    shown = {"improved": "better than alone", "regressed": "lost"}
    verdict = "too few rows to judge"
    if not too_few(effect.mixed):
        verdict = shown.get(effect.mixed.verdict or "", "no loss shown")
    return verdict if effect.share is None else f"{verdict}, {effect.share:.0%} of the gain kept"
