"""What objectives on preferences share: two answers to one prompt, one of them chosen; and what is
watched."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import ClassVar, Literal

import mlx.core as mx
import numpy as np
from pydantic import Field

from tunesmith.data.formats import Example, Judged, Preference
from tunesmith.errors import DataError
from tunesmith.learning.objective import Objective, Selected, won
from tunesmith.tokens.batches import Group
from tunesmith.tokens.template import Row


class Preferring(Objective):
    """Abstract: learns from pairs of answers to the same prompt."""

    judged: Literal["leave_out", "pair"] = Field(
        default="leave_out",
        description="labelled rows: left out, or a desirable and an undesirable answer to the same prompt "
        "taken as a pair",
        json_schema_extra={"when": "pair if the data has labelled rows and several answers to one prompt"},
    )
    beta: float
    unit: ClassVar[str] = "a pair"
    watched: ClassVar[tuple[str, ...]] = (
        "reward_chosen",
        "reward_rejected",
        "margin",
        "accuracy",
        "logp_chosen",
        "logp_rejected",
    )

    def select(self, examples: Sequence[Example]) -> Selected:
        pairs: list[Example] = [example for example in examples if isinstance(example, Preference)]
        made, used = _pairs(examples) if self.judged == "pair" else ([], set())
        reason = (
            "no pair"
            if self.judged == "pair"
            else "no pair (objective.judged=pair looks for pairs among labelled rows)"
        )
        left: list[tuple[Example, str]] = [
            (example, reason)
            for example in examples
            if not isinstance(example, Preference) and id(example) not in used
        ]
        notes = Counter({"a desirable and an undesirable answer to one prompt taken as a pair": len(made)})
        return Selected([*pairs, *made], left, +notes)

    def groups(self, rows: Sequence[Row]) -> list[Group]:
        sides = zip(rows[::2], rows[1::2], strict=True)
        return [Group((chosen.tokens, rejected.tokens), chosen.source) for chosen, rejected in sides]

    def require(self, groups: Sequence[Group], seen: Sequence[Example]) -> None:
        if groups:
            return
        judged = sum(isinstance(example, Judged) for example in seen)
        hint = "give rows with chosen and rejected"
        if judged:
            hint += "; objective=kto learns from labelled rows as they are, "
            hint += "objective.judged=pair looks for pairs among them"
        message = f"{type(self).__name__} needs pairs of a chosen and a rejected answer, "
        message += f"there are none in {len(seen)} rows to train on"
        raise DataError(message, where="objective", hint=hint)

    def fields(self, groups: Sequence[Group], baseline: float) -> np.ndarray:
        """(S, 2): the reference's log p (0 without one), and the number of learned tokens."""
        references = [group.reference or (0.0, 0.0) for group in groups]
        return np.stack(
            [np.concatenate(references), np.concatenate([group.learned for group in groups])], axis=1
        )

    def imitated(self, group: Group) -> tuple[bool, ...]:
        return (True, False)

    def rewards(self, logps: np.ndarray, groups: Sequence[Group]) -> np.ndarray:
        """(S,) what each answer earns: β times its log-ratio to the reference."""
        return self.beta * (logps - np.concatenate([group.reference for group in groups]))

    def metrics(self, groups: Sequence[Group], logps: np.ndarray) -> dict[str, float]:
        if not groups:
            return {}
        chosen, rejected = self.rewards(logps, groups).reshape(-1, 2).T
        likely = logps.reshape(-1, 2).mean(axis=0)
        return {
            "reward_chosen": float(chosen.mean()),
            "reward_rejected": float(rejected.mean()),
            "margin": float((chosen - rejected).mean()),
            "accuracy": float(won((chosen - rejected) / self.beta).mean()),
            "logp_chosen": float(likely[0]),
            "logp_rejected": float(likely[1]),
        }


def sides(values: mx.array) -> tuple[mx.array, mx.array]:
    """(S,) → chosen (P,), rejected (P,)"""
    both = values.reshape(-1, 2)
    return both[:, 0], both[:, 1]


def per_token(sums: mx.array, lengths: mx.array) -> mx.array:
    """Means over learned tokens; 0 where there are none."""
    return sums / mx.maximum(lengths, 1)


def _pairs(examples: Sequence[Example]) -> tuple[list[Preference], set[int]]:
    """Of each prompt the first desirable answer with the first undesirable one, and so on; and which examples
    went into them."""
    waiting: dict[str, tuple[list[Judged], list[Judged]]] = defaultdict(lambda: ([], []))
    for example in examples:
        if isinstance(example, Judged):
            prompt = repr((example.conversation.messages[:-1], example.conversation.tools))
            waiting[prompt][example.desirable].append(example)
    made, used = [], set()
    for bad, good in waiting.values():
        for chosen, rejected in zip(good, bad, strict=False):
            if chosen.conversation != rejected.conversation:
                made.append(
                    Preference(
                        chosen.conversation,
                        rejected.conversation,
                        source=chosen.source,
                        metadata=chosen.metadata,
                    )
                )
                used |= {id(chosen), id(rejected)}
    return made, used
