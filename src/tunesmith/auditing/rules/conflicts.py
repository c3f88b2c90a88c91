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

    def look(self, view: View, context: Context) -> PromptHashes | None:
        system = "\n".join(message.content for message in view.messages if message.role == "system")
        asked = spaced(f"{system}\n{view.asked}")
        if not asked or not view.answers:
            return None
        after = "\n".join(part.text for part in view.parts if part.role != "system")
        return PromptHashes(digest(asked), digest(spaced(view.answers[0])), digest(spaced(after)))

    def judge(self, kept: list[PromptHashes | None], survey: Survey) -> Iterator[Finding]:
        asked: dict[int, list[tuple[int, PromptHashes]]] = defaultdict(list)
        rows = 0
        for at in survey.training:
            if (one := kept[at]) is not None:
                asked[one.prompt].append((at, one))
                rows += 1
        if not rows:
            return
        opposed: dict[int, str] = {}
        judged: dict[int, str] = {}
        answered: dict[int, str] = {}
        for group in asked.values():
            if len(group) < 2:
                continue
            said: dict[int, dict[bool, int]] = defaultdict(dict)  # words → label → first row
            firsts: dict[bool, int] = {}
            for at, one in group:
                if (label := survey.labels[at]) is not None:
                    said[one.said].setdefault(label, at)
                    firsts.setdefault(label, at)
            for at, one in group:
                label = survey.labels[at]
                other = None if label is None else said[one.said].get(not label)
                if other is not None:
                    opposed[at] = (
                        f"{_word(label)}; {survey.sources[other]} says the same and is {_word(not label)}"
                    )
                    continue
                contrary = None if label is None else firsts.get(not label)
                if contrary is not None:
                    judged[at] = (
                        f"{_word(label)}; {survey.sources[contrary]} answers otherwise and is {_word(not label)}"
                    )
                    continue
                first, before = group[0]
                if (
                    at != first
                    and one.answer != before.answer
                    and label is not False
                    and survey.labels[first] is not False
                ):
                    answered[at] = f"{survey.sources[first]} answers this prompt otherwise"
        yield _finding(
            "labels",
            survey,
            rows,
            opposed,
            "saying the same as another row under the opposite label",
            "warning",
            "one of the two labels is wrong: decide which, or leave both out",
        )
        yield _finding(
            "prompts",
            survey,
            rows,
            judged,
            "answering the prompt of another row otherwise, under the opposite label",
            "note",
            "KTO and DPO learn from such a contrast; for SFT only the desirable one counts",
        )
        yield _finding(
            "answers",
            survey,
            rows,
            answered,
            "answering the prompt of an earlier row otherwise",
            "note",
            "variety is welcome, contradiction is not: read a few",
        )


def _word(label: bool | None) -> str:
    return "desirable" if label else "undesirable"


def _finding(
    name: str, survey: Survey, rows: int, notes: dict[int, str], what: str, severity: Severity, hint: str
) -> Finding:
    count = len(notes)
    told = f"{counted(count, rows)} {what}" if count else f"no rows {what}"
    evidence = tuple(FindingRow(survey.sources[at], note) for at, note in notes.items())
    return Finding(
        f"conflicts.{name}",
        severity if count else "good",
        told,
        count,
        rows,
        rows=evidence,
        hint=hint if count else "",
    )
