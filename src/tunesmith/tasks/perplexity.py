"""How surprised a model is by the learned tokens of held-out rows: loss in nats a token, and perplexity = e to that.

The loss is a ratio of sums over all rows, Σ nats / Σ tokens, so neither the cut into batches nor the order of rows can
change it, and a long row counts for as many tokens as it has. The forward pass is not here: this takes its numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunesmith.errors import EvaluationError, listing
from tunesmith.tasks import ExampleScore, Statistic

RowLoss = tuple[str, float, float]
"""(source, Σ of −log p over learned tokens in nats, number of learned tokens, weighted)."""


def from_rows(rows: Sequence[RowLoss]) -> list[ExampleScore]:
    """One score a row: ``value`` is its mean nats a token, ``units`` its tokens.

    Raises EvaluationError naming the rows whose loss is not finite or that have no learned token: leaving them out
    would make the model look better than it is.
    """
    bad = [
        f"{source}: loss {loss:g} nats over {units:g} learned tokens"
        for source, loss, units in rows
        if not (math.isfinite(loss) and math.isfinite(units) and units > 0)
    ]
    if bad:
        raise EvaluationError(
            f"{len(bad)} of {len(rows)} rows have no usable loss\n{listing(bad)}",
            hint="a row needs at least one learned token; a loss that is not finite means that the model has diverged",
        )
    return [ExampleScore(source, loss / units, units, {"nats": loss}) for source, loss, units in rows]


@dataclass(frozen=True, slots=True)
class Perplexity:
    name: str = "perplexity"
    version: str = "1"
    statistics: tuple[Statistic, ...] = (
        Statistic("perplexity", lambda score: score.value, np.exp),
        Statistic("loss", lambda score: score.value),
    )

    def score(self, items: Sequence[RowLoss]) -> list[ExampleScore]:
        return from_rows(items)
