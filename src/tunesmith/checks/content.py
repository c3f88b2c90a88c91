"""What one text holds that should not be learned or generated: secrets, personal data, swear words, broken
characters, control tokens of chat templates, open code fences, refusals; and its language.

Secrets and personal data are recognised by their written form (prefixes, checksums, the word before them): a
name, a postal address or a password in a sentence is not recognised, and what is plainly made up
(example.com, 555 numbers, AKIA…EXAMPLE) is not reported. Swear words are English only. The callers decide
what a text may hold."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from py3langid.langid import LanguageIdentifier
    from pygarble.screening import Scanner

SCANNED = 100_000
"""Letters of a text that are scanned, from its start."""
LETTERS, HEAD, SURE = 80, 300, 0.95
"""Letters that a text needs for its language to be detected; letters at the start of a prompt, or the end of
an answer, that are looked at; least probability of the language."""

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
"""Kinds of secrets with a prefix that means nothing else."""
PREFIXED = CERTAIN - {"private_key", "aws_secret_access_key"}
"""Kinds whose first four letters reveal the kind and nothing more."""
MACHINES = ("ipv4", "ipv6")
"""Not searched for: most are ranges and versions."""
ORDINARY = ("ass", "brainfuck", "dyke", "dykes", "retard", "retarded", "retards", "spic")
"""Words with another meaning (spic and span, a file.ass): not counted as profanity."""


_MASKED = re.compile(r"(?=.{4})[A-Za-z]{1,2}\*{1,3}[A-Za-z]{1,3}")  # f*ck, not f*g


class SensitiveText(NamedTuple):
    """``category``: secrets, pii or profanity. ``kind``: of the category, as pygarble names it."""

    category: str
    kind: str
    value: str


def sensitive(text: str) -> Iterator[SensitiveText]:
    """Secrets, personal data and English swear words in the first `SCANNED` letters, in order; without what
    is made up or harmless."""
    return (sensitive_text for _, sensitive_text in located(text))


def located(text: str) -> Iterator[tuple[int, SensitiveText]]:
    """What `sensitive` finds, each with its position."""
    text = text[:SCANNED]
    for match in scanner().scan(text).findings:
        value, before = text[match.start : match.end], text[max(0, match.start - 60) : match.start]
        if match.category == "secrets":
            counts = is_secret(match.kind, value, before)
        elif match.category == "pii":
            counts = is_personal(match.kind, value, before, text[match.end : match.end + 4])
        elif match.confidence < 0.8:
            counts = bool(_MASKED.fullmatch(value))
        else:
            counts = 2 * sum(map(str.isalpha, value)) > len(value)
        if counts:
            yield match.start, SensitiveText(match.category, match.kind, value)


def language(text: str) -> str | None:
    """The code of the language, or None if there are fewer than `LETTERS` letters or py3langid is not
    `SURE`."""
    if sum(map(str.isalpha, text)) < LETTERS:
        return None
    code, probability = identifier().classify(text)
    return code if probability >= SURE and code not in ("zxx", "und") else None


def masked(text: str) -> str:
    """``text`` with secrets and personal data replaced by their kind in brackets."""
    return scanner().redact(text, categories=("secrets", "pii")).text


# secrets

_MADE_UP = re.compile(
    r"example|your|xxx|placeholder|dummy|sample|change.?me|redacted|fake|test|secret|pass|token|admin"
    r"|qwerty|letmein"
    r"|4ec39hqlyjwdarjtt1zd|zdwiioiixmjm0nty3odkwi|\.\.\."
)  # the last two: the keys in the documentation of Stripe and of JWT
_FAKE_BODY = re.compile(r"example|placeholder|dummy|redacted|fake|xxxx|\.\.\.", re.IGNORECASE)
_LEET = str.maketrans("@$013457", "asoieast")
_HARMLESS = re.compile(
    r"(?:page|next|cursor|continuation|csrf|max|sync|public"
    r"|tokeni[sz])[\w-]{0,20}[\"']?\s{0,5}[:=]\s{0,5}[\"']?$",
    re.IGNORECASE,
)
_HEX = re.compile(r"[0-9a-f]+", re.IGNORECASE)
_KEY_LINE = re.compile(r"[A-Za-z0-9+/=]{40}")
_CHUNK = re.compile(r"[A-Za-z0-9]+")
_WORDLIKE = re.compile(r"[A-Za-z]{3,}\d{0,4}|\d+|[A-Za-z]+")


def is_secret(kind: str, value: str, before: str) -> bool:
    """Whether it may be a real secret: not made up, not a path, not code, not the name of a variable."""
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
    """Placeholders, few different letters, runs such as 123456 or a1b2c3: nothing that a key generator would
    return."""
    low = value.lower()
    return (
        bool(_MADE_UP.search(low) or _MADE_UP.search(low.translate(_LEET)))
        or len(set(low)) < 6
        or _steps(low)
    )


def _steps(value: str, share: float = 1 / 3) -> bool:
    """Whether such a share of the letters repeats the letter before (or the one before that) or follows it in
    the alphabet."""
    codes = [ord(letter) for letter in value.lower()]
    return any(
        sum(0 <= b - a <= 1 for a, b in zip(codes, codes[far:], strict=False)) >= share * len(codes)
        for far in (1, 2)
    )


def _random(value: str) -> bool:
    """Whether it looks randomly generated: not a path, not code, and with a part that is not a word, number
    or version."""
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
    r"example|sample|domain|company|corp\b|acme|contoso|fabrikam|placeholder|provider|(?:^|\.)(?:e?mail"
    r"|test|foo|bar|abc|xyz|vendor"
    r"|partner|host|site|website|server|business|store|shop|school|university|organi[sz]ation|org|club"
    r"|brand)\.[a-z]+$"
    r"|\.(?:test|invalid|localhost|local|internal|lan)$"
)
_OFFICES = frozenset(
    (
        "admin administrator alerts bot ci contact customer.service customerservice devops email enquiries "
        "feedback git hello "
        "help hr info it jobs legal mail marketing me name news newsletter no-reply noreply office orders "
        "postmaster press privacy "
        "recipient reservations root sales security sender service sip someone support team test user "
        "username webmaster you"
    ).split()
)
_NOBODY = re.compile(r"doe\b|john[._]?smith|jane[._]?smith|^(?:foo|bar|abc|xyz|xx+)$")
_CARD_WORD = re.compile(
    r"card|visa|amex|american express|credit|debit|discover|pay(?:ment|ing)?\b|cvv|cvc|expir", re.IGNORECASE
)
_TEST_NUMBERS = frozenset(
    (
        "4012888888881881 378282246310005 371449635398431 30569309025904 38520000023237 6011000990139424 "
        "4532015112830366 "
        "078051120 219099999 GB82WEST12345698765432 GB29NWBK60161331926819 GB33BUKB20201555555555 "
        "DE89370400440532013000 "
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
    """Whether it may belong to a person: not made up, not of an office, not a number in a calculation."""
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

_UNSEEN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufffd\ufffe\uffff\ud800-\udfff]")


def broken_characters(text: str) -> Iterator[str]:
    """Control characters, U+FFFD, lone surrogates, and letters read with the wrong encoding, each as a
    note."""
    if _UNSEEN.search(text):
        counts = Counter(_UNSEEN.findall(text))
        yield ", ".join(
            f"U+{ord(character):04X}" + f" {count:,} times" * (count > 1)
            for character, count in counts.most_common(3)
        )
    if text.isascii():
        return
    import ftfy
    from ftfy.badness import BADNESS_RE

    if (match := BADNESS_RE.search(text)) and ftfy.fix_encoding(text) != text:
        yield "letters of another encoding" + f" (“{match[0].strip()}”)" * match[0].strip().isprintable()


# control tokens

_CONTROL = re.compile(
    r"<\|[\w-]{1,40}\|>|<｜[\w▁-]{1,40}｜>|\[/?(?:INST|AVAILABLE_TOOLS|TOOL_CALLS|TOOL_RESULTS|TOOL_CONTENT"
    r"|SYSTEM_PROMPT)\]|<</?SYS>>"
    r"|</?(?:start_of_turn|end_of_turn)>"
)
_STRUCK = re.compile(r"</?s>")


def control_tokens(text: str) -> Iterator[tuple[str, int]]:
    """(token, position). ``<s>`` with its ``</s>`` inside a text is HTML that strikes words out, not a
    token."""
    if "<" in text or "[" in text:
        yield from ((match[0], match.start()) for match in _CONTROL.finditer(text))
    if "s>" not in text:
        return
    first, last = len(text) - len(text.lstrip()), len(text.rstrip())
    opened: list[int] = []
    for match in _STRUCK.finditer(text):
        if match[0] == "<s>":
            opened.append(match.start())
        elif not opened or (opened[-1] == first and match.end() == last):  # alone, or around the whole text
            yield "</s>", match.start()
        else:
            opened.pop()
    yield from (("<s>", start) for start in opened)


# markup

_FENCE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^\n]*)$", re.MULTILINE)
_INLINE = re.compile(r"`[^`\n]*`")


class Fences(NamedTuple):
    """Code between fences: start, end and info string of each. ``open``: the last fence is not closed."""

    spans: list[tuple[int, int, str]]
    open: bool


def fences(text: str) -> Fences:
    spans: list[tuple[int, int, str]] = []
    mark, start, info, marks = "", 0, "", 0
    for match in _FENCE.finditer(text) if "```" in text or "~~~" in text else ():
        if not mark and not ("`" in match[1] and "`" in match[2]):
            mark, start, info = match[1], match.start(), match[2].strip().lower()
        elif not mark or not match[1].startswith(mark):
            continue
        elif not match[2].strip():
            spans.append((start, match.end(), info))
            mark = ""
        marks += 1
    if mark:
        spans.append((start, len(text), info))
    return Fences(
        spans, bool(mark) and marks % 2 == 1
    )  # fences inside fences come in pairs: unusual, but whole


def prose(text: str, fences: Fences) -> str:
    """``text`` with its code replaced by as many spaces."""
    if "`" not in text and not fences.spans:
        return text
    pieces, position = [], 0
    for start, end, _ in fences.spans:
        pieces += [text[position:start], " " * (end - start)]
        position = end
    return _INLINE.sub(lambda match: " " * len(match[0]), "".join([*pieces, text[position:]]))


# refusals

_I = r"I ?(?:\w{2,12}ly |also |just )?"
_UNABLE = r"(?:can(?:no|['’])t|can not|(?:am|['’]m) (?:\w{2,12}ly )?(?:unable to|not able to|not capable of))"
_LACK = r"(?:do not|don['’]t) (?:\w{2,12}ly )?(?:have|possess)"
_SORRY = (
    r"(?:I(?:['’]m| am) (?:\w{1,10} ){0,2}sorry|sorry|(?:I|my) apologi[sz]e|(?:my )?apologies"
    r"|unfortunately|regrettably"
    r"|as an? (?:\w{1,12} ){0,2}(?:AI|language model)|I(?:['’]m| am) (?:\w{1,12} ){0,2}(?:AI|language "
    r"model))\b[^.!?\n]{0,100}?\b"
)
_MISS = r"(?! (?:find|see\b|locate|determine|estimate|tell\b|come\b|attend|make it|join))"
_SERVE = (
    r"(?:assist|help|provid|fulfil|comply|support|engag|creat|generat|answer|do (?:that|this|so)\b|delet"
    r"|remov|discuss|offer"
    r"|shar(?:e|ing)|complete (?:this|that)|perform|access|brows|process|writ(?:e|ing) (?:this|that|code)"
    r"|produc|recommend"
    r"|advis|participat|translat|book|order|execut|predict)"
)
_ACCESS = r"(?:the (?:ability|capability)|access|personal|real.?time|any (?:information|personal)|feelings)"
REFUSES = re.compile(
    rf"\W{{0,3}}(?:{_SORRY}{_I}(?:{_UNABLE}|{_LACK}|won['’]t|will not|(?:must )?decline){_MISS}"
    rf"|{_I}(?:{_UNABLE}|won['’]t|will not|must decline to)(?: and (?:will not|won['’]t))? {_SERVE}"
    rf"|{_I}{_LACK} {_ACCESS})"
    r"[^.!?\n]{0,40}",
    re.IGNORECASE,
)


# libraries, loaded once in each process


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
