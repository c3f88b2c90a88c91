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
    """A setting or an option is unknown, missing, wrong or out of range, or two contradict each other.

    Cure: the message names the key, where it was set and what is allowed; ``tunesmith init`` has all keys."""

    exit_code = 2


class DataError(TunesmithError):
    """A file or its rows cannot be used, or what is to be written exists already.

    Cure: mend the rows at the places that are named; ``tunesmith audit FILE`` shows all of them."""

    exit_code = 3


class TemplateError(TunesmithError):
    """The chat template cannot express a message, or the rendered row is not what was to be learned.

    Cure: another model, or calls written as text; ``tunesmith show`` prints the tokens."""

    exit_code = 4


class ModelError(TunesmithError):
    """The weights or the tokenizer cannot be found, read or used.

    Cure: give the whole folder of a supported model; the message names files and tensors."""

    exit_code = 5


class TrainingError(TunesmithError):
    """Training cannot begin or go on.

    Cure: as the hint says; nothing before the last checkpoint is lost."""

    exit_code = 6


class Diverged(TrainingError):
    """The loss or the gradient of three updates in a row was not finite.

    Cure: lower ``optimizer.learning_rate``, and read the rows that are named."""


class OutOfMemory(TrainingError):
    """The device ran out of memory, or the plan says that it would.

    Cure: ``loop.checkpoint_gradients=true``, ``batch.micro=1``, a shorter ``batch.length``, or
    ``model.quantize=4``; ``tunesmith plan --fit`` proposes changes."""


class DiskFull(TrainingError):
    """There is no room to write a file of the run.

    Cure: make room (``tunesmith runs prune``), then ``tunesmith train --resume RUN``."""


class RankLost(TrainingError):
    """Another process of a run on several devices is gone.

    Cure: ``tunesmith train --resume RUN``, on any number of processes."""


class CorruptCheckpoint(TrainingError):
    """A file of a checkpoint is damaged or missing: its checksum does not match.

    Cure: resume from another checkpoint, or put the file back from a copy."""


class ResumeMismatch(TrainingError):
    """Settings, data, base or template are not those that the run was started with.

    Cure: put back what the message lists, or begin a new run with ``adapter.start``."""


class EvaluationError(TunesmithError):
    """A task cannot be measured, or a record of an evaluation cannot be read.

    Cure: evaluate again: ``tunesmith evaluate RUN``; what was measured is kept."""

    exit_code = 7


class ExportError(TunesmithError):
    """The format cannot express the run, or the artefact does not say what the run says.

    Cure: take another kind, or more bits; the message has the measured difference."""

    exit_code = 8


class ServeError(TunesmithError):
    """The server cannot start, or cannot answer a request.

    Cure: as the message says; requests get it with an HTTP status."""

    exit_code = 9


class SetupError(TunesmithError):
    """This machine lacks something: a package, a device, memory, a tool.

    Cure: ``tunesmith doctor`` says what is missing and how to install it."""

    exit_code = 10


def listing(problems: Sequence[str]) -> str:
    """The first twenty problems, one a line, and how many more there are."""
    lines = [f"  {problem}" for problem in problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  … and {len(problems) - SHOWN} more")
    return "\n".join(lines)
