"""Which installed packages does this process do without?

transformers imports torch wherever it is installed, for seconds, and mlx-lm imports transformers; tunesmith
never uses torch. ``USE_TORCH=0`` has no effect since transformers 5. To every library, a hidden package is
one that is not installed. Hide packages only in a process that is tunesmith's own (the command line, the
demo, the workers of the audit): a program that imports tunesmith may need torch itself."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

_hidden: set[str] = set()


class _VisiblePackages(PathFinder):
    """Finds what Python finds on ``sys.path``, except hidden packages."""

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return None if fullname in _hidden else super().find_spec(fullname, path, target)


def installed(package: str) -> bool:
    """Whether this process can import ``package``; it is not imported."""
    if package in sys.modules:
        return sys.modules[package] is not None
    return importlib.util.find_spec(package) is not None


def hide(*packages: str) -> None:
    """Make ``packages`` impossible to import in this process. A package that is imported already stays; once
    transformers is, nothing is hidden, because it remembers what was installed and would fail without it."""
    if "transformers" in sys.modules:
        return
    _hidden.update(packages)
    if PathFinder in sys.meta_path:
        sys.meta_path[sys.meta_path.index(PathFinder)] = _VisiblePackages
