"""Runs and evaluations as a notebook shows them: the verdict, the curves, the scores, both answers."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from tunesmith.display import console, notebook, words
from tunesmith.evaluation.evaluate import AnsweredPrompt, Evaluation
from tunesmith.reports import HTML, curves
from tunesmith.reports.facts import Facts, read_log
from tunesmith.reports.measures import interval, met, title
from tunesmith.reports.screen import HEAD, SAID
from tunesmith.reports.summary import Summary, summarise
from tunesmith.runs.directory import Run
from tunesmith.runs.records import Score

ANSWERS, LETTERS = 3, 600
"""Prompts that are shown with both answers, and letters of each text."""


def run(result: Run) -> Markup:
    """The verdict and its reasons, the loss, and the other curves for whoever opens them."""
    log = read_log(result.path)
    summary = summarise(result.path, log)
    loss, *more = curves.training(log) or [Markup("")]
    grid = Markup('<div class="grid">{}</div>').format(Markup("").join(more)) if more else Markup("")
    return Markup("").join(
        [
            _verdict(summary),
            notebook.soft(" · ".join(_facts(summary.facts))),
            loss,
            notebook.folded("More curves", grid),
            notebook.soft(f"report: {result.path / HTML}"),
        ]
    )


def evaluation(result: Evaluation) -> Markup:
    """The verdict on the run, the scores of base and tuned, and some prompts with both answers."""
    whole = [score for score in result.scores if score.part is None]
    headlines = [score for score in whole if score.headline] or whole
    others = [score for score in whole if score not in headlines]
    parts = [_verdict(summarise(result.run.path)), _scores(headlines)]
    parts.append(notebook.folded(f"{len(others)} more scores", _scores(others) if others else Markup("")))
    parts.append(_answers(result.answers[:ANSWERS]))
    parts.append(notebook.soft(f"report: {result.run.path / HTML}"))
    return Markup("").join(parts)


def _verdict(summary: Summary) -> Markup:
    first, *reasons = summary.lines
    below = Markup("").join(Markup("<li>{}</li>").format(reason) for reason in reasons)
    return notebook.verdict(first, summary.tone) + (Markup("<ul>{}</ul>").format(below) if below else below)


def _facts(facts: Facts) -> list[str]:
    told = [facts.run.name, words.STATES.get(facts.status, facts.status)]
    if facts.updates.planned is not None:
        told.append(f"{facts.updates.done:,} of {facts.updates.planned:,} updates")
    if facts.weights is not None:
        told.append(f"{facts.weights.trainable:,} of {facts.weights.total:,} weights trained")
    if facts.time.seconds is not None:
        told.append(console.duration(facts.time.seconds))
    if facts.speeds.all is not None:
        told.append(f"{facts.speeds.all:,.0f} tokens/s")
    return told


def _scores(scores: Sequence[Score]) -> Markup:
    rows = [
        (
            title(score),
            "" if score.base is None else words.number(score.base, score.unit),
            words.number(score.value, score.unit),
            "" if score.delta is None else interval(score, of="delta"),
            f"{score.n:,}",
            "; ".join(filter(None, [SAID.get(score.verdict or "", ""), _target(score)])),
        )
        for score in scores
    ]
    return notebook.table([*HEAD, "difference"], rows, numbers=(1, 2, 3, 4))


def _target(score: Score) -> str:
    return f"{score.target}: {met(score)}" if score.target else ""


def _answers(answers: Sequence[AnsweredPrompt]) -> Markup:
    if not answers:
        return Markup("")
    rows = [
        [
            Markup('<span class="said">{}</span>').format(words.cut(text, LETTERS) or "")
            for text in (answered.prompt, answered.base, answered.tuned)
        ]
        for answered in answers
    ]
    return notebook.table(["prompt", "base", "tuned"], rows)
