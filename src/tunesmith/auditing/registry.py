"""The registry: every rule, in the order in which the screen and the page show their dimensions."""

from __future__ import annotations

from tunesmith.auditing.rules.balance import Balance
from tunesmith.auditing.rules.conflicts import Conflicts
from tunesmith.auditing.rules.contamination import Contamination
from tunesmith.auditing.rules.content import Content
from tunesmith.auditing.rules.diversity import Diversity
from tunesmith.auditing.rules.duplicates import Duplicates
from tunesmith.auditing.rules.invented import Invented
from tunesmith.auditing.rules.labels import Labels
from tunesmith.auditing.rules.lengths import Lengths
from tunesmith.auditing.rules.structure import Structure
from tunesmith.auditing.rules.tokenisation import Tokenisation
from tunesmith.auditing.views import Rule

RULES: tuple[Rule, ...] = (
    Structure(),
    Diversity(),
    Balance(),
    Lengths(),
    Duplicates(),
    Conflicts(),
    Contamination(),
    Content(),
    Tokenisation(),
    Invented(),
    Labels(),
)
