"""Labels that a simple model of the other rows would not have given: rows to read, not a list of errors.

The model is a ridge regression on the words of a row (TF-IDF in 100 dimensions), and each row is judged by
the model fitted without it. It knows words, not truth; if it cannot predict labels better than chance, no row
is named."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tunesmith.auditing import features
from tunesmith.auditing.findings import Finding, FindingRow, counted
from tunesmith.auditing.registry import Rule, register
from tunesmith.auditing.rules.diversity import hashes
from tunesmith.auditing.views import Context, Survey, View

WORDS = 5_000
"""Words of a row that count, from its beginning."""
DIMENSIONS, PENALTY, NEIGHBOURS = 100, 1.0, 5
FEWEST, FEWEST_OF_LABEL = 30, 5
CLEAR = 0.6
"""The model predicts labels if the area under its ROC curve is above this with 97.5% confidence."""
SHARE, AT_LEAST = 0.02, 10
"""At most this share of the rows is named, or so many if that is more."""


class Skill(NamedTuple):
    """How well scores predict labels. ``area``: under the ROC curve, with the 95% interval ``low`` to
    ``high``. ``accuracy``: balanced, the mean over both labels."""

    area: float
    low: float
    high: float
    accuracy: float

    def __str__(self) -> str:
        return f"AUC {self.area:.2f}, {self.low:.2f}–{self.high:.2f}; balanced accuracy {self.accuracy:.0%}"


@register
class Labels(Rule):
    name = "labels"
    order = 110
    looks_at = "labels that a simple model of the other rows contradicts"
    findings: ClassVar = {
        "predictable": "whether words tell the label at all",
        "suspicious": "rows that read like the other label",
    }
    gravest: ClassVar = {"predictable": "note", "suspicious": "note"}
    drawn = True

    def look(self, view: View, context: Context) -> np.ndarray | None:
        return None if view.label is None else hashes(view.words[:WORDS])

    def judge(self, facts: list[np.ndarray | None], survey: Survey) -> Iterator[Finding]:
        rows = [row for row in survey.training if facts[row] is not None]
        labels = np.array([survey.labels[row] for row in rows], dtype=bool)
        rule, bar, rarer = "labels.predictable", f"AUC > {CLEAR} for sure", min(labels.sum(), (~labels).sum())
        if not rows:
            return
        if len(rows) < FEWEST or rarer < FEWEST_OF_LABEL:
            sentence = (
                f"{counted(len(rows))} with a label, {rarer} of the rarer one: too few to tell from them "
                f"which are suspicious"
            )
            yield Finding(rule, "note", sentence, of=len(rows))
            return
        table = _features([words for row in rows if (words := facts[row]) is not None])
        scores = leave_one_out(table, labels)
        skill = skill_of(scores, labels)
        if skill.low <= CLEAR:
            sentence = f"words predict the label poorly ({skill}): no row can be called suspicious"
            yield Finding(rule, "note", sentence, of=len(rows), value=skill.area)
            return
        sentence = f"words predict the labels of rows that the model was not fitted to ({skill})"
        yield Finding(rule, "good", sentence, of=len(rows), value=skill.area, threshold=bar)
        pairs = suspicious(table, scores, labels)
        if pairs:
            evidence = tuple(
                _evidence(survey, rows, place, other, abs(scores[place])) for place, other in pairs
            )
            yield Finding(
                "labels.suspicious",
                "note",
                f"{counted(len(pairs), len(rows))} that read like the other label",
                len(pairs),
                len(rows),
                rows=evidence,
                hint="read them: a wrong label, or words that mislead the model?",
            )


def _evidence(survey: Survey, rows: Sequence[int], place: int, other: int, margin: float) -> FindingRow:
    own, like = ("desirable", "undesirable") if survey.labels[rows[place]] else ("undesirable", "desirable")
    near = survey.sources[rows[other]]
    return FindingRow(
        survey.sources[rows[place]],
        f"{own}, reads like {like} (margin {margin:.2f}); see {near}, which is {like}",
    )


def _features(words: Sequence[np.ndarray]) -> np.ndarray:
    """(n, width) of TF-IDF, by singular value decomposition; words of a single row say nothing about others
    and are left out."""
    from scipy.sparse import csr_matrix

    _, columns = np.unique(np.concatenate(words), return_inverse=True)
    starts = np.cumsum([0, *map(len, words)])
    counts: Any = csr_matrix((np.ones(len(columns), dtype=np.float32), columns, starts))
    counts.sum_duplicates()
    counts = counts[:, np.bincount(counts.indices, minlength=counts.shape[1]) > 1]
    if not counts.nnz:
        return np.zeros((len(words), 1))
    return features.reduced(features.tfidf(counts), min(DIMENSIONS, *counts.shape)).astype(np.float64)


def leave_one_out(table: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Of each row the score, about −1 for False to 1 for True, that a ridge regression gives it that was
    fitted to all others.

    Both labels weigh the same in all. Exact without refitting: residual of the left out = residual ÷ (1 −
    leverage)."""
    target = np.where(labels, 1.0, -1.0)
    weight = len(labels) / 2 / np.where(labels, labels.sum(), (~labels).sum())
    penalty = np.diag([PENALTY] * table.shape[1] + [0.0])
    table = np.column_stack([table, np.ones(len(labels))])
    solved = np.linalg.solve((table.T * weight) @ table + penalty, table.T * weight)
    leverage = np.einsum("ij,ji->i", table, solved)
    return target - (target - table @ (solved @ target)) / (1 - leverage)


def skill_of(scores: np.ndarray, labels: np.ndarray) -> Skill:
    """With the interval of Hanley and McNeil (1982)."""
    # Without a row the others lean to the other label, so that no skill at all can come out below a half.
    area = max(0.5, _area(scores, labels))
    good, bad = int(labels.sum()), int((~labels).sum())
    both_good, both_bad = area / (2 - area), 2 * area**2 / (1 + area)
    spread = area * (1 - area) + (good - 1) * (both_good - area**2) + (bad - 1) * (both_bad - area**2)
    reach = 1.96 * (spread / good / bad) ** 0.5
    accuracy = ((scores[labels] > 0).mean() + (scores[~labels] <= 0).mean()) / 2
    return Skill(area, max(0.0, area - reach), min(1.0, area + reach), float(accuracy))


def _area(scores: np.ndarray, labels: np.ndarray) -> float:
    """The area under the ROC curve: how often a True row scores above a False row, ties counting half."""
    ordered = np.sort(scores[~labels])
    below = np.searchsorted(ordered, scores[labels], "left")
    up_to = np.searchsorted(ordered, scores[labels], "right")
    return float((below + up_to).sum() / 2 / len(ordered) / labels.sum())


def suspicious(table: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> list[tuple[int, int]]:
    """(place, place of the row of the other label most like it), most suspicious first.

    Rows that score beyond 0 and beyond the weakest tenth of the other label, and of whose nearest rows most
    have it."""
    most = max(AT_LEAST, int(SHARE * len(labels)))
    most_bad, most_good = np.quantile(scores[~labels], 0.9), np.quantile(scores[labels], 0.1)
    beyond = np.where(labels, scores < min(0.0, most_bad), scores > max(0.0, most_good))
    places = [place_near for place_near in np.argsort(-np.abs(scores), kind="stable") if beyond[place_near]][
        : 4 * most
    ]
    if not places:
        return []
    unit = features.unit(table)
    pairs: list[tuple[int, int]] = []
    for place in map(int, places):
        likeness = unit @ unit[place]
        likeness[place] = -np.inf
        near = np.sort(np.argpartition(-likeness, NEIGHBOURS)[:NEIGHBOURS])
        against = near[labels[near] != labels[place]]
        if len(against) > NEIGHBOURS / 2:
            pairs.append((place, int(against[likeness[against].argmax()])))
    return pairs[:most]
