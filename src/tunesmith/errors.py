"""The hierarchy of errors. Every error that a user can cause says what is wrong, where, and what to do.

TunesmithError 1
├── ConfigError 2      a key, its origin, a did-you-mean
├── DataError 3        file:line, the first twenty problems
├── TemplateError 4    the template cannot express a role or a call, or a check on the rendered row failed
├── ModelError 5       weights or tokenizer cannot be read; all mismatched tensors listed
├── TrainingError 6
│   ├── Diverged         three updates in a row were not finite
│   ├── OutOfMemory      the device ran out of memory
│   ├── DiskFull         a checkpoint would not fit
│   ├── RankLost         another process of the run is gone
│   ├── CorruptCheckpoint  a checksum does not match
│   └── ResumeMismatch   what the run was started with has changed
├── EvaluationError 7
├── ExportError 8
├── ServeError 9
└── SetupError 10      this machine lacks something

The number is the exit status of the command line.
"""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 20
"""How many problems of one kind are printed before "and N more"."""


class TunesmithError(Exception):
    """Base of all errors a user can cause.

    what: the problem in one sentence. where: ``file:line``, a key path, or a tensor name. hint: what to do
    about it."""

    exit_code = 1

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        super().__init__(what)
        self.what = what
        self.where = where
        self.hint = hint

    def __str__(self) -> str:
        lines = [self.what if self.where is None else f"{self.where}: {self.what}"]
        if self.hint is not None:
            lines.append(f"hint: {self.hint}")
        return "\n".join(lines)


class ConfigError(TunesmithError):
    exit_code = 2


class DataError(TunesmithError):
    exit_code = 3


class TemplateError(TunesmithError):
    exit_code = 4


class ModelError(TunesmithError):
    exit_code = 5


class TrainingError(TunesmithError):
    exit_code = 6


class Diverged(TrainingError):
    pass


class OutOfMemory(TrainingError):
    pass


class DiskFull(TrainingError):
    pass


class RankLost(TrainingError):
    pass


class CorruptCheckpoint(TrainingError):
    pass


class ResumeMismatch(TrainingError):
    pass


class EvaluationError(TunesmithError):
    exit_code = 7


class ExportError(TunesmithError):
    exit_code = 8


class ServeError(TunesmithError):
    exit_code = 9


class SetupError(TunesmithError):
    exit_code = 10


def listing(problems: Sequence[str]) -> str:
    """The first twenty problems, one a line, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  … and {len(problems) - SHOWN} more")
    return "\n".join(lines)
