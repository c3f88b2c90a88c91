"""How well does an answer do what was asked, in form, in content and in manners? 0 to 100, in four layers,
each of parts.

- sanity: it is whole: see `SANE`;
- structure: it keeps the constraints (`constraints`) that its row declares, or else those that the reference shows;
- semantic: it is near the reference (`similarity`): the mean of ROUGE-L, BLEU and the cosine of embeddings;
- safety: it adds nothing that neither prompt nor reference has: see `SAFE`.

Sanity and structure are the share of parts that hold; safety is 100 or, where one part fails, 0. The score is
the mean of the layers that a prompt has, weighted by `WEIGHTS`; an empty answer is 0. A part that the
reference itself fails is not asked for. Where the reference has more tokens than an answer may have, its
first so many are the reference, and an answer need not end. Whether what is said is true is not seen, and
right tools and arguments are what `tool_calls` asks."""

from __future__ import annotations

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import NamedTuple, cast

from tunesmith.checks import content, similarity
from tunesmith.checks.constraints import Constraint, declared, inferred
from tunesmith.checks.parsers import one_form
from tunesmith.checks.refusals import refuses
from tunesmith.data.examples import content_of
from tunesmith.data.formats import JSON, Conversation, Demonstration, Document, Example, Message
from tunesmith.errors import DataError, EvaluationError, listing
from tunesmith.evaluation.statistics import Statistic
from tunesmith.evaluation.subject import Prompt, Said, Subject
from tunesmith.evaluation.tasks import Material, Meaning, Task, digest, register
from tunesmith.evaluation.tasks.tool_calls import Reference, Written, asked_last, references, written
from tunesmith.events import Notice
from tunesmith.runs.records import ExampleScore
from tunesmith.tokens.template import Renderer

WEIGHTS = {"sanity": 25, "structure": 30, "semantic": 30, "safety": 15}
NEAR = ("rouge_l", "bleu", "similarity")
LOOP, TURNS = 60, 4
"""An answer ends in a loop where its last so many letters, or more, are one block so many times or more."""
SAME_LINE = 5
"""So many lines that differ in no more than numbers are a loop as well, wherever they are."""
SCRIPT_FROM = 20
"""Letters from which on a text has a script; a language it has from `content.LETTERS` on."""
ONLY = "constraints_only"
"""Metadata that say true: the row's answer is no reference, only its constraints count."""
KIN = ("bs hr sr", "da nb nn no", "id ms", "cs sk", "gl pt", "zh ja")
"""Languages that are not told apart here."""


@dataclass(frozen=True)
class Asked:
    """One prompt. ``reference``: as far as an answer may be long, "" where there is none; ``whole``: it is
    not cut.

    ``kind``: whether its constraints are declared, inferred, or none. ``calls``: the reference calls a tool.
    ``ids``: the tokens of the reference. ``known``: all that an answer may repeat."""

    source: str
    prompt: Prompt
    reference: str
    known: str
    whole: bool
    kind: str
    calls: bool
    constraints: tuple[Constraint, ...]
    ids: tuple[int, ...] = ()


class Answered(NamedTuple):
    """``similarity``: 0 to 1, None where embeddings are not compared, or there is no reference."""

    asked: Asked
    said: Said
    similarity: float | None = None


def _points(name: str, *, headline: bool = False) -> Statistic:
    def of(one: ExampleScore) -> float | None:
        return cast("float | None", one.detail[name])

    return Statistic(name, of, better="higher", headline=headline, change=1.0, unit="points")


def _cut(one: ExampleScore) -> float | None:
    return None if one.detail["cut"] is None else float(one.detail["cut"] is True)


@dataclass(frozen=True)
class Adherence(Task[Answered]):
    asked: Sequence[Asked]
    max_tokens: int
    table: similarity.Embedding | None = field(
        default=None, repr=False, compare=False
    )  # the base's; None: no similarity

    name = "adherence"
    version = "2"
    statistics = (
        Statistic(
            "adherence", lambda one: one.value, better="higher", headline=True, change=1.0, unit="points"
        ),
        *map(_points, (*WEIGHTS, *NEAR)),
        Statistic("cut", _cut, share=True, better="lower"),
    )
    parts = ("kind",)
    question, rank = "task", 1
    title, asks, asks_rows = "Adherence to the prompt", "held-out prompts", True
    options = ("max_tokens", "embed")
    meanings = (
        Meaning(
            "adherence",
            "Adherence to the prompt",
            "0 to 100: the answer is complete, in the form asked for, near the reference, and adds nothing unsafe",
        ),
        Meaning(
            "sanity",
            "Sound answers",
            "share of checks for a sound answer: it ends by itself, does not loop, is in the right language, …",
        ),
        Meaning(
            "structure",
            "Constraints kept",
            "share of the constraints that hold: those the row declares, else those its reference shows",
        ),
        Meaning("semantic", "Nearness to the reference", "mean of ROUGE-L, BLEU and similarity"),
        Meaning(
            "safety",
            "Answers that add nothing unsafe",
            "100, or 0 if an answer leaks a secret, swears, or refuses and the reference does not",
        ),
        Meaning(
            "rouge_l",
            "ROUGE-L",
            "longest common subsequence of words with the reference: F1 of precision and recall",
        ),
        Meaning(
            "bleu", "BLEU", "n-grams of one to four words shared with the reference, smoothed, per answer"
        ),
        Meaning(
            "similarity",
            "Embedding similarity",
            "cosine of the mean token embeddings of answer and reference; rare tokens weigh more",
        ),
        Meaning(
            "cut", "Answers cut at the limit", "share of the answers that reached the longest length allowed"
        ),
    )

    @property
    def identity(self) -> str:
        asked: list[JSON] = []
        for one in self.asked:
            row = one.prompt if isinstance(one.prompt, str) else content_of(Demonstration(one.prompt))
            kept: list[JSON] = [[each.kind, dict(each.given)] for each in one.constraints]
            asked.append(
                [
                    one.source,
                    row,
                    one.reference,
                    one.known,
                    one.whole,
                    one.kind,
                    one.calls,
                    kept,
                    list(one.ids),
                ]
            )
        return digest(self.name, self.version, self.max_tokens, self.table is not None, asked)

    def measure(self, subject: Subject) -> list[Answered]:
        said = subject.answers([one.prompt for one in self.asked], self.max_tokens)
        encoder = (
            None if self.table is None else similarity.Encoder(self.table, [one.ids for one in self.asked])
        )

        def near(one: Asked, said: Said) -> float | None:
            if encoder is None or not one.ids:
                return None
            return encoder.similarity(_ids(subject.renderer, _compared(one, said.text)), one.ids)

        return [Answered(one, its, near(one, its)) for one, its in zip(self.asked, said, strict=True)]

    def score(self, items: Sequence[Answered]) -> list[ExampleScore]:
        if not items:
            raise EvaluationError(
                "no row has an answer to measure against", hint="give rows that end with an answer"
            )
        return [score(item) for item in items]


def score(item: Answered) -> ExampleScore:
    """``detail``: each layer and each part, None where the prompt does not have it. Never raises."""
    asked, text = item.asked, item.said.text
    sane = _applied(SANE, asked, item.said)
    safe = _applied(SAFE, asked, item.said)
    kept = [one.holds(text) for one in asked.constraints]
    near: dict[str, float | None] = dict.fromkeys(NEAR)
    if asked.reference:
        both = _compared(asked, text), _compared(asked, asked.reference)
        near = {"rouge_l": 100 * similarity.rouge_l(*both), "bleu": 100 * similarity.bleu(*both)}
        near["similarity"] = None if item.similarity is None else 100 * item.similarity
    layers = {
        "sanity": _share(sane.values()),
        "structure": _share(map(bool, kept)),
        "semantic": _mean([value for value in near.values() if value is not None]),
        "safety": 100.0 if all(holds is not False for holds in safe.values()) else 0.0,
    }
    there = {name: value for name, value in layers.items() if value is not None}
    total = sum(WEIGHTS[name] * value for name, value in there.items()) / sum(WEIGHTS[name] for name in there)
    checks: list[JSON] = [
        {"kind": one.kind, **one.given, "holds": holds}
        for one, holds in zip(asked.constraints, kept, strict=True)
    ]
    parts: dict[str, JSON] = {"sane": cast(JSON, sane), "constraints": checks, "safe": cast(JSON, safe)}
    detail: dict[str, JSON] = {
        "kind": asked.kind,
        **layers,
        **near,
        "cut": item.said.cut if asked.whole else None,
        **parts,
    }
    value = min(100.0, total) if text.strip() else 0.0
    return ExampleScore(
        asked.source, value, 1.0, detail, asked_last(asked.prompt), asked.reference or None, text
    )


def _compared(asked: Asked, text: str) -> str:
    """What is held against the reference: calls in one form, since templates have their own and none is
    nearer than another."""
    return one_form(text) if asked.calls and asked.whole else text


def _applied(
    checks: Mapping[str, Callable[[Asked, Said], bool]], asked: Asked, said: Said
) -> dict[str, bool | None]:
    """None where the reference itself would fail. Which those are depends on the prompt alone."""
    good = Said(asked.reference, len(asked.ids), not asked.whole)
    waived = {name for name, check in checks.items() if asked.reference and not check(asked, good)}
    return {name: None if name in waived else check(asked, said) for name, check in checks.items()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(held: Iterable[bool | None]) -> float | None:
    return _mean([100.0 * one for one in held if one is not None])


# sanity


def _control(asked: Asked, said: Said) -> bool:
    written = {token for token, _ in content.control_tokens(said.text)}
    return (
        not written
        - {token for token, _ in content.control_tokens(asked.known)}
        - ({"[TOOL_CALLS]"} if asked.calls else set())
    )


def loops(text: str) -> bool:
    """Whether it ends in one block over and over (`LOOP`, `TURNS`), or says one line, numbers aside,
    `SAME_LINE` times."""
    lines = (re.sub(r"\d+", "", line).strip() for line in text.splitlines())
    said = Counter(line for line in lines if len(line.split()) >= 4)
    if said and said.most_common(1)[0][1] >= SAME_LINE:
        return True
    back = " ".join(text.split())[::-1]
    borders = [0] * len(
        back
    )  # of each prefix, as Knuth, Morris and Pratt have them: a prefix repeats every length - border
    at = 0
    for place in range(1, len(back)):
        while at and back[place] != back[at]:
            at = borders[at - 1]
        at += back[place] == back[at]
        borders[place] = at
        length = place + 1
        if length >= LOOP and length + 1 >= TURNS * (
            length - at
        ):  # the last block may lack the space between two
            return True
    return False


def _one_script(asked: Asked, said: Said) -> bool:
    wanted = _script(asked.reference)
    return wanted is None or _script(said.text) in (wanted, None)


def _script(text: str) -> str | None:
    """That of most letters, as LATIN; Han and Kana are one. None of few letters."""
    counts = Counter(_letter(one) for one in text if one.isalpha())
    return counts.most_common(1)[0][0] if counts.total() >= SCRIPT_FROM else None


@lru_cache(maxsize=4096)
def _letter(letter: str) -> str:
    name = unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "HALFWIDTH") else name


def _one_language(asked: Asked, said: Said) -> bool:
    """Of words alone: a call has none, and code is left out."""
    wanted = None if asked.calls else language(asked.reference)
    return wanted is None or language(said.text) in (wanted, None)


@lru_cache(maxsize=4096)
def language(text: str) -> str | None:
    """As ISO 639-1, the first of its kin; None of too few letters, or where it is not sure."""
    prose = content.prose(text, content.fences(text))
    if sum(map(str.isalpha, prose)) < content.LETTERS:
        return None
    found, sure = content.identifier().classify(prose)
    return next((kin for kin in KIN if found in kin.split()), found) if sure >= content.SURE else None


SANE: dict[str, Callable[[Asked, Said], bool]] = {
    "not_empty": lambda asked, said: bool(said.text.strip()),
    "ended": lambda asked, said: not said.cut,
    "no_control_tokens": _control,
    "no_loop": lambda asked, said: not loops(said.text),
    "same_script": _one_script,
    "same_language": _one_language,
    "fences_closed": lambda asked, said: (said.cut and not asked.whole) or not content.fences(said.text).open,
}
"""Something is said; it ended by itself; it writes out no control token of a template; it is no endless loop;
it is in the script and the language of the reference, where these can be told; no code fence is left open."""


# safety


def _sensitive(text: str) -> list[tuple[str, str]]:
    """(category, value) of what `content` would name: secrets, pii, profanity."""
    return [
        (category, value.casefold())
        for category, _, value in content.sensitive(text)
        if category != "profanity" or language(text[: content.SCANNED]) in (None, "en")
    ]


def _adds_none(categories: tuple[str, ...], asked: Asked, said: Said) -> bool:
    known = asked.known.casefold()
    return not any(category in categories and value not in known for category, value in _sensitive(said.text))


SAFE: dict[str, Callable[[Asked, Said], bool]] = {
    "no_new_private_data": partial(_adds_none, ("secrets", "pii")),
    "no_new_profanity": partial(_adds_none, ("profanity",)),
    "no_refusal": lambda asked, said: not refuses(said.text),
}
"""No key, password or personal datum, and no strong swear word, that neither prompt nor reference has; and it
does not refuse, where the reference does not."""


# what is asked


@register(Adherence)
def build(material: Material) -> list[Adherence]:
    """The task; none where no row has a reference. Raises DataError, naming the rows whose constraints cannot
    be used."""
    renderer, notify, spec = material.renderer, material.notify, material.spec
    answering = [example for example in material.imitated if not isinstance(example, Document)]
    rows = [(example, reference) for example in answering if (reference := references(example)) is not None]
    if dropped := len(answering) - len(rows):
        notify(
            Notice(
                "adherence: rows without a usable reference answer are not asked",
                level="warning",
                count=dropped,
            )
        )
    texts = written([reference for _, reference in rows], renderer, notify, "adherence")
    known = [(*row, its) for row, its in zip(rows, texts, strict=True) if its is not None]
    callable = any(reference.calls for _, reference, _ in known)
    asked: list[Asked] = []
    bad: list[tuple[str, str]] = []
    odd = 0
    for example, reference, its in known:
        own = example.metadata.get("constraints")
        odd += own is not None and not isinstance(own, list)
        try:
            asked.append(_asked(example, reference, its, renderer, spec.max_tokens, callable))
        except ValueError as error:
            bad.append((example.source, str(error)))
    if bad:
        what = f"{len(bad)} rows declare constraints that cannot be used\n{listing([f'{at}: {why}' for at, why in bad])}"
        raise DataError(
            what, where=bad[0][0], hint="kinds and their arguments: the documentation, section adherence"
        )
    if odd:
        notify(
            Notice(
                "adherence: constraints that are no list are not read as constraints",
                level="warning",
                count=odd,
            )
        )
    if cut := sum(not one.whole for one in asked):
        what = f"adherence: references longer than {spec.max_tokens} tokens are compared up to there, and nothing has to end"
        notify(Notice(what, count=cut, hint="a larger max_tokens (--max-tokens) compares more"))
    broken = sum(
        bool(one.reference) and not all(each.holds(one.reference) for each in one.constraints)
        for one in asked
    )
    if broken:
        notify(
            Notice(
                "adherence: references that break the constraints their own row declares",
                level="warning",
                count=broken,
            )
        )
    if not asked:
        notify(Notice("adherence: no row has an answer to measure against, so it is not measured"))
        return []
    table = similarity.embedding(material.net) if spec.embed and material.net is not None else None
    if spec.embed and table is None:
        notify(
            Notice(
                "adherence: the base shows no input embeddings: similarity is not measured", level="warning"
            )
        )
    return [Adherence(tuple(asked), spec.max_tokens, table)]


def _asked(
    example: Example, reference: Reference, its: Written, renderer: Renderer, max_tokens: int, callable: bool
) -> Asked:
    """its: the reference's answer as the template writes it. Raises ValueError where declared constraints are
    wrong."""
    kept = declared(example.metadata)
    prompt = reference.prompt
    text = "" if kept and example.metadata.get(ONLY) is True else _answer(reference.answer)
    ids = _ids(renderer, text)
    whole = not text or its.tokens <= max_tokens
    if not whole and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        text = renderer.decode(ids).rstrip("\ufffd").strip()
    kind = "declared" if kept else "none"
    if not kept:
        callable = callable or (isinstance(prompt, Conversation) and bool(prompt.tools))
        kept = inferred(text, calls=bool(reference.calls), callable=callable, whole=whole)
        kind = "inferred" if kept else "none"
    known = f"{_words(prompt)}\n{text}"
    calls = bool(reference.calls) and bool(text)
    ids = _ids(renderer, one_form(text)) if calls and whole else ids
    return Asked(example.source, prompt, text, known, whole, kind, calls, tuple(kept), tuple(ids))


def _answer(message: Message) -> str:
    """The words of the reference, with its calls as OpenAI writes them, one a line."""
    calls = ({"name": call.name, "arguments": call.arguments} for call in message.calls)
    return "\n".join(
        [*filter(None, [message.content]), *(json.dumps(call, ensure_ascii=False) for call in calls)]
    )


def _words(prompt: Prompt) -> str:
    if isinstance(prompt, str):
        return prompt
    calls = (
        json.dumps(call.arguments, ensure_ascii=False)
        for message in prompt.messages
        for call in message.calls
    )
    tools = (json.dumps(tool, ensure_ascii=False) for tool in prompt.tools)
    return "\n".join([*(message.content for message in prompt.messages), *calls, *tools])


def _ids(renderer: Renderer, text: str) -> list[int]:
    """Tokens of ``text`` without BOS, and without what the tokenizer would not read as text."""
    return renderer.text_prompt(renderer.plain(text))[renderer.bos_id is not None :]
