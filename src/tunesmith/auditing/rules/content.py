"""What stands in the rows that should not be learned: secrets, personal data, swear words, residue of markup,
broken characters, control tokens of templates, refusals; and their languages.

`checks.content` says how each is found and what it cannot see. Of toxicity only strong English swear words
and slurs are found, disguised ones too, whether quoted or meant; threats, contempt and harm in clean words,
and other languages, are not. Markup does not count if the prompt asks for it. Nothing that is found is shown
in full."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import ClassVar, NamedTuple

from tunesmith.auditing.findings import SEVERITIES, Finding, FindingRow, Severity, counted
from tunesmith.auditing.registry import Rule, register
from tunesmith.auditing.views import Context, Survey, TextPart, View
from tunesmith.checks.content import (
    CERTAIN,
    HEAD,
    PREFIXED,
    REFUSES,
    SCANNED,
    Fences,
    broken_characters,
    control_tokens,
    fences,
    language,
    masked,
    prose,
    sensitive,
)
from tunesmith.display.text import excerpt

LEARNED = ("assistant", "call", "text")
REFUSING = 0.1
"""Larger shares of refusals among the rows to imitate are a warning."""
RARE = 0.02
"""A language of a smaller share of the rows is named with its rows."""
PERSONAL = {
    "email": "e-mail address",
    "phone": "phone number",
    "credit_card": "card number",
    "iban": "IBAN",
    "ssn_us": "social security number",
}
"""Kinds of personal data looked for. Numbers of other countries than the US have no form that other numbers
lack."""
TELL: dict[str, tuple[str, str]] = {
    "secrets": (
        "what looks like a key, token or password",
        "take it out and revoke it: what is learned can be recited",
    ),
    "personal_data": (
        "an e-mail address, phone or account number",
        "replace it by an invented one; accept it if it is one",
    ),
    "profanity": ("a strong swear word or slur", "read them: is this how the model is to speak?"),
    "markup": (
        "HTML or broken markdown",
        "tags, entities and open fences are learned as they are: clean or complete them",
    ),
    "mojibake": (
        "a broken character",
        "read the file in the encoding it was written in, or repair it with ftfy",
    ),
    "template_tokens": (
        "a control token of a chat template",
        "take it out: the template writes its own, at the right places",
    ),
    "unscanned": (
        f"text beyond its first {SCANNED:,} letters, which was not scanned,",
        "split it, or look for yourself",
    ),
}
"""Findings about a text: what it holds, and what to do."""


class ContentHit(NamedTuple):
    rule: str
    severity: Severity
    note: str


class RowContent(NamedTuple):
    hits: tuple[ContentHit, ...]  # one a rule
    languages: tuple[str, ...]


class RowRequest:
    """What the user and the system text of a row ask for, and its languages; computed when needed."""

    def __init__(self, view: View) -> None:
        self.view = view

    @cached_property
    def texts(self) -> list[str]:
        return [part.text[:SCANNED] for part in self.view.parts if part.role in ("user", "system")]

    @cached_property
    def markup(self) -> bool:
        """Whether they ask for markup or write it; of plain text, which has no prompt, whether it is about
        markup."""
        plain = [part.text[:SCANNED] for part in self.view.parts if part.role == "text"]
        return any(_ABOUT.search(text) for text in [*self.texts, *plain]) or any(
            map(_HTML.search, self.texts)
        )

    @cached_property
    def languages(self) -> tuple[str, ...]:
        return _languages(self.view)

    @cached_property
    def fences(self) -> bool:
        return any(map(_FENCED.search, self.texts))


@register
class Content(Rule):
    name = "content"
    order = 80
    looks_at = "what should not be learned: in one text"
    findings: ClassVar = {
        "secrets": "a key, token or password",
        "personal_data": "an e-mail address, phone or account number",
        "profanity": "a strong English swear word or slur",
        "markup": "HTML or broken markdown where nobody asked for it",
        "mojibake": "broken characters",
        "template_tokens": "control tokens of chat templates",
        "unscanned": "text too long to be scanned whole",
        "refusals": "answers that decline",
        "languages": "languages of the rows, and rows in a rare one",
    }
    gravest: ClassVar = {"secrets": "error", "unscanned": "note"}
    bar = "reported; a secret of a certain form in what is learned is an error"

    def look(self, view: View, context: Context) -> RowContent | None:
        request = RowRequest(view)
        languages = request.languages if context.drawn(view) else ()
        notes_of: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for part in view.parts:
            for rule, severity, note in _scan(part, request):
                notes_of[rule].append((SEVERITIES.index(severity), f"{part.at}: {note}"))
        hits = tuple(
            ContentHit(rule, SEVERITIES[min(notes)[0]], _told(notes)) for rule, notes in notes_of.items()
        )
        return RowContent(hits, languages) if hits or languages else None

    def judge(self, facts: list[RowContent | None], survey: Survey) -> Iterator[Finding]:
        rows = survey.training
        if not rows:
            return
        hits: dict[tuple[str, Severity], list[tuple[int, str]]] = defaultdict(list)
        for row in rows:
            for rule, severity, note in content.hits if (content := facts[row]) else ():
                hits[rule, severity].append((row, note))
        for rule, (thing, hint) in TELL.items():
            for severity in SEVERITIES:
                if noted := hits.get((rule, severity)):
                    where = ", where it is read or labelled bad" if severity == "note" else ""
                    sentence = f"{counted(len(noted), len(rows))} in which {thing} stands{where}"
                    yield _finding(survey, rule, severity, sentence, noted, len(rows), hint)
        yield from _refusals(hits["refusals", "note"], survey)
        yield from _spoken(
            {row: content.languages for row in rows if (content := facts[row]) and content.languages}, survey
        )


def _finding(
    survey: Survey,
    rule: str,
    severity: Severity,
    sentence: str,
    noted: Sequence[tuple[int, str]],
    of: int,
    hint: str,
) -> Finding:
    evidence = tuple(FindingRow(survey.sources[row], note) for row, note in noted)
    return Finding(f"content.{rule}", severity, sentence, len(noted), of, rows=evidence, hint=hint)


def _refusals(noted: list[tuple[int, str]], survey: Survey) -> Iterator[Finding]:
    wanted = [row for row in survey.training if survey.labels[row] is not False]
    good = [(row, note) for row, note in noted if survey.labels[row] is not False]
    if not noted:
        return
    share = len(good) / max(len(wanted), 1)
    more = f", and in {len(noted) - len(good):,} labelled undesirable" if len(noted) > len(good) else ""
    many = counted(len(good), len(wanted)) if good else "no row"
    sentence = f"{many} to imitate in which the assistant refuses{more}"
    severity: Severity = "warning" if share > REFUSING else "note"
    hint = "so many refusals teach refusing: keep the right ones, and balance them with answers"
    yield _finding(
        survey, "refusals", severity, sentence, good, len(wanted), hint if severity == "warning" else ""
    )


def _spoken(rows: dict[int, tuple[str, ...]], survey: Survey) -> Iterator[Finding]:
    counts = Counter(code for languages in rows.values() for code in languages)
    if not counts:
        return
    shares = ", ".join(f"{code} {count / len(rows):.1%}" for code, count in counts.most_common(8))
    more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
    rare = {code: count for code, count in counts.items() if count < RARE * len(rows)}
    yield Finding(
        "content.languages",
        "good" if len(counts) == 1 else "note",
        f"languages of {counted(len(rows))} with enough words to tell: {shares}{more}",
        sum(counts.most_common(1)[0][0] not in languages for languages in rows.values()),
        len(rows),
    )
    named = [
        (min(rare[language_of] for language_of in rare_ones), row, rare_ones)
        for row, languages in rows.items()
        if (rare_ones := rare.keys() & {*languages})
    ]
    if named:
        sentence = f"{counted(len(named), len(rows))} in a language of less than {RARE:.0%} of the rows"
        notes = [
            (row, f"in {', '.join(sorted(rare_ones))}")
            for _, row, rare_ones in sorted(named, key=lambda language_of: language_of[:2])
        ]
        hint = "too few to learn from: fine for translation, else strays; leave them out or add more"
        yield _finding(survey, "languages", "warning", sentence, notes, len(rows), hint)


def _told(notes: list[tuple[int, str]]) -> str:
    several = list(dict.fromkeys(note for _, note in sorted(notes, key=lambda note: note[0])))
    return "; ".join(several[:3]) + (f"; and {len(several) - 3:,} more" if len(several) > 3 else "")


def _scan(part: TextPart, request: RowRequest) -> Iterator[ContentHit]:
    """What is found in one text; a rule may occur several times."""
    text, learned = part.text[:SCANNED], part.role in LEARNED
    taught = learned and request.view.label is not False and not part.at.startswith("rejected")
    if len(part.text) > SCANNED:
        yield ContentHit("unscanned", "note", f"{len(part.text):,} letters")
    for category, kind, value in sensitive(text):
        if category == "secrets":
            name = "password or token" if kind == "generic_secret" else kind.replace("_", " ")
            note = f"{name} {value[:4] if kind in PREFIXED else ''}… ({len(value):,} letters)"
            yield ContentHit("secrets", "error" if learned and kind in CERTAIN else "warning", note)
        elif category == "pii":
            shown = f"{value[0]}…@….{value.rpartition('.')[2]}" if kind == "email" else f"…{value[-2:]}"
            yield ContentHit("personal_data", "warning", f"{PERSONAL[kind]} {shown}")
        elif not request.languages or "en" in request.languages:
            yield ContentHit("profanity", "warning" if taught else "note", f"“{value[0]}…{value[-1]}”")
    for note in broken_characters(text):
        yield ContentHit("mojibake", "warning", note)
    code = fences(text)
    for token, _ in control_tokens(text):
        yield ContentHit("template_tokens", "warning", token)
    if part.role in ("assistant", "text", "user", "system"):
        for note in _markup(text, prose(text, code), code, part.role, request):
            yield ContentHit("markup", "warning" if taught else "note", note)
    if part.role == "assistant" and not part.at.startswith("rejected"):
        answer = text.rpartition("</think>")[2].lstrip()
        if refused := REFUSES.match(answer[:HEAD]):
            yield ContentHit("refusals", "note", f"“{excerpt(masked(refused[0].strip()), 80).rstrip('…')}…”")


_HTML = re.compile(
    r"</(?:a|b|i|p|em|strong|div|span|table|tbody|thead|tr|td|th|ul|ol|li|h[1-6]|font|center|blockquote"
    r"|pre)\s{0,5}>"
    r"|<(?:br|hr)\s{0,5}/?>|<(?:a|p|div|span|img|table|tr|td|th|ul|ol|li|h[1-6]"
    r"|font)\s{1,5}[a-z-]{1,20}\s{0,5}=",
    re.IGNORECASE,
)
_ENTITY = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|[lr][sd]quo|[mn]dash|hellip|copy|reg|#\d{2,6}|#[xX][0-9a-fA-F]{2,5});"
)
_ABOUT = re.compile(
    r"html|\bcss\b|\bxml|\bsvg\b|\bjsx\b|\breact(?:\.?js| app| component| native)|angular|\bvue\.?js"
    r"|svelte|markup|ing tags?\b"
    r"|web ?(?:page|site|app\b|dev)|front-?end|\bphp\b|django|\bflask\b|jinja|javascript|typescript"
    r"|scraping|mail template"
    r"|escape (?:char|seq)",
    re.IGNORECASE,
)
_FENCED = re.compile(r"markdown|code ?block|fence|```", re.IGNORECASE)
_SENTENCE = re.compile(r"[a-z]{2}[.!?](?:\s|$)")


def _markup(text: str, prose: str, fences: Fences, role: str, request: RowRequest) -> Iterator[str]:
    """An open fence; and if nobody asked for markup: prose wrapped in a fence, tags and entities in prose."""
    if fences.open:
        yield "a code fence is never closed"
    elif role == "assistant" and len(fences.spans) == 1:
        start, end, info = fences.spans[0]
        wrapped = info in ("markdown", "md") or (
            info in ("", "text", "txt") and len(_SENTENCE.findall(text)) > 1
        )
        if wrapped and not (text[:start] + text[end:]).strip() and not request.fences:
            yield "the whole answer is wrapped in a code fence"
    tags = _HTML.finditer(prose) if role in LEARNED and "<" in prose else ()
    tag = next(
        (match[0] for match in tags if match[0][:3].lower() != "<br" or not _in_table(prose, match.start())),
        None,
    )
    entity = _ENTITY.search(prose) if "&" in prose else None
    if (tag or entity) and not request.markup:
        yield from (
            f"“{' '.join(residue.split()).rstrip('=')}”" for residue in (tag, entity and entity[0]) if residue
        )


def _in_table(text: str, position: int) -> bool:
    """Whether the line is part of a markdown table, where <br> is the only way to break a line."""
    return "|" in text[max(text.rfind("\n", 0, position) + 1, position - 500) : position]


def _languages(view: View) -> tuple[str, ...]:
    """Of the prompt's start and the answer's end, which is less often a call than its start."""
    codes = {language(text) for text in (view.asked[:HEAD], view.said[-HEAD:])}
    return tuple(sorted(code for code in codes if code is not None))
