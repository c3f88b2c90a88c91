"""Writes a corrected copy of the rows, and a ledger of every change and removal with its reason. What needs a
human decision is left and listed.

Corrected: rows that cannot be read and rows that repeat another to the letter are removed, mojibake is
decoded, calls written as text become turns (`calls.structure`). Everything else that an audit found stays in
place. The input is never written to, and correcting a corrected copy changes nothing."""

from __future__ import annotations

import filecmp
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal, NamedTuple, TextIO

from tunesmith import events
from tunesmith import files as writing
from tunesmith.auditing.findings import Audit, Fixed
from tunesmith.auditing.views import View
from tunesmith.data import calls, formats, sources
from tunesmith.data.examples import Completion, Conversation, Document, Example, Preference, content_of
from tunesmith.data.formats import DataSpec, Dropped
from tunesmith.display.text import excerpt
from tunesmith.errors import ConfigError, DataError

Action = Literal["changed", "removed", "left"]
_CALLS = "invented.results"
_AGAIN = DataSpec(train=("again",), valid=0.0)  # how a copy is read: layouts detected by their keys


class Step(NamedTuple):
    """What was done to a row, or left. ``before``: an excerpt if it was changed, the whole row if it was
    removed."""

    action: Action
    rule: str
    reason: str
    before: str | None = None
    after: str | None = None


def fix(
    paths: Sequence[str | Path],
    out: Path,
    spec: DataSpec,
    audit: Audit,
    notify: events.Sink = events.silent,
    *,
    drop_words: bool = False,
    ready: Callable[[Fixed], None] | None = None,
) -> Fixed:
    """Writes ``out``, which ``data.format: auto`` reads, and beside it ``out`` + ``.ledger.jsonl``; both
    whole or not at all.

    ``audit``: of the same files; what it found and is not corrected is listed as left. drop_words: leave out
    words beside calls. ready: called when both are written, before they get their names, so that what it
    does is done again if the process is killed before. Lines of the ledger: source, row (the line in ``out``,
    null where it is gone) and the fields of `Step`. Raises ConfigError if ``out`` is read or cannot be
    written, DataError if it exists, a file cannot be read as a whole, or no row is left."""
    out = out.expanduser()
    ledger = _ledger(out)
    require_free(paths, out)
    drafts = {path: path.with_name(f".{path.name}.draft") for path in (out, ledger)}
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        as_written = spec.model_copy(update={"structure_calls": False})
        notes = _by_source(audit)
        corrected = _rows(paths, as_written, notes, drop_words)
        fixed = _write(corrected, notes, drafts, audit.rows, events.ticker(notify, "fixing"))
        if not fixed.written:
            hint = "mend the rows that the audit names"
            raise DataError("no row is left, so nothing is written", where=str(out), hint=hint)
        if ready is not None:
            ready(fixed)
        _publish(drafts, ledger, out)
    except OSError as error:
        raise ConfigError(
            f"cannot be written: {error.strerror}", where=str(out), hint="choose another place"
        ) from error
    finally:
        for draft in drafts.values():
            with suppress(OSError):
                draft.unlink()
    return fixed


def _write(
    corrected: Iterable[_Row],
    notes: Mapping[str, Sequence[Step]],
    drafts: Mapping[Path, Path],
    total: int,
    tick: Callable[[int, int], None],
) -> Fixed:
    """Write the drafts of the copy and its ledger. ``notes`` are those that ``corrected`` has not taken."""
    tallies: dict[str, Counter[str]] = {"changed": Counter(), "removed": Counter(), "left": Counter()}
    rows = written = 0
    (out, ledger), (copy_draft, ledger_draft) = drafts.keys(), drafts.values()
    with _opened(copy_draft) as copy, _opened(ledger_draft) as book:

        def note(source: str, line: int | None, steps: Sequence[Step]) -> None:
            for step in steps:
                tallies[step.action][step.rule] += 1
                book.write(json.dumps({"source": source, "row": line, **step._asdict()}) + "\n")

        for row in corrected:
            rows += 1
            if row.text is not None:
                written += 1
                copy.write(f"{row.text}\n")
            note(row.source, row.line, row.steps)
            if rows % 50 == 0 or rows == total:
                tick(rows, total)
        for source, steps in notes.items():  # of files that are only compared with
            note(source, None, steps)
    return Fixed(out, ledger, rows, written, tallies["changed"], tallies["removed"], tallies["left"])


def _publish(drafts: Mapping[Path, Path], ledger: Path, out: Path) -> None:
    """Give the drafts their names. Raises DataError if another ledger is there."""
    if ledger.exists() and not filecmp.cmp(drafts[ledger], ledger, shallow=False):
        raise _taken(ledger)
    for path in (ledger, out):
        writing.flush(drafts[path])
        drafts[path].rename(path)


def _taken(path: Path) -> DataError:
    return DataError("exists already", where=str(path), hint="name a new file: nothing is overwritten")


def _is_ledger(path: Path) -> bool:
    try:
        with path.open("rb") as lines:
            first = lines.readline(1 << 20)
        return not first or {"source", "row", *Step._fields} <= json.loads(first).keys()
    except (OSError, ValueError, AttributeError):
        return False


def _opened(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")


def _ledger(out: Path) -> Path:
    return out.with_name(f"{out.name}.ledger.jsonl")


def require_free(paths: Sequence[str | Path], out: Path) -> None:
    """Raises DataError if ``out`` or its ledger exists, ConfigError if a copy of ``paths`` must not be
    written there."""
    out = out.expanduser()
    if out.suffix.lower() not in (".jsonl", ".ndjson"):
        raise ConfigError(
            "the corrected copy is JSONL", where=str(out), hint="name a file that ends in .jsonl"
        )
    files = sources.files(paths)
    for path in (out, _ledger(out)):
        if path.exists() and any(path.samefile(file) for file in files):
            raise ConfigError(
                "is a file that is read",
                where=str(path),
                hint="name another file: the original stays as it is",
            )
        if path.exists() and (path == out or out.exists() or not _is_ledger(path)):
            raise _taken(path)  # a ledger alone may be what a killed process left: it is compared
        for folder in (Path(given).expanduser().resolve() for given in paths):
            if folder.is_dir() and path.resolve().is_relative_to(folder):
                hint = "name a file outside of it; the next audit would read both"
                raise ConfigError(f"is in the folder {folder}, which is read", where=str(path), hint=hint)


def _by_source(audit: Audit) -> dict[str, list[Step]]:
    notes: dict[str, list[Step]] = defaultdict(list)
    for finding in audit.findings:
        for row in finding.rows if finding.severity != "good" and not finding.of_set else ():
            notes[row.source].append(Step("left", finding.rule, finding.what, row.note or None))
    return notes


class _Row(NamedTuple):
    """``line``: in the copy, which holds ``text``; None if the row was removed."""

    source: str
    line: int | None
    text: str | None
    steps: list[Step]


def _rows(
    paths: Sequence[str | Path], spec: DataSpec, found: dict[str, list[Step]], drop_words: bool
) -> Iterator[_Row]:
    """What becomes of each row. Removes from ``found`` what it lists; only digests of written rows stay in
    memory."""
    lines: dict[bytes, int] = {}  # digest of the content → line in the copy
    for made in formats.rows(paths, spec):
        listed = found.pop(made.source, [])
        turned = _with_tagged_calls(made, spec) if isinstance(made, Dropped) else made
        if isinstance(turned, Dropped):
            yield _Row(
                turned.source,
                None,
                None,
                [Step("removed", f"structure.{turned.reason}", turned.message, turned.raw)],
            )
            continue
        example, steps = mended(turned)
        if turned is not made:
            reason = "calls in <tool_call> marks are turns now"
            steps.insert(0, Step("changed", _CALLS, reason, None, _said(turned)))
        if drop_words and (quiet := calls.without_words(example)) != example:
            reason = "words beside calls are left out"
            steps.append(
                Step("changed", "structure.words_beside_calls", reason, _said(example), _said(quiet))
            )
            example = quiet
        digest = hashlib.blake2b(json.dumps(content_of(example)).encode(), digest_size=16).digest()
        if first := lines.get(digest):
            reason = f"line {first} of the copy has the same content and label"
            removed = Step("removed", "duplicates.exact", reason, _line(turned))
            yield _Row(made.source, None, None, [removed])
            continue
        lines[digest] = len(lines) + 1
        known = {step.rule for step in steps}
        yield _Row(
            made.source,
            len(lines),
            _line(example),
            steps + [step for step in listed if step.rule not in known],
        )


def _with_tagged_calls(dropped: Dropped, spec: DataSpec) -> Example | Dropped:
    """The row with calls in ``<tool_call>`` marks as turns, or ``dropped`` if it cannot be read so either."""
    if "<tool_call>" not in dropped.raw:
        return dropped
    raw = sources.Raw(dropped.source, dropped.raw)
    example = formats.row(raw, spec.model_copy(update={"structure_calls": True}))
    return dropped if isinstance(example, Dropped) else example


def _line(example: Example) -> str:
    return json.dumps(content_of(example) | ({"metadata": example.metadata} if example.metadata else {}))


def mended(example: Example) -> tuple[Example, list[Step]]:
    """The example with calls as turns and mojibake decoded, if it can still be read afterwards, and what was
    done to it."""
    steps: list[Step] = []
    now, note = example, calls.STRUCTURED
    while True:  # ends: calls become turns once, and each repair makes the text less bad
        before = now
        now, note = calls.structure(before)
        if note == calls.STRUCTURED:
            steps.append(
                Step("changed", _CALLS, "calls written as text are turns now", _said(before), _said(now))
            )
        now = _repaired(now, steps)
        if now == before:
            break
    if now != example and formats.row(sources.Raw(example.source, _line(now)), _AGAIN) != now:
        now, steps = (
            example,
            [step._replace(action="left", reason="the corrected row could not be read") for step in steps],
        )
    if note.startswith("left"):
        reason = note.replace("left: ", "calls written as text cannot become turns: ")
        steps.append(Step("left", _CALLS, reason, _said(now)))
    return now, steps


def _said(example: Example) -> str:
    """The turns in brief."""
    turns = View(example.source, example).messages
    return "; ".join(
        excerpt(" ".join([message.role, *(call.name for call in message.calls), message.content]), 60)
        for message in turns
    )


def _repaired(example: Example, steps: list[Step]) -> Example:
    """The example with mojibake decoded if ftfy detects it and the text improves. Arguments are left
    alone."""
    if isinstance(example, Document | Completion):
        texts = [example.text] if isinstance(example, Document) else [example.prompt, example.completion]
    else:
        sides = (
            [example.chosen, example.rejected] if isinstance(example, Preference) else [example.conversation]
        )
        texts = [message.content for side in sides for message in side.messages]
    right = {letter for text in texts for letter in text if not letter.isascii()}
    better = {text: fixed for text in texts if not text.isascii() and (fixed := _decoded(text)) != text}
    made = {letter for text, fixed in better.items() for letter in Counter(fixed) - Counter(text)}
    if made & right:
        step = Step(
            "left", "content.mojibake", "the row also has these letters right: it may be about such errors"
        )
        steps += [step] * (step not in steps)
        return example
    if not better:
        return example
    for text, fixed in better.items():
        same = next(
            (start for start, (one, other) in enumerate(zip(text, fixed, strict=False)) if one != other),
            len(fixed),
        )
        start = max(0, same - 20)
        reason = "letters that had been read in a wrong encoding"
        steps.append(
            Step("changed", "content.mojibake", reason, excerpt(text[start:], 80), excerpt(fixed[start:], 80))
        )

    def words(text: str) -> str:
        return better.get(text, text)

    def side(conversation: Conversation) -> Conversation:
        return replace(
            conversation,
            messages=tuple(
                replace(message, content=words(message.content)) for message in conversation.messages
            ),
        )

    if isinstance(example, Document):
        return replace(example, text=words(example.text), id="")
    if isinstance(example, Completion):
        return replace(example, prompt=words(example.prompt), completion=words(example.completion), id="")
    if isinstance(example, Preference):
        return replace(example, chosen=side(example.chosen), rejected=side(example.rejected), id="")
    return replace(example, conversation=side(example.conversation), id="")


def _decoded(text: str) -> str:
    from ftfy import fix_encoding
    from ftfy.badness import badness

    if not (bad := badness(text)):
        return text
    fixed = fix_encoding(text)
    return fixed if badness(fixed) < bad else text
