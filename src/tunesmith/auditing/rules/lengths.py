"""Lengths of prompts, answers and whole rows in tokens of the target tokenizer, with the control tokens of
the template.

prompt: what stands before the first learned token. answer: all learned tokens of a row. total: the longest
sequence that the row becomes. Without a tokenizer words are counted, and the bars, which are in tokens, are
not applied."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np
from markupsafe import Markup

from tunesmith.auditing.findings import Finding, FindingRow, counted
from tunesmith.auditing.registry import Rule, Section, register
from tunesmith.auditing.views import WORD, Context, Survey, View
from tunesmith.display import charts
from tunesmith.display.text import visible
from tunesmith.errors import TemplateError

QUANTILES = (5, 25, 50, 75, 95, 99, 100)
FAR = 3.0
"""A total is an outlier if its logarithm is so many quartile distances above the upper or below the lower
quartile."""


class RowLengths(NamedTuple):
    prompt: int
    answer: int
    total: int


@register
class Lengths(Rule):
    name = "length"
    order = 40
    looks_at = "prompt, answer and total in tokens of the target tokenizer"
    findings: ClassVar = {
        "answers": "mean length of the answers",
        "tail": "length under which 99 of 100 rows stay",
        "limit": "rows longer than `batch.length`",
        "outliers": "rows far longer or shorter than the others",
    }
    gravest: ClassVar = {"outliers": "note"}
    bar = "mean answer 50 to 200 (`audit.mean_answer`), 99 of 100 rows under 1,024 (`audit.tail`)"
    chart = "lengths"
    drawn = True

    def look(self, view: View, context: Context) -> RowLengths | None:
        if context.renderer is None and context.rendered is None:
            prompt, answer = (len(WORD.findall(text)) for text in (view.asked, view.said))
            return RowLengths(prompt, answer, len(view.words))
        rows = context.rows(view)
        if isinstance(rows, TemplateError) or not rows:
            return None
        learned_rows = [row for row in rows if row.kind != "rejected"]
        learned = sum(int((row.tokens.targets >= 1).sum()) for row in learned_rows)
        first = int(np.argmax(learned_rows[0].tokens.targets >= 1))
        return RowLengths(first, learned, max(len(row.tokens.ids) for row in rows))

    def judge(self, facts: list[RowLengths | None], survey: Survey) -> Iterator[Finding]:
        assert survey.context is not None
        rows = [row for row in survey.training if facts[row] is not None]
        if not rows:
            return
        context, spec = survey.context, survey.spec
        table = np.array([facts[row] for row in rows])
        tokens = context.renderer is not None or context.rendered is not None
        unit = f"tokens of {context.tokenizer}" if tokens else "words"
        word = "tokens" if tokens else "words"
        survey.charts["lengths"] = {
            "unit": unit,
            "limit": context.limit if tokens else None,
            "parts": {name: _part(table[:, column]) for column, name in enumerate(RowLengths._fields)},
        }
        mean, low, high = float(table[:, 1].mean()), *spec.mean_answer
        ratio = float(np.median(table[:, 1] / np.maximum(table[:, 0], 1)))
        sentence = (
            f"the mean answer has {mean:,.0f} {word}; answers are {ratio:.1f} times as long as prompts "
            f"(median)"
        )
        if not tokens:
            hint = "name --model or --tokenizer to count tokens"
            yield Finding("length.answers", "note", sentence, of=len(rows), value=mean, hint=hint)
        else:
            fits = low <= mean <= high
            hint = (
                "long answers cost time and memory, very short ones teach little: is this the length "
                "that your users should get?"
            )
            yield Finding(
                "length.answers",
                "good" if fits else "warning",
                sentence,
                of=len(rows),
                value=mean,
                threshold=f"{low} to {high}",
                hint="" if fits else hint,
            )
            yield self._tail(table[:, 2], rows, survey)
            yield self._cut(table[:, 2], rows, survey)
        yield self._outliers(table[:, 2], rows, survey, word)

    def draw(self, chart: dict[str, Any]) -> Section:
        limit = chart.get("limit")
        marks = {"limit": limit} if limit else {}
        unit = visible(chart["unit"], 32)
        plots = [
            charts.columns(
                name.capitalize(),
                part["edges"],
                part["counts"],
                x=unit,
                y="rows",
                name=f"length-{name}",
                marks=marks,
            )
            for name, part in chart["parts"].items()
        ]
        quantiles = {"100": "Longest", "50": "Median"}
        shares = [str(share) for share in next(iter(chart["parts"].values()), {}).get("quantiles", ())]
        head = ["Part", "Mean", *(quantiles.get(share, f"{share}% under") for share in shares)]
        rows = [
            (
                name,
                *(
                    f"{value:,.0f}"
                    for value in (part["mean"], *(part["quantiles"][share] for share in shares))
                ),
            )
            for name, part in chart["parts"].items()
        ]
        lead = f"In {visible(chart['unit'], 80)}."
        lead += f" The dashed line is the limit, {limit:,}." if limit else ""
        body = Markup('<div class="charts">{}</div><div class="card">{}</div>').format(
            Markup("").join(plots), charts.table(head, rows)
        )
        return Section("lengths", "Lengths", lead, body)

    def _tail(self, totals: np.ndarray, rows: Sequence[int], survey: Survey) -> Finding:
        bar = survey.spec.tail
        reached = float(np.percentile(totals, 99))
        long = [place for place in np.argsort(-totals, kind="stable") if totals[place] >= bar]
        fits = reached < bar
        sentence = f"99 of 100 rows have up to {reached:,.0f} tokens; {len(long):,} rows have {bar:,} or more"
        return Finding(
            "length.tail",
            "good" if fits else "warning",
            sentence,
            len(long),
            len(rows),
            reached,
            f"< {bar}",
            () if fits else _evidence(survey, rows, long, totals),
            "" if fits else "the longest rows set the memory that a run needs: split or shorten them",
        )

    def _cut(self, totals: np.ndarray, rows: Sequence[int], survey: Survey) -> Finding:
        assert survey.context is not None
        limit = survey.context.limit
        long = [place for place in np.argsort(-totals, kind="stable") if totals[place] > limit]
        many = f"{counted(len(long), len(rows))} longer than" if long else "every row fits into"
        sentence = f"{many} batch.length, {limit:,} tokens"
        hint = "raise batch.length, or set template.too_long to drop or cut"
        return Finding(
            "length.limit",
            "warning" if long else "good",
            sentence,
            len(long),
            len(rows),
            None,
            "0",
            _evidence(survey, rows, long, totals),
            hint if long else "",
        )

    def _outliers(self, totals: np.ndarray, rows: Sequence[int], survey: Survey, word: str) -> Finding:
        logs = np.log(np.maximum(totals, 1))
        low, high = np.percentile(logs, [25, 75])
        reach = FAR * max(high - low, 0.1)
        far = np.maximum(logs - high, low - logs)
        out = [place for place in np.argsort(-far, kind="stable") if far[place] > reach]
        sentence = (
            f"{counted(len(out))} far longer or shorter than the others"
            if out
            else "no row is far longer or shorter than the others"
        )
        hint = "read them: a paste that went wrong, an answer that breaks off?" if out else ""
        return Finding(
            "length.outliers",
            "note" if out else "good",
            sentence,
            len(out),
            len(rows),
            rows=_evidence(survey, rows, out, totals, word),
            hint=hint,
        )


def _evidence(
    survey: Survey, rows: Sequence[int], places: Sequence[int], totals: np.ndarray, word: str = "tokens"
) -> tuple[FindingRow, ...]:
    return tuple(
        FindingRow(survey.sources[rows[place]], f"{int(totals[place]):,} {word}") for place in places
    )


def _part(values: np.ndarray) -> dict[str, Any]:
    """Histogram, quantiles and mean for the page."""
    counts, edges = np.histogram(values, bins=min(40, max(1, int(values.max()) - int(values.min()) + 1)))
    quantiles = {
        str(share): float(value)
        for share, value in zip(QUANTILES, np.percentile(values, QUANTILES), strict=True)
    }
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "quantiles": quantiles,
        "mean": float(values.mean()),
    }
