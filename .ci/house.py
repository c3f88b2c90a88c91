"""Rules of the house that neither ruff nor import-linter checks.

``python .ci/house.py [SRC]`` prints a line for each violation and ends with 1 if there is one. A function has
at most 60 lines. A class name exists once in the package. A module's name says what it holds. No file imports
itself through others; import-linter compares siblings only, so it misses a circle through a package's
``__init__``. No formatting is skipped."""

from __future__ import annotations

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

LINES = 60
BANNED = {"utils", "helpers", "common", "misc", "base", "manager", "core"}
PACKAGE = "tunesmith"


def module_name(path: Path, source: Path) -> str:
    parts = path.relative_to(source).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(module: str, tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Modules of the package that ``module`` imports: at its head, within a function, or for types only."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            within = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in modules else node.module for name in within]
        else:
            continue
        yield from (name for name in names if name in modules and name != module)


def circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """Groups of modules that import each other, directly or through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            new = imports[waiting.pop()] - seen
            seen |= new
            waiting += new
        return seen

    reach = {module: reachable(module) for module in imports}
    groups = {
        tuple(sorted(other for other in reach if other in reach[module] and module in reach[other]))
        for module in imports
    }
    return [list(group) for group in sorted(groups) if len(group) > 1]


def violations(source: Path) -> list[str]:
    paths = {module_name(path, source): path for path in sorted((source / PACKAGE).rglob("*.py"))}
    found: list[str] = []
    classes: dict[str, list[str]] = defaultdict(list)
    imports: dict[str, set[str]] = {}
    for module, path in paths.items():
        text, place = path.read_text("utf-8"), path.relative_to(source)
        tree = ast.parse(text)
        if BANNED & {path.stem, path.parent.name}:
            found.append(f"{place}: a name that says nothing")
        imports[module] = set(imported(module, tree, set(paths)))
        found += [
            f"{place}: skips formatting" for _ in range(text.count("# fmt: ") or text.count("# fmt:skip"))
        ]
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                classes[node.name].append(f"{place}:{node.lineno}")
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                if (lines := node.end_lineno - node.lineno + 1) > LINES:
                    found.append(f"{place}:{node.lineno}: {node.name} has {lines} lines, more than {LINES}")
    found += [
        f"class {name} is defined in {', '.join(at)}" for name, at in sorted(classes.items()) if len(at) > 1
    ]
    found += [f"circle of imports: {', '.join(group)}" for group in circles(imports)]
    return found


if __name__ == "__main__":
    problems = violations(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parents[1] / "src")
    print("\n".join(problems) or f"{PACKAGE}: functions, class names and imports are in order")
    sys.exit(bool(problems))
