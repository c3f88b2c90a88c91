"""Which token ids can a model read? MLX does not check an index, so an id beyond the embedding reads, or
writes, memory of something else. Every id is compared with the limits of the model before it becomes an
index; on request the embedding gets rows for the ids that it lacks."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_unflatten

from tunesmith.errors import ModelError, listing
from tunesmith.model import wrap
from tunesmith.tokens.batches import Group

Ids: TypeAlias = Sequence[int] | np.ndarray
Decode: TypeAlias = Callable[[Sequence[int]], str]
NESTED = ("text_config", "llm_config", "language_config")
"""Keys of config.json under which a model for several media keeps the settings of its text model."""
HINT = (
    "name the tokenizer that belongs to the model (model.tokenizer), or set model.resize_embeddings: true "
    "to add rows for new tokens"
)


class UnknownIds(ModelError):
    """A sequence has ids for which the model has no rows."""


class IndexLimits(NamedTuple):
    """``ids``: rows of the token embedding. ``positions``: the longest sequence, which is the rows of the
    table of learned positions; None if there is none."""

    ids: int
    positions: int | None


class ExtendedEmbedding(nn.Module):
    """A token embedding with further rows. ``base``: the embedding as it was. ``rows`` (n, D) float32: those
    of the ids from ``known`` on."""

    def __init__(self, base: nn.Module, known: int, rows: mx.array) -> None:
        super().__init__()
        self.base, self.known, self.rows = base, known, rows

    def __call__(self, ids: mx.array) -> mx.array:
        ids = ids.astype(mx.int32)  # unsigned ids of generation would wrap below
        old = self.base(mx.minimum(ids, self.known - 1))
        new = self.rows[mx.maximum(ids - self.known, 0)].astype(old.dtype)
        return mx.where((ids < self.known)[..., None], old, new)

    def as_linear(self, x: mx.array) -> mx.array:
        """(..., D) → (..., V + n) logits of a tied head."""
        old = cast(Any, self.base).as_linear(x)
        return mx.concatenate([old, (x @ self.rows.T).astype(old.dtype)], axis=-1)

    @property
    def weight(self) -> mx.array:
        """(V + n, D) for the models whose own code multiplies with it."""
        old = cast(Any, self.base).weight
        return mx.concatenate([old, self.rows.astype(old.dtype)])


class ExtendedHead(nn.Module):
    """An output projection with further outputs. ``base``: the projection as it was. ``rows`` (n, D) float32,
    and with a bias ``row_biases`` (n,)."""

    def __init__(self, base: nn.Module, rows: mx.array, row_biases: mx.array | None) -> None:
        super().__init__()
        self.base, self.rows = base, rows
        if row_biases is not None:
            self.row_biases = row_biases

    def __call__(self, x: mx.array) -> mx.array:
        old = self.base(x)
        new = x @ self.rows.T
        if "row_biases" in self:
            new = new + self.row_biases
        return mx.concatenate([old, new.astype(old.dtype)], axis=-1)


Extended = ExtendedEmbedding | ExtendedHead


def extended(net: nn.Module) -> list[ExtendedEmbedding | ExtendedHead]:
    """The modules that `resize` put into ``net``."""
    return [module for module in net.modules() if isinstance(module, Extended)]


def limits(net: nn.Module) -> IndexLimits:
    """The limits of ``net``, found once: the tables are watched during a pass whose graph is built and never
    computed. Raises ModelError if the model reads no token embedding."""
    state = vars(net)
    if "_limits" not in state:
        state["_limits"] = _limits(net)
    return state["_limits"]


def stored(folder: Path) -> int | None:
    """Rows of the token embedding according to config.json; None if it does not say. Loading compares the
    weights with it."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    if not isinstance(config, dict):
        return None
    parts = [part for key in NESTED if isinstance(part := config.get(key), dict)]
    sizes = [part.get("vocab_size") for part in (*parts, config)]
    return next((size for size in sizes if isinstance(size, int) and size > 0), None)


def require(size: int, sequences: Iterable[tuple[str, Ids]], decode: Decode | None = None) -> None:
    """Raises UnknownIds if an id of ``sequences`` (where it stands, ids) is not below ``size``. Lists each
    such id with its token if ``decode`` is given, its first place and the number of its places."""
    places: dict[int, list[str]] = {}
    for place, ids in sequences:
        array = np.asarray(ids)
        outside = array[(array < 0) | (array >= size)]
        for token in dict.fromkeys(outside.tolist()):
            places.setdefault(int(token), []).append(place)
    if not places:
        return
    problems = [_problem(token, places[token], decode) for token in sorted(places)]
    message = f"ids outside of the token embedding, which has {size:,} rows:\n{listing(problems)}"
    raise UnknownIds(message, where=next(iter(places.values()))[0] or None, hint=HINT)


def require_known(net: nn.Module, sequences: Iterable[tuple[str, Ids]], decode: Decode | None = None) -> None:
    """Raises ModelError as `require` does for the embedding of ``net``, and if a sequence is longer than the
    table of learned positions."""
    bounds, rows = limits(net), list(sequences)
    require(bounds.ids, rows, decode)
    if bounds.positions is not None:
        for place, ids in rows:
            if len(ids) > bounds.positions:
                message = f"{len(ids):,} tokens, and the model has learned positions for {bounds.positions:,}"
                hint = f"batch.length={bounds.positions} with template.too_long=drop or cut, or shorter text"
                raise ModelError(message, where=place or None, hint=hint)


def require_rows(net: nn.Module, groups: Iterable[Group]) -> None:
    """`require_known` for all sequences of ``groups``."""
    require_known(net, ((group.source, part.ids) for group in groups for part in group.sequences))


def resize(net: nn.Module, size: int) -> int:
    """Give the token embedding, and a head of its own, rows for the ids below ``size``; returns how many were
    added. Each new row is the mean of the old ones. Raises ModelError if the model cannot be resized."""
    known = limits(net).ids
    if size <= known:
        return 0
    tables = [(name, table) for name, table, kind in _watched(net) if kind == "token"]
    if len(tables) != 1:
        names = ", ".join(name for name, _ in tables) or "none"
        raise ModelError(f"one token embedding can be resized, this model reads {names}", hint="leave it out")
    name, table = tables[0]
    mean = mx.mean(cast(Any, table)(mx.arange(known)).astype(mx.float32), axis=0)
    rows = mx.repeat(mean[None], size - known, axis=0)
    net.update_modules(tree_unflatten([(name, ExtendedEmbedding(table, known, rows))]))
    if _width(net) == known:
        _extend_head(net, known, size - known)
    if _width(net) != size:
        message = f"the output of this model does not follow its embedding: {_width(net)} logits, {size} rows"
        raise ModelError(message, where="model.resize_embeddings", hint="leave it out")
    net.freeze()
    vars(net).pop("_limits", None)
    return size - known


def _problem(token: int, places: Sequence[str], decode: Decode | None) -> str:
    text = "" if decode is None else f" ({decode([token])!r})"
    more = f" and {len(places) - 1} more" if len(places) > 1 else ""
    return f"id {token}{text}{f' in {places[0]}' if places[0] else ''}{more}"


def _watched(net: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name, table, "token" or "position") for each table that a pass over three tokens of id 0 looks into.
    A table that is indexed with anything else is left out."""
    inner = {id(module.base) for module in extended(net)}
    kinds = nn.Embedding | nn.QuantizedEmbedding | ExtendedEmbedding
    tables = {
        id(module): (name, module)
        for name, module in net.named_modules()
        if isinstance(module, kinds) and id(module) not in inner
    }
    indices: dict[int, mx.array] = {}

    def call_of(kind: type[nn.Module]) -> wrap.Call:
        def call(table: nn.Module, ids: mx.array) -> mx.array:
            indices.setdefault(id(table), ids)
            return kind.__call__(table, ids)

        return call

    with wrap.replaced([module for _, module in tables.values()], call_of):
        cast(Any, net)(mx.zeros((1, 3), mx.int32))
    for key, ids in indices.items():
        values = np.array(ids).ravel().tolist()
        if values == [0, 0, 0]:
            yield *tables[key], "token"
        elif values == [0, 1, 2]:
            yield *tables[key], "position"


def _limits(net: nn.Module) -> IndexLimits:
    rows: dict[str, list[int]] = {"token": [], "position": []}
    for _, table, kind in _watched(net):
        known = (
            table.known + len(table.rows) if isinstance(table, ExtendedEmbedding) else len(table["weight"])
        )
        rows[kind].append(known)
    if not rows["token"]:
        raise ModelError("reads no token embedding", where=type(net).__module__)
    return IndexLimits(min(rows["token"]), min(rows["position"], default=None))


def _width(net: nn.Module) -> int:
    return cast(Any, net)(mx.zeros((1, 1), mx.int32)).shape[-1]


def _extend_head(net: nn.Module, known: int, n_new: int) -> None:
    """Give the one linear layer outside the blocks that has ``known`` outputs ``n_new`` more."""
    blocks = {id(module) for block in cast(Any, net).layers for module in block.modules()}
    heads = [
        (name, module)
        for name, module in net.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
        and id(module) not in blocks
        and len(module.weight) == known
    ]
    if len(heads) != 1:
        names = ", ".join(name for name, _ in heads) or "none"
        message = f"one output projection can be resized, this model has {names}"
        raise ModelError(message, where="model.resize_embeddings", hint="leave it out")
    name, head = heads[0]
    weight = head.weight
    if isinstance(head, nn.QuantizedLinear):
        packing: Any = {"group_size": head.group_size, "bits": head.bits, "mode": head.mode}
        weight = mx.dequantize(weight, head.scales, head.get("biases"), **packing)
    rows = mx.repeat(mx.mean(weight.astype(mx.float32), axis=0)[None], n_new, axis=0)
    biases = mx.full((n_new,), mx.mean(head["bias"].astype(mx.float32))) if "bias" in head else None
    net.update_modules(tree_unflatten([(name, ExtendedHead(head, rows, biases))]))
