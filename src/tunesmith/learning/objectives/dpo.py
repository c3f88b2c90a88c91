"""Direct preference optimisation (arXiv 2305.18290) and its variants, on
Δ = (log π_c − log π_ref,c) − (log π_r − log π_ref,r).

    sigmoid        −log σ(βΔ)
    robust         (−(1−ε) log σ(βΔ) + ε log σ(−βΔ)) / (1 − 2ε); ε of the labels are flipped (2403.00409)
    hinge          max(0, 1 − βΔ) (2309.06657)
    ipo            (Δ̄ − 1/(2β))², log-ratios as means a token, as its authors average (2310.12036)
    sigmoid_norm   −log σ(βΔ̄), log-ratios as means a token: length-normalised (2411.15124)
    apo_zero       1 − σ(βr_c) + σ(βr_r) (2408.06266, equation 7)"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from pydantic import Field, model_validator

from tunesmith.learning.objectives.paired import Preferring, per_token, sides
from tunesmith.tokens.batches import Group

MEANS = ("ipo", "sigmoid_norm")


class DPO(Preferring):
    """Learns to prefer the chosen answer of each pair over the rejected one, compared with the model before
    training."""

    kind: Literal["dpo"] = "dpo"
    loss: Literal["sigmoid", "robust", "hinge", "ipo", "sigmoid_norm", "apo_zero"] = Field(
        default="sigmoid",
        description="ipo and sigmoid_norm do not favour length; robust expects flipped labels",
        json_schema_extra={
            "when": "ipo or sigmoid_norm if answers grow longer; robust if some labels are wrong"
        },
    )
    beta: float = Field(
        default=0.1,
        gt=0,
        description="how strongly the reference holds; about 5 for sigmoid_norm",
        json_schema_extra={
            "when": "higher keeps the model nearer to the reference, lower lets it move further"
        },
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=0.5,
        description="share of flipped labels, for loss=robust",
        json_schema_extra={"when": "to the share of pairs that you think are labelled the wrong way round"},
    )
    needs_reference: ClassVar[bool] = True
    # 5e-7 to 5e-6 is usual for full weights (DPO paper, section 6; TRL), ten times that for adapters.
    suits: ClassVar[Mapping[str, Any]] = {
        "optimizer.learning_rate": 2e-5,
        "batch.sequences": 8,
        "full": {"optimizer.learning_rate": 2e-6},
    }

    @model_validator(mode="after")
    def _consistent(self) -> DPO:
        if (self.label_smoothing > 0) != (self.loss == "robust"):
            raise ValueError("label_smoothing above 0 and loss=robust belong together")
        return self

    def rewards(self, logps: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
        rewards = super().rewards(logps, groups)
        if self.loss in MEANS:  # watched is what is learned
            rewards = rewards / np.maximum(np.concatenate([group.learned for group in groups]), 1)
        return rewards

    def losses(self, logps: mx.array, fields: mx.array) -> mx.array:
        ratios = logps - fields[:, 0]
        if self.loss in MEANS:
            ratios = per_token(ratios, fields[:, 1])
        chosen, rejected = sides(ratios)
        gap = chosen - rejected
        scaled = self.beta * gap
        match self.loss:
            case "sigmoid" | "sigmoid_norm":
                return -nn.log_sigmoid(scaled)
            case "robust":
                flipped = self.label_smoothing
                mixed = -(1 - flipped) * nn.log_sigmoid(scaled) + flipped * nn.log_sigmoid(-scaled)
                return mixed / (1 - 2 * flipped)
            case "hinge":
                return mx.maximum(1 - scaled, 0)
            case "ipo":
                return mx.square(gap - 1 / (2 * self.beta))
            case "apo_zero":
                return mx.sigmoid(-self.beta * chosen) + mx.sigmoid(self.beta * rejected)
