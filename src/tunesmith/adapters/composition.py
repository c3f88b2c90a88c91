"""Several adapters as one: their updates ΔW are combined, and the result is factored again.

The factors A and B of different adapters are never combined apart: (A₁ + A₂)·(B₁ + B₂) would have the
cross-terms A₁·B₂ and A₂·B₁. A weighted sum is exact in the stacked factors, whose QR and a small singular
value decomposition give the best approximation of a lower rank (Eckart and Young 1936). TIES (arXiv
2306.01708) and DARE (arXiv 2311.03099) choose among entries, so they form ΔW, one matrix at a time.

Here ΔWᵀ is (in, out), as the factors are stored: A (in, r), B (r, out)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field

from tunesmith.adapters.attachment import Adapter
from tunesmith.adapters.layers import AdapterLayer, DoRALinear, adapted, dense
from tunesmith.adapters.specs import DEFAULT_RANK, DoRA, Full, LoRA, QALoRA
from tunesmith.errors import ConfigError, ModelError
from tunesmith.model import vocabulary
from tunesmith.settings.config import Spec

Method = Literal["linear", "svd", "ties", "dare"]
DENSITY: dict[Method, float] = {"ties": 0.2, "dare": 0.5}
"""Share of the entries of each update that is used if none is given."""
FEW, SMALL = 8, 512
"""Of a matrix wider than SMALL, not all directions are computed if 1 / FEW of them or less is wanted."""
NEGLIGIBLE = 1e-6
"""A singular value below this share of the largest is rounding: its direction means nothing."""


class Recipe(Spec):
    """How adapters are combined."""

    method: Method = Field(
        "linear",
        description="linear: weighted sum, exact at its default rank unless a layer is narrower than that; "
        "svd: the same at the largest rank of the sources; ties: large entries whose sign agrees; dare: a "
        "random part of the entries, rescaled",
    )
    rank: Annotated[int, Field(ge=1)] | None = Field(
        None, description="rank of the result; null: the sum of the sources' ranks, or the largest for others"
    )
    density: Annotated[float, Field(gt=0, le=1)] | None = Field(
        None, description="share of the entries that ties and dare use; null: 0.2 for ties, 0.5 for dare"
    )
    seed: int = Field(0, ge=0, description="decides which entries dare uses")

    @property
    def used_density(self) -> float | None:
        """None if the method uses all entries."""
        return self.density or DENSITY.get(self.method)


class Factors(NamedTuple):
    """ΔWᵀ = a·b with a (in, r) and b (r, out), which holds the scale."""

    a: np.ndarray
    b: np.ndarray


Update: TypeAlias = Factors | np.ndarray
"""ΔWᵀ of one matrix, in factors or as (in, out), in float64."""


class Directions(NamedTuple):
    """The singular value decomposition of an update: ``inputs`` (in, k), ``values`` (k,), ``outputs`` (k,
    out)."""

    inputs: np.ndarray
    values: np.ndarray
    outputs: np.ndarray


class UpdateOverlap(NamedTuple):
    """How much two sources (by their places) change the same of one layer.

    ``inputs`` and ``outputs``: mean squared cosine of the principal angles between the subspaces that the
    updates read from and write to, 1 if one contains the other. ``angle``: the smallest of these angles, in
    degrees. ``cosine``: of the two updates as vectors: −1 if they cancel."""

    first: int
    second: int
    inputs: float
    outputs: float
    angle: float
    cosine: float


class ComposedLayer(NamedTuple):
    """``energy``: squared Frobenius norm of the combined update. ``retained``: the share of it that the
    result's rank can hold."""

    name: str
    energy: float
    retained: float
    overlaps: tuple[UpdateOverlap, ...]


class Composition(NamedTuple):
    """``factors``: by layer, those of each of its matrices (one, or one an expert). ``rank``: of all of them.
    ``wanted_rank``: that of the recipe, which the narrowest layer may not allow."""

    rank: int
    wanted_rank: int
    factors: Mapping[str, list[Factors]]
    layers: tuple[ComposedLayer, ...]


def read_updates(net: nn.Module, adapter: Adapter) -> dict[str, list[Update]]:
    """By layer, the update of each of its matrices; ``net`` is as it was afterwards. Raises ModelError if the
    adapter trains more than updates of linear layers, or does not fit ``net``."""
    if isinstance(adapter.spec, Full):
        what, hint = "its weights were trained in full: there is no update of low rank", "compose LoRA runs"
        raise ModelError(what, where=adapter.source, hint=hint)
    if adapter.spec.full_modules:
        modules = ", ".join(adapter.spec.full_modules)
        what = f"modules were trained in full beside the adapter ({modules}), and cannot be composed"
        raise ModelError(what, where=adapter.source, hint="train without adapter.full_modules")
    if vocabulary.extended(net):
        what = "rows of new tokens were trained beside the adapter, and cannot be composed"
        raise ModelError(what, where=adapter.source, hint="train without model.resize_embeddings")
    handle = adapter.attach(net)
    try:
        return {name: _updates(layer) for name, layer in adapted(net).items()}
    finally:
        handle.detach()


def _updates(layer: AdapterLayer) -> list[Update]:
    updates: list[Update] = []
    for part in layer.parts():
        if isinstance(part, DoRALinear):  # the magnitudes change W itself: no update of low rank
            updates.append(_float64((part.merged_weight() - dense(part.linear)).T))
        else:
            updates.append(Factors(_float64(part.expanded_a()), part.scale * _float64(part.lora_b)))
    return updates


def _float64(value: mx.array) -> np.ndarray:
    return np.array(value.astype(mx.float32)).astype(np.float64)


def compose(
    sources: Sequence[Mapping[str, Sequence[Update]]],
    weights: Sequence[float],
    ranks: Sequence[int],
    recipe: Recipe,
) -> Composition:
    """The combination of ``sources``, each an update for each matrix of its layers, with one weight each;
    negative weights subtract. ranks: of the sources.

    Raises ConfigError if ``recipe`` has a density or a seed and its method has none."""
    if recipe.density is not None and recipe.method not in DENSITY:
        hint = f"methods with a density: {', '.join(DENSITY)}"
        raise ConfigError(f"{recipe.method} uses all entries", where="density", hint=hint)
    if recipe.seed and recipe.method != "dare":
        raise ConfigError(f"{recipe.method} draws nothing at random", where="seed", hint="--method dare")
    names = sorted({name for source in sources for name in source})
    sizes = [_size(source[name][0]) for source in sources for name in source]
    wanted_rank = recipe.rank or (sum(ranks) if recipe.method == "linear" else max(ranks))
    rank = min(wanted_rank, max(DEFAULT_RANK, min(map(min, sizes))))  # a larger one cannot be attached
    factors: dict[str, list[Factors]] = {}
    layers: list[ComposedLayer] = []
    for name in names:
        present = {place: source[name] for place, source in enumerate(sources) if name in source}
        n_matrices = len(next(iter(present.values())))
        made = [
            _matrix(
                {place: matrices[index] for place, matrices in present.items()},
                weights,
                recipe,
                rank,
                f"{name} {index}",
            )
            for index in range(n_matrices)
        ]
        factors[name] = [matrix.factors for matrix in made]
        energy = sum(matrix.energy for matrix in made)
        held = sum(matrix.held for matrix in made)
        overlaps = [
            _overlaps({place: matrices[index] for place, matrices in present.items()}, ranks)
            for index in range(n_matrices)
        ]
        retained = min(1.0, held / energy) if energy else 1.0
        layers.append(ComposedLayer(name, energy, retained, _means(overlaps)))
    return Composition(rank, wanted_rank, factors, tuple(layers))


class _Matrix(NamedTuple):
    """``energy``: of the combination; ``held``: of what ``factors`` hold of it."""

    factors: Factors
    energy: float
    held: float


def _matrix(
    updates: Mapping[int, Update], weights: Sequence[float], recipe: Recipe, rank: int, name: str
) -> _Matrix:
    """One matrix of the result. updates: by the place of their source."""
    own = [weights[place] for place in updates]
    values = list(updates.values())
    if recipe.method in ("linear", "svd"):
        total = weighted_sum(values, own)
    else:
        density = recipe.used_density or 1.0
        every = [form(update) for update in values]
        if recipe.method == "ties":
            total = ties(every, own, density)
        else:
            total = dare(every, own, density, [f"{recipe.seed} {name} {place}" for place in updates])
    inputs, singular, outputs = directions(total, rank)
    root = np.sqrt(singular)
    made = Factors(inputs * root, root[:, None] * outputs)
    return _Matrix(made, _energy(total), float(np.square(singular).sum()))


def weighted_sum(updates: Sequence[Update], weights: Sequence[float]) -> Update:
    """Σ w·ΔWᵀ: the stacked factors, or the matrix itself if one update is not in factors."""
    factored = [update for update in updates if isinstance(update, Factors)]
    if len(factored) == len(updates):
        scaled = [weight * update.b for update, weight in zip(factored, weights, strict=True)]
        return Factors(np.concatenate([update.a for update in factored], axis=1), np.concatenate(scaled))
    return sum(
        (weight * form(update) for update, weight in zip(updates, weights, strict=True)),
        start=np.zeros(_size(updates[0])),
    )


def ties(updates: Sequence[np.ndarray], weights: Sequence[float], density: float) -> np.ndarray:
    """Trim each update to its largest entries, elect the sign of each entry by the weighted sum, and take the
    mean of the weighted entries that have this sign."""
    pairs = zip(updates, weights, strict=True)
    trimmed = np.stack([weight * _largest(update, density) for update, weight in pairs])
    elected = np.sign(trimmed.sum(axis=0))
    agreeing = (np.sign(trimmed) == elected) & (trimmed != 0)
    return np.where(agreeing, trimmed, 0).sum(axis=0) / np.maximum(agreeing.sum(axis=0), 1)


def _largest(update: np.ndarray, density: float) -> np.ndarray:
    """``update`` with zeros in place of all but the largest share ``density`` of its entries."""
    n_used = max(1, int(density * update.size))
    order = np.argpartition(-np.abs(update), n_used - 1, axis=None)
    trimmed = np.zeros(update.size)
    trimmed[order[:n_used]] = update.reshape(-1)[order[:n_used]]
    return trimmed.reshape(update.shape)


def dare(
    updates: Sequence[np.ndarray], weights: Sequence[float], density: float, keys: Sequence[str]
) -> np.ndarray:
    """Use each entry with probability ``density``, divided by it, and sum with the weights. keys: what the
    choice of each update's entries is a function of."""
    total = np.zeros(updates[0].shape)
    for update, weight, key in zip(updates, weights, keys, strict=True):
        seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little")
        used = np.random.Generator(np.random.PCG64(seed)).random(update.shape) < density
        total += weight * np.where(used, update / density, 0)
    return total


def form(update: Update) -> np.ndarray:
    """(in, out)"""
    return update.a @ update.b if isinstance(update, Factors) else update


def directions(update: Update, rank: int) -> Directions:
    """The ``rank`` largest singular values of ``update``, or fewer, with their directions."""
    if not isinstance(update, Factors):
        if FEW * rank < min(update.shape) and min(update.shape) > SMALL:
            return _largest_directions(update, rank)
        inputs, values, outputs = np.linalg.svd(update, full_matrices=False)
        return Directions(inputs[:, :rank], values[:rank], outputs[:rank])
    left, left_core = np.linalg.qr(update.a)
    right, right_core = np.linalg.qr(update.b.T)
    inputs, values, outputs = np.linalg.svd(left_core @ right_core.T, full_matrices=False)
    return Directions(left @ inputs[:, :rank], values[:rank], outputs[:rank] @ right.T)


def _largest_directions(update: np.ndarray, rank: int) -> Directions:
    """By Lanczos iterations, which read the matrix some hundred times and do not decompose all of it."""
    from scipy.sparse.linalg import svds

    start = np.random.Generator(np.random.PCG64(0)).normal(size=min(update.shape))
    solved: Any = svds(update, k=rank, v0=start)
    inputs, values, outputs = solved
    order = np.argsort(-values)
    return Directions(inputs[:, order], values[order], outputs[order])


def _energy(update: Update) -> float:
    """The squared Frobenius norm."""
    if isinstance(update, Factors):
        return float(np.square(directions(update, update.a.shape[1]).values).sum())
    return float(np.square(update).sum())


def _size(update: Update) -> tuple[int, int]:
    """(in, out)"""
    return (len(update.a), update.b.shape[1]) if isinstance(update, Factors) else update.shape


def _overlaps(updates: Mapping[int, Update], ranks: Sequence[int]) -> list[UpdateOverlap]:
    """Of each pair of sources, in the directions that each source's own rank can hold."""
    spans: dict[int, Directions] = {}
    for place, update in updates.items():
        inputs, values, outputs = directions(update, ranks[place])
        n_held = int((values > NEGLIGIBLE * values.max(initial=0)).sum())
        spans[place] = Directions(inputs[:, :n_held], values[:n_held], outputs[:n_held])
    return [_overlap(first, second, spans) for first, second in combinations(sorted(spans), 2)]


def _overlap(first: int, second: int, spans: Mapping[int, Directions]) -> UpdateOverlap:
    one, other = spans[first], spans[second]
    if not len(one.values) or not len(other.values):  # an update of zeros
        return UpdateOverlap(first, second, 0.0, 0.0, 90.0, 0.0)
    across_inputs, across_outputs = one.inputs.T @ other.inputs, one.outputs @ other.outputs.T
    of_inputs, of_outputs = (
        np.clip(np.linalg.svd(product, compute_uv=False), 0, 1) for product in (across_inputs, across_outputs)
    )
    angle = np.degrees(np.arccos(max(of_inputs[0], of_outputs[0])))
    inner = one.values @ (across_inputs * across_outputs) @ other.values
    norms = np.linalg.norm(one.values) * np.linalg.norm(other.values)
    return UpdateOverlap(
        first,
        second,
        float(np.square(of_inputs).mean()),
        float(np.square(of_outputs).mean()),
        float(angle),
        float(inner / norms),
    )


def _means(overlaps: Sequence[Sequence[UpdateOverlap]]) -> tuple[UpdateOverlap, ...]:
    """Over the matrices of a layer; of the angles the smallest."""
    means: list[UpdateOverlap] = []
    for pair in zip(*overlaps, strict=True):
        values = np.array([overlap[2:] for overlap in pair])
        inputs, outputs, _, cosine = values.mean(axis=0).tolist()
        means.append(
            UpdateOverlap(pair[0].first, pair[0].second, inputs, outputs, float(values[:, 2].min()), cosine)
        )
    return tuple(means)


def install(net: nn.Module, spec: LoRA, composition: Composition) -> None:
    """Put the result into ``net`` as an adapter that can be saved. ``spec``: as `spec_of` gives it.

    Directions that a layer does not need keep the values of a new adapter, so that they can be trained."""
    spec.attach(net, seed=0, recorded=tuple(composition.factors))
    for name, layer in adapted(net).items():
        a, b = np.array(layer.lora_a), np.array(layer.lora_b)
        for index, factors in enumerate(composition.factors[name]):
            used = len(factors.b)
            if a.ndim == 3:  # experts hold the factors turned
                a[index, :used], b[index, :, :used] = factors.a.T, factors.b.T
            else:
                a[:, :used], b[:used] = factors.a, factors.b
        layer.lora_a, layer.lora_b = mx.array(a), mx.array(b)
    mx.eval(net.parameters())


def spec_of(composition: Composition, sources: Sequence[LoRA | DoRA | QALoRA]) -> LoRA:
    """The settings of the result: the targets of the sources if they share them, else its layers by name;
    scale 1."""
    shared = {(spec.targets, spec.layers) for spec in sources}
    targets, layers = next(iter(shared)) if len(shared) == 1 else (tuple(composition.factors), None)
    settings = {"rank": composition.rank, "alpha": float(composition.rank), "targets": targets}
    return LoRA.model_validate({**settings, "layers": layers})
