"""Pictures of a run as PNG: its curves, and one that holds the verdict, the differences with their intervals
and the loss."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tunesmith import events
from tunesmith.display.charts import Difference
from tunesmith.display.text import escaped
from tunesmith.reports.facts import loss_unit, only, trailing
from tunesmith.reports.measures import differences
from tunesmith.reports.summary import Summary

CURVES, PICTURE = "curves.png", "report.png"
LINES = 16
"""Lines of the verdict in the picture."""
GREEN, RED = "#1a6e3c", "#b3261e"


def curves(log: Sequence[events.Event], path: Path) -> None:
    """A PNG with panels over optimizer updates; line styles and markers distinguish the lines without
    colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, validations = only(log, events.StepDone), only(log, events.Validated)
    names = {name for event in (*steps, *validations) for name in event.metrics}
    rewards = sorted(name for name in names if name.startswith("reward_"))
    figure = Figure(figsize=(10, 13 if rewards else 11), dpi=110, layout="constrained")
    ratios = (3, 2, 1, 1.4, 1.4) if rewards else (3, 1, 1.4, 1.4)
    panels = list(figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios))
    labels = ["learning rate", "gradient norm", "memory (GB)"]
    labels = [f"loss ({loss_unit(log)})", *(["reward"] if rewards else []), *labels]
    _loss(log, panels[0])
    if rewards:
        _rewards(panels[1], rewards, steps, validations)
    dot = "." if len(steps) < 30 else ""
    places = [step.step for step in steps]
    panels[-3].plot(places, [step.learning_rate for step in steps], color="tab:blue", marker=dot)
    _gradient(panels[-2], steps, dot)
    _memory(panels[-1], steps, dot)
    for panel, label in zip(panels, labels, strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    panels[-1].set_xlabel("step (optimizer updates)")
    FigureCanvasAgg(figure).print_png(path)


def _rewards(
    panel: Any,
    names: Sequence[str],
    steps: Sequence[events.StepDone],
    validations: Sequence[events.Validated],
) -> None:
    window = max(1, len(steps) // 20)
    over = f"mean of the last {window} updates" if window > 1 else "each update"
    for name, mark, style, colour in zip(names, "ox", ("-", "--"), ("tab:blue", "tab:red"), strict=False):
        word = name.removeprefix("reward_")
        trained = [step for step in steps if name in step.metrics]
        means = trailing([step.metrics[name] for step in trained], window)
        places = [step.step for step in trained]
        panel.plot(places, means, color=colour, ls=style, label=f"{word}, {over}")
        measured = [(event.step, event.metrics[name]) for event in validations if name in event.metrics]
        if measured:
            x, y = zip(*measured, strict=True)
            panel.plot(x, y, color="k", ls="", marker=mark, ms=6, label=f"{word}, held out")


def _gradient(panel: Any, steps: Sequence[events.StepDone], dot: str) -> None:
    places, norms = [step.step for step in steps], [step.gradient_norm for step in steps]
    panel.plot(places, norms, color="tab:blue", lw=0.8, marker=dot, label="before clipping")
    clipped = [step for step in steps if step.clipped]
    norms = [step.gradient_norm for step in clipped]
    panel.plot([step.step for step in clipped], norms, "kx", ms=4, label="clipped")


def _memory(panel: Any, steps: Sequence[events.StepDone], dot: str) -> None:
    places = [step.step for step in steps]
    for name, style in zip(steps[-1].memory if steps else (), ("-", "--", ":"), strict=False):
        values = [step.memory.get(name, math.nan) / 1e9 for step in steps]
        panel.plot(places, values, ls=style, marker=dot, label=name)
    panel.set_ylim(bottom=0)


def _loss(log: Sequence[events.Event], panel: Any) -> None:
    """The loss over updates: each, smoothed, held out; where updates were skipped or the run was resumed."""
    steps, validations = only(log, events.StepDone), only(log, events.Validated)
    task, window = [step for step in steps if step.task_units], max(1, len(steps) // 20)
    places = [step.step for step in task]
    dot = "." if len(steps) < 30 else ""
    panel.plot(
        places,
        [step.task_loss for step in task],
        color="0.7",
        lw=0.8,
        marker=dot,
        label="training, each update",
    )
    if window > 1:
        smooth = trailing([step.task_loss for step in task], window, [step.task_units for step in task])
        panel.plot(
            places, smooth, color="tab:blue", lw=2, label=f"training, mean of the last {window} updates"
        )
    if mixed := [(step.step, step.mixed_loss) for step in steps if step.mixed_loss is not None]:
        panel.plot(*zip(*mixed, strict=True), color="tab:green", ls=":", label="training, mixed rows")
    measured = [event.step for event in validations], [event.loss for event in validations]
    panel.plot(*measured, color="tab:red", marker="D", ls="--", ms=6, label="validation")
    for kind, word, style in ((events.StepSkipped, "skipped", ":"), (events.Resumed, "resumed", "-.")):
        for event in only(log, kind):
            panel.axvline(event.step, color="k", ls=style, lw=1)
            place = {"xycoords": ("data", "axes fraction"), "rotation": 90, "va": "top"}
            panel.annotate(word, (event.step, 1), fontsize=8, **place)
    panel.set_ylabel(f"loss ({loss_unit(log)})")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def picture(summary: Summary, log: Sequence[events.Event], path: Path) -> None:
    """A PNG to send: the verdict with its reasons, the paired differences with their intervals, and the
    loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = differences([row.score for row in summary.answers])
    scales = list(dict.fromkeys(row.scale for row in rows))
    heights = [0.55 + 0.42 * sum(row.scale == scale for row in rows) for scale in scales]
    reasons = [f"{reason.sign} {reason.text}." for reason in summary.judgement.reasons]
    text = [part for line in (summary.verdict, *reasons) for part in textwrap.wrap(plain(line), 100)][:LINES]
    top = 0.75 + 0.24 * len(text)
    tall = top + sum(heights) + 3.2
    engine = ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - top / tall))
    figure = Figure(figsize=(10, tall), dpi=120, layout=engine)
    panels = list(figure.subplots(1 + len(scales), 1, height_ratios=[*heights, 3.2], squeeze=False)[:, 0])
    sign, colour = {"good": ("✓", GREEN), "warning": ("!", "#8a5300"), "error": ("✗", RED)}.get(
        summary.judgement.tone, ("", "#0b6478")
    )
    name = f"{sign} {plain(summary.facts.run.name)}".strip()
    options = {"va": "top", "parse_math": False}
    figure.text(0.02, 1 - 0.15 / tall, name, size=13, color=colour, weight="bold", **options)
    figure.text(0.02, 1 - 0.5 / tall, "\n".join(text), size=11, linespacing=1.35, **options)
    for panel, scale in zip(panels, scales, strict=False):
        _forest(panel, [row for row in rows if row.scale == scale][::-1], scale)
    _loss(log, panels[-1])
    panels[-1].set_xlabel("step (optimizer updates)", fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


def _forest(panel: Any, rows: Sequence[Difference], scale: str) -> None:
    panel.axvline(0, color="k", lw=1, ls=":")
    for place, row in enumerate(rows):
        mark = {"improved": "^", "regressed": "v"}.get(row.verdict or "", "s")
        fill = {"improved": GREEN, "regressed": RED}.get(row.verdict or "", "white")
        if row.low is not None and row.high is not None:
            panel.plot([row.low, row.high], [place, place], color="k", lw=1.4, marker="|", ms=8)
        panel.plot([row.gain], [place], marker=mark, ms=9, mfc=fill, mec="k", ls="")
    labels = [f"{plain(row.label)}\n{plain(row.about)}" for row in rows]
    panel.set_yticks(range(len(rows)), labels, fontsize=8, parse_math=False)
    panel.set_ylim(-0.6, len(rows) - 0.4)
    ends = [abs(end) for row in rows for end in (row.gain, row.low, row.high) if end is not None]
    reach = max(ends, default=1.0) or 1.0
    panel.set_xlim(-1.08 * reach, 1.08 * reach)
    panel.set_xlabel(f"{scale}: tuned − base, right is better", fontsize=8)
    panel.tick_params(axis="x", labelsize=8)


def plain(text: str) -> str:
    """``text`` in letters that the font of a picture has."""
    return escaped(
        "".join(letter if letter < "\u2500" or letter in "✓✗" else "?" for letter in " ".join(text.split()))
    )
