"""The command line: parse, call the function of the same name, print. Results on stdout, progress on stderr.

Exit status: 0 done, 1 unexpected, 2 settings, 3 data, 4 template, 5 model, 6 training, 7 evaluation, 8
export, 9 server, 10 set-up, 130 interrupted (with what was saved, and how to go on)."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

import tunesmith
from tunesmith.display import console
from tunesmith.errors import TunesmithError
from tunesmith.events import Sink
from tunesmith.machine import backend

app = typer.Typer(
    name="tunesmith",
    help="Fine-tune language models on your own machine, with proof that it worked.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Model = Annotated[str | None, typer.Option(help="model folder, GGUF file or hub id")]
Data = Annotated[
    list[str] | None, typer.Option(help="JSONL, JSON, either gzipped, or a folder of them; repeatable")
]
Config = Annotated[list[Path] | None, typer.Option(help="YAML file; repeatable, later ones win")]
Preset = Annotated[
    str | None, typer.Option(help="a named set of settings; `tunesmith init --presets` lists them")
]
Set = Annotated[
    list[str] | None, typer.Option("--set", help="one setting, as optimizer.learning_rate=2e-4; repeatable")
]
Tokenizer = Annotated[str | None, typer.Option(help="mistral-v3, or a folder with tokenizer files")]
Accept = Annotated[
    list[str] | None, typer.Option(help="let a finding pass, as duplicates or content.secrets; repeatable")
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for machines")]
Checkpoint = Annotated[str, typer.Option(help="best, last, or a step")]


def _out(value: object) -> None:
    typer.echo(json.dumps(value, ensure_ascii=False))


@contextmanager
def _watch(kept: str = "") -> Iterator[Sink]:
    """Progress on stderr. kept: what an interrupted user has, and how to go on."""
    try:
        with console.sink(sys.stderr) as notify:
            yield notify
    except KeyboardInterrupt:
        typer.echo(f"interrupted{kept}", err=True)
        raise typer.Exit(130) from None


@app.command()
def init(
    preset: Preset = None,
    model: Model = None,
    data: Data = None,
    presets: Annotated[bool, typer.Option("--presets", help="list the presets instead")] = False,
    schema: Annotated[
        bool, typer.Option("--schema", help="print the JSON schema of the settings, for editors")
    ] = False,
) -> None:
    """Print an annotated configuration; `tunesmith init > run.yaml`."""
    if presets or schema:
        from tunesmith.settings import config

        if presets:
            for name, path in sorted(config.presets().items()):
                typer.echo(f"{name}\t{path.read_text(encoding='utf-8').splitlines()[0].lstrip('# ')}")
            return
        backend.setup()
        from tunesmith.runs.directory import RunConfig

        _out(config.schema(RunConfig))
        return
    typer.echo(tunesmith.init(preset=preset, model=model, data=data or ()), nl=False)


@app.command()
def doctor(
    path: Annotated[Path, typer.Argument(help="where runs will be written")] = Path("."),
    overfit: Annotated[bool, typer.Option(help="train a tiny model for ten steps")] = True,
    as_json: AsJson = False,
) -> None:
    """Check this machine: versions, device, memory, disk, BLAS, and a ten-step overfit."""
    from tunesmith.preflight import doctor as preflight

    with _watch() as notify:
        found = tunesmith.doctor(path, overfit=overfit, notify=notify)
    if as_json:
        _out(found)
    else:
        typer.echo(preflight.render(found["checks"]))
    if not found["ok"]:
        raise typer.Exit(10)


@app.command()
def show(
    data: Annotated[list[str], typer.Argument(help="data files")],
    model: Model = None,
    tokenizer: Tokenizer = None,
    limit: Annotated[
        int | None, typer.Option(min=1, help="only the first rows (default 5; all with --json)")
    ] = None,
    config: Config = None,
    preset: Preset = None,
    sets: Set = None,
    as_json: AsJson = False,
) -> None:
    """Print rows as the model would learn them: learned tokens coloured (or between ⟦ and ⟧ without
    colour)."""
    rendered, renderer = tunesmith.show(
        data,
        model=model,
        tokenizer=tokenizer,
        config=config or (),
        preset=preset,
        sets=sets or (),
        environ=os.environ,
        limit=limit if limit is not None or as_json else 5,
    )
    for row in rendered.rows:
        if as_json:
            ids, targets = row.tokens.ids.tolist(), row.tokens.targets.tolist()
            _out(
                {
                    "source": row.source,
                    "id": row.example_id,
                    "turn": row.turn,
                    "label": row.label,
                    "ids": ids,
                    "targets": targets,
                }
            )
        else:
            typer.echo(
                _coloured(row, renderer.decode, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ)
            )
    for row in rendered.dropped:
        typer.echo(f"{row.source}: {row.reason}: {row.message}", err=True)
    notes = "".join(f"; {note}: {count}" for note, count in sorted(rendered.notes.items()))
    only = "" if limit is None and as_json else f" of the first {limit or 5} read"
    typer.echo(f"{len(rendered.rows)} rows shown{only}, {len(rendered.dropped)} left out{notes}", err=True)


@app.command()
def audit(
    data: Annotated[list[str], typer.Argument(help="data files")],
    model: Annotated[
        str | None, typer.Option(help="its tokenizer counts tokens, its hidden states place prompts")
    ] = None,
    tokenizer: Tokenizer = None,
    against: Annotated[
        list[str] | None, typer.Option(help="evaluation set or prompts no row may repeat; repeatable")
    ] = None,
    compare: Annotated[
        list[str] | None, typer.Option(help="hold these files against the first ones; repeatable")
    ] = None,
    fix: Annotated[
        Path | None, typer.Option(help="write a corrected copy here, and a ledger of every change beside it")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(help="the page (default: audit.html; none with --json)")
    ] = None,
    no_html: Annotated[bool, typer.Option("--no-html", help="no page")] = False,
    accept: Accept = None,
    embed: Annotated[
        bool | None, typer.Option(help="place prompts by hidden states, or by words (default: with --model)")
    ] = None,
    config: Config = None,
    preset: Preset = None,
    sets: Set = None,
    as_json: AsJson = False,
) -> None:
    """Find what would ruin a fine-tune: duplicates, conflicts, leaks, secrets, wrong labels, …; exit status 3
    with errors."""
    page = html or (None if no_html or as_json else Path("audit.html"))
    with _watch() as notify:
        found = tunesmith.audit(
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
        _out(found.to_json())
    else:
        from rich.console import Console

        from tunesmith.auditing import comparison as comparing
        from tunesmith.auditing import screen

        screen.render(found, Console())
        if found.compared is not None:
            typer.echo(comparing.told(found.compared))
        if found.fixed is not None:
            typer.echo(found.fixed.told())
        if page is not None:
            typer.echo(f"page: {page}")
    if found.of("error"):
        raise typer.Exit(3)


def _coloured(row, decode: Callable[[list[int]], str], *, colour: bool) -> str:
    ids, targets = row.tokens
    pieces: list[str] = []
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (targets[end] > 0) != (targets[start] > 0):
            text, learned = decode(ids[start:end].tolist()), targets[start] > 0
            if learned:
                text = f"\x1b[1;32m{text}\x1b[0m" if colour else f"⟦{text}⟧"
            pieces.append(text)
            start = end
    head = f"── {row.source}, turn {row.turn}: {len(ids)} tokens, {int((targets > 0).sum())} learned ──"
    return f"{head}\n{''.join(pieces)}\n"


@app.command()
def train(
    config: Config = None,
    preset: Preset = None,
    model: Model = None,
    data: Data = None,
    sets: Set = None,
    accept: Accept = None,
    out: Annotated[
        Path | None, typer.Option(help="the new run directory (default: runs/<day>-<model>-…)")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="go on with this run")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="check everything and count, train nothing")
    ] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="print every setting and where it came from")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune, or go on with an interrupted run."""
    from tunesmith import reports
    from tunesmith.errors import ConfigError

    if resume is not None:
        if config or preset or model or data or accept or out or dry_run or explain:
            raise ConfigError(
                "--resume takes its settings from the run", hint="only --set may stand beside it"
            )
        resolved = None
    else:
        resolved = tunesmith.configure(
            preset=preset,
            config=config or (),
            model=model,
            data=data or (),
            sets=sets or (),
            accept=accept or (),
            environ=os.environ,
        )
        if explain:
            from tunesmith.settings.config import explain as lines

            typer.echo("\n".join(lines(resolved)), err=not dry_run or as_json)
        if dry_run:
            if out is not None:
                from tunesmith.runs.directory import require_free

                require_free(out)
            with _watch() as notify:
                counts = tunesmith.plan(resolved, notify=notify)
            _out(counts)
            return
    with _watch() as notify:
        run = tunesmith.train(
            resolved, out=out, resume=resume, sets=(sets or ()) if resume else (), notify=notify
        )
    if run is None:
        return  # another rank speaks
    if as_json:
        _out(reports.summarise(run.path))
    else:
        typer.echo(reports.verdict_line(run.path))
        typer.echo(f"report: {run.path / 'report.html'}")
    if run.manifest["status"] == "interrupted":
        typer.echo(f"interrupted; go on with: {run.hint}", err=True)
        raise typer.Exit(130)


Task = Annotated[
    list[str] | None,
    typer.Option(
        help="perplexity, adherence, tool_calls, preference, drift, efficiency (default: all these), benchmarks"
    ),
]


Knowledge = Annotated[
    list[str] | None, typer.Option(help="file of choices for drift.knowledge, not our own; repeatable")
]
Text = Annotated[
    list[str] | None, typer.Option(help="file of general text for drift.text, not our own; repeatable")
]
Chats = Annotated[
    list[str] | None, typer.Option(help="file of plain chats for drift.chat, not our own; repeatable")
]
Safety = Annotated[
    list[str] | None, typer.Option(help="file of requests for drift.safety, not our own; repeatable")
]
Moved = Annotated[str | None, typer.Option("--model", help="where the run's model lies now, if it was moved")]


@app.command()
def evaluate(
    run: Annotated[Path, typer.Argument(help="run directory")],
    data: Data = None,
    checkpoint: Checkpoint = "best",
    model: Moved = None,
    task: Task = None,
    base: Annotated[bool, typer.Option(help="measure the base too, for the difference")] = True,
    limit: Annotated[
        int | None, typer.Option(min=1, help="only the first rows, and items of each suite")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longest answer to a row")] = 256,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="answers at once (default: 32 on a CPU, else 16)")
    ] = None,
    knowledge: Knowledge = None,
    text: Text = None,
    chats: Chats = None,
    safety: Safety = None,
    benchmark: Annotated[
        list[str] | None, typer.Option(help="mmlu, hellaswag, gsm8k, …, mmlu:astronomy; repeatable")
    ] = None,
    benchmark_data: Annotated[
        Path | None, typer.Option(help="folder with the benchmarks' files (default: the hub)")
    ] = None,
    shots: Annotated[
        int, typer.Option(min=0, help="solved examples before each question of a benchmark")
    ] = 0,
    allow_code: Annotated[
        bool, typer.Option("--allow-code", help="run code that the model writes, shut in")
    ] = False,
    embed: Annotated[bool, typer.Option(help="also compare meanings of answers by embeddings")] = True,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure again what is known from before")] = False,
    as_json: AsJson = False,
) -> None:
    """Score base and tuned on the held-out rows (or --data) and the suites: what improved, what was lost, how
    sure it is."""
    from tunesmith import reports

    with _watch("; what was measured is kept, and the same command goes on") as notify:
        found = tunesmith.evaluate(
            run,
            data=data or (),
            checkpoint=checkpoint,
            model=model,
            tasks=task or (),
            base=base,
            fresh=fresh,
            notify=notify,
            limit=limit,
            max_tokens=max_tokens,
            batch_size=batch_size,
            knowledge=tuple(knowledge or ()),
            text=tuple(text or ()),
            chats=tuple(chats or ()),
            safety=tuple(safety or ()),
            benchmarks=tuple(benchmark or ()),
            benchmark_data=None if benchmark_data is None else str(benchmark_data),
            shots=shots,
            allow_code=allow_code,
            embed=embed,
        )
    if found is None:
        return  # another rank speaks
    if as_json:
        _out(found.summary())
        return
    from rich.console import Console

    from tunesmith.reports import screen

    screen.render(found.scores, Console())
    typer.echo(reports.verdict_line(found.run.path))
    typer.echo(f"report: {found.run.path / 'report.html'}")


@app.command()
def compare(
    runs: Annotated[
        list[Path], typer.Argument(help="run directories; the first is what the others are held against")
    ],
    out: Annotated[Path, typer.Option(help="folder for compare.html, compare.md and compare.json")] = Path(
        "comparison"
    ),
    against: Annotated[Path | None, typer.Option(help="another run to hold the others against")] = None,
    as_json: AsJson = False,
) -> None:
    """Hold runs against each other: settings that differ, curves, and paired differences on the same
    prompts."""
    with _watch() as notify:
        found = tunesmith.compare(runs, out=out, against=against, notify=notify)
    if as_json:
        _out(found.to_json())
    else:
        typer.echo(found.verdict)
        typer.echo(f"page: {out / 'compare.html'}")


@app.command()
def watch(
    run: Annotated[Path, typer.Argument(help="run directory")],
    once: Annotated[bool, typer.Option("--once", help="print the curves as they are now")] = False,
) -> None:
    """Show the curves of a run in the terminal, while it trains or after."""
    tunesmith.watch(run, once=once)


@app.command()
def report(run: Annotated[Path, typer.Argument(help="run directory")]) -> None:
    """Write the report of a run anew."""
    from tunesmith import reports

    page = tunesmith.report(run).with_suffix(".html")
    found = reports.summarise(run)
    for told in found["unread"]:
        typer.echo(told, err=True)
    typer.echo(found["verdict"])
    typer.echo(f"report: {page}")


System = Annotated[str | None, typer.Option(help="system message")]
MaxTokens = Annotated[int, typer.Option(min=1, help="longest answer")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token")]
TopP = Annotated[float, typer.Option(min=0.0, max=1.0, help="keep the likeliest tokens of this total share")]
Seed = Annotated[int, typer.Option(min=0, help="decides what is drawn")]
Target = Annotated[str, typer.Argument(help="run directory, checkpoint folder, or model")]


@app.command()
def generate(
    target: Target,
    prompt: Annotated[
        list[str] | None, typer.Option(help="repeatable; without it, one prompt a line from stdin")
    ] = None,
    checkpoint: Checkpoint = "best",
    model: Moved = None,
    base: Annotated[bool, typer.Option("--base", help="the run's model without its adapter")] = False,
    system: System = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    as_json: AsJson = False,
) -> None:
    """Answer prompts, batched."""
    prompts = prompt or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    with _watch() as notify:
        answers = tunesmith.generate(
            target,
            prompts,
            checkpoint=checkpoint,
            model=model,
            adapter=not base,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            notify=notify,
        )
    for asked, answer in zip(prompts, answers, strict=True):
        if as_json:
            _out({"prompt": asked, "answer": answer})
        else:
            typer.echo(answer)


@app.command()
def chat(
    target: Target,
    checkpoint: Checkpoint = "best",
    model: Moved = None,
    system: System = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
) -> None:
    """Talk with a run or a model; an empty line or Ctrl-D ends it."""
    with _watch() as notify:
        talk = tunesmith.chat(
            target,
            checkpoint=checkpoint,
            model=model,
            system=system,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            notify=notify,
        )
    while True:
        typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        for piece in talk.say(line):
            sys.stdout.write(piece)
            sys.stdout.flush()
        typer.echo()


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


def main() -> None:
    """The entry point: errors a user can cause are told without a traceback."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # it misses PyTorch, which is not needed
    try:
        app()
    except TunesmithError as error:
        if os.environ.get("TUNESMITH_DEBUG"):
            raise
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("interrupted\n")
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
