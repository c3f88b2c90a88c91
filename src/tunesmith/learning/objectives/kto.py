"""Kahneman-Tversky optimisation (arXiv 2402.01306): good and bad rows, each judged against a common baseline.

    desirable    λ_D (1 − σ(β(r − z0)))        undesirable    λ_U (1 − σ(β(z0 − r)))
    z0 = max(0, mean of r over mismatched pairs), no gradient

Other trainers pair inside a fixed micro-batch, where a lone last row is its own mismatch and z0 depends on
how the update is cut. Here all rows of the update are paired: the order is a hash of row and update, so it
does not depend on how rows are laid out and is another in every epoch, and each prompt takes the completion
of the next row that asks and says something else."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np

from tunesmith.learning.objectives.judged import Judging
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Tokens


class KTO(Judging):
    """Learns from rows labelled desirable and undesirable; no pairs are needed."""

    kind: Literal["kto"] = "kto"
    watched: ClassVar[tuple[str, ...]] = (
        "reward_desirable",
        "reward_undesirable",
        "margin",
        "accuracy",
        "kl",
        "kl_error",
        "logp_desirable",
        "logp_undesirable",
    )

    def twins(
        self, groups: Sequence[Group], salt: int, spares: Sequence[Group], limit: int
    ) -> tuple[list[Group], Counter[str]]:
        """Each row's prompt with the completion of another: the next one with another prompt and another
        completion, else of ``spares``. At most ``limit`` tokens of it. And how often a pair was cut, or there
        was none."""
        ordered = sorted(groups, key=lambda group: (_digest(group, salt), group.source))
        sides = [_sides(group) for group in ordered]
        made: list[Group] = []
        notes: Counter[str] = Counter()
        for place, group in enumerate(ordered):
            following = (*range(place + 1, len(ordered)), *range(place))
            others = itertools.chain(
                ((ordered[index], sides[index]) for index in following),
                ((spare, _sides(spare)) for spare in spares),
            )
            prompt, completion = sides[place]
            fits = (
                other
                for other, (other_prompt, other_completion) in others
                if other_prompt != prompt and other_completion != completion
            )
            if (other := next(fits, None)) is None:
                notes["rows without another of other prompt and answer: no mismatched pair"] += 1
                continue
            ids, targets = _mismatched(group.sequences[0], other.sequences[0])
            if len(ids) > limit:
                notes["mismatched pairs cut at batch.length"] += 1
            twin = Group((Tokens(ids[:limit], targets[:limit]),), group.source)
            if twin.units:
                made.append(twin)
            else:
                notes["mismatched pairs without an answer within batch.length"] += 1
        return made, notes

    def baseline(self, pairs: Sequence[Group], logps: np.ndarray) -> tuple[float, dict[str, float]]:
        """z0: the mean log-ratio of ``pairs``, at least 0; 0 without a pair. Metrics: ``kl``, the mean
        itself, and ``kl_error``, its standard error."""
        if not pairs:
            return 0.0, {}
        ratios = logps - np.array([pair.reference[0] for pair in pairs])
        mean = float(ratios.mean())
        metrics = {"kl": mean}
        if len(ratios) > 1:
            metrics["kl_error"] = float(ratios.std(ddof=1) / np.sqrt(len(ratios)))
        return max(0.0, mean) if math.isfinite(mean) else mean, metrics  # max(0, nan) is 0


def _digest(group: Group, salt: int) -> bytes:
    tokens = group.sequences[0]
    content = tokens.ids.astype("<i4").tobytes() + (tokens.targets > 0).tobytes()
    return hashlib.sha256(salt.to_bytes(8, "little") + content).digest()


def _sides(group: Group) -> tuple[bytes, bytes]:
    """The prompt and the completion, which begins at the first learned token."""
    tokens = group.sequences[0]
    return tokens.ids[: tokens.start].tobytes(), tokens.ids[tokens.start :].tobytes()


def _mismatched(prompted: Tokens, answered: Tokens) -> Tokens:
    """The prompt of the first with the completion of the second."""
    ids = np.concatenate([prompted.ids[: prompted.start], answered.ids[answered.start :]])
    targets = [np.zeros(prompted.start, np.float32), answered.targets[answered.start :]]
    return Tokens(ids, np.concatenate(targets))
