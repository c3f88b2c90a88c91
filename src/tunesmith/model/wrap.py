"""Replace what single layer objects compute, and put it back.

The class of these objects becomes a subclass with another ``__call__``, or another method. Other objects of
the same class, in this model or in others of the process, stay as they are."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn

Call = Callable[..., Any]
"""A method: takes the module first."""


def replace(
    modules: Iterable[nn.Module], call_of: Callable[[type[nn.Module]], Call], method: str = "__call__"
) -> Callable[[], None]:
    """Let each module compute ``call_of(its class)``; returns the function that puts the classes back."""
    originals = [(module, type(module)) for module in modules]
    subclasses: dict[type[nn.Module], type[nn.Module]] = {}
    for module, kind in originals:
        if kind not in subclasses:
            members = {method: call_of(kind), "__doc__": kind.__doc__, "__module__": kind.__module__}
            subclasses[kind] = type(kind.__name__, (kind,), members)
        module.__class__ = subclasses[kind]

    def restore() -> None:
        for module, kind in originals:
            module.__class__ = kind

    return restore


def rebound(call: Call, names: Mapping[str, Any]) -> Call:
    """The method ``call``, whose global ``names`` mean these values."""
    code: Any = call
    copy = types.FunctionType(
        code.__code__, code.__globals__ | names, code.__name__, code.__defaults__, code.__closure__
    )
    copy.__kwdefaults__ = code.__kwdefaults__
    return copy


@contextmanager
def replaced(modules: Iterable[nn.Module], call_of: Callable[[type[nn.Module]], Call]) -> Iterator[None]:
    """Inside, each module computes ``call_of(its class)``."""
    restore = replace(modules, call_of)
    try:
        yield
    finally:
        restore()
