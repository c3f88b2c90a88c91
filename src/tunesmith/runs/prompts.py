"""Prompts of the user that a run answers as it trains: written out, from files, or those that ship with the
package."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from importlib import resources
from pathlib import Path

from tunesmith.errors import ConfigError

KEY = "loop.prompts"
FILES = (".txt", ".jsonl")
"""An entry without white space that ends so is a file."""


def shipped() -> dict[str, Path]:
    """Name → file of the lists of prompts that ship with the package."""
    folder = Path(str(resources.files("tunesmith.settings") / "prompts"))
    return {path.stem: path for path in sorted(folder.glob("*.txt"))}


def resolve(entries: Iterable[str]) -> tuple[str, ...]:
    """The texts that ``entries`` mean: a shipped list by its name, a file by its path, any other text as it
    is. Raises ConfigError if a file cannot be read or holds no prompt."""
    known = shipped()
    texts: list[str] = []
    for entry in entries:
        if entry in known:
            texts += _read(known[entry])
        elif entry.endswith(FILES) and not any(map(str.isspace, entry)):
            texts += _read(Path(entry).expanduser())
        else:
            texts.append(entry)
    return tuple(dict.fromkeys(texts))


def _read(path: Path) -> list[str]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        hint = f"a text, a file ({' or '.join(FILES)}), or one of {', '.join(shipped())}"
        raise ConfigError(f"cannot be read: {error}", where=f"{KEY}: {path}", hint=hint) from error
    texts = [text for text in (_objects(lines, path) if path.suffix == ".jsonl" else lines) if text.strip()]
    if not texts:
        raise ConfigError("holds no prompt", where=f"{KEY}: {path}", hint="write one prompt a line")
    return texts


def _objects(lines: Iterable[str], path: Path) -> Iterator[str]:
    """The prompt of each line: a JSON text, or an object with the key ``prompt``."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except ValueError as error:
            raise ConfigError(f"is not JSON: {error}", where=f"{KEY}: {path}:{number}") from error
        prompt = value.get("prompt") if isinstance(value, dict) else value
        if not isinstance(prompt, str):
            hint = '{"prompt": "…"}'
            raise ConfigError("has no prompt", where=f"{KEY}: {path}:{number}", hint=hint)
        yield prompt
