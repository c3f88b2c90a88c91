"""Charts as SVG and HTML that need no script. The page gives the colours; the numbers stand beside the
drawing as text.

Lines differ by dash and marker as well as by colour. A chart fits its card at any width. Long curves are
thinned to the lowest and the highest value of each stretch, so no spike is lost."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from markupsafe import Markup, escape

from tunesmith.display.words import number

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 400, 220, 52, 18, 10, 34
DRAWN = 400
"""Points of one line at most."""
TABLE = 12
"""Rows of the table under a chart."""
THINNED = "Of long curves the lowest and the highest value of each stretch are drawn."
FAR = 1.3
"""A mark further out than so many times the right edge of the last bar is named and not drawn."""
SPREAD, GROUPS = (760, 520), 7
"""Size of a `scatter`, and its number of colours: further groups repeat them, each group has its number."""
FORMS = {
    "true": "M0-4.5A4.5 4.5 0 1 1 0 4.5A4.5 4.5 0 1 1 0-4.5Z",
    "false": "M-4.8-3-3-4.8 0-1.8 3-4.8 4.8-3 1.8 0 4.8 3 3 4.8 0 1.8-3 4.8-4.8 3-1.8 0Z",
    "none": "M0-5.5 5.5 0 0 5.5-5.5 0Z",
}
"""Markers by label: circle, cross, diamond."""
PATTERNS = Markup(
    '<svg width="0" height="0" class="patterns" aria-hidden="true">'
    '<pattern id="hatch" width="8" height="8" patternUnits="userSpaceOnUse">'
    '<rect width="8" height="8"/><path d="M-2 6 6-2M2 10 10 2" stroke-width="1.5"/></pattern>'
    '<pattern id="dots" width="8" height="8" patternUnits="userSpaceOnUse">'
    '<rect width="8" height="8"/><circle cx="4" cy="4" r="1.4"/></pattern></svg>'
)
"""Fills that differ in print and for every eye; ``look.css`` colours them."""
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
    """A row of `forest`. ``gain``, ``low``, ``high``: positive is better. ``scale``: rows of the same scale
    share an axis."""

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
    curves: Sequence[Line],
    *,
    x: str = "step",
    y: str = "",
    log: bool = False,
    zero: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    note: str = "",
) -> Markup:
    """A card with curves over ``x``, or nothing if no line has a number. ``marks``: upright lines with a
    word.

    log: a logarithmic axis, for what is above zero. zero: the axis begins there. What cannot be drawn is
    counted below."""
    every = [(line, _finite(line, log)) for line in curves]
    drawn = [(line, thinned(points)) for line, points in every if points]
    if not drawn:
        return Markup("")
    axes = _axes([point for _, points in drawn for point in points], log, zero)
    low, high = axes.y
    heights = _decades(low, high) if log else ticks(low, high, 5)
    parts = [*axes.grid(heights), *axes.below(x)]
    for x_value, word in marks:
        parts.append(_upright(axes.across(x_value)))
        parts.append(
            f'<text class="mark" x="{axes.across(x_value) + 3:.1f}" y="{TOP + 8}">{escape(word)}</text>'
        )
    for line, points in drawn:
        way = " ".join(f"{axes.across(x_value):.1f},{axes.up(value):.1f}" for x_value, value in points)
        parts.append(f'<polyline class="{line.style} c{line.colour}" points="{way}"/>')
        if line.style == "marks" or len(points) == 1:
            parts += [_marker(axes.across(x_value), axes.up(value), line.colour) for x_value, value in points]
    hover = {
        "box": [*axes.x, LEFT, WIDTH - RIGHT, WIDTH],
        "lines": [
            [line.name, [[_short(x_value), _short(value)] for x_value, value in points]]
            for line, points in drawn
        ],
    }
    drawing = _plot(
        title, "", parts, "its numbers are in the table", json.dumps(hover, separators=(",", ":"))
    )
    legend = key([(line.name, line.style, line.colour) for line, _ in drawn])
    numbers = table([x, *(line.name for line, _ in drawn)], _sampled(drawn))
    left_out = sum(value is not None for line in curves for value in line.y) - sum(
        len(points) for _, points in every
    )
    thin = sum(len(points) for _, points in drawn) < sum(len(points) for _, points in every)
    notes = [note, THINNED if thin else "", _left_out(left_out, log)]
    return card(title, legend + drawing + about([*filter(None, notes)], numbers), y)


def _finite(line: Line, log: bool) -> list[tuple[float, float]]:
    """The points that can be drawn."""
    points = [(float(x), float(value)) for x, value in zip(line.x, line.y, strict=True) if value is not None]
    return [point for point in points if math.isfinite(point[1]) and (not log or point[1] > 0)]


def _left_out(count: int, log: bool) -> str:
    values = f"{count:,} value{'s' * (count != 1)}"
    return f"{values} that cannot be drawn (not finite{', or not above 0' * log}) left out." if count else ""


def forest(differences: Sequence[Difference], head: str = "Tuned − base") -> Markup:
    """A table of differences, each with its interval; right of the line is better. Each scale has its own
    axis."""
    if not differences:
        return Markup("")
    rows = []
    for scale in dict.fromkeys(difference.scale for difference in differences):
        members = [difference for difference in differences if difference.scale == scale]
        ends = [abs(end) for row in members for end in (row.gain, row.low, row.high) if end is not None]
        reach = max(filter(math.isfinite, ends), default=0.0) or 1.0
        rows.append(
            Markup(
                '<tr class="axis"><th scope="rowgroup">{}</th><td><div '
                'class="ends"><span>−{}</span><span>0</span>'
                "<span>+{}</span></div></td><td></td></tr>"
            ).format(scale, *[number(reach, bare=True)] * 2)
        )
        rows += [_difference(row, reach) for row in members]
    ends = '<div class="ends"><span>← worse</span><span>better →</span></div>'
    top = Markup('<tr><th scope="col">What</th><th scope="col">{}</th><th scope="col">{}</th></tr>').format(
        Markup(ends), head
    )
    whole = Markup('<div class="card"><table class="forest"><thead>{}</thead><tbody>{}</tbody></table></div>')
    return whole.format(top, Markup("").join(rows))


def _difference(row: Difference, reach: float) -> Markup:
    """A row of `forest`, on an axis from −``reach`` to ``reach``."""

    def place(value: float) -> str:
        return f"{50 + 46 * max(-1.0, min(1.0, value / reach)):.2f}%"

    parts = '<line class="mark" x1="50%" x2="50%" y1="0" y2="30"/>'
    if row.low is not None and row.high is not None:
        parts += f'<line class="whisker" x1="{place(row.low)}" x2="{place(row.high)}" y1="15" y2="15"/>'
        for end in (row.low, row.high):
            parts += f'<line class="whisker" x1="{place(end)}" x2="{place(end)}" y1="10" y2="20"/>'
    shape, tone = {"improved": ("M0-7 7 5-7 5Z", "good"), "regressed": ("M0 7 7-5-7-5Z", "error")}.get(
        row.verdict or "", ("M-5-5H5V5H-5Z", "open")
    )
    parts += f'<svg x="{place(row.gain)}" y="15" overflow="visible"><path class="{tone}" d="{shape}"/></svg>'
    return Markup(
        '<tr><th scope="row"><bdi>{}</bdi><small>{}</small></th><td class="whole">'
        '<svg class="row" width="100%" height="30" aria-hidden="true">{}</svg></td><td '
        'class="text">{}</td></tr>'
    ).format(row.label, row.about, Markup(parts), row.told)


def bars(given: Sequence[tuple[str, float, str]]) -> Markup:
    """A table of label, bar and text; bars go from 0 to the largest value."""
    most = max((value for _, value, _ in given if math.isfinite(value)), default=0) or 1
    rows = []
    for label, value, text in given:
        wide = 100 * max(0.0, value / most) if math.isfinite(value) else 0
        bar = f'<rect class="fill" width="{wide:.2f}%" height="16" rx="2"/>'
        rows.append(_row(label, bar, text, 16))
    return Markup('<table class="bars">{}</table>').format(Markup("").join(rows))


def spread(boxes: Sequence[tuple[str, Sequence[float]]]) -> Markup:
    """A table of label, box and median, over one logarithmic axis; of five numbers each, as `facts.five`
    gives them."""
    fine = [value for _, five in boxes for value in five if value > 0 and math.isfinite(value)]
    if not fine:
        return Markup("")
    low, high = _room([math.log10(value) for value in fine])

    def place(value: float) -> float:
        return 2 + 96 * (min(max(math.log10(value), low), high) - low) / (high - low) if value > 0 else 0.0

    rows = []
    for label, five in boxes:
        places = [place(value) for value in five]
        parts = (
            f'<line class="whisker" x1="{places[0]:.2f}%" x2="{places[4]:.2f}%" y1="10" y2="10"/>'
            f'<rect class="box" x="{places[1]:.2f}%" width="{max(places[3] - places[1], 0.3):.2f}%" y="3" '
            f'height="14"/>'
            f'<line class="middle" x1="{places[2]:.2f}%" x2="{places[2]:.2f}%" y1="3" y2="17"/>'
        )
        rows.append(
            _row(label, parts, " · ".join(f"{value:.2g}" for value in (five[0], five[2], five[4])), 20)
        )
    head = Markup(
        '<thead><tr><th scope="col"></th><th scope="col">logarithmic</th>'
        '<th scope="col" class="number">least · median · most</th></tr></thead>'
    )
    return Markup('<table class="bars">{}{}</table>').format(head, Markup("").join(rows))


def _row(label: str, drawn: str, text: str, tall: int) -> Markup:
    return Markup(
        '<tr><th scope="row"><bdi>{}</bdi></th><td class="whole"><svg class="row" width="100%" height="{}" '
        'aria-hidden="true">{}</svg></td><td class="number">{}</td></tr>'
    ).format(label, tall, Markup(drawn), text)


def columns(
    title: str,
    edges: Sequence[float],
    counts: Sequence[int],
    *,
    x: str,
    y: str = "how many",
    name: str = "",
    log: bool = False,
    marks: Mapping[str, float] | None = None,
) -> Markup:
    """A card with a histogram, or nothing if all counts are 0. ``name``: id of the drawing. ``marks``: name →
    place of an upright line; far beyond the bars it is only named. log: heights are log(1 + count), which a
    note says."""
    if not counts or not any(counts) or edges[-1] <= edges[0]:
        return Markup("")
    near = {word: mark for word, mark in (marks or {}).items() if mark <= FAR * edges[-1]}
    right = max([edges[-1], *near.values()])
    scale = math.log1p if log else float
    axes = _Axes((edges[0], right), (0.0, scale(max(counts))), scale)
    parts = [*axes.grid(_powers(max(counts)) if log else ticks(0, max(counts), 5)), *axes.below(x)]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        left, width = axes.across(low), max(axes.across(high) - axes.across(low) - 0.6, 0.4)
        top = axes.up(count)
        parts.append(
            f'<rect class="fill bar" x="{left:.2f}" width="{width:.2f}" y="{top:.1f}" '
            f'height="{HEIGHT - BOTTOM - top:.1f}"><title>{low:,.4g} to {high:,.4g}: {count:,}</title></rect>'
        )
    for word, mark in (marks or {}).items():
        beside = word in near
        place = axes.across(mark) if beside else WIDTH - RIGHT
        if beside:
            parts.append(_upright(place))
        side, gap = ("end", -4) if place > 0.6 * WIDTH else ("start", 4)
        parts.append(
            f'<text class="mark" x="{place + gap * beside:.1f}" y="{TOP + 8}" text-anchor="{side}">'
            f"{escape(word)} {mark:,.0f}{'' if beside else ' →'}</text>"
        )
    rows = [
        (f"{low:.3g} to {high:.3g}", count)
        for low, high, count in zip(edges, edges[1:], counts, strict=False)
    ]
    drawing = _plot(title, name, parts, "the numbers are in the table below")
    notes = ["Heights are logarithmic."] if log else []
    return card(title, drawing + about(notes, table([x, y], rows)), y)


class _Axes:
    """Places in a plot of ``WIDTH`` × ``HEIGHT``. ``x``: from and to. ``y``: from and to, after ``scale``."""

    def __init__(
        self, x: tuple[float, float], y: tuple[float, float], scale: Callable[[float], float]
    ) -> None:
        self.x, self.y, self._scale = x, y, scale

    def across(self, value: float) -> float:
        left, right = self.x
        return LEFT + (value - left) / (right - left) * (WIDTH - LEFT - RIGHT)

    def up(self, value: float) -> float:
        low, high = self.y
        return HEIGHT - BOTTOM - (self._scale(value) - low) / (high - low) * (HEIGHT - BOTTOM - TOP)

    def grid(self, heights: Iterable[float]) -> Iterator[str]:
        for height in heights:
            y = self.up(height)
            yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
            yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_tick(height)}</text>'

    def below(self, label: str) -> Iterator[str]:
        for tick in ticks(*self.x, 5):
            x = self.across(tick)
            yield f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{_tick(tick)}</text>'
        middle = (LEFT + WIDTH - RIGHT) / 2
        yield f'<text x="{middle}" y="{HEIGHT - 3}" text-anchor="middle">{escape(label)}</text>'


def _axes(points: Sequence[tuple[float, float]], log: bool, zero: bool) -> _Axes:
    heights = [math.log10(value) if log else value for _, value in points]
    low, high = _room([0.0, *heights] if zero else heights)
    low = 0.0 if zero and min(heights) >= 0 else low
    return _Axes(_room([x for x, _ in points], pad=False), (low, high), math.log10 if log else float)


def _upright(x: float) -> str:
    return f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'


def _plot(title: str, name: str, parts: Iterable[str], where: str, hover: str = "") -> Markup:
    return Markup('<svg class="plot"{}{} viewBox="0 0 {} {}" role="img" aria-label="{}; {}">{}</svg>').format(
        Markup(' id="{}"').format(name) if name else "",
        Markup(' data-hover="{}"').format(hover) if hover else "",
        WIDTH,
        HEIGHT,
        title,
        where,
        Markup("".join(parts)),
    )


def _powers(most: int) -> list[float]:
    top = int(math.log10(most))
    return [10.0**power for power in range(0, top + 1, 1 + top // 5)]


def stacked(
    name: str, rows: Sequence[tuple[str, Mapping[str, int]]], keys: Mapping[str, str], limit: int
) -> Markup:
    """A legend and a table of bars, one a row, cut by key. ``keys``: style class → what it is called.
    ``limit``: rows that are drawn; all of them stand in the table below."""
    most = max((sum(counts.values()) for _, counts in rows[:limit]), default=0) or 1
    drawn = []
    for label, counts in rows[:limit]:
        parts, left = [], 0.0
        for key, called in keys.items():
            width = 100 * counts[key] / most
            if counts[key]:
                parts.append(
                    Markup(
                        '<rect class="bar {}" x="{}%" width="{}%" height="16"><title>{}</title></rect>'
                    ).format(key, f"{left:.2f}", f"{width:.2f}", f"{label}: {counts[key]:,} {called}")
                )
            left += width
        drawn.append(_row(middle(label, 36), "".join(parts), f"{sum(counts.values()):,}", 16))
    legend = Markup("").join(
        Markup(
            '<li><svg viewBox="0 0 14 14" aria-hidden="true"><rect class="bar {}" width="14" height="14" '
            'rx="2"/>'
            "</svg>{}</li>"
        ).format(key, called)
        for key, called in keys.items()
    )
    numbers = table(["", *keys.values()], [(label, *(counts[key] for key in keys)) for label, counts in rows])
    return Markup('<ul class="key">{}</ul>{}<table class="bars" id="{}">{}</table>{}').format(
        legend, PATTERNS, name, Markup("").join(drawn), about([], numbers)
    )


def middle(text: str, width: int) -> str:
    """``text`` shortened to ``width`` letters, most of them from its end, where names of tools differ."""
    return text if len(text) <= width else f"{text[: width // 4]}…{text[1 + width // 4 - width :]}"


class Dot(NamedTuple):
    """A point of a `scatter`. ``group``: place of its colour. ``key``: style class of its form."""

    x: float
    y: float
    group: int
    key: str


def scatter(name: str, dots: Sequence[Dot], label: str) -> Markup:
    """Points without axes, each group with its number beside its middle, the first group below. A script
    zooms, colours and names them: ``data-n`` is the place in ``dots``."""
    left, right = _room([dot.x for dot in dots])
    low, high = _room([dot.y for dot in dots])

    def place(x: float, y: float) -> tuple[float, float]:
        return (x - left) / (right - left) * SPREAD[0], (high - y) / (high - low) * SPREAD[1]

    parts = []
    numbers = []
    for group in sorted({dot.group for dot in dots}):
        members = {nth: dot for nth, dot in enumerate(dots) if dot.group == group}
        parts.append(f'<g class="trace k{group % GROUPS}">')
        for nth, dot in members.items():
            x, y = place(dot.x, dot.y)
            parts.append(
                f'<path class="point {dot.key}" data-n="{nth}" style="translate:{x:.1f}px {y:.1f}px" '
                f'd="{FORMS[dot.key]}"/>'
            )
        parts.append("</g>")
        x, y = place(
            *(statistics.median(ends) for ends in zip(*(dot[:2] for dot in members.values()), strict=True))
        )
        numbers.append(f'<text class="mark" style="translate:{x:.1f}px {y:.1f}px" y="-8">{group + 1}</text>')
    return Markup(
        '<svg class="plot scatter" id="{}" viewBox="0 0 {} {}" tabindex="0" role="application" '
        'aria-label="{}" '
        'aria-describedby="tip">{}</svg>'
    ).format(name, *SPREAD, label, Markup("".join([*parts, *numbers])))


def form(key: str) -> Markup:
    """The marker of ``key`` for a legend."""
    return Markup(
        '<svg viewBox="-7 -7 14 14" aria-hidden="true"><path class="point {}" d="{}"/></svg>'
    ).format(key, FORMS[key])


def heat(
    rows: Sequence[str], names: Sequence[str], values: Mapping[tuple[str, str], float], form: str = ".3g"
) -> Markup:
    """A table of numbers with a deeper ground the larger they are; an empty cell if there is no number."""
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


def key(curves: Sequence[tuple[str, str, int | str]]) -> Markup:
    """The legend of a chart's lines; nothing for a single line."""
    if len(curves) < 2:
        return Markup("")
    items = []
    for name, style, colour in curves:
        dot = _marker(13, 6, colour) if style == "marks" else ""
        line = Markup(
            f'<svg width="26" height="12" aria-hidden="true"><polyline class="{style} c{colour}" points="0,6 '
            f'26,6"/>{dot}</svg>'
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
    return [
        multiple * step
        for multiple in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


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
    thin = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        thin += sorted({min(part, key=lambda point: point[1]), max(part, key=lambda point: point[1])})
    return thin


def _sampled(curves: Sequence[tuple[Line, list[tuple[float, float]]]]) -> list[list[Any]]:
    every = sorted({x for _, points in curves for x, _ in points})
    shown = (
        [
            every[round(x * (len(every) - 1) / (min(len(every), TABLE) - 1))]
            for x in range(min(len(every), TABLE))
        ]
        if len(every) > 1
        else every
    )
    known = [dict(points) for _, points in curves]
    marked = sorted(
        {*shown, *(x for line, points in curves if line.style == "marks" for x, _ in points[:TABLE])}
    )
    return [[x, *(points.get(x) for points in known)] for x in marked]


def _marker(x: float, y: float, colour: int | str) -> str:
    return f'<path class="point c{colour}" d="M{x:.1f} {y - 4.5:.1f}l4.5 4.5-4.5 4.5-4.5-4.5z"/>'


def _tick(value: float) -> str:
    if 1e3 <= abs(value) < 1e4:
        return f"{value:,.0f}".replace("-", "−")
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
