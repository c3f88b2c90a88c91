"""Every verb with its arguments, options, examples and exit statuses."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import typer
from exits import statuses
from typer.core import TyperArgument, TyperCommand, TyperGroup, TyperOption
from writing import code, console, first_sentence, table

from tunesmith.cli import app
from tunesmith.cli.examples import EXAMPLES
from tunesmith.evaluation.tasks import option_help

INTRODUCTION = """# Commands

Each verb is also a [Python function](python.md). `tunesmith VERB --help` prints the same. Results go to
stdout, progress to stderr; `--json` prints results for programs.

| before the verb | |
|---|---|
| `--debug` | show tracebacks |
| `--version` | print the version |
"""
NAMES = {str: "text", Path: "path", int: "integer", float: "number"}
Parameter = TyperArgument | TyperOption


def text() -> str:
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    parts = [INTRODUCTION, "## Exit statuses\n", statuses()]
    for name, command in root.commands.items():
        parts += described(name, command, EXAMPLES[name])
        for inner, below in command.commands.items() if isinstance(command, TyperGroup) else ():
            parts += described(f"{name} {inner}", below, ())
    return "\n".join(parts)


def described(name: str, command: TyperCommand | TyperGroup, examples: tuple[str, ...]) -> Iterator[str]:
    yield f"## {name}\n"
    sentence = first_sentence(command.callback.__doc__ or "")
    yield sentence.rstrip(".") + ".\n"
    arguments = [param for param in command.params if isinstance(param, TyperArgument)]
    options = [param for param in command.params if isinstance(param, TyperOption)]
    words = [word(argument) for argument in arguments]
    yield console([" ".join(["tunesmith", name, *words, "[OPTIONS]"])])
    if arguments:
        rows = [(code(word), meaning(argument)) for word, argument in zip(words, arguments, strict=True)]
        yield table(["argument", "meaning"], rows)
    yield table(
        ["option", "value", "default", "meaning"],
        ([code(spelled(param)), kind(param), code(default(param)), meaning(param)] for param in options),
    )
    if examples:
        yield console(examples)


def word(argument: TyperArgument) -> str:
    """An argument as the usage has it: in brackets if optional, with dots if there may be several."""
    if argument.metavar:
        return argument.metavar + "..." * (argument.nargs < 0 and not argument.metavar.endswith("..."))
    name = str(argument.name).upper()
    return (name if argument.required else f"[{name}]") + "..." * (argument.nargs < 0)


def spelled(param: TyperOption) -> str:
    return ", ".join([*param.opts, *param.secondary_opts])


def meaning(param: Parameter) -> str:
    return (param.help or option_help(param.name or "")).replace("<", "&lt;")


def kind(param: TyperOption) -> str:
    """What is to be given: nothing for a flag."""
    described = param.type_descriptor
    if param.is_flag:
        return ""
    repeatable = ", repeatable" if param.multiple else ""
    if described.choices is not None:
        choices = [choice if isinstance(choice, str) else choice.value for choice in described.choices]
        return f"one of {', '.join(choices)}{repeatable}"
    name = NAMES[next(iter(get_args(described.annotation)), described.annotation)]
    bounds = [(sign, bound) for sign, bound in (("≥", param.min), ("≤", param.max)) if bound is not None]
    return f"{name} {' and '.join(f'{sign} {bound:g}' for sign, bound in bounds)}".strip() + repeatable


def default(param: TyperOption) -> str:
    if param.required:
        return "required"
    if param.is_flag:
        return param.opts[0] if param.default and param.secondary_opts else ""
    return "" if param.default in (None, (), []) else str(param.default)
