"""A run's report as Markdown: the same facts as the page, for a terminal, a pull request or a reader without
a browser."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from tunesmith.display.console import duration, size
from tunesmith.display.markdown import cell, fence, table, verdict
from tunesmith.display.text import many
from tunesmith.errors import SHOWN
from tunesmith.evaluation.tasks import QUESTIONS
from tunesmith.reports import artefacts, glossary
from tunesmith.reports.facts import AuditSummary, Facts, GroupedNotice, PromptSamples, evenly
from tunesmith.reports.figures import CURVES, PICTURE
from tunesmith.reports.measures import Measure, answer, elsewhere, interval, label, met, reached, subset
from tunesmith.reports.row_losses import RowClasses
from tunesmith.reports.summary import Summary
from tunesmith.runs.artefacts import Exported
from tunesmith.runs.directory import CONFIG, DROPPED
from tunesmith.settings.config import flat

GROWN = 10
"""Weights in the table of growth."""
STEPS = 6
"""Steps of an own prompt's answers."""
ROWS = 10
"""Rows of each class that are listed."""


class ReportSection(NamedTuple):
    title: str
    lines: list[str]


def text(summary: Summary) -> str:
    """The whole report."""
    lines = [f"# {cell(summary.facts.run.name)}", "", *verdict(summary.lines), ""]
    for section in _sections(summary):
        lines += [f"## {section.title}", "", *section.lines, ""]
    return "\n".join(lines) + "\n"


def _sections(summary: Summary) -> Iterator[ReportSection]:
    yield from _evidence(summary)
    pictures = [
        f"![verdict, differences and loss]({PICTURE})",
        f"![loss, learning rate, gradient norm and memory]({CURVES})",
    ]
    yield ReportSection("Curves", [pictures[0], "", pictures[1]])
    yield from _course(summary.facts)
    if summary.facts.measures:
        lead = "With 95 % intervals; the change is tuned − base on the same rows."
        yield ReportSection("Scores", [lead, "", *_scores(summary.facts.measures)])
    if summary.facts.artefacts:
        yield ReportSection("Exports", exports(summary.facts.artefacts))
    yield from _data(summary.facts)
    yield from _spent(summary.facts)
    yield from _made(summary)


def _evidence(summary: Summary) -> Iterator[ReportSection]:
    if summary.judgement.line:
        yield ReportSection("Loss", [cell(summary.loss)])
    if summary.answers:
        rows = [
            (
                QUESTIONS[row.question],
                answer(row.score),
                ", ".join(filter(None, [label(row.score), subset(row.record)])),
                interval(row.score, of="base"),
                interval(row.score),
                interval(row.score, of="delta"),
                row.score.n,
                ": ".join(filter(None, [row.score.target, reached(row.score)])),
            )
            for row in summary.answers
        ]
        head = ("question", "answer", "measured", "base", "tuned", "change", "n", "target")
        yield ReportSection("Answers", [f"Of checkpoint {cell(summary.checkpoint)}.", "", *table(head, rows)])
    if summary.advice:
        lines = [
            f"1. {cell(advice.rule)}: {cell(advice.why)}. → {cell(advice.do)}" for advice in summary.advice
        ]
        yield ReportSection("What to try next", lines)
    yield ReportSection("Limits", [f"- {cell(limit)}" for limit in summary.limits])


def _course(facts: Facts) -> Iterator[ReportSection]:
    if facts.validation:
        head = ("step", facts.counts.get("loss", "loss"), "perplexity", "rows", "units", "best so far")
        rows = [
            (event.step, event.loss, event.perplexity, event.rows, round(event.units), "yes" * event.best)
            for event in facts.validation
        ]
        if any(event.adherence is not None for event in facts.validation):
            head = (*head, "adherence")
            rows = [(*row, event.adherence) for row, event in zip(rows, facts.validation, strict=True)]
        yield ReportSection("Validation", table(head, rows))
        metrics = [(event.step, event.metrics) for event in facts.validation]
        yield from _metrics("Good against bad, on held-out rows", "step", metrics)
    watched = [(means.to_step, means.means) for means in facts.watched]
    yield from _metrics("Good against bad, on training rows (means up to a step)", "to step", watched)
    if facts.samples:
        lines = [line for samples in facts.samples for line in _samples(samples)]
        yield ReportSection("Samples, before and after", lines)


def _metrics(
    title: str, key: str, rows: Sequence[tuple[int, Mapping[str, float]]]
) -> Iterator[ReportSection]:
    names = list(dict.fromkeys(name for _, values in rows for name in values))
    if names:
        cells = ([step, *(values.get(name) for name in names)] for step, values in rows)
        yield ReportSection(title, table((key, *names), cells))


def _scores(measures: Sequence[Measure]) -> list[str]:
    head = (
        "task",
        "version",
        "checkpoint",
        "data",
        "name",
        "n",
        "tuned",
        "change",
        "note",
        "verdict",
        "target",
    )
    rows = [
        (
            measure.score.task,
            measure.score.version,
            measure.record.checkpoint or "",
            ", ".join(filter(None, [_data_of(measure), subset(measure.record)])),
            ", ".join(filter(None, [measure.score.name, measure.score.part])),
            str(measure.score.n),
            interval(measure.score),
            interval(measure.score, of="delta"),
            measure.score.note or "",
            measure.score.verdict or "",
            met(measure.score),
        )
        for measure in measures
    ]
    return table(head, rows)


def exports(exported: Sequence[Exported]) -> list[str]:
    rows = map(artefacts.cells, exported)
    listed = [f"- {cell(note)}" for note in artefacts.notes(exported)]
    return [artefacts.LEAD, "", *table(artefacts.HEAD, rows), "", *listed]


def _data_of(measure: Measure) -> str:
    return elsewhere(measure.record) or str(measure.record.data or "")


def _data(facts: Facts) -> Iterator[ReportSection]:
    if facts.rows:
        yield ReportSection("Rows of the training data", _rows(facts.rows))
    if facts.audit:
        yield ReportSection("Data audit", _audit(facts.audit))
    yield ReportSection("Notices", [_notice(notice) for notice in facts.notices] or ["None."])
    lines, dropped = table(("what", "how many"), flat(facts.counts).items()), facts.dropped
    if dropped.first:
        shown = f"the first {len(dropped.first)} of them (all: {DROPPED}):"
        rows = [(row.source, row.reason, row.message) for row in dropped.first]
        lines += ["", f"Rows left out: {dropped.total:,}, {shown}", ""]
        lines += table(("row", "reason", "message"), rows)
    yield ReportSection("Counts", lines)


def _audit(audit: AuditSummary) -> list[str]:
    rows = [(finding.severity, finding.rule, finding.what, finding.hint) for finding in audit.findings]
    return [cell(audit.verdict), "", *table(("severity", "rule", "what", "what to do"), rows)]


def _spent(facts: Facts) -> Iterator[ReportSection]:
    yield ReportSection("Time and memory", table(("what", "measured"), costs(facts)))
    if (growth := facts.growth) and growth.norms:
        largest = sorted(growth.norms.items(), key=lambda item: -item[1])[:GROWN]
        rows = [
            (name, norm, growth.relative.get(name), growth.effective_rank.get(name)) for name, norm in largest
        ]
        head = (
            f"largest of {len(growth.norms):,} adapted weights",
            "Frobenius norm of the change",
            "of the weight's",
            "effective rank",
        )
        columns = 4 if growth.relative else 2
        lines = table(head[:columns], (row[:columns] for row in rows))
        yield ReportSection(f"Growth of the adapter at step {growth.step:,}", lines)


def _made(summary: Summary) -> Iterator[ReportSection]:
    facts = summary.facts
    yield ReportSection("Checkpoints", [checkpoints(facts)])
    yield ReportSection("How to go on", fence("\n".join(commands(facts)), "sh"))
    given = ((key, facts.settings.get(key), origin) for key, origin in facts.origins.items())
    head = ["Given for this run; all others are defaults:", "", *table(("setting", "value", "from"), given)]
    path = facts.run / CONFIG
    config = path.read_text(encoding="utf-8").rstrip("\n") if path.exists() else ""
    yield ReportSection("Settings", [*head, "", "All of them:", "", *fence(config, "yaml")])
    manifest = ((key, str(value)) for key, value in flat(facts.manifest).items())
    yield ReportSection("Made from", table(("what", "value"), manifest))
    if meanings := glossary.meanings(summary):
        lines = [f"- **{cell(word)}**: {cell(meaning)}" for word, meaning in meanings.items()]
        yield ReportSection("What the words mean", lines)
    yield ReportSection("How to repeat it", fence("\n".join(facts.reproduce), "sh"))


def _rows(rows: RowClasses) -> list[str]:
    note = f"; {rows.note}" if rows.note else ""
    lines = [f"{many(rows.rows, 'row')} over {many(rows.epochs, 'epoch')}{note}."]
    for name, definition in rows.definitions.items():
        members = rows.of(name)
        first = f", the first {ROWS}" if len(members) > ROWS else ""
        lines += ["", f"**{name.replace('_', ' ')}** ({definition}): {len(members):,}{first}", ""]
        if members:
            cells = [
                (row.source, " → ".join(f"{loss:.3g}" for loss in row.losses if loss is not None), row.units)
                for row in members[:ROWS]
            ]
            lines += table(("row", "loss by epoch", "learned tokens"), cells)
    return lines


def checkpoints(facts: Facts) -> str:
    """Which are kept, and which is the best."""
    index = facts.checkpoints
    if index is None:
        return "None was saved."
    best = "" if index.best is None else f"; best {index.best} ({index.metric} {index.best_value:.4f})"
    return f"Kept: {', '.join(map(str, index.kept))}; last {index.last}{best}."


def commands(facts: Facts) -> list[str]:
    """What can be done with the run now."""
    run = shlex.quote(str(facts.run))
    lines = [f"tunesmith watch {run}"] if facts.status == "running" else []
    if not facts.ended:
        lines.append(f"tunesmith train --resume {run}" + "  # if it was killed" * bool(lines))
    if facts.checkpoints:
        verbs = (f"generate {run} --prompt 'Hello'", f"chat {run}", f"evaluate {run}")
        lines += [f"tunesmith {verb}" for verb in verbs]
    return [*lines, f"tunesmith report {run}"]


def _samples(samples: PromptSamples) -> Iterator[str]:
    """A held-out prompt before and after; one of the user's own with its answers along the way."""
    if samples.reference is None:
        shown = evenly(samples.answers, STEPS)
    else:
        shown = [sample for sample in (samples.before, samples.after) if sample]
    answers = [(f"step {sample.step:,}", sample.answer) for sample in shown]
    answers += [("reference", samples.reference)] if samples.reference is not None else []
    yield from [*fence(samples.prompt), ""]
    yield "<table><tr>" + "".join(f"<th>{name}</th>" for name, _ in answers) + "</tr><tr>"
    for _, answer_text in answers:
        yield from ['<td valign="top">', "", *fence(answer_text), "", "</td>"]
    yield from ["</tr></table>", ""]


def _notice(notice: GroupedNotice) -> str:
    line = notice.what + (f" (×{notice.count:,})" if notice.count != 1 else "")
    line += f"; at {', '.join(notice.where[:SHOWN])}" if notice.where else ""
    line += f" and {len(notice.where) - SHOWN:,} more places" if len(notice.where) > SHOWN else ""
    line += f"; hint: {notice.hint}" if notice.hint else ""
    return f"- **{notice.level}**: {cell(line)}"


def costs(facts: Facts) -> Iterator[tuple[str, str | int]]:
    """Time, speed, memory and what else the run took, in words."""
    times = {
        "whole run": facts.time.seconds,
        "updates": facts.time.training_s,
        "validation": facts.time.validating_s,
        "answers scored at validations": facts.time.scoring_s or None,
        "saving": facts.time.saving_s,
    }
    yield from ((name, duration(seconds)) for name, seconds in times.items() if seconds is not None)
    speeds = {"learned": facts.speeds.learned, "all": facts.speeds.all}
    for name, speed in speeds.items():
        if speed is not None:
            yield f"{name} tokens a second", f"{speed:,.1f}"
    for name, n_bytes in facts.memory_peak.items():
        yield f"memory, {name}, highest reading", size(n_bytes)
    if facts.stages:
        yield "seconds by stage", ", ".join(f"{name} {value:,.1f}" for name, value in facts.stages.items())
    if facts.padding:
        yield "padding", f"{facts.padding:.1%} of the positions"
    if facts.weights:
        yield "trainable weights", f"{facts.weights.trainable:,} of {facts.weights.total:,}"
    yield "updates clipped", facts.updates.clipped
    for event in facts.updates.resumed:
        yield "resumed", f"after step {event.step:,}; {event.redone:,} updates done again"
