"""Exit statuses of the command line, by the classes of errors."""

from __future__ import annotations

from writing import first_sentence, table

from tunesmith import errors
from tunesmith.errors import TunesmithError


def classes() -> list[type[TunesmithError]]:
    """The classes of errors.py, in the order of the file."""
    every = [kind for kind in vars(errors).values() if isinstance(kind, type)]
    return [kind for kind in every if issubclass(kind, TunesmithError)]


def statuses() -> str:
    rows = [("0", "done"), ("1", "an unexpected error, or a file that cannot be read or written")]
    for kind in classes():
        if "exit_code" in vars(kind) and kind is not TunesmithError:
            link = f"[{kind.__name__}](errors.md#{kind.__name__.lower()})"
            rows.append((str(kind.exit_code), f"{link}: {first_sentence(kind.__doc__)}"))
    rows.append(("130", "interrupted; what was saved, and how to go on, is printed"))
    return table(["status", "meaning"], rows)
