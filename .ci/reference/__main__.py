"""Write docs/reference/ from the source: ``python .ci/reference``; with ``--check``, list the pages that
differ from what would be written, and end with 1 if there is one."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from tunesmith.machine import backend

FOLDER = Path(__file__).parents[2] / "docs" / "reference"
NOTE = "<!-- Written by `python .ci/reference` from the source: change it there. -->\n"


def pages() -> dict[str, Callable[[], str]]:
    """Name of the page → what writes its text."""
    backend.setup()  # MLX is set up before anything loads it
    import command_pages
    import error_pages
    import event_pages
    import format_pages
    import http_pages
    import python_pages
    import run_pages
    import setting_pages

    return {
        "commands": command_pages.text,
        "settings": setting_pages.text,
        "events": event_pages.text,
        "errors": error_pages.errors,
        "reasons": error_pages.reasons,
        "formats": format_pages.text,
        "run-directory": run_pages.text,
        "http": http_pages.text,
        "python": python_pages.text,
    }


def stale(folder: Path, *, write: bool) -> list[str]:
    """The files in ``folder`` that differ from the source, lack there, or are not written from it; they are
    put right if ``write``."""
    texts = {f"{name}.md": NOTE + text().strip() + "\n" for name, text in pages().items()}
    present = {path.name: path.read_text("utf-8") for path in folder.glob("*.md")}
    names = sorted(name for name in texts.keys() | present.keys() if texts.get(name) != present.get(name))
    for name in names if write else ():
        folder.mkdir(exist_ok=True)
        if name in texts:
            (folder / name).write_text(texts[name], "utf-8")
        else:
            (folder / name).unlink()
    return names


if __name__ == "__main__":
    check = sys.argv[1:] == ["--check"]
    differing = stale(FOLDER, write=not check)
    verb = "differs from the source: make reference" if check else "written"
    print("\n".join(f"docs/reference/{name}: {verb}" for name in differing) or "docs/reference is up to date")
    sys.exit(check and bool(differing))
