"""Charts as SVG and HTML that need no script: colours come from the page, numbers stand beside them as text.

Lines differ by dash and marker as well as by colour. A chart fits its card at any width: what is wide is laid
out in per cent. Long curves are thinned to the lowest and the highest value of each stretch, so no spike is
lost."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from tunesmith.display.words import number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 52, 10, 10, 34
DRAWN = 400
"""Points of one line at most."""
TABLE = 12
"""Rows of the table under a chart."""
SCROLL = Markup('<div class="scroll" tabindex="0" role="region" aria-label="table">{}</div>')


class Line(NamedTuple):
    """``style``: thin (raw), line, dash, dot, or marks (points joined by dashes). ``colour``: 0 to 4, or
    "soft"."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    style: str = "line"
    colour: int | str = 0


class Difference(NamedTuple):
    """A row of `forest`. ``gain``, ``low``, ``high``: towards better. ``scale``: rows of one are drawn on one
    axis."""

    label: str
    about: str
    gain: float
    low: float | None
    high: float | None
    told: str
    verdict: str | None
    scale: str


def lines(
    title: str,
    found: Sequence[Line],
    *,
    x: str = "step",
    y: str = "",
    log: bool = False,
    zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Markup:
    """A card with curves over ``x``; nothing where no line has a number. ``marks``: upright lines with a
    word.

    log: a logarithmic axis, where all is above zero. zero: the axis begins there. What cannot be drawn is
    counted below."""
    kept, odd, fewer = [], 0, False
    for line in found:
        points = [
            (float(at), float(value)) for at, value in zip(line.x, line.y, strict=True) if value is not None
        ]
        fine = [point for point in points if math.isfinite(point[1]) and (not log or point[1] > 0)]
        odd += len(points) - len(fine)
        if fine:
            kept.append((line, few := thinned(fine)))
            fewer |= len(few) < len(fine)
    if not kept:
        return Markup("")
    every = [point for _, points in kept for point in points]
    left, right = _room([at for at, _ in every], pad=False)
    heights = [math.log10(value) if log else value for _, value in every]
    bottom, top = _room([0.0, *heights] if zero else heights)
    bottom = 0.0 if zero and min(heights) >= 0 else bottom

    def across(at: float) -> float:
        return LEFT + (at - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def up(value: float) -> float:
        at = math.log10(value) if log else value
        return HEIGHT - BOTTOM - (at - bottom) / (top - bottom) * (HEIGHT - BOTTOM - TOP)

    parts = []
    for tick in _decades(bottom, top) if log else ticks(bottom, top, 5):
        parts.append(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{up(tick):.1f}" y2="{up(tick):.1f}"/>'
        )
        parts.append(f'<text x="{LEFT - 6}" y="{up(tick) + 4:.1f}" text-anchor="end">{_tick(tick)}</text>')
    for tick in ticks(left, right, 5):
        parts.append(
            f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_tick(tick)}</text>'
        )
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x)}</text>')
    for at, word in marks:
        parts.append(
            f'<line class="mark" x1="{across(at):.1f}" x2="{across(at):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
        )
        parts.append(f'<text class="mark" x="{across(at) + 3:.1f}" y="{TOP + 8}">{escape(word)}</text>')
    for line, points in kept:
        way = " ".join(f"{across(at):.1f},{up(value):.1f}" for at, value in points)
        parts.append(f'<polyline class="{line.style} c{line.colour}" points="{way}"/>')
        if line.style == "marks" or len(points) == 1:
            parts += [_marker(across(at), up(value), line.colour) for at, value in points]
    hover = {
        "box": [left, right, LEFT, WIDTH - RIGHT, WIDTH],
        "lines": [
            [line.name, [[_short(at), _short(value)] for at, value in points]] for line, points in kept
        ],
    }
    told = [note] if note else []
    told += ["Of long curves the lowest and the highest value of each stretch are drawn."] if fewer else []
    told += (
        [
            f"{odd:,} value{'s' * (odd != 1)} that cannot be drawn (not finite{', or not above 0' * log}) left out."
        ]
        if odd
        else []
    )
    whole = Markup(
        '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}; its numbers are in the table" data-hover="{}">{}</svg>'
    ).format(WIDTH, HEIGHT, title, json.dumps(hover, separators=(",", ":")), Markup("".join(parts)))
    head = [x, *(line.name for line, _ in kept)]
    return card(
        title,
        Markup("{}{}{}").format(
            key([(line.name, line.style, line.colour) for line, _ in kept]),
            whole,
            about(told, table(head, _sampled(kept))),
        ),
        y,
    )


def forest(found: Sequence[Difference], head: str = "Tuned − base") -> Markup:
    """A table of differences, each with its interval; right of the line is better. Each scale has its own
    axis."""
    if not found:
        return Markup("")
    reach = {
        scale: max(
            (
                abs(at)
                for one in found
                if one.scale == scale
                for at in (one.gain, one.low, one.high)
                if at is not None and math.isfinite(at)
            ),
            default=0.0,
        )
        or 1.0
        for scale in dict.fromkeys(one.scale for one in found)
    }
    rows, last = [], None
    for one in sorted(found, key=lambda one: list(reach).index(one.scale)):
        if one.scale != last:
            last = one.scale
            rows.append(
                Markup(
                    '<tr class="axis"><th scope="rowgroup">{}</th><td><div class="ends"><span>−{}</span><span>0</span>'
                    "<span>+{}</span></div></td><td></td></tr>"
                ).format(last, *[number(reach[last], bare=True)] * 2)
            )

        def place(at: float, most: float = reach[one.scale]) -> str:
            return f"{50 + 46 * max(-1.0, min(1.0, at / most)):.2f}%"

        parts = '<line class="mark" x1="50%" x2="50%" y1="0" y2="30"/>'
        if one.low is not None and one.high is not None:
            parts += f'<line class="whisker" x1="{place(one.low)}" x2="{place(one.high)}" y1="15" y2="15"/>'
            for end in (one.low, one.high):
                parts += f'<line class="whisker" x1="{place(end)}" x2="{place(end)}" y1="10" y2="20"/>'
        shape = {"improved": "M0-7 7 5-7 5Z", "regressed": "M0 7 7-5-7-5Z"}.get(
            one.verdict or "", "M-5-5H5V5H-5Z"
        )
        tone = {"improved": "good", "regressed": "error"}.get(one.verdict or "", "open")
        parts += (
            f'<svg x="{place(one.gain)}" y="15" overflow="visible"><path class="{tone}" d="{shape}"/></svg>'
        )
        rows.append(
            Markup(
                '<tr><th scope="row"><bdi>{}</bdi><small>{}</small></th><td class="whole">'
                '<svg class="row" width="100%" height="30" aria-hidden="true">{}</svg></td><td class="text">{}</td></tr>'
            ).format(one.label, one.about, Markup(parts), one.told)
        )
    ends = '<div class="ends"><span>← worse</span><span>better →</span></div>'
    top = Markup('<tr><th scope="col">What</th><th scope="col">{}</th><th scope="col">{}</th></tr>').format(
        Markup(ends), head
    )
    whole = Markup('<div class="card"><table class="forest"><thead>{}</thead><tbody>{}</tbody></table></div>')
    return whole.format(top, Markup("").join(rows))


def bars(found: Sequence[tuple[str, float, str]], *, most: float | None = None, tone: str = "") -> Markup:
    """A table of label, bar and text; bars go from 0 to ``most`` (the largest)."""
    most = most or max((value for _, value, _ in found if math.isfinite(value)), default=0) or 1
    rows = []
    for label, value, told in found:
        wide = 100 * max(0.0, min(1.0, value / most)) if math.isfinite(value) else 0
        bar = f'<rect class="fill {tone}" width="{wide:.2f}%" height="16" rx="2"/>'
        rows.append(_row(label, bar, told, 16))
    return Markup('<table class="bars">{}</table>').format(Markup("").join(rows))


def spread(found: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """A table of label, box and median, over one logarithmic axis; of five numbers each, as `facts.five`
    gives them."""
    fine = [value for _, five in found for value in five if value > 0 and math.isfinite(value)]
    if not fine:
        return Markup("")
    low, high = _room([math.log10(value) for value in fine])

    def place(value: float) -> float:
        return 2 + 96 * (min(max(math.log10(value), low), high) - low) / (high - low) if value > 0 else 0.0

    rows = []
    for label, five in found:
        at = [place(value) for value in five]
        parts = (
            f'<line class="whisker" x1="{at[0]:.2f}%" x2="{at[4]:.2f}%" y1="10" y2="10"/>'
            f'<rect class="box" x="{at[1]:.2f}%" width="{max(at[3] - at[1], 0.3):.2f}%" y="3" height="14"/>'
            f'<line class="middle" x1="{at[2]:.2f}%" x2="{at[2]:.2f}%" y1="3" y2="17"/>'
        )
        rows.append(
            _row(label, parts, " · ".join(f"{value:.2g}" for value in (five[0], five[2], five[4])), 20)
        )
    head = Markup(
        '<thead><tr><th scope="col"></th><th scope="col">logarithmic</th>'
        '<th scope="col" class="number">least · median · most</th></tr></thead>'
    )
    return Markup('<table class="bars">{}{}</table>').format(head, Markup("").join(rows))


def _row(label: str, drawn: str, told: str, tall: int) -> Markup:
    return Markup(
        '<tr><th scope="row"><bdi>{}</bdi></th><td class="whole"><svg class="row" width="100%" height="{}" '
        'aria-hidden="true">{}</svg></td><td class="number">{}</td></tr>'
    ).format(label, tall, Markup(drawn), told)


def columns(title: str, edges: Sequence[float], counts: Sequence[int], *, x: str) -> Markup:
    """A card with a histogram; heights are log(1 + count), which is said."""
    if not counts or not any(counts) or edges[-1] <= edges[0]:
        return Markup("")
    most, wide = math.log1p(max(counts)), edges[-1] - edges[0]
    across = lambda at: LEFT + (at - edges[0]) / wide * (WIDTH - LEFT - RIGHT)  # noqa: E731
    parts = []
    for power in range(0, int(math.log10(max(counts))) + 1, 1 + int(math.log10(max(counts))) // 5):
        y = HEIGHT - BOTTOM - math.log1p(10**power) / most * (HEIGHT - BOTTOM - TOP)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(10**power)}</text>')
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        tall = math.log1p(count) / most * (HEIGHT - BOTTOM - TOP)
        parts.append(
            f'<rect class="fill" x="{across(low):.2f}" width="{max(across(high) - across(low) - 0.6, 0.4):.2f}" '
            f'y="{HEIGHT - BOTTOM - tall:.1f}" height="{tall:.1f}"/>'
        )
    for tick in ticks(edges[0], edges[-1], 5):
        parts.append(
            f'<text x="{across(tick):.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_tick(tick)}</text>'
        )
    parts.append(
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 3}" text-anchor="middle">{escape(x)}</text>'
    )
    rows = [
        (f"{low:.3g} to {high:.3g}", count)
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    whole = Markup(
        '<svg class="plot" viewBox="0 0 {} {}" role="img" aria-label="{}; the numbers are in the table below">{}</svg>'
    )
    drawn = whole.format(WIDTH, HEIGHT, title, Markup("".join(parts)))
    return card(title, drawn + about(["Heights are logarithmic."], table([x, "how many"], rows)), "how many")


def heat(
    rows: Sequence[str], names: Sequence[str], values: Mapping[tuple[str, str], float], form: str = ".3g"
) -> Markup:
    """A table of numbers, the ground the deeper the larger; an empty cell where there is none."""
    most = max((value for value in values.values() if math.isfinite(value)), default=0) or 1
    head = Markup("").join(Markup('<th scope="col" class="number">{}</th>').format(name) for name in names)
    body = []
    for row in rows:
        cells = [values.get((row, name)) for name in names]
        shown = Markup("").join(
            Markup("<td></td>")
            if value is None
            else Markup('<td class="heat" style="--share:{}">{}</td>').format(
                _share(value / most), f"{value:{form}}"
            )
            for value in cells
        )
        body.append(Markup('<tr><th scope="row">{}</th>{}</tr>').format(row, shown))
    whole = Markup('<table class="heats"><thead><tr><th></th>{}</tr></thead><tbody>{}</tbody></table>')
    return SCROLL.format(whole.format(head, Markup("").join(body)))


def card(title: str, inside: Markup, unit: str = "") -> Markup:
    small = Markup(" <small>{}</small>").format(unit) if unit else ""
    return Markup('<figure class="card chart"><figcaption><h3>{}{}</h3></figcaption>{}</figure>').format(
        title, small, inside
    )


def key(found: Sequence[tuple[str, str, int | str]]) -> Markup:
    """What the lines of a chart are, each with a piece of it; nothing for one."""
    if len(found) < 2:
        return Markup("")
    items = []
    for name, style, colour in found:
        dot = _marker(13, 6, colour) if style == "marks" else ""
        line = Markup(
            f'<svg width="26" height="12" aria-hidden="true"><polyline class="{style} c{colour}" points="0,6 26,6"/>{dot}</svg>'
        )
        items.append(Markup("<li>{}{}</li>").format(line, name))
    return Markup('<ul class="key">{}</ul>').format(Markup("").join(items))


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> Markup:
    top = Markup("").join(Markup('<th scope="col">{}</th>').format(name) for name in head)
    body = Markup("").join(
        Markup("<tr>{}</tr>").format(
            Markup("").join(Markup("<td>{}</td>").format(_cell(value)) for value in row)
        )
        for row in rows
    )
    return SCROLL.format(
        Markup("<table><thead><tr>{}</tr></thead><tbody>{}</tbody></table>").format(top, body)
    )


def about(notes: Sequence[str], inside: Markup) -> Markup:
    said = Markup("").join(Markup('<p class="soft">{}</p>').format(note) for note in notes)
    return Markup("{}<details><summary>As a table</summary>{}</details>").format(said, inside)


def ticks(low: float, high: float, many: int) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) between ``low`` and ``high``, about ``many``."""
    step = 10 ** math.floor(math.log10((high - low) / many))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= many)
    return [at * step for at in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _decades(low: float, high: float) -> list[float]:
    if high - low < 1:
        return [value for value in ticks(10**low, 10**high, 4) if value > 0]
    step = 1 + int(high - low) // 6
    return [10.0**power for power in range(math.ceil(low), math.floor(high) + 1, step)]


def _room(values: Sequence[float], pad: bool = True) -> tuple[float, float]:
    low, high = min(values), max(values)
    wide = (high - low) or abs(high) or 1.0
    if high == low:
        return low - wide / 2, high + wide / 2
    return (low - 0.05 * wide, high + 0.05 * wide) if pad else (low, high)


def thinned(points: list[tuple[float, float]], most: int = DRAWN) -> list[tuple[float, float]]:
    """At most about ``most`` points: of each stretch the lowest and the highest, so that no peak is lost."""
    if len(points) <= most:
        return points
    size = -(-2 * len(points) // most)
    kept = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        kept += sorted({min(part, key=lambda one: one[1]), max(part, key=lambda one: one[1])})
    return kept


def _sampled(kept: Sequence[tuple[Line, list[tuple[float, float]]]]) -> list[list[Any]]:
    every = sorted({at for _, points in kept for at, _ in points})
    shown = (
        [
            every[round(at * (len(every) - 1) / (min(len(every), TABLE) - 1))]
            for at in range(min(len(every), TABLE))
        ]
        if len(every) > 1
        else every
    )
    known = [dict(points) for _, points in kept]
    marked = sorted(
        {*shown, *(at for line, points in kept if line.style == "marks" for at, _ in points[:TABLE])}
    )
    return [[at, *(points.get(at) for points in known)] for at in marked]


def _marker(x: float, y: float, colour: int | str) -> str:
    return f'<path class="point c{colour}" d="M{x:.1f} {y - 4.5:.1f}l4.5 4.5-4.5 4.5-4.5-4.5z"/>'


def _tick(value: float) -> str:
    if abs(value) >= 1e4:
        return f"{value / 1e6:g}M" if abs(value) >= 1e6 else f"{value / 1e3:g}k"
    return f"{value:.3g}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")


def _cell(value: Any) -> str:
    return (
        number(value)
        if isinstance(value, float) or value is None
        else f"{value:,}"
        if isinstance(value, int)
        else str(value)
    )


def _short(value: float) -> float:
    return float(f"{value:.5g}")


def _share(value: float) -> str:
    return f"{max(0.0, min(1.0, value)) if math.isfinite(value) else 1:.3f}"
