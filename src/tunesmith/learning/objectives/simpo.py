"""Simple preference optimisation (arXiv 2405.14734): mean log-probabilities as rewards, a target margin, no
reference.

−log σ(β log p̄_c − β log p̄_r − γ)        log p̄ the mean log p a token
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


class SimPO(Preferring):
    """Learns to give the chosen answer the higher likelihood a token, by a margin."""

    kind: Literal["simpo"] = "simpo"
    beta: float = Field(
        default=2.0,
        gt=0,
        description="scale of the reward; 2 to 10",
        json_schema_extra={"when": "lower if the margin stops growing early"},
    )
    gamma: float = Field(
        default=1.0,
        ge=0,
        description="target margin between the rewards; about half of beta",
        json_schema_extra={"when": "higher if chosen answers should be likelier by more"},
    )
    # 3e-7 to 1e-6 is the paper's for full weights (its appendix: larger ones end in repetition), ten times
    # that for adapters.
    suits: ClassVar[Mapping[str, Any]] = {
        "optimizer.learning_rate": 1e-5,
        "batch.sequences": 8,
        "full": {"optimizer.learning_rate": 1e-6},
    }

    def losses(self, logps: mx.array, fields: mx.array) -> mx.array:
        chosen, rejected = sides(per_token(logps, fields[:, 1]))
        return -nn.log_sigmoid(self.beta * (chosen - rejected) - self.gamma)

    def rewards(self, logps: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
        return self.beta * logps / np.maximum(np.concatenate([group.learned for group in groups]), 1)
