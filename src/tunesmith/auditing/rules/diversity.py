"""Whether the rows show more than one thing: how many word trigrams of the answers are distinct, and which
prompts crowd.

Rows that repeat each other as a whole are for `duplicates`, kinds of task for `balance`."""

from __future__ import annotations

import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, NamedTuple

import numpy as np

from tunesmith.auditing import clusters, prompt_map
from tunesmith.auditing.findings import Finding, FindingRow, counted
from tunesmith.auditing.registry import Rule, Section, register
from tunesmith.auditing.views import WORD, Context, Survey, View

TOLD = 20
"""Rows that a finding about the whole set names."""
THINK = re.compile("</?think>")
FREQUENT = 12  # trigrams that are looked up, of which three are quoted
COUNTED = 8_000_000
"""Trigrams that are sorted at most: half a gigabyte."""
PRIOR = 20
"""Trigrams of average novelty that are added to each row when rows are ranked, because few trigrams prove
little."""
TIMES, SHARE = 3, 0.1
"""A cluster is over-represented above so many times its even share and above this share of the rows."""


class RowTrigrams(NamedTuple):
    """``many``: trigrams of the answers, of which ``trigrams`` are looked at. ``subject``:
    `clusters.subject`, of drawn rows."""

    many: int
    trigrams: np.ndarray
    subject: str | None


@register
class Diversity(Rule):
    """trigrams: distinct word trigrams of the answers ÷ all of them, over all rows; 1 if none occurs twice.

    If rows are drawn (`Context.share` below 1), distinct trigrams are counted in the same share of all
    possible trigrams, chosen by their hash and looked for in every row, and scaled up; their total is always
    counted in full. Half a million distinct ones are then known to within 0.5% at a share of 0.1. Trigrams
    are compared by 32 bits: 10 million of them lose about 0.1% to collisions."""

    name = "diversity"
    order = 20
    looks_at = "whether the rows show more than one thing"
    findings: ClassVar = {
        "trigrams": "distinct word trigrams of the answers among all of them",
        "clusters": "clusters of prompts that hold more than their share of the rows",
    }
    bar = "above 70 % (`audit.min_trigrams`)"
    chart = "map"

    def look(self, view: View, context: Context) -> RowTrigrams | None:
        if view.example is None:
            return None
        keys = trigrams(_words(view))
        return RowTrigrams(
            len(keys), chosen(keys, context.share), clusters.subject(view) if context.drawn(view) else None
        )

    def judge(self, facts: list[RowTrigrams | None], survey: Survey) -> Iterator[Finding]:
        rows = {
            row: trigrams_of
            for row in survey.training
            if (trigrams_of := facts[row]) is not None and trigrams_of.many
        }
        if any(len(trigrams_of.trigrams) for trigrams_of in rows.values()):
            yield _trigrams(list(rows), list(rows.values()), survey)
        yield from _crowds(survey)

    def draw(self, chart: dict[str, Any]) -> Section | None:
        return prompt_map.section(chart)


def _crowds(survey: Survey) -> Iterator[Finding]:
    sizes = Counter(group for group in clusters.of(survey) if group)
    many = sum(sizes.values())
    fair = max(SHARE, TIMES / clusters.usual(many)) if many else 1.0
    if fair >= 1:  # too few rows for one to stand out
        return
    rule, bar = "diversity.clusters", f"at most {fair:.0%} in one cluster"
    crowds = [group for group, size in sizes.most_common() if group.tight and size > fair * many]
    if not crowds:
        name, size = sizes.most_common(1)[0]
        sentence = (
            f"prompts fall into {len(sizes)} clusters, the largest with {size / many:.0%} of the rows "
            f"({name.name})"
        )
        yield Finding(rule, "good", sentence, of=many, value=size / many, threshold=bar)
        return
    count = sum(sizes[group] for group in crowds)
    sentence = "; ".join(f"{counted(sizes[group], many)} about “{group.name}”" for group in crowds)
    places = [
        place
        for group in crowds
        for place in [place for place, one in enumerate(clusters.of(survey)) if one == group][: TOLD // 2]
    ]
    yield Finding(
        rule,
        "warning",
        f"over-represented: {sentence}",
        count,
        many,
        count / many,
        bar,
        tuple(
            FindingRow(survey.sources[place], f"about “{group.name}”")
            for place in places
            if (group := clusters.of(survey)[place])
        ),
        "leave some of them out, or add rows about other things: what is most frequent is learned most",
        of_set=True,
    )


def hashes(words: Sequence[str]) -> np.ndarray:
    """uint32, one for each word, the same in every process."""
    return np.array([zlib.crc32(word.encode("utf-8", "surrogatepass")) for word in words], dtype=np.uint32)


def chosen(keys: np.ndarray, share: float) -> np.ndarray:
    """uint32, of about ``share`` of all possible trigrams: the same ones in every text."""
    return (keys if share >= 1 else keys[keys >> np.uint64(32) < np.uint64(share * 2**32)]).astype(np.uint32)


def trigrams(words: Sequence[str]) -> np.ndarray:
    """uint64, one for each three words in a row, well mixed."""
    words_hashed = hashes(words).astype(np.uint64)
    mixed = words_hashed[:-2] * np.uint64(0x9E3779B97F4A7C15) + words_hashed[1:-1] * np.uint64(
        0xC2B2AE3D27D4EB4F
    )
    mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9) + words_hashed[2:]
    mixed = (mixed ^ (mixed >> np.uint64(32))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def _words(view: View) -> list[str]:
    """Words of the answers; the marks around reasoning are not among them."""
    return WORD.findall(THINK.sub(" ", view.said.lower()))


def _trigrams(rows: Sequence[int], trigrams_of: Sequence[RowTrigrams], survey: Survey) -> Finding:
    keys = np.concatenate([row_trigrams.trigrams for row_trigrams in trigrams_of])
    owner = np.repeat(
        np.arange(len(rows), dtype=np.uint32), [len(row_trigrams.trigrams) for row_trigrams in trigrams_of]
    )
    part = survey.context.share if survey.context else 1.0
    if len(keys) > COUNTED:
        cut = 2**32 * COUNTED // len(keys)
        keys, owner, part = keys[keys < cut], owner[keys < cut], part * cut / 2**32
    values, first, inverse, counts = np.unique(
        keys, return_index=True, return_inverse=True, return_counts=True
    )
    many = np.array([row_trigrams.many for row_trigrams in trigrams_of])
    share, bar = min(1.0, len(values) / part / many.sum()), survey.spec.min_trigrams
    sentence, rule, threshold = (
        f"{share:.0%} of the word trigrams of the answers are distinct",
        "diversity.trigrams",
        f"> {bar:.0%}",
    )
    if share > bar:
        return Finding(rule, "good", sentence, of=len(rows), value=share, threshold=threshold)
    new = np.minimum(
        np.bincount(owner, 1 / counts[inverse], len(rows)) / part, many
    )  # their sum ÷ all is the share
    prior = PRIOR / part
    order = np.argsort((new + prior * share) / (many + prior), kind="stable")[: 10 * TOLD].tolist()
    least = list({trigrams_of[place].trigrams.tobytes(): place for place in reversed(order)}.values())[::-1][
        :TOLD
    ]  # unlike each other
    most = np.argsort(-counts, kind="stable")[:FREQUENT]
    views = survey.fetch([rows[int(place)] for place in {*least, *owner[first[most]].tolist()}])
    phrases: dict[int, str] = {}
    for view in views.values():
        words = _words(view)
        for place, key in enumerate(chosen(trigrams(words), 1).tolist()):
            phrases.setdefault(key, " ".join(words[place : place + 3]))
    often = [
        (phrase, int(counts[place]))
        for place in most
        if (phrase := phrases.get(int(values[place]))) and not _has_digit(phrase)
    ]
    if often:
        sentence += "; frequent: " + ", ".join(f"“{phrase}” ({count:,} times)" for phrase, count in often[:3])
    return Finding(
        rule,
        "warning",
        sentence,
        int((new < bar * many).sum()),
        len(rows),
        share,
        threshold,
        tuple(
            FindingRow(survey.sources[rows[place]], f"{new[place] / many[place]:.0%} of its trigrams are new")
            for place in least
        ),
        "rows that follow one pattern teach the pattern: rewrite some or leave them out. The share falls as "
        "a set grows: compare"
        " it only with sets of this size",
        of_set=True,
    )


def _has_digit(phrase: str) -> bool:
    return any(letter.isdigit() for letter in phrase)
