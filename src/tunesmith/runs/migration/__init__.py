"""What do the settings of another program mean here? One file of ``dialects`` for each program.

Every key of the other file is used by a setting, left out with a reason, empty, or named as unknown; none is
dropped in silence. Weights and adapters of other programs are read elsewhere (`adapters`)."""

from tunesmith.runs.migration.translate import translate
from tunesmith.runs.migration.translation import Translation

__all__ = ["Translation", "translate"]
