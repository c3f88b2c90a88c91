"""What would ruin a fine-tune on these rows? ``audit`` with the settings that ``train`` would have."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from tunesmith import events
from tunesmith.auditing import comparison, embeddings, survey
from tunesmith.auditing import fix as fixes
from tunesmith.auditing import page as pages
from tunesmith.auditing.findings import Audit, Fixed
from tunesmith.display import notebook
from tunesmith.errors import ConfigError
from tunesmith.events import Notice, Sink
from tunesmith.files import remove_drafts
from tunesmith.model import loading, vocabulary
from tunesmith.model.loading import ModelSpec
from tunesmith.preflight.show import BUILT_IN, tokenizer_source
from tunesmith.runs.config import RunConfig
from tunesmith.runs.configure import configure, listed
from tunesmith.settings.config import Spec, Texts, from_arguments
from tunesmith.tokens import renderers

notebook.register(Audit, pages.in_notebook)


class AuditOptions(Spec):
    """What an audit on its own does beside judging the rows."""

    tokenizer: str | None = Field(None, description="mistral-v3 (the default without a model) or a folder")
    against: Texts = Field((), description="evaluation sets and prompts that no row may repeat")
    compare: Texts = Field((), description="files to compare the rows with: `Audit.compared`")
    fix: Path | None = Field(
        None, strict=False, description="where a corrected copy goes, with a ledger beside it: `Audit.fixed`"
    )
    page: Path | None = Field(None, strict=False, description="where an HTML page goes")
    embed: bool | None = Field(
        None,
        description="place prompts by the model's hidden states instead of words; null: if a model is given",
    )
    processes: int | None = Field(None, ge=1, description="how many at most; null: one a core")


def audit(
    data: str | Path | Sequence[str | Path],
    *,
    model: str | None = None,
    accept: Sequence[str] = (),
    config: Sequence[str | Path] = (),
    preset: str | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    notify: Sink = events.silent,
    **options: Any,
) -> Audit:
    """Audit the rows: what would ruin a fine-tune on them, each finding with its rows and what to do.

    model: its tokenizer counts tokens and its hidden states place the prompts. accept: findings to let pass.
    options: the fields of `AuditOptions`, such as ``against``, ``fix`` or ``page``. Raises DataError or
    ConfigError."""
    chosen = from_arguments(AuditOptions, options)
    named = model or (None if preset or config else chosen.tokenizer or BUILT_IN)
    if chosen.against:
        sets = [*listed(sets), f"audit.against={json.dumps(chosen.against)}"]
    resolved = configure(
        model=named,
        data=listed(data),
        config=config,
        preset=preset,
        sets=sets,
        accept=accept,
        environ=environ,
    )
    spec = resolved.spec
    for text in resolved.notes:
        notify(Notice(text, where="data.train"))
    if chosen.fix is not None:
        fixes.require_free(spec.data.train, chosen.fix)
    if chosen.page is not None:
        remove_drafts(chosen.page.parent, chosen.page.name)
        pages.check(chosen.page)
    words = tokenizer_source(spec.model, chosen.tokenizer)
    by_hidden_states = chosen.embed if chosen.embed is not None else model is not None
    embedder = _embedder(spec, words, notify) if by_hidden_states else None
    known = _known(spec.model, None if chosen.tokenizer or spec.model.tokenizer else Path(words))
    setup = survey.Setup(spec.data, spec.audit, str(words), spec.template, spec.batch.length, known=known)

    def survey_of(files: Sequence[str]) -> Audit:
        return survey.audit(files, setup, embed=embedder, processes=chosen.processes, notify=notify)

    # A corrected copy is one of the task's rows alone.
    result = survey_of(spec.data.train if chosen.fix is not None else spec.data.trained_on)
    if chosen.compare:
        result = replace(result, compared=comparison.compare(result, survey_of(chosen.compare)))
    if chosen.fix is not None:
        return _fixed(spec, chosen.fix, chosen.page, result, notify)
    if chosen.page is not None:
        pages.write(result, chosen.page)
    return result


def _fixed(spec: RunConfig, out: Path, page: Path | None, result: Audit, notify: Sink) -> Audit:
    """With the corrected copy, without words beside calls if the settings drop them. The page is written
    before the copy gets its name: the copy says that all is done. A new page is removed if the copy cannot
    get its name."""
    drop_words = spec.template.words_beside_calls == "drop_words"
    new_page = page if page is not None and not os.path.lexists(page) else None

    def write_page(fixed: Fixed) -> None:
        if page is not None:
            pages.write(replace(result, fixed=fixed), page)

    try:
        fixed = fixes.fix(
            spec.data.train, out, spec.data, result, notify, drop_words=drop_words, ready=write_page
        )
    except BaseException:
        if new_page is not None and not out.expanduser().exists():
            with suppress(OSError):
                new_page.unlink()
        raise
    return replace(result, fixed=fixed)


def _known(model: ModelSpec, resolved: Path | None) -> int | None:
    """Rows of the embedding of ``model``, which lies at its path or at ``resolved``; None if that is not
    known, or if rows are added."""
    local = Path(model.path).expanduser()
    folder = local if local.is_dir() else resolved
    return None if folder is None or model.resize_embeddings else vocabulary.stored(folder)


def _embedder(spec: RunConfig, tokenizer: Path | str, notify: Sink) -> Callable[[Sequence[str]], np.ndarray]:
    if spec.model.path == BUILT_IN:
        raise ConfigError(
            "no model is named whose hidden states could place the prompts",
            where="--embed",
            hint="--model MODEL",
        )
    loaded = loading.load(spec.model, notify)
    renderer = renderers.load(tokenizer, spec.template)
    return embeddings.embedder(loaded, renderer, events.ticker(notify, "placing prompts"))
