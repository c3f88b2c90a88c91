"""What stands in the words that should not be learned: secrets, personal data, swear words, residue of
markup, broken characters, control tokens of templates, refusals; and which languages they are in.

Secrets and personal data are found by their written form (prefixes, checksums, the word before them): a name,
a postal address or a password in a sentence is not seen, and what is plainly made up (example.com, 555
numbers, AKIA…EXAMPLE) is not named. Of toxicity only strong English swear words and slurs are seen, disguised
ones too, quoted or meant; threats, contempt and harm in clean words, and other languages, are not. Refusals
are told by English phrases at the start of an answer. Markup is no residue where it is asked for. A language
is told from 80 letters on. Nothing that is found is shown in full."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from tunesmith.auditing.findings import SEVERITIES, Evidence, Finding, Severity, counted
from tunesmith.auditing.views import Context, Part, Rule, Survey, View, excerpt

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier
    from pygarble.screening import Scanner

SCANNED = 100_000
"""Letters of a text that are looked at, from its start."""
LEARNED = ("assistant", "call", "text")
REFUSING = 0.1
"""Share of the rows to imitate that may refuse before it is a warning."""
RARE = 0.02
"""Share of the rows under which a language is named with its rows."""
LETTERS, HEAD, SURE = 80, 300, 0.95
"""A language is told from so many letters, among so many at the start of a prompt or the end of an answer, if
so sure."""

CERTAIN = frozenset(
    {
        "anthropic_api_key",
        "aws_access_key_id",
        "aws_secret_access_key",
        "github_token",
        "gitlab_token",
        "google_api_key",
        "huggingface_token",
        "npm_token",
        "openai_api_key",
        "private_key",
        "pypi_token",
        "sendgrid_key",
        "slack_token",
        "slack_webhook",
        "stripe_key",
    }
)
"""Kinds of secrets that are known by a prefix which means nothing else."""
TOLD = CERTAIN - {"private_key", "aws_secret_access_key"}
"""Those whose first four letters tell the kind and nothing more."""
PERSONAL = {
    "email": "e-mail address",
    "phone": "phone number",
    "credit_card": "card number",
    "iban": "IBAN",
    "ssn_us": "social security number",
}
"""Kinds of personal data looked for. Numbers of other countries than the US have no form that other numbers
lack."""
MACHINES = ("ipv4", "ipv6")
"""Not looked for: mostly ranges and versions."""
ORDINARY = ("ass", "brainfuck", "dyke", "dykes", "retard", "retarded", "retards", "spic")
"""Words with another meaning (spic and span, a file.ass): not taken for profanity."""

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
"""Rules that name rows by what stands in a text: what that is, and what to do."""


class Hit(NamedTuple):
    rule: str
    severity: Severity
    note: str


class Kept(NamedTuple):
    hits: tuple[Hit, ...]  # one a rule
    languages: tuple[str, ...]


class Asked:
    """What the user and the system of a row want, and its languages, found out once it matters."""

    def __init__(self, view: View) -> None:
        self.view = view

    @cached_property
    def texts(self) -> list[str]:
        return [part.text[:SCANNED] for part in self.view.parts if part.role in ("user", "system")]

    @cached_property
    def markup(self) -> bool:
        """They ask for it, or write it; plain text, which nobody asked for, speaks of it."""
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


class Content(Rule):
    name = "content"

    def look(self, view: View, context: Context) -> Kept | None:
        asked = Asked(view)
        languages = asked.languages if context.drawn(view) else ()
        found: dict[str, list[tuple[int, str]]] = defaultdict(list)
        for part in view.parts:
            for rule, severity, note in _scan(part, asked):
                found[rule].append((SEVERITIES.index(severity), f"{part.at}: {note}"))
        hits = tuple(Hit(rule, SEVERITIES[min(notes)[0]], _told(notes)) for rule, notes in found.items())
        return Kept(hits, languages) if hits or languages else None

    def judge(self, kept: list[Kept | None], survey: Survey) -> Iterator[Finding]:
        rows = survey.training
        if not rows:
            return
        found: dict[tuple[str, Severity], list[tuple[int, str]]] = defaultdict(list)
        for at in rows:
            for rule, severity, note in one.hits if (one := kept[at]) else ():
                found[rule, severity].append((at, note))
        for rule, (what, hint) in TELL.items():
            for severity in SEVERITIES:
                if some := found.get((rule, severity)):
                    where = ", where it is read or labelled bad" if severity == "note" else ""
                    told = f"{counted(len(some), len(rows))} in which {what} stands{where}"
                    yield _finding(survey, rule, severity, told, some, len(rows), hint)
        yield from _refusals(found["refusals", "note"], survey)
        yield from _spoken({at: one.languages for at in rows if (one := kept[at]) and one.languages}, survey)


def masked(text: str) -> str:
    """``text`` with what looks like a secret or a personal datum replaced by its kind in brackets."""
    return scanner().redact(text, categories=("secrets", "pii")).text


def _finding(
    survey: Survey,
    rule: str,
    severity: Severity,
    what: str,
    some: Sequence[tuple[int, str]],
    of: int,
    hint: str,
) -> Finding:
    evidence = tuple(Evidence(survey.sources[at], note) for at, note in some)
    return Finding(f"content.{rule}", severity, what, len(some), of, rows=evidence, hint=hint)


def _refusals(some: list[tuple[int, str]], survey: Survey) -> Iterator[Finding]:
    wanted = [at for at in survey.training if survey.labels[at] is not False]
    good = [(at, note) for at, note in some if survey.labels[at] is not False]
    if not some:
        return
    share = len(good) / max(len(wanted), 1)
    more = f", and in {len(some) - len(good):,} labelled undesirable" if len(some) > len(good) else ""
    many = counted(len(good), len(wanted)) if good else "no row"
    what = f"{many} to imitate in which the assistant refuses{more}"
    severity: Severity = "warning" if share > REFUSING else "note"
    hint = (
        "what refuses this often teaches refusing: keep those that are right, and balance them with answers"
    )
    yield _finding(
        survey, "refusals", severity, what, good, len(wanted), hint if severity == "warning" else ""
    )


def _spoken(rows: dict[int, tuple[str, ...]], survey: Survey) -> Iterator[Finding]:
    counts = Counter(language for languages in rows.values() for language in languages)
    if not counts:
        return
    shares = ", ".join(f"{language} {count / len(rows):.1%}" for language, count in counts.most_common(8))
    more = f" and {len(counts) - 8} more" if len(counts) > 8 else ""
    rare = {language: count for language, count in counts.items() if count < RARE * len(rows)}
    yield Finding(
        "content.languages",
        "good" if len(counts) == 1 else "note",
        f"languages of {counted(len(rows))} with enough words to tell: {shares}{more}",
        sum(counts.most_common(1)[0][0] not in languages for languages in rows.values()),
        len(rows),
    )
    named = [
        (min(rare[one] for one in some), at, some)
        for at, languages in rows.items()
        if (some := rare.keys() & {*languages})
    ]
    if named:
        told = f"{counted(len(named), len(rows))} in a language of less than {RARE:.0%} of the rows"
        notes = [
            (at, f"in {', '.join(sorted(some))}") for _, at, some in sorted(named, key=lambda one: one[:2])
        ]
        hint = "too few to learn from: fine for translation, else strays; leave them out or add more"
        yield _finding(survey, "languages", "warning", told, notes, len(rows), hint)


def _told(notes: list[tuple[int, str]]) -> str:
    several = list(dict.fromkeys(note for _, note in sorted(notes, key=lambda one: one[0])))
    return "; ".join(several[:3]) + (f"; and {len(several) - 3:,} more" if len(several) > 3 else "")


def _scan(part: Part, asked: Asked) -> Iterator[Hit]:
    """What is found in one text; of one rule a note may come several times."""
    text, learned = part.text[:SCANNED], part.role in LEARNED
    taught = learned and asked.view.label is not False and not part.at.startswith("rejected")
    if len(part.text) > SCANNED:
        yield Hit("unscanned", "note", f"{len(part.text):,} letters")
    for found in scanner().scan(text).findings:
        value, before = text[found.start : found.end], text[max(0, found.start - 60) : found.start]
        if found.category == "secrets":
            if is_secret(found.kind, value, before):
                kind = "password or token" if found.kind == "generic_secret" else found.kind.replace("_", " ")
                note = f"{kind} {value[:4] if found.kind in TOLD else ''}… ({len(value):,} letters)"
                yield Hit("secrets", "error" if learned and found.kind in CERTAIN else "warning", note)
        elif found.category == "pii":
            if is_personal(found.kind, value, before, text[found.end : found.end + 4]):
                shown = (
                    f"{value[0]}…@….{value.rpartition('.')[2]}" if found.kind == "email" else f"…{value[-2:]}"
                )
                yield Hit("personal_data", "warning", f"{PERSONAL[found.kind]} {shown}")
        elif not (
            MASKED.fullmatch(value)
            if found.confidence < 0.8
            else 2 * sum(map(str.isalpha, value)) > len(value)
        ):
            continue
        elif not asked.languages or "en" in asked.languages:
            yield Hit("profanity", "warning" if taught else "note", f"“{value[0]}…{value[-1]}”")
    for note in _broken(text):
        yield Hit("mojibake", "warning", note)
    code = fences(text)
    for token, _ in tokens(text):
        yield Hit("template_tokens", "warning", token)
    if part.role in ("assistant", "text", "user", "system"):
        for note in _markup(text, prose(text, code), code, part.role, asked):
            yield Hit("markup", "warning" if taught else "note", note)
    if part.role == "assistant" and not part.at.startswith("rejected"):
        answer = text.rpartition("</think>")[2].lstrip()
        if refused := REFUSES.match(answer[:HEAD]):
            yield Hit("refusals", "note", f"“{excerpt(masked(refused[0].strip()), 80).rstrip('…')}…”")


# secrets

_MADE_UP = re.compile(
    r"example|your|xxx|placeholder|dummy|sample|change.?me|redacted|fake|test|secret|pass|token|admin|qwerty|letmein"
    r"|4ec39hqlyjwdarjtt1zd|zdwiioiixmjm0nty3odkwi|\.\.\."
)  # the last two: the keys in the documentation of Stripe and of JWT
_FAKE_BODY = re.compile(r"example|placeholder|dummy|redacted|fake|xxxx|\.\.\.", re.IGNORECASE)
_LEET = str.maketrans("@$013457", "asoieast")
_HARMLESS = re.compile(
    r"(?:page|next|cursor|continuation|csrf|max|sync|public|tokeni[sz])[\w-]{0,20}[\"']?\s{0,5}[:=]\s{0,5}[\"']?$",
    re.IGNORECASE,
)
_HEX = re.compile(r"[0-9a-f]+", re.IGNORECASE)
_KEY_LINE = re.compile(r"[A-Za-z0-9+/=]{40}")
_CHUNK = re.compile(r"[A-Za-z0-9]+")
_WORDLIKE = re.compile(r"[A-Za-z]{3,}\d{0,4}|\d+|[A-Za-z]+")


def is_secret(kind: str, value: str, before: str) -> bool:
    """Whether it may open something: not plainly made up, no path, no code, no name of a variable."""
    if kind == "private_key":
        body = value.partition("KEY")[2]
        return bool(_KEY_LINE.search(body)) and not _FAKE_BODY.search(body) and not _steps(body[:400])
    if kind in CERTAIN or kind == "jwt":
        return not _made_up(value) and not (kind == "aws_secret_access_key" and _HEX.fullmatch(value))
    if kind == "url_credentials":
        password = value.partition(":")[2]
        return not (_made_up(password) or _WORDLIKE.fullmatch(password) or set(password) & set("<>{}[]()$%*"))
    return (
        _random(value) and not _made_up(value) and not _HARMLESS.search(before)
    )  # behind a word such as password or bearer


def _made_up(value: str) -> bool:
    """Placeholders, few letters, runs such as 123456 or a1b2c3: nothing that a generator of keys would
    give."""
    low = value.lower()
    return (
        bool(_MADE_UP.search(low) or _MADE_UP.search(low.translate(_LEET)))
        or len(set(low)) < 6
        or _steps(low)
    )


def _steps(value: str, share: float = 1 / 3) -> bool:
    """Whether such a share of the letters repeat the one before (or before that), or follow it in the
    alphabet."""
    codes = [ord(letter) for letter in value.lower()]
    return any(
        sum(0 <= b - a <= 1 for a, b in zip(codes, codes[far:], strict=False)) >= share * len(codes)
        for far in (1, 2)
    )


def _random(value: str) -> bool:
    """Whether it reads like the work of a generator: no path, no code, and a chunk that no word, number or
    version is."""
    if value[0] in "./~$<{[(%" or "://" in value or "\\" in value or "/" in value:
        return False
    chunks = [chunk for chunk in _CHUNK.findall(value) if not _WORDLIKE.fullmatch(chunk)]
    return any(
        (len(chunk) >= 16 and not chunk.isalpha())
        or (chunk.lower() != chunk and chunk.upper() != chunk and any(letter.isdigit() for letter in chunk))
        for chunk in chunks
    )


# personal data

_PLACE = re.compile(
    r"example|sample|domain|company|corp\b|acme|contoso|fabrikam|placeholder|provider|(?:^|\.)(?:e?mail|test|foo|bar|abc|xyz|vendor"
    r"|partner|host|site|website|server|business|store|shop|school|university|organi[sz]ation|org|club|brand)\.[a-z]+$"
    r"|\.(?:test|invalid|localhost|local|internal|lan)$"
)
_OFFICES = frozenset(
    (
        "admin administrator alerts bot ci contact customer.service customerservice devops email enquiries feedback git hello "
        "help hr info it jobs legal mail marketing me name news newsletter no-reply noreply office orders postmaster press privacy "
        "recipient reservations root sales security sender service sip someone support team test user username webmaster you"
    ).split()
)
_NOBODY = re.compile(r"doe\b|john[._]?smith|jane[._]?smith|^(?:foo|bar|abc|xyz|xx+)$")
_CARD_WORD = re.compile(
    r"card|visa|amex|american express|credit|debit|discover|pay(?:ment|ing)?\b|cvv|cvc|expir", re.IGNORECASE
)
_TEST_NUMBERS = frozenset(
    (
        "4012888888881881 378282246310005 371449635398431 30569309025904 38520000023237 6011000990139424 4532015112830366 "
        "078051120 219099999 GB82WEST12345698765432 GB29NWBK60161331926819 GB33BUKB20201555555555 DE89370400440532013000 "
        "FR1420041010050500013M02606 FR7630006000011234567890189 NL91ABNA0417164300 ES9121000418450200051332 "
        "IT60X0542811101000000123456 BE68539007547034 AT611904300234573201 CH9300762011623852957"
    ).split()
)
"""Cards, social security numbers and IBANs that documentation shows."""
_SUM = re.compile(r"[=*/×÷^<>$€£\d]\s{0,2}$|[#&?%_.,]$")
_SUM_AFTER = re.compile(r"\s{0,2}[=*/×÷^<>$€£&_%]|[.,]\d")
_TOLL_FREE = ("800", "833", "844", "855", "866", "877", "888", "900")
_FICTION = re.compile("2079460|7700900|1632960")  # kept free for films, by Ofcom


def is_personal(kind: str, value: str, before: str, after: str) -> bool:
    """Whether it may belong to someone: not made up, not of an office, not a number in a sum."""
    if kind == "email":
        name, _, place = value.lower().partition("@")
        return not (
            name.strip("0123456789") in _OFFICES
            or _MADE_UP.search(name)
            or _NOBODY.search(name)
            or _PLACE.search(place)
        )
    digits = re.sub(r"\D", "", value)
    if kind == "iban":
        return value.replace(" ", "") not in _TEST_NUMBERS
    if _SUM.search(before) or _SUM_AFTER.match(after) or digits in _TEST_NUMBERS:
        return False
    if kind == "phone":
        local = digits[1:] if len(digits) == 11 and digits[0] == "1" else digits
        american = len(local) == 10 and (local[:3] in ("555", *_TOLL_FREE) or local[3:6] == "555")
        return not (
            american
            or len(digits) < 9
            or _FICTION.search(digits)
            or _steps(digits, 2 / 3)
            or _steps(digits[::-1], 2 / 3)
        )
    if kind == "credit_card":
        return len(set(digits)) > 4 and bool(_CARD_WORD.search(before))
    return "-" in value and not _steps(digits, 2 / 3)


# broken characters

MASKED = re.compile(r"(?=.{4})[A-Za-z]{1,2}\*{1,3}[A-Za-z]{1,3}")  # f*ck, not f*g
_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff\ud800-\udfff]")


def _broken(text: str) -> Iterator[str]:
    """Characters that no text holds (controls, U+FFFD, half a pair), and letters read with the wrong
    encoding."""
    if _UNSEEN.search(text):
        counts = Counter(_UNSEEN.findall(text))
        yield ", ".join(
            f"U+{ord(one):04X}" + f" {count:,} times" * (count > 1) for one, count in counts.most_common(3)
        )
    if text.isascii():
        return
    import ftfy
    from ftfy.badness import BADNESS_RE

    if (found := BADNESS_RE.search(text)) and ftfy.fix_encoding(text) != text:
        yield "letters of another encoding" + f" (“{found[0].strip()}”)" * found[0].strip().isprintable()


# control tokens

_TOKEN = re.compile(
    r"<\|[\w-]{1,40}\|>|<｜[\w▁-]{1,40}｜>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT|SYSTEM_PROMPT)\]|<</?SYS>>"
    r"|</?(?:start_of_turn|end_of_turn)>"
)
_STRUCK = re.compile(r"</?s>")


def tokens(text: str) -> Iterator[tuple[str, int]]:
    """(token, where). ``<s>`` with its ``</s>`` inside a text strikes words out and is none."""
    if "<" in text or "[" in text:
        yield from ((found[0], found.start()) for found in _TOKEN.finditer(text))
    if "s>" not in text:
        return
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    opened: list[int] = []
    for found in _STRUCK.finditer(text):
        if found[0] == "<s>":
            opened.append(found.start())
        elif not opened or (opened[-1] == first and found.end() == last):  # alone, or around the whole text
            yield "</s>", found.start()
        else:
            opened.pop()
    yield from (("<s>", at) for at in opened)


# markup

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
_INLINE = re.compile(r"`[^`\n]*`")
_HTML = re.compile(
    r"</(?:a|b|i|p|em|strong|div|span|table|tbody|thead|tr|td|th|ul|ol|li|h[1-6]|font|center|blockquote|pre)\s{0,5}>"
    r"|<(?:br|hr)\s{0,5}/?>|<(?:a|p|div|span|img|table|tr|td|th|ul|ol|li|h[1-6]|font)\s{1,5}[a-z-]{1,20}\s{0,5}=",
    re.IGNORECASE,
)
_ENTITY = re.compile(
    r"&(?:nbsp|amp|lt|gt|quot|apos|[lr][sd]quo|[mn]dash|hellip|copy|reg|#\d{2,6}|#[xX][0-9a-fA-F]{2,5});"
)
_ABOUT = re.compile(
    r"html|\bcss\b|\bxml|\bsvg\b|\bjsx\b|\breact(?:\.?js| app| component| native)|angular|\bvue\.?js|svelte|markup|ing tags?\b"
    r"|web ?(?:page|site|app\b|dev)|front-?end|\bphp\b|django|\bflask\b|jinja|javascript|typescript|scraping|mail template"
    r"|escape (?:char|seq)",
    re.IGNORECASE,
)
_FENCED = re.compile(r"markdown|code ?block|fence|```", re.IGNORECASE)
_SENTENCE = re.compile(r"[a-z]{2}[.!?](?:\s|$)")


class _Fences(NamedTuple):
    """Code between fences: start, end and info string of each; ``open``: the last is never closed."""

    spans: list[tuple[int, int, str]]
    open: bool


def fences(text: str) -> _Fences:
    spans: list[tuple[int, int, str]] = []
    mark, start, info, marks = "", 0, "", 0
    for found in _FENCE.finditer(text) if "```" in text or "~~~" in text else ():
        if not mark and not ("`" in found[1] and "`" in found[2]):
            mark, start, info = found[1], found.start(), found[2].strip().lower()
        elif not mark or not found[1].startswith(mark):
            continue
        elif not found[2].strip():
            spans.append((start, found.end(), info))
            mark = ""
        marks += 1
    if mark:
        spans.append((start, len(text), info))
    return _Fences(
        spans, bool(mark) and marks % 2 == 1
    )  # fences inside fences come in pairs: unusual, but whole


def prose(text: str, fences: _Fences) -> str:
    """``text`` with its code blanked out, letter for letter."""
    if "`" not in text and not fences.spans:
        return text
    pieces, at = [], 0
    for start, end, _ in fences.spans:
        pieces += [text[at:start], " " * (end - start)]
        at = end
    return _INLINE.sub(lambda found: " " * len(found[0]), "".join([*pieces, text[at:]]))


def _markup(text: str, prose: str, fences: _Fences, role: str, asked: Asked) -> Iterator[str]:
    """An open fence; and where nobody asked for markup: prose that is wrapped in a fence, tags and entities
    in prose."""
    if fences.open:
        yield "a code fence is never closed"
    elif role == "assistant" and len(fences.spans) == 1:
        start, end, info = fences.spans[0]
        wrapped = info in ("markdown", "md") or (
            info in ("", "text", "txt") and len(_SENTENCE.findall(text)) > 1
        )
        if wrapped and not (text[:start] + text[end:]).strip() and not asked.fences:
            yield "the whole answer is wrapped in a code fence"
    tags = _HTML.finditer(prose) if role in LEARNED and "<" in prose else ()
    tag = next(
        (found[0] for found in tags if found[0][:3].lower() != "<br" or not _in_table(prose, found.start())),
        None,
    )
    entity = _ENTITY.search(prose) if "&" in prose else None
    if (tag or entity) and not asked.markup:
        yield from (f"“{' '.join(one.split()).rstrip('=')}”" for one in (tag, entity and entity[0]) if one)


def _in_table(text: str, at: int) -> bool:
    """Whether the line is of a markdown table, where a line cannot be broken otherwise."""
    return "|" in text[max(text.rfind("\n", 0, at) + 1, at - 500) : at]


# refusals

_I = r"I ?(?:\w{2,12}ly |also |just )?"
_UNABLE = r"(?:can(?:no|['’])t|can not|(?:am|['’]m) (?:\w{2,12}ly )?(?:unable to|not able to|not capable of))"
_LACK = r"(?:do not|don['’]t) (?:\w{2,12}ly )?(?:have|possess)"
_SORRY = (
    r"(?:I(?:['’]m| am) (?:\w{1,10} ){0,2}sorry|sorry|(?:I|my) apologi[sz]e|(?:my )?apologies|unfortunately|regrettably"
    r"|as an? (?:\w{1,12} ){0,2}(?:AI|language model)|I(?:['’]m| am) (?:\w{1,12} ){0,2}(?:AI|language model))\b[^.!?\n]{0,100}?\b"
)
_MISS = r"(?! (?:find|see\b|locate|determine|estimate|tell\b|come\b|attend|make it|join))"
_SERVE = (
    r"(?:assist|help|provid|fulfil|comply|support|engag|creat|generat|answer|do (?:that|this|so)\b|delet|remov|discuss|offer"
    r"|shar(?:e|ing)|complete (?:this|that)|perform|access|brows|process|writ(?:e|ing) (?:this|that|code)|produc|recommend"
    r"|advis|participat|translat|book|order|execut|predict)"
)
_ACCESS = r"(?:the (?:ability|capability)|access|personal|real.?time|any (?:information|personal)|feelings)"
REFUSES = re.compile(
    rf"\W{{0,3}}(?:{_SORRY}{_I}(?:{_UNABLE}|{_LACK}|won['’]t|will not|(?:must )?decline){_MISS}"
    rf"|{_I}(?:{_UNABLE}|won['’]t|will not|must decline to)(?: and (?:will not|won['’]t))? {_SERVE}|{_I}{_LACK} {_ACCESS})"
    r"[^.!?\n]{0,40}",
    re.IGNORECASE,
)


# languages


def _languages(view: View) -> tuple[str, ...]:
    """Of the prompt's start and the answer's end, which is less often a call than its start."""
    found: set[str] = set()
    for text in (view.asked[:HEAD], view.said[-HEAD:]):
        if sum(map(str.isalpha, text)) >= LETTERS:
            language, sure = identifier().classify(text)
            if sure >= SURE and language not in ("zxx", "und"):
                found.add(language)
    return tuple(sorted(found))


# what is loaded once in each process


@lru_cache(maxsize=1)
def scanner() -> Scanner:
    from pygarble.screening import Scanner

    return Scanner(
        exclude_kinds=MACHINES, locales=("us",), profanity_allowlist=ORDINARY, profanity_tiers=("strong",)
    )


@lru_cache(maxsize=1)
def identifier() -> LanguageIdentifier:
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
