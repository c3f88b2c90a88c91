"""``generate`` and ``chat``: ask a run or a model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

import tunesmith
from tunesmith.cli.options import AsJson, Checkpoint, Control, MovedModel, print_json, progress, say
from tunesmith.display.text import escaped

Target = Annotated[str, typer.Argument(help="run directory or its tag, checkpoint folder, or model")]
System = Annotated[str | None, typer.Option(help="system message")]
Tools = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE", help="tools that the model may call: a JSON list, or rows that declare the same ones"
    ),
]
MaxTokens = Annotated[int, typer.Option(min=1, help="longest answer")]
Temperature = Annotated[float, typer.Option(min=0.0, help="0: always the most likely token")]
TopP = Annotated[
    float, typer.Option(min=0.0, max=1.0, help="sample from the most likely tokens of this total probability")
]
Raw = Annotated[
    bool, typer.Option("--raw", help="continue plain text, however the run was trained: no chat template")
]
Seed = Annotated[int, typer.Option(min=0, help="seed of the sampling")]


def generate(
    target: Target,
    prompt: Annotated[
        str | None, typer.Argument(help="in quotes; without any prompt, one a line from stdin")
    ] = None,
    more: Annotated[list[str] | None, typer.Option("--prompt", help="a further prompt; repeatable")] = None,
    checkpoint: Checkpoint = "best",
    model: MovedModel = None,
    base: Annotated[bool, typer.Option("--base", help="the run's model without its adapter")] = False,
    system: System = None,
    tools: Tools = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    raw: Raw = False,
    control: Control = False,
    as_json: AsJson = False,
) -> None:
    """Answer prompts, in batches."""
    given = [*([] if prompt is None else [prompt]), *(more or [])]
    prompts = given or [line.rstrip("\n") for line in sys.stdin if line.strip()]
    from tunesmith.data.asking import read_tools

    with progress() as notify:
        answers = tunesmith.generate(
            target,
            prompts,
            checkpoint=checkpoint,
            model=model,
            adapter=not base,
            system=system,
            tools=() if tools is None else read_tools(tools),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            raw=raw,
            notify=notify,
        )
    for text, answer in zip(prompts, answers, strict=True):
        if as_json:
            print_json({"prompt": text, "answer": answer})
        else:
            say(answer, control=control)


def chat(
    target: Target,
    checkpoint: Checkpoint = "best",
    model: MovedModel = None,
    system: System = None,
    tools: Tools = None,
    max_tokens: MaxTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    raw: Raw = False,
    control: Control = False,
) -> None:
    """Talk with a run or a model; an empty line or Ctrl-D ends it."""
    from tunesmith.data.asking import read_tools

    with progress() as notify:
        conversation = tunesmith.chat(
            target,
            checkpoint=checkpoint,
            model=model,
            system=system,
            tools=() if tools is None else read_tools(tools),
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            raw=raw,
            notify=notify,
        )
    while True:
        typer.echo("> ", nl=False, err=True)
        line = sys.stdin.readline().strip()
        if not line:
            return
        for piece in conversation.say(line):
            sys.stdout.write(piece if control else escaped(piece))
            sys.stdout.flush()
        typer.echo()
