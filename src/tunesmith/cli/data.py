"""``show`` and ``audit``: what is in the data."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import tunesmith
from tunesmith.cli.options import (
    Accept,
    AsJson,
    Config,
    Control,
    DataFiles,
    Model,
    Preset,
    Set,
    Tokenizer,
    print_json,
    progress,
    say,
)
from tunesmith.display.text import escaped, many
from tunesmith.machine import imports

if TYPE_CHECKING:
    from tunesmith.auditing.findings import Audit
    from tunesmith.tokens.template import Rendered, Row

SHOWN_ROWS = 5


def show(
    data: DataFiles,
    model: Model = None,
    tokenizer: Tokenizer = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="only the first rows (default 5; all with --json)")
    ] = None,
    config: Config = None,
    preset: Preset = None,
    sets: Set = None,
    control: Control = False,
    as_json: AsJson = False,
) -> None:
    """Print rows as the model would learn them: learned tokens coloured (or between ⟦ and ⟧ without
    colour). Of a run: its held-out rows. Rows of ``data.mix`` follow apart."""
    with progress() as notify:
        rendered, renderer = tunesmith.show(
            data,
            model=model,
            tokenizer=tokenizer,
            config=config or (),
            preset=preset,
            sets=sets or (),
            environ=os.environ,
            limit=limit if limit is not None or as_json else SHOWN_ROWS,
            notify=notify,
        )
    from tunesmith.preflight.show import DISTILLED

    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    decode = renderer.decode if control else lambda ids: escaped(renderer.decode(ids))
    of_read = "" if limit is None and as_json else f" of the first {limit or SHOWN_ROWS} that can be read"
    mixed: dict[str | None, Rendered] = {**rendered.mixed}
    for mix, part in ({None: rendered} | mixed).items():
        for row in part.rows:
            if as_json:
                print_json({**_as_json(row), "mix": mix, "distilled": DISTILLED in part.notes})
            else:
                typer.echo(_marked(row, decode, colour=colour))
        _tell_counts(part, "" if mix is None else f"data.mix: {mix}: ", of_read)


def _tell_counts(rendered: Rendered, prefix: str, of_read: str) -> None:
    """How many rows were shown, and which were left out."""
    if rendered.dropped:
        from tunesmith.data.formats import faults, hints, reasons

        left_out = f"rows left out ({reasons(rendered.dropped)}):\n{faults(rendered.dropped)}"
        say(f"{prefix}{left_out}", err=True)
        for hint in hints(rendered.dropped):
            say(f"hint: {hint}", err=True)
    notes = "".join(f"; {note}: {count}" for note, count in sorted(rendered.notes.items()))
    shown = f"{many(len(rendered.rows), 'row')} shown{of_read}, {len(rendered.dropped)} left out{notes}"
    say(f"{prefix}{shown}", err=True)


def _as_json(row: Row) -> dict[str, object]:
    return {
        "source": row.source,
        "id": row.example_id,
        "turn": row.turn,
        "label": row.label,
        "ids": row.tokens.ids.tolist(),
        "targets": row.tokens.targets.tolist(),
    }


def _marked(row: Row, decode: Callable[[list[int]], str], *, colour: bool) -> str:
    """The row's text, its learned spans in green or between ⟦ and ⟧."""
    from tunesmith.preflight.show import heading, pieces

    mark = "\x1b[1;32m{}\x1b[0m" if colour else "⟦{}⟧"
    text = "".join(mark.format(piece) if learned else piece for piece, learned in pieces(row, decode))
    return f"── {escaped(heading(row))} ──\n{text}\n"


def audit(
    data: DataFiles,
    model: Annotated[
        str | None, typer.Option(help="its tokenizer counts tokens, its hidden states place prompts")
    ] = None,
    tokenizer: Tokenizer = None,
    against: Annotated[
        list[str] | None, typer.Option(help="evaluation set or prompts that no row may repeat; repeatable")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="compare the first files with these; repeatable")
    ] = None,
    fix: Annotated[
        Path | None, typer.Option(help="write a corrected copy here, and a ledger of every change beside it")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="where the page is written (default: audit.html; none with --json)")
    ] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="write no page")] = False,
    accept: Accept = None,
    embed: Annotated[
        bool | None,
        typer.Option(
            help="place prompts by the model's hidden states instead of words (default: if --model is given)"
        ),
    ] = None,
    config: Config = None,
    preset: Preset = None,
    sets: Set = None,
    as_json: AsJson = False,
) -> None:
    """Find what would ruin a fine-tune: duplicates, conflicts, leaks, secrets, wrong labels, …; exit status 3
    with errors."""
    imports.hide("pandas")  # scikit-learn imports it wherever it is installed
    page = html or (None if no_html or as_json else Path("audit.html"))
    with progress() as notify:
        result = tunesmith.audit(
            data,
            model=model,
            tokenizer=tokenizer,
            against=against or (),
            accept=accept or (),
            compare=compare or (),
            fix=fix,
            page=page,
            embed=embed,
            config=config or (),
            preset=preset,
            sets=sets or (),
            environ=os.environ,
            notify=notify,
        )
    if as_json:
        print_json(result.to_json())
    else:
        _print_audit(result, page)
    if result.of("error"):
        raise typer.Exit(3)


def _print_audit(result: Audit, page: Path | None) -> None:
    from rich.console import Console

    from tunesmith.auditing import comparison, screen

    screen.render(result, Console())
    if result.compared is not None:
        say(comparison.told(result.compared))
    if result.fixed is not None:
        say(result.fixed.told())
    if page is not None:
        say(f"page: {page}")
