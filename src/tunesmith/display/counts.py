"""The counts of a plan in words: for the line that opens a run, and for the table of a dry run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from tunesmith.display.text import escaped, many, percent

Counts = Mapping[str, Any]
"""``data/plan.json``. A log of an earlier release may lack entries, or have others."""


class CountLine(NamedTuple):
    """``keys``: the counts that it says. ``text``: their words, a line for each of several values, or "" if
    there is nothing to say. ``opens``: whether the line that opens a run has it; notices before it say the
    rest."""

    name: str
    keys: tuple[str, ...]
    text: Callable[[Counts], str]
    opens: bool = False


def opening(counts: Counts) -> str:
    """The entries of the line that opens a run."""
    return "".join(f" · {entry.name}: {text}" for entry, text in _said(counts) if entry.opens)


def table(counts: Counts) -> str:
    """All entries, with their names in a column of their own."""
    rows = entries(counts)
    width = max((len(name) for name, _ in rows), default=0)
    lines = [
        f"{'' if place else name:<{width}}  {escaped(line)}"
        for name, text in rows
        for place, line in enumerate(text.split("\n"))
    ]
    return "\n".join(lines)


def entries(counts: Counts) -> list[tuple[str, str]]:
    """All entries as (name, text)."""
    return [(entry.name, text) for entry, text in _said(counts)]


def _said(counts: Counts) -> list[tuple[CountLine, str]]:
    known = {key for entry in _ENTRIES for key in entry.keys}
    others = [
        CountLine(key.replace("_", " "), (key,), _other(key), opens=True)
        for key in counts
        if key not in known
    ]
    texts = [(entry, entry.text(counts)) for entry in (*_ENTRIES, *others)]
    return [(entry, text) for entry, text in texts if text]


def _other(key: str) -> Callable[[Counts], str]:
    return lambda counts: _value(counts[key])


def _value(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_value(inner)}" for name, inner in value.items()) or "none"
    if value is None or isinstance(value, bool):
        return {None: "none", True: "yes", False: "no"}[value]
    if isinstance(value, float):
        return f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _filled(forms: Mapping[str, str]) -> Callable[[Counts], str]:
    """Joins the forms whose count is known, each with its count."""

    def text(counts: Counts) -> str:
        known = {key: counts[key] for key in forms if counts.get(key) is not None}
        return ", ".join(forms[key].format(_value(value)) for key, value in known.items())

    return text


def _rows(counts: Counts) -> str:
    reasons = counts.get("rows_dropped") or {}
    left_out = f", {sum(reasons.values()):,} left out ({_value(reasons)})" if reasons else ""
    read = _filled({"rows_read": "{} read"})(counts) + left_out
    sides = _filled({"rows_train": "{} to train on", "rows_valid": "{} held out"})(counts)
    return ", ".join(filter(None, (read, sides)))


def _sequences(counts: Counts) -> str:
    """Said only where a row gives more or fewer than one."""
    sides = ("train", "valid")
    if all(counts.get(f"sequences_{side}") == counts.get(f"rows_{side}") for side in sides):
        return ""
    return _filled({"sequences_train": "{} to train on", "sequences_valid": "{} held out"})(counts)


def _tokens(counts: Counts) -> str:
    padding = counts.get("padding_share")
    text = _filled({"tokens": "{} to train on", "supervised_tokens": "{} of them learned"})(counts)
    return ", ".join(
        filter(None, (text, "" if padding is None else f"{percent(padding)} of a batch is padding"))
    )


DISTILLED = ": probabilities of the base are learned"


def _mix(counts: Counts) -> str:
    """The files that are mixed in, with their rows in an epoch and the share of these in all."""
    mix = counts.get("mix") or {}
    whole = (counts.get("rows_train") or 0) + sum(entry["rows_an_epoch"] for entry in mix.values())
    return ", ".join(
        f"{many(entry['rows_an_epoch'], 'row')} an epoch of {name}, which has {entry['rows']:,} "
        f"({percent(entry['rows_an_epoch'] / whole)} of all rows)"
        f"{DISTILLED if entry.get('distilled') else ''}"
        for name, entry in mix.items()
    )


def _labels(counts: Counts) -> str:
    labels = counts.get("labels") or {}
    return ", ".join(
        f"{labels[key]:,} {key.replace('_train', ' to train on').replace('_valid', ' held out')}"
        for key in labels
    )


def _notes(counts: Counts) -> str:
    return "\n".join(f"{note}: {many(count, 'row')}" for note, count in (counts.get("notes") or {}).items())


def _asked(counts: Counts) -> str:
    forms = {
        "chat": "in a chat",
        "text": "by plain text that the model continues",
        "instruct": "by text under ### Instruction:",
    }
    return forms.get(counts.get("asked_as", ""), "")


def _reasoning(counts: Counts) -> str:
    reasoning = counts.get("reasoning")
    if not reasoning or not (reasoning["with_reasoning"] or reasoning["switch"]):
        return ""
    text = f"{reasoning['with_reasoning']:,} of {reasoning['answers']:,} answers have it"
    thinking = "on" if counts.get("thinking") else "off"
    return text + (f"; thinking is {thinking} in prompts" if reasoning["switch"] else "")


def _micro_batches(counts: Counts) -> str:
    text = _filled({"micro_batches": "{} in the first epoch"})(counts)
    if largest := counts.get("largest_micro_batch"):
        text += f", the largest {many(largest['rows'], 'row')} of {many(largest['tokens'], 'token')} in all"
    return text


def _weights(counts: Counts) -> str:
    if "trainable" not in counts:
        return ""
    share = percent(counts["trainable"] / counts["total"])
    return f"{counts['trainable']:,} of {counts['total']:,} are trained ({share})"


def _frozen(counts: Counts) -> str:
    if "frozen_layers_below" not in counts:
        return ""
    saved = percent(counts["cache_frozen_saves"])
    return (
        f"{counts['frozen_layers_below']:,} below the adapter; loop.cache_frozen saves {saved} of the "
        f"layers' work and takes {_value(counts['cache_frozen_gb'])} GB of disk space"
    )


_ENTRIES = (
    CountLine("rows", ("rows_read", "rows_dropped", "rows_train", "rows_valid"), _rows, opens=True),
    CountLine("sequences", ("sequences_train", "sequences_valid"), _sequences, opens=True),
    CountLine("tokens", ("tokens", "supervised_tokens", "padding_share"), _tokens, opens=True),
    CountLine("mixed in", ("mix",), _mix, opens=True),
    CountLine("labels", ("labels",), _labels, opens=True),
    CountLine("how rows were read", ("notes",), _notes),
    CountLine("reasoning", ("reasoning", "thinking"), _reasoning),
    CountLine("the model is asked", ("asked_as",), _asked, opens=True),
    CountLine("unit of the loss", ("loss",), _filled({"loss": "{}"}), opens=True),
    CountLine("updates", ("steps",), _filled({"steps": "{}"})),
    CountLine("micro-batches", ("micro_batches", "largest_micro_batch"), _micro_batches),
    CountLine("weights", ("trainable", "total"), _weights),
    CountLine("adapter", ("adapter",), _filled({"adapter": "{}"})),
    CountLine(
        "reference", ("reference_sequences",), _filled({"reference_sequences": "{} sequences to measure"})
    ),
    CountLine(
        "difficulty", ("difficulty_sequences",), _filled({"difficulty_sequences": "{} sequences to measure"})
    ),
    CountLine("frozen layers", ("frozen_layers_below", "cache_frozen_saves", "cache_frozen_gb"), _frozen),
)
