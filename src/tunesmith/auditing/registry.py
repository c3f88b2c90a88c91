"""What a rule of the audit is, and all rules that there are: one file in ``rules``, one class, one dimension.

A rule states what it looks at, what each of its findings means, its bar and its chart. The screen, the page,
the checks of ``audit.accept`` and the table of the documentation are derived from that."""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar, NamedTuple, TypeVar

from markupsafe import Markup

from tunesmith.auditing.findings import SEVERITIES, Finding, Severity
from tunesmith.auditing.views import Context, Survey, View

FOLDER = "tunesmith.auditing.rules"


class MapPoint(NamedTuple):
    """What the page shows of a point: its row, label, cluster and text."""

    source: str
    label: str
    cluster: str
    text: str


class Section(NamedTuple):
    """A chart with its heading on the page. ``points``: of the map."""

    anchor: str
    title: str
    lead: str
    body: Markup
    points: Sequence[MapPoint] = ()


class Rule(ABC):
    """One dimension. A rule has no state of its own, since `look` may run in another process."""

    name: ClassVar[str]
    order: ClassVar[int]
    """Place among the dimensions, on the screen and on the page."""
    looks_at: ClassVar[str]
    findings: ClassVar[Mapping[str, str]]
    """Name of a finding, without the dimension → what it means. `otherwise` describes a finding of another
    name."""
    otherwise: ClassVar[str] = ""
    gravest: ClassVar[Mapping[str, Severity]] = {}
    """Name of a finding → the most severe that it can be, "" of those that `otherwise` describes; a warning
    if it is not named here."""
    bar: ClassVar[str] = "reported"
    drawn: ClassVar[bool] = False
    """It looks only at rows that are `Context.drawn`."""
    chart: ClassVar[str] = ""
    """Key of `Survey.charts` that it fills and `draw` shows."""

    @abstractmethod
    def look(self, view: View, context: Context) -> Any:
        """What to keep of the row: small and picklable, or None if nothing is worth keeping."""

    @abstractmethod
    def judge(self, facts: list[Any], survey: Survey) -> Iterator[Finding]:
        """Findings from what was kept of each row (None for rows not looked at), in the order of
        ``survey``."""

    def draw(self, chart: Any) -> Section | None:
        """The section of the page that shows what `judge` put under `chart`."""
        raise NotImplementedError(f"{type(self).__name__} names a chart and does not draw it")

    @classmethod
    def meaning(cls, finding: Finding) -> str:
        return cls.findings.get(finding.rule.partition(".")[2], cls.otherwise)

    @classmethod
    def allows(cls, finding: Finding) -> bool:
        """Whether the finding is no more severe than `gravest` states."""
        name = finding.rule.partition(".")[2]
        stated = cls.gravest.get(name if name in cls.findings else "", "warning")
        return SEVERITIES.index(finding.severity) >= SEVERITIES.index(stated)


_registered: dict[str, Rule] = {}


_Rule = TypeVar("_Rule", bound=Rule)


def register(kind: type[_Rule]) -> type[_Rule]:
    """Decorate the class of a rule: every audit then applies it."""
    _registered[kind.name] = kind()
    return kind


def unregister(name: str) -> None:
    _registered.pop(name, None)


def rules() -> tuple[Rule, ...]:
    """All rules in their order."""
    for module in pkgutil.iter_modules(import_module(FOLDER).__path__, f"{FOLDER}."):
        import_module(module.name)
    return tuple(sorted(_registered.values(), key=lambda rule: rule.order))


def table() -> str:
    """The rules as the table of docs/audit.md."""
    lines = ["| dimension | looks at | findings | bar (setting) |", "|---|---|---|---|"]
    for rule in rules():
        meanings = [f"`{name}`: {meaning}" for name, meaning in rule.findings.items()]
        meanings += [f"others: {rule.otherwise}"] if rule.otherwise else []
        lines.append(f"| {rule.name} | {rule.looks_at} | {'; '.join(meanings)} | {rule.bar} |")
    return "\n".join(lines)
