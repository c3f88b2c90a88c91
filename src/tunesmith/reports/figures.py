"""Pictures of a run as PNG: its curves, and one that holds the verdict, the differences with their intervals
and the loss."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith import events
from tunesmith.display.text import escaped
from tunesmith.reports import verdict as evidence
from tunesmith.reports.summary import only, trailing, unit

CURVES, PICTURE = "curves.png", "report.png"
LINES = 12  # of the verdict


def curves(log: Sequence[events.Event], path: Path) -> None:
    """A PNG with four panels over optimizer updates; line styles and markers tell the lines apart without
    colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    steps, validations = only(log, events.StepDone), only(log, events.Validated)
    at, window = [step.step for step in steps], max(1, len(steps) // 20)
    dot = "." if len(steps) < 30 else ""
    rewards = sorted(
        {name for one in (*steps, *validations) for name in one.metrics if name.startswith("reward_")}
    )
    figure = Figure(figsize=(10, 13 if rewards else 11), dpi=110, layout="constrained")
    ratios = (3, 2, 1, 1.4, 1.4) if rewards else (3, 1, 1.4, 1.4)
    axes = list(figure.subplots(len(ratios), 1, sharex=True, height_ratios=ratios))
    labels = [
        f"loss ({unit(log)})",
        *(["reward"] if rewards else []),
        "learning rate",
        "gradient norm",
        "memory (GB)",
    ]
    loss, rate, gradient, memory = axes[0], *axes[-3:]
    for name, mark in zip(rewards, ("o", "x"), strict=False):
        over = f"mean of the last {window} updates" if window > 1 else "each update"
        line = {"ls": "-" if mark == "o" else "--", "label": f"{name.removeprefix('reward_')}, {over}"}
        having = [step for step in steps if name in step.metrics]
        means = trailing([step.metrics[name] for step in having], window)
        axes[1].plot(
            [step.step for step in having], means, color="tab:blue" if mark == "o" else "tab:red", **line
        )
        seen = [(one.step, one.metrics[name]) for one in validations if name in one.metrics]
        if seen:
            axes[1].plot(
                *zip(*seen, strict=True),
                color="k",
                ls="",
                marker=mark,
                ms=6,
                label=f"{name.removeprefix('reward_')}, held out",
            )
    _loss(log, loss)
    rate.plot(at, [step.learning_rate for step in steps], color="tab:blue", marker=dot)
    gradient.plot(
        at,
        [step.gradient_norm for step in steps],
        color="tab:blue",
        lw=0.8,
        marker=dot,
        label="before clipping",
    )
    clipped = [step for step in steps if step.clipped]
    gradient.plot(
        [step.step for step in clipped], [step.gradient_norm for step in clipped], "kx", ms=4, label="clipped"
    )
    for name, style in zip(steps[-1].memory if steps else (), ("-", "--", ":"), strict=False):
        memory.plot(
            at, [step.memory.get(name, math.nan) / 1e9 for step in steps], ls=style, marker=dot, label=name
        )
    memory.set_ylim(bottom=0)
    for panel, label in zip(axes, labels, strict=True):
        panel.set_ylabel(label)
        panel.grid(alpha=0.3)
        if panel.get_legend_handles_labels()[0]:
            panel.legend(fontsize=8)
    memory.set_xlabel("step (optimizer updates)")
    FigureCanvasAgg(figure).print_png(path)


def _loss(log: Sequence[events.Event], panel: Any) -> None:
    """The loss over updates: each, smoothed, held out; where updates were skipped or the run was resumed."""
    steps, validations = only(log, events.StepDone), only(log, events.Validated)
    at, window = [step.step for step in steps], max(1, len(steps) // 20)
    dot = "." if len(steps) < 30 else ""
    panel.plot(
        at, [step.loss for step in steps], color="0.7", lw=0.8, marker=dot, label="training, each update"
    )
    if window > 1:
        smooth = trailing([step.loss for step in steps], window, [step.units for step in steps])
        panel.plot(at, smooth, color="tab:blue", lw=2, label=f"training, mean of the last {window} updates")
    measured = [one.step for one in validations], [one.loss for one in validations]
    panel.plot(*measured, color="tab:red", marker="D", ls="--", ms=6, label="validation")
    for kind, word, style in ((events.StepSkipped, "skipped", ":"), (events.Resumed, "resumed", "-.")):
        for one in only(log, kind):
            panel.axvline(one.step, color="k", ls=style, lw=1)
            panel.annotate(
                word, (one.step, 1), xycoords=("data", "axes fraction"), fontsize=8, rotation=90, va="top"
            )
    panel.set_ylabel(f"loss ({unit(log)})")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)


def picture(found: Mapping[str, Any], log: Sequence[events.Event], path: Path) -> None:
    """A PNG to send: the verdict, the paired differences with their intervals, and the loss."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = evidence.differences(found)
    scales = list(dict.fromkeys(one.scale for one in rows))
    heights = [0.55 + 0.42 * sum(one.scale == scale for one in rows) for scale in scales]
    text = textwrap.wrap(plain(found["verdict"]), 100)[:LINES]
    top = 0.75 + 0.24 * len(text)
    tall = top + sum(heights) + 3.2
    figure = Figure(
        figsize=(10, tall), dpi=120, layout=ConstrainedLayoutEngine(rect=(0, 0, 1, 1 - top / tall))
    )
    panels = list(figure.subplots(1 + len(scales), 1, height_ratios=[*heights, 3.2], squeeze=False)[:, 0])
    sign, colour = {"good": ("✓", "#1a6e3c"), "warning": ("!", "#8a5300"), "error": ("✗", "#b3261e")}.get(
        found["evidence"]["tone"], ("", "#0b6478")
    )
    said = {"va": "top", "parse_math": False}
    figure.text(
        0.02,
        1 - 0.15 / tall,
        f"{sign} {plain(Path(found['run']).name)}".strip(),
        size=13,
        color=colour,
        weight="bold",
        **said,
    )
    figure.text(0.02, 1 - 0.5 / tall, "\n".join(text), size=11, linespacing=1.35, **said)
    for panel, scale in zip(panels, scales, strict=False):
        of = [one for one in rows if one.scale == scale][::-1]
        panel.axvline(0, color="k", lw=1, ls=":")
        for at, one in enumerate(of):
            mark = {"improved": "^", "regressed": "v"}.get(one.verdict or "", "s")
            fill = {"improved": "#1a6e3c", "regressed": "#b3261e"}.get(one.verdict or "", "white")
            if one.low is not None and one.high is not None:
                panel.plot([one.low, one.high], [at, at], color="k", lw=1.4, marker="|", ms=8)
            panel.plot([one.gain], [at], marker=mark, ms=9, mfc=fill, mec="k", ls="")
        panel.set_yticks(
            range(len(of)),
            [f"{plain(one.label)}\n{plain(one.about)}" for one in of],
            fontsize=8,
            parse_math=False,
        )
        panel.set_ylim(-0.6, len(of) - 0.4)
        reach = (
            max(
                (abs(at) for one in of for at in (one.gain, one.low, one.high) if at is not None), default=1.0
            )
            or 1.0
        )
        panel.set_xlim(-1.08 * reach, 1.08 * reach)
        panel.set_xlabel(f"{scale}: tuned − base, right is better", fontsize=8)
        panel.tick_params(axis="x", labelsize=8)
    _loss(log, panels[-1])
    panels[-1].set_xlabel("step (optimizer updates)", fontsize=8)
    FigureCanvasAgg(figure).print_png(path)


def plain(text: str) -> str:
    """``text`` as the font of a picture can show it."""
    return escaped(
        "".join(letter if letter < "\u2500" or letter in "✓✗" else "?" for letter in " ".join(text.split()))
    )
