"""The text of every prefix of a conversation, from one run of its chat template.

A row with many answers needs the prompt of each answer. Rendering each prompt by itself takes time that grows
with the square of the number of messages. Most templates write one message after the other, then what opens
an answer. One run of such a template over all messages holds the text of every prefix: what had been written
when the run asked for the next message, and what it writes after its loop.

A prefix is read from the run only if that follows from two facts. First, what the template read: messages are
given to it as an object that notes each access. Up to its end, a run over the prefix reads the same as the
run over all messages, if no access before that point depended on later messages or on their number: no
length, no index from the end, no ``loop.last``. Second, what follows the loop is constant: its statements use
no value that the loop changes. Any other prefix has to be rendered by itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

from jinja2 import Template, nodes
from jinja2.visitor import NodeTransformer

from tunesmith.data.formats import JSON

LOOP_OVER, LOOK_AHEAD = "tunesmith_loop_over", "tunesmith_look_ahead"
"""Names of the functions that are added to the template."""

PURE = (
    nodes.Const,
    nodes.TemplateData,
    nodes.Name,
    nodes.Getattr,
    nodes.Getitem,
    nodes.Filter,
    nodes.Test,
    nodes.Compare,
    nodes.Operand,
    nodes.And,
    nodes.Or,
    nodes.Not,
    nodes.CondExpr,
    nodes.Add,
    nodes.Concat,
    nodes.Output,
    nodes.If,
    nodes.Assign,
    nodes.Keyword,
)
NAMES = (nodes.Name, nodes.NSRef)
PURE_FILTERS = {"default", "d", "trim", "string", "lower", "upper", "tojson", "length", "replace"}
PURE_FUNCTIONS = {"raise_exception"}


class TemplateRun:
    """One run of a chat template over all messages.

    text: what it wrote. cuts: for each number of messages, how much had been written when the message behind
    them was asked for. unproven: numbers of messages with which the run would have read something else.
    proven: numbers of messages whose text follows from the run."""

    def __init__(
        self, template: Template, entries: list[dict[str, JSON]], variables: Mapping[str, object]
    ) -> None:
        """Raises what the template raises."""
        self.entries = entries
        self.cuts: dict[int, int] = {}
        self.unproven: set[int] = set()
        self._written = 0
        self._delivered = 0  # messages that the loop has been given; 0 before it begins and after its end
        self._asked_for = -1  # index of the message that the loop asked for last
        self._is_over = False
        pieces: list[str] = []
        for piece in template.generate(
            **variables,
            messages=WatchedMessages(self, 0),
            **{LOOP_OVER: self._loop_over, LOOK_AHEAD: self._look_ahead},
        ):
            pieces.append(piece)
            self._written += len(piece)
        self.text = "".join(pieces)

    @property
    def proven(self) -> set[int]:
        return self.cuts.keys() - self.unproven - {0} if self._is_over else set()

    def prefix(self, size: int) -> str | None:
        """The text of the first ``size`` messages, or None if it does not follow from this run."""
        if not self._is_over or size in self.unproven or size not in self.cuts:
            return None
        return self.text[: self.cuts[size]] + self.text[self.cuts[len(self.entries)] :]

    def read(self, index: int) -> None:
        """Notes that message ``index`` is read: without it the run would differ from here on."""
        self.unproven.update(range(self._delivered, min(index, len(self.entries)) + 1))

    def read_all(self) -> None:
        """Notes that something is read which depends on every message, or on how many there are."""
        self.read(len(self.entries))

    def ask_for(self, index: int) -> dict[str, JSON]:
        """Message ``index``, for the loop. Raises StopIteration behind the last."""
        self.cuts[index], self._asked_for = self._written, index
        if index >= len(self.entries):
            self._is_over = index == len(self.entries)  # not of a loop that begins behind the last message
            self._delivered = 0
            raise StopIteration
        self._delivered = index + 1
        return self.entries[index]

    def _loop_over(self, values: object) -> object:
        """What a loop of the template runs over."""
        if not isinstance(values, WatchedMessages):
            return values
        return LoopedMessages(self, values._start)

    def _look_ahead(self, value: object) -> object:
        """``value``, for which the loop asked for the next message in the middle of its body."""
        self.unproven.add(self._asked_for)
        return value


class WatchedMessages:
    """The messages from ``start`` on, as the template sees them: behaves like their list, and notes what is
    read."""

    def __init__(self, run: TemplateRun, start: int) -> None:
        self._run = run
        self._start = start

    def _all(self) -> list[dict[str, JSON]]:
        self._run.read_all()
        return self._run.entries[self._start :]

    def __getitem__(self, place: Any) -> Any:
        if type(place) is int and place >= 0:
            self._run.read(self._start + place)
            return self._run.entries[self._start + place]
        if isinstance(place, slice) and place.stop is None and place.step is None:
            if type(place.start) is int and place.start >= 0:
                return WatchedMessages(self._run, self._start + place.start)
        return self._all()[place]

    def __bool__(self) -> bool:
        self._run.read(self._start)
        return self._start < len(self._run.entries)

    def __len__(self) -> int:
        return len(self._all())

    def __iter__(self) -> Iterator[dict[str, JSON]]:
        return iter(self._all())

    def __reversed__(self) -> Iterator[dict[str, JSON]]:
        return reversed(self._all())

    def __contains__(self, value: object) -> bool:
        return value in self._all()

    def __eq__(self, other: object) -> bool:
        return self._all() == other

    def __hash__(self) -> int:
        raise TypeError("a list has no hash")

    def __repr__(self) -> str:
        return repr(self._all())


class LoopedMessages:
    """The messages from ``place`` on, for the loop that writes them."""

    def __init__(self, run: TemplateRun, place: int) -> None:
        self._run = run
        self._first = self._place = place

    def __iter__(self) -> LoopedMessages:
        return self

    def __next__(self) -> dict[str, JSON]:
        message = self._run.ask_for(self._place)
        self._place += 1
        return message

    def __len__(self) -> int:
        self._run.read_all()
        return len(self._run.entries) - self._first


def run_of(
    source: str, entries: Sequence[Mapping[str, JSON]], variables: Mapping[str, object]
) -> TemplateRun | None:
    """A run of the template ``source``, or None if no prefix follows from it."""
    try:
        from transformers.utils.chat_template_utils import _alias_reasoning_fields
    except ImportError:  # not public: another release may not have it
        return None
    program = _program(source)
    if program is None:
        return None
    given = [{key: value for key, value in entry.items() if value is not None} for entry in entries]
    try:
        run = TemplateRun(program, _alias_reasoning_fields(given), {"documents": None, **variables})
    except Exception:  # a template is a program, which may raise anything
        return None
    return run if run.proven else None


@lru_cache(maxsize=8)
def _program(source: str) -> Template | None:
    """The template with its loops over messages made known to a `TemplateRun`; None if none can be
    used."""
    try:
        from transformers.utils.chat_template_utils import _compile_jinja_template
    except ImportError:
        return None
    environment = _compile_jinja_template(source).environment
    tree = cast(nodes.Template, _EmptyByTruth().visit(environment.parse(source)))
    values = _values(tree)
    loops = [loop for loop, rest in _loops(tree.body, []) if _is_plain(loop) and _is_constant(rest, values)]
    for loop in loops:
        loop.iter = _call(LOOP_OVER, loop.iter)
    tree.set_environment(environment)
    return environment.from_string(tree) if loops else None


def _call(function: str, argument: nodes.Node) -> nodes.Call:
    call = nodes.Call(nodes.Name(function, "load"), [cast(nodes.Expr, argument)], [], None, None)
    call.set_lineno(argument.lineno)
    return call


def _loops(
    body: Sequence[nodes.Node], after: Sequence[nodes.Node]
) -> Iterator[tuple[nodes.For, list[nodes.Node]]]:
    """The loops whose text is written at once, each with the statements that are reached behind it."""
    for place, node in enumerate(body):
        rest = [*body[place + 1 :], *after]
        if isinstance(node, nodes.For):
            yield node, rest
        elif isinstance(node, nodes.If):
            for branch in (node.body, *(other.body for other in node.elif_), node.else_):
                yield from _loops(branch, rest)


def _is_plain(loop: nodes.For) -> bool:
    """Whether the loop only goes through its messages; where its body looks ahead is marked."""
    if loop.recursive or loop.test is not None or loop.else_:
        return False
    marks = _MarkLookAhead()
    loop.body = [marks.visit(node) for node in loop.body]
    return marks.is_complete


class _EmptyByTruth(NodeTransformer):
    """Writes ``values | length != 0`` as ``not not values``: all prefixes have messages, and not the same
    number of them. Llama 3.1 asks that if there are tools."""

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        match node:
            case nodes.Compare(
                expr=nodes.Filter(name="length", node=nodes.Name() as values),
                ops=[nodes.Operand(op="ne" | "gt", expr=nodes.Const(value=0))],
            ):
                return nodes.Not(nodes.Not(values)).set_lineno(node.lineno)
        return self.generic_visit(node)


class _MarkLookAhead(NodeTransformer):
    """Passes each ``loop.last`` and ``loop.nextitem`` of one loop through the function that notes it.

    is_complete: whether the loop's variable is not used in any other way than by its attributes."""

    is_complete = True

    def visit_For(self, node: nodes.For) -> nodes.Node:
        """The body of an inner loop has a variable ``loop`` of its own."""
        node.iter = self.visit(node.iter)
        node.else_ = [self.visit(inner) for inner in node.else_]
        return node

    def visit_Getattr(self, node: nodes.Getattr) -> nodes.Node:
        if not (isinstance(node.node, nodes.Name) and node.node.name == "loop"):
            return self.generic_visit(node)
        return _call(LOOK_AHEAD, node) if node.attr in ("last", "nextitem") else node

    def visit_Name(self, node: nodes.Name) -> nodes.Node:
        self.is_complete = self.is_complete and node.name != "loop"
        return node


def _values(tree: nodes.Template) -> dict[str, list[nodes.Node] | None]:
    """For each name that the template sets, the values that it gets; None if they cannot be known."""
    values: dict[str, list[nodes.Node] | None] = {macro.name: None for macro in tree.find_all(nodes.Macro)}
    for assignment in tree.find_all((nodes.Assign, nodes.AssignBlock, nodes.For)):
        assignment = cast(nodes.Assign | nodes.AssignBlock | nodes.For, assignment)
        target = assignment.target
        if isinstance(assignment, nodes.Assign) and isinstance(target, nodes.Name):
            known = values.setdefault(target.name, [])
            if known is not None:
                known.append(assignment.node)
            continue
        names = [target] if isinstance(target, nodes.Name | nodes.NSRef) else target.find_all(NAMES)
        values.update({cast(nodes.Name, name).name: None for name in names})
    return values


def _is_constant(statements: Sequence[nodes.Node], values: Mapping[str, list[nodes.Node] | None]) -> bool:
    """Whether ``statements`` write the same after every number of rounds of a loop before them.

    Names that the template does not set are given to it and never change. What a loop sets is forgotten at
    its end, but for attributes of namespaces and for iterators: those are made by calls, which are
    refused."""
    waiting, names = list(statements), set[str]()
    while waiting:
        node = waiting.pop()
        if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Name):
            if node.node.name not in PURE_FUNCTIONS or node.node.name in values:
                return False
            waiting += node.args
            continue
        if not isinstance(node, PURE) or (isinstance(node, nodes.Filter) and node.name not in PURE_FILTERS):
            return False
        if isinstance(node, nodes.Name) and node.name not in names:
            names.add(node.name)
            known = values.get(node.name, [])
            if known is None:
                return False
            waiting += known
        waiting += node.iter_child_nodes()
    return True
