"""The section of the page that shows the prompts as a map: one dot a row, coloured by cluster or by label."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from tunesmith.auditing.registry import MapPoint, Section
from tunesmith.display import charts
from tunesmith.display.text import EXCERPT, many, percent, visible

POINTS = 2_000
LABELS = {"true": "true", "false": "false", "none": "no label"}
"""Style class of a label → what it is called."""
LABEL = "Map of prompts. Arrow keys go from point to point, Enter keeps one below."
KEPT = (
    "Point at a row to read it; a click keeps it here, with a link to its line. With the keyboard: "
    "arrows and Enter."
)
ZOOMS = {"in": ("Zoom in", "+"), "out": ("Zoom out", "−"), "whole": ("Show all", "all")}


def label_key(label: bool | None) -> str:
    return "none" if label is None else str(label).lower()


def section(chart: Mapping[str, Any]) -> Section | None:
    """``chart``: as `clusters` draws it. None if there is no prompt."""
    if not chart["x"]:
        return None
    sizes: dict[int, dict[str, int]] = {}
    for cluster, label in zip(chart["cluster"], chart["label"], strict=True):
        sizes.setdefault(cluster, dict.fromkeys(LABELS, 0))[label_key(label)] += 1
    ranked = sorted(sizes, key=lambda cluster: -sum(sizes[cluster].values()))
    drawn = range(0, len(chart["x"]), max(1, -(-len(chart["x"]) // POINTS)))  # evenly through the rows
    dots = [
        charts.Dot(
            chart["x"][row],
            chart["y"][row],
            ranked.index(chart["cluster"][row]),
            label_key(chart["label"][row]),
        )
        for row in drawn
    ]
    points = [
        MapPoint(
            chart["source"][row],
            LABELS[label_key(chart["label"][row])],
            _name(chart, chart["cluster"][row]),
            visible(chart["text"][row], EXCERPT),
        )
        for row in drawn
    ]
    lead = "Prompts that are alike lie close together."
    if method := chart.get("method"):
        lead += f" {visible(method, 200)}."
    if len(drawn) < len(chart["x"]):
        lead += f" {len(drawn):,} of {len(chart['x']):,} points are drawn."
    used = [key for key in LABELS if any(counts[key] for counts in sizes.values())]
    body = Markup('<div class="card map"><figure>{}{}{}</figure>{}</div>').format(
        _choices(used),
        _stage(charts.scatter("map", dots, LABEL)),
        Markup('<div class="kept" id="kept" aria-live="polite"><p class="soft">{}</p></div>').format(KEPT),
        _clusters(
            chart, [(cluster, sizes[cluster]) for cluster in ranked], {dot.group for dot in dots}, used
        ),
    )
    return Section("prompts", "Map of prompts", lead, body, points)


def _name(chart: Mapping[str, Any], cluster: int) -> str:
    return visible(chart["names"][cluster], 80) if 0 <= cluster < len(chart["names"]) else "no cluster"


def _choices(used: list[str]) -> Markup:
    """How to colour, and what the markers mean."""
    markers = Markup("").join(Markup("<li>{}{}</li>").format(charts.form(key), LABELS[key]) for key in used)
    return Markup(
        '<div class="bar"><fieldset><legend>Colour</legend>'
        '<label><input type="radio" name="colour" value="cluster" checked> by cluster</label>'
        '<label><input type="radio" name="colour" value="label"> by label</label></fieldset>'
        '<ul class="key" aria-label="Markers">{}</ul></div>'
    ).format(markers)


def _stage(drawing: Markup) -> Markup:
    buttons = Markup("").join(
        Markup('<button type="button" data-zoom="{}" title="{}" aria-label="{}">{}</button>').format(
            way, title, title, sign
        )
        for way, (title, sign) in ZOOMS.items()
    )
    return Markup(
        '<div class="stage">{}<div class="zoom">{}</div><div class="tip" id="tip" role="status" '
        "hidden></div></div>"
    ).format(drawing, buttons)


def _clusters(
    chart: Mapping[str, Any], sizes: list[tuple[int, dict[str, int]]], drawn: set[int], used: list[str]
) -> Markup:
    """A table: number, name, points and share of true labels of each cluster, the largest first."""
    labelled = "true" in used or "false" in used
    rows = []
    for rank, (cluster, counts) in enumerate(sizes):
        name = Markup("{}&ensp;<bdi>{}</bdi>").format(rank + 1, _name(chart, cluster))
        if rank in drawn:
            name = Markup(
                '<button type="button" aria-pressed="false" title="Show this cluster alone">'
                '<span class="swatch k{}"></span><span>{}</span></button>'
            ).format(rank % charts.GROUPS, name)
        judged = counts["true"] + counts["false"]
        share = Markup('<td class="number">{}</td>').format(
            percent(counts["true"] / judged) if judged else ""
        )
        rows.append(
            Markup('<tr><td>{}</td><td class="number">{}</td>{}</tr>').format(
                name, f"{sum(counts.values()):,}", share if labelled else ""
            )
        )
    head = Markup('<th scope="col">{}</th><th scope="col" class="number">Points</th>').format(
        many(len(sizes), "cluster")
    )
    head += Markup('<th scope="col" class="number">True</th>') if labelled else Markup("")
    return Markup(
        '<div class="clusters"><table><caption class="hidden-label">Clusters</caption>'
        "<thead><tr>{}</tr></thead><tbody>{}</tbody></table></div>"
    ).format(head, Markup("").join(rows))
