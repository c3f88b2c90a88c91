"""Which artefact is the smallest that loses nothing? Several kinds of one run, each exported and measured
alike: memory against speed against quality."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import events, reports
from tunesmith.display.console import size
from tunesmith.errors import ConfigError, EvaluationError, ExportError, SetupError
from tunesmith.events import Notice, Sink
from tunesmith.exports import judging, kind, verb
from tunesmith.exports.gate import ROWS, Gate, Scope
from tunesmith.exports.kind import ExportKind
from tunesmith.files import draft, remove_drafts, workspace, write_json
from tunesmith.reports.measures import interval
from tunesmith.runs import artefacts, checkpoints, opening
from tunesmith.runs.artefacts import Exported
from tunesmith.runs.directory import EXPORTS, Run
from tunesmith.runs.records import Score

TABLE, PICTURE = "table.json", "table.png"
HEAD = ("kind", "size", "memory", "tokens/s", "KL", "effect kept", "loss less live, 95 % interval", "")


@dataclass(frozen=True)
class TableEntry:
    """A kind and its artefact; ``refused``: why there is none. ``retained``: whether the artefact is still on
    the disk."""

    kind: str
    exported: Exported | None = None
    refused: str | None = None
    retained: bool = True

    @property
    def regressed(self) -> list[Score]:
        """The scores that are shown to be worse than the live adapter's."""
        if self.exported is None:
            return []
        scores = [*([self.exported.loss] if self.exported.loss else []), *self.exported.scores]
        return [score for score in scores if score.verdict == "regressed"]

    @property
    def record(self) -> dict[str, Any] | None:
        """The content of ``export.json``, without the path of an artefact that was discarded."""
        if self.exported is None:
            return None
        record = self.exported.to_json()
        return record if self.retained else record | {"path": None}

    @property
    def state(self) -> str:
        if self.exported is None:
            return f"refused: {self.refused}"
        if not self.exported.accepted:
            return f"rejected: {self.exported.reasons[0]}"
        names = ", ".join(f"{score.name}" for score in self.regressed)
        return f"worse: {names}" if names else "no loss shown"


@dataclass(frozen=True)
class ExportTable:
    """``folder``: holds the table, its picture, and the artefacts unless they were discarded."""

    folder: Path
    checkpoint: str
    entries: tuple[TableEntry, ...]

    @property
    def smallest(self) -> Exported | None:
        """The smallest of the accepted models that are not shown to be worse than the live adapter. An
        adapter alone needs its base, so it is left out."""
        candidates = [
            entry.exported
            for entry in self.entries
            if entry.exported is not None
            and entry.exported.accepted
            and not entry.regressed
            and kind.named(entry.kind).stands_alone
        ]
        return min(candidates, key=lambda exported: exported.size_bytes, default=None)

    @property
    def accepted(self) -> bool:
        """Whether any artefact was accepted."""
        return any(entry.exported is not None and entry.exported.accepted for entry in self.entries)

    def to_json(self) -> dict[str, Any]:
        return {
            "checkpoint": self.checkpoint,
            "smallest": self.smallest and self.smallest.kind,
            "kinds": [
                {
                    "kind": entry.kind,
                    "refused": entry.refused,
                    "regressed": [score.name for score in entry.regressed],
                    "export": entry.record,
                }
                for entry in self.entries
            ],
        }

    @property
    def lines(self) -> Iterator[str]:
        """The table, and the answer."""
        yield from _aligned([HEAD, *map(_cells, self.entries)])
        smallest = self.smallest
        if smallest is None:
            yield "every model of the table is rejected or loses something that can be shown"
        else:
            loss = "" if smallest.loss is None else f", loss {_loss(smallest.loss)} against the live adapter"
            yield f"the smallest that loses nothing that can be shown: {smallest.kind}, {_of(smallest)}{loss}"


def export_table(
    run: str | Path,
    kinds: Sequence[str],
    *,
    out: str | Path | None = None,
    keep: bool = True,
    rows: int = ROWS,
    checkpoint: str = "best",
    model: str | None = None,
    evaluate: bool = False,
    tasks: Sequence[str] = (),
    limit: int | None = None,
    notify: Sink = events.silent,
) -> ExportTable:
    """Export the run as each of ``kinds`` and measure all of them against the live adapter.

    out: folder for the artefacts, the table and its picture (default: ``exports`` in the run). keep False:
    remove each artefact once it is measured. An accepted artefact that is there already is taken as it is, if
    the same was measured of it by the same program, without tasks. All else as for `tunesmith.export`, but a
    kind that is refused or an artefact that is rejected is a line of the table."""
    chosen, opened = [kind.named(name) for name in dict.fromkeys(kinds)], Run.open(run)
    scope = verb.scope(rows, evaluate, tasks, limit)
    if not chosen:
        raise ConfigError("names no kind", where="--table", hint="--table mlx:16,mlx:8,mlx:4,gguf:q8_0")
    parent = opened.path / EXPORTS if out is None else Path(out)
    folder = checkpoints.choose(opened, checkpoint, notify)
    source = opening.of_run(opened, folder, model)
    parent.mkdir(parents=True, exist_ok=True)
    remove_drafts(parent, TABLE)
    known = {each.name: _earlier(parent / each.name, each, opened, folder, scope) for each in chosen if keep}
    for each in chosen:
        if keep and known[each.name] is None:
            verb.require_free(parent / each.name)
    entries: list[TableEntry] = []
    with checkpoints.held(folder), workspace(parent / TABLE) as work:
        gate = Gate(source, scope, work, notify)
        for each in chosen:
            earlier = known.get(each.name)
            if earlier is not None:
                judge = earlier.judged_by
                text = f"{each.name}: there already, taken as it was measured, judged by {judge}"
                notify(Notice(text, where=str(earlier.path)))
                entries.append(TableEntry(each.name, earlier))
            else:
                entries.append(_entry(gate, each, work, parent / each.name if keep else None))
    table = ExportTable(parent, folder.name, tuple(entries))
    write_json(parent / TABLE, table.to_json())
    with draft(parent / PICTURE) as path:
        _draw(table, path)
    if parent.resolve() == (opened.path / EXPORTS).resolve():
        reports.write(opened.path)
    return table


def _entry(gate: Gate, chosen: ExportKind, work: Path, target: Path | None) -> TableEntry:
    """target: None: the artefact is not kept."""
    try:
        chosen.require_installed()
        if target is not None:
            return TableEntry(chosen.name, verb.place(gate, chosen, work, target))
        with workspace(work / "discarded") as artefact:
            return TableEntry(chosen.name, gate.make(chosen, artefact), retained=False)
    except (ExportError, SetupError) as error:
        return TableEntry(chosen.name, refused=error.what + (f" ({error.hint})" if error.hint else ""))


def _earlier(target: Path, chosen: ExportKind, run: Run, checkpoint: Path, scope: Scope) -> Exported | None:
    """The artefact at ``target`` if the same weights on the same base were measured in the same way, by the
    program that would judge it now. A record of an earlier release does not say so."""
    try:
        exported = artefacts.load(target)
    except EvaluationError:
        return None
    recorded = exported.checkpoint, exported.adapter_sha256, exported.base_sha256, exported.rows_limit
    expected = checkpoint.name, checkpoints.weights_hash(checkpoint), run.hashes["base"], scope.rows
    measured = exported.loss is not None and exported.accepted and not scope.tasks
    same = recorded == expected and judging.is_up_to_date(exported, chosen)
    return exported if measured and same else None


def _cells(entry: TableEntry) -> tuple[str, ...]:
    exported = entry.exported
    if exported is None:
        return entry.kind, *[""] * (len(HEAD) - 2), entry.state
    kl, cost, loss = exported.distances, exported.cost, exported.loss
    return (
        entry.kind,
        size(exported.size_bytes),
        "–" if cost is None else size(cost.memory_bytes),
        "–" if cost is None else interval(cost.speed, bare=True),
        f"{kl.mean:.2g}",
        "–" if kl.survived is None else f"{kl.survived:.1%}",
        "–" if loss is None else _loss(loss),
        entry.state,
    )


def _aligned(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Columns as wide as their widest cell; the first and the last to the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for first, *middle, last in rows:
        cells = [value.rjust(width) for value, width in zip(middle, widths[1:-1], strict=True)]
        yield "  ".join([first.ljust(widths[0]), *cells, last]).rstrip()


def _loss(score: Score) -> str:
    return interval(score, of="delta", bare=True)


def _of(exported: Exported) -> str:
    parts = [size(exported.size_bytes)]
    if exported.cost is not None:
        parts += [f"memory {size(exported.cost.memory_bytes)}", interval(exported.cost.speed)]
    return ", ".join(parts)


def _draw(table: ExportTable, path: Path) -> None:
    """A PNG: the loss against the live adapter over size, memory and speed. A marker tells a kind that is
    rejected or worse without colour."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.6), dpi=110, layout="constrained")
    columns: list[tuple[str, Callable[[Exported], list[float] | None]]] = [
        ("size on disk (MB)", lambda exported: [exported.size_bytes / 1e6]),
        ("memory while answering (MB)", _memory),
        ("tokens a second, more is better", _speed),
    ]
    panels: Any = figure.subplots(1, len(columns), sharey=True)
    for panel, (label, value_of) in zip(panels, columns, strict=True):
        panel.axhline(0, color="k", lw=1, ls=":")
        for entry in table.entries:
            if entry.exported is not None and (values := value_of(entry.exported)) is not None:
                _mark(panel, entry, values)
        panel.set_xlabel(label)
        panel.grid(alpha=0.3)
        panel.margins(x=0.18, y=0.15)
    panels[0].set_ylabel("loss less that of the live adapter (nats a token)")
    smallest = table.smallest
    answer = "none" if smallest is None else smallest.kind
    title = f"The smallest that loses nothing that can be shown: {answer}"
    figure.suptitle(f"{title}   (circle: no loss shown, triangle: worse, cross: rejected)", fontsize=10)
    FigureCanvasAgg(figure).print_png(path)


def _memory(exported: Exported) -> list[float] | None:
    return None if exported.cost is None else [exported.cost.memory_bytes / 1e6]


def _speed(exported: Exported) -> list[float] | None:
    """Value, low and high."""
    if exported.cost is None:
        return None
    speed = exported.cost.speed
    return [end for end in (speed.value, speed.low, speed.high) if end is not None]


def _mark(panel: Any, entry: TableEntry, values: Sequence[float]) -> None:
    assert entry.exported is not None
    loss = entry.exported.loss
    if loss is None or loss.delta is None:
        return
    marker = "X" if not entry.exported.accepted else "v" if entry.regressed else "o"
    colour = "tab:red" if marker != "o" else "tab:green"
    if loss.delta_low is not None and loss.delta_high is not None:
        panel.plot([values[0]] * 2, [loss.delta_low, loss.delta_high], color="0.35", lw=1.4, marker="_")
    if len(values) == 3:
        panel.plot(values[1:], [loss.delta] * 2, color="0.35", lw=1.4, marker="|")
    panel.plot(values[:1], [loss.delta], marker=marker, ms=9, mfc=colour, mec="k", ls="")
    panel.annotate(entry.kind, (values[0], loss.delta), xytext=(7, 6), textcoords="offset points", fontsize=8)
