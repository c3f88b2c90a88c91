"""How well does an answer follow its reference? One number that costs no model, to choose a checkpoint by
while a run trains. The evaluation's task of the same name looks closer."""

from __future__ import annotations

from tunesmith.checks import similarity
from tunesmith.checks.calls import ReferenceAnswer, score


def adherence(answer: str, reference: ReferenceAnswer) -> float:
    """From 0 to 100. If the reference makes calls: 50 for the right tools in order, readably, and 100 with
    equal arguments. Else ROUGE-L with its words, or 0 if the answer makes a call."""
    checks = score(answer, reference)
    if reference.calls:
        return 50.0 * (bool(checks["value"]) + bool(checks["exact_arguments"]))
    return 0.0 if checks["unwanted_call"] else 100 * similarity.rouge_l(answer, reference.answer.content)
