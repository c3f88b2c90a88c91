"""The demo's data set: everyday requests, each answered by one tool call, labelled right or wrong.

Made by rule from ``demo_tools.yaml``; every value of a right call stands in its request word for word. Three rows of
four are right; the others show the usual faults, one each.

The only source of chance is ``random.Random(seed).random()``, whose sequence Python keeps fixed across versions
(documented in ``random``, "Notes on Reproducibility"; ``sample``, ``choice`` and ``shuffle`` carry no such promise).
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import resources
from pathlib import Path
from typing import NamedTuple, TypeVar

import yaml

from tunesmith.errors import DataError

Value = str | int
T = TypeVar("T")

DESIRABLE = 0.75  # share of right rows
FAULTS = ("wrong_tool", "missing_argument", "malformed_json", "invented_argument", "prose")
INVENTED = {"priority": "high", "notify": True, "repeat": "daily", "user_id": 42, "confirm": False, "urgent": "no"}
PROSE = (
    "Sure, I will take care of that for you right away.",
    "Done! Is there anything else that I can help you with?",
    "I would love to help, but could you tell me more first?",
    "Of course. Give me a moment while I look into it.",
)


class Tool(NamedTuple):
    """``requests`` have a ``{slot}`` for each argument; ``slots`` are the arguments' values, in the call's order."""

    name: str
    requests: list[str]
    slots: dict[str, list[Value]]

    def size(self) -> int:
        return len(self.requests) * math.prod(map(len, self.slots.values()))

    def asked(self, chance: random.Random) -> Iterator[tuple[str, dict[str, Value]]]:
        """Every (request, arguments) once, in random order."""
        for number in _shuffled(self.size(), chance):
            arguments: dict[str, Value] = {}
            for slot, values in self.slots.items():
                number, index = divmod(number, len(values))
                arguments[slot] = values[index]
            yield self.requests[number].format(**arguments), arguments


@cache
def tools() -> tuple[Tool, ...]:
    """The tools of ``demo_tools.yaml``, in its order."""
    table = yaml.safe_load(resources.files("tunesmith").joinpath("demo_tools.yaml").read_text(encoding="utf-8"))
    return tuple(
        Tool(name, about["requests"], {slot: table["lists"][values] for slot, values in about["arguments"].items()})
        for name, about in table["tools"].items()
    )


def _pick(items: Sequence[T], chance: random.Random) -> T:
    return items[int(chance.random() * len(items))]


def _shuffled(n: int, chance: random.Random) -> Iterator[int]:
    """0 … n − 1 in random order: a Fisher-Yates shuffle from the end, done as far as asked."""
    moved: dict[int, int] = {}
    for last in range(n - 1, 0, -1):
        at = int(chance.random() * (last + 1))
        number, moved[at] = moved.get(at, at), moved.get(last, last)
        yield number
    yield moved.get(0, 0)


def _answer(name: str, arguments: dict[str, Value]) -> str:
    return f"tool_call: {name}\narguments: {json.dumps(arguments, ensure_ascii=False)}"


def _faulty(fault: str, tool: Tool, arguments: dict[str, Value], chance: random.Random) -> str:
    if fault == "wrong_tool":
        return _answer(_pick([other.name for other in tools() if other.name != tool.name], chance), arguments)
    if fault == "missing_argument":
        left_out = _pick(list(arguments), chance)
        return _answer(tool.name, {key: value for key, value in arguments.items() if key != left_out})
    if fault == "malformed_json":
        right, key = _answer(tool.name, arguments), next(iter(arguments))
        return _pick([right[:-1], right[:-1] + ",}", right.replace(f'"{key}"', key, 1)], chance)
    if fault == "invented_argument":
        return _answer(tool.name, arguments | dict([_pick(list(INVENTED.items()), chance)]))
    return _pick(PROSE, chance)


def generate(rows: int = 400, seed: int = 0) -> list[dict[str, object]]:
    """``rows`` rows, no two with the same request, tools in equal shares, the same for a seed on any Python.

    A row: ``conversations`` (user, assistant), ``label`` (True: right), ``tool``, ``fault`` (None where right, else one
    of FAULTS) and ``expected`` (the right answer, also where ``label`` is False).
    Raises DataError where there are fewer than ``rows`` different requests.
    """
    most = len(tools()) * min(tool.size() for tool in tools())
    if not 0 < rows <= most:
        raise DataError(f"{rows} rows of demo data were asked for", hint=f"give a number from 1 to {most}")
    chance = random.Random(seed)
    sources = [(tools()[at], tools()[at].asked(chance)) for at in reversed(list(_shuffled(len(tools()), chance)))]
    n_right = round(rows * DESIRABLE)
    made: list[dict[str, object]] = []
    for number in range(rows):
        tool, asked = sources[number % len(sources)]
        prompt, arguments = next(asked)
        right = _answer(tool.name, arguments)
        fault = None if number < n_right else FAULTS[number % len(FAULTS)]
        given = _faulty(fault, tool, arguments, chance) if fault else right
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": given}]
        made.append({"conversations": turns, "label": not fault, "tool": tool.name, "fault": fault, "expected": right})
    return [made[at] for at in reversed(list(_shuffled(rows, chance)))]


def write(path: Path, rows: int = 400, seed: int = 0) -> Path:
    """``generate(rows, seed)`` as JSON lines (UTF-8, "\n") at ``path``, whose folder must exist."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in generate(rows, seed)]
    path.write_text("".join(lines), encoding="utf-8", newline="\n")
    return path
