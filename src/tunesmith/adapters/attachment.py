"""An adapter as a value: what was trained, attached to a model and detached from it again.

Detaching leaves the model exactly as it was: the same module objects, the same arrays, the same parameters
frozen."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from tunesmith.adapters.layers import trainable
from tunesmith.adapters.specs import AdapterSpec
from tunesmith.errors import ConfigError, ModelError, listing

UNFIT = "give a folder that tunesmith saved, and its model"


class _ModuleState:
    """One module's class, mode, parameters and children (by reference), and which of them are frozen."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.kind = module, type(module)
        self.members = {name: _copied(member) for name, member in module.items()}
        self.frozen, self.training = set(module._no_grad), module._training

    def restore(self) -> None:
        self.module.__class__ = self.kind
        self.module.clear()
        dict.update(self.module, self.members)  # nn.Module.update takes parameters only
        self.module._no_grad, self.module._training = set(self.frozen), self.training


def _copied(member: Any) -> Any:
    """The lists and dictionaries of children, which replacing a child changes in place."""
    if isinstance(member, list):
        return [_copied(child) for child in member]
    if isinstance(member, dict) and not isinstance(member, nn.Module):
        return {name: _copied(child) for name, child in member.items()}
    return member


class Handle:
    """An adapter in its place in ``net``."""

    def __init__(self, net: nn.Module) -> None:
        self.net = net
        self._states = [_ModuleState(module) for module in net.modules()]

    def detach(self) -> None:
        """Make ``net`` what it was before the adapter came. Does nothing the second time."""
        for state in self._states:
            state.restore()
        self._states = []


@dataclass(frozen=True)
class Adapter:
    """``tensors``: what was trained, by the name that it has in an adapted model. ``source``: where it was
    read, for messages. ``layers``: names of the adapted layers, if the file has them."""

    spec: AdapterSpec
    tensors: Mapping[str, mx.array]
    source: str = ""
    layers: tuple[str, ...] | None = None

    def attach(self, net: nn.Module) -> Handle:
        """Put the adapter into ``net``; all other parameters are frozen. Raises ModelError and leaves
        ``net`` as it was if the two do not fit."""
        handle = Handle(net)
        try:
            self.install(net)
        except BaseException:
            handle.detach()
            raise
        return handle

    def install(self, net: nn.Module, *, lazily: bool = False) -> None:
        """Put the adapter into ``net`` for good: the weights that it replaces are freed. lazily: nothing is
        read or computed until it is used. Raises ModelError if the two do not fit; ``net`` may have changed
        then."""
        try:
            self.spec.attach(net, seed=0, recorded=self.layers, lazily=lazily)
        except ConfigError as error:
            message = f"the adapter does not fit the model: {error}"
            raise ModelError(message, where=self.source, hint=UNFIT) from error
        self.fill(net, lazily=lazily)

    def fill(self, net: nn.Module, *, lazily: bool = False) -> None:
        """Give the trainable tensors of ``net`` these values; lazily: they are read when they are used.
        Raises ModelError, listing every tensor that does not fit, and leaves ``net`` as it was."""
        in_net = {name: value.shape for name, value in trainable(net).items()}
        in_file = {name: value.shape for name, value in self.tensors.items()}
        problems = [
            f"{name}: {in_file.get(name, 'missing')} in the file, {in_net.get(name, 'not')} in the model"
            for name in sorted(in_net | in_file)
            if in_net.get(name) != in_file.get(name)
        ]
        if problems:
            message = f"{len(problems)} tensors of the adapter do not fit the model\n{listing(problems)}"
            hint = "an adapter fits only the model that it was trained on"
            raise ModelError(message, where=self.source, hint=hint)
        dtypes = {name: value.dtype for name, value in trainable(net).items()}
        net.update(
            tree_unflatten([(name, value.astype(dtypes[name])) for name, value in self.tensors.items()])
        )
        if not lazily:
            mx.eval(trainable(net))  # read from the file only now, when what they replace is free
