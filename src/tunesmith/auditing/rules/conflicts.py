"""Rows that contradict each other: the same words with opposite labels; the same prompt with other answers or
labels.

A prompt is what is asked before the first answer, system text included; its answer is the first answer; case
and spacing do not count. Later turns have a context of their own and are not compared."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from tunesmith.auditing.findings import Finding, FindingRow, Severity, counted
from tunesmith.auditing.registry import Rule, register
from tunesmith.auditing.views import Context, Survey, View, digest, spaced

FINDINGS: dict[str, tuple[str, Severity, str]] = {
    "labels": (
        "saying the same as another row under the opposite label",
        "warning",
        "one of the two labels is wrong: decide which, or leave both out",
    ),
    "prompts": (
        "answering the prompt of another row otherwise, under the opposite label",
        "note",
        "KTO and DPO learn from such a contrast; for SFT only the desirable one counts",
    ),
    "answers": (
        "answering the prompt of an earlier row otherwise",
        "note",
        "variety is welcome, contradiction is not: read a few",
    ),
}
"""What such rows do, how grave that is, and what to do."""


class PromptHashes(NamedTuple):
    prompt: int
    answer: int  # the first
    said: int  # all that follows the prompt


@register
class Conflicts(Rule):
    name = "conflicts"
    order = 60
    looks_at = "rows that contradict each other"
    findings: ClassVar = {
        "labels": "the same words under opposite labels",
        "prompts": "the same prompt, answered otherwise under the opposite label",
        "answers": "the same prompt with other answers",
    }
    gravest: ClassVar = {"prompts": "note", "answers": "note"}

    def look(self, view: View, context: Context) -> PromptHashes | None:
        system = "\n".join(message.content for message in view.messages if message.role == "system")
        prompt = spaced(f"{system}\n{view.asked}")
        if not prompt or not view.answers:
            return None
        after = "\n".join(part.text for part in view.parts if part.role != "system")
        return PromptHashes(digest(prompt), digest(spaced(view.answers[0])), digest(spaced(after)))

    def judge(self, facts: list[PromptHashes | None], survey: Survey) -> Iterator[Finding]:
        groups: dict[int, list[tuple[int, PromptHashes]]] = defaultdict(list)
        for row in survey.training:
            if (hashes := facts[row]) is not None:
                groups[hashes.prompt].append((row, hashes))
        if not groups:
            return
        notes: dict[str, dict[int, str]] = {name: {} for name in FINDINGS}
        for group in groups.values():
            if len(group) > 1:
                for name, row, note in _contradictions(group, survey):
                    notes[name][row] = note
        rows = sum(map(len, groups.values()))
        for name, (relation, severity, hint) in FINDINGS.items():
            yield _finding(name, survey, rows, notes[name], relation, severity, hint)


def _contradictions(group: list[tuple[int, PromptHashes]], survey: Survey) -> Iterator[tuple[str, int, str]]:
    """(finding, row, note) among rows with one prompt; each row is in one finding, the gravest."""
    by_words: dict[int, dict[bool, int]] = defaultdict(dict)  # words → label → first row
    by_label: dict[bool, int] = {}
    for row, hashes in group:
        if (label := survey.labels[row]) is not None:
            by_words[hashes.said].setdefault(label, row)
            by_label.setdefault(label, row)
    first, before = group[0]
    for row, hashes in group:
        label = survey.labels[row]
        same = None if label is None else by_words[hashes.said].get(not label)
        other = None if label is None else by_label.get(not label)
        own, opposite = _word(label), _word(not label)
        if same is not None:
            yield "labels", row, f"{own}; {survey.sources[same]} says the same and is {opposite}"
        elif other is not None:
            yield "prompts", row, f"{own}; {survey.sources[other]} answers otherwise and is {opposite}"
        elif row != first and hashes.answer != before.answer:
            if label is not False and survey.labels[first] is not False:
                yield "answers", row, f"{survey.sources[first]} answers this prompt otherwise"


def _word(label: bool | None) -> str:
    return "desirable" if label else "undesirable"


def _finding(
    name: str, survey: Survey, rows: int, notes: dict[int, str], relation: str, severity: Severity, hint: str
) -> Finding:
    count = len(notes)
    sentence = f"{counted(count, rows)} {relation}" if count else f"no rows {relation}"
    evidence = tuple(FindingRow(survey.sources[row], note) for row, note in notes.items())
    return Finding(
        f"conflicts.{name}",
        severity if count else "good",
        sentence,
        count,
        rows,
        rows=evidence,
        hint=hint if count else "",
    )
