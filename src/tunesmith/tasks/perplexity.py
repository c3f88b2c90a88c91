"""How surprised a model is by the learned tokens of held-out rows: loss in nats a token, and perplexity = e to that.

The loss is a ratio of sums over all rows, Σ nats / Σ tokens, so neither the cut into batches nor the order of rows changes it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from tunesmith.errors import EvaluationError, listing
from tunesmith.tasks import ExampleScore, Statistic, Task

RowLoss = tuple[str, float, float]
"""(source, Σ of −log p over learned tokens in nats, number of learned tokens, weighted)."""


class Perplexity(Task[RowLoss]):
    name = "perplexity"
    version = "1"
    statistics = (Statistic("perplexity", lambda score: score.value, np.exp), Statistic("loss", lambda score: score.value))

    def score(self, items: Sequence[RowLoss]) -> list[ExampleScore]:
        """``value``: mean nats a token; ``units``: tokens. Raises EvaluationError naming the rows without a usable loss."""
        bad = [
            f"{source}: loss {loss:g} nats over {units:g} learned tokens"
            for source, loss, units in items
            if not (math.isfinite(loss) and 0 < units < math.inf)
        ]
        if bad:  # left out, they would make the model look better than it is
            raise EvaluationError(
                f"{len(bad)} of {len(items)} rows have no usable loss\n{listing(bad)}",
                hint="a row needs at least one learned token; a loss that is not finite means that the model has diverged",
            )
        return [ExampleScore(source, loss / units, units, {"nats": loss}) for source, loss, units in items]
