"""How good is the model now? Losses and metrics of the held-out rows, and sample answers."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from tunesmith import events
from tunesmith.checks.adherence import adherence
from tunesmith.engine import generation, scoring
from tunesmith.errors import ConfigError
from tunesmith.events import Sink
from tunesmith.machine.ranks import Ranks
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import LOWER, RunConfig
from tunesmith.tokens.batches import Cut, Group
from tunesmith.training import instruments, preparation, reference
from tunesmith.training.preparation import Prepared, SamplePrompt


@dataclass(frozen=True)
class Validation:
    """Passes over rows without gradient and dropout; ranks share the work."""

    net: nn.Module
    config: RunConfig
    prepared: Prepared
    ranks: Ranks
    emit: Sink

    def logps(
        self, groups: Sequence[Group], cursor: Cursor, tick: Callable[[int, int], None] | None = None
    ) -> np.ndarray:
        """(S,) Σ weight · log p of all sequences of ``groups``."""
        if not groups:
            return np.zeros(0)
        cut = Cut.forward(self.config.batch, groups)
        if cursor.tokens is not None:  # the budget was lowered when memory ran out
            cut = replace(cut, tokens=min(cut.tokens, cursor.tokens))
        parts = [np.zeros(len(group.sequences)) for group in groups]
        mine = range(self.ranks.rank, len(groups), self.ranks.size)
        sums = scoring.sequence_sums(self.net, [groups[index] for index in mine], cut, tick)
        for index, scores in zip(mine, sums, strict=True):
            parts[index] = np.array([logp for logp, _ in scores])
        return self.ranks.total_float(np.concatenate(parts))

    def held_out(self, cursor: Cursor) -> events.Validated:
        """Loss, perplexity and metrics of all held-out rows. ``cursor`` keeps the best so far.

        Raises ConfigError if the rows do not give the value that `LoopSpec.best` names."""
        start = time.perf_counter()
        objective, valid = self.prepared.objective, self.prepared.valid
        pairs = reference.twins(self.prepared, self.config, None)
        every = self.logps([*valid, *pairs], cursor, events.ticker(self.emit, "validating"))
        logps, pair_logps = np.split(every, [len(every) - len(pairs)])
        baseline, metrics = objective.baseline(pairs, pair_logps)
        metrics |= objective.metrics(valid, logps)
        fields = objective.fields(valid, baseline)
        losses = np.array(
            objective.losses(mx.array(logps, mx.float32), mx.array(fields, mx.float32)), dtype=np.float64
        )
        units_each = [objective.units(group) for group in valid]
        units = sum(units_each)
        loss = float(losses.sum()) / units
        self.emit(instruments.held_out_losses(cursor.step, valid, losses, units_each))
        perplexity = self._perplexity(logps)
        seconds = time.perf_counter() - start
        adhering = self._adherence()
        measured = {"perplexity": perplexity, "adherence": adhering}
        values = {"loss": loss} | {name: value for name, value in measured.items() if value is not None}
        best = self._best(values | metrics, cursor)
        return events.Validated(
            cursor.step,
            loss,
            math.nan if perplexity is None else perplexity,
            units,
            len(valid),
            seconds,
            best,
            metrics,
            adhering,
            0.0 if adhering is None else time.perf_counter() - start - seconds,
        )

    def _adherence(self) -> float | None:
        """Mean `checks.adherence` of greedy answers to a few held-out prompts, which the first rank gives;
        None if none are asked, or the rows have no answer to measure against."""
        spec, renderer = self.config.loop, self.prepared.renderer
        if not spec.scored_prompts:
            return None
        prompts = preparation.scored_prompts(self.prepared.valid_examples, renderer, spec.scored_prompts)
        if not prompts:
            return None
        mean = 0.0
        if self.ranks.writes:
            answers = self._answers([prompt.ids for prompt in prompts], "scoring adherence")
            mean = statistics.fmean(
                adherence(answer, prompt.reference) for prompt, answer in zip(prompts, answers, strict=True)
            )
        return float(self.ranks.total_float(np.array([mean]))[0])

    def _perplexity(self, logps: np.ndarray) -> float | None:
        """Of the sequences that the objective imitates, or None if they have no learned token."""
        objective, valid = self.prepared.objective, self.prepared.valid
        imitated = np.array([flag for group in valid for flag in objective.imitated(group)])
        learned = float(np.concatenate([group.learned for group in valid])[imitated].sum())
        return math.exp(min(-float(logps[imitated].sum()) / learned, 700.0)) if learned else None

    def _best(self, values: dict[str, float], cursor: Cursor) -> bool:
        """Whether the value that `LoopSpec.best` names is the best so far, which ``cursor`` then keeps."""
        name = self.config.loop.best
        value = values.get(name)
        if value is None:
            message = f"loop.best is {name}, and the held-out rows do not give it"
            hint = "it may need rows of both kinds, or with answers; loss is always there"
            raise ConfigError(message, where="loop.best", hint=hint)
        before = cursor.best_value
        best = math.isfinite(value) and (
            before is None or (value < before if name in LOWER else value > before)
        )
        if best:
            cursor.best_step, cursor.best_value, cursor.stale = cursor.step, value, 0
        else:
            cursor.stale += 1
        return best

    def sample(self, step: int) -> None:
        """Greedy answers to the user's own prompts, and to prompts spread evenly over the validation rows."""
        spec = self.config.loop
        rows = preparation.prompts(self.prepared.valid_examples, self.prepared.renderer, spec.samples)
        self._answer(step, [*preparation.own_prompts(self.prepared, spec.prompts), *rows])

    def sample_own(self, step: int) -> None:
        """Greedy answers to the user's own prompts."""
        self._answer(step, preparation.own_prompts(self.prepared, self.config.loop.prompts))

    def _answer(self, step: int, prompts: Sequence[SamplePrompt]) -> None:
        if not self.ranks.writes or not prompts:
            return
        answers = self._answers([prompt.ids for prompt in prompts], "sampling")
        for prompt, answer in zip(prompts, answers, strict=True):
            self.emit(events.Sampled(step, prompt.text, answer, prompt.reference))

    def _answers(self, prompts: Sequence[Sequence[int]], label: str) -> list[str]:
        """Greedy answers as texts."""
        renderer = self.prepared.renderer
        self.net.eval()
        answers = generation.generate(
            self.net,
            prompts,
            max_tokens=self.config.loop.sample_tokens,
            eos_ids=renderer.eos_ids,
            on_done=events.ticker(self.emit, label),
        )
        return [renderer.answer(answer.ids) for answer in answers]
