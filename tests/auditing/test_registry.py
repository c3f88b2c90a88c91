"""A rule is one file: the screen, the page, `audit.accept` and the documentation know it from its class
alone."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import pytest
from markupsafe import Markup
from rich.console import Console

from tunesmith.auditing import AuditSpec, page, registry, screen, survey
from tunesmith.auditing.findings import Finding, FindingRow
from tunesmith.auditing.registry import Rule, Section, register
from tunesmith.auditing.views import Context, Survey, View
from tunesmith.data import formats
from tunesmith.data.formats import DataSpec
from tunesmith.errors import ConfigError
from tunesmith.events import Event, Notice

ROOT = Path(__file__).parents[2]


@pytest.fixture
def toy() -> Iterator[None]:
    @register
    class Shouting(Rule):
        name = "shouting"
        order = 15
        looks_at = "answers in capitals"
        findings: ClassVar = {"capitals": "an answer without a small letter"}
        bar = "none"
        chart = "loud"

        def look(self, view: View, context: Context) -> bool | None:
            return view.said.isupper() or None

        def judge(self, kept: list[bool | None], survey: Survey) -> Iterator[Finding]:
            rows = tuple(
                FindingRow(survey.sources[row], "all capitals") for row, loud in enumerate(kept) if loud
            )
            survey.charts["loud"] = len(rows)
            yield Finding(
                "shouting.capitals", "warning", f"{len(rows)} shout", len(rows), len(kept), None, "none", rows
            )

        def draw(self, chart: int) -> Section:
            return Section("loudness", "Loudness", "How loud it is.", Markup("<p>{} loud</p>").format(chart))

    yield
    registry.unregister("shouting")


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    answers = [f"Answer {number} is calm." for number in range(20)] + ["THIS ONE IS NOT!"]
    lines = [
        json.dumps({"prompt": f"Question {at}?", "completion": answer}) for at, answer in enumerate(answers)
    ]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def audited(path: Path, **accept: object):
    spec = AuditSpec.model_validate(accept)
    return survey.audit([path], survey.Setup(DataSpec(train=(str(path),)), spec), processes=1)


def test_a_rule_that_is_registered_is_seen_everywhere(toy, rows):
    audit = audited(rows)
    (finding,) = [finding for finding in audit.findings if finding.dimension == "shouting"]
    assert (finding.count, finding.rows[0].source) == (1, f"{rows}:21")

    stream = io.StringIO()
    screen.render(audit, Console(file=stream, width=120))
    assert any(
        "shouting" in line and "capitals" in line and "none" in line
        for line in stream.getvalue().splitlines()
    )

    shown = page.html(audit)
    for words in (
        "<h3>shouting</h3>",
        '<p class="about">answers in capitals</p>',
        'title="an answer without a small letter"',
        '<li><a href="#loudness">Loudness</a></li>',
        "<p>1 loud</p>",
    ):
        assert words in shown, words

    assert (
        "| shouting | answers in capitals | `capitals`: an answer without a small letter | none |"
        in registry.table()
    )
    assert next(finding for finding in audited(rows, accept=["shouting"]).findings if finding.accepted)
    registry.unregister("shouting")
    with pytest.raises(ConfigError, match="no rule is called"):
        audited(rows, accept=["shouting"])


def test_the_documentation_shows_every_rule():
    text = (ROOT / "docs" / "audit.md").read_text("utf-8")
    assert len(registry.rules()) >= 11
    assert registry.table() in text, "put the output of auditing.registry.table() into docs/audit.md"


def test_every_finding_has_a_meaning(rows):
    by_name = {rule.name: rule for rule in registry.rules()}
    audit = audited(rows)
    assert len(audit.findings) > 10
    for finding in audit.findings:
        assert by_name[finding.dimension].meaning(finding), finding.rule


def test_without_the_extra_every_rule_runs_and_the_map_is_plainer(tmp_path, monkeypatch):
    path = tmp_path / "labelled.jsonl"
    rows = [
        {
            "prompt": f"Question {number}, about {'rain' if number % 2 else 'snow'} on hill {number % 7}?",
            "completion": f"It is {'wet' if number % 2 else 'cold'} there, {number} times.",
            "label": bool(number % 2),
        }
        for number in range(80)
    ]
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    for module in [name for name in sys.modules if name.partition(".")[0] in ("sklearn", "joblib")]:
        monkeypatch.delitem(sys.modules, module)
    for package in ("sklearn", "joblib"):
        monkeypatch.setitem(sys.modules, package, None)
    told: list[Event] = []
    setup = survey.Setup(DataSpec(train=(str(path),)), AuditSpec())
    audit = survey.audit([path], setup, notify=told.append)
    assert {"diversity.clusters", "labels.predictable"} <= {finding.rule for finding in audit.findings}
    assert audit.charts["map"]["method"] == "TF-IDF of words, two principal components"
    notices = [event for event in told if isinstance(event, Notice)]
    assert ["t-SNE" in notice.what for notice in notices] == [True, False]
    assert {notice.hint for notice in notices} == {"pip install 'tunesmith[audit]'"}

    examples = formats.read([path], setup.data).examples
    before_training = survey.examine(examples, {}, Context(AuditSpec(), charts=False), told.append)
    assert {finding.rule for finding in audit.findings} == {
        finding.rule for finding in before_training.findings
    }
    assert len([event for event in told if isinstance(event, Notice)]) == 2


@pytest.mark.parametrize(("name", "key"), [("shouting.capitals", "capitals"), ("shouting.other", "")])
def test_a_finding_graver_than_its_rule_states_ends_the_audit_with_the_name_of_the_rule(
    toy, rows, monkeypatch, name, key
):
    (kind,) = [type(rule) for rule in registry.rules() if rule.name == "shouting"]
    monkeypatch.setattr(kind, "judge", lambda self, kept, survey: iter([Finding(name, "error", "x")]))
    with pytest.raises(ConfigError) as caught:
        audited(rows)
    said = str(caught.value)
    assert f"{kind.__module__}.{kind.__qualname__}: the finding {name} is of severity error" in said
    assert f'hint: add "{key}": "error" to its `gravest`' in said
    monkeypatch.setattr(kind, "gravest", {key: "error"})
    assert name in {finding.rule for finding in audited(rows).findings}
