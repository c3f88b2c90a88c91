"""What does a template of Ollama render? By Go's text/template where Go is installed, else by a reading of
the part of the language that tunesmith writes: text in quotes, if, else if, else, range over messages,
variables, fields, and the functions eq, and, not, len and slice.

Ollama's variables: https://github.com/ollama/ollama/blob/main/docs/template.mdx"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple, TypeAlias

from tunesmith import events
from tunesmith.data.examples import Conversation
from tunesmith.errors import ExportError
from tunesmith.events import Notice, Sink

TIMEOUT_S = 300
"""Of a build, which compiles Go's library the first time, and of rendering."""
Value: TypeAlias = "str | int | bool | list[OllamaMessage] | OllamaMessage | Mapping[str, Value]"
_ACTION = re.compile(r"\{\{-?\s*(?P<code>(?:\"(?:[^\"\\]|\\.)*\"|[^\"}]|\}(?!\}))*?)\s*-?\}\}")
_TOKEN = re.compile(r"\"(?:[^\"\\]|\\.)*\"|[()]|:=|,|\$?[.\w$]+")


class OllamaMessage(NamedTuple):
    Role: str
    Content: str


class OllamaRequest(NamedTuple):
    """What Ollama gives to a template."""

    System: str
    Messages: list[OllamaMessage]


def request(conversation: Conversation) -> OllamaRequest:
    """As Ollama does: neighbours of one role are joined, and the system messages are also given apart."""
    messages: list[OllamaMessage] = []
    for message in conversation.messages:
        if messages and messages[-1].Role == message.role:
            joined = f"{messages[-1].Content}\n\n{message.content}"
            messages[-1] = OllamaMessage(message.role, joined)
        else:
            messages.append(OllamaMessage(message.role, message.content))
    system = [message.content for message in conversation.messages if message.role == "system"]
    return OllamaRequest("\n\n".join(system), messages)


class BrokenGo(ExportError):
    """Go is installed and does not work: that says nothing of the template."""


def has_go() -> bool:
    return shutil.which("go") is not None


def render(template: str, conversations: Sequence[Conversation], notify: Sink = events.silent) -> list[str]:
    """One text a conversation, by Go if it is installed and works; ``notify`` is told if it does not work."""
    requests = [request(conversation) for conversation in conversations]
    if has_go():
        try:
            return by_go(template, requests)
        except BrokenGo as error:
            notify(Notice(f"{error.what}: the template was read by tunesmith alone", level="warning"))
    return [read(template, each) for each in requests]


def by_go(template: str, requests: Sequence[OllamaRequest]) -> list[str]:
    """Raises ExportError, with what Go said, if it cannot render the template, BrokenGo if the program that
    renders cannot be built or does not end."""
    conversations = [
        {"System": each.System, "Messages": [message._asdict() for message in each.Messages]}
        for each in requests
    ]
    job = json.dumps({"template": template, "conversations": conversations})
    program = (files("tunesmith.exports") / "ollama_files" / "render.go.txt").read_text("utf-8")
    with tempfile.TemporaryDirectory(prefix="tunesmith-go-") as folder:
        (Path(folder) / "render.go").write_text(program, encoding="utf-8")
        built = _run(["go", "build", "-o", "render", "render.go"], "", Path(folder))
        if built.returncode:
            raise BrokenGo(f"Go does not build: {_last_line(built)}")
        done = _run([str(Path(folder) / "render")], job, Path(folder))
    if done.returncode:
        raise ExportError(f"Go cannot render the template: {_last_line(done)}")
    return json.loads(done.stdout)


def _run(words: Sequence[str], given: str, folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(
            words, input=given, capture_output=True, text=True, cwd=folder, check=False, timeout=TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BrokenGo(f"Go does not work: {error}") from error


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    return (done.stderr.strip().splitlines()[-1:] or [f"exit status {done.returncode}"])[0]


def read(template: str, given: OllamaRequest) -> str:
    """The text by our own reading. Raises ExportError for what it does not know."""
    variables: dict[str, Value] = {"$": {"System": given.System, "Messages": given.Messages}}
    try:
        return "".join(_Scope(variables).run(_parse(_pieces(template), ())[0]))
    except (LookupError, TypeError, ValueError) as error:
        raise ExportError(f"the template has what tunesmith cannot read: {error}") from error


class _TemplatePiece(NamedTuple):
    """Text, or the code of an action."""

    text: str
    is_code: bool


@dataclass(frozen=True)
class _Node:
    """``code``: of an action. ``branches``: of an if, by their conditions ("" for else), or of a range."""

    code: str = ""
    text: str = ""
    branches: list[tuple[str, list[_Node]]] = field(default_factory=list)


def _pieces(template: str) -> Iterator[_TemplatePiece]:
    place, trims = 0, False
    for match in _ACTION.finditer(template):
        text = template[place : match.start()]
        text = text.lstrip() if trims else text
        yield _TemplatePiece(text.rstrip() if match[0].startswith("{{-") else text, False)
        yield _TemplatePiece(match["code"].strip(), True)
        place, trims = match.end(), match[0].endswith("-}}")
    rest = template[place:]
    yield _TemplatePiece(rest.lstrip() if trims else rest, False)


def _parse(pieces: Iterator[_TemplatePiece], ends: tuple[str, ...]) -> tuple[list[_Node], str]:
    """The nodes up to an action that begins with one of ``ends``, and that action."""
    nodes: list[_Node] = []
    for piece in pieces:
        word = piece.text.split(" ", 1)[0]
        if not piece.is_code:
            nodes.append(_Node(text=piece.text))
        elif word in ends:
            return nodes, piece.text
        elif word in ("if", "range"):
            nodes.append(_parse_block(pieces, piece.text))
        else:
            nodes.append(_Node(code=piece.text))
    return nodes, ""


def _parse_block(pieces: Iterator[_TemplatePiece], opening: str) -> _Node:
    node = _Node(code=opening)
    condition = opening.partition(" ")[2]
    while True:
        inside, end = _parse(pieces, ("else", "end"))
        node.branches.append((condition, inside))
        if end == "end":
            return node
        if not end:
            raise ExportError(f"the template does not end {opening!r}")
        condition = end.removeprefix("else").strip().removeprefix("if").strip()


class _Scope:
    """Variables and the dot while a template is rendered."""

    def __init__(self, variables: dict[str, Value]) -> None:
        self.variables = variables
        self.dot: Value = variables["$"]

    def run(self, nodes: Sequence[_Node]) -> Iterator[str]:
        for node in nodes:
            if node.code.startswith("range "):
                yield from self._range(node)
            elif node.branches:
                yield from self._if(node)
            elif ":=" in node.code:
                name, _, expression = node.code.partition(":=")
                self.variables[name.strip()] = self.value(expression)
            elif node.code:
                yield str(self.value(node.code))
            else:
                yield node.text

    def _if(self, node: _Node) -> Iterator[str]:
        for condition, inside in node.branches:
            if not condition or self.value(condition):
                yield from self.run(inside)
                return

    def _range(self, node: _Node) -> Iterator[str]:
        names, _, expression = node.branches[0][0].partition(":=")
        index, element = (name.strip() for name in names.split(","))
        listed, dot = self.value(expression), self.dot
        if not isinstance(listed, list):
            raise ExportError(f"range over what is not a list: {expression.strip()}")
        for place, message in enumerate(listed):
            self.variables |= {index: place, element: message}
            self.dot = message
            yield from self.run(node.branches[0][1])
        self.dot = dot

    def value(self, expression: str) -> Value:
        tokens = _TOKEN.findall(expression)
        value = self._call(tokens)
        if tokens:
            raise ExportError(f"the template has what tunesmith cannot read: {expression.strip()}")
        return value

    def _call(self, tokens: list[str]) -> Value:
        """The value of an operand, or of a function with its operands; takes them from ``tokens``."""
        name = tokens[0]
        if name not in _FUNCTIONS:
            return self._operand(tokens)
        tokens.pop(0)
        operands: list[Value] = []
        while tokens and tokens[0] != ")":
            operands.append(self._operand(tokens))
        return _FUNCTIONS[name](*operands)

    def _operand(self, tokens: list[str]) -> Value:
        token = tokens.pop(0)
        if token == "(":
            value = self._call(tokens)
            tokens.pop(0)
            return value
        if token.startswith('"'):
            return json.loads(token)
        if token.isdigit():
            return int(token)
        variable, *fields = token.split(".")
        value = self.variables[variable] if variable else self.dot
        for name in filter(None, fields):
            if isinstance(value, OllamaMessage):
                value = value._asdict()[name]
            elif isinstance(value, Mapping):
                value = value[name]
            else:
                raise ExportError(f"the template has no field {name}")
        return value


_FUNCTIONS: dict[str, Callable[..., Value]] = {
    "eq": lambda first, *others: first in others,
    "and": lambda *values: next((value for value in values if not value), values[-1]),
    "not": lambda value: not value,
    "len": len,
    "slice": lambda values, start: values[start:],
}
