"""What will the model learn? The rows of a data set as ``train`` would render them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from tunesmith.data import formats
from tunesmith.model import loading
from tunesmith.model.loading import ModelSpec
from tunesmith.runs.configure import configure
from tunesmith.tokens import renderers, template
from tunesmith.tokens.template import Rendered, Renderer

BUILT_IN = "mistral-v3"
"""The tokenizer that comes with the package, used if nothing else is named."""


def show(
    data: Sequence[str],
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    config: Sequence[str | Path] = (),
    preset: str | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> tuple[Rendered, Renderer]:
    """The rows of ``data`` as ``train`` would learn them with the same settings, and the renderer. Loads no
    weights.

    model: folder, GGUF file or hub id whose tokenizer and chat template are used; tokenizer: ``mistral-v3``
    or a folder."""
    named = model or (None if preset or config else tokenizer or BUILT_IN)
    resolved = configure(model=named, data=data, config=config, preset=preset, sets=sets, environ=environ)
    spec = resolved.spec
    read = formats.read(spec.data.train, spec.data)
    formats.require(read, 1.0)
    renderer = renderers.load(tokenizer_source(spec.model, tokenizer), spec.template)
    renderer.follow(spec.template, spec.data.text_control)
    rules = spec.template
    if rules.too_long == "refuse":  # a row that training would stop for is listed as left out
        rules = rules.model_copy(update={"too_long": "drop"})
    rendered = template.render(read.examples[:limit], renderer, rules, spec.batch.length)
    rendered.dropped[:0] = read.dropped
    rendered.notes.update(resolved.notes)
    for remark, count in formats.remarks(read.examples[:limit]).items():
        rendered.notes[remark.text] += count
    return rendered, renderer


def tokenizer_source(model: ModelSpec, tokenizer: str | None) -> Path | str:
    """Where the tokenizer is: ``tokenizer`` if given, else as the settings of the model say."""
    if chosen := tokenizer or model.tokenizer:
        return chosen
    if model.path == BUILT_IN:
        return BUILT_IN
    return loading.resolve(model.path, dtype=model.dtype, revision=model.revision)
