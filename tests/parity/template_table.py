"""Render conversations with every public template, compare with transformers, and write docs/templates.md.

    PYTHONPATH=src:tests python tests/parity/template_table.py FOLDER [--write]

FOLDER: as `public_templates` fetched it."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

from parity import templates

PAGE = Path(__file__).parents[2] / "docs" / "templates.md"
START, END = "<!-- templates -->\n", "<!-- end of templates -->\n"
BAR = ("plain", "many turns", "system", "tools")


def table(folder: Path) -> list[str]:
    """The table in Markdown, after a sentence that counts."""
    rows, exact, possible = [], Counter[str](), Counter[str]()
    whole: list[str] = []
    files = sorted(folder.glob("*.jinja"))
    for file in files:
        results, switch = templates.measured(file.name, file.read_text(encoding="utf-8"))
        exact.update(kind for kind, cell in results.items() if cell == "exact")
        possible.update(kind for kind, cell in results.items() if not cell.startswith("cannot"))
        fails = [kind for kind in BAR if results[kind] != "exact" and not results[kind].startswith("cannot")]
        if results["plain"] == "exact" and not fails:
            whole.append(file.stem)
        cells = [file.stem.replace("--", " "), *results.values(), switch or ""]
        rows.append(f"| {' | '.join(cells)} |")
    sentence = (
        f"Of {len(files)} templates {possible['plain']} can write a conversation; {len(whole)} of them are "
        "exact for plain, many-turn, system and tool conversations, as far as the template itself can write "
        "them."
    )
    kinds = list(templates.KINDS)
    counts = [f"{exact[kind]} of {possible[kind]}" for kind in kinds]
    head = f"| template | {' | '.join(kinds)} | thinking by |"
    total = f"| **exact, of those that can** | {' | '.join(counts)} | |"
    return [sentence, "", head, "|---" * (len(kinds) + 2) + "|", total, *rows]


def page_rows() -> dict[str, list[str]]:
    """The cells of docs/templates.md, by template."""
    lines = PAGE.read_text(encoding="utf-8").partition(START)[2].partition(END)[0].splitlines()
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[3:]}


if __name__ == "__main__":
    lines = "\n".join(table(Path(sys.argv[1]))) + "\n"
    print(lines)
    if "--write" in sys.argv:
        page = PAGE.read_text(encoding="utf-8")
        before, after = page.split(START)[0], page.split(END)[1]
        PAGE.write_text(before + START + lines + END + after, encoding="utf-8")
