"""Several adapters side by side on one base, chosen for each row of a batch.

The base's product is computed once for all rows. The low-rank updates of a mixed batch are gathered by row
(`mx.gather_mm`), so that a pass takes the same number of operations however many adapters take part; ranks
are padded with zeros to the largest. A layer of routed experts does not see which row a token is from, so the
mixture that it belongs to tells it. For inference: nothing here is trained, and dropout is off. Adapters that
replace whole modules cannot be routed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from tunesmith.adapters.attachment import Adapter, Handle
from tunesmith.adapters.experts import LoRAExperts, is_experts, is_mixture, routed_product, with_bias
from tunesmith.adapters.layers import AdapterLayer, DoRALinear, Linear, LoRALinear, adapted, dims, product
from tunesmith.adapters.specs import Full
from tunesmith.errors import ModelError
from tunesmith.model import vocabulary, wrap

BASE = 0
"""The place of the base without an adapter in every stack."""
RESELECT = "call select() with one name for each row of the next pass"


class Selection:
    """``places``: the adapter of every row, by its place in the stacks; one for all rows, or (B,) int32.
    ``present``: the places of a mixed batch, each once. ``by_choice``: in the pass through a mixture of
    experts, the place of each choice of an expert, as `_by_choice` gives it."""

    def __init__(self) -> None:
        self.places: int | mx.array = BASE
        self.present: tuple[int, ...] = (BASE,)
        self.by_choice = mx.array(BASE), mx.array(BASE)


class RoutedLinear(nn.Module):
    """A frozen linear layer with the updates of several adapters, one of which applies to each row.

    ``updates``: by place; None if that adapter leaves this layer alone."""

    def __init__(self, linear: Linear, updates: Sequence[LoRALinear | None], selection: Selection) -> None:
        super().__init__()
        self.linear = linear
        self._selection = selection
        inputs, outputs = dims(linear)
        rank = max(update.lora_a.shape[1] for update in updates if update is not None)
        idle = mx.zeros((inputs, rank)), mx.zeros((rank, outputs)), 0.0
        stacks = [idle if update is None else _padded(update, rank) for update in updates]
        self._a = mx.stack([a for a, _, _ in stacks])  # (n, in, r)
        self._b = mx.stack([b for _, b, _ in stacks])  # (n, r, out)
        self._scale = mx.array([scale for _, _, scale in stacks])  # (n,)
        self._idle = [update is None for update in updates]
        self._factor: mx.array | None = None
        if any(isinstance(update, DoRALinear) for update in updates):
            ones = mx.ones(outputs)
            self._factor = mx.stack(
                [
                    update.m / update.lengths() if isinstance(update, DoRALinear) else ones
                    for update in updates
                ]
            )  # (n, out)
        mx.eval(self._a, self._b, self._scale, self._factor)
        self.train(linear.training)

    def __call__(self, x: mx.array) -> mx.array:
        """(B, ..., in) → (B, ..., out) in the dtype of the frozen layer's output. Raises ModelError if the
        adapters were chosen for another number of rows."""
        places = self._selection.places
        if isinstance(places, int):
            if self._idle[places]:
                return self.linear(x)
            branch = ((x @ self._a[places]) * self._scale[places]) @ self._b[places]
            factor = None if self._factor is None else self._factor[places]
        else:
            if len(x) != len(places):
                message = f"a pass of {len(x)} rows, but adapters are chosen for {len(places)}"
                raise ModelError(message, hint=RESELECT)
            rows = x.reshape(len(x), -1, x.shape[-1])
            inner = mx.gather_mm(rows.astype(mx.float32), self._a, rhs_indices=places)
            inner = inner * self._scale[places][:, None, None]
            branch = mx.gather_mm(inner, self._b, rhs_indices=places).reshape(*x.shape[:-1], -1)
            factor = None
            if self._factor is not None:
                factor = self._factor[places].reshape(len(x), *[1] * (x.ndim - 2), -1)
        if factor is None:
            y = self.linear(x)
            return y + branch.astype(y.dtype)
        y = product(self.linear, x)
        out = (factor * (y.astype(mx.float32) + branch)).astype(y.dtype)
        return out + self.linear.bias if "bias" in self.linear else out


class RoutedExperts(nn.Module):
    """A frozen layer of experts with the updates of several adapters, one of which applies to each row.

    ``updates``: by place; None if that adapter leaves this layer alone. The branches of all adapters of a
    mixed batch are computed for all tokens, and each token takes its own."""

    _updates: list[LoRAExperts | None]

    def __init__(
        self, linear: nn.Module, updates: Sequence[LoRAExperts | None], selection: Selection
    ) -> None:
        super().__init__()
        self.linear = linear
        self._selection = selection
        # Past nn.Module's own __setattr__: each update holds the frozen layer again.
        object.__setattr__(
            self, "_updates", [update if update is None else update.eval() for update in updates]
        )
        self.train(linear.training)

    def __call__(self, x: mx.array, indices: mx.array, sorted_indices: bool = False) -> mx.array:
        """(..., 1, in), (...) → (..., 1, out)"""
        places = self._selection.places
        if isinstance(places, int):
            update = self._updates[places]
            layer: Any = self.linear if update is None else update
            return layer(x, indices, sorted_indices=sorted_indices)
        unsorted_places, sorted_places = self._selection.by_choice
        by_entry = (sorted_places if sorted_indices else unsorted_places)[..., None, None]
        y = out = routed_product(self.linear, x, indices, sorted_indices)
        for place in self._selection.present:
            if (update := self._updates[place]) is not None:
                out = mx.where(by_entry == place, update.updated(y, x, indices, sorted_indices), out)
        return with_bias(self.linear, out, indices)


def _telling_rows(selection: Selection) -> Callable[[type[nn.Module]], wrap.Call]:
    """Let a mixture of experts tell `RoutedExperts` which adapter each choice of an expert belongs to."""

    def call_of(kind: type[nn.Module]) -> wrap.Call:
        def call(mixture: nn.Module, x: mx.array, indices: mx.array) -> mx.array:
            if not isinstance(selection.places, int):
                selection.by_choice = _by_choice(selection.places, indices)
            return kind.__call__(mixture, x, indices)

        return call

    return call_of


def _by_choice(places: mx.array, indices: mx.array) -> tuple[mx.array, mx.array]:
    """(B,), (B, T, k) or (B · T, k) → the place of each choice in the shape of ``indices``, and (B · T · k,)
    in the order in which mlx-lm sorts many choices by expert. Raises ModelError if the tokens are not those
    of so many rows."""
    n_of_a_row, rest = divmod(indices.size, len(places))
    if rest or n_of_a_row % indices.shape[-1]:
        raise ModelError(f"a pass of {indices.size} choices of experts for {len(places)} rows", hint=RESELECT)
    flat = mx.repeat(places, n_of_a_row)
    return flat.reshape(indices.shape), flat[mx.argsort(indices.flatten())]


def _padded(update: LoRALinear, rank: int) -> tuple[mx.array, mx.array, float]:
    missing = rank - update.lora_a.shape[1]
    a = mx.pad(update.expanded_a(), [(0, 0), (0, missing)])
    return a, mx.pad(update.factors[1], [(0, missing), (0, 0)]), update.scale


class Routing:
    """Adapters on ``net``, by name. Until `select` is called, every row uses the base only."""

    def __init__(self, net: nn.Module, adapters: Mapping[str, Adapter]) -> None:
        """Attach the adapters. Raises ModelError and leaves ``net`` as it was if one of them replaces whole
        modules or does not fit."""
        self._net, self._adapters = net, adapters
        self._attach(adapters)

    def change(self, adapters: Mapping[str, Adapter]) -> None:
        """Put ``adapters`` in the place of those that are attached, and select the base. Raises as `Routing`
        does, and leaves the adapters that were attached; the base alone if those cannot be attached again."""
        self.detach()
        try:
            self._attach(adapters)
        except BaseException:
            self._attach(self._adapters)
            raise
        self._adapters = adapters

    def _attach(self, adapters: Mapping[str, Adapter]) -> None:
        self._handle = Handle(self._net)
        self._places: dict[str | None, int] = {None: BASE}
        self._selection, self._one_for_all = Selection(), False
        try:
            self._replace_layers(adapters)
        except BaseException:
            self._handle.detach()
            raise
        self._places |= {name: place for place, name in enumerate(adapters, start=1)}

    def _replace_layers(self, adapters: Mapping[str, Adapter]) -> None:
        net = self._net
        layers = {name: _layers(net, name, adapter) for name, adapter in adapters.items()}
        modules: dict[str, Any] = dict(net.named_modules())
        mixtures: dict[str, nn.Module] = {}
        for target in sorted({target for by_target in layers.values() for target in by_target}):
            updates: Any = [None, *(by_target.get(target) for by_target in layers.values())]
            kind: Any = RoutedLinear
            if is_experts(modules[target]):
                kind, parent = RoutedExperts, target.rpartition(".")[0]
                mixtures[parent] = modules[parent]
            routed_layer = kind(modules[target], updates, self._selection)
            net.update_modules(tree_unflatten([(target, routed_layer)]))
        self._one_for_all = not all(is_mixture(mixture) for mixture in mixtures.values())
        if not self._one_for_all:
            wrap.replace(mixtures.values(), _telling_rows(self._selection))

    def select(self, names: str | Sequence[str | None] | None) -> None:
        """Choose for all later passes: one adapter, or None for the base alone, for all rows; or one for each
        row in the order of the batch. Raises ModelError for an unknown name, and for rows that differ if an
        adapter changes experts outside of mlx-lm's own mixtures."""
        by_row = [names] if names is None or isinstance(names, str) else list(names)
        self.require(by_row)
        places = [self._places[name] for name in by_row]
        self.require_one_pass(by_row)
        self._selection.present = tuple(sorted(set(places)))
        self._selection.places = places[0] if len(set(places)) == 1 else mx.array(places, dtype=mx.int32)

    def require(self, names: Sequence[str | None]) -> None:
        """Raises ModelError for a name that is not here; selects nothing."""
        if unknown := sorted({str(name) for name in names if name not in self._places}):
            known = ", ".join(repr(name) for name in self._places if name is not None) or "none"
            raise ModelError(f"there is no adapter {unknown[0]!r}", hint=f"there are: {known}")

    def require_one_pass(self, names: Iterable[str | None]) -> None:
        """Raises ModelError if rows with these adapters cannot share a pass."""
        if self._one_for_all and len(set(names)) > 1:
            message = "in this model, rows of one pass cannot have different adapters on routed experts"
            raise ModelError(message, hint="ask for one adapter at a time")

    def detach(self) -> None:
        """Restore the net exactly."""
        self._handle.detach()


@contextmanager
def routed(net: nn.Module, adapters: Mapping[str, Adapter]) -> Iterator[Routing]:
    """Inside, ``net`` has ``adapters``; afterwards it is exactly what it was. Raises as `Routing` does."""
    routing = Routing(net, adapters)
    try:
        yield routing
    finally:
        routing.detach()


def _layers(net: nn.Module, name: str, adapter: Adapter) -> dict[str, AdapterLayer]:
    """The layers of ``adapter`` by the name of what they adapt; ``net`` is as it was afterwards."""
    if isinstance(adapter.spec, Full) or adapter.spec.full_modules:
        message = f"adapter {name!r} trains whole modules, which the rows of a batch share"
        raise ModelError(
            message, where=adapter.source, hint="attach it alone, or merge it into a base of its own"
        )
    if vocabulary.extended(net):
        message = f"adapter {name!r} trains rows of new tokens, which the rows of a batch share"
        raise ModelError(message, where=adapter.source, hint="attach it alone")
    handle = adapter.attach(net)
    layers = adapted(net)
    handle.detach()
    return layers
