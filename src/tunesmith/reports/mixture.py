"""What came of composing adapters, for the terminal and for machines."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from tunesmith.adapters.composition import ComposedLayer, UpdateOverlap
from tunesmith.display import words
from tunesmith.evaluation.interference import KeptEffect
from tunesmith.reports.measures import title, too_few
from tunesmith.runs.composed import RECORD, ComposedRun

WORST = 3
"""Layers that are printed one by one."""
EXPLAINED = (
    "overlap in, out: how far two updates read from, write to, the same subspace: 0 not at all, "
    "1 one subspace contains the other; angle: the smallest between the subspaces"
)


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
        """For people: a summary of the layers, the sources, and what was kept."""
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
    """The median over the layers, then those of which the result retains the least. All layers are in
    `ComposedRun.to_json`, which is what ``composition.json`` holds."""
    layers = sorted(made.layers, key=lambda layer: (round(layer.retained, 6), -layer.energy))
    shown = layers if len(layers) <= WORST + 1 else layers[:WORST]
    title = f"median of {len(layers)} layers"
    width = max(len(title), *(len(layer.name) for layer in shown))
    yield f"{'':{width}}  retained  overlap in  overlap out  angle  cosine"
    retained = float(np.median([layer.retained for layer in layers]))
    overlaps = [overlap for layer in layers if (overlap := _closest(layer))]
    overlap = np.median(overlaps, axis=0).tolist() if overlaps else ()
    yield f"{title:{width}}  {retained:8.2%}{_columns(overlap)}"
    for layer in shown:
        yield f"{layer.name:{width}}  {layer.retained:8.2%}{_columns(_closest(layer))}"
    if overlaps:
        yield EXPLAINED
    if len(shown) < len(layers):
        yield f"the {WORST} layers that retain the least are shown: all are in {RECORD}, and with --json"


def _closest(layer: ComposedLayer) -> tuple[float, ...]:
    """Overlap in, overlap out, angle and cosine of the two sources that have the most in common; empty if
    fewer than two adapt the layer."""
    pair = max(layer.overlaps, key=lambda overlap: overlap.inputs + overlap.outputs, default=None)
    return () if pair is None else (pair.inputs, pair.outputs, pair.angle, pair.cosine)


def _columns(overlap: Sequence[float]) -> str:
    if not overlap:
        return "           –            –      –       –"
    inputs, outputs, angle, cosine = overlap
    return f"  {inputs:10.2f}  {outputs:11.2f}  {angle:4.0f}°  {cosine:+6.2f}"


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
