"""The result of a translation: our settings with the old key beside each, and what has no counterpart."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tunesmith.runs.config import RunConfig
from tunesmith.runs.migration.keys import LeftOut, MappedSetting, Old
from tunesmith.settings.config import JSON
from tunesmith.settings.origins import shortened, write


@dataclass(frozen=True, slots=True)
class Translation:
    """``empty``: old keys that are null. ``missing``: required settings that the file does not give → the
    option that gives them."""

    program: str
    file: str
    settings: tuple[MappedSetting, ...]
    left_out: tuple[LeftOut, ...]
    empty: tuple[str, ...]
    missing: Mapping[str, str]

    @property
    def used(self) -> list[str]:
        """The keys of the file from which settings were computed."""
        keys = (old.key for setting in self.settings for old in setting.sources if old.given)
        return list(dict.fromkeys(keys))

    @property
    def summary(self) -> str:
        """One line: how many keys were used, left out and empty."""
        n_changed = sum(bool(setting.note) for setting in self.settings)
        text = f"{self.program}: {len(self.used)} keys used in {len(self.settings)} settings"
        text += f" ({n_changed} with a note), {len(self.left_out)} without a counterpart"
        text += f", {len(self.empty)} empty"
        return text + "".join(f"; {key} is missing: give {option}" for key, option in self.missing.items())

    @property
    def yaml(self) -> str:
        """For ``tunesmith train --config``."""
        sections: dict[str, list[str]] = {name: [] for name in RunConfig.model_fields}
        for setting in self.settings:
            section, _, name = setting.key.partition(".")
            sections[section] += [f"  {line}" for line in self._lines(setting, name)]
        for key, option in self.missing.items():
            section, _, name = key.partition(".")
            sections[section].insert(0, f"  # {name}:  # not in {self.file}: give {option}")
        lines = list(self._head())
        for name, body in sections.items():
            if body:
                empty = all(line.lstrip().startswith("#") for line in body)
                lines += [f"# {name}:" if empty else f"{name}:", *body]
        return "\n".join([*lines, *self._rest()]) + "\n"

    def json(self) -> dict[str, JSON]:
        """For ``--json``."""
        return {
            "program": self.program,
            "file": self.file,
            "settings": {
                setting.key: {
                    "value": setting.value,
                    "note": setting.note,
                    "from": [
                        {"key": old.key, "value": old.value, "where": old.origin} for old in setting.sources
                    ],
                }
                for setting in self.settings
            },
            "left_out": [entry._asdict() for entry in self.left_out],
            "empty": list(self.empty),
            "missing": dict(self.missing),
            "counts": {
                "keys": len(self.used) + len(self.left_out) + len(self.empty),
                "used": len(self.used),
                "left_out": len(self.left_out),
                "empty": len(self.empty),
            },
            "yaml": self.yaml,
        }

    def _head(self) -> Iterator[str]:
        n_keys = len(self.used) + len(self.left_out) + len(self.empty)
        text = f"Settings for `tunesmith train --config FILE`, from {shortened(self.file)} ({self.program}). "
        text += (
            f"Of its {n_keys} keys: {len(self.used)} used, {len(self.left_out)} without a counterpart and "
        )
        text += f"{len(self.empty)} empty, which are listed at the end. Beside each setting stands the old "
        text += f"key; (default) marks what {self.program} does if its file does not say."
        yield from _comment(text, "")

    def _lines(self, setting: MappedSetting, name: str) -> Iterator[str]:
        if setting.note:
            yield from _comment(setting.note, "")
        *before, last = write({name: setting.value}).splitlines()
        sources = ", ".join(map(_shown, setting.sources))
        yield from before
        yield f"{last}  # {sources}" if sources else last

    def _rest(self) -> Iterator[str]:
        if self.left_out:
            yield "#"
            yield f"# Without a counterpart ({len(self.left_out)}), with the reason:"
        for reason in dict.fromkeys(entry.reason for entry in self.left_out):
            entries = [entry for entry in self.left_out if entry.reason == reason]
            shown = (f"{entry.key}: {_json(entry.value)} (line {_line(entry)})" for entry in entries)
            yield from _comment(f"{', '.join(shown)}: {reason}", "  ")
        if self.empty:
            yield from _comment(f"Empty ({len(self.empty)}): {', '.join(self.empty)}", "")


def _line(entry: LeftOut) -> str:
    return entry.origin.rpartition(":")[2]


def _shown(old: Old[Any]) -> str:
    is_default = not old.given and not old.key.startswith("--")  # an option replaces what the file says
    return f"{old.key}: {_json(old.value)}" + (" (default)" if is_default else "")


def _json(value: object) -> str:
    return shortened(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))


def _comment(text: str, indent: str) -> Iterator[str]:
    lines = textwrap.wrap(text, 106 - len(indent), break_long_words=False, break_on_hyphens=False)
    for number, line in enumerate(lines):
        yield f"# {indent}{'  ' if indent and number else ''}{line}"
