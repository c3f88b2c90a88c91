"""Anchored preference optimisation, zero, unpaired (arXiv 2408.06266, equation 7, as TRL's
``apo_zero_unpaired``).

    desirable    λ_D (1 − σ(βr))        undesirable    λ_U σ(βr)

KTO with its baseline held at zero: no mismatched pairs, so an update costs what SFT's does.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from tunesmith.learning.objectives.judged import Judging


class APOZeroUnpaired(Judging):
    """Learns from labelled rows whose desirable answers are better than the model's own."""

    kind: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"
    watched: ClassVar[tuple[str, ...]] = (
        "reward_desirable",
        "reward_undesirable",
        "margin",
        "accuracy",
        "logp_desirable",
        "logp_undesirable",
    )
