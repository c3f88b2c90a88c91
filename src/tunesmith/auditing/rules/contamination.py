"""Training rows that repeat what they will be measured on: held-out rows, evaluation sets, fixed prompts.

exact: the same prompt, apart from case and spacing. near: by edit distance (`near`). passages: thirteen words
in a row of an evaluation set anywhere in the row, as GPT-3's authors looked for it (arXiv 2005.14165,
appendix C). A model that has seen the question is tested on its memory."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import ClassVar, NamedTuple

from tunesmith.auditing import near
from tunesmith.auditing.findings import Finding, FindingRow, Severity, counted
from tunesmith.auditing.registry import Rule, register
from tunesmith.auditing.views import WORD, Context, Survey, View, normal, spaced
from tunesmith.checks.content import masked
from tunesmith.data import formats, sources
from tunesmith.data.examples import Example
from tunesmith.display.text import excerpt
from tunesmith.errors import DataError

PASSAGE = 13  # words
SHORTEST = 5  # words of a prompt that is compared for nearness: shorter ones are near to much
PROMPTS = (
    "prompt",
    "question",
    "instruction",
    "goal",
    "problem",
    "ctx",
    "sentence",
    "query",
    "input",
    "text",
)
"""Keys of the prompt in an evaluation set, tried in this order; otherwise the longest text is the prompt."""


class EvaluationPrompt(NamedTuple):
    source: str
    prompt: str
    whole: str


class Overlap(NamedTuple):
    """``set``: index into `Context.against`. ``item``: index of the prompt in it."""

    kind: str  # exact | near | passages
    set: int
    item: int
    similarity: float


class PromptIndex:
    """Prompts that no training row may repeat. ``held_out``: they are validation rows, of which only prompts
    are compared.

    unreadable: rows of the file that hold no prompt.
    """

    def __init__(self, items: Iterable[EvaluationPrompt], *, held_out: bool) -> None:
        every = list(items)
        self.items = [item for item in every if item.prompt.strip()]
        self.unreadable = len(every) - len(self.items)
        self.held_out = held_out
        self.keys: dict[str, int] = {}
        self.passages: dict[int, int] = {}
        self.bands: list[dict[int, list[int]]] = [{} for _ in range(near.PERMUTATIONS // near.BAND)]
        self.heads = near.Heads(normal(item.prompt) for item in self.items)
        self.prompts = [self.heads.without(normal(item.prompt)) for item in self.items]
        self._seen: dict[str, tuple[str, int, float] | None] = {}
        for place, (item, prompt) in enumerate(zip(self.items, self.prompts, strict=True)):
            self.keys.setdefault(spaced(item.prompt), place)
            for band, key in zip(self.bands, _bands(prompt), strict=False):
                bucket = band.setdefault(key, [])
                if len(bucket) < near.BUCKET:  # so many alike are enough to be compared with
                    bucket.append(place)
            for gram in () if held_out else _passages(item.whole):
                self.passages.setdefault(gram, place)

    def hit(self, prompts: Sequence[str], whole: str, least: float) -> tuple[str, int, float] | None:
        """The most severe overlap: kind, item, similarity."""
        for prompt in prompts:
            if (place := self.keys.get(spaced(prompt))) is not None:
                return "exact", place, 1.0
        for prompt in prompts:
            if (match := self._near(prompt, least)) is not None:
                return match
        place = (
            next((self.passages[gram] for gram in _passages(whole) if gram in self.passages), None)
            if self.passages
            else None
        )
        return None if place is None else ("passages", place, 0.0)

    def _near(self, prompt: str, least: float) -> tuple[str, int, float] | None:
        if prompt not in self._seen:
            if len(self._seen) >= near.BUCKET * 100:
                self._seen.clear()
            self._seen[prompt] = self._compared(self.heads.without(normal(prompt)), least)
        return self._seen[prompt]

    def _compared(self, prompt: str, least: float) -> tuple[str, int, float] | None:
        chosen = {
            place
            for band, key in zip(self.bands, _bands(prompt), strict=False)
            for place in band.get(key, ())
        }
        for place in sorted(chosen):
            if (similarity := near.similarity(self.prompts[place], prompt, least)) >= least:
                return "near", place, similarity
        return None


def _bands(prompt: str) -> list[int]:
    """Empty if the prompt is too short to be near to anything."""
    return near.bands([near.signature(prompt)])[0].tolist() if len(prompt.split(" ")) >= SHORTEST else []


def _passages(text: str) -> Iterator[int]:
    """The hash of each thirteen consecutive words; salted, so valid within a process only."""
    words = WORD.findall(text.lower())
    return (hash(tuple(words[start : start + PASSAGE])) for start in range(len(words) - PASSAGE + 1))


def held_out(examples: Iterable[Example]) -> PromptIndex:
    """From validation rows."""
    views = (View(example.source, example) for example in examples)
    return PromptIndex((EvaluationPrompt(view.source, _asked(view), "") for view in views), held_out=True)


def _asked(view: View) -> str:
    """The prompt as in `examples.prompt_key`: of text without a prompt the text."""
    return view.asked if view.asked.strip() else view.said


def load(path: str, spec: formats.DataSpec) -> PromptIndex:
    """The index of an evaluation set or a list of prompts. Raises DataError if it cannot be read or holds no
    prompt."""
    file = Path(path).expanduser()
    if not file.exists():
        raise DataError(
            "no such file or folder", where=path, hint="audit.against names evaluation sets and prompts"
        )
    try:
        index = PromptIndex(
            _csv(file)
            if file.suffix.lower() == ".csv"
            else _lines(file)
            if file.suffix.lower() == ".txt"
            else _rows(file, spec),
            held_out=False,
        )
    except (UnicodeDecodeError, csv.Error) as error:
        raise DataError(f"cannot be read: {error}", where=path, hint="UTF-8 text is expected") from error
    if not index.items:
        raise DataError(
            "holds no prompt to compare with",
            where=path,
            hint=f"a key such as {', '.join(PROMPTS[:3])}, or rows of text",
        )
    return index


def _lines(path: Path) -> Iterator[EvaluationPrompt]:
    with path.open(encoding="utf-8") as lines:
        yield from (
            EvaluationPrompt(f"{path}:{number}", line.strip(), line)
            for number, line in enumerate(lines, 1)
            if line.strip()
        )


def _csv(path: Path) -> Iterator[EvaluationPrompt]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.DictReader(lines)
        for row in reader:
            texts = {key: text for key, text in row.items() if isinstance(key, str) and isinstance(text, str)}
            yield EvaluationPrompt(f"{path}:{reader.line_num}", _prompt(texts), "\n".join(texts.values()))


def _rows(path: Path, spec: formats.DataSpec) -> Iterator[EvaluationPrompt]:
    """Rows in a layout of `data.layouts` as training reads them; of other rows what stands under a key of
    `PROMPTS`."""
    for file in sources.files([path]):
        for raw in sources.raws(file):
            row = formats.row(raw, spec)
            if not isinstance(row, formats.Dropped):
                view = View(raw.source, row)
                yield EvaluationPrompt(raw.source, _asked(view), view.whole)
                continue
            try:
                value = sources.value(raw.text)
                texts = {"text": value} if isinstance(value, str) else dict(_texts(value, ""))
            except RecursionError:
                texts = {}
            yield EvaluationPrompt(raw.source, _prompt(texts), "\n".join(texts.values()))


def _texts(value: object, key: str) -> Iterator[tuple[str, str]]:
    """Every text in a value, with its path of keys."""
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict | list):
        inside = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in inside:
            yield from _texts(item, f"{key}.{name}".lstrip("."))


def _prompt(texts: dict[str, str]) -> str:
    named = {key.lower(): text for key, text in texts.items()}
    return next(
        (named[key] for key in PROMPTS if named.get(key, "").strip()),
        max(texts.values(), key=len, default=""),
    )


@register
class Contamination(Rule):
    name = "contamination"
    order = 70
    looks_at = "rows that repeat what the model will be measured on"
    findings: ClassVar = {
        "validation_exact": "asks what a held-out row asks",
        "validation_near": "asks nearly what a held-out row asks",
        "evaluation_exact": "asks what an evaluation set asks",
        "evaluation_near": "asks nearly what an evaluation set asks",
        "evaluation_passages": "thirteen words in a row of an evaluation set",
        "unreadable": "rows of the evaluation sets without a prompt",
        "unchecked": "there is nothing to compare with",
    }
    gravest: ClassVar = {
        "validation_exact": "error",
        "evaluation_exact": "error",
        "unreadable": "note",
        "unchecked": "note",
    }
    bar = "none exact, else an error"

    def look(self, view: View, context: Context) -> list[Overlap] | None:
        if not context.against or view.example is None:
            return None
        prompts = list(
            dict.fromkeys([*(part.text for part in view.parts if part.role == "user"), _asked(view)])
        )
        overlaps: list[Overlap] = []
        for place, against in enumerate(context.against):
            compared = [_asked(view)] if against.held_out else prompts
            if (hit := against.hit(compared, view.whole, context.spec.similarity)) is not None:
                overlaps.append(Overlap(hit[0], place, hit[1], hit[2]))
        return overlaps or None

    def judge(self, facts: list[list[Overlap] | None], survey: Survey) -> Iterator[Finding]:
        assert survey.context is not None
        against: Sequence[PromptIndex] = survey.context.against or ()
        if not against and survey.training:
            sentence = "nothing to compare with: neither held-out rows nor evaluation sets"
            yield Finding("contamination.unchecked", "note", sentence, hint="--against FILE names one")
        for held_out, name, words in (
            (True, "validation", "held-out rows"),
            (False, "evaluation", "evaluation sets or fixed prompts"),
        ):
            if not any(index.held_out == held_out for index in against):
                continue
            for kind in ("exact", "near") if held_out else ("exact", "near", "passages"):
                named: list[FindingRow] = []
                telling = False  # whether any of the prompts is more than a greeting
                for row in survey.training:
                    hits = [
                        hit
                        for hit in facts[row] or ()
                        if hit.kind == kind and against[hit.set].held_out == held_out
                    ]
                    if hits:
                        item = against[hits[0].set].items[hits[0].item]
                        named.append(FindingRow(survey.sources[row], _note(hits[0], item)))
                        telling |= len(item.prompt.split()) >= SHORTEST or not held_out
                severity: Severity = (
                    "good" if not named else "error" if kind == "exact" and telling else "warning"
                )
                yield _finding(
                    f"contamination.{name}_{kind}", severity, kind, named, len(survey.training), words
                )
        if bad := sum(index.unreadable for index in against if not index.held_out):
            sentence = f"{counted(bad)} of the evaluation sets without a prompt to compare with"
            yield Finding(
                "contamination.unreadable",
                "note",
                sentence,
                bad,
                hint=f"a key such as {', '.join(PROMPTS[:3])} is looked for",
            )


def _note(hit: Overlap, item: EvaluationPrompt) -> str:
    how = {"exact": "as", "near": f"{hit.similarity:.1%} as", "passages": "a passage of"}[hit.kind]
    return f"{how} {item.source}: {excerpt(masked(excerpt(item.prompt)), 80)}"


def _finding(
    rule: str, severity: Severity, kind: str, rows: list[FindingRow], of: int, words: str
) -> Finding:
    how = {
        "exact": "asking what is asked in",
        "near": "asking nearly what is asked in",
        "passages": f"holding {PASSAGE} words in a row of",
    }[kind]
    many = counted(len(rows), of) if rows else "no rows"
    bar = "0" if kind == "exact" else None
    hint = "remove them from the training rows, or the evaluation measures memory" if rows else ""
    return Finding(
        rule, severity, f"{many} {how} {words}", len(rows), of, threshold=bar, rows=tuple(rows), hint=hint
    )
