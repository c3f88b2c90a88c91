"""The course of a run as charts: loss, gradients, weights, speed and memory over the updates, and how far the
adapter went.

Smoothed is the mean of the last twentieth of the run up to each update; of the loss it is a mean over learned
tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from markupsafe import Markup

from tunesmith import events
from tunesmith.display import charts
from tunesmith.display.charts import Line
from tunesmith.reports.summary import layer, module, only, trailing, unit

WIDE = 20.0
"""A range from which on an axis is logarithmic, as largest over smallest."""


def training(log: Sequence[events.Event]) -> list[Markup]:
    """The charts that there are numbers for."""
    steps, seen = only(log, events.StepDone), only(log, events.Validated)
    at, window = [step.step for step in steps], max(1, len(steps) // 20)
    loss_unit = unit(log)
    over = f"mean of {window} updates"

    def both(title: str, value: Callable[[events.StepDone], float], y: str, **options: Any) -> Markup:
        raw = [value(step) for step in steps]
        found = [Line("each update", at, raw, "thin", "soft")]
        found += [Line(over, at, trailing(raw, window))] if window > 1 else []
        return charts.lines(title, found, y=y, **options)

    marks = [(one.step, "skipped") for one in only(log, events.StepSkipped)]
    marks += [(one.step, "resumed") for one in only(log, events.Resumed)]
    means = trailing([step.loss for step in steps], window, [step.units for step in steps])
    curve = [Line("training, each update", at, [step.loss for step in steps], "thin", "soft")]
    curve += [Line(f"training, {over}", at, means)] if window > 1 else []
    curve += [Line("held out", [one.step for one in seen], [one.loss for one in seen], "marks", 1)]
    surprise = [Line("held out", [one.step for one in seen], [one.perplexity for one in seen], "marks", 1)]
    if loss_unit.startswith("nats a learned token") and steps:
        surprise.insert(0, Line(f"training, {over}", at, [math.exp(min(loss, 700)) for loss in means]))
    norms = [
        step.gradient_norm for step in steps if math.isfinite(step.gradient_norm) and step.gradient_norm > 0
    ]
    wide = bool(norms) and max(norms) > WIDE * min(norms)
    ratios = [(one.step, of) for one in only(log, events.Instruments) if (of := list(one.ratios.values()))]
    styles = zip(steps[-1].memory if steps else (), ("line", "dash", "dot"), strict=False)
    memory = [
        Line(
            name,
            at,
            [step.memory[name] / 1e9 if name in step.memory else None for step in steps],
            style,
            colour,
        )
        for colour, (name, style) in enumerate(styles)
    ]
    grown = only(log, events.Growth)
    size = [math.sqrt(sum(value * value for value in one.norms.values())) for one in grown]
    active = only(log, events.Activations)
    padded = any(step.padding for step in steps)
    seen_at = [one.step for one in active]
    found = [
        charts.lines("Loss", curve, y=loss_unit, marks=marks),
        charts.lines("Perplexity", surprise, log=_wide(surprise)),
        charts.lines(
            "Learning rate", [Line("learning rate", at, [step.learning_rate for step in steps])], zero=True
        ),
        both(
            "Gradient norm, before clipping",
            lambda step: step.gradient_norm,
            "",
            log=wide,
            note=f"{sum(step.clipped for step in steps):,} of {len(steps):,} updates were clipped.",
        ),
        charts.lines(
            "Update over weight",
            [
                Line("median weight", [step for step, _ in ratios], [median(of) for _, of in ratios]),
                Line("largest", [step for step, _ in ratios], [max(of) for _, of in ratios], "dash", 1),
            ],
            y="‖Δθ‖ / ‖θ‖",
            log=True,
        ),
        charts.lines(
            "Size of the change", [Line("‖ΔW‖", [one.step for one in grown], size, "marks", 2)], zero=True
        )
        if len(grown) > 1
        else Markup(""),
        both(
            "Tokens a second",
            lambda step: step.tokens / step.seconds if step.seconds else math.nan,
            "",
            zero=True,
        ),
        charts.lines("Memory", memory, y="GB", zero=True),
        both("Padding", lambda step: 100 * step.padding, "% of the positions", zero=True) if padded else "",
        charts.lines(
            "Activations",
            [
                Line(
                    "root mean square, largest layer",
                    seen_at,
                    [max(one.rms.values(), default=None) for one in active],
                    "marks",
                    0,
                ),
                Line(
                    "largest value",
                    seen_at,
                    [max(one.largest.values(), default=None) for one in active],
                    "marks",
                    1,
                ),
            ],
            log=True,
        ),
        *_watched(steps, seen, window),
    ]
    return [Markup(one) for one in found if one]


def stages(found: Mapping[str, float]) -> Markup:
    """Seconds of each stage as bars."""
    total = sum(found.values())
    rows = [
        (name, value, f"{value:,.1f} s · {value / total:.0%}")
        for name, value in sorted(found.items(), key=lambda one: -one[1])
        if total
    ]
    return charts.card("Time by stage", charts.bars(rows)) if rows else Markup("")


def modules(found: Mapping[str, Mapping[str, Sequence[float]]]) -> list[Markup]:
    """Gradient norms and update over weight by module, over layers and updates."""
    titles = {"gradient": "Gradient norm by module, before clipping", "ratio": "Update over weight by module"}
    drawn = {
        key: charts.spread([(name, [float(value) for value in five]) for name, five in of.items()])
        for key, of in found.items()
    }
    return [
        charts.card(titles[key], chart, "over all layers and measured updates")
        for key, chart in drawn.items()
        if chart
    ]


def growth(one: Mapping[str, Any]) -> list[Markup]:
    """How far each adapted weight went, by layer and module; ``one``: a Growth event as a mapping."""
    found: list[Markup] = []
    for title, key, form in (
        ("How far it went: ‖ΔW‖ in per cent of ‖W‖", "relative", ".2f"),
        ("How far it went: ‖ΔW‖", "norms", ".3g"),
        ("Effective rank of ΔW", "effective_rank", ".1f"),
    ):
        values = {name: (100 if key == "relative" else 1) * float(value) for name, value in one[key].items()}
        if not values or (key == "norms" and one["relative"]):
            continue
        layers = sorted(
            {layer(name) for name in values},
            key=lambda text: (not text.isdigit(), int(text) if text.isdigit() else 0),
        )
        names = list(dict.fromkeys(module(name) for name in values))
        short = {name: name.rpartition(".")[2] for name in names}
        short = short if len(set(short.values())) == len(short) else {name: name for name in names}
        cells = {(layer(name), short[module(name)]): value for name, value in values.items()}
        found.append(charts.card(title, charts.heat(layers, list(short.values()), cells, form), "by layer"))
    if histogram := one["histogram"]:
        found.append(
            charts.columns(
                "Entries of ΔW",
                histogram["edges"],
                [int(count) for count in histogram["counts"]],
                x="entry of ΔW",
                log=True,
            )
        )
    return [one for one in found if one]


def _watched(steps: Sequence[events.StepDone], seen: Sequence[events.Validated], window: int) -> list[Markup]:
    """What the objective watches; rewards together, each other on its own."""
    names = sorted({name for one in (*steps, *seen) for name in one.metrics})
    rewards = [name for name in names if name.startswith("reward_")]
    found = []
    for title, of in ([("Reward", rewards)] if rewards else []) + [
        (name.replace("_", " "), [name]) for name in names if name not in rewards
    ]:
        curve = []
        for colour, name in enumerate(of):
            having = [step for step in steps if name in step.metrics]
            means = trailing([step.metrics[name] for step in having], window)
            curve.append(
                Line(
                    f"{name}, training",
                    [step.step for step in having],
                    means,
                    ("line", "dash")[colour % 2],
                    colour % 5,
                )
            )
            held = [one for one in seen if name in one.metrics]
            curve.append(
                Line(
                    f"{name}, held out",
                    [one.step for one in held],
                    [one.metrics[name] for one in held],
                    "marks",
                    colour % 5,
                )
            )
        found.append(charts.lines(title[:1].upper() + title[1:], curve))
    return found


def _wide(found: Sequence[Line]) -> bool:
    values = [
        value
        for line in found
        for value in line.y
        if value is not None and math.isfinite(value) and value > 0
    ]
    return bool(values) and max(values) > WIDE * min(values)
