"""How another program writes settings: how its file is recognised, and what its keys mean here."""

from __future__ import annotations

import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from typing import ClassVar

from tunesmith.runs.migration.keys import Keys

FOLDER = "tunesmith.runs.migration.dialects"
_registered: dict[str, type[Dialect]] = {}


class Dialect(ABC):
    """Abstract. A concrete dialect is final; defining it registers it under its ``name``, that of the
    program."""

    name: ClassVar[str]
    marks: ClassVar[frozenset[str]]
    """Key paths that tell its files from those of other programs."""
    reasons: ClassVar[Mapping[str, str]]
    """Pattern of key paths → why such a key has no counterpart. The first that matches applies."""

    def __init_subclass__(cls) -> None:
        _registered[cls.name] = cls

    @abstractmethod
    def translate(self, keys: Keys) -> None:
        """Set all that ``keys`` has a counterpart for, the program's own defaults included where ours would
        have another effect. Raises ConfigError if what is to be learned has no counterpart."""


def dialects() -> dict[str, type[Dialect]]:
    """All dialects by name, in the order of their names."""
    for module in pkgutil.iter_modules(import_module(FOLDER).__path__, f"{FOLDER}."):
        import_module(module.name)
    return dict(sorted(_registered.items()))
