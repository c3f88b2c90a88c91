"""Every setting: type, range, default, values of the presets, effect, and when to change it."""

from __future__ import annotations

from itertools import groupby

from writing import cell, code

from tunesmith.runs.config import RunConfig
from tunesmith.settings import origins
from tunesmith.settings.config import Setting, flat, meanings, preset_file, presets

INTRODUCTION = """# Every setting

[Settings](../settings.md) says where values come from and which override which. `tunesmith init > run.yaml`
writes the keys with the same words. Keys that only some kinds of a block have name these kinds.
"""


def text() -> str:
    parts = [INTRODUCTION]
    filled = {name: flat(origins.plain(origins.read(preset_file(name), str))) for name in presets()}
    for block, members in groupby(meanings(RunConfig), key=lambda setting: setting.key.partition(".")[0]):
        parts.append(f"## {block}\n")
        for setting in members:
            parts.append(described(setting, filled))
    return "\n".join(parts)


def described(setting: Setting, filled: dict[str, dict[str, object]]) -> str:
    heading = setting.key if "." in setting.key else f"{setting.key}.kind"
    key = heading if any(heading in values for values in filled.values()) else setting.key
    given = [f"`{name}` {code(shown(values[key]))}" for name, values in filled.items() if key in values]
    lines = [f"- value: {setting.allowed}"]
    lines.append("- required" if setting.default is None else f"- default: {code(setting.default)}")
    lines += [f"- presets: {', '.join(given)}"] * bool(given)
    lines += [f"- when to change it: {setting.when}"] * bool(setting.when)
    kinds = f" ({', '.join(setting.kinds)})" if setting.kinds else ""
    effect = plain(setting.effect[:1].upper() + setting.effect[1:])
    return "\n".join([f"### {heading}{kinds}\n", f"{effect}.\n", *map(plain, lines), ""])


def plain(line: str) -> str:
    """Words as Markdown shows them unchanged: no link, no emphasis."""
    parts = line.split("`")
    parts[::2] = [part.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_") for part in parts[::2]]
    return "`".join(parts)


def shown(value: object) -> str:
    return cell(
        str(value).lower()
        if isinstance(value, bool)
        else f"{value:g}"
        if isinstance(value, float)
        else str(value)
    )
