"""What an evaluation wrote: one `Record` a folder ``evals/<task>@<version>``, in two files.

``score.json`` holds the scores, how they were measured and on what; ``examples.jsonl`` holds one line an
example, with the answers of base and tuned. Nothing else in the package reads or writes these files. A record
of an earlier release lacks fields: they are None, or the default of the field."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, cast

from typing_extensions import TypedDict

from tunesmith.errors import EvaluationError
from tunesmith.files import checked, parse_json, read_json, write_json, write_text
from tunesmith.runs.directory import EVALS
from tunesmith.settings.config import JSON

SCORE, EXAMPLES = "score.json", "examples.jsonl"

Verdict = Literal["improved", "regressed", "no difference shown"]
Movement = Literal["improved", "unchanged", "regressed"]
Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class ExampleScore:
    """One example's score. ``value``: mean over its units; ``units``: its weight (learned tokens, or 1).

    ``source``: identifies the example; examples that are not independent, such as the turns of a
    conversation, share it. ``prompt``, ``reference`` and ``answer`` are shown side by side."""

    source: str
    value: float
    units: float = 1.0
    detail: dict[str, JSON] = field(default_factory=dict)
    prompt: str | None = None
    reference: str | None = None
    answer: str | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """One statistic of the tuned model. ``low``, ``high``: its 95 % interval, None if one example allows
    none. ``n``: number of sources.

    ``delta``: tuned − base on the same examples, None without a base; its interval is paired. ``note``:
    explains an interval that is not a bootstrap interval. ``part``: the subset of examples, as "tool=search",
    None for all. ``p``: two-sided, of no difference, by ``test``. ``sources``: how many improved, stayed and
    regressed. ``met``: whether ``target`` holds, None if that is not shown. ``p_corrected`` and ``verdict``
    are set by `evaluation.statistics.judge`."""

    task: str
    version: str
    name: str
    value: float
    low: float | None
    high: float | None
    n: int
    delta: float | None = None
    delta_low: float | None = None
    delta_high: float | None = None
    note: str | None = None
    part: str | None = None
    better: Better | None = None
    headline: bool = False
    unit: str = ""
    p: float | None = None
    test: str | None = None
    sources: tuple[int, int, int] | None = None
    target: str | None = None
    met: bool | None = None
    p_corrected: float | None = None
    verdict: Verdict | None = None

    @property
    def base(self) -> float | None:
        """The base model's value."""
        return None if self.delta is None else self.value - self.delta


@dataclass(frozen=True, slots=True)
class ExampleRecord:
    """One line of ``examples.jsonl``: an example as tuned, and base if it was measured, scored it.

    ``change``: how it moved by the task's headline, None if that is not defined."""

    source: str
    units: float
    prompt: str | None
    reference: str | None
    tuned: float
    tuned_detail: dict[str, JSON]
    tuned_answer: str | None
    base: float | None = None
    base_detail: dict[str, JSON] | None = None
    base_answer: str | None = None
    change: Movement | None = None

    @property
    def cut(self) -> bool:
        """Whether the tuned model's answer reached the longest length allowed."""
        return self.tuned_detail.get("cut") is True

    def score(self) -> ExampleScore:
        """The tuned model's score."""
        return ExampleScore(
            self.source,
            self.tuned,
            self.units,
            self.tuned_detail,
            self.prompt,
            self.reference,
            self.tuned_answer,
        )


@dataclass(frozen=True, kw_only=True)
class Record:
    """One task's result for one checkpoint.

    ``folder``: ``RUN/evals/<name>``. ``family``: what sets this evaluation apart from one of the best
    checkpoint on all held-out rows with a base, as ("step000002", "first5"); None in records before families.
    ``at``: seconds since the epoch. ``identity``: hash of items and settings. ``settings``: of
    `EvaluationSpec`. ``base``: digest of the base's weights. ``data``: "data/valid.jsonl" (held-out rows),
    the files given, or None for tasks that ask no rows. ``unseen``: no file in ``data`` was trained on; None
    if no files were given. ``n``: number of examples. ``seconds``, ``kept``: by side ("base", "tuned"), how
    long measuring took and whether the scores came from the cache."""

    folder: Path
    task: str
    version: str
    checkpoint: str | None = None
    family: tuple[str, ...] | None = None
    at: float | None = None
    identity: str | None = None
    settings: Mapping[str, JSON] | None = None
    base: str | None = None
    data: str | tuple[str, ...] | None = None
    unseen: bool | None = None
    n: int | None = None
    seconds: Mapping[str, float | None] | None = None
    kept: Mapping[str, bool] | None = None
    scores: tuple[Score, ...]

    @property
    def name(self) -> str:
        """The folder's name, "perplexity@1+first5"."""
        return self.folder.name

    @property
    def run_dir(self) -> Path:
        return self.folder.parent.parent

    @property
    def variant(self) -> str:
        """What the folder's name has beyond task and version: "+first5", or nothing."""
        return self.name.removeprefix(f"{self.task}@{self.version}")

    @property
    def limit(self) -> int | None:
        """The rows or items the evaluation was limited to."""
        return cast("int | None", (self.settings or {}).get("limit"))

    @property
    def comparable(self) -> bool:
        """Whether it states all that decides if another evaluation asked the same; earlier releases did
        not."""
        stated = (self.checkpoint, self.family, self.identity, self.settings, self.base, self.n)
        return None not in stated

    def examples(self) -> Iterator[ExampleRecord]:
        """The examples in order; none if the file does not exist. Raises EvaluationError, with the line, if
        one cannot be read."""
        path = self.folder / EXAMPLES
        if not path.exists():
            return
        try:
            lines = path.open("rb")
        except OSError as error:
            message = f"cannot be read: {error.strerror}"
            raise EvaluationError(message, where=str(path), hint=_hint(self.run_dir)) from error
        with lines:
            for number, line in enumerate(lines, 1):
                if line.strip():
                    yield _example(line, f"{path}:{number}", _hint(self.run_dir))


def read(run_dir: Path) -> tuple[list[Record], list[EvaluationError]]:
    """The records of a run by folder name, and an error for each that cannot be read."""
    records: list[Record] = []
    unreadable: list[EvaluationError] = []
    for path in sorted((run_dir / EVALS).glob(f"*/{SCORE}")):
        try:
            records.append(_record(path))
        except EvaluationError as error:
            unreadable.append(error)
    return records, unreadable


def write(record: Record, examples: Sequence[ExampleRecord]) -> None:
    """Write both files of ``record`` into its folder."""
    record.folder.mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    for example in examples:
        line = asdict(example)
        if example.base is None:
            line = {key: line[key] for key in line if not key.startswith("base") and key != "change"}
        lines.append(json.dumps(line, ensure_ascii=False))
    write_text(record.folder / EXAMPLES, "\n".join(lines) + "\n")
    content = asdict(record)
    left_out = {"folder"} if record.unseen is not None else {"folder", "unseen"}
    write_json(record.folder / SCORE, {key: content[key] for key in content if key not in left_out})


def write_scores(record: Record, scores: Sequence[Score]) -> None:
    """Replace the scores of a written record; the file is left alone if they are the same."""
    if tuple(scores) != record.scores:
        path = record.folder / SCORE
        content = read_json(path, dict[str, Any], EvaluationError, _hint(record.run_dir))
        write_json(path, content | {"scores": list(map(asdict, scores))})


class _Scores(TypedDict):
    """The part of ``score.json`` that no release may lack."""

    scores: list[Score]


def _record(path: Path) -> Record:
    hint = _hint(path.parent.parent.parent)
    content = read_json(path, dict[str, Any], EvaluationError, hint)
    scores = checked(content, _Scores, str(path), EvaluationError, hint)["scores"]
    known = {item.name for item in fields(Record)}
    stated = {key: value for key, value in content.items() if key in known}
    folder_task, _, rest = path.parent.name.partition("@")
    stated["task"] = stated.get("task") or (scores[0].task if scores else folder_task)
    stated["version"] = stated.get("version") or (scores[0].version if scores else rest.partition("+")[0])
    stated |= {"folder": path.parent, "scores": tuple(scores)}
    return checked(stated, Record, str(path), EvaluationError, hint)


def _example(line: bytes, where: str, hint: str) -> ExampleRecord:
    content = parse_json(line, dict[str, Any], where, EvaluationError, hint)
    values: dict[str, Any] = {"prompt": None, "reference": None, "tuned_detail": {}, "tuned_answer": None}
    return checked(values | content, ExampleRecord, where, EvaluationError, hint)


def _hint(run_dir: Path) -> str:
    return f"evaluate again: tunesmith evaluate {shlex.quote(str(run_dir))}"
