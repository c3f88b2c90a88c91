"""An audit as one HTML file that needs no network: verdict, dimensions, findings with their rows, charts,
worst rows.

The file holds plotly.js and all it shows. Texts of the data are only ever text: the template escapes them,
the script sets them as text, and a content policy in the page forbids every other script and every request.
How it looks is in ``page.html``."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from itertools import pairwise
from os import fsencode
from os.path import realpath
from pathlib import Path, PurePath, PurePosixPath, PureWindowsPath
from statistics import median
from typing import Any
from urllib.parse import quote

from tunesmith.auditing.findings import SEVERITIES, Audit, Finding
from tunesmith.auditing.screen import (
    SIGNS,
    binned,
    concerned,
    dimensions,
    escaped,
    gravest,
    many,
    measured,
    percent,
    placed,
    visible,
    worst,
)
from tunesmith.auditing.views import EXCERPT
from tunesmith.display.console import duration
from tunesmith.errors import ConfigError
from tunesmith.files import write_text

MARK = '<meta name="generator" content="tunesmith audit">'
"""By it a page is known as one that may be replaced; it is among the first letters of the file."""
ROWS, POINTS, TYPES, BINS, WORST = 200, 2_000, 25, 25, 20
BYTES = 900_000
"""Of rows, over all findings: later findings show fewer than `ROWS` once it is used up."""
FONT = 'system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif'
LOOK = resources.files("tunesmith.display").joinpath("look.css").read_text("utf-8")
"""Colours and ground rules of all pages, reports too."""
CLUSTERS = ("#3399ff", "#d9822b", "#7733ff", "#426660", "#bf7cb4", "#909963", "#a621a6")
"""Told apart with every kind of colour blindness (CIE76 > 26) and against black and white. Further clusters
begin anew: each has its number on the map."""
OTHERS = "#8a8f98"
LABELS = {
    "true": {"name": "true", "colour": "#3399ff", "symbol": "circle", "pattern": ""},
    "false": {"name": "false", "colour": "#d9822b", "symbol": "x", "pattern": "/"},
    "none": {"name": "no label", "colour": OTHERS, "symbol": "diamond", "pattern": "."},
}
_IN_SCRIPT = str.maketrans({letter: f"\\u{ord(letter):04x}" for letter in "<>&\u2028\u2029"})


def write(audit: Audit, path: Path) -> None:
    """Write the page, whole or not at all. Raises ConfigError as `check` does, and where the file cannot be
    written."""
    check(path)
    text = html(audit)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"the page cannot be written: {error.strerror}", where=str(path), hint="name another file"
        ) from error


def check(path: Path) -> None:
    """Raises ConfigError where ``path`` is there already and is no page of an audit."""
    if path.is_file():
        with path.open("rb") as stream:
            if MARK.encode() in stream.read(4096):
                return
    elif not path.exists():
        return
    hint = "name a file that does not exist yet, or remove this one"
    raise ConfigError(
        "this is not a page of tunesmith audit, so it is not replaced", where=str(path), hint=hint
    )


def html(audit: Audit) -> str:
    """The whole page. The same audit gives the same letters."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    places, drawn = _Places(), {}
    charts = audit.charts
    facts: dict[str, Any] = {
        "lengths": _lengths(charts["lengths"], drawn) if charts.get("lengths") else None,
        "types": _types(charts["types"], drawn) if charts.get("types") else None,
        "map": _map(charts["map"], drawn) if charts.get("map") and charts["map"]["x"] else None,
        "quality": _quality(list(audit.quality.values()), drawn) if audit.quality else None,
        "worst": [(places.of(row.source), row) for row in worst(audit, WORST)],
        "findings": audit.findings,
    }
    data: dict[str, Any] = {
        "figures": drawn,
        "labels": LABELS,
        "points": _points(charts["map"], places) if facts["map"] else [],
        "rows": _rows(audit.findings, places),
    }
    data["files"] = files = places.files()
    script = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(
        _IN_SCRIPT
    )
    # finalize: whatever is printed, no letter that UTF-8 cannot write gets past it.
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: escaped(value) if type(value) is str else value,
    )
    environment.filters |= {
        "line": visible,
        "percent": percent,
        "measured": measured,
        "concerned": concerned,
        "coded": _coded,
    }
    template = environment.from_string(
        resources.files("tunesmith.auditing").joinpath("page.html").read_text("utf-8")
    )
    return template.render(
        audit=audit,
        dimensions=dimensions(audit),
        severities=SEVERITIES,
        signs=SIGNS,
        gravest=gravest(audit),
        took=duration(audit.seconds),
        many=many,
        font=Markup(FONT),
        look=Markup(LOOK),
        files=files,
        labels=LABELS,
        shown=data["rows"],
        data=Markup(script),
        plotly=Markup(get_plotlyjs() if drawn else ""),
        mark=Markup(MARK),
        nonce=hashlib.sha256(script.encode()).hexdigest()[
            :32
        ],  # no text can name the hash of what it is part of
        **facts,
    )


class _Places:
    """Where rows are, each file once."""

    def __init__(self) -> None:
        self._at: dict[str, int] = {}

    def of(self, source: str) -> tuple[int, str]:
        """The number of the file and the line, "" where the source names none."""
        path, line = placed(source)
        return self._at.setdefault(path, len(self._at)), line

    def files(self) -> list[dict[str, str]]:
        """name: without its folder where that is enough. path: as given. address: "" where none can be
        written."""
        names = Counter(_pure(path).name for path in self._at)
        return [
            {
                "name": escaped(path if names[(name := _pure(path).name)] > 1 else name),
                "path": escaped(path),
                "address": _address(path),
            }
            for path in self._at
        ]


def _rows(findings: Sequence[Finding], places: _Places) -> list[list[list[Any]]]:
    """File, line and note of the first rows of each finding."""
    left, found = BYTES, []
    for finding in findings:
        told = []
        for row in finding.rows[:ROWS] if left > 0 else ():
            told.append([*places.of(row.source), visible(row.note, EXCERPT)])
            left -= len(told[-1][-1].encode()) + 20
        found.append(told)
    return found


def _pure(path: str) -> PurePath:
    return PureWindowsPath(path) if re.match(r"[A-Za-z]:[\\/]", path) else PurePosixPath(path)


def _address(path: str) -> str:
    pure = _pure(path)
    if isinstance(pure, PureWindowsPath):
        return "file:///" + quote(pure.as_posix(), safe="/:", errors="replace")
    try:
        return "file://" + quote(
            fsencode(Path(realpath(pure.parent), pure.name))
        )  # a link keeps its ending, ".." is no part
    except ValueError:  # no file of this machine has such a name
        return ""


def _coded(text: str) -> Any:
    """``text`` escaped for HTML, with what is between backticks as code."""
    from markupsafe import Markup

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text)))


def _label(value: bool | None) -> str:
    return "none" if value is None else str(value).lower()


def _figure(traces: Sequence[Mapping[str, Any]], **layout: Any) -> dict[str, Any]:
    """For Plotly.newPlot. What is coloured by the page (letters, lines, ground) has no colour here."""
    clear = "rgba(0,0,0,0)"
    axis = {"fixedrange": True, "zeroline": False, "automargin": True, "ticks": "outside", "tickcolor": clear}
    own = {name: axis | layout.pop(name, {}) for name in ("xaxis", "yaxis")}
    common = {
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "showlegend": False,
        "hovermode": "closest",
        "dragmode": False,
        "margin": {"l": 8, "r": 16, "t": 24, "b": 8},
        "font": {"family": FONT, "size": 12},
    }
    return {"data": list(traces), "layout": common | own | layout}


def _plain(text: str, limit: int) -> str:
    """Plotly reads some HTML in its labels."""
    return escape(visible(text, limit), quote=False)


def _middle(text: str, width: int) -> str:
    """``text`` in ``width`` letters, most of them of its end: there names of tools differ."""
    return text if len(text) <= width else f"{text[: width // 4]}…{text[1 + width // 4 - width :]}"


def _bars(
    edges: Sequence[float], counts: Sequence[int], told: str, unit: str, marks: Mapping[str, float]
) -> dict[str, Any]:
    """A histogram. ``told``: what a row is measured in. ``marks``: name → place of a line; beyond the bars it
    is only named."""
    wide = [high - low for low, high in pairwise(edges)]
    bar = {
        "type": "bar",
        "x": [low + width / 2 for low, width in zip(edges, wide, strict=False)],
        "y": list(counts),
        "width": [0.92 * width for width in wide],
        "marker": {"color": CLUSTERS[0]},
        "customdata": [f"{low:,.0f}–{high:,.0f}" for low, high in pairwise(edges)],
        "hovertemplate": f"%{{customdata}} {_plain(unit, 40)}<br>%{{y:,}} rows<extra></extra>",
    }
    near = {name: at for name, at in marks.items() if at <= 1.3 * edges[-1]}
    right = max([edges[-1], *near.values()])
    shapes, notes = [], []
    for name, at in marks.items():
        text = {"yref": "paper", "y": 1, "yanchor": "bottom", "showarrow": False}
        if name in near:
            shapes.append(
                {
                    "type": "line",
                    "x0": at,
                    "x1": at,
                    "yref": "paper",
                    "y0": 0,
                    "y1": 1,
                    "line": {"dash": "dash"},
                }
            )
            side = "right" if at > 0.6 * right else "left"
            notes.append(text | {"x": at, "xanchor": side, "text": f"{name} {at:,.0f}"})
        else:
            notes.append(text | {"x": 1, "xref": "paper", "xanchor": "right", "text": f"{name} {at:,.0f} →"})
    x = {
        "title": {"text": _plain(told, 32)},
        "range": [min(edges[0], 0), 1.03 * right],
        "nticks": 7,
        "tickformat": ",d",
    }
    y = {"title": {"text": "rows"}, "rangemode": "tozero", "nticks": 5, "tickformat": ",d"}
    return _figure([bar], xaxis=x, yaxis=y, shapes=shapes, annotations=notes)


def _lengths(chart: Mapping[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    for part, found in chart["parts"].items():
        marks = {"limit": chart["limit"]} if chart.get("limit") else {}
        drawn[f"length-{part}"] = _bars(found["edges"], found["counts"], chart["unit"], "tokens", marks)
    return {"unit": chart["unit"], "limit": chart.get("limit"), "parts": chart["parts"]}


def _types(chart: Sequence[Mapping[str, Any]], drawn: dict[str, Any]) -> dict[str, Any]:
    """Stacked bars of the most frequent types."""
    rows = [(str(one["type"]), {key: int(one.get(key, 0)) for key in LABELS}) for one in chart]
    shown = rows[:TYPES]
    used = [key for key in LABELS if any(counts[key] for _, counts in shown)]
    at = list(range(len(shown)))
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": LABELS[key]["name"],
            "y": at,
            "x": [counts[key] for _, counts in shown],
            "marker": {
                "color": LABELS[key]["colour"],
                "pattern": {"shape": LABELS[key]["pattern"], "fillmode": "overlay"},
            },
            "customdata": [_plain(name, 80) for name, _ in shown],
            "hovertemplate": f"%{{customdata}}<br>{LABELS[key]['name']}: %{{x:,}} rows<extra></extra>",
        }
        for key in used
    ]
    labels = {width: [_plain(_middle(name, width), width) for name, _ in shown] for width in (20, 30)}
    y = {"tickvals": at, "ticktext": labels[30], "range": [len(shown) - 0.4, -0.6]}
    drawn["types"] = _figure(
        traces,
        barmode="stack",
        bargap=0.25,
        height=70 + 22 * len(shown),
        yaxis=y,
        meta={"narrow": labels[20]},
        xaxis={"title": {"text": "rows"}, "tickformat": ",d", "nticks": 4, "tickangle": 0},
    )
    rest = sum(sum(counts.values()) for _, counts in rows[TYPES:])
    return {"rest": rest, "used": used, "rows": shown}


def _kept(chart: Mapping[str, Any]) -> list[int]:
    """The points that are drawn: evenly through the rows, `POINTS` at most."""
    step = max(1, -(-len(chart["x"]) // POINTS))
    return list(range(0, len(chart["x"]), step))


def _points(chart: Mapping[str, Any], places: _Places) -> list[list[Any]]:
    """File, line, label, name of the cluster and prompt of each point that is drawn."""
    return [
        [
            *places.of(chart["source"][at]),
            _label(chart["label"][at]),
            _name(chart, chart["cluster"][at]),
            visible(chart["text"][at], EXCERPT),
        ]
        for at in _kept(chart)
    ]


def _name(chart: Mapping[str, Any], cluster: int) -> str:
    return visible(chart["names"][cluster], 80) if 0 <= cluster < len(chart["names"]) else "no cluster"


def _map(chart: Mapping[str, Any], drawn: dict[str, Any]) -> dict[str, Any]:
    """One trace a cluster, the largest first; customdata of a point is its number among those drawn."""
    kept = _kept(chart)
    sizes: dict[int, dict[str, int]] = {}
    for cluster, label in zip(chart["cluster"], chart["label"], strict=True):
        counts = sizes.setdefault(cluster, dict.fromkeys(LABELS, 0))
        counts[_label(label)] += 1
    clusters, traces, names = [], [], []
    for rank, (cluster, counts) in enumerate(sorted(sizes.items(), key=lambda one: -sum(one[1].values()))):
        colour = CLUSTERS[rank % len(CLUSTERS)]
        numbers = [number for number, at in enumerate(kept) if chart["cluster"][at] == cluster]
        rows = [kept[number] for number in numbers]
        marker = {"color": colour, "size": 9, "opacity": 0.9}
        if rows:  # Plotly has no element for a trace without points
            middle = {"x": median(chart["x"][at] for at in rows), "y": median(chart["y"][at] for at in rows)}
            names.append(
                middle | {"text": f"{rank + 1}", "showarrow": False, "yshift": 9, "font": {"size": 14}}
            )
            traces.append(
                {
                    "type": "scatter",
                    "mode": "markers",
                    "hoverinfo": "none",
                    "customdata": numbers,
                    "x": [round(chart["x"][at], 3) for at in rows],
                    "y": [round(chart["y"][at], 3) for at in rows],
                    "marker": marker
                    | {"symbol": [LABELS[_label(chart["label"][at])]["symbol"] for at in rows]},
                }
            )
        clusters.append(
            {
                "name": _name(chart, cluster),
                "colour": colour,
                "drawn": bool(rows),
                "rows": sum(counts.values()),
                **counts,
            }
        )
    axis = {"visible": False, "fixedrange": False}
    bar = {"bgcolor": "rgba(0,0,0,0)", "color": OTHERS, "activecolor": CLUSTERS[0]}
    drawn["map"] = _figure(
        traces, xaxis=axis, yaxis=axis, height=520, dragmode="zoom", modebar=bar, annotations=names
    )
    used = [key for key in LABELS if any(counts[key] for counts in sizes.values())]
    return {
        "clusters": clusters,
        "shown": len(kept),
        "of": len(chart["x"]),
        "method": chart.get("method", ""),
        "used": used,
    }


def _quality(scores: Sequence[float], drawn: dict[str, Any]) -> dict[str, Any]:
    middle = median(scores)
    edges = [100 * at / BINS for at in range(BINS + 1)]
    drawn["quality"] = _bars(edges, binned(scores, BINS), "quality score", "points", {"median": middle})
    return {"median": middle, "many": len(scores)}
