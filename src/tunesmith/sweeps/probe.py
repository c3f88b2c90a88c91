"""Which learning rate? A short ladder of rates, from the same start on the same rows in the same order.

Successive halving (Jamieson and Talwalkar 2016, arXiv 1502.07943): all rates train for a few updates, the
better half by the loss of the same held-out rows trains on, until two are left. A rate whose loss is not
finite, or more than twice both that before training and that of the lowest rate on the same rows, is stopped
at once. The two finalists are compared row by row: if the interval of their difference holds zero, no
difference is shown, and the smaller is taken.

The rate is constant after the warm-up: a schedule that falls within so few updates would favour rates that
are too high for the run. The interval covers the rows, not the seed, and says nothing of the rates that were
dropped before."""

from __future__ import annotations

import math
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from markupsafe import Markup
from mlx.utils import tree_unflatten
from safetensors.numpy import load_file, save_file

from tunesmith import events
from tunesmith.adapters.layers import trainable
from tunesmith.display import charts, notebook
from tunesmith.display.charts import Line
from tunesmith.display.notebook import NotebookResult
from tunesmith.errors import ConfigError, TrainingError
from tunesmith.evaluation.statistics import edges, resampled
from tunesmith.events import Event, HeldOutLosses, Notice, Sink
from tunesmith.files import draft, write_json
from tunesmith.learning import optimizer
from tunesmith.machine.ranks import ONE, join
from tunesmith.runs import lineage
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import CONFIG, name, require_free
from tunesmith.settings.config import JSON, Resolved, dump
from tunesmith.sweeps import probe_figure
from tunesmith.tokens.batches import Plan
from tunesmith.training import gradients, preparation, reference, story
from tunesmith.training.preparation import Prepared
from tunesmith.training.updates import Updates
from tunesmith.training.validation import Validation

SHARE = 0.1
"""Updates of a probe, as a share of the updates that are planned."""
RUNGS = 3
"""Steps of the default ladder to each side of the settings' rate; three make a factor of ten."""
EVALUATED = 1 / 3
"""Share of the work that goes into the held-out rows. One costs a third of what it costs to train on it."""
FEWEST_UPDATES, FEWEST_ROWS = 2, 8
"""Of a rate in one round, and of held-out rows."""
ENOUGH_UPDATES = 20
"""With fewer updates of the finalists the result is called rough."""
WORSE = 2.0
"""A rate has diverged if its loss is more than so many times the usual one: that before training, and that of
the lowest rate on the same rows."""
SUMMARY, PICTURE = "probe.json", "probe.png"
STYLES = ("line", "dash", "dot")


class Halving(NamedTuple):
    """``sizes``: rates in each round. ``updates``: of each rate in each round. ``rows``: held-out rows."""

    sizes: tuple[int, ...]
    updates: tuple[int, ...]
    rows: int

    @property
    def total(self) -> int:
        """Updates of all rates, if none diverges."""
        return sum(size * updates for size, updates in zip(self.sizes, self.updates, strict=True))


@dataclass
class RateTrial:
    """One rate of the ladder. ``losses``: of its updates. ``held_out``: (updates, loss) at the end of each
    round. ``status``: training, dropped, diverged or finalist."""

    rate: float
    losses: list[float] = field(default_factory=list)
    held_out: list[tuple[int, float]] = field(default_factory=list)
    status: str = "training"
    rows: HeldOutLosses | None = None

    @property
    def updates(self) -> int:
        return len(self.losses)


@dataclass(frozen=True, slots=True)
class RateFinding(NotebookResult):
    """The result of a probe. ``difference``: held-out loss with ``rate`` less that with ``runner_up``, and
    its 95 % interval; None without a runner-up, or with a single row. ``before``: held-out loss before
    training."""

    rate: float
    runner_up: float | None
    difference: float | None
    low: float | None
    high: float | None
    shown: bool
    sentence: str
    notes: tuple[str, ...]
    before: float
    trials: tuple[RateTrial, ...]
    rows: int
    updates: int
    planned: int
    seconds: float
    folder: Path | None = None

    def json(self) -> dict[str, JSON]:
        """For ``--json`` and the file."""
        values: dict[str, Any] = asdict(self) | {"folder": self.folder and str(self.folder)}
        values["trials"] = [
            {
                "rate": trial.rate,
                "status": trial.status,
                "updates": trial.updates,
                "losses": [loss if math.isfinite(loss) else None for loss in trial.losses],
                "held_out": [list(point) for point in trial.held_out],
            }
            for trial in self.trials
        ]
        return values


def _cell(finding: RateFinding) -> Markup:
    """What a notebook shows: the result, the rates, the loss of each update."""
    rows = [
        (
            "→" if trial.rate == finding.rate else "",
            f"{trial.rate:.2g}",
            trial.updates,
            f"{trial.held_out[-1][1]:.4f}" if trial.held_out else "–",
            trial.status,
        )
        for trial in finding.trials
    ]
    curves = [
        Line(f"{trial.rate:.2g}", range(1, trial.updates + 1), trial.losses, STYLES[place % 3], place % 5)
        for place, trial in enumerate(finding.trials)
    ]
    parts = [notebook.verdict(finding.sentence, "good" if finding.shown else "note")]
    parts += [Markup("<p>{}</p>").format(note) for note in finding.notes]
    parts.append(notebook.table(["", "rate", "updates", "held-out loss", ""], rows, numbers=(1, 2, 3)))
    parts.append(charts.lines("Loss of each update, by rate", curves, x="update"))
    return Markup("").join(parts)


notebook.register(RateFinding, _cell)


def probe(
    config: Resolved[RunConfig],
    *,
    rates: Sequence[float] = (),
    updates: int | None = None,
    out: str | Path | None = None,
    notify: Sink = events.silent,
) -> RateFinding:
    """Find the learning rate for ``config``, and write what was measured to a folder.

    rates: the ladder (default: up to seven around the settings' rate, from a tenth to ten times it).
    updates: of all rates together (default: a tenth of those that are planned). out: the new folder (default
    ``probes/<day>-<model>-…``). Raises ConfigError if there are no held-out rows or too few updates,
    TrainingError if every rate diverges."""
    started = time.perf_counter()
    spec = lineage.anchored(config.spec)
    folder = Path(out) if out is not None else Path("probes") / name(spec, date.today())
    require_free(folder)
    if join(notify).size > 1:
        raise ConfigError("a probe runs in one process", hint="start it without mlx.launch")
    for text in (*config.unused, *config.notes):
        notify(Notice(text))
    if spec.data.order == "difficulty":
        notify(Notice("the probe shuffles the rows: their difficulty is not measured", where="data.order"))
    prepared = preparation.prepare(spec, notify)
    if not prepared.valid:
        hint = "hold some out: 0.1 is usual"
        raise ConfigError("there are no held-out rows", where="data.valid", hint=hint)
    planned = prepared.plan.steps
    ladder, halving = _ladder(spec, prepared, rates, updates)
    model = story.open_model(spec, prepared.train, notify)
    prepared = _shortened(prepared, halving)
    if prepared.objective.needs_reference:
        prepared = reference.compared(
            prepared, model.config, model.loaded, own=None, among=ONE, stopped=lambda: False, notify=notify
        )
    with tempfile.TemporaryDirectory(prefix="tunesmith-probe-") as states:
        settings = _constant(model.config, planned, halving)
        race = _Race(model.net, settings, prepared, halving, Path(states), notify)
        trials = [RateTrial(rate) for rate in ladder]
        finalists = race.run(trials)
    finding = _compared(finalists, trials, race.before, halving, planned, time.perf_counter() - started)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with draft(folder) as temporary:
        temporary.mkdir()
        (temporary / CONFIG).write_text(dump(spec), encoding="utf-8")
        write_json(temporary / SUMMARY, finding.json())
        probe_figure.draw(finding.trials, finding.rate, finding.before, temporary / PICTURE)
    return replace(finding, folder=folder)


def _ladder(
    spec: RunConfig, prepared: Prepared, rates: Sequence[float], updates: int | None
) -> tuple[list[float], Halving]:
    """The rates, lowest first, and the rounds: of the default ladder as many as the updates are enough for.

    Raises ConfigError."""
    total = updates or math.ceil(SHARE * prepared.plan.steps)
    given = sorted(set(rates))
    if given and (len(given) < 2 or given[0] <= 0 or not all(map(math.isfinite, given))):
        raise ConfigError("needs two rates or more, above zero and finite", where="--rates")
    middle = spec.optimizer.learning_rate
    choices = [given] if given else [_around(middle, count) for count in (7, 5, 3)]
    for ladder in choices:
        if (halving := _halving(len(ladder), total, prepared)) is not None:
            return ladder, halving
    fewest = _fewest(len(choices[-1]))
    text = f"{total} updates are too few to tell {len(choices[-1])} rates apart"
    text += "" if updates else f" (a tenth of the {prepared.plan.steps} that are planned)"
    raise ConfigError(text, where="--updates", hint=f"give --updates {fewest} or more")


def _around(middle: float, count: int) -> list[float]:
    """``count`` rates around ``middle``, three to a factor of ten, with two digits."""
    exponents = [(index - count // 2) / RUNGS for index in range(count)]
    return [float(f"{middle * 10**exponent:.2g}") for exponent in exponents]


def _sizes(count: int) -> tuple[int, ...]:
    """Rates in each round, from ``count`` to two."""
    sizes = [count]
    while sizes[-1] > 2:
        sizes.append(math.ceil(sizes[-1] / 2))
    return tuple(sizes)


def _halving(count: int, total: int, prepared: Prepared) -> Halving | None:
    """The rounds of ``count`` rates within ``total`` updates, or None if they are too few."""
    sizes = _sizes(count)
    trained = total * (1 - EVALUATED) / len(sizes)
    updates = tuple(int(trained / size) for size in sizes)
    if updates[0] < FEWEST_UPDATES:
        return None
    passes = sum(sizes) + 1  # one before training
    rows = int(total * EVALUATED * 3 * prepared.plan.sequences / passes)
    return Halving(sizes, updates, min(len(prepared.valid), max(FEWEST_ROWS, rows)))


def _fewest(count: int) -> int:
    """Updates that are enough for ``count`` rates."""
    sizes = _sizes(count)
    return math.ceil(FEWEST_UPDATES * count * len(sizes) / (1 - EVALUATED))


def _shortened(prepared: Prepared, halving: Halving) -> Prepared:
    """With the plan of a finalist's updates, and held-out rows spread evenly over all of them."""
    plan: Plan = replace(prepared.plan, max_steps=sum(halving.updates))
    places = np.linspace(0, len(prepared.valid) - 1, halving.rows).round().astype(int)
    return replace(prepared, plan=plan, valid=[prepared.valid[place] for place in dict.fromkeys(places)])


class _Race:
    """Trains the rates of a ladder in turn. ``states``: a folder for their adapters and optimizers."""

    def __init__(
        self,
        net: nn.Module,
        spec: RunConfig,
        prepared: Prepared,
        halving: Halving,
        states: Path,
        notify: Sink,
    ) -> None:
        self._net, self._spec, self._prepared, self._halving = net, spec, prepared, halving
        self._states, self._done = states, 0
        self._tick = events.ticker(notify, "probing")
        self._tokens: int | None = None
        self._start = {key: np.array(value) for key, value in trainable(net).items()}
        self.before = math.inf
        start = RateTrial(0.0)
        self._measure(start)
        if not start.held_out:
            message = "the loss of the held-out rows is not finite before the first update"
            raise TrainingError(message, where="model.dtype", hint="try model.dtype=float32")
        self.before = start.held_out[-1][1]

    def run(self, trials: Sequence[RateTrial]) -> list[RateTrial]:
        """The rates that are left after the last round, the best first; their status is set. Raises
        TrainingError if all have diverged."""
        running = list(trials)
        for number, count in enumerate(self._halving.updates):
            running.sort(key=lambda trial: trial.rate)
            for trial in running:
                if self._train(trial, count, running[0]):
                    self._measure(trial)
            running = [trial for trial in running if trial.status != "diverged"]
            if not running:
                hint = "lower optimizer.learning_rate, or look at the rows: tunesmith audit"
                raise TrainingError("every rate diverged", where="optimizer.learning_rate", hint=hint)
            running.sort(key=lambda trial: trial.held_out[-1][1])
            last = number + 1 == len(self._halving.sizes)
            left = len(running) if last else self._halving.sizes[number + 1]
            for trial in running[left:]:
                trial.status = "dropped"
            running = running[:left]
        for trial in running:
            trial.status = "finalist"
        return running

    def _train(self, trial: RateTrial, count: int, lowest: RateTrial) -> bool:
        """Make the next ``count`` updates of ``trial`` and keep its state; or False if it diverges. lowest:
        the lowest rate of the round, which trains first."""
        spec = _with_rate(self._spec, trial.rate)
        state = self._restored(trial, spec)
        heard: list[Event] = []
        updates = Updates(self._net, spec, self._prepared, state, heard.append, threading.Event(), ONE, None)
        cursor = Cursor(step=trial.updates, tokens=self._tokens)
        with gradients.checkpointed(self._net) if spec.loop.checkpoint_gradients else nullcontext():
            if self._done == 0:
                updates.accumulation.probe(cursor)
            for _ in range(count):
                trial.losses.append(_made(updates, cursor, heard))
                self._done += 1
                self._tick(self._done, self._halving.total)
                if _has_diverged(trial, lowest):
                    trial.status = "diverged"
                    return False
        self._tokens = cursor.tokens
        adapter = {key: np.array(value) for key, value in trainable(self._net).items()}
        save_file(adapter, self._file(trial, "adapter"))
        save_file(optimizer.state(state), self._file(trial, "optimizer"))
        return True

    def _measure(self, trial: RateTrial) -> None:
        """Add the loss of the held-out rows with the adapter that is in the model, unless it shows that the
        rate has diverged."""
        heard: list[Event] = []
        validation = Validation(self._net, self._spec, self._prepared, ONE, heard.append)
        loss = validation.held_out(Cursor(tokens=self._tokens)).loss
        if not math.isfinite(loss) or loss > WORSE * self.before:
            trial.status = "diverged"
            return
        trial.held_out.append((trial.updates, loss))
        trial.rows = next(event for event in heard if isinstance(event, HeldOutLosses))

    def _restored(self, trial: RateTrial, spec: RunConfig) -> Any:
        """Put the adapter of ``trial`` into the model; returns its optimizer."""
        tensors = load_file(self._file(trial, "adapter")) if trial.updates else self._start
        self._net.update(tree_unflatten([(key, mx.array(value)) for key, value in tensors.items()]))
        state = optimizer.build(spec.optimizer, self._net)
        if trial.updates:
            optimizer.restore(state, load_file(self._file(trial, "optimizer")))
        return state

    def _file(self, trial: RateTrial, part: str) -> Path:
        return self._states / f"{trial.rate!r}-{part}.safetensors"


def _made(updates: Updates, cursor: Cursor, heard: list[Event]) -> float:
    """The loss of the next update; infinite if it was skipped because it is not finite."""
    heard.clear()
    updates.make(cursor.step, cursor)
    cursor.step += 1
    return next((event.loss for event in heard if isinstance(event, events.StepDone)), math.inf)


def _has_diverged(trial: RateTrial, lowest: RateTrial) -> bool:
    """Whether the last loss is not finite, or far above both the loss before training and that of the lowest
    rate on the same rows."""
    loss, place = trial.losses[-1], len(trial.losses) - 1
    usual = max(trial.losses[0], lowest.losses[place] if place < len(lowest.losses) else 0.0)
    return not math.isfinite(loss) or loss > WORSE * usual


def _constant(spec: RunConfig, planned: int, halving: Halving) -> RunConfig:
    """With a constant rate after a warm-up of at most a third of a finalist's updates, and without what is
    measured beside the loss. Steps are not compiled: each rate has few of them."""
    warmup = min(spec.optimizer.warmup(planned), sum(halving.updates) // 3)
    schedule = {"schedule": "constant", "warmup_steps": warmup, "warmup_share": None}
    loop = {"instrument_every": 0, "scored_prompts": 0, "best": "loss"}
    loop |= {"compile": False, "cache_frozen": False}
    return spec.model_copy(
        update={
            "optimizer": spec.optimizer.model_copy(update=schedule),
            "loop": spec.loop.model_copy(update=loop),
        }
    )


def _with_rate(spec: RunConfig, rate: float) -> RunConfig:
    chosen = spec.optimizer.model_copy(update={"learning_rate": rate})
    return spec.model_copy(update={"optimizer": chosen})


def paired(first: HeldOutLosses, second: HeldOutLosses) -> tuple[float, float | None, float | None]:
    """Mean loss of ``first`` less that of ``second`` on the same rows, and its 95 % interval (None with a
    single row)."""
    rows = sorted(first.losses.keys() & second.losses.keys())
    sums = np.array(
        [[(side.losses[row] * side.units[row], side.units[row]) for row in rows] for side in (first, second)]
    )
    means = sums[..., 0].sum(axis=1) / sums[..., 1].sum(axis=1)
    difference = float(means[0] - means[1])
    if len(rows) < 2:
        return difference, None, None
    drawn = resampled(sums, seed=0)
    values = drawn[..., 0] / drawn[..., 1]
    low, high = np.quantile(values[0] - values[1], edges(len(rows)))
    return difference, float(low), float(high)


def _compared(
    finalists: Sequence[RateTrial],
    trials: Sequence[RateTrial],
    before: float,
    halving: Halving,
    planned: int,
    seconds: float,
) -> RateFinding:
    """The result: the better finalist if a difference is shown, otherwise the smaller."""
    best, *others = finalists
    runner_up = others[0] if others else None
    difference, low, high, shown = None, None, None, False
    if runner_up is not None and best.rows is not None and runner_up.rows is not None:
        difference, low, high = paired(best.rows, runner_up.rows)
        shown = high is not None and high < 0
        if not shown and runner_up.rate < best.rate:
            best, runner_up = runner_up, best
            difference = -difference
            low, high = (None, None) if low is None or high is None else (-high, -low)
    n_rows = 0 if best.rows is None else len(best.rows.losses)
    some_dropped = any(trial.status == "dropped" for trial in trials)
    return RateFinding(
        rate=best.rate,
        runner_up=runner_up and runner_up.rate,
        difference=difference,
        low=low,
        high=high,
        shown=shown,
        sentence=_sentence(best, runner_up, difference, low, high, shown, n_rows, some_dropped),
        notes=tuple(_notes(best, trials, before)),
        before=before,
        trials=tuple(trials),
        rows=n_rows,
        updates=sum(trial.updates for trial in trials),
        planned=planned,
        seconds=seconds,
    )


def _sentence(
    best: RateTrial,
    runner_up: RateTrial | None,
    difference: float | None,
    low: float | None,
    high: float | None,
    shown: bool,
    n_rows: int,
    some_dropped: bool,
) -> str:
    if runner_up is None or difference is None:
        others = "the other finalist diverged" if some_dropped else "every other rate diverged"
        return f"learning rate {best.rate:g}: {others}"
    interval = "one row: no interval" if low is None else f"95 % interval {low:+.4f} to {high:+.4f}"
    if shown:
        text = f"learning rate {best.rate:g}: its held-out loss is {-difference:.4f} lower than with "
        return f"{text}{runner_up.rate:g} ({interval}, {n_rows} rows)"
    text = f"no difference shown between {best.rate:g} and {runner_up.rate:g} in held-out loss "
    return f"{text}({difference:+.4f}, {interval}, {n_rows} rows): the smaller is taken"


def _notes(best: RateTrial, trials: Sequence[RateTrial], before: float) -> list[str]:
    notes: list[str] = []
    ladder = sorted(trial.rate for trial in trials)
    survivors = [trial.rate for trial in trials if trial.status != "diverged"]
    if best.rate == ladder[0]:
        notes.append("it is the lowest of the ladder: lower ones may be better (--rates)")
    elif best.rate == ladder[-1]:
        notes.append("it is the highest of the ladder: higher ones may be better (--rates)")
    if diverged := sorted(set(ladder) - set(survivors)):
        notes.append(f"diverged: {', '.join(f'{rate:g}' for rate in diverged)}")
    if best.held_out[-1][1] >= before:
        notes.append("no rate lowered the held-out loss: more updates, or other rates, may tell more")
    if best.updates < ENOUGH_UPDATES:
        notes.append(f"{best.updates} updates of the finalists are few: the result is rough (--updates)")
    return notes
