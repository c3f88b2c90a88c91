"""Options that several verbs share, and how a verb prints results and progress."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from tunesmith.display import console
from tunesmith.display.text import escaped
from tunesmith.events import Sink

Model = Annotated[str | None, typer.Option(help="model folder, GGUF file or hub id")]
Data = Annotated[
    list[str] | None,
    typer.Option(help="JSONL or JSON file (may be compressed), CSV, Parquet, or a folder; repeatable"),
]
DataFiles = Annotated[list[str], typer.Argument(help="data files")]
Config = Annotated[list[Path] | None, typer.Option(help="YAML file; repeatable, later ones win")]
Preset = Annotated[
    str | None, typer.Option(help="a named set of settings; `tunesmith init --presets` lists them")
]
Set = Annotated[
    list[str] | None,
    typer.Option("--set", help="one setting, such as optimizer.learning_rate=2e-4; repeatable"),
]
Tokenizer = Annotated[str | None, typer.Option(help="mistral-v3, or a folder with tokenizer files")]
Accept = Annotated[
    list[str] | None, typer.Option(help="accept a finding, such as duplicates or content.secrets; repeatable")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]
RunDirectory = Annotated[Path, typer.Argument(help="run directory, or its tag")]
Checkpoint = Annotated[str, typer.Option(help="best, last, or a step")]
MovedModel = Annotated[
    str | None, typer.Option("--model", help="path of the run's model, if it was moved since training")
]


Control = Annotated[
    bool, typer.Option("--control", help="print control characters as they are: the terminal obeys them")
]
_OBEYED = re.compile("[\x7f-\x9f\ud800-\udfff]")
"""What JSON leaves as it is, and a terminal obeys or UTF-8 cannot hold."""


def print_json(value: object) -> None:
    text = json.dumps(value, ensure_ascii=False)
    typer.echo(_OBEYED.sub(lambda match: f"\\u{ord(match[0]):04x}", text))


def say(text: str, *, err: bool = False, control: bool = False) -> None:
    """Print text that may come from data or a model: control characters are written out, unless
    ``control``."""
    typer.echo(text if control else escaped(text), err=err)


@contextmanager
def progress(after_interrupt: str = "") -> Iterator[Sink]:
    """Progress on stderr. after_interrupt: what the user is told after Ctrl-C."""
    try:
        with console.sink(sys.stderr) as notify:
            yield notify
    except KeyboardInterrupt:
        typer.echo(f"interrupted{after_interrupt}", err=True)
        raise typer.Exit(130) from None
