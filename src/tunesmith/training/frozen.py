"""Hidden states of the frozen layers below the adapter: computed once for each row, cached on disk, and read
in later epochs.

If only the upper layers are adapted, the lower ones give the same hidden states for a row in every epoch.
Files are named by the hash of the row's tokens and lie in the run directory, whose base cannot change
(`manifest.require_same`); they are removed when the run is complete."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import tempfile
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from tunesmith.errors import ConfigError, DiskFull
from tunesmith.events import Notice, Sink
from tunesmith.files import draft
from tunesmith.model import abilities, bodies, logprobs, wrap
from tunesmith.runs.config import RunConfig
from tunesmith.tokens.batches import Batch, Group

KEY = "loop.cache_frozen"
LAST_NORMS = ("norm", "norm_f", "ln_f", "final_norm", "final_layernorm", "embedding_norm")
"""What bodies call the norm after their last block."""


def depth(net: nn.Module) -> int:
    """Number of layers below the lowest with a trainable tensor; 0 if the embedding is trained."""
    layers: Any = net.layers
    trained = [index for index, layer in enumerate(layers) if tree_flatten(layer.trainable_parameters())]
    return 0 if not trained or _trains_what_feeds_blocks(net) else trained[0]


def _trains_what_feeds_blocks(net: nn.Module) -> bool:
    """Whether the body has a trainable tensor outside its blocks and its last norm: an embedding, or what is
    computed of it."""
    try:
        body = bodies.body(net)
    except KeyError:
        return True
    outside = {name: child for name, child in body.children().items() if not isinstance(child, list)}
    return any(
        tree_flatten(child.trainable_parameters())
        for name, child in outside.items()
        if isinstance(child, nn.Module) and name not in LAST_NORMS
    )


def saving(net: nn.Module, epochs: float, recomputed: bool) -> float:
    """Share of the layers' work that caching would save, if a layer's backward pass costs as much as its
    forward pass."""
    layers: Any = net.layers
    below, above = depth(net), len(layers) - depth(net)
    return below * max(0.0, 1 - 1 / epochs) / (below + above * (3 if recomputed else 2))


def opened(net: nn.Module, groups: Sequence[Group], folder: Path | None, notify: Sink) -> Lower:
    """The layers below the adapter of ``net``, with their cache for ``groups`` under ``folder``, or under a
    temporary folder that is removed with the result. Raises DiskFull."""
    lower = Lower(net, folder or Path(tempfile.mkdtemp(prefix="tunesmith-")))
    if folder is None:
        weakref.finalize(lower, shutil.rmtree, lower.folder, ignore_errors=True)
    size = lower.open(groups)
    layers = f"{lower.depth} layers below the adapter"
    notify(Notice(f"the hidden states of the {layers} are cached on disk: {size / 1e9:.2f} GB"))
    return lower


def shared(net: nn.Module, groups: Sequence[Group], config: RunConfig) -> Lower | None:
    """The layers below the adapter of ``net``, which need to be computed once where it is compared with its
    base; None if no group is distilled, or if they cannot be shared."""
    distilled = [group for group in groups if group.distilled]
    if not distilled or config.batch.pack or depth(net) == 0:
        return None
    lower = Lower(net)
    return lower if lower.serves(distilled) else None


class Lower:
    """The lowest ``depth`` layers of ``net``, with their cached hidden states of each row under ``folder``
    (which only a cache needs)."""

    def __init__(self, net: nn.Module, folder: Path = Path()) -> None:
        self.net, self.folder, self.depth = net, folder, depth(net)
        self.read = self.computed = 0
        layers: Any = net.layers
        self._lower: list[nn.Module] = list(layers[: self.depth])
        self._extra: int | None = None  # outputs of a layer beside the hidden states, once known

    def open(self, groups: Sequence[Group]) -> int:
        """Make the folder; returns the bytes that all rows will take. Raises DiskFull."""
        needed = self.needed(groups)
        self.folder.mkdir(exist_ok=True)
        for unfinished in self.folder.glob(".*"):  # drafts of a process that was killed
            unfinished.unlink()
        present = sum(file.stat().st_size for file in self.folder.iterdir())
        if shutil.disk_usage(self.folder).free < needed - present:
            raise DiskFull(
                f"{KEY} needs {needed / 1e9:.1f} GB",
                where=str(self.folder),
                hint="make room, or leave it out",
            )
        return needed

    def needed(self, groups: Sequence[Group]) -> int:
        """Bytes that the rows will take."""
        return sum(group.tokens for group in groups) * self.below(mx.zeros((1, 1), mx.int32)).nbytes

    def require(self, groups: Sequence[Group]) -> None:
        """Raises ConfigError if no layer is below the adapter, or the model cannot start at a layer in the
        middle (`serves`)."""
        if self.depth == 0:
            raise ConfigError(
                "no layer lies below the adapter", where=KEY, hint="set adapter.layers, or leave it out"
            )
        if not self.serves(groups):
            name = type(self.net).__module__.rsplit(".", 1)[-1]
            message = f"{name} models cannot start at a layer in the middle"
            raise ConfigError(message, where=KEY, hint="leave it out")

    def serves(self, groups: Sequence[Group]) -> bool:
        """Whether the model can start at a layer in the middle. Tried on the longest row, since layers with a
        window differ only there."""
        longest = max((row for group in groups for row in group.sequences), key=lambda row: len(row.ids))
        ids = mx.array(longest.ids)[None]

        def split_and_whole() -> tuple[mx.array, mx.array]:
            with self.above(self.below(ids)):
                upper = logprobs.features(self.net, ids)
            return upper, logprobs.features(self.net, ids)

        return abilities.agree(self.net, split_and_whole)

    def close(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)

    def states(self, groups: Sequence[Group], batch: Batch) -> mx.array:
        """(N, T, D) for the tokens of ``batch``, which was made from ``groups``."""
        rows = [self._of(sequence.ids[:-1]) for group in groups for sequence in group.sequences]
        if batch.ends is not None:
            return mx.concatenate([row for row in rows if row.shape[1]], axis=1)
        width = batch.tokens.shape[1]
        return mx.concatenate([mx.pad(row, [(0, 0), (0, width - row.shape[1]), (0, 0)]) for row in rows])

    @contextmanager
    def above(self, states: mx.array) -> Iterator[None]:
        """Inside, ``net`` computes its upper layers only, of ``states`` (N, T, D). The lower ones keep their
        places, since architectures choose masks by a layer's number; what comes before them is not evaluated,
        since nothing depends on it."""
        if self._extra is None:
            self.below(mx.zeros((1, 1), mx.int32))
        with wrap.replaced(self._lower, _passing(states, self._extra or 0)):
            yield

    def _of(self, ids: np.ndarray) -> mx.array:
        """(1, T, D)"""
        if len(ids) == 0:
            return self.below(mx.zeros((1, 1), mx.int32))[:, :0]
        name = hashlib.sha256(ids.astype("<i4").tobytes()).hexdigest()[:32]
        path = self.folder / f"{name}.safetensors"
        if path.exists():
            with contextlib.suppress(RuntimeError):  # damaged by a power cut: computed again
                cached: Any = mx.load(str(path))
                mx.eval(cached)  # read now: with a short file MLX would fail only in the step
                self.read += 1
                return cached["states"]
        self.computed += 1
        states = self.below(mx.array(ids)[None])
        mx.eval(states)
        try:
            with draft(path) as temporary:
                mx.save_safetensors(str(temporary), {"states": states})
        except (RuntimeError, OSError) as error:
            raise DiskFull(
                f"{KEY}: cannot be written: {error}", where=str(path), hint="make room, or leave it out"
            ) from error
        return states

    def below(self, ids: mx.array) -> mx.array:
        """(N, T) → (N, T, D): what the lower layers make of ``ids``."""
        try:
            with wrap.replaced(self._lower[-1:], _stopping):
                logprobs.features(self.net, ids)
        except _Stopped as stopped:
            states, *extra = stopped.output if isinstance(stopped.output, tuple) else (stopped.output,)
            self._extra = len(extra)
            return states
        raise TypeError(f"{type(self.net).__name__} does not call its layers in order")


class _Stopped(Exception):
    """The pass has reached the last layer that is wanted."""

    def __init__(self, output: Any) -> None:
        self.output = output


def _stopping(kind: type[nn.Module]) -> wrap.Call:
    def call(self: nn.Module, *args: Any, **options: Any) -> Any:
        raise _Stopped(kind.__call__(self, *args, **options))

    return call


def _passing(states: mx.array, extra: int) -> Callable[[type[nn.Module]], wrap.Call]:
    """Layers that return ``states``, with ``extra`` further outputs that are None."""

    def call(self: nn.Module, *args: Any, **options: Any) -> Any:
        return (states, *[None] * extra) if extra else states

    return lambda kind: call
