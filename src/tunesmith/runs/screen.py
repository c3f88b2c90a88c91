"""Runs in the terminal: the list, the lineage of one as a tree, and what can be pruned."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from tunesmith.display import words
from tunesmith.display.console import size
from tunesmith.display.text import escaped, many
from tunesmith.runs.ancestry import RELATIONS, Ancestry, Child, Parent
from tunesmith.runs.artefacts import Exported
from tunesmith.runs.pruning import Pruning
from tunesmith.runs.registry import RegisteredRun

PIPED = 200
"""Columns where there is no terminal."""
WIDE = 120
"""Columns of a terminal that are enough for one line a run."""
LONGEST = 42
"""Characters of a verdict in the list; `tunesmith report RUN` prints all of it."""
STYLES = {True: "green", False: "red", None: ""}


def console() -> Console:
    """The standard output. A table is not folded to the eighty columns that a pipe would be given."""
    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=PIPED)


def render(runs: Sequence[RegisteredRun], folder: Path, screen: Console) -> None:
    """Print the runs, then what is wrong with the damaged ones."""
    if screen.width >= WIDE:
        screen.print(_table(runs, folder))
    else:
        for run in runs:
            _print_lines(run, folder, screen)
    for run in runs:
        for fault in run.faults:
            screen.print(_text(f"damaged: {fault}"), style="red", soft_wrap=True)
    screen.print(_text(f"{many(len(runs), 'run')}, {size(sum(run.size_bytes for run in runs))}"), style="dim")


def _table(runs: Sequence[RegisteredRun], folder: Path) -> Table:
    """One line a run."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("run", "made", "model", "data", "objective", "best", "verdict", "state", "tags"):
        table.add_column(title, no_wrap=title in ("made", "best"), overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for run in runs:
        table.add_row(*map(_text, _cells(run, folder)), _verdict(run), *map(_text, _end(run)))
    return table


def _print_lines(run: RegisteredRun, folder: Path, screen: Console) -> None:
    """A few short lines, for a narrow window."""
    name, *facts = _cells(run, folder)
    state, tags, room = _end(run)
    screen.print(_text(f"{name}  {tags}".rstrip()), style="bold")
    screen.print(_text("   " + ", ".join(fact for fact in (*facts, state, room) if fact)))
    if run.verdict:
        screen.print(Text("   ").append_text(_verdict(run)))


def _text(text: str) -> Text:
    return Text(escaped(text))


def _cells(run: RegisteredRun, folder: Path) -> list[str]:
    name = run.path.relative_to(folder) if folder in run.path.parents else run.path
    data = [Path(file).name for file in (*run.data, *run.mixed)]
    more = f" and {len(data) - 1} more" if len(data) > 1 else ""
    made = (run.created or "")[:16].replace("T", " ")
    model = Path(run.model).name if run.model else ""
    return [str(name), made, model, data[0] + more if data else "", run.objective or "", _best(run)]


def _best(run: RegisteredRun) -> str:
    if run.best is None:
        return ""
    return f"{run.best.metric.removeprefix('validation ')} {words.number(run.best.value)}"


def _verdict(run: RegisteredRun) -> Text:
    line = run.verdict or ""
    shown = line if len(line) <= LONGEST else f"{line[: LONGEST - 1].rstrip()}…"
    return Text(escaped(shown), style=STYLES[run.ship])


def _end(run: RegisteredRun) -> list[str]:
    state = run.state or "damaged"
    return [
        words.STATES[state] if state == "stopped_early" else state,
        " ".join(run.tags),
        size(run.size_bytes),
    ]


def render_lineage(ancestry: Ancestry, screen: Console) -> None:
    """Print the run, what it was made from and what was made from it."""
    run = ancestry.run
    tree = Tree(_text(_described(run)))
    above = tree.add("made from")
    above.add(_text(f"the model {run.model or '(unknown)'}"))
    for file in run.data:
        above.add(_text(f"the data {file}"))
    for file in run.mixed:
        above.add(_text(f"mixed in: {file}"))
    for parent in ancestry.parents:
        _add_parent(above, parent)
    below = tree.add("used by")
    for child in ancestry.children:
        _add_child(below, child)
    for export in ancestry.exports:
        below.add(_text(_exported(export)))
    if not below.children:
        place = "the current folder" if ancestry.folder == Path() else str(ancestry.folder)
        below.add(_text(f"nothing under {place}"))
    screen.print(tree, soft_wrap=True)
    if run.verdict:
        screen.print(_text(run.verdict), soft_wrap=True)
    for fault in (*run.faults, *ancestry.faults):
        screen.print(_text(f"damaged: {fault}"), style="red", soft_wrap=True)


def _described(run: RegisteredRun, how: str = "") -> str:
    """how: its relation to another run."""
    best = f"best {_best(run)}" if run.best else ""
    parts = [how, run.objective or "", run.state or "damaged", best, " ".join(run.tags)]
    return f"{run.path}: {', '.join(part for part in parts if part)}"


def _add_parent(tree: Tree, parent: Parent) -> None:
    gone = "" if parent.checkpoint.is_dir() else " (no longer there)"
    share = "" if parent.weight is None else f"{parent.weight:g} × "
    branch = tree.add(_text(f"{RELATIONS[parent.relation]} {share}{parent.checkpoint}{gone}"))
    for above in parent.parents:
        _add_parent(branch, above)


def _add_child(tree: Tree, child: Child) -> None:
    how = f"{RELATIONS[child.relation]} checkpoint {child.step}"
    branch = tree.add(_text(_described(child.run, how)))
    for below in child.children:
        _add_child(branch, below)


def _exported(export: Exported) -> str:
    verdict = "accepted" if export.accepted else "REJECTED"
    return f"exported to {export.kind}: {export.path}, of checkpoint {export.checkpoint}, {verdict}"


def render_pruning(pruning: Pruning, screen: Console) -> None:
    """Print what can go, or what went."""
    went = {item.path for item in pruning.deleted}
    table = Table(box=None, pad_edge=False, show_header=False)
    for item in pruning.proposed:
        deleted = "deleted" if item.path in went else ""
        table.add_row(
            _text(item.kind), _text(str(item.path)), _text(item.why), size(item.size_bytes), deleted
        )
    if pruning.proposed:
        screen.print(table)
    for path, why in pruning.refused:
        screen.print(_text(f"not deleted: {path}: {why}"), style="red", soft_wrap=True)
    if not pruning.proposed:
        screen.print("nothing can go")
    elif pruning.deleted or pruning.refused:
        screen.print(f"{size(sum(item.size_bytes for item in pruning.deleted))} are free now")
    else:
        total = size(sum(item.size_bytes for item in pruning.proposed))
        screen.print(f"{total} can go: the same command with --delete removes them")
