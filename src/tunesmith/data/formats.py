"""How files become examples.

Read: JSON lines, a JSON array, CSV and Parquet, compressed files, folders of them. A row's layout is
recognised by its keys. Words are never changed, trimmed or invented. A row that cannot be used becomes a
`Dropped` with its file:line, never an exception; only a file that cannot be read as a whole raises."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import AfterValidator, Field, model_validator

from tunesmith.data import mixing, sources
from tunesmith.data.calls import structure
from tunesmith.data.examples import BadRow, prompt_key, split, with_hint, write_examples, write_lines
from tunesmith.data.layout import RowReader, layout_of, layouts, typed
from tunesmith.data.mixing import MixSpec
from tunesmith.display.text import many
from tunesmith.errors import DataError, listing
from tunesmith.settings.config import JSON, Spec, Texts

# isort: split
from tunesmith.data.examples import (
    Call,
    Completion,
    Conversation,
    Demonstration,
    Document,
    Example,
    Judged,
    Message,
    Preference,
    RowRemark,
)

__all__ = [
    "JSON",
    "Call",
    "Completion",
    "Conversation",
    "DataSpec",
    "Demonstration",
    "Document",
    "Dropped",
    "Example",
    "Judged",
    "Message",
    "Preference",
    "Read",
    "RowRemark",
    "prompt_key",
    "read",
    "remarks",
    "require",
    "split",
    "write_dropped",
    "write_examples",
]


def known_format(name: str) -> str:
    if name != "auto" and name not in layouts():
        near = get_close_matches(name, layouts(), n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise ValueError(f"expected one of auto, {', '.join(layouts())}{meant}")
    return name


class DataSpec(Spec):
    """Where the rows are and how they are read."""

    train: Texts = Field(
        min_length=1,
        description="files or folders: JSONL, a JSON array (also compressed), CSV, Parquet",
        json_schema_extra={"when": "in every run: it has no default"},
    )
    valid: Annotated[float, Field(ge=0, lt=1)] | Texts = Field(
        0.2,
        description="share held out (0: none), or files",
        json_schema_extra={
            "when": "files if you have a held-out set of your own; a smaller share if rows are many"
        },
    )
    mix: tuple[MixSpec, ...] = Field(
        default=(),
        description="other files to train on beside the task's rows, such as general rows against "
        "forgetting: [{path: FILE, share: 0.2}]; never held out",
        json_schema_extra={"when": "if the evaluation says that the model forgot what it could do before"},
    )
    order: Literal["shuffled", "length", "difficulty"] = Field(
        default="shuffled",
        description="order of the rows in the first epoch: shuffled, or a curriculum, the shortest or the "
        "easiest (by the loss before training) first; later epochs are shuffled",
        json_schema_extra={"when": "if the first updates are unstable on long or hard rows"},
    )
    format: Annotated[str, AfterValidator(known_format)] = Field(
        default="auto",
        description=f"layout of the rows: auto (by their keys), {', '.join(layouts())}",
        json_schema_extra={"when": "if the keys of the rows fit several layouts and the wrong one is chosen"},
    )
    max_dropped: float = Field(
        default=0.05,
        ge=0,
        le=1,
        description="largest share of unusable rows before it stops",
        json_schema_extra={
            "when": "lower for data that should be clean; higher only after you have read the reasons"
        },
    )
    instruction_layout: Literal["chat", "instruct"] = Field(
        default="chat",
        description="alpaca rows as a conversation, or as ### Instruction: text for base models",
        json_schema_extra={"when": "instruct for a base model that has no chat template"},
    )
    reasoning: Literal["auto", "refuse", "think", "omit"] = Field(
        default="auto",
        description="reasoning beside the answer: auto: learned as the template writes it, and the row is "
        "refused if it has no form for it; refuse the row; think: <think> text before the answer; omit it",
        json_schema_extra={
            "when": "omit to learn answers alone; think for a template that has no form for reasoning"
        },
    )
    structure_calls: bool = Field(
        default=False,
        description="calls and results written as text become turns, so that results are read and never "
        "learned",
        json_schema_extra={
            "when": "if rows hold calls and results as text: else the model learns to invent results"
        },
    )
    text_control: Literal["refuse", "read", "letters"] = Field(
        default="refuse",
        description="control tokens such as [INST] written in plain text: refuse the row, read them as "
        "tokens, or as letters (Mistral)",
        json_schema_extra={
            "when": "read if a chat template rendered the text; letters if the text is about such tokens"
        },
    )

    @model_validator(mode="after")
    def _room_for_the_task(self) -> DataSpec:
        mixing.require_room(self.mix)
        return self

    @property
    def trained_on(self) -> tuple[str, ...]:
        """The files and folders of all rows that may be trained on: the task's and those of ``mix``."""
        return (*self.train, *(path for entry in self.mix for path in entry.path))


class Dropped(NamedTuple):
    """A row left out. ``reason``: a code to count by. ``fault``: what is wrong. ``raw``: the row as written.
    ``hint``: what to do about it, or ""."""

    source: str
    reason: str
    fault: str
    raw: str
    hint: str = ""

    @property
    def message(self) -> str:
        """The fault and the hint."""
        return with_hint(self.fault, self.hint)


class Read(NamedTuple):
    """``rows`` = examples + dropped. ``files``: path → sha256 of its bytes."""

    examples: list[Example]
    dropped: list[Dropped]
    rows: int
    files: dict[str, str]


def read(paths: Sequence[str | Path], spec: DataSpec) -> Read:
    """All rows of ``paths`` in order; files of a folder by name, without hidden files and other endings.

    Raises DataError if a file is missing, given twice, or cannot be read as a whole."""
    examples: list[Example] = []
    dropped: list[Dropped] = []
    for result in rows(paths, spec):
        if isinstance(result, Dropped):
            dropped.append(result)
        else:
            examples.append(result)
    files = {str(path): sources.sha256(path) for path in sources.files(paths)}
    return Read(examples, dropped, len(examples) + len(dropped), files)


def rows(paths: Sequence[str | Path], spec: DataSpec) -> Iterator[Example | Dropped]:
    """The rows of `read`, one at a time: no more than one is in memory, but for those of an array."""
    for path in sources.files(paths):
        for raw in sources.raws(path):
            yield row(raw, spec)


def row(raw: sources.Raw, spec: DataSpec) -> Example | Dropped:
    """What one row becomes; never raises."""
    try:
        value = sources.value(raw.text)
        if isinstance(value, BadRow):
            raise value
        return _example(value, raw.source, spec)
    except BadRow as bad:
        return Dropped(raw.source, bad.reason, bad.located, raw.text, bad.hint)
    except RecursionError:
        return Dropped(raw.source, "json", "expected a row, found values nested too deeply", raw.text)


def _example(value: JSON, source: str, spec: DataSpec) -> Example:
    row = dict(typed(dict, value, ""))
    layout = layout_of(row, spec.format)
    reader = RowReader(
        row,
        reasoning=spec.reasoning,
        instruct=spec.instruction_layout == "instruct",
        structure_calls=spec.structure_calls,
    )
    if layout.labelled:
        reader.judge(layout)
    make = layout.read(reader)
    reader.tell_unread(layout)
    example = make(source=source, metadata=reader.metadata())
    if reader.remarks:
        example = replace(example, remarks=tuple(reader.remarks))
    turned, note = structure(example) if spec.structure_calls else (example, "")
    return replace(turned, metadata=turned.metadata | {"text_calls": note}) if note else example


def remarks(examples: Iterable[Example]) -> Counter[RowRemark]:
    """How rows were read, where their author may not expect it, with counts."""
    return Counter(remark for example in examples for remark in example.remarks)


def require(read: Read, max_dropped: float) -> None:
    """Raises DataError if more than ``max_dropped`` (a share) of the rows are bad, or none is left."""
    bad = len({row.source for row in read.dropped})  # of one row, several answers may be left out
    share = bad / max(read.rows, 1)
    if read.examples and share <= max_dropped:
        return
    files = ", ".join(read.files)
    if not read.dropped:
        raise DataError("no rows", where=files, hint="data.train names files of rows")
    allow = [f"allow more than {max_dropped:.1%} with data.max_dropped"] if share < 1 else []
    raise DataError(
        f"{bad} of {read.rows} rows cannot be used, {share:.1%} ({reasons(read.dropped)}):\n"
        f"{faults(read.dropped)}",
        where=files or None,
        hint="\nhint: ".join([*(hints(read.dropped) or ["mend these rows"]), *allow]),
    )


def reasons(dropped: Iterable[Dropped]) -> str:
    """``json 3, too_long 1``: a row counts once for each reason."""
    counts = Counter(reason for _, reason in {(row.source, row.reason): None for row in dropped})
    return ", ".join(f"{reason} {count}" for reason, count in counts.most_common())


def faults(dropped: Sequence[Dropped]) -> str:
    """The first rows that cannot be used, one a line, with what is wrong; `hints` has what to do."""
    return listing([f"{row.source}: {row.fault}" for row in dropped])


def hints(dropped: Iterable[Dropped]) -> list[str]:
    """Each hint once, the one for most rows first, with how many rows it is for."""
    counts = Counter(row.hint for row in dropped if row.hint)
    return [f"{hint} ({many(count, 'row')})" for hint, count in counts.most_common()]


def write_dropped(dropped: Iterable[Dropped], path: Path) -> None:
    """JSONL, one object a row: source, reason, message, raw. Plain ASCII, since ``raw`` may not be valid
    text."""
    lines = [
        {"source": row.source, "reason": row.reason, "message": row.message, "raw": row.raw}
        for row in dropped
    ]
    write_lines([json.dumps(line) for line in lines], path)
