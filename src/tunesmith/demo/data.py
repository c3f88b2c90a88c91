"""The demo's data set: everyday requests, each answered by one tool call, labelled right or wrong.

Made by rule from ``tools.yaml``; every value of a right call is in its request word for word. All randomness
comes from ``random.Random(seed).random()``, whose sequence is the same in every Python (see ``random``,
"Notes on Reproducibility")."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import NamedTuple

import yaml

from tunesmith.errors import DataError

Arguments = dict[str, str | int]
SYSTEM = "Answer with one tool call."
"""The system message of the demo's requests: without it the model is to answer as before."""
DESIRABLE = 0.75  # share of the rows that are right
FAULTS = ("wrong_tool", "missing_argument", "malformed_json", "invented_argument", "prose")


class Tool(NamedTuple):
    """``requests`` name each argument once, as ``{argument}``. ``slots``: the values of each argument, in the
    order of the call."""

    name: str
    requests: list[str]
    slots: dict[str, list[str | int]]

    def size(self) -> int:
        return len(self.requests) * math.prod(map(len, self.slots.values()))

    def rows(self, chance: random.Random) -> Iterator[tuple[Tool, str, Arguments]]:
        """Every (self, request, arguments) once, in random order."""
        for number in _shuffled(self.size(), chance):
            arguments: Arguments = {}
            for slot, values in self.slots.items():
                number, index = divmod(number, len(values))
                arguments[slot] = values[index]
            yield self, self.requests[number].format(**arguments), arguments


_TABLE = yaml.safe_load((resources.files("tunesmith.demo") / "tools.yaml").read_text(encoding="utf-8"))
INVENTED: Arguments = _TABLE["invented"]
TOOLS = [
    Tool(
        name,
        about["requests"],
        {slot: _TABLE["lists"][values] for slot, values in about["arguments"].items()},
    )
    for name, about in _TABLE["tools"].items()
]


TWELVE = tuple(tool for tool in TOOLS if tool.name in _TABLE["twelve"])
"""Tools that a small model learns in fewer rows than all of TOOLS."""


def _shuffled(n: int, chance: random.Random) -> Iterator[int]:
    moved: dict[int, int] = {}  # a Fisher-Yates shuffle of 0 … n − 1, from its end and as far as needed
    for last in range(n - 1, 0, -1):
        index = int(chance.random() * (last + 1))
        yield moved.get(index, index)
        moved[index] = moved.get(last, last)
    yield moved.get(0, 0)


def _pick(items: Sequence[str], chance: random.Random) -> str:
    return items[int(chance.random() * len(items))]


def _answer(name: str, arguments: Arguments) -> str:
    return f"tool_call: {name}\narguments: {json.dumps(arguments, ensure_ascii=False)}"


def _faulty(
    fault: str, tool: Tool, arguments: Arguments, tools: Sequence[Tool], chance: random.Random
) -> str:
    if fault == "wrong_tool":
        return _answer(_pick([other.name for other in tools if other is not tool], chance), arguments)
    if fault == "missing_argument":
        left_out = _pick(list(arguments), chance)
        return _answer(tool.name, {key: value for key, value in arguments.items() if key != left_out})
    if fault == "malformed_json":
        right, key = _answer(tool.name, arguments), next(iter(arguments))
        return _pick([right[:-1], right[:-1] + ",}", right.replace(f'"{key}"', key, 1)], chance)
    if fault == "invented_argument":
        key = _pick(list(INVENTED), chance)
        return _answer(tool.name, {**arguments, key: INVENTED[key]})
    return _pick(_TABLE["prose"], chance)


def generate(
    rows: int = 400, seed: int = 0, system: str | None = None, tools: Sequence[Tool] = TOOLS
) -> list[dict[str, object]]:
    """Rows with ``conversations`` (``system`` if given, user, assistant), ``label`` (True: right), ``tool``,
    ``fault`` (one of FAULTS, or None if right) and ``expected`` (the right answer). No two have the same
    request, and all tools have equal shares. Raises DataError if there are fewer different requests."""
    most = len(tools) * min(map(Tool.size, tools))
    if not 0 < rows <= most:
        raise DataError(f"{rows} rows of demo data were asked for", hint=f"give a number from 1 to {most}")
    chance = random.Random(seed)
    sources = [tools[index].rows(chance) for index in reversed([*_shuffled(len(tools), chance)])]
    made: list[dict[str, object]] = []
    for number in range(rows):
        tool, prompt, arguments = next(sources[number % len(sources)])
        right = _answer(tool.name, arguments)
        fault = None if number < round(rows * DESIRABLE) else FAULTS[number % len(FAULTS)]
        given = _faulty(fault, tool, arguments, tools, chance) if fault else right
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": given}]
        turns = turns if system is None else [{"role": "system", "content": system}, *turns]
        made.append(
            {"conversations": turns, "label": not fault, "tool": tool.name, "fault": fault, "expected": right}
        )
    return [made[index] for index in reversed([*_shuffled(rows, chance)])]


def write(
    path: Path, rows: int = 400, seed: int = 0, system: str | None = None, tools: Sequence[Tool] = TOOLS
) -> Path:
    """``generate(rows, seed, system, tools)`` as JSON lines (UTF-8, "\n") at ``path``, whose folder must
    exist."""
    made = generate(rows, seed, system, tools)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in made), "utf-8", newline="\n"
    )
    return path
