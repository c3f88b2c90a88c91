"""What will the model learn? The rows of a data set as ``train`` would render them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from markupsafe import Markup

from tunesmith import events
from tunesmith.data import formats, mixing
from tunesmith.display import notebook
from tunesmith.display.notebook import NotebookResult
from tunesmith.display.text import many
from tunesmith.errors import ConfigError, DataError
from tunesmith.events import Notice, Sink
from tunesmith.model import loading
from tunesmith.model.loading import ModelSpec
from tunesmith.runs import opening
from tunesmith.runs.config import RunConfig
from tunesmith.runs.configure import configure
from tunesmith.runs.directory import MANIFEST, VALID, Run
from tunesmith.tokens import renderers, template
from tunesmith.tokens.template import Rendered, Renderer, Row

BUILT_IN = "mistral-v3"
"""The tokenizer that comes with the package, used if nothing else is named."""
SHOWN = 5
"""Rows in a notebook."""


@dataclass
class RenderedParts(Rendered):
    """The rows of the task. ``mixed``: those of each entry of ``data.mix``, by the names of its files."""

    mixed: dict[str, Rendered]


DISTILLED = "distilled: of the learned places the base's probabilities are learned, not the tokens"


class RowsAndRenderer(NamedTuple):
    rendered: RenderedParts
    renderer: Renderer


class ShownRows(NotebookResult, RowsAndRenderer):
    """The rows, and the renderer that made them."""

    __slots__ = ()


def _cell(shown: ShownRows) -> Markup:
    """What a notebook shows: the first rows, their learned tokens marked."""
    rows = shown.rendered.rows
    counted = f"{many(len(rows), 'row')}, {len(shown.rendered.dropped):,} left out; learned tokens are marked"
    parts = [notebook.soft(counted)]
    for row in rows[:SHOWN]:
        text = Markup("").join(
            Markup("<mark>{}</mark>" if learned else "{}").format(piece)
            for piece, learned in pieces(row, shown.renderer.decode)
        )
        parts.append(Markup("<h3>{}</h3><pre>{}</pre>").format(heading(row), text))
    for name, part in shown.rendered.mixed.items():
        counted = f"{many(len(part.rows), 'row')}, {len(part.dropped):,} left out; not shown here"
        parts.append(notebook.soft(f"data.mix: {name}: {counted}"))
    return Markup("").join(parts)


notebook.register(ShownRows, _cell)


def heading(row: Row) -> str:
    """Where a row is from, and how many of its tokens are learned."""
    learned = int((row.tokens.targets > 0).sum())
    return f"{row.source}, turn {row.turn}: {len(row.tokens.ids)} tokens, {learned} learned"


def pieces(row: Row, decode: Callable[[list[int]], str]) -> Iterator[tuple[str, bool]]:
    """The row's text in spans, each with whether its tokens are learned."""
    ids, targets = row.tokens
    start = 0
    for end in range(1, len(ids) + 1):
        if end == len(ids) or (targets[end] > 0) != (targets[start] > 0):
            yield decode(ids[start:end].tolist()), bool(targets[start] > 0)
            start = end


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
    notify: Sink = events.silent,
) -> ShownRows:
    """The rows of ``data`` as ``train`` would learn them with the same settings, and the renderer. Loads no
    weights.

    data: files or folders, or one run, whose held-out rows are rendered as it renders them. model: folder,
    GGUF file or hub id whose tokenizer and chat template are used; tokenizer: ``mistral-v3`` or a folder.
    limit: of the rows of the task, and of each entry of ``data.mix``. Raises ConfigError for settings beside
    a run."""
    if len(data) == 1 and (Path(data[0]) / MANIFEST).is_file():
        if model or tokenizer or config or preset or sets:
            hint = f"name its rows instead: {Path(data[0]) / VALID}"
            raise ConfigError("a run is shown by its own settings", where=data[0], hint=hint)
        return _of_run(Run.open(data[0]), limit, notify)
    named = model or (None if preset or config else tokenizer or BUILT_IN)
    resolved = configure(model=named, data=data, config=config, preset=preset, sets=sets, environ=environ)
    for text in resolved.notes:
        notify(Notice(text, where="data.train"))
    spec = resolved.spec
    renderer = renderers.load(tokenizer_source(spec.model, tokenizer), spec.template)
    renderer.follow(spec.template, spec.data.text_control)
    task = _rendered(spec.data.train, spec, renderer, limit)
    return ShownRows(RenderedParts(**vars(task), mixed=_mixed(spec, renderer, limit)), renderer)


def _of_run(run: Run, limit: int | None, notify: Sink) -> ShownRows:
    """The held-out rows of ``run`` as it renders them, and the rows of its ``data.mix``. Raises DataError
    if it holds none out."""
    rows = run.path / VALID
    if not rows.is_file() or not rows.stat().st_size:
        raise DataError("holds no rows out", where=str(run.path), hint="show the file that it was trained on")
    renderer = opening.renderer_of(run, tokenizer_source(run.config.model, None))
    data = run.config.data.model_copy(update={"train": (str(rows),), "format": "auto"})
    spec = run.config.model_copy(update={"data": data})
    task = _rendered(data.train, spec, renderer, limit)
    try:
        mixed = _mixed(run.config, renderer, limit)
    except DataError as error:  # the files may be gone since the run
        notify(Notice(f"not shown: {error.what}", level="warning", where=f"data.mix: {error.where}"))
        mixed = {}
    return ShownRows(RenderedParts(**vars(task), mixed=mixed), renderer)


def _mixed(spec: RunConfig, renderer: Renderer, limit: int | None) -> dict[str, Rendered]:
    """The rows of each entry of ``data.mix``. Raises DataError as `_rendered` does."""
    parts: dict[str, Rendered] = {}
    for name, entry in zip(mixing.names(spec.data.mix), spec.data.mix, strict=True):
        parts[name] = _rendered(entry.path, spec, renderer, limit)
        if entry.distill:
            parts[name].notes[DISTILLED] += len(parts[name].rows)
    return parts


def _rendered(data: Sequence[str], spec: RunConfig, renderer: Renderer, limit: int | None) -> Rendered:
    """The rows of ``data``, and those that cannot be used."""
    read = formats.read(data, spec.data)
    formats.require(read, 1.0)
    rules = spec.template
    if rules.too_long == "refuse":  # a row that training would stop for is listed as left out
        rules = rules.model_copy(update={"too_long": "drop"})
    rendered = template.render(read.examples[:limit], renderer, rules, spec.batch.length)
    rendered.dropped[:0] = read.dropped
    for remark, count in formats.remarks(read.examples[:limit]).items():
        rendered.notes[remark.text] += count
    return rendered


def tokenizer_source(model: ModelSpec, tokenizer: str | None) -> Path | str:
    """Where the tokenizer is: ``tokenizer`` if given, else as the settings of the model say."""
    if chosen := tokenizer or model.tokenizer:
        return chosen
    if model.path == BUILT_IN:
        return BUILT_IN
    return loading.resolve(model.path, dtype=model.dtype, revision=model.revision)
