"""In which order does the first epoch learn the rows? Of a curriculum from the easy ones to the hard ones, by
the loss of each row before training. (By length, preparation knows the order.)

Later epochs are shuffled: a curriculum begins with the easy rows and ends with the distribution itself
(Bengio et al., "Curriculum Learning", ICML 2009)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from tunesmith.errors import TrainingError
from tunesmith.events import Notice, Sink
from tunesmith.machine.ranks import Ranks
from tunesmith.model.loading import Loaded
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import DIFFICULTY
from tunesmith.tokens.batches import Cut, Group
from tunesmith.training import reference
from tunesmith.training.preparation import Prepared
from tunesmith.training.reference import Reference


def measured(
    prepared: Prepared,
    config: RunConfig,
    loaded: Loaded,
    *,
    folder: Path | None,
    among: Ranks,
    stopped: Callable[[], bool],
    notify: Sink,
) -> Prepared:
    """``prepared`` with its first epoch from the row of the lowest loss to that of the highest, by the model
    as it is now. Values come from the run's ``folder`` or the cache of references, or are measured."""
    groups = judged(prepared)
    cut = Cut.forward(config.batch, groups)
    own = None if folder is None else folder / DIFFICULTY
    facts = reference.facts(config, loaded)
    losses = reference.measure(
        loaded.net,
        groups,
        cut,
        reference.name(facts),
        own=own,
        earlier=reference.earlier_names(facts),
        ranks=among,
        stopped=stopped,
        notify=notify,
    )
    notify(Notice(f"difficulty: {losses.measured:,} sequences measured, {losses.cached:,} cached"))
    return _by_difficulty(prepared, losses)


def recorded(prepared: Prepared, folder: Path) -> Prepared:
    """``prepared`` in the order of the run in ``folder``, which has recorded the difficulties. Raises
    TrainingError if it has not."""
    losses = Reference(None)
    problem = losses.read(folder / DIFFICULTY)
    if problem is not None or not losses.values:
        hint = "restore it from a copy of the run"
        raise TrainingError(problem or "is missing", where=str(folder / DIFFICULTY), hint=hint)
    return _by_difficulty(prepared, losses)


def assumed(prepared: Prepared, config: RunConfig) -> Prepared:
    """``prepared`` in the order that is planned for. Difficulties are not known before the run measures them:
    until then the longest rows are taken for the hardest, so that they are learned together, which needs most
    memory."""
    if config.data.order != "difficulty" or prepared.plan.first_epoch is not None:
        return prepared
    return _easy_first(prepared, prepared.plan.lengths)


def count(prepared: Prepared) -> int:
    """How many sequences are measured, each once."""
    return len({group.sequences[0].digest for group in judged(prepared)})


def judged(prepared: Prepared) -> list[Group]:
    """The sequence of each row by which its difficulty is judged: of a pair the chosen answer."""
    return [group._replace(sequences=group.sequences[:1]) for group in prepared.train]


def _by_difficulty(prepared: Prepared, losses: Reference) -> Prepared:
    """Difficulty is the loss in nats a learned token."""
    difficulties = [
        -group.reference[0] / group.learned[0] if group.learned[0] > 0 else 0.0
        for group in losses.fill(judged(prepared))
    ]
    return _easy_first(prepared, difficulties)


def _easy_first(prepared: Prepared, difficulties: Sequence[float]) -> Prepared:
    plan = prepared.plan.easy_first(difficulties)
    counts = prepared.counts | {"padding_share": round(plan.padding_share(), 4)}
    return replace(prepared, plan=plan, counts=counts)
