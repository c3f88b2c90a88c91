"""What can be typed? One file for a group of verbs; each verb calls the Python function of its name.

Results go to stdout, progress to stderr. Exit status: 0 done, 1 unexpected, 2 settings, 3 data, 4 template, 5
model, 6 training, 7 evaluation, 8 export, 9 server, 10 set-up, 130 interrupted (with what was saved, and how
to go on)."""

from __future__ import annotations

import os
import sys
from typing import Annotated

import typer

from tunesmith.cli import (
    data,
    evaluation,
    examples,
    exporting,
    planning,
    probing,
    register,
    serving,
    setup,
    sweeping,
    talking,
    training,
    voting,
)
from tunesmith.display.text import escaped
from tunesmith.errors import TunesmithError
from tunesmith.machine import imports

__all__ = ["app", "main"]

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune language models on your own machine, with proof that it worked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (
    setup.init,
    setup.doctor,
    data.show,
    data.audit,
    planning.plan,
    training.train,
    training.watch,
    probing.probe,
    sweeping.sweep,
    evaluation.evaluate,
    evaluation.compare,
    evaluation.compose,
    evaluation.report,
    exporting.export,
    register.push,
    register.tag,
    talking.generate,
    talking.chat,
    voting.votes,
    serving.serve,
):
    kind = evaluation.EvaluateCommand if verb is evaluation.evaluate else None
    app.command(cls=kind, epilog=examples.shown(verb.__name__))(verb)
app.add_typer(register.app, epilog=examples.shown("runs"))


@app.callback(invoke_without_command=True)
def _options(
    context: typer.Context,
    debug: Annotated[bool, typer.Option("--debug", help="show tracebacks")] = False,
    version: Annotated[bool, typer.Option("--version", help="print the version")] = False,
) -> None:
    if version:
        from importlib.metadata import version as installed

        typer.echo(f"tunesmith {installed('tunesmith')}")
        raise typer.Exit
    if debug:
        os.environ["TUNESMITH_DEBUG"] = "1"


def _compares_with_torch(words: list[str]) -> bool:
    """Only ``doctor --model`` uses torch: the logits of transformers are the oracle."""
    return words[:1] == ["doctor"] and any(word.split("=")[0] == "--model" for word in words)


def main() -> None:
    """The entry point. An error that a user can cause is printed without a traceback."""
    if not _compares_with_torch(sys.argv[1:]):
        imports.hide("torch")  # transformers would load it, for nothing that the verb uses
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it warns that torch is missing
    try:
        app()
    except TunesmithError as error:
        if os.environ.get("TUNESMITH_DEBUG"):
            raise
        sys.stderr.write(f"error: {escaped(str(error))}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:  # of a file that no verb expected to fail
        if os.environ.get("TUNESMITH_DEBUG"):
            raise
        place = "" if error.filename is None else f"{escaped(str(error.filename))[:1000]}: "
        sys.stderr.write(f"error: {place}{error.strerror or error}\n")
        sys.exit(1)
