"""``serve``: answer over HTTP."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import tunesmith
from tunesmith.cli.options import AsJson, Checkpoint, print_json, progress, say
from tunesmith.errors import ConfigError

Runs = Annotated[
    list[str] | None,
    typer.Argument(metavar="[[NAME=]RUN]...", help="run directories or tags of one base; or one model"),
]
BaseModelPath = Annotated[
    str | None, typer.Option("--model", help="where the base lies; without runs, the model to serve")
]
Host = Annotated[str, typer.Option(help="address to listen at; one that others can reach needs --keys")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="0: a free one")]
Keys = Annotated[Path | None, typer.Option(help="JSON file of the keys that may ask")]
Fallback = Annotated[
    list[str] | None,
    typer.Option(help="model that answers if the one that was asked cannot, such as base; repeatable"),
]
Guardrails = Annotated[Path | None, typer.Option(help="YAML file of the guardrails")]
AbTests = Annotated[
    list[str] | None,
    typer.Option("--ab", help="one name for several models: writer=runs/a:0.5,runs/b:0.5; repeatable"),
]
VotesFile = Annotated[
    Path | None, typer.Option("--votes", help="where votes go; default: votes.jsonl of the first run")
]
BatchSize = Annotated[int, typer.Option(min=1, help="most answers under way at once")]
Memory = Annotated[
    float | None, typer.Option(min=0.0, help="GB that it may use; default: nine tenths of the machine's")
]
PrefixMemory = Annotated[
    float | None, typer.Option(min=0.0, help="of these, GB for prompts that were read; default: a tenth")
]
PrefixFolder = Annotated[
    Path | None, typer.Option(help="where prompts that were read are kept, also for later servers")
]
KvBits = Annotated[int | None, typer.Option(help="8 or 4: keep keys and values in so many bits")]
Draft = Annotated[
    str,
    typer.Option(help="what guesses tokens of an answer alone under way: prompt, a smaller model, or off"),
]
Limit = Annotated[
    list[str] | None, typer.Option(help="one limit, such as queue=64 or total_s=300; repeatable")
]
Log = Annotated[Path | None, typer.Option(help="file of the access log, JSON lines; default: stderr")]
LogContents = Annotated[bool, typer.Option("--log-contents", help="also log what was asked and answered")]
Bench = Annotated[
    float | None,
    typer.Option(
        min=0.001, metavar="RATE", help="measure instead: ask itself RATE times a second, at random moments"
    ),
]
BenchSeconds = Annotated[
    float | None, typer.Option(min=0.1, help="how long --bench sends requests (default: 30)")
]


def serve(
    runs: Runs = None,
    model: BaseModelPath = None,
    checkpoint: Checkpoint = "best",
    host: Host = "127.0.0.1",
    port: Port = 8080,
    keys: Keys = None,
    fallback: Fallback = None,
    guardrails: Guardrails = None,
    ab: AbTests = None,
    votes: VotesFile = None,
    batch_size: BatchSize = 16,
    memory: Memory = None,
    prefix_memory: PrefixMemory = None,
    prefix_folder: PrefixFolder = None,
    kv_bits: KvBits = None,
    draft: Draft = "prompt",
    limit: Limit = None,
    log: Log = None,
    log_contents: LogContents = False,
    bench: Bench = None,
    bench_seconds: BenchSeconds = None,
    as_json: AsJson = False,
) -> None:
    """Answer over HTTP, as OpenAI's API does: a base and any number of adapters in one batch."""
    if bench is None and (as_json or bench_seconds is not None):
        hint = "add --bench RATE, or leave out --json and --bench-seconds"
        raise ConfigError("there is nothing to print or to time without a measurement", hint=hint)
    with progress() as notify:
        report = tunesmith.serve(
            runs or (),
            model=model,
            checkpoint=checkpoint,
            host=host,
            port=port,
            keys=keys,
            fallback=fallback or (),
            guardrails=guardrails,
            ab=ab or (),
            votes=votes,
            batch_size=batch_size,
            memory_gb=memory,
            prefix_gb=prefix_memory,
            prefix_folder=prefix_folder,
            kv_bits=kv_bits,
            draft=draft,
            limits=limit or (),
            log=log,
            log_contents=log_contents,
            bench=bench,
            bench_seconds=bench_seconds or 30.0,
            announce=say,
            notify=notify,
        )
    if report is not None:
        from tunesmith.serving import load

        print_json(report) if as_json else say(load.described(report))
