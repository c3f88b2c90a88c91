"""Several processes that train one model: who this process is among them, and sums over all of them.

Started with ``mlx.launch -n 2 -- tunesmith train …`` (rings of processes or of machines, MPI, JACCL between
Macs, NCCL on CUDA). Each rank holds the whole model and takes its share of the rows of an update; sums of
loss, units and gradients meet once an update. One process is the case of one rank, with nothing to add up.
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
"""A rank that waits longer for the others says so."""

_LAUNCHED = {"MLX_RANK", "OMPI_COMM_WORLD_RANK"}
"""What `mlx.launch` and Open MPI tell each process: without it there is nothing to join."""


@dataclass(frozen=True)
class Ranks:
    """``rank`` of ``size``; rank 0 alone writes."""

    group: Any
    rank: int
    size: int

    @property
    def writes(self) -> bool:
        return self.rank == 0

    def total(self, tree: Any) -> Any:
        """``tree`` of float32 arrays, every leaf summed over the ranks: one message. Raises RankLost."""
        if self.size == 1:
            return tree
        flat: Any = tree_flatten(tree)
        line = mx.concatenate([leaf.astype(mx.float32).reshape(-1) for _, leaf in flat])
        mx.eval(line)  # what fails here is this rank's own
        try:
            line = mx.distributed.all_sum(line, group=self.group)
            mx.eval(line)
        except RuntimeError as error:
            raise RankLost(
                f"another rank is gone: {error}",
                where=f"rank {self.rank} of {self.size}",
                hint="start all ranks again with --resume, or another number, one too: nothing that was saved is lost",
            ) from error
        parts = mx.split(line, np.cumsum([leaf.size for _, leaf in flat])[:-1].tolist())
        return tree_unflatten(
            [(name, part.reshape(leaf.shape)) for (name, leaf), part in zip(flat, parts, strict=True)]
        )

    def total_float(self, values: np.ndarray) -> np.ndarray:
        """float64 ``values`` summed over the ranks, as three float32 parts each, so that no digit of one
        rank's value is lost."""
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
        mine = np.frombuffer(text.encode() if self.rank == 0 else b"", np.uint8).astype(np.float64)
        line = np.zeros(int(self.total_float(np.array([float(mine.size)]))[0]))
        line[: mine.size] = mine
        return self.total_float(line).astype(np.uint8).tobytes().decode() if line.size else ""

    def require_agreement(self, *facts: object) -> None:
        """Raises TrainingError where the ranks do not start from the same ``facts``."""
        digest = np.frombuffer(hashlib.sha256(repr(facts).encode()).digest(), np.uint8).astype(np.float64)
        if (self.total_float(digest) != digest * self.size).any():
            raise TrainingError(
                "the ranks do not start from the same settings, data, weights and checkpoint",
                where=f"rank {self.rank} of {self.size}",
                hint="give every machine the same files, and the same command",
            )


ONE = Ranks(None, 0, 1)


def join(notify: Sink = silent) -> Ranks:
    """This process's place among those that `mlx.launch` started, or the only one. Waits for the others, and
    says so."""
    hosts = os.environ.get("MLX_HOSTFILE")
    if not os.environ.keys() & _LAUNCHED or (
        hosts is not None and os.path.isfile(hosts) and not os.path.getsize(hosts)
    ):
        return ONE  # the host file of a single process is empty
    named = " and ".join(sorted(os.environ.keys() & {"MLX_HOSTFILE", *_LAUNCHED}))
    if hosts is not None and not os.path.isfile(hosts):
        raise SetupError(
            "MLX_HOSTFILE names no file", where=hosts, hint=f"give the file of addresses, or unset {named}"
        )
    rank = os.environ.get("MLX_RANK", "?")
    what = f"rank {rank} still waits for the others: each must be started, with the same addresses and a rank of its own"
    waiting = threading.Timer(PATIENCE_S, lambda: notify(Notice(what, level="warning", where=hosts)))
    waiting.daemon = True
    waiting.start()
    try:
        group = mx.distributed.init(strict=True)
    except RuntimeError as error:
        hint = (
            f"look at the addresses in {hosts} and at MLX_RANK, or start it with mlx.launch, or unset {named}"
        )
        raise SetupError(
            f"this process was started as one of several and cannot reach the others: {error}", hint=hint
        ) from error
    finally:
        waiting.cancel()
    if group.rank() == 0:
        notify(Notice(f"{group.size()} ranks share the rows of every update"))
    return Ranks(group, group.rank(), group.size())
