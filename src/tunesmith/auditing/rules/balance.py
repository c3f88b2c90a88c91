"""Whether one kind of task outweighs the others, and whether labels depend on the kind of task instead of the
answer.

The type of a row is the first tool that it calls, as a turn or as text, otherwise the word that its prompt
begins with. Topics of prompts are for `diversity`, wrong labels for `labels`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from math import log2
from typing import ClassVar, NamedTuple

import numpy as np
from markupsafe import Markup

from tunesmith.auditing import clusters
from tunesmith.auditing.findings import Finding, FindingRow, counted
from tunesmith.auditing.prompt_map import LABELS
from tunesmith.auditing.registry import Rule, Section, register
from tunesmith.auditing.views import WORD, Context, Survey, View
from tunesmith.data import calls
from tunesmith.display import charts
from tunesmith.display.text import many, visible

CHARTED, TYPES = 40, 25
"""Instruction types in the chart's table, and those that are drawn."""
FEWEST_ROWS, FEWEST_OF_TYPE, LEAST_LABEL = 50, 10, 0.1
CHANCE = 0.01
"""A smaller p-value means that the labels of a type are not due to chance."""
NAMED, EACH = 10, 3
"""Types that a finding names, and rows of each."""

_OPENERS = re.compile(
    r"(?:[\W_]*+(?:please|kindly|hey|hi|hello|(?:can|could|would|will) you|help me(?: to)?|(?:i'd|i "
    r"would) like(?: you)? to"
    r"|i (?:want|need)(?: you)? to|let'?s)(?![\w'’]))*+[\W_]*+",
    re.IGNORECASE,
)


class InstructionType(NamedTuple):
    tool: str | None
    verb: str | None

    @property
    def type(self) -> str | None:
        return self.tool or (f"{self.verb} …" if self.verb else None)


@register
class Balance(Rule):
    name = "balance"
    order = 30
    looks_at = "kinds of task and labels"
    findings: ClassVar = {
        "types": "entropy of the instruction types (the tool called first, else the leading word of the "
        "prompt)",
        "labels": "shares of desirable and undesirable rows",
        "labels_by_type": "types whose labels are far from those of all rows",
    }
    bar = "above 2.5 bits (`audit.min_entropy`)"
    chart = "types"

    def look(self, view: View, context: Context) -> InstructionType | None:
        kind = InstructionType(first_tool(view), leading_word(view.asked))
        return kind if kind.type else None

    def judge(self, facts: list[InstructionType | None], survey: Survey) -> Iterator[Finding]:
        kinds = [(row, kind) for row in survey.training if (kind := facts[row]) is not None]
        types = {row: kind.type or "" for row, kind in kinds}
        if kinds:
            survey.charts["types"] = _chart(types, survey.labels)
            yield _types(kinds, types, survey)
        labelled = {row: label for row in survey.training if (label := survey.labels[row]) is not None}
        if labelled:
            yield _labels(labelled, survey)
        if len(set(labelled.values())) == 2:
            yield from _labels_by_type(
                {row: types[row] for row in labelled if row in types}, labelled, survey
            )

    def draw(self, chart: Sequence[Mapping[str, str | int]]) -> Section:
        rows = [
            (visible(str(row["type"]), 100), {key: int(row.get(key, 0)) for key in LABELS}) for row in chart
        ]
        rest = sum(sum(counts.values()) for _, counts in rows[TYPES:])
        used = {
            key: called for key, called in LABELS.items() if any(counts[key] for _, counts in rows[:TYPES])
        }
        lead = "Most frequent first."
        if rest:
            lead += f" {many(rest, 'row')} of other types {'is' if rest == 1 else 'are'} not drawn."
        body = Markup('<figure class="card">{}</figure>').format(charts.stacked("types", rows, used, TYPES))
        return Section("instruction-types", "Instruction types", lead, body)


def first_tool(view: View) -> str | None:
    for message in view.messages:
        if message.role == "assistant" and (called := message.calls or calls.found(message.content)):
            return called[0].name
    return None


def leading_word(prompt: str) -> str | None:
    """The first word of ``prompt`` in lower case, after greetings and polite words unless there is nothing
    else; in scripts without spaces the first two letters."""
    opened = _OPENERS.match(prompt[:500].replace("’", "'"))
    word = WORD.search(prompt, opened.end() if opened else 0) or WORD.search(prompt)
    if word and clusters.UNSPACED_LETTER.match(word[0]):
        return prompt[word.start() :][:2]
    return word[0].lower()[:40] if word else None


def entropy(counts: Iterable[int]) -> float:
    """In bits: 0 if all are of one kind, log2 of the number of kinds if they are even."""
    nonzero = [count for count in counts if count]
    total = sum(nonzero)
    return sum(count / total * log2(total / count) for count in nonzero)


def _types(rows: Sequence[tuple[int, InstructionType]], types: Mapping[int, str], survey: Survey) -> Finding:
    sizes = Counter(types.values())
    bits, bar = entropy(sizes.values()), survey.spec.min_entropy
    parts = {
        "tools": Counter(kind.tool for _, kind in rows if kind.tool),
        "first words of prompts": Counter(kind.verb for _, kind in rows if kind.verb),
        "clusters of prompts": Counter(group.name for group in clusters.of(survey) if group),
    }
    most = sizes.most_common(3)
    sentence = f"{counted(len(rows))} of {many(len(sizes), 'type')}, {bits:.1f} bits of entropy"
    alone = ", ".join(f"{name} {entropy(part.values()):.1f}" for name, part in parts.items() if part)
    often = ", ".join(f"{name} ({size / len(rows):.0%})" for name, size in most)
    met, few = bits > bar, len(rows) < FEWEST_ROWS
    places = [] if met else [row for row, name in types.items() if name == most[0][0]]
    return Finding(
        "balance.types",
        "good" if met else "note" if few else "warning",
        f"{sentence} ({alone}); most often: {often}",
        len(places),
        len(rows),
        bits,
        f"> {bar:g} bits",
        tuple(FindingRow(survey.sources[row], most[0][0]) for row in places[:NAMED]),
        ""
        if met
        else "add rows of other kinds, or leave out some of the most frequent: the model learns to expect "
        "these",
        of_set=True,
    )


def _labels(labelled: Mapping[int, bool], survey: Survey) -> Finding:
    good = sum(labelled.values())
    share = good / len(labelled)
    sentence = f"{good:,} desirable, {len(labelled) - good:,} undesirable ({share:.0%} desirable)"
    if without := len(survey.training) - len(labelled):
        sentence += f", {without:,} without a label"
    rule, bar = "balance.labels", f"at least {LEAST_LABEL:.0%} of each"
    if share in (0, 1):
        hint = "KTO needs both labels; SFT can learn from desirable rows alone"
        return Finding(
            rule, "note" if share else "warning", sentence, of=len(labelled), value=share, hint=hint
        )
    if LEAST_LABEL <= share <= 1 - LEAST_LABEL:
        return Finding(rule, "good", sentence, of=len(labelled), value=share, threshold=bar)
    rarer = share < 0.5
    places = [row for row, label in labelled.items() if label == rarer]
    return Finding(
        rule,
        "warning",
        sentence,
        len(places),
        len(labelled),
        share,
        bar,
        tuple(FindingRow(survey.sources[row], _word(rarer)) for row in places[:NAMED]),
        f"add {_word(rarer)} rows: from so few little is learned",
        of_set=True,
    )


def _labels_by_type(
    types: Mapping[int, str], labelled: Mapping[int, bool], survey: Survey
) -> Iterator[Finding]:
    """Types whose share of desirable rows is not that of all labelled rows, by the exact binomial test.

    With the correction of Benjamini and Hochberg (1995), so that about 1 in 100 of the named types is there
    by chance; if labels do not depend on the type, one is named in 1 of 100 sets."""
    whole = sum(labelled.values()) / len(labelled)
    sizes = Counter(types.values())
    good = Counter(name for row, name in types.items() if labelled[row])
    tested = [name for name, size in sizes.items() if size >= FEWEST_OF_TYPE]
    if not tested:
        return
    chances = [binomial_test(good[name], sizes[name], whole) for name in tested]
    adjusted = false_discovery_rates(chances)
    far = [name for _, least, name in sorted(zip(chances, adjusted, tested, strict=True)) if least < CHANCE]
    rule, threshold = "balance.labels_by_type", "labels as in the whole"
    if not far:
        sentence = (
            f"labels of the {len(tested)} types with {FEWEST_OF_TYPE} rows or more are as in the whole, "
            f"{whole:.0%} desirable"
        )
        yield Finding(rule, "good", sentence, of=len(types), threshold=threshold)
        return
    named = far[:NAMED]
    shares = {name: f"{good[name]:,} of {sizes[name]:,} desirable" for name in named}
    rows: list[FindingRow] = []
    for name in named:  # those whose label the type goes with
        side = good[name] / sizes[name] > whole
        places = [row for row, kind in types.items() if kind == name and labelled[row] == side]
        rows += [
            FindingRow(survey.sources[row], f"{name}: {shares[name]}, all types {whole:.0%}")
            for row in places[:EACH]
        ]
    listed = "; ".join(f"{name} ({shares[name]})" for name in named[:3])
    yield Finding(
        rule,
        "warning",
        f"{len(far)} of {len(tested)} types with labels far from those of all, {whole:.0%} desirable: "
        f"{listed}",
        sum(sizes[name] for name in far),
        len(types),
        None,
        threshold,
        tuple(rows),
        "the model may learn to like or avoid these types themselves: give each rows of both labels",
        of_set=True,
    )


def binomial_test(successes: int, trials: int, share: float) -> float:
    """How likely a result is that is no more probable than ``successes`` of ``trials`` at this ``share``: the
    exact two-sided test."""
    from scipy.special import gammaln, xlog1py, xlogy

    counts = np.arange(trials + 1)
    ways = gammaln(trials + 1) - gammaln(counts + 1) - gammaln(trials - counts + 1)
    chances = np.exp(ways + xlogy(counts, share) + xlog1py(trials - counts, -share))
    return float(min(1.0, chances[chances <= chances[successes] * (1 + 1e-7)].sum()))


def false_discovery_rates(chances: Sequence[float]) -> list[float]:
    """Adjusted p-values: the share of false discoveries if all that are as small are named (Benjamini and
    Hochberg, 1995)."""
    values = np.array(chances)
    order = np.argsort(values)
    scaled = values[order] * len(values) / np.arange(1, len(values) + 1)
    rates = np.empty_like(values)
    rates[order] = np.minimum(1.0, np.minimum.accumulate(scaled[::-1])[::-1])
    return rates.tolist()


def _word(label: bool) -> str:
    return "desirable" if label else "undesirable"


def _chart(types: Mapping[int, str], labels: Sequence[bool | None]) -> list[dict[str, str | int]]:
    """A row for each of the most frequent types, and one for all others."""
    known = {name for name, _ in Counter(types.values()).most_common(CHARTED)}
    shown: dict[str, dict[bool | None, int]] = {}
    for row, name in types.items():
        counts = shown.setdefault(name if name in known else "others", dict.fromkeys((True, False, None), 0))
        counts[labels[row]] += 1
    ordered = sorted(shown.items(), key=lambda entry: (entry[0] not in known, -sum(entry[1].values())))
    return [{"type": name, "true": n[True], "false": n[False], "none": n[None]} for name, n in ordered]
