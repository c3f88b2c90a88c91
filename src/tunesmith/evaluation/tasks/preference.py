"""Does the tuned model tell good answers from bad ones better than the base did?

r = log p(answer | prompt) by the tuned model − the same by the base, in nats over the learned tokens: what
KTO and DPO call the reward, without β. ``accuracy``: the share of pairs of a good and a bad answer in which
the good one has the larger r; over the given pairs, or over all combinations if rows are labelled singly
(Mann and Whitney 1947). A model that was not trained has 0.5. ``ratio_margin``: mean r of the good answers
less mean r of the bad ones. Intervals: bootstrap over the sources of good and of bad rows separately, widened
for the kind with fewer sources; if the good rows win always or never, the exact binomial interval of that
kind's number.

The base is the model without any adapter, also if training continued from an adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from tunesmith.data import formats
from tunesmith.data.formats import Dropped
from tunesmith.evaluation.statistics import (
    ALIKE,
    ALIKE_SHARE,
    BOOTSTRAP,
    ONE,
    RESAMPLES,
    TAIL,
    Statistic,
    edges,
    inverted,
    mcnemar,
)
from tunesmith.evaluation.subject import Subject
from tunesmith.evaluation.suites import require_finite
from tunesmith.evaluation.tasks import ExamplePair, Material, Meaning, Pairing, Task, digest, register
from tunesmith.events import Notice
from tunesmith.learning.objective import won
from tunesmith.learning.objectives.dpo import DPO
from tunesmith.learning.objectives.kto import KTO
from tunesmith.runs.records import Better, ExampleScore, Score
from tunesmith.tokens import template
from tunesmith.tokens.batches import Group

NAME, VERSION = "preference", "1"
CHANCE = {"accuracy": 0.5, "ratio_margin": 0.0, "ratio_good": 0.0, "ratio_bad": 0.0}
"""The base's own scores."""
BETTER: dict[str, Better] = {"accuracy": "higher", "ratio_margin": "higher"}


@dataclass(frozen=True, slots=True)
class AnswerRatio:
    """One answer. ``base``, ``tuned``: log p. ``pair``: number of its pair, None if it is labelled singly."""

    source: str
    good: bool
    base: float
    tuned: float
    tokens: float
    pair: int | None = None

    @property
    def ratio(self) -> float:
        return self.tuned - self.base


def _gain(score: ExampleScore) -> float:
    """r, for which more is better: of a bad answer with the sign changed."""
    return score.value if score.detail["good"] else -score.value


def between_runs(pairs: Sequence[ExamplePair], seed: int) -> list[Score]:
    """Accuracy and margin of the second run less those of the first, both from the same draws of the good and
    of the bad answers; the values are r = tuned − base of each run."""
    good, bad = ([pair for pair in pairs if pair[0].detail["good"] is kind] for kind in (True, False))
    if not good or not bad:
        return []
    numbered = all(pair[0].detail["pair"] is not None for pair in pairs) and len(good) == len(bad)
    if numbered:
        good, bad = (
            sorted(kind, key=lambda pair: float(str(pair[0].detail["pair"]))) for kind in (good, bad)
        )
    rng = np.random.default_rng(seed)
    up, n_good = _weights([first.source for first, _ in good], rng)
    down, n_bad = (up, n_good) if numbered else _weights([first.source for first, _ in bad], rng)
    shares, margins, places = [], [], []
    for run in (1, 0):  # the second run is the one that is judged, as tuned is beside base
        of_good, of_bad = (np.array([pair[run].value for pair in kind]) for kind in (good, bad))
        wins = won(of_good - of_bad) if numbered else won(of_good[:, None] - of_bad[None, :])
        total = up.sum(axis=1) if numbered else up.sum(axis=1) * down.sum(axis=1)
        shares.append((up @ wins if numbered else (up @ wins * down).sum(axis=1)) / total)
        margins.append(up @ of_good / up.sum(axis=1) - down @ of_bad / down.sum(axis=1))
        places.append(wins if numbered else wins.mean(axis=1))
    moved = places[0] - places[1]
    counts = int((moved > 0).sum()), int((moved == 0).sum()), int((moved < 0).sum())
    n, fewest = n_good if numbered else n_good + n_bad, min(n_good, n_bad)
    accuracy = _difference("accuracy", *shares, n=n, fewest=fewest)
    return [replace(accuracy, sources=counts), _difference("ratio_margin", *margins, n=n, fewest=fewest)]


def _difference(name: str, second: np.ndarray, first: np.ndarray, n: int, fewest: int) -> Score:
    """The score of ``name``. ``second``, ``first``: (1 + RESAMPLES,) of each run, the data as they are
    first."""
    delta = second - first
    (low, high), (delta_low, delta_high) = (
        (None, None) if fewest == 1 else np.quantile(values[1:], edges(fewest)).tolist()
        for values in (second, delta)
    )
    p = None if fewest == 1 else inverted(delta[1:], fewest)
    return Score(
        NAME,
        VERSION,
        name,
        float(second[0]),
        low,
        high,
        n,
        float(delta[0]),
        delta_low,
        delta_high,
        ONE if fewest == 1 else f"difference: {ALIKE}" if np.ptp(delta) == 0 else None,
        better="higher",
        headline=name == "accuracy",
        unit="%" if name == "accuracy" else "nats",
        p=p,
        test=None if p is None else BOOTSTRAP,
    )


class Preferred(Task[tuple[float, float]]):
    """Measured: (log p in nats, learned tokens) of each answer. A side's ``value`` is log p: r is the
    difference of the sides."""

    name, version = NAME, VERSION
    needs_base = True
    question, rank = "task", 2
    title, asks, asks_rows = "Good answers preferred", "rows labelled good and bad, or pairs", True
    meanings = (
        Meaning(
            "accuracy",
            "Good answers preferred",
            "of a good and a bad answer, how often the good one gained more over the base; 50 % is chance",
        ),
        Meaning(
            "ratio_margin",
            "Preference margin",
            "mean gain in log-probability over the base, of good answers less of bad ones",
        ),
        Meaning("ratio_good", "Gain of good answers", "mean gain in log-probability over the base"),
        Meaning("ratio_bad", "Gain of bad answers", "mean gain in log-probability over the base"),
    )
    pairing = Pairing(True, Statistic("ratio", _gain, better="higher", unit="nats"), between_runs)

    def __init__(self, groups: Sequence[Group]) -> None:
        self._groups = groups
        self._facts = [
            (
                group.source,
                place == 0 if len(group.sequences) == 2 else group.label is True,
                index if len(group.sequences) == 2 else None,
            )
            for index, group in enumerate(groups)
            for place in range(len(group.sequences))
        ]

    @property
    def identity(self) -> str:
        parts = [
            [fact, tokens.ids.tolist(), tokens.targets.tolist()]
            for fact, tokens in zip(self._facts, self._tokens, strict=True)
        ]
        return digest(parts)

    @property
    def _tokens(self) -> list[template.Tokens]:
        return [tokens for group in self._groups for tokens in group.sequences]

    def measure(self, subject: Subject) -> list[tuple[float, float]]:
        return [pair for group in subject.logps(self._groups, "answers compared") for pair in group]

    def score(self, items: Sequence[tuple[float, float]]) -> list[ExampleScore]:
        require_finite(
            self.name, [(fact[0], logp) for fact, (logp, _) in zip(self._facts, items, strict=True)]
        )
        return [
            ExampleScore(source, logp, 1.0, {"good": good, "pair": pair, "tokens": tokens})
            for (source, good, pair), (logp, tokens) in zip(self._facts, items, strict=True)
        ]

    def summarise(
        self, base: Sequence[ExampleScore] | None, tuned: Sequence[ExampleScore], seed: int
    ) -> list[Score]:
        items = [
            AnswerRatio(source, good, before.value, after.value, float(str(after.detail["tokens"])), pair)
            for (source, good, pair), before, after in zip(self._facts, base or (), tuned, strict=True)
        ]
        return scores(items, seed)


@register(Preferred)
def build(material: Material) -> list[Preferred]:
    """The pairs, or the labelled rows if there are more of them; none if good or bad answers are missing. A
    notice counts what is left out."""
    long = "drop" if material.template.too_long == "refuse" else material.template.too_long
    spec = material.template.model_copy(update={"prompt_weight": 0.0, "too_long": long})
    candidates: list[tuple[list[Group], list[Dropped]]] = [([], [])]
    for objective in (DPO(), KTO(unlabelled="leave_out")):
        rendered = template.render(
            objective.select(material.everything).examples, material.renderer, spec, material.batch.length
        )
        groups = objective.groups(rendered.rows)
        both = {flag for group in groups for flag in objective.imitated(group)} == {True, False}
        candidates.append((groups if both else [], rendered.dropped))
    groups, dropped = max(candidates, key=lambda candidate: len(candidate[0]))
    notify = material.notify
    for row in dropped:
        notify(Notice(f"preference: not measured: {row.message}", level="warning", where=row.source))
    if passed := sum(len(others) for others, _ in candidates) - len(groups):
        text = "labelled rows" if groups[0].label is not None else "pairs"
        notify(
            Notice(f"preference: only {text} are compared, the others are not", level="warning", count=passed)
        )
    if not groups and any(
        isinstance(example, formats.Preference | formats.Judged) for example in material.everything
    ):
        notify(Notice("preference: it needs good and bad answers: not measured"))
    return [Preferred(groups)] if groups else []


def scores(items: Sequence[AnswerRatio], seed: int) -> list[Score]:
    """accuracy, margin and the mean r of good and of bad, with 95 % intervals; none if a kind is missing."""
    good = np.array([item.ratio for item in items if item.good])
    bad = np.array([item.ratio for item in items if not item.good])
    if not len(good) or not len(bad):
        return []
    paired = all(item.pair is not None for item in items) and len(good) == len(bad)
    rng = np.random.default_rng(seed)
    up, n_good = _draws([item.source for item in items if item.good], rng)
    down, n_bad = (up, 0) if paired else _draws([item.source for item in items if not item.good], rng)
    wins = won(good - bad) if paired else won(good[:, None] - bad[None, :])
    shares = (
        up @ wins / up.sum(axis=1)
        if paired
        else (up @ wins * down).sum(axis=1) / (up.sum(axis=1) * down.sum(axis=1))
    )
    means = up @ good / up.sum(axis=1), down @ bad / down.sum(axis=1)
    numbers = {
        "accuracy": (wins.mean(), shares),
        "ratio_margin": (good.mean() - bad.mean(), means[0] - means[1]),
        "ratio_good": (good.mean(), means[0]),
        "ratio_bad": (bad.mean(), means[1]),
    }
    made: list[Score] = []
    fewest = n_good if paired else min(n_good, n_bad)
    cuts = edges(fewest) if fewest > 1 else (TAIL, 1 - TAIL)
    for name, (value, draws) in numbers.items():
        low, high = (float(edge) for edge in np.quantile(draws, cuts))
        note = None if fewest > 1 else "one row of a kind: its chance is not in the interval"
        if name == "accuracy" and value in (0.0, 1.0):  # a bootstrap only sees ties
            edge, note = TAIL ** (1 / fewest), ALIKE_SHARE
            low, high = (edge, 1.0) if value else (0.0, 1 - edge)
        base, n = CHANCE[name], n_good + n_bad
        better = BETTER.get(name)
        p = inverted(draws - base, fewest) if better and fewest > 1 else None
        if p is not None and note == ALIKE_SHARE:
            p = max(p, mcnemar(fewest, 0))  # the test whose interval it has
        made.append(
            Score(
                NAME,
                VERSION,
                name,
                float(value),
                low,
                high,
                n,
                float(value) - base,
                low - base,
                high - base,
                note,
                better=better,
                headline=name == "accuracy",
                unit="%" if name == "accuracy" else "nats",
                p=p,
                test=None if p is None else BOOTSTRAP,
            )
        )
    return made


def _draws(sources: Sequence[str], rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(RESAMPLES, rows) how often each row is in each resample of the sources, and how many sources there
    are."""
    names, source_of = np.unique(np.array(sources), return_inverse=True)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=RESAMPLES)
    return counts[:, source_of].astype(np.float64), len(names)


def _weights(sources: Sequence[str], rng: np.random.Generator) -> tuple[np.ndarray, int]:
    """(1 + RESAMPLES, rows): ones, then the `_draws`; and how many sources there are."""
    draws, n = _draws(sources, rng)
    return np.concatenate([np.ones((1, len(sources))), draws]), n
