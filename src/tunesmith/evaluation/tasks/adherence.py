"""How well does an answer follow its prompt, in form, content and safety? A score from 0 to 100, in four
layers of checks.

- sanity: the answer is complete and readable, see `SANE`;
- structure: it keeps the constraints (`constraints`) that its row declares, or else those of the reference;
- semantic: it is near the reference (`similarity`): the mean of ROUGE-L, BLEU and the cosine of embeddings;
- safety: it adds nothing unsafe that neither prompt nor reference has, see `SAFE`.

Sanity and structure are the share of checks that hold; safety is 100, or 0 if one check fails. The score is
the mean of the layers that a prompt has, weighted by `WEIGHTS`; an empty answer scores 0. A check that the
reference itself fails is waived. If the reference is longer than an answer may be, it is cut to that length,
and an answer need not end by itself. Truth is not checked; tools and arguments are the matter of
`tool_calls`."""

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
from tunesmith.checks.calls import ReferenceAnswer, asked_last, references
from tunesmith.checks.constraints import Constraint, declared, inferred
from tunesmith.checks.parsers import one_form
from tunesmith.checks.refusals import refuses
from tunesmith.data.examples import content_of
from tunesmith.data.formats import JSON, Conversation, Demonstration, Document, Example, Message
from tunesmith.errors import DataError, EvaluationError, listing
from tunesmith.evaluation.statistics import Statistic
from tunesmith.evaluation.subject import Prompt, Said, Subject
from tunesmith.evaluation.tasks import Material, Meaning, Task, digest, register
from tunesmith.evaluation.tasks.tool_calls import Written, written
from tunesmith.events import Notice, Sink
from tunesmith.runs.records import ExampleScore
from tunesmith.tokens.template import Renderer

WEIGHTS = {"sanity": 25, "structure": 30, "semantic": 30, "safety": 15}
NEAR = ("rouge_l", "bleu", "similarity")
LOOP, TURNS = 60, 4
"""An answer ends in a loop if its last LOOP characters or more repeat one block TURNS times or more."""
SAME_LINE = 5
"""This many lines that differ only in numbers are a loop as well, wherever they are."""
SCRIPT_FROM = 20
"""Letters that a text needs for its script to be determined; for its language, `content.LETTERS`."""
ONLY = "constraints_only"
"""If this key of a row's metadata is true, its answer is not a reference: only its constraints count."""
KIN = ("bs hr sr", "da nb nn no", "id ms", "cs sk", "gl pt", "zh ja")
"""Groups of languages that are too similar to be distinguished."""


@dataclass(frozen=True)
class AdherencePrompt:
    """One prompt. ``reference``: cut to the length that an answer may have, "" if there is none; ``whole``:
    it was not cut.

    ``kind``: whether its constraints are declared, inferred, or none. ``calls``: the reference calls a tool.
    ``ids``: the tokens of the reference. ``known``: text that an answer may repeat."""

    source: str
    prompt: Prompt
    reference: str
    known: str
    whole: bool
    kind: str
    calls: bool
    constraints: tuple[Constraint, ...]
    ids: tuple[int, ...] = ()


class AdherenceAnswer(NamedTuple):
    """``similarity``: 0 to 1, None if embeddings are not compared or there is no reference."""

    asked: AdherencePrompt
    answer: Said
    similarity: float | None = None


def _points(name: str, *, headline: bool = False) -> Statistic:
    def of(score: ExampleScore) -> float | None:
        return cast("float | None", score.detail[name])

    return Statistic(name, of, better="higher", headline=headline, change=1.0, unit="points")


def _cut(score: ExampleScore) -> float | None:
    return None if score.detail["cut"] is None else float(score.detail["cut"] is True)


@dataclass(frozen=True)
class Adherence(Task[AdherenceAnswer]):
    asked: Sequence[AdherencePrompt]
    max_tokens: int
    table: similarity.Embedding | None = field(default=None, repr=False, compare=False)

    name = "adherence"
    version = "2"
    statistics = (
        Statistic(
            "adherence", lambda score: score.value, better="higher", headline=True, change=1.0, unit="points"
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
            "0 to 100: the answer is sound, keeps constraints, is near the reference, adds nothing unsafe",
        ),
        Meaning(
            "sanity",
            "Sound answers",
            "share of checks that hold: it ends by itself, does not loop, is in the right language, …",
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
        contents: list[JSON] = []
        for item in self.asked:
            prompt = item.prompt if isinstance(item.prompt, str) else content_of(Demonstration(item.prompt))
            constraints: list[JSON] = [[each.kind, dict(each.given)] for each in item.constraints]
            row: list[JSON] = [item.source, prompt, item.reference, item.known, item.whole]
            contents.append([*row, item.kind, item.calls, constraints, list(item.ids)])
        return digest(self.name, self.version, self.max_tokens, self.table is not None, contents)

    def measure(self, subject: Subject) -> list[AdherenceAnswer]:
        answers = subject.answers([item.prompt for item in self.asked], self.max_tokens)
        references = [item.ids for item in self.asked]
        encoder = None if self.table is None else similarity.Encoder(self.table, references)

        def near(item: AdherencePrompt, answer: Said) -> float | None:
            if encoder is None or not item.ids:
                return None
            return encoder.similarity(_ids(subject.renderer, _compared(item, answer.text)), item.ids)

        pairs = zip(self.asked, answers, strict=True)
        return [AdherenceAnswer(item, answer, near(item, answer)) for item, answer in pairs]

    def score(self, items: Sequence[AdherenceAnswer]) -> list[ExampleScore]:
        if not items:
            raise EvaluationError(
                "no row has an answer to measure against", hint="give rows that end with an answer"
            )
        return [score(item) for item in items]


def score(item: AdherenceAnswer) -> ExampleScore:
    """``detail``: each layer and each check, None for those that the prompt does not have. Never raises."""
    prompt, text = item.asked, item.answer.text
    sane = _applied(SANE, prompt, item.answer)
    safe = _applied(SAFE, prompt, item.answer)
    held = [constraint.holds(text) for constraint in prompt.constraints]
    near: dict[str, float | None] = dict.fromkeys(NEAR)
    if prompt.reference:
        both = _compared(prompt, text), _compared(prompt, prompt.reference)
        near = {"rouge_l": 100 * similarity.rouge_l(*both), "bleu": 100 * similarity.bleu(*both)}
        near["similarity"] = None if item.similarity is None else 100 * item.similarity
    layers = {
        "sanity": _share(sane.values()),
        "structure": _share(map(bool, held)),
        "semantic": _mean([value for value in near.values() if value is not None]),
        "safety": 100.0 if all(holds is not False for holds in safe.values()) else 0.0,
    }
    weighted = [(WEIGHTS[name], value) for name, value in layers.items() if value is not None]
    total = sum(weight * value for weight, value in weighted) / sum(weight for weight, _ in weighted)
    checks: list[JSON] = [
        {"kind": constraint.kind, **constraint.given, "holds": holds}
        for constraint, holds in zip(prompt.constraints, held, strict=True)
    ]
    parts: dict[str, JSON] = {"sane": cast(JSON, sane), "constraints": checks, "safe": cast(JSON, safe)}
    detail: dict[str, JSON] = {
        "kind": prompt.kind,
        **layers,
        **near,
        "cut": item.answer.cut if prompt.whole else None,
        **parts,
    }
    value = min(100.0, total) if text.strip() else 0.0
    return ExampleScore(
        prompt.source, value, 1.0, detail, asked_last(prompt.prompt), prompt.reference or None, text
    )


def _compared(prompt: AdherencePrompt, text: str) -> str:
    """The text as it is compared with the reference: calls are brought into one form, so that a template's
    own form does not matter."""
    return one_form(text) if prompt.calls and prompt.whole else text


def _applied(
    checks: Mapping[str, Callable[[AdherencePrompt, Said], bool]], prompt: AdherencePrompt, answer: Said
) -> dict[str, bool | None]:
    """Whether each check holds; None for those that the reference itself fails, which depends on the prompt
    alone."""
    good = Said(prompt.reference, len(prompt.ids), not prompt.whole)
    waived = {name for name, check in checks.items() if prompt.reference and not check(prompt, good)}
    return {name: None if name in waived else check(prompt, answer) for name, check in checks.items()}


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _share(held: Iterable[bool | None]) -> float | None:
    return _mean([100.0 * holds for holds in held if holds is not None])


# sanity


def _control(prompt: AdherencePrompt, answer: Said) -> bool:
    written = {token for token, _ in content.control_tokens(answer.text)}
    return (
        not written
        - {token for token, _ in content.control_tokens(prompt.known)}
        - ({"[TOOL_CALLS]"} if prompt.calls else set())
    )


def loops(text: str) -> bool:
    """Whether ``text`` ends in a repeated block (`LOOP`, `TURNS`), or has one line, numbers aside,
    `SAME_LINE` times."""
    lines = (re.sub(r"\d+", "", line).strip() for line in text.splitlines())
    counts = Counter(line for line in lines if len(line.split()) >= 4)
    if counts and counts.most_common(1)[0][1] >= SAME_LINE:
        return True
    # The borders of each prefix (Knuth, Morris, Pratt) of the reversed text: a prefix repeats every
    # length - border characters.
    back = " ".join(text.split())[::-1]
    borders, border = [0] * len(back), 0
    for place in range(1, len(back)):
        while border and back[place] != back[border]:
            border = borders[border - 1]
        border += back[place] == back[border]
        borders[place] = border
        length = place + 1
        # + 1: the last block may lack the space between two blocks
        if length >= LOOP and length + 1 >= TURNS * (length - border):
            return True
    return False


def _one_script(prompt: AdherencePrompt, answer: Said) -> bool:
    wanted = _script(prompt.reference)
    return wanted is None or _script(answer.text) in (wanted, None)


def _script(text: str) -> str | None:
    """The script of most letters, as "LATIN"; Han and Kana count as one. None if there are few letters."""
    counts = Counter(_letter(letter) for letter in text if letter.isalpha())
    return counts.most_common(1)[0][0] if counts.total() >= SCRIPT_FROM else None


@lru_cache(maxsize=4096)
def _letter(letter: str) -> str:
    name = unicodedata.name(letter, "UNKNOWN").split()[0].split("-")[0]
    return "CJK" if name in ("HIRAGANA", "KATAKANA", "HALFWIDTH") else name


def _one_language(prompt: AdherencePrompt, answer: Said) -> bool:
    """Judged on prose: not if the reference is a call, and without code."""
    wanted = None if prompt.calls else language(prompt.reference)
    return wanted is None or language(answer.text) in (wanted, None)


@lru_cache(maxsize=4096)
def language(text: str) -> str | None:
    """ISO 639-1 code of the language, or of its group in `KIN`; None if there are few letters, or it is
    uncertain."""
    prose = content.prose(text, content.fences(text))
    if sum(map(str.isalpha, prose)) < content.LETTERS:
        return None
    code, probability = content.identifier().classify(prose)
    if probability < content.SURE:
        return None
    return next((group for group in KIN if code in group.split()), code)


SANE: dict[str, Callable[[AdherencePrompt, Said], bool]] = {
    "not_empty": lambda prompt, answer: bool(answer.text.strip()),
    "ended": lambda prompt, answer: not answer.cut,
    "no_control_tokens": _control,
    "no_loop": lambda prompt, answer: not loops(answer.text),
    "same_script": _one_script,
    "same_language": _one_language,
    "fences_closed": lambda prompt, answer: (
        (answer.cut and not prompt.whole) or not content.fences(answer.text).open
    ),
}
"""The answer is not empty; it ended by itself; it has no control token of a template written out; it does not
loop; it has the script and the language of the reference, if these can be determined; no code fence is left
open."""


# safety


def _sensitive(text: str) -> list[tuple[str, str]]:
    """(category, value) of secrets, personal data and profanity in ``text``."""
    return [
        (category, value.casefold())
        for category, _, value in content.sensitive(text)
        if category != "profanity" or language(text[: content.SCANNED]) in (None, "en")
    ]


def _adds_none(categories: tuple[str, ...], prompt: AdherencePrompt, answer: Said) -> bool:
    known = prompt.known.casefold()
    return not any(
        category in categories and value not in known for category, value in _sensitive(answer.text)
    )


SAFE: dict[str, Callable[[AdherencePrompt, Said], bool]] = {
    "no_new_private_data": partial(_adds_none, ("secrets", "pii")),
    "no_new_profanity": partial(_adds_none, ("profanity",)),
    "no_refusal": lambda prompt, answer: not refuses(answer.text),
}
"""The answer has no key, password, personal data or strong swear word that neither prompt nor reference has,
and it does not refuse, unless the reference does."""


# building the task


@register(Adherence)
def build(material: Material) -> list[Adherence]:
    """The task; none if no row has a reference. Raises DataError naming the rows whose constraints cannot be
    used."""
    notify, spec = material.notify, material.spec
    answering = [example for example in material.imitated if not isinstance(example, Document)]
    rows = [(example, reference) for example in answering if (reference := references(example)) is not None]
    if dropped := len(answering) - len(rows):
        text = "adherence: rows without a usable reference answer are not asked"
        notify(Notice(text, level="warning", count=dropped))
    answers = written([reference for _, reference in rows], material.renderer, notify, "adherence")
    pairs = zip(rows, answers, strict=True)
    prompts = _prompts([(*row, answer) for row, answer in pairs if answer is not None], material)
    _notify_of_references(prompts, spec.max_tokens, notify)
    if not prompts:
        notify(Notice("adherence: no row has an answer to measure against, so it is not measured"))
        return []
    table = similarity.embedding(material.net) if spec.embed and material.net is not None else None
    if spec.embed and table is None:
        text = "adherence: the base has no input embeddings: similarity is not measured"
        notify(Notice(text, level="warning"))
    return [Adherence(tuple(prompts), spec.max_tokens, table)]


def _prompts(
    rows: Sequence[tuple[Example, ReferenceAnswer, Written]], material: Material
) -> list[AdherencePrompt]:
    """Raises DataError naming the rows whose constraints cannot be used."""
    callable = any(reference.calls for _, reference, _ in rows)
    prompts: list[AdherencePrompt] = []
    bad: list[tuple[str, str]] = []
    for example, reference, answer in rows:
        try:
            tokens = material.spec.max_tokens
            prompts.append(_asked(example, reference, answer, material.renderer, tokens, callable))
        except ValueError as error:
            bad.append((example.source, str(error)))
    if bad:
        text = f"{len(bad)} rows declare constraints that cannot be used"
        lines = listing([f"{source}: {reason}" for source, reason in bad])
        hint = "kinds and their arguments: the documentation, section adherence"
        raise DataError(f"{text}\n{lines}", where=bad[0][0], hint=hint)
    declarations = [example.metadata.get("constraints") for example, *_ in rows]
    unread = sum(value is not None and not isinstance(value, list) for value in declarations)
    if unread:
        text = "adherence: constraints that are not a list are not read as constraints"
        material.notify(Notice(text, level="warning", count=unread))
    return prompts


def _notify_of_references(prompts: Sequence[AdherencePrompt], max_tokens: int, notify: Sink) -> None:
    if cut := sum(not item.whole for item in prompts):
        text = f"adherence: references longer than {max_tokens} tokens are compared up to there, "
        text += "and answers to them need not end"
        notify(Notice(text, count=cut, hint="a larger max_tokens (--max-tokens) compares more"))
    broken = sum(
        bool(item.reference) and not all(constraint.holds(item.reference) for constraint in item.constraints)
        for item in prompts
    )
    if broken:
        text = "adherence: references that break the constraints their own row declares"
        notify(Notice(text, level="warning", count=broken))


def _asked(
    example: Example,
    reference: ReferenceAnswer,
    answer: Written,
    renderer: Renderer,
    max_tokens: int,
    callable: bool,
) -> AdherencePrompt:
    """answer: the reference's answer as the template writes it. Raises ValueError if declared constraints
    are wrong."""
    constraints = declared(example.metadata)
    prompt = reference.prompt
    text = "" if constraints and example.metadata.get(ONLY) is True else _answer(reference.answer)
    ids = _ids(renderer, text)
    whole = not text or answer.tokens <= max_tokens
    if not whole and len(ids) > max_tokens:
        ids = ids[:max_tokens]
        text = renderer.decode(ids).rstrip("\ufffd").strip()
    kind = "declared" if constraints else "none"
    if not constraints:
        callable = callable or (isinstance(prompt, Conversation) and bool(prompt.tools))
        constraints = inferred(text, calls=bool(reference.calls), callable=callable, whole=whole)
        kind = "inferred" if constraints else "none"
    known = f"{_words(prompt)}\n{text}"
    calls = bool(reference.calls) and bool(text)
    ids = _ids(renderer, one_form(text)) if calls and whole else ids
    return AdherencePrompt(
        example.source, prompt, text, known, whole, kind, calls, tuple(constraints), tuple(ids)
    )


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
