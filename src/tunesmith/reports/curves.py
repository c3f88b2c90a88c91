"""The course of a run as charts: loss, gradients, weights, speed and memory over the updates, and how far the
adapter moved.

A smoothed curve is the mean of the last twentieth of the run up to each update; of the loss it is a mean over
learned tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from statistics import median

from markupsafe import Markup

from tunesmith import events
from tunesmith.display import charts
from tunesmith.display.charts import Line
from tunesmith.reports.facts import LOSS_UNIT, ModuleSpreads, layer, loss_unit, module, only, trailing

WIDE = 20.0
"""If the largest value is more than this times the smallest, the axis is logarithmic."""


def training(log: Sequence[events.Event]) -> list[Markup]:
    """The charts for which there are numbers."""
    steps, validations = only(log, events.StepDone), only(log, events.Validated)
    window = max(1, len(steps) // 20)
    drawn = [
        *_losses(log, steps, validations, window),
        *_optimisation(log, steps, window),
        *_speed(steps, window),
        _activations(only(log, events.Activations)),
        *_watched(steps, validations, window),
    ]
    return [Markup(chart) for chart in drawn if chart]


def _losses(
    log: Sequence[events.Event],
    steps: Sequence[events.StepDone],
    validations: Sequence[events.Validated],
    window: int,
) -> Iterator[Markup]:
    task, over, unit = (
        [step for step in steps if step.task_units],
        f"mean of {window} updates",
        loss_unit(log),
    )
    places, losses = [step.step for step in task], [step.task_loss for step in task]
    marks = [(event.step, "skipped") for event in only(log, events.StepSkipped)]
    marks += [(event.step, "resumed") for event in only(log, events.Resumed)]
    means = trailing(losses, window, [step.task_units for step in task])
    held_out = [event.step for event in validations]
    loss = [Line("training, each update", places, losses, "thin", "soft")]
    loss += [Line(f"training, {over}", places, means)] if window > 1 else []
    loss += [Line("held out", held_out, [event.loss for event in validations], "marks", 1)]
    loss += _mixed_line(steps, window)
    perplexity = [Line("held out", held_out, [event.perplexity for event in validations], "marks", 1)]
    if unit.startswith(LOSS_UNIT) and task:
        perplexity.insert(0, Line(f"training, {over}", places, [math.exp(min(mean, 700)) for mean in means]))
    yield charts.lines("Loss", loss, y=unit, marks=marks)
    yield charts.lines("Perplexity", perplexity, log=_wide(perplexity))
    scored = [(event.step, event.adherence) for event in validations if event.adherence is not None]
    if scored:
        steps_scored, scores = zip(*scored, strict=True)
        line = Line("held-out prompts", list(steps_scored), list(scores), "marks", 1)
        yield charts.lines("Adherence to the references", [line], y="0 to 100")


def _mixed_line(steps: Sequence[events.StepDone], window: int) -> list[Line]:
    """The loss of the rows of ``data.mix``; empty if nothing is mixed in."""
    mixed = [(step.step, step.mixed_loss, step.mixed_units) for step in steps if step.mixed_loss is not None]
    if not mixed:
        return []
    places, losses, units = zip(*mixed, strict=True)
    return [Line("training, mixed rows", list(places), trailing(losses, window, units), "dash", 2)]


def _optimisation(
    log: Sequence[events.Event], steps: Sequence[events.StepDone], window: int
) -> Iterator[Markup]:
    rates = Line("learning rate", [step.step for step in steps], [step.learning_rate for step in steps])
    yield charts.lines("Learning rate", [rates], zero=True)
    norms = [
        step.gradient_norm for step in steps if math.isfinite(step.gradient_norm) and step.gradient_norm > 0
    ]
    yield _smoothed(
        "Gradient norm, before clipping",
        steps,
        lambda step: step.gradient_norm,
        window,
        log=bool(norms) and max(norms) > WIDE * min(norms),
        note=f"{sum(step.clipped for step in steps):,} of {len(steps):,} updates were clipped.",
    )
    measured = [(event.step, list(event.ratios.values())) for event in only(log, events.Instruments)]
    measured = [(step, ratios) for step, ratios in measured if ratios]
    places = [step for step, _ in measured]
    ratio_lines = [
        Line("median weight", places, [median(ratios) for _, ratios in measured]),
        Line("largest", places, [max(ratios) for _, ratios in measured], "dash", 1),
    ]
    yield charts.lines("Update over weight", ratio_lines, y="‖Δθ‖ / ‖θ‖", log=True)
    grown = only(log, events.Growth)
    if len(grown) > 1:
        sizes = [math.sqrt(sum(norm * norm for norm in event.norms.values())) for event in grown]
        line = Line("‖ΔW‖", [event.step for event in grown], sizes, "marks", 2)
        yield charts.lines("Size of the change", [line], zero=True)


def _speed(steps: Sequence[events.StepDone], window: int) -> Iterator[Markup]:
    def speed(step: events.StepDone) -> float:
        return step.tokens / step.seconds if step.seconds else math.nan

    yield _smoothed("Tokens a second", steps, speed, window, zero=True)
    places = [step.step for step in steps]
    styles = zip(steps[-1].memory if steps else (), ("line", "dash", "dot"), strict=False)
    memory = [
        Line(name, places, [_gigabytes(step.memory.get(name)) for step in steps], style, colour)
        for colour, (name, style) in enumerate(styles)
    ]
    yield charts.lines("Memory", memory, y="GB", zero=True)
    if any(step.padding for step in steps):
        y = "% of the positions"
        yield _smoothed("Padding", steps, lambda step: 100 * step.padding, window, y=y, zero=True)


def _gigabytes(n_bytes: int | None) -> float | None:
    return None if n_bytes is None else n_bytes / 1e9


def _smoothed(
    title: str,
    steps: Sequence[events.StepDone],
    value: Callable[[events.StepDone], float],
    window: int,
    *,
    y: str = "",
    log: bool = False,
    zero: bool = False,
    note: str = "",
) -> Markup:
    """Each update, and the mean over ``window`` updates."""
    places, values = [step.step for step in steps], [value(step) for step in steps]
    curve = [Line("each update", places, values, "thin", "soft")]
    curve += [Line(f"mean of {window} updates", places, trailing(values, window))] if window > 1 else []
    return charts.lines(title, curve, y=y, log=log, zero=zero, note=note)


def _activations(measured: Sequence[events.Activations]) -> Markup:
    places = [event.step for event in measured]
    rms = [max(event.rms.values(), default=None) for event in measured]
    largest = [max(event.largest.values(), default=None) for event in measured]
    curve = [
        Line("root mean square, largest layer", places, rms, "marks", 0),
        Line("largest value", places, largest, "marks", 1),
    ]
    return charts.lines("Activations", curve, log=True)


def stages(seconds: Mapping[str, float]) -> Markup:
    """The seconds of each stage as bars."""
    total = sum(seconds.values())
    rows = [
        (name, value, f"{value:,.1f} s · {value / total:.0%}")
        for name, value in sorted(seconds.items(), key=lambda item: -item[1])
        if total
    ]
    return charts.card("Time by stage", charts.bars(rows)) if rows else Markup("")


def modules(spreads: ModuleSpreads) -> list[Markup]:
    """Gradient norms and update over weight by module, over layers and updates."""
    kinds = (
        ("Gradient norm by module, before clipping", spreads.gradient),
        ("Update over weight by module", spreads.ratio),
    )
    drawn = [(title, charts.spread(list(by_module.items()))) for title, by_module in kinds]
    return [
        charts.card(title, chart, "over all layers and measured updates") for title, chart in drawn if chart
    ]


def growth(event: events.Growth) -> list[Markup]:
    """How far each adapted weight moved, by layer and module. Empty if none was measured."""
    if not event.norms:
        return []
    relative = {name: 100 * share for name, share in event.relative.items()}
    drawn = [_heat("Change ‖ΔW‖ in per cent of ‖W‖", relative, ".2f")]
    if not relative:
        drawn.append(_heat("Change ‖ΔW‖", event.norms, ".3g"))
    drawn.append(_heat("Effective rank of ΔW", event.effective_rank, ".1f"))
    bins = event.histogram
    if "counts" in bins and "edges" in bins and len(bins["edges"]) == len(bins["counts"]) + 1:
        counts = [int(count) for count in bins["counts"]]
        drawn.append(charts.columns("Entries of ΔW", bins["edges"], counts, x="entry of ΔW", log=True))
    return [chart for chart in drawn if chart]


def _heat(title: str, values: Mapping[str, float], form: str) -> Markup:
    if not values:
        return Markup("")
    layers = sorted(
        {layer(name) for name in values},
        key=lambda text: (not text.isdigit(), int(text) if text.isdigit() else 0),
    )
    names = list(dict.fromkeys(module(name) for name in values))
    short = {name: name.rpartition(".")[2] for name in names}
    short = short if len(set(short.values())) == len(short) else {name: name for name in names}
    cells = {(layer(name), short[module(name)]): value for name, value in values.items()}
    return charts.card(title, charts.heat(layers, list(short.values()), cells, form), "by layer")


def _watched(
    steps: Sequence[events.StepDone], validations: Sequence[events.Validated], window: int
) -> Iterator[Markup]:
    """The objective's metrics: rewards in one chart, each other metric in its own."""
    names = sorted({name for event in (*steps, *validations) for name in event.metrics})
    rewards = [name for name in names if name.startswith("reward_")]
    groups = [("Reward", rewards)] if rewards else []
    groups += [(name.replace("_", " "), [name]) for name in names if name not in rewards]
    for title, metrics in groups:
        curve: list[Line] = []
        for colour, name in enumerate(metrics):
            trained = [step for step in steps if name in step.metrics]
            means = trailing([step.metrics[name] for step in trained], window)
            style, places = ("line", "dash")[colour % 2], [step.step for step in trained]
            curve.append(Line(f"{name}, training", places, means, style, colour % 5))
            measured = [event for event in validations if name in event.metrics]
            values = [event.metrics[name] for event in measured]
            places = [event.step for event in measured]
            curve.append(Line(f"{name}, held out", places, values, "marks", colour % 5))
        yield charts.lines(title[:1].upper() + title[1:], curve)


def _wide(curve: Sequence[Line]) -> bool:
    values = [
        value
        for line in curve
        for value in line.y
        if value is not None and math.isfinite(value) and value > 0
    ]
    return bool(values) and max(values) > WIDE * min(values)
