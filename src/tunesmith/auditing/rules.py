"""The registry: every rule, in the order in which the screen and the page show their dimensions."""

from __future__ import annotations

from tunesmith.auditing.balance import Balance
from tunesmith.auditing.conflicts import Conflicts
from tunesmith.auditing.contamination import Contamination
from tunesmith.auditing.content import Content
from tunesmith.auditing.diversity import Diversity
from tunesmith.auditing.duplicates import Duplicates
from tunesmith.auditing.invented import Invented
from tunesmith.auditing.labels import Labels
from tunesmith.auditing.lengths import Lengths
from tunesmith.auditing.structure import Structure
from tunesmith.auditing.tokenisation import Tokenisation
from tunesmith.auditing.views import Rule

RULES: tuple[Rule, ...] = (
    Structure(), Diversity(), Balance(), Lengths(), Duplicates(), Conflicts(), Contamination(), Content(), Tokenisation(),
    Invented(), Labels(),
)  # fmt: skip
