"""Results that the assistant makes up: after a call its own text goes on with what the environment should
say.

A model that learns this answers its own calls. A result in a tool's turn or in a code fence, or the word
"Result:" in prose, does not count. `calls.structure` says which rows can be rewritten as calls and
results."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import ClassVar, NamedTuple

from tunesmith.auditing.findings import Finding, FindingRow, counted
from tunesmith.auditing.registry import Rule, register
from tunesmith.auditing.views import Context, Survey, View
from tunesmith.data import calls
from tunesmith.data.examples import Completion, Document

_MARK = re.compile(
    r"""^[ ]{0,3}(?:
    (?P<fence>```(?=[^`\n]*$)|~~~)
    |(?P<call>(?:tool|function)[ _]call:|action[ ]input:|<(?:tool|function)_?call>|\[TOOL_CALLS\])
    |(?P<block><\|?(?:tool|function)_(?:response|result|output)s?\|?>|\[TOOL_RESULTS\])
    |(?P<word>result|observation|(?:tool|function)[ ](?:result|output|response)):
        (?:[ \t]*+(?P<said>[^\s])|\s*+(?P<json>[{\[]))
    )""",
    re.MULTILINE | re.IGNORECASE | re.VERBOSE,
)


class InventedResult(NamedTuple):
    """Of a row with calls. ``seen``: what is made up and where, or "". ``note``: of `calls.structure`."""

    seen: str
    note: str


@register
class Invented(Rule):
    name = "invented"
    order = 100
    looks_at = "results of calls that the assistant makes up"
    findings: ClassVar = {
        "results": "the assistant writes what the environment should say (`Result: {…}` after a call)"
    }

    def look(self, view: View, context: Context) -> InventedResult | None:
        if view.example is None:
            return None
        called = any(message.calls for message in view.messages)
        for place, text in _learned(view):
            calling, seen = made_up(text)
            called = called or calling
            if seen:
                return InventedResult(f"{place}: {seen}", calls.structure(view.example)[1])
        return InventedResult("", "") if called else None

    def judge(self, facts: list[InventedResult | None], survey: Survey) -> Iterator[Finding]:
        rows = survey.training
        calling = [(row, result) for row in rows if (result := facts[row]) is not None]
        invented = [(row, result) for row, result in calling if result.seen]
        if not invented:
            if calling:
                sentence = f"none of the {counted(len(calling))} with calls makes up a result"
                yield Finding("invented.results", "good", sentence, of=len(rows))
            return
        turned = sum(result.note == calls.STRUCTURED for _, result in invented)
        yield Finding(
            "invented.results",
            "warning",
            f"{counted(len(invented), len(rows))} in which the assistant writes the results of its calls "
            f"itself, and learns to",
            len(invented),
            len(rows),
            rows=tuple(FindingRow(survey.sources[row], result.seen) for row, result in invented),
            hint=_hint(
                turned,
                Counter(result.note.removeprefix("left: ") or "another form" for _, result in invented),
            ),
        )


def made_up(text: str) -> tuple[bool, str]:
    """Whether an assistant's text makes a call, and what kind of result it makes up after that."""
    written = calls.found(text)
    if first := next((call for call in written if call.result), None):
        return True, f"a result of {first.name}, {len(first.result or ''):,} letters"
    called, quoted = bool(written), ""
    for mark in _MARK.finditer(text):
        if fence := mark["fence"]:
            quoted = "" if quoted == fence else quoted or fence
        elif quoted:
            continue
        elif mark["call"]:
            called = True
        elif mark["block"]:
            return True, f"a block {mark['block']}"
        elif called and (mark["json"] or mark["said"] in ("{", "[") or mark["word"].lower() != "result"):
            return True, f"{mark['word']}: behind a call"
    return called, ""


def _learned(view: View) -> Iterator[tuple[str, str]]:
    if isinstance(view.example, Document):
        yield "text", view.example.text
    elif isinstance(view.example, Completion):
        yield "completion", view.example.completion
    for turn, message in enumerate(view.messages, 1):
        if message.role == "assistant":
            yield f"turn {turn}", message.content


def _hint(turned: int, notes: Counter[str]) -> str:
    left = ", ".join(
        f"{reason} {count}" for reason, count in notes.most_common() if reason != calls.STRUCTURED
    )
    can = (
        f"`--fix OUT` or data.structure_calls=true turns {turned:,} of them into calls and results, which "
        f"are not learned"
    )
    cannot = f"{notes.total() - turned:,} cannot be turned ({left}): mend them or leave them out"
    return "; ".join([can] * bool(turned) + [cannot] * bool(left))
