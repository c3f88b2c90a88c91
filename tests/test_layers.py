"""The house: modules import from lower rows only, the package stays small, and nothing heavy is imported early."""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1] / "src" / "tunesmith"
ROWS = {
    0: {"errors", "events", "backend", "formats", "examples", "sources", "calls", "writing", "config", "origins", "console"},
    1: {
        "auditing",
        "template",
        "renderers",
        "batches",
        "model",
        "gguf",
        "adapters",
        "objectives",
        "tasks",
        "optimizer",
        "kernels",
        "logprobs",
        "ranks",
        "scoring",
        "sandbox",
        "confinement",
    },
    2: {"run"},
    3: {"preparation", "training", "evaluation", "answers", "gradients", "frozen", "reference", "caution", "instruments"},
    4: {"reports", "preflight", "live"},
    5: {"cli", "__init__", "__main__", "demo", "demo_data"},
}
ROW = {module: row for row, modules in ROWS.items() for module in modules}


def imports(path: Path) -> set[str]:
    """Top modules of tunesmith that a file imports, at any depth of the code but under TYPE_CHECKING."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing_only = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and getattr(block.test, "id", "") == "TYPE_CHECKING"
        for node in ast.walk(block)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "tunesmith":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tunesmith."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {[*alias.name.split("."), "__init__"][1] for alias in node.names if alias.name.split(".")[0] == "tunesmith"}
    return found


def modules() -> dict[str, list[Path]]:
    found: dict[str, list[Path]] = {}
    for path in sorted(SOURCE.rglob("*.py")):
        relative = path.relative_to(SOURCE)
        found.setdefault(relative.parts[0].removesuffix(".py"), []).append(path)
    return found


def test_every_module_has_a_row_and_imports_only_from_its_own_row_or_lower():
    found = modules()
    assert len(found) >= 20
    assert set(found) == set(ROW), "a new module belongs into ROWS"
    upward = [
        f"{path.relative_to(SOURCE)} (row {ROW[module]}) imports {used} (row {ROW[used]})"
        for module, paths in found.items()
        for path in paths
        for used in imports(path)
        if used in ROW and ROW[used] > ROW[module]
    ]
    assert upward == []


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank line, comment or docstring."""
    lines: set[int] = set()
    source = path.read_text(encoding="utf-8")
    skipped = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in skipped:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines -= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return len(lines)


def test_the_package_stays_small():
    lines = {path: len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.rglob("*.py")}
    assert [path.name for path, count in lines.items() if count > 500] == []
    assert 1000 < sum(map(code_lines, lines)) <= 16700


def loaded_after(statement: str) -> set[str]:
    code = f"import sys; {statement}; print(' '.join(sys.modules))"
    return set(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split())


def test_row_zero_and_the_command_line_load_neither_mlx_nor_transformers():
    row_zero = ", ".join(f"tunesmith.{module}" for module in sorted(ROWS[0]))
    for statement in (f"import {row_zero}", "import tunesmith.cli", "import tunesmith.preflight"):
        assert loaded_after(statement).isdisjoint({"mlx.core", "mlx_lm", "transformers", "matplotlib", "scipy"}), statement
