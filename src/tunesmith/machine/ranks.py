"""Data-parallel ranks: which one this process is, and sums over all of them.

Ranks are started with ``mlx.launch -n 2 -- tunesmith train …`` (rings of processes or of machines, MPI, JACCL
between Macs, NCCL on CUDA). Each rank holds the whole model and takes its share of the rows of an update.
Loss, units and gradients are summed over the ranks once an update. A single process is one rank.
"""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from tunesmith.errors import RankLost, SetupError, TrainingError
from tunesmith.events import Notice, Sink, silent

PATIENCE_S = 5.0
"""A rank that has waited this long for the others reports it."""

_LAUNCHED = {"MLX_RANK", "OMPI_COMM_WORLD_RANK"}
"""Variables that `mlx.launch` and Open MPI set for each process; without them there are no other ranks."""


@dataclass(frozen=True)
class Ranks:
    """``rank`` of ``size``; only rank 0 writes files."""

    group: Any
    rank: int
    size: int

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def total(self, tree: Any) -> Any:
        """``tree`` of float32 arrays, each leaf summed over the ranks, in one message. Raises RankLost."""
        if self.size == 1:
            return tree
        flat: Any = tree_flatten(tree)
        message = mx.concatenate([leaf.astype(mx.float32).reshape(-1) for _, leaf in flat])
        mx.eval(message)  # outside of the try: an error here is not another rank's
        try:
            message = mx.distributed.all_sum(message, group=self.group)
            mx.eval(message)
        except RuntimeError as error:
            raise RankLost(
                f"another rank is gone: {error}",
                where=f"rank {self.rank} of {self.size}",
                hint="start all ranks again with --resume, or any other number of them; checkpoints are kept",
            ) from error
        parts = mx.split(message, np.cumsum([leaf.size for _, leaf in flat])[:-1].tolist())
        return tree_unflatten(
            [(name, part.reshape(leaf.shape)) for (name, leaf), part in zip(flat, parts, strict=True)]
        )

    def total_float(self, values: np.ndarray) -> np.ndarray:
        """float64 ``values`` summed over the ranks. Each is sent as three float32 parts, which hold all its
        digits."""
        if self.size == 1:
            return values
        parts, rest = [], values
        for _ in range(3):
            parts.append(rest.astype(np.float32))
            rest = rest - parts[-1]
        summed = self.total([mx.array(np.stack(parts))])[0]
        return np.array(summed, dtype=np.float64).sum(axis=0)

    def from_first(self, text: str) -> str:
        """The first rank's ``text``, on every rank."""
        if self.size == 1:
            return text
        own = np.frombuffer(text.encode() if self.rank == 0 else b"", np.uint8).astype(np.float64)
        message = np.zeros(int(self.total_float(np.array([float(own.size)]))[0]))
        message[: own.size] = own
        return self.total_float(message).astype(np.uint8).tobytes().decode() if message.size else ""

    def require_agreement(self, *facts: object) -> None:
        """Raises TrainingError if the ranks do not start from the same ``facts``."""
        digest = np.frombuffer(hashlib.sha256(repr(facts).encode()).digest(), np.uint8).astype(np.float64)
        if (self.total_float(digest) != digest * self.size).any():
            raise TrainingError(
                "the ranks do not start from the same settings, data, weights and checkpoint",
                where=f"rank {self.rank} of {self.size}",
                hint="give every machine the same files, and the same command",
            )


ONE = Ranks(None, 0, 1)


def join(notify: Sink = silent) -> Ranks:
    """This process's rank among those that `mlx.launch` started, or `ONE`. Waits for the others, and reports
    it."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if not os.environ.keys() & _LAUNCHED or (
        hosts is not None and os.path.isfile(hosts) and not os.path.getsize(hosts)
    ):
        return ONE  # the host file of a single process is empty
    named = " and ".join(sorted(os.environ.keys() & {"MLX_HOSTFILE", *_LAUNCHED}))
    if hosts is not None and not os.path.isfile(hosts):
        raise SetupError(
            "MLX_HOSTFILE does not name a file",
            where=hosts,
            hint=f"give the file of addresses, or unset {named}",
        )
    rank = os.environ.get("MLX_RANK", "?")
    text = f"rank {rank} still waits for the others"
    how = "start each of them, with the same addresses and its own rank"
    waiting = threading.Timer(PATIENCE_S, lambda: notify(Notice(text, "warning", where=hosts, hint=how)))
    waiting.daemon = True
    waiting.start()
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        hint = f"check the addresses in {hosts} and MLX_RANK, or start it with mlx.launch, or unset {named}"
        raise SetupError(
            f"this process was started as one of several and cannot reach the others: {error}", hint=hint
        ) from error
    finally:
        waiting.cancel()
    if group.rank() == 0:
        notify(Notice(f"{group.size()} ranks share the rows of every update"))
    return Ranks(group, group.rank(), group.size())
