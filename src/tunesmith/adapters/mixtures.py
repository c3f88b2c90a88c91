"""Which layers of a mixture of experts are routed experts, routers, or too narrow to adapt, and what is said
of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import mlx.nn as nn

from tunesmith.adapters.experts import is_experts
from tunesmith.adapters.layers import dims
from tunesmith.events import Notice

ROUTERS = {"gate", "router"}
"""What mlx-lm's models call a router, or the module that holds it."""


@dataclass(frozen=True)
class Mixture:
    """The adaptable layers of a model, by name. ``experts``: layers of routed experts, with the number of
    experts. ``narrow``: linear layers with one output, such as the gate of a shared expert: their update
    would be as large as the weight."""

    layers: tuple[str, ...]
    experts: Mapping[str, int]
    routers: frozenset[str]
    narrow: frozenset[str]

    @classmethod
    def of(cls, layers: Mapping[str, nn.Module]) -> Mixture:
        """``layers``: the linear layers and layers of experts by name."""
        experts = {name: len(layer["weight"]) for name, layer in layers.items() if is_experts(layer)}
        linear = layers.keys() - experts.keys()
        mixed = experts or any(".experts." in name for name in linear)
        routers = {name for name in linear if mixed and ROUTERS & set(name.split("."))}
        narrow = {name for name in linear if dims(layers[name])[1] == 1}
        return cls(tuple(layers), experts, frozenset(routers - narrow), frozenset(narrow))

    def spared(self, target: str, recorded: Collection[str] | None) -> frozenset[str]:
        """The layers that ``target`` does not reach although its pattern matches. With ``recorded``, the
        layers of a saved adapter, those of the three kinds that it does not adapt."""
        if recorded is not None:
            return frozenset({*self.experts, *self.routers, *self.narrow}.difference(recorded))
        last_word = target.rsplit(".", 1)[-1]
        named = target != "all-linear" and not any(sign in last_word for sign in "*?[")
        return self.narrow if named else self.narrow | self.routers

    def coverage(self, chosen: Collection[str]) -> str:
        """In one line, which layers are adapted, and which of a mixture are not."""
        linear = [name for name in chosen if name not in self.experts]
        parts = [f"{_layers(len(linear))} adapted ({_words(linear)})"] if linear else []
        by_count = Counter(count for name, count in self.experts.items() if name in chosen)
        for count, n_layers in sorted(by_count.items()):
            names = [name for name in chosen if self.experts.get(name) == count]
            parts.append(f"{count} routed experts adapted in each of {_layers(n_layers)} ({_words(names)})")
        left = {
            "of routed experts": self.experts.keys(),
            "that are routers": self.routers,
            "one output wide": self.narrow,
        }
        for words, names in left.items():
            if rest := sorted(set(names) - set(chosen)):
                parts.append(f"{_layers(len(rest))} {words} not adapted ({_words(rest)})")
        return "; ".join(parts)

    def notices(self, chosen: Collection[str], *, dora: bool) -> list[Notice]:
        """What the user should know of an adapter on ``chosen``."""
        unusual = self.experts or self.narrow
        notices = [Notice(self.coverage(chosen), where="adapter")] if unusual else []
        if routers := sorted(self.routers & set(chosen)):
            text = (
                f"routers are adapted ({_words(routers)}): tokens may go to other experts than before, and "
            )
            text += "nothing keeps the load of the experts balanced"
            notices.append(Notice(text, level="warning", count=len(routers), where="adapter.targets"))
        if dora and (experts := sorted(self.experts.keys() & set(chosen))):
            text = "mlx-lm has no DoRA on routed experts: it cannot load this adapter"
            hint = "tunesmith can; for mlx-lm take adapter.kind=lora"
            notices.append(Notice(text, level="warning", count=len(experts), where="adapter.kind", hint=hint))
        return notices


def _layers(count: int) -> str:
    return f"{count} layer{'' if count == 1 else 's'}"


def _words(names: Iterable[str]) -> str:
    """The last words of ``names``, each once."""
    return ", ".join(sorted({name.rsplit(".", 1)[-1] for name in names}))
