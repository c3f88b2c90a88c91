"""The settings of the guardrails: one block for each registered guardrail, from YAML files and
``name.key=value`` assignments; and the table of the documentation."""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from pydantic import create_model

from tunesmith.serving.guardrails.guardrail import Guardrail, registered
from tunesmith.settings.config import Spec, load

FOLDER = "tunesmith.serving.guardrails.kinds"


def kinds() -> dict[str, type[Guardrail]]:
    """All guardrails by name."""
    for module in pkgutil.iter_modules(import_module(FOLDER).__path__, f"{FOLDER}."):
        import_module(module.name)
    return registered()


def guardrail_settings() -> type[Spec]:
    """The settings as a Spec with one block for each guardrail. `settings.config` makes the annotated YAML
    and the JSON schema from it."""
    blocks: dict[str, Any] = {name: (kind, kind()) for name, kind in kinds().items()}
    return create_model("GuardrailSettings", __base__=Spec, **blocks)


def load_guardrails(files: Sequence[Path] = (), sets: Sequence[str] = ()) -> tuple[Guardrail, ...]:
    """The guardrails that are not off. Raises ConfigError as `settings.config.load` does."""
    settings = load(guardrail_settings(), files=files, sets=sets).spec
    every: list[Guardrail] = [getattr(settings, name) for name in kinds()]
    return tuple(guardrail for guardrail in every if {guardrail.input, guardrail.output} != {"off"})


def table() -> str:
    """The guardrails as the table of docs/serving.md."""
    lines = ["| guardrail | detects | cannot detect | prompts | answers |", "|---|---|---|---|---|"]
    for name, kind in kinds().items():
        allowed = [", ".join(actions) for actions in (kind.inputs, kind.outputs)]
        lines.append(f"| `{name}` | {kind.detects} | {kind.misses} | {allowed[0]} | {allowed[1]} |")
    return "\n".join(lines)
