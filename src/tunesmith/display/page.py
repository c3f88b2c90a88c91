"""A page: one HTML file that needs no network. One template environment, one stylesheet, one guard against
overwriting.

Texts of the data are only ever text: the template escapes them, scripts set them as text, and a content
policy in the page forbids every other script and every request. Templates extend ``base.html``; how pages
look is in ``look.css``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Mapping
from html import escape
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup

from tunesmith.display.console import duration, size
from tunesmith.display.text import escaped, many, percent, visible
from tunesmith.errors import ConfigError
from tunesmith.files import write_text

HEAD_BYTES = 4096
"""The mark of a page stands among the first bytes of the file."""
_NONCE = "\ud800"
"""Stands for the nonce until the page is written: no other text may hold a lone surrogate."""
_UNWRITABLE = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
"""Letters that could end a script or cannot be written as UTF-8; inside JSON they stand as numbers."""


def render(
    template: str,
    data: Mapping[str, Any],
    *,
    package: str,
    verb: str,
    tone: str,
    filters: Mapping[str, Callable[..., Any]],
    facts: Mapping[str, Any],
) -> str:
    """``template`` (a file of ``package`` that extends ``base.html``), filled. The same facts give the same
    page.

    data: what the page's script reads as ``data``. verb: the command that made it. tone: how the verdict
    looks (good, warning, error or note). filters, facts: what the template names, beyond the filters ``line``
    (one line of so many letters), ``percent``, ``duration``, ``size``, ``many`` and ``coded``."""
    folders = {"base.html": "tunesmith.display", "reasons.html": "tunesmith.display"}
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(
            lambda name: (resources.files(folders.get(name, package)) / name).read_text("utf-8")
        ),
        # Whatever is printed, no letter that UTF-8 cannot write gets past it.
        finalize=lambda value: escaped(value) if type(value) is str else value,
    )
    environment.filters |= {
        "line": visible,
        "percent": percent,
        "duration": duration,
        "size": size,
        "many": many,
        "coded": coded,
        **filters,
    }
    script = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    script = _UNWRITABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", script)
    look, _, narrow = (resources.files("tunesmith.display") / "look.css").read_text("utf-8").partition("\f")
    page = environment.get_template(template).render(
        **facts,
        verb=verb,
        tone=tone,
        data=Markup(script),
        nonce=Markup(_NONCE),
        look=Markup(look),
        narrow=Markup(narrow),
    )
    # No text of the page can name the hash of what it is part of, so none carries the right to run a script.
    return page.replace(_NONCE, hashlib.sha256(page.encode("utf-8", "surrogatepass")).hexdigest()[:32])


def coded(text: str) -> Markup:
    """``text`` escaped for HTML, with what is between backticks as code."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text)))


def write(text: str, path: Path, verb: str) -> None:
    """Write the page, whole or not at all. Raises ConfigError as `check` does, and if the file cannot be
    written."""
    check(path, verb)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, text)
    except OSError as error:
        raise ConfigError(
            f"the page cannot be written: {error.strerror}", where=str(path), hint="name another file"
        ) from error


def check(path: Path, verb: str) -> None:
    """Raises ConfigError if ``path`` exists and is not a page that ``tunesmith verb`` wrote."""
    if path.is_file():
        with path.open("rb") as stream:
            if f'<meta name="generator" content="tunesmith {verb}">'.encode() in stream.read(HEAD_BYTES):
                return
    elif not path.exists():
        return
    hint = "name a file that does not exist yet, or remove this one"
    raise ConfigError(
        f"this is not a page of tunesmith {verb}, so it is not replaced", where=str(path), hint=hint
    )
