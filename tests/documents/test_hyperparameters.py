"""docs/hyperparameters.md shows the defaults as the settings have them, and docs/glossary.md the words of the
report."""

from __future__ import annotations

import re
from functools import reduce
from pathlib import Path

import pytest

import tunesmith
from tunesmith.evaluation import tasks
from tunesmith.reports.glossary import MEANINGS

DOCS = Path(__file__).parents[2] / "docs"
ENTRY = re.compile(r"^- \*\*(.+?)\*\*: (.+)\. \[[^\]]+\]\([^)]+\)$", re.M)


def configured(*sets: str):
    return tunesmith.configure(model="m", data=["d"], sets=list(sets)).spec


def test_the_defaults_of_the_grid_are_those_of_the_settings():
    page, spec = (DOCS / "hyperparameters.md").read_text("utf-8"), configured()
    rows = re.findall(r"^\| `(\w+\.\w+)` \| [^|]+ \| `([^`]+)` \|", page, re.M)
    assert len(rows) >= 14
    for key, shown in rows:
        value = reduce(getattr, key.split("."), spec)
        value = ", ".join(value) if isinstance(value, tuple) else value
        assert shown == str(value), key


def test_the_rates_of_the_objectives_are_their_defaults():
    page = (DOCS / "hyperparameters.md").read_text("utf-8")
    rows = re.findall(r"^\| `(\w+)` \| (\S+) \| (\S+) \| (\d+) \|", page, re.M)
    assert len(rows) == 6
    for name, *rates, sequences in rows:
        for kind, rate in zip(("lora", "full"), rates, strict=True):
            spec = configured(f"objective={name}", f"adapter={kind}")
            assert spec.optimizer.learning_rate == pytest.approx(float(rate)), (name, kind)
            assert spec.batch.sequences == int(sequences), name


def test_the_glossary_is_sorted_and_has_the_words_of_the_report():
    page = (DOCS / "glossary.md").read_text("utf-8")
    entries = ENTRY.findall(page)
    terms = [term for term, _ in entries]
    assert len(terms) >= 150 and len(terms) == page.count("\n- **")
    assert terms == sorted(terms, key=str.casefold) and len(set(terms)) == len(terms)
    assert MEANINGS.items() <= dict(entries).items()


def test_the_glossary_has_the_numbers_of_all_tasks():
    shown = re.findall(r"^\| (.+) \| (.+) \| `([\w.]+)` \|$", (DOCS / "glossary.md").read_text("utf-8"), re.M)
    kinds = [kind.name for group in tasks.groups().values() for kind in group.kinds]
    numbers = [
        (meaning.title, meaning.text, kind) for kind in kinds for meaning in tasks.about(kind).meanings
    ]
    assert shown == list(dict.fromkeys(numbers)) and len(shown) >= 40
