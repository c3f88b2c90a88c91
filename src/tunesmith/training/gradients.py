"""From a micro-batch to sums and gradients: which parts are recomputed, which shapes are compiled; and losses
row by row."""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map

from tunesmith import adapters
from tunesmith.engine.engine import notify_if_separate
from tunesmith.errors import ConfigError, OutOfMemory
from tunesmith.events import Notice, Probed, Sink
from tunesmith.learning.objective import Objective
from tunesmith.learning.optimizer import wide
from tunesmith.machine import backend
from tunesmith.machine.ranks import Ranks
from tunesmith.model import abilities, logprobs, wrap
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import RunConfig
from tunesmith.tokens.batches import Batch, Group, Plan, bucketed, collate
from tunesmith.training.frozen import Lower

COMPILED_SHAPES = 64
"""Most shapes that a run compiles: each keeps a graph of the whole step. Rarer shapes run uncompiled."""

Shape = tuple[int, int, int, bool]
"""Rows, tokens and learned tokens of a micro-batch, as they are on the device, and whether it is
distilled."""


class Gradients:
    """micro-batch, dropout key → (sum of losses (), log p of each sequence (S,)), gradients of that sum; not
    yet evaluated.

    objective: with the settings that depend on the training rows (default: the config's). compiled: shapes
    for which the step is compiled; ``traces`` counts those met so far, ``plain`` the micro-batches of others.
    lower: the frozen layers whose results are kept. shared: those that a distilled micro-batch computes once
    for adapted model and base."""

    def __init__(
        self,
        net: nn.Module,
        config: RunConfig,
        compiled: frozenset[Shape] = frozenset(),
        lower: Lower | None = None,
        objective: Objective | None = None,
        shared: Lower | None = None,
    ) -> None:
        self._lower = lower
        self.traces: set[Shape] = set()
        self.plain, self.compiles = 0, bool(compiled)
        self.objective = objective = objective or config.objective
        self._net, self._pack, self._compiled = net, config.batch.pack, compiled
        gather = abilities.splits(net)
        of_tokens = functools.partial(logprobs.learned_logprobs, gather=gather)
        of_base = functools.partial(
            logprobs.learned_likeness, as_base=functools.partial(adapters.bypassed, net), gather=gather
        )
        self._steps = {False: self._step(of_tokens), True: self._step(of_base, shared)}
        self._fast = {kind: _compiled(step) for kind, step in self._steps.items()}

    def _step(self, of_batch: logprobs.LogProbs, shared: Lower | None = None) -> Any:
        """weights, arrays of a batch, ends of packed rows, dropout key → what a call returns, from what
        ``of_batch`` gives for each learned token."""
        net, lower, objective = self._net, self._lower, self.objective

        def total(
            weights: dict, arrays: list[Any], ends: tuple[int, ...] | None, key: mx.array
        ) -> tuple[mx.array, mx.array]:
            net.update(weights)
            adapters.seed_dropout(net, key)
            tokens, positions, learned, tok_weights, rows, fields, *states = arrays
            batch = Batch(tokens, positions, learned, tok_weights, rows, fields, ends)
            if lower is None and shared is not None:
                states = [mx.stop_gradient(shared.below(tokens))]
            frozen = lower or shared
            with frozen.above(states[0]) if frozen else ExitStack():
                logps = logprobs.sequence_logps(net, batch, of_batch)
            return objective.losses(logps, batch.fields).sum(), logps

        return mx.value_and_grad(total)

    def __call__(
        self, groups: Sequence[Group], key: mx.array, baseline: float = 0.0
    ) -> tuple[tuple[mx.array, mx.array], dict]:
        fields = self.objective.fields(groups, baseline)
        batch = collate(groups, pack=self._pack, bucket=bool(self._compiled), fields=fields)
        arrays = [mx.array(part) for part in batch[:6]]
        if self._lower:
            arrays.append(self._lower.states(groups, batch))
        distilled = groups[0].distilled
        assert all(group.distilled is distilled for group in groups)
        shape = (*batch.tokens.shape, len(batch.learned), distilled)
        weights = self._net.trainable_parameters()
        try:
            if shape in self._compiled:
                self.traces.add(shape)
                return self._fast[distilled](weights, arrays, key)
            self.plain += 1
            known = [arrays[0], batch.positions, *arrays[2:]]  # known positions have a faster gradient
            return self._steps[distilled](weights, known, batch.ends, key)
        finally:
            self._net.update(weights)  # tracing leaves its placeholders behind


def _compiled(step: Any) -> Any:
    return mx.compile(lambda weights, arrays, key: step(weights, arrays, None, key))


class Accumulation:
    """The sums of an update over its micro-batches, within the memory of the device."""

    def __init__(
        self,
        gradients_of: Gradients,
        net: nn.Module,
        rows: Sequence[Group],
        plan: Plan,
        config: RunConfig,
        ranks: Ranks,
        emit: Sink,
    ) -> None:
        self._gradients_of, self._net, self._rows, self._plan_of_run = gradients_of, net, rows, plan
        self._config, self._ranks, self._emit = config, ranks, emit

    @property
    def shapes(self) -> dict[str, int]:
        """``compiled``: shapes so far; ``uncompiled``: micro-batches of other shapes, if steps are
        compiled."""
        made = self._gradients_of
        return {"compiled": len(made.traces), "uncompiled": made.plain} if made.compiles else {}

    def padding(self, step: int, cursor: Cursor) -> float:
        """Share of the positions on the device in update ``step``, on all ranks, that are padding."""
        plan, ranks = self._plan(cursor), self._ranks.size
        positions = plan.positions or plan.lengths
        micros = [micro for rank in range(ranks) for micro in plan.update(step, rank, ranks)]
        used = sum(positions[member] for micro in micros for member in micro)
        return 1 - used / sum(plan.cut.size([plan.lengths[member] for member in micro]) for micro in micros)

    def _plan(self, cursor: Cursor) -> Plan:
        """The plan, with the smaller budget that out-of-memory forced."""
        plan = self._plan_of_run
        return plan if cursor.tokens is None else replace(plan, cut=replace(plan.cut, tokens=cursor.tokens))

    def probe(self, cursor: Cursor) -> None:
        """Run the largest micro-batch of each kind once and discard it, so that out-of-memory appears before
        step 1. Raises OutOfMemory."""
        for micro in self._plan(cursor).largest_of_each_kind(self._ranks.size):
            self._probe(micro, self._plan(cursor))

    def _probe(self, micro: Sequence[int], plan: Plan) -> None:
        start, lengths = time.perf_counter(), [plan.lengths[index] for index in micro]
        self._net.train()
        mx.reset_peak_memory()  # loading may have needed more for a moment
        try:
            key = dropout_key(self._config.loop.seed, 0, 0)
            mx.eval(self._gradients_of([self._rows[index] for index in micro], key))
        except (RuntimeError, MemoryError) as error:
            if not backend.is_out_of_memory(error):
                raise
            raise self._out_of_memory(error, lengths, "before step 1") from error
        size, memory, limit = plan.cut.size(lengths), backend.memory(), backend.memory_limit()
        self._emit(Probed(len(lengths), size, time.perf_counter() - start, memory))
        if memory["peak"] > 0.9 * limit:
            share = f"{memory['peak'] / 1e9:.1f} of {limit / 1e9:.1f} GB"
            text = f"the largest micro-batch takes {share}: it will swap"
            self._emit(Notice(text, level="warning", hint=self._smaller(lengths)))

    def sums(self, step: int, cursor: Cursor, baseline: float = 0.0) -> tuple[mx.array, dict, np.ndarray]:
        """(sum of losses (), sums of gradients, log p of each sequence) of this rank's rows of update
        ``step``, evaluated.

        The log p are those of all sequences of `Plan.members` in order, 0 where another rank has them.

        If the device runs out of memory, ``cursor.tokens`` becomes half of the budget and the update starts
        again. Raises OutOfMemory if a single row is too large."""
        while True:
            plan = self._plan(cursor)
            micros = plan.update(step, self._ranks.rank, self._ranks.size)
            done: list[int] = []
            try:
                loss, total, logps = self._accumulate(step, micros, done, baseline)
                if total is None:
                    total = tree_map(mx.zeros_like, wide(self._net.trainable_parameters()))
                none = {member: np.zeros(len(self._rows[member].sequences)) for member in plan.members(step)}
                return loss, total, np.concatenate(list((none | logps).values()))
            except (RuntimeError, MemoryError) as error:
                if not backend.is_out_of_memory(error):
                    raise
                lengths = [plan.lengths[member] for member in micros[max(0, len(done) - 1)]]
                smaller = plan.cut.halved(lengths)
                if smaller is None:
                    raise self._out_of_memory(error, lengths, f"step {step + 1}") from error
                cursor.tokens = smaller.tokens
            mx.clear_cache()  # the attempt's memory is free: its frames are gone

    def _accumulate(
        self, step: int, micros: list[list[int]], done: list[int], baseline: float
    ) -> tuple[mx.array, dict | None, dict[int, np.ndarray]]:
        """The sums over ``micros``, and member → log p of its sequences; ``done`` takes the number of each as
        it begins."""
        self._net.train()
        loss, total = mx.array(0.0), None
        parts: list[mx.array] = []
        for index, micro in enumerate(micros):
            done.append(index)
            # The next graph is built while the device computes the last one, which is then awaited, so that
            # only one is in memory.
            key = dropout_key(self._config.loop.seed, step, index * self._ranks.size + self._ranks.rank)
            (part, logps), part_gradients = self._gradients_of(
                [self._rows[member] for member in micro], key, baseline
            )
            mx.eval(loss, total or {})
            loss, total = loss + part, _add(total, wide(part_gradients))
            del part_gradients  # else they are in memory, beside their sum, during the next micro-batch
            parts.append(logps)
            mx.async_eval(loss, total, logps)
        mx.eval(loss, total or {}, parts)
        by_member: dict[int, np.ndarray] = {}
        for micro, logps in zip(micros, parts, strict=True):
            sizes = [len(self._rows[member].sequences) for member in micro]
            ends = np.cumsum(sizes)[:-1]
            by_member |= dict(zip(micro, np.split(np.array(logps, dtype=np.float64), ends), strict=True))
        return loss, total, by_member

    def _out_of_memory(self, error: Exception, lengths: list[int], where: str) -> OutOfMemory:
        message = (
            f"the device ran out of memory with {len(lengths)} rows of up to {max(lengths)} tokens: {error}"
        )
        return OutOfMemory(message, where=where, hint=self._smaller(lengths))

    def _smaller(self, lengths: list[int]) -> str:
        hint = "lower batch.tokens" if len(lengths) > 1 else "lower batch.length"
        hint += "" if self._config.loop.checkpoint_gradients else ", set loop.checkpoint_gradients=true"
        return hint + ("" if self._config.model.quantize else ", or model.quantize=4") + ", in a new run"


def _add(total: dict | None, part: dict) -> dict:
    """Leaf by leaf."""
    return part if total is None else tree_map(mx.add, total, part)


def frequent_shapes(plan: Plan, groups: Sequence[Group], rank: int = 0, ranks: int = 1) -> frozenset[Shape]:
    """The shapes to compile: the most frequent of the first epoch, so that a resumed run compiles the same
    ones."""
    seen: Counter[Shape] = Counter()
    for step in range(min(plan.steps, plan.steps_per_epoch)):
        for micro in plan.update(step, rank, ranks):
            sequences = [sequence for index in micro for sequence in groups[index].sequences]
            longest = max(len(sequence.ids) for sequence in sequences) - 1
            learned = sum(int(np.count_nonzero(sequence.targets[1:])) for sequence in sequences)
            distilled = groups[micro[0]].distilled
            seen[len(sequences), bucketed(max(1, longest)), bucketed(max(1, learned)), distilled] += 1
    return frozenset(
        shape for shape, _ in sorted(seen.items(), key=lambda item: (-item[1], item[0]))[:COMPILED_SHAPES]
    )


def dropout_key(seed: int, step: int, micro: int) -> mx.array:
    """The key of all dropout masks of one micro-batch: a function of its place in the run, not of a global
    generator."""
    return mx.random.key(int(np.random.SeedSequence([seed, step, micro]).generate_state(1, np.uint64)[0]))


@contextmanager
def checkpointed(net: nn.Module) -> Iterator[None]:
    """Inside, each layer of ``net`` is recomputed in the backward pass instead of kept.

    Dropout masks come from explicit keys, so that the second pass draws what the first drew."""
    layers: Any = net.layers or []
    with wrap.replaced(layers, _recomputing):
        yield


def _recomputing(kind: type[nn.Module]) -> wrap.Call:
    def call(self: nn.Module, *arguments: Any, **options: Any) -> Any:
        if not self.training:
            return kind.__call__(self, *arguments, **options)
        # Arrays that `run` captures get no gradient. More than the hidden states needs one: keys and values
        # of an earlier layer, and the inputs of each layer (Gemma 4).
        inputs = (arguments, options)
        flat: Any = tree_flatten(inputs)
        arrays = [leaf for _, leaf in flat if _is_differentiable(leaf)]

        def run(parameters: dict, arrays: list[mx.array]) -> Any:
            self.update(parameters)
            in_order = iter(arrays)
            arguments, options = tree_map(
                lambda leaf: next(in_order) if _is_differentiable(leaf) else leaf, inputs
            )
            return kind.__call__(self, *arguments, **options)

        return mx.checkpoint(run)(self.trainable_parameters(), arrays)

    return call


def _is_differentiable(leaf: object) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def require(net: nn.Module, config: RunConfig, rows: Sequence[Group], notify: Sink) -> None:
    """Raises ConfigError if ``net``, with its adapter, cannot do what ``config`` asks; notices say what is
    done the slow way."""
    if config.batch.pack and not abilities.packs(net):
        name = type(net).__module__.rsplit(".", 1)[-1]
        text = f"{name} models mix packed rows (recurrent layers, scaling by the position, …)"
        raise ConfigError(
            text, where="batch.pack", hint="leave it out: rows of similar length are put together instead"
        )
    if config.loop.cache_frozen:
        Lower(net).require(rows)
    if not abilities.splits(net):
        text = "this model's head cannot be separated from its body: all logits are computed, learned or not"
        notify(Notice(text, level="warning"))
    notify_if_separate(net, notify)
