"""What does a report say about a run? `Summary`, of which the page, the text, the card, the pictures and
``report.json`` are functions.

It is made from the run directory alone, so a report can be written again at any time: after an interruption,
a failure, or an evaluation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NotRequired

from typing_extensions import TypedDict

from tunesmith import events
from tunesmith.display import console
from tunesmith.errors import EvaluationError
from tunesmith.files import checked
from tunesmith.reports.advice import Advice, advise, limits
from tunesmith.reports.facts import EvaluationFacts, Facts, read, read_log
from tunesmith.reports.measures import Measure, answer
from tunesmith.reports.verdict import Judgement, answers, evaluated, judge
from tunesmith.runs.directory import COMPOSED, MANIFEST, RESTORE
from tunesmith.settings.config import JSON

SURROGATE = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class Summary:
    """``loss``: one sentence. ``answers``: the scores at the top of the report. ``checkpoint``: the one whose
    evaluations count. ``limits``: what the numbers do not show."""

    facts: Facts
    judgement: Judgement
    loss: str
    answers: tuple[Measure, ...]
    checkpoint: str | None
    limits: tuple[str, ...]
    advice: tuple[Advice, ...]

    @property
    def verdict(self) -> str:
        """One line: of the evaluation, or if there is none of the loss."""
        return self.judgement.line or self.loss

    @property
    def lines(self) -> list[str]:
        """The verdict, then its reasons, those against shipping first."""
        return [self.verdict, *(reason.line for reason in self.judgement.reasons)]

    @property
    def tone(self) -> str:
        """How the verdict looks: good, warning, error or note."""
        if self.judgement.line:
            return self.judgement.tone
        if self.facts.status == "failed":
            return "error"
        return "warning" if "got worse" in self.loss or not self.facts.ended else "note"


def summarise(run_dir: Path, log: Sequence[events.Event] | None = None) -> Summary:
    """log: the run's events if they were read already. An evaluation that cannot be read is left out, and a
    notice names it. Raises EvaluationError if another file of the run is not JSON."""
    facts = read(run_dir, read_log(run_dir) if log is None else log)
    judgement = judge(facts)
    return Summary(
        facts,
        judgement,
        loss_sentence(facts),
        tuple(answers(facts)),
        evaluated(facts),
        tuple(limits(facts)),
        tuple(advise(facts, judgement)),
    )


def loss_sentence(facts: Facts) -> str:
    """How the loss moved, with its numbers."""
    if facts.status == COMPOSED:
        return _composed_of(facts)
    planned = "" if facts.updates.planned is None else f" of {facts.updates.planned:,}"
    so_far = f"{facts.updates.done:,}{planned} updates"
    failed = f" ({facts.why})" if facts.why else ""
    text = {
        "completed": f"After {so_far} the ",
        "stopped_early": f"Stopped early after {so_far}: the ",
        "interrupted": f"Interrupted after {so_far}: the ",
        "failed": f"FAILED after {so_far}{failed}: the ",
        "running": f"Still running, or killed, after {so_far}: the ",
    }.get(facts.status, f"Not finished, {so_far} and no end recorded: the ")
    if facts.validation:
        return text + _validation_clause(facts) + _mixed_sentence(facts)
    if facts.training_loss is None:
        return f"{text}model is as it was before, since no update was made and nothing was validated."
    first, last = facts.training_loss.first, facts.training_loss.last
    text += (
        f"training loss went from {first:.4f} to {last:.4f} {facts.loss_unit}, and nothing was validated, "
    )
    return text + "so it is not known what that means for unseen rows." + _mixed_sentence(facts)


def _mixed_sentence(facts: Facts) -> str:
    """How the loss of the rows of ``data.mix`` moved; empty if nothing is mixed in."""
    loss = facts.training_loss
    if loss is None or loss.mixed_first is None or loss.mixed_last is None:
        return ""
    kinds = {bool(entry.get("distilled")) for entry in facts.counts.get("mix", {}).values()}
    partly = " (of the distilled ones their divergence from the base)" if True in kinds else ""
    meant = " (their divergence from the base)" if kinds == {True} else partly
    moved = f"from {loss.mixed_first:.4f} to {loss.mixed_last:.4f}"
    return f" The training loss of the mixed rows{meant} went {moved}."


class _MixedRun(TypedDict):
    run: NotRequired[str]
    weight: float


class _Mixture(TypedDict):
    """The sources of a run that was composed, in the manifest's lineage."""

    sources: list[_MixedRun]


def _composed_of(facts: Facts) -> str:
    entry = facts.manifest.get("lineage", {}).get(COMPOSED)
    mixture = checked(entry, _Mixture, str(facts.run / MANIFEST), EvaluationError, RESTORE)
    text = " and ".join(f"{source['weight']:g} × {source.get('run', '?')}" for source in mixture["sources"])
    return f"Composed of the adapters of {text}, not trained; nothing was validated."


def _validation_clause(facts: Facts) -> str:
    before, after = facts.validation[0], facts.validation[-1]
    first, last, unit = before.loss, after.loss, facts.loss_unit
    if before is after:
        text = f"validation loss was measured once, at step {before.step:,}: {first:.4f} {unit} "
        return text + f"(perplexity {before.perplexity:.4g}), so there is no before and after."
    same = f"{first:.4f}" == f"{last:.4f}"
    moved = "stayed the same," if same else "fell" if last < first else "ROSE"
    text = f"validation loss {moved} from {first:.4f} to {last:.4f} {unit}"
    text += f" ({(last - first) / first:+.1%})" if first and math.isfinite(last - first) else ""
    if math.isfinite(before.perplexity):  # it is not if the held-out rows have nothing to imitate
        text += f", perplexity from {before.perplexity:.4g} to {after.perplexity:.4g}"
    text += f", on {after.rows:,} held-out rows"
    text += f" (first measured at step {before.step:,})" if before.step else ""
    text += "" if last <= first or same else "; on these rows the model got worse"
    if (accuracy := after.metrics.get("accuracy")) is not None:
        earlier = before.metrics.get("accuracy")
        text += f"; good answers earn more than bad ones in {accuracy:.1%} of pairs"
        text += "" if earlier is None else f", before {earlier:.1%}"
    best = min(facts.validation, key=lambda event: (math.isnan(event.loss), event.loss))
    return text + ("." if best.loss == last else f"; the lowest was {best.loss:.4f} at step {best.step:,}.")


def to_json(summary: Summary) -> dict[str, JSON]:
    """The content of ``report.json``; numbers that are not finite become their names ("nan", "inf")."""
    content = {
        "verdict": summary.verdict,
        **ship(summary),
        **_facts_content(summary.facts),
        "loss": summary.loss,
        "evidence": {
            "tone": summary.judgement.tone,
            "sentence": summary.judgement.text,
            "learned": summary.judgement.learned,
            "kept": summary.judgement.kept,
            "safe": summary.judgement.safe,
        },
        "answers": [
            {"question": row.question, "answer": answer(row.score), **_score_content(row)}
            for row in summary.answers
        ],
        "limits": summary.limits,
        "advice": [asdict(advice) for advice in summary.advice],
    }
    # An answer can hold half of a surrogate pair, which UTF-8 cannot encode.
    text = SURROGATE.sub(lambda half: f"\\\\u{ord(half[0]):04x}", json.dumps(content, ensure_ascii=False))
    return json.loads(text, parse_constant=lambda name: str(float(name)))


def ship(summary: Summary) -> dict[str, Any]:
    """``ship``: true, false, or null if neither is shown; ``reasons``: with their codes."""
    return {"ship": summary.judgement.ship, "reasons": [asdict(row) for row in summary.judgement.reasons]}


def _facts_content(facts: Facts) -> dict[str, Any]:
    return {
        "run": str(facts.run),
        "status": facts.status,
        "why": facts.why,
        "updates": asdict(facts.updates),
        "weights": facts.weights and asdict(facts.weights),
        "counts": facts.counts,
        "training_loss": facts.training_loss and asdict(facts.training_loss),
        "validation": [asdict(event) for event in facts.validation],
        "samples": [asdict(samples) for samples in facts.samples],
        "growth": facts.growth and asdict(facts.growth),
        "evaluations": [_evaluation_content(evaluation) for evaluation in facts.evaluations],
        "scores": [_score_content(measure) for measure in facts.measures],
        "exports": [artefact.to_json() for artefact in facts.artefacts],
        "time": asdict(facts.time),
        "stages": facts.stages,
        "tokens_per_second": asdict(facts.speeds),
        "padding": facts.padding,
        "watched": [{"to_step": watched.to_step, **watched.means} for watched in facts.watched],
        "gradients": asdict(facts.gradients),
        "rows": facts.rows and asdict(facts.rows),
        "memory_peak": facts.memory_peak,
        "audit": facts.audit and asdict(facts.audit),
        "notices": [asdict(notice) for notice in facts.notices],
        "unread": [console.readable(notice) for notice in facts.unread],
        "dropped": asdict(facts.dropped),
        "checkpoints": asdict(facts.checkpoints) if facts.checkpoints else {},
        "settings_given": facts.origins,
        "settings": facts.settings,
        "manifest": facts.manifest,
        "reproduce": facts.reproduce,
    }


def _evaluation_content(evaluation: EvaluationFacts) -> dict[str, Any]:
    content = asdict(evaluation.record) | {"folder": evaluation.record.name}
    del content["scores"]
    counts = {"cut": evaluation.cut, "examples": evaluation.examples, "changes": evaluation.changes}
    return content | counts


def _score_content(measure: Measure) -> dict[str, Any]:
    record = measure.record
    about = {
        "checkpoint": record.checkpoint,
        "data": record.data,
        "folder": record.name,
        "identity": record.identity,
        "at": record.at,
        "unseen": record.unseen,
        "limit": record.limit,
    }
    return {**about, **asdict(measure.score), "base": measure.score.base}
