"""Every kind of event in events.jsonl with its fields."""

from __future__ import annotations

from sources import fields_of
from writing import code, prose, table

from tunesmith.events import KINDS

INTRODUCTION = """# Events

`events.jsonl` in a run has one JSON object a line: `kind`, the fields of that kind, and `at`, in seconds
since the epoch (UTC). Memory is in bytes. A loss is a mean over the units of the objective. All curves of a
report are made from this file. `tunesmith.events.read` reads it, and leaves out kinds and fields of later
versions with a notice. In Python `notify=` of each verb takes a function that is called with these events
as they happen.
"""


def text() -> str:
    parts = [INTRODUCTION]
    for name, kind in KINDS.items():
        rows = [
            (code(field.name), code(field.annotation), code(field.default))
            for field in fields_of(kind)
            if field.name != "at"
        ]
        parts += [
            f"## {name}\n",
            prose(kind.__doc__) + "\n" if described(kind) else "",
            table(["field", "type", "default"], rows),
        ]
    return "\n".join(parts)


def described(kind: type) -> bool:
    """Whether it has words of its own, not only the signature that dataclass writes."""
    return not (kind.__doc__ or "").startswith(f"{kind.__name__}(")
