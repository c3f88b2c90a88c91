"""Tests in one sandboxed process call a program in another: lines of JSON over two pipes.

A program that shares an interpreter with its tests can find them and decide their outcome. So the tests run
in a process that executes none of its code: what the program returns arrives as plain values, which have the
tests' own operators, or as a `Remote`, which is equal to nothing but itself. This module imports only the
standard library; the launcher loads it in both processes before it confines them."""

from __future__ import annotations

import builtins
import datetime
import decimal
import fractions
import json
import operator
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from typing import IO, Any, NoReturn

LONGEST_MESSAGE = 16 << 20
CONTAINERS: tuple[type, ...] = (list, tuple, set, frozenset)
PARTS: dict[type, Callable[[Any], tuple[Any, ...]]] = {
    complex: lambda value: (value.real, value.imag),
    range: lambda value: (value.start, value.stop, value.step),
    decimal.Decimal: lambda value: (str(value),),
    fractions.Fraction: lambda value: (value.numerator, value.denominator),
    datetime.date: lambda value: (value.year, value.month, value.day),
    datetime.datetime: lambda value: (*value.timetuple()[:6], value.microsecond, value.tzinfo),
    datetime.timedelta: lambda value: (value.days, value.seconds, value.microseconds),
}
"""Types whose values are made again of a few plain ones."""
TYPES = {
    name: value
    for name, value in vars(builtins).items()
    if isinstance(value, type) and not issubclass(value, BaseException)
}
FUNCTIONS = {
    name: value for name, value in vars(builtins).items() if isinstance(value, types.BuiltinFunctionType)
}
OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda function, *arguments, **named: function(*arguments, **named),
    "getattr": getattr,
    "setattr": setattr,
    "iter": iter,
    "next": next,
    "len": len,
    "bool": bool,
    "str": str,
    "repr": repr,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "contains": operator.contains,
}


class Broken(Exception):
    """The other process has ended, or has sent what is not a message."""


class Remote:
    """An object of the other process, on which operations are done there."""

    __slots__ = ("_number", "_peer")

    def __init__(self, peer: Peer, number: int) -> None:
        object.__setattr__(self, "_peer", peer)
        object.__setattr__(self, "_number", number)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._peer.ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name != "__name__":
            raise AttributeError(name)
        return self._peer.ask("getattr", self, (name,))

    def __setattr__(self, name: str, value: Any) -> None:
        self._peer.ask("setattr", self, (name, value))

    def __iter__(self) -> Iterator[Any]:
        return self._peer.ask("iter", self)

    def __next__(self) -> Any:
        return self._peer.ask("next", self)

    def __len__(self) -> int:
        return self._peer.ask("len", self)

    def __bool__(self) -> bool:
        return self._peer.ask("bool", self) is True

    def __str__(self) -> str:
        return self._peer.ask("str", self)

    def __repr__(self) -> str:
        return self._peer.ask("repr", self)

    def __getitem__(self, key: Any) -> Any:
        return self._peer.ask("getitem", self, (key,))

    def __setitem__(self, key: Any, value: Any) -> None:
        self._peer.ask("setitem", self, (key, value))

    def __contains__(self, key: Any) -> bool:
        return self._peer.ask("contains", self, (key,)) is True


class Peer:
    """One end. ``module``: where classes that both processes define are looked up. ``judges``: this end runs
    the tests, so that the other may call the functions and iterate over the iterators that it was given, and
    do nothing else."""

    def __init__(
        self, module: types.ModuleType, incoming: IO[bytes], outgoing: IO[bytes], judges: bool
    ) -> None:
        self.module, self.incoming, self.outgoing, self.judges = module, incoming, outgoing, judges
        self.shared: frozenset[str] = frozenset()
        self.objects: list[Any] = []  # that the other process may name

    def send(self, message: dict[str, Any]) -> None:
        try:
            self.outgoing.write(json.dumps(message).encode() + b"\n")
            self.outgoing.flush()
        except OSError as error:
            raise Broken("the other process has ended") from error

    def receive(self) -> dict[str, Any]:
        line = self.incoming.readline(LONGEST_MESSAGE + 1)
        if not line.endswith(b"\n"):
            raise Broken(
                "a value is too long" if len(line) > LONGEST_MESSAGE else "the other process has ended"
            )
        try:
            message = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise Broken("not a message") from error
        if not isinstance(message, dict):
            raise Broken("not a message")
        return message

    def ask(
        self, operation: str, target: Any, arguments: Sequence[Any] = (), named: dict[str, Any] | None = None
    ) -> Any:
        """The result of an operation in the other process; lists, dictionaries and sets among ``arguments``
        are then what it has made of them. Raises what it raises there."""
        self.send(
            {
                "operation": operation,
                "target": self.encode(target),
                "arguments": [self.encode(argument) for argument in arguments],
                "named": {name: self.encode(value) for name, value in (named or {}).items()},
            }
        )
        while "operation" in (message := self.receive()):  # it calls a function that it was given
            self.answer(message)
        if "error" in message:
            raise self._error(message["error"])
        for argument, after in zip(arguments, message["after"], strict=True):
            if after is not None:
                _become(argument, self.decode(after))
        return self.decode(message["value"])

    def answer(self, message: dict[str, Any]) -> None:
        """Do the operation that is asked for, and send its result."""
        try:
            target = self.decode(message["target"])
            arguments = [self.decode(argument) for argument in message["arguments"]]
            named = {name: self.decode(value) for name, value in message["named"].items()}
            if self.judges:
                self._require_allowed(message["operation"], target)
            value = OPERATIONS[message["operation"]](target, *arguments, **named)
            after = [self.encode(argument) if _mutable(argument) else None for argument in arguments]
            reply = {"value": self.encode(value), "after": after}
        except BaseException as error:
            reply = {"error": self.described(error)}
        self.send(reply)

    def _require_allowed(self, operation: str, target: Any) -> None:
        callable_here = operation == "call" and isinstance(target, types.FunctionType)
        if not callable_here and not (operation in ("iter", "next") and isinstance(target, Iterator)):
            raise TypeError("the tests allow calls of their functions only")

    def encode(self, value: Any) -> Any:
        """``value`` as JSON: by value, or as a number by which the other process names it."""
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind is Remote:
            return {"yours": value._number}
        if kind in PARTS:
            return {"made": kind.__name__, "of": [self.encode(part) for part in PARTS[kind](value)]}
        if isinstance(value, int):
            return {"int": hex(int(value))}
        if isinstance(value, float):
            return {"float": float.hex(value)}
        if isinstance(value, str):
            return str.__str__(value)
        if isinstance(value, bytes | bytearray):
            return {"bytes": bytes(value).hex(), "mutable": isinstance(value, bytearray)}
        if isinstance(value, dict):
            return {"dict": [[self.encode(key), self.encode(item)] for key, item in value.items()]}
        for container in CONTAINERS:
            if isinstance(value, container):
                return {container.__name__: [self.encode(item) for item in value]}
        return self._encode_object(value)

    def _encode_object(self, value: Any) -> Any:
        kind = type(value)
        if kind.__name__ in self.shared and vars(self.module).get(kind.__name__) is kind:
            return {"instance": kind.__name__, "state": self.encode(vars(value))}
        for name, member in TYPES.items():
            if member is value:
                return {"type": name}
        if self.judges:
            for name, function in FUNCTIONS.items():
                if function is value:
                    return {"function": name}
            if not isinstance(value, types.FunctionType | Iterator):
                raise TypeError(
                    f"the tests give the program a {kind.__name__}, which no other process can use"
                )
        self.objects.append(value)
        return {"mine": len(self.objects) - 1}

    def decode(self, sent: Any) -> Any:
        """The value that `encode` was given, from what may be no such thing. Raises Broken."""
        try:
            return self._decoded(sent)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise Broken(f"not a value: {error}") from error

    def _decoded(self, sent: Any) -> Any:
        if sent is None or isinstance(sent, bool | str):
            return sent
        kind, content = next(iter(sent.items()))
        if kind == "int":
            return int(content, 16)
        if kind == "float":
            return float.fromhex(content)
        if kind == "bytes":
            return (bytearray if sent["mutable"] else bytes).fromhex(content)
        if kind == "dict":
            return {self._decoded(key): self._decoded(item) for key, item in content}
        for container in CONTAINERS:
            if kind == container.__name__:
                return container(self._decoded(item) for item in content)
        if kind == "made":
            (maker,) = (maker for maker in PARTS if maker.__name__ == content)
            return maker(*map(self._decoded, sent["of"]))
        return self._decoded_object(kind, content, sent)

    def _decoded_object(self, kind: str, content: Any, sent: dict[str, Any]) -> Any:
        if kind == "yours":
            return self.objects[content]
        if kind == "mine":
            return Remote(self, int(content))
        if kind == "type":
            return TYPES[content]
        if kind == "function" and not self.judges:
            return FUNCTIONS[content]
        if kind == "instance" and content in self.shared:
            instance = object.__new__(vars(self.module)[content])
            vars(instance).update(self._decoded(sent["state"]))
            return instance
        raise ValueError(kind)

    def described(self, error: BaseException) -> dict[str, Any]:
        """An exception as JSON: its classes, its arguments, its text."""
        try:
            text = str(error)
        except BaseException:  # code of the program
            text = "and its text cannot be had"
        try:
            arguments = [self.encode(argument) for argument in error.args]
        except BaseException:
            arguments = [text]
        return {
            "classes": [kind.__name__ for kind in type(error).__mro__],
            "arguments": arguments,
            "text": text,
        }

    def _error(self, sent: Any) -> BaseException:
        """An exception of the same class if both processes have it, else one of the same name."""
        try:
            names, text = [str(name) for name in sent["classes"]], str(sent["text"])
            arguments = [self.decode(argument) for argument in sent["arguments"]]
            base = next(kind for name in names if (kind := self._exception(name)) is not None)
            kind = base if names[0] == base.__name__ else type(names[0], (base,), {})
        except (KeyError, TypeError, ValueError, StopIteration) as error:
            return Broken(f"not an exception: {error}")
        try:
            return kind(*arguments)
        except Exception:  # it takes other arguments
            return type(kind.__name__, (Exception,), {})(text)

    def _exception(self, name: str) -> type[BaseException] | None:
        kind = vars(self.module).get(name) if name in self.shared else vars(builtins).get(name)
        return kind if isinstance(kind, type) and issubclass(kind, BaseException) else None


def _mutable(value: Any) -> bool:
    return type(value) in (list, dict, set, bytearray)


def _become(value: Any, after: Any) -> None:
    """Change a list, dictionary or set in place."""
    if not _mutable(value) or type(after) is not type(value) or value == after:
        return
    if isinstance(value, list | bytearray):
        value[:] = after
    else:
        value.clear()
        value.update(after)


def judge(tests: dict[str, str], incoming: IO[bytes], outgoing: IO[bytes]) -> None:
    """Run the tests of the function in the other process. Raises what they raise. ``tests``: fields of
    `sandbox.ProgramTests`."""
    module = sys.modules["program"] = types.ModuleType("program")
    namespace = vars(module)
    exec(compile(tests["reference"], "reference.py", "exec", dont_inherit=True), namespace)
    peer = Peer(module, incoming, outgoing, judges=True)
    classes = {name: value for name, value in namespace.items() if isinstance(value, type)}
    peer.shared = frozenset(name for name, value in classes.items() if value.__module__ == module.__name__)
    peer.send({"shared": sorted(peer.shared)})
    ready = peer.receive()
    if "error" in ready:
        raise peer._error(ready["error"])
    function = peer.decode(ready["value"])
    namespace[tests["entry_point"]] = function
    exec(compile(tests["source"], "tests.py", "exec", dont_inherit=True), namespace)
    namespace["check"](function)


def serve(
    module: types.ModuleType,
    entry_point: str,
    error: BaseException | None,
    incoming: IO[bytes],
    outgoing: IO[bytes],
) -> NoReturn:
    """Let the tests call the function of the program, or tell them the ``error`` that ended it, until this
    process is killed."""
    peer = Peer(module, incoming, outgoing, judges=False)
    if error is None and entry_point not in vars(module):
        error = NameError(f"name {entry_point!r} is not defined")
    try:
        peer.shared = frozenset(peer.receive()["shared"])
        if error is None:
            peer.objects.append(vars(module)[entry_point])
            peer.send({"value": {"mine": 0}})
        else:
            peer.send({"error": peer.described(error)})
        while True:
            peer.answer(peer.receive())
    except Broken:
        while True:  # the tests are over
            time.sleep(60)
