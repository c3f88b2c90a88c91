"""What objectives on single rows with a verdict share: which rows, their weights by class, and what is
watched.

r = Σ over completion tokens of (log π − log π_ref), summed, not averaged. A row's loss is λ·σ(∓β(r − z0)),
minus for desirable."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal

import mlx.core as mx
import numpy as np
from pydantic import Field

from tunesmith.data.formats import (
    Completion,
    Conversation,
    Demonstration,
    Document,
    Example,
    Judged,
    Preference,
)
from tunesmith.errors import DataError
from tunesmith.learning.objective import Objective, Remark, Selected, ranked
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Row

WIDEST = 4 / 3
"""λ_D·n_D : λ_U·n_U is kept within [1, this] (KTO paper, equation 8)."""


class Judging(Objective):
    """Abstract: learns from rows labelled desirable or undesirable."""

    # 5e-6 is the paper's for full weights and TRL's advice for adapters ten times that; 16 rows are TRL's
    # least for z0.
    suits: ClassVar[Mapping[str, Any]] = {
        "optimizer.learning_rate": 5e-5,
        "batch.sequences": 16,
        "full": {"optimizer.learning_rate": 5e-6},
    }
    beta: float = Field(
        default=0.1,
        gt=0,
        description="how fast the gain from moving away from the reference saturates",
        json_schema_extra={
            "when": "higher keeps the model nearer to the reference, lower lets it move further"
        },
    )
    desirable_weight: float | None = Field(
        default=None,
        gt=0,
        description="λ_D; null: from the class counts",
        json_schema_extra={"when": "if one class should count more than the balance of the counts gives"},
    )
    undesirable_weight: float | None = Field(
        default=None,
        gt=0,
        description="λ_U; null: from the class counts",
        json_schema_extra={"when": "higher if avoiding bad answers matters more than giving good ones"},
    )
    sft_weight: float = Field(
        default=0.0,
        ge=0,
        description="weight of the mean loss a token of the desirable rows, learned beside it",
        json_schema_extra={"when": "above 0 if good answers become less likely while the margin rises"},
    )
    unlabelled: Literal["desirable", "leave_out"] = Field(
        default="desirable",
        description="rows without a label: taken as desirable (counted), or left out",
        json_schema_extra={"when": "leave_out if rows without a label have not been checked"},
    )
    pairs: Literal["leave_out", "judge"] = Field(
        default="leave_out",
        description="preferences: left out, or judged: chosen as desirable, rejected as undesirable",
        json_schema_extra={"when": "judge if the data has pairs beside labelled rows"},
    )
    needs_reference: ClassVar[bool] = True
    unit: ClassVar[str] = "a row"

    def select(self, examples: Sequence[Example]) -> Selected:
        selected = Selected([], [], Counter())
        for example in examples:
            origin = {"source": example.source, "metadata": example.metadata}
            if isinstance(example, Document):
                selected.left_out.append((example, "no prompt to judge it by"))
            elif isinstance(example, Preference):
                if self.pairs == "leave_out":
                    selected.left_out.append((example, "pair (objective.pairs=judge takes it)"))
                else:
                    selected.notes["a pair taken as a desirable and an undesirable row"] += 1
                    chosen, rejected = _apart(example)
                    selected.examples.extend(
                        [Judged(chosen, True, **origin), Judged(rejected, False, **origin)]
                    )
            elif isinstance(example, Judged) or example.label is not None:
                selected.examples.append(example)
            elif self.unlabelled == "leave_out":
                selected.left_out.append((example, "no label"))
            else:
                selected.notes["a row without a label taken as desirable"] += 1
                selected.examples.append(_desirable(example))
        return selected

    def groups(self, rows: Sequence[Row]) -> list[Group]:
        return [Group((row.tokens,), row.source, row.label) for row in rows]

    def require(self, groups: Sequence[Group], seen: Sequence[Example]) -> None:
        good, bad = _classes(groups)
        if good and bad:
            return
        pairs = sum(isinstance(example, Preference) for example in seen)
        hint = (
            "label rows true and false"
            if not pairs
            else "objective.pairs=judge takes pairs apart, objective=dpo learns them"
        )
        hint += "; objective=sft learns from desirable rows alone" if good else ""
        message = f"{type(self).__name__} needs desirable and undesirable rows, "
        message += f"and of {len(seen)} rows to train on "
        message += f"{good} are desirable and {bad} undesirable"
        unlabelled = sum(isinstance(example, Demonstration) for example in seen)
        message += "".join(
            f", {n} {kind}" for n, kind in ((unlabelled, "have no label"), (pairs, "are pairs")) if n
        )
        raise DataError(message, where="objective", hint=hint)

    def settled(self, groups: Sequence[Group]) -> tuple[Judging, list[Remark]]:
        good, bad = _classes(groups)
        high, low = self.desirable_weight, self.undesirable_weight
        given = high is not None or low is not None
        # Of the weights that keep the ratio, those nearest to 1; where one is given, it stays and the other
        # fits it.
        if high is None and low is None:
            high, low = max(1.0, bad / good), max(1.0, good / bad / WIDEST)
        elif low is None:
            assert high is not None
            low = float(np.clip(1.0, high * good / bad / WIDEST, high * good / bad))
        elif high is None:
            high = float(np.clip(1.0, low * bad / good, low * bad / good * WIDEST))
        ratio = high * good / (low * bad)
        outside = not 1 - 1e-9 <= ratio <= WIDEST + 1e-9
        weights = f"{good} desirable and {bad} undesirable rows: weights {high:.4g} and {low:.4g}"
        source = "given" if given else "set from the counts"
        place = "OUTSIDE" if outside else "within"
        text = f"{weights}, in all {ratio:.3g} : 1 ({source}; {place} 1 : 1 to 4 : 3)"
        settled = self.model_copy(update={"desirable_weight": high, "undesirable_weight": low})
        return settled, [Remark(text, "warning" if outside else "info")]

    def fields(self, groups: Sequence[Group], baseline: float) -> np.ndarray:
        """(S, 5): which way, λ, the reference's log p, z0, and the weight of its own log p."""
        high, low = self.desirable_weight, self.undesirable_weight
        assert high is not None and low is not None, "settled() gives them"
        made = [
            (1.0, high, group.reference[0], baseline, self.sft_weight / group.units if group.units else 0.0)
            if group.label
            else (-1.0, low, group.reference[0], baseline, 0.0)
            for group in groups
        ]
        return np.array(made)

    def losses(self, logps: mx.array, fields: mx.array) -> mx.array:
        way, weight, reference, baseline, imitation = (fields[:, column] for column in range(5))
        # 1 − σ(x) as σ(−x): no digit is lost where σ is near 1.
        return weight * mx.sigmoid(-self.beta * way * (logps - reference - baseline)) - imitation * logps

    def imitated(self, group: Group) -> tuple[bool, ...]:
        return (group.label is True,)

    def metrics(self, groups: Sequence[Group], logps: np.ndarray) -> dict[str, float]:
        good = np.array([group.label is True for group in groups], dtype=bool)
        rewards = self.beta * (logps - np.array([group.reference[0] for group in groups]))
        metrics: dict[str, float] = {}
        for name, side in (("desirable", good), ("undesirable", ~good)):
            if side.any():
                metrics[f"reward_{name}"] = float(rewards[side].mean())
                metrics[f"logp_{name}"] = float(logps[side].mean())
        if good.any() and not good.all():
            metrics["margin"] = metrics["reward_desirable"] - metrics["reward_undesirable"]
            metrics["accuracy"] = ranked(rewards[good] / self.beta, rewards[~good] / self.beta)
        return metrics


def _classes(groups: Sequence[Group]) -> tuple[int, int]:
    good = sum(group.label is True for group in groups)
    return good, len(groups) - good


def _apart(pair: Preference) -> tuple[Conversation, Conversation]:
    """Both sides; the answers that they share are judged in neither."""
    sides = (pair.chosen, pair.rejected)
    part = next(
        (
            index
            for index, both in enumerate(zip(*(side.messages for side in sides), strict=False))
            if both[0] != both[1]
        ),
        0,
    )

    def tail(side: Conversation) -> Conversation:
        silent = [
            replace(message, learn=False) if message.role == "assistant" else message
            for message in side.messages[:part]
        ]
        return replace(side, messages=(*silent, *side.messages[part:]))

    return tail(sides[0]), tail(sides[1])


def _desirable(example: Demonstration | Completion) -> Example:
    origin = {"source": example.source, "metadata": example.metadata}
    if isinstance(example, Demonstration):
        return Judged(example.conversation, True, **origin)
    return Completion(example.prompt, example.completion, True, **origin)
