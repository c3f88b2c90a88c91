"""Constraints on the form of an answer that a program can check: declared for a prompt, or inferred from its
reference.

A row declares ``constraints``, a list of objects such as ``{"kind": "bullets", "exactly": 3}``, or IFEval's
own ``instruction_id_list`` and ``kwargs`` (Zhou et al. 2023, arXiv 2311.07911): the 25 instructions are kinds
too, under their ids and with their arguments. What IFEval's code would draw at random must be given here.
Two differences from there (smaller ones are counted in the documentation): a sentence ends at . ! ? … 。！？
before a space or the end, but not after an abbreviation such as ``Mr.`` (there: NLTK's trained Punkt), and
py3langid detects languages (there: langdetect). What words mean is not looked at."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal, cast

import regex
from pydantic import Field, ValidationError, validate_call

from tunesmith.checks import schemas
from tunesmith.checks.content import fences, identifier
from tunesmith.checks.parsers import STRICT, parse
from tunesmith.settings.config import JSON

Check = Callable[[str], bool]
Relation = Literal["less than", "at least"]
Count = Annotated[int, Field(ge=0)]
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], Field(min_length=1)]
Type = Literal["object", "array", "string", "number", "boolean", "null", "any"]

LENGTHS = (0.5, 2.0)
"""Least and most words of an answer, as multiples of the words of its reference."""
LENGTHS_FROM = 20
"""References with fewer words say nothing about the length of an answer."""
ITEMS = 2
"""Bullets or numbers that make a list; if the reference has that many, an answer must too."""
PATIENCE = 1.0
"""Seconds that a declared pattern may take for a text: some would take years."""
KINDS: dict[str, Callable[..., Check]] = {}


@dataclass(frozen=True)
class Constraint:
    """``given``: its arguments, as written."""

    kind: str
    given: Mapping[str, JSON]
    check: Check

    def holds(self, text: str) -> bool | None:
        """Whether ``text`` keeps the constraint, or None if that took longer than `PATIENCE`. An empty text
        keeps none, as in IFEval. Never raises."""
        try:
            return bool(text.strip()) and self.check(text)
        except TimeoutError:
            return None
        except RecursionError:  # JSON nested without end
            return False


def constraint(kind: str, given: Mapping[str, JSON]) -> Constraint:
    """Raises ValueError if the kind or an argument is wrong."""
    if kind not in KINDS:
        raise ValueError(f"no kind of constraint is called {kind!r}{_meant(kind, KINDS)}")
    try:
        return Constraint(kind, given, KINDS[kind](**given))
    except ValidationError as error:
        problems = (
            f"{'.'.join(map(str, problem['loc']))}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
            for problem in error.errors()
        )
        raise ValueError(f"{kind}: {'; '.join(problems)}") from None
    except regex.error as error:
        raise ValueError(
            f"{kind}: {cast(Any, error).pattern!r} is not a regular expression: {error}"
        ) from None
    except ValueError as error:
        raise ValueError(f"{kind}: {error}") from None


def declared(metadata: Mapping[str, JSON]) -> list[Constraint]:
    """The constraints that a row's metadata declares. Raises ValueError if one is wrong."""
    constraints: list[Constraint] = []
    listed, ids, arguments = (metadata.get(key) for key in ("constraints", "instruction_id_list", "kwargs"))
    for item in listed if isinstance(listed, list) else ():
        if not isinstance(item, dict) or not isinstance(item.get("kind"), str):
            raise ValueError(f"a constraint is an object with a kind, not {json.dumps(item)[:80]}")
        constraints.append(
            constraint(str(item["kind"]), {key: value for key, value in item.items() if key != "kind"})
        )
    if isinstance(ids, list):
        if not isinstance(arguments, list) or len(arguments) != len(ids):
            raise ValueError(
                "instruction_id_list needs kwargs, a list with one object for each of its instructions"
            )
        for name, given in zip(ids, arguments, strict=True):
            given = given if isinstance(given, dict) else {}
            constraints.append(
                constraint(str(name), {key: value for key, value in given.items() if value is not None})
            )
    return constraints


def inferred(reference: str, *, calls: bool, callable: bool, whole: bool) -> list[Constraint]:
    """The form of a good answer as ``reference`` shows it; the reference keeps all of these constraints.

    calls: the reference calls a tool, and nothing else is required. callable: tools could have been called
    and were not, so a call is wrong. whole: the reference is not cut, so that its length, and JSON, can be
    checked."""
    kinds: list[tuple[str, Mapping[str, JSON]]] = [("no_call", {})] if callable and not calls else []
    value = _value(reference) if whole else None
    if calls:
        kinds.append(("call", {} if whole else {"cut": True}))
    elif isinstance(value, dict | list):
        given: dict[str, JSON] = {"type": _type(value), "fence": reference.lstrip().startswith("```")}
        if isinstance(value, dict):
            given |= {
                "keys": {
                    key: "any" if value_of is None else _type(value_of) for key, value_of in value.items()
                },
                "only": True,
            }
        kinds.append(("json", given))
    else:
        least = {"bullets": ITEMS, "numbered": ITEMS, "sections": 1, "tables": 1, "fences": 1}
        kinds += [
            (kind, {"at_least": least_count})
            for kind, least_count in least.items()
            if _COUNTED[kind](reference) >= least_count
        ]
        words = _COUNTED["words"](reference)
        if words >= LENGTHS_FROM:
            low, high = (round(words * times) for times in LENGTHS)
            kinds.append(("words", {"at_least": low, "at_most": high} if whole else {"at_least": low}))
    constraints = [constraint(kind, given) for kind, given in kinds]
    return [value_of for value_of in constraints if value_of.holds(reference)]


def _meant(name: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def _kind(name: str) -> Callable[[Callable[..., Check]], Callable[..., Check]]:
    def keep(make: Callable[..., Check]) -> Callable[..., Check]:
        KINDS[name] = validate_call(make)
        return make

    return keep


# counted parts of a text

_END = re.compile(r"(?:[.!?…]+[\"'”’»)\]*_]*(?=\s|$)|[。！？]+[”’」』）]*)")
_SHORT = re.compile(
    r"(?:^|[\s(\"'“])(?:Mr|Mrs|Ms|Dr|Prof|St|Sr|Jr|Inc|Ltd|Co|Corp|vs|etc|e\.g|i\.e|cf|No|Fig|approx"
    r"|[A-Z])\.$"
)
_CELL = re.compile(r"\s*:?-+:?\s*")


def sentences(text: str) -> int:
    count = start = 0
    for end in _END.finditer(text):
        rest = text[end.end() :].lstrip()
        follows = end[0].startswith(("...", "…")) and rest[:1].islower()
        if (rest and _SHORT.search(text[start : end.end()])) or follows:
            continue
        count, start = count + bool(text[start : end.end()].strip()), end.end()
    return count + bool(text[start:].strip())


def _tables(text: str) -> int:
    """Lines of dashes in cells, each below a line with a pipe."""
    count, head = 0, False
    for line in text.split("\n"):
        row = line.strip()
        cells = row.removeprefix("|").removesuffix("|").split("|")
        below = head and (row.startswith("|") or len(cells) > 1) and all(map(_CELL.fullmatch, cells))
        count, head = count + below, "|" in row and not below
    return count


def _lines(pattern: str) -> Callable[[str], int]:
    line = re.compile(pattern, re.MULTILINE)
    return lambda text: sum(1 for _ in line.finditer(text))


_COUNTED: dict[str, Callable[[str], int]] = {
    "bullets": _lines(r"^[ \t]*[-*+•][ \t]+\S"),
    "numbered": _lines(r"^[ \t]*\d{1,4}[.)][ \t]+\S"),
    "sections": _lines(r"^#{1,6}[ \t]+\S"),
    "tables": _tables,
    "fences": lambda text: len(fences(text).spans) - fences(text).open,
    "words": _lines(r"\w+"),
    "sentences": sentences,
    "paragraphs": lambda text: sum(1 for part in re.split(r"\n[ \t]*\n", text) if part.strip()),
    "characters": lambda text: len(text.strip()),
}
"""Bullets, numbered items, markdown headings, tables, closed code fences; words are runs of letters and
digits."""


def _counted(count: Callable[[str], int]) -> Callable[..., Check]:
    def make(
        exactly: Count | None = None, at_least: Count | None = None, at_most: Count | None = None
    ) -> Check:
        if exactly is at_least is at_most is None:
            raise ValueError("give exactly, at_least or at_most")
        low, high = (bound if exactly is None else exactly for bound in (at_least, at_most))
        if low is not None and high is not None and low > high:
            raise ValueError(f"at_least {low} is more than at_most {high}")
        return lambda text: (low or 0) <= count(text) <= (math.inf if high is None else high)

    return make


for _name, _count in _COUNTED.items():
    _kind(_name)(_counted(_count))


# values and patterns


def _unfenced(text: str) -> str:
    """``text`` without a code fence around the whole, as IFEval reads it."""
    return re.sub(r"^```(?:json|Json|JSON)?|```$", "", text.strip()).strip()


_NO_VALUE: Any = object()


def _value(text: str, fence: bool = True) -> JSON:
    """The JSON value of the whole text; `_NO_VALUE` if it is not JSON."""
    try:
        return STRICT.decode(_unfenced(text) if fence else text)
    except (ValueError, RecursionError):
        return _NO_VALUE


def _type(value: JSON) -> str:
    names = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return names.get(type(value), "null")


@_kind("json")
def _json(
    type: Type = "any", keys: Mapping[str, Type] | None = None, only: bool = False, fence: bool = True
) -> Check:
    """keys: of the object, with the type of each. only: no others. fence: the text may stand in a code
    fence."""
    kinds = dict(keys or {})

    def check(text: str) -> bool:
        value = _value(text, fence)
        if value is _NO_VALUE or (type != "any" and _type(value) != type):
            return False
        if keys is None:
            return True
        if not isinstance(value, dict) or not (
            value.keys() == kinds.keys() if only else value.keys() >= kinds.keys()
        ):
            return False
        return all(kind == "any" or _type(value[key]) == kind for key, kind in kinds.items())

    return check


@_kind("json_schema")
def _json_schema(schema: dict[str, Any], fence: bool = True) -> Check:
    check = schemas.checked(schema)
    return lambda text: (value := _value(text, fence)) is not _NO_VALUE and schemas.takes(check, value)


def _pattern(declared: str, flags: int = regex.IGNORECASE) -> Callable[[str], Iterator[object]]:
    """A function that searches a declared pattern in a text; it raises TimeoutError after `PATIENCE`."""
    expression = regex.compile(declared, flags)
    return lambda text: expression.finditer(text, timeout=PATIENCE)


@_kind("regex")
def _regex(pattern: Text, whole: bool = False, ignore_case: bool = False) -> Check:
    """The pattern matches anywhere, or, with ``whole``, the whole stripped answer. ^ and $ match at lines."""
    expression = regex.compile(pattern, regex.MULTILINE | (regex.IGNORECASE if ignore_case else 0))
    return lambda text: bool(
        (expression.fullmatch if whole else expression.search)(
            text.strip() if whole else text, timeout=PATIENCE
        )
    )


@_kind("headings")
def _headings(titles: Texts) -> Check:
    """Markdown headings, in this order; others may stand between."""
    wanted = [title.strip().casefold() for title in titles]

    def check(text: str) -> bool:
        there = iter(
            [
                line.strip("# \t").casefold()
                for line in re.findall(r"^#{1,6}[ \t]+\S[^\n]*", text, re.MULTILINE)
            ]
        )
        return all(title in there for title in wanted)

    return check


@_kind("call")
def _call(cut: bool = False) -> Check:
    """At least one call, and none that a program could not run. cut: the last of several may be broken."""

    def check(text: str) -> bool:
        calls = parse(text)
        return bool(calls) and not any(call.problem for call in calls[: max(1, len(calls) - cut)])

    return check


@_kind("no_call")
def _no_call() -> Check:
    return lambda text: not parse(text)


# the instructions of IFEval, with its arguments


def _within(count: Callable[[str], int], relation: Relation, bound: int) -> Check:
    return lambda text: (count(text) < bound) if relation == "less than" else (count(text) >= bound)


@_kind("keywords:existence")
def _existence(keywords: Texts) -> Check:
    wanted = [_pattern(word) for word in keywords]
    return lambda text: all(any(word(text)) for word in wanted)


@_kind("keywords:frequency")
def _frequency(keyword: Text, frequency: Count, relation: Relation) -> Check:
    word = _pattern(keyword.strip())
    return _within(lambda text: sum(1 for _ in word(text)), relation, frequency)


@_kind("keywords:forbidden_words")
def _forbidden(forbidden_words: Texts) -> Check:
    words = [_pattern(rf"\b{word}\b") for word in forbidden_words]
    return lambda text: not any(any(word(text)) for word in words)


@_kind("keywords:letter_frequency")
def _letters(
    letter: Annotated[str, Field(min_length=1, max_length=1)], let_frequency: Count, let_relation: Relation
) -> Check:
    """Any character; if it is not a letter, IFEval's code would count a letter drawn at random."""
    return _within(lambda text: Counter(text.lower())[letter.lower()], let_relation, let_frequency)


@_kind("language:response_language")
def _language(language: Text) -> Check:
    known = set(identifier().nb_classes)
    if language not in known:
        raise ValueError(f"no language is called {language!r}: two letters of ISO 639-1, as en or de")
    return lambda text: speaks(text, language)


def speaks(text: str, language: str) -> bool:
    """By py3langid's first guess; a text without letters is in every language, as in IFEval."""
    return not any(map(str.isalpha, text)) or identifier().classify(text)[0] == language


@_kind("length_constraints:number_sentences")
def _sentences(num_sentences: Count, relation: Relation) -> Check:
    return _within(sentences, relation, num_sentences)


@_kind("length_constraints:number_words")
def _words(num_words: Count, relation: Relation) -> Check:
    return _within(_COUNTED["words"], relation, num_words)


@_kind("length_constraints:number_paragraphs")
def _paragraphs(num_paragraphs: Count) -> Check:
    """Between lines of ***; an empty one may only be the first or the last, and does not count."""

    def check(text: str) -> bool:
        empty = [not part.strip() for part in re.split(r"\s?\*\*\*\s?", text)]
        return not any(empty[1:-1]) and len(empty) - sum(empty) == num_paragraphs

    return check


@_kind("length_constraints:nth_paragraph_first_word")
def _first_word(num_paragraphs: Count, nth_paragraph: Annotated[int, Field(ge=1)], first_word: Text) -> Check:
    if nth_paragraph > num_paragraphs:
        raise ValueError(f"there is no paragraph {nth_paragraph} of {num_paragraphs}")

    def check(text: str) -> bool:
        parts = text.split("\n\n")
        if sum(bool(part.strip()) for part in parts) != num_paragraphs or not (
            words := parts[nth_paragraph - 1].split()
        ):
            return False
        return (
            re.split(r"[.,?!'\"]", words[0].lstrip("'").lstrip('"'), maxsplit=1)[0].lower()
            == first_word.lower()
        )

    return check


@_kind("detectable_content:number_placeholders")
def _placeholders(num_placeholders: Count) -> Check:
    marks = re.compile(r"\[[^\]\n]*(?:\]|$)", re.MULTILINE)  # open ones too, or many of them would take long
    return lambda text: sum(mark.endswith("]") for mark in marks.findall(text)) >= num_placeholders


@_kind("detectable_content:postscript")
def _postscript(postscript_marker: Text) -> Check:
    known = {"P.P.S": r"p\.\s?p\.\s?s", "P.S.": r"p\.\s?s\."}
    marker = _pattern(known.get(postscript_marker.strip(), postscript_marker.strip().lower()), 0)
    return lambda text: any(marker(text.lower()))


@_kind("detectable_format:number_bullet_lists")
def _bullet_lists(num_bullets: Count) -> Check:
    stars, dashes = _lines(r"^\s*\*[^\*].*$"), _lines(r"^\s*-.*$")
    return lambda text: stars(text) + dashes(text) == num_bullets


@_kind("detectable_format:constrained_response")
def _constrained() -> Check:
    return lambda text: any(f"My answer is {answer}." in text for answer in ("yes", "no", "maybe"))


@_kind("detectable_format:number_highlighted_sections")
def _highlighted(num_highlights: Count) -> Check:
    """``*so*`` or ``**so**``, the latter also as two of the former, as IFEval counts."""

    def count(text: str) -> int:
        spans = re.findall(r"\*[^\n\*]*\*", text) + re.findall(r"\*\*[^\n\*]*\*\*", text)
        return sum(bool(span.strip("*").strip()) for span in spans)

    return _within(count, "at least", num_highlights)


@_kind("detectable_format:multiple_sections")
def _multiple_sections(section_spliter: Text, num_sections: Count) -> Check:
    mark = _pattern(rf"\s?{section_spliter.strip()}\s?\d+\s?", 0)
    return _within(lambda text: sum(1 for _ in mark(text)), "at least", num_sections)


@_kind("detectable_format:json_format")
def _json_format() -> Check:
    """As Python reads JSON: NaN is allowed."""

    def check(text: str) -> bool:
        try:
            json.loads(_unfenced(text))
        except ValueError:
            return False
        return True

    return check


@_kind("detectable_format:title")
def _title() -> Check:
    return lambda text: any(
        title.lstrip("<").rstrip(">").strip() for title in re.findall(r"<<[^\n]+>>", text)
    )


@_kind("combination:two_responses")
def _two_responses() -> Check:
    """Two that differ, with ****** between."""

    def check(text: str) -> bool:
        parts = [part.strip() for part in text.split("******")]
        said = [part for part in parts if part]
        return all(parts[1:-1]) and len(said) == 2 and said[0] != said[1]

    return check


@_kind("combination:repeat_prompt")
def _repeat_prompt(prompt_to_repeat: Text) -> Check:
    return lambda text: text.strip().lower().startswith(prompt_to_repeat.strip().lower())


@_kind("startend:end_checker")
def _end(end_phrase: Text) -> Check:
    return lambda text: text.strip().strip('"').lower().endswith(end_phrase.strip().lower())


@_kind("startend:quotation")
def _quotation() -> Check:
    return lambda text: len(text.strip()) > 1 and text.strip()[0] == text.strip()[-1] == '"'


@_kind("change_case:english_capital")
def _capital() -> Check:
    return lambda text: text.isupper() and speaks(text, "en")


@_kind("change_case:english_lowercase")
def _lowercase() -> Check:
    return lambda text: text.islower() and speaks(text, "en")


_CONTRACTED = re.compile(r"(?=(?:'(?:S|M|D|LL|RE|VE)|N'T)\b)", re.IGNORECASE)
_APART = re.compile(r"[\s,;?!()\[\]{}<>\"“”«»…@#$%&*]+|--+|:(?!\d)|\.{2,}")


@_kind("change_case:capital_word_frequency")
def _capital_words(capital_frequency: Count, capital_relation: Relation) -> Check:
    """Words as NLTK splits them: a hyphen joins, a contraction (``DON'T``) is two."""
    return _within(
        lambda text: sum(word.isupper() for word in _APART.split(_CONTRACTED.sub(" ", text))),
        capital_relation,
        capital_frequency,
    )


@_kind("punctuation:no_comma")
def _no_comma() -> Check:
    return lambda text: "," not in text
