"""Every class of error with its exit status and its messages; reasons of verdicts; findings of audits."""

from __future__ import annotations

from exits import classes, statuses
from sources import errors_raised
from writing import cell, code, prose, table

from tunesmith.auditing.registry import Rule, rules
from tunesmith.reports.verdict import CODES
from tunesmith.serving import rejections

ERRORS = """# Errors

An error says what is wrong, where (`file:line`, a key, a tensor) and what to do. It is printed on stderr
without a traceback; `--debug` adds it. In Python each is an exception of `tunesmith.errors`. In the messages
below, … stands for what varies.

## Exit statuses
"""
REASONS = """# Reasons and findings

## Reasons of a verdict

`report.json` and `tunesmith evaluate RUN --json` have these codes; [the report](../report.md) says how the
verdict is made. ✗ speaks against shipping, ? leaves it open, i is a note, ✓ speaks for it.
"""
FINDINGS = """## Findings of an audit

The severity is the gravest that a finding can have. An error stops `train`, a warning goes into the report;
a bar that is met is reported as good. `--accept RULE` accepts a finding; [the audit](../audit.md) explains
the rules.
"""
SIGNS = {"error": "✗", "warning": "?", "note": "i", "good": "✓"}


def errors() -> str:
    serving = [kind for kind in vars(rejections).values() if isinstance(kind, type)]
    kinds = [
        *classes(),
        *(kind for kind in serving if kind not in classes() and issubclass(kind, classes()[-2])),
    ]
    said = errors_raised({kind.__name__ for kind in kinds})
    parts = [ERRORS, statuses()]
    for kind in kinds:
        parts.append(f"## {kind.__name__}\n")
        above = kind.__mro__[1]
        parent = f"; it is a kind of `{above.__name__}`" if above in kinds else ""
        parts.append(f"Exit status {kind.exit_code}{parent}.\n")
        parts.append(prose(kind.__doc__).replace("Cure:", "**Cure:**") + "\n")
        rows = [
            (escaped(message.what), escaped(message.hint))
            for message in said
            if message.error == kind.__name__
        ]
        parts += [table(["message", "what to do"], rows)] * bool(rows)
    return "\n".join(parts)


def escaped(text: str) -> str:
    """Words of a message as Markdown shows them unchanged."""
    for sign in "\\`*_<[":
        text = text.replace(sign, {"<": "&lt;"}.get(sign, f"\\{sign}"))
    return cell(text)


def reasons() -> str:
    rows = [
        (code(name), " ".join(SIGNS[tone] for tone in entry.tones), entry.meaning, entry.cure)
        for name, entry in CODES.items()
    ]
    parts = [REASONS, table(["code", "", "meaning", "what to do"], rows), FINDINGS]
    parts.append(
        table(["finding", "at most", "meaning"], (row for rule in rules() for row in findings(rule)))
    )
    return "\n".join(parts)


def findings(rule: Rule) -> list[tuple[str, str, str]]:
    meanings = [*rule.findings.items(), *([("…", rule.otherwise)] if rule.otherwise else [])]
    return [
        (code(f"{rule.name}.{name}"), rule.gravest.get("" if name == "…" else name, "warning"), meaning)
        for name, meaning in meanings
    ]
