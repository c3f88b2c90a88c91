"""Secrets, personal data and swear words, as the audit finds them (`checks.content`)."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import ClassVar

from tunesmith.checks import content
from tunesmith.checks.content import SensitiveText
from tunesmith.serving.guardrails.guardrail import Guardrail, Span, register

_OPENED_KEY = re.compile(r"-----BEGIN [A-Z ]{0,20}PRIVATE KEY(?: BLOCK)?-----")
_OPENED_JWT = re.compile(r"\beyJ[\w-]{8,}\.eyJ[\w-]*(?:\.[\w-]*)?\Z")


@lru_cache(maxsize=8)
def _located(text: str) -> tuple[tuple[int, SensitiveText], ...]:
    """Scanned once for the guardrails of this file, which are asked one after the other."""
    return tuple(content.located(text))


def _spans(text: str, category: str) -> Iterator[Span]:
    for start, sensitive_text in _located(text):
        if sensitive_text.category == category:
            yield Span(start, start + len(sensitive_text.value), sensitive_text.kind)


@register
class Secrets(Guardrail):
    name = "secrets"
    detects: ClassVar = "keys, tokens and passwords with a written form: prefixes, private keys, JWT, …"
    misses: ClassVar = "a password in a sentence; what is plainly made up (`AKIA…EXAMPLE`) passes"

    def find(self, text: str) -> Iterator[Span]:
        yield from _spans(text, "secrets")
        # What is longer than the window, or was never ended: a key from its first line, a token from its
        # second part.
        *_, last = [None, *_OPENED_KEY.finditer(text)]
        if last is not None and "-----END" not in text[last.end() :]:
            yield Span(last.start(), len(text), "private_key")
        if (token := _OPENED_JWT.search(text)) is not None:
            yield Span(token.start(), len(text), "jwt")

    def reach(self) -> float:
        return 128


@register
class PersonalData(Guardrail):
    name = "personal_data"
    detects: ClassVar = "e-mail addresses, phone and card numbers, IBANs, US social security numbers"
    misses: ClassVar = "names, postal addresses, numbers of other countries; made-up ones pass"

    def find(self, text: str) -> Iterator[Span]:
        return _spans(text, "pii")

    def reach(self) -> float:
        return 96


@register
class Profanity(Guardrail):
    name = "profanity"
    detects: ClassVar = "strong English swear words and slurs, disguised ones too (pygarble's list)"
    misses: ClassVar = "other languages, mild words, threats and contempt in clean words"

    def find(self, text: str) -> Iterator[Span]:
        return _spans(text, "profanity")

    def reach(self) -> float:
        return 48
