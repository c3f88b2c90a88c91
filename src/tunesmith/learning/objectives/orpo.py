"""Odds-ratio preference optimisation (arXiv 2403.07691): imitation and preference in one, without a
reference.

−log p̄_c − β log σ(log odds_c − log odds_r)        odds = p̄ / (1 − p̄), log p̄ the mean log p a token
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field

from tunesmith.learning.objectives.paired import Preferring, per_token, sides
from tunesmith.tokens.batches import Group

CERTAIN = -1e-6  # largest mean log p: beyond it 1 − p̄ is no float32 number


class ORPO(Preferring):
    """Learns the chosen answers, and to prefer them, from the base itself: no SFT before it, no reference."""

    kind: Literal["orpo"] = "orpo"
    beta: float = Field(
        default=0.1,
        gt=0,
        description="λ of the paper: weight of the odds ratio beside the likelihood",
        json_schema_extra={
            "when": "higher if the margin does not grow, lower if the loss of the chosen answers suffers"
        },
    )
    # 8e-6 is the paper's for full weights, ten times that for adapters.
    suits: ClassVar[Mapping[str, Any]] = {
        "optimizer.learning_rate": 8e-5,
        "batch.sequences": 8,
        "full": {"optimizer.learning_rate": 8e-6},
    }

    def losses(self, logps: mx.array, fields: mx.array) -> mx.array:
        means = mx.minimum(per_token(logps, fields[:, 1]), CERTAIN)
        chosen, rejected = sides(means)
        # log(1 − p) as log(−expm1(log p))
        gap = chosen - rejected - (mx.log(-mx.expm1(chosen)) - mx.log(-mx.expm1(rejected)))
        return -chosen - self.beta * nn.log_sigmoid(gap)

    def rewards(self, logps: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
        return self.beta * logps / np.maximum(np.concatenate([group.learned for group in groups]), 1)
