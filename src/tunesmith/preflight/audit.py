"""What would ruin a fine-tune on these rows? ``audit`` with the settings that ``train`` would have."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tunesmith import events
from tunesmith.auditing import comparison, embeddings, survey
from tunesmith.auditing import fix as fixes
from tunesmith.auditing import page as pages
from tunesmith.auditing.findings import Audit
from tunesmith.errors import ConfigError
from tunesmith.events import Sink
from tunesmith.model import loading
from tunesmith.preflight.show import BUILT_IN, tokenizer_source
from tunesmith.runs.config import RunConfig
from tunesmith.runs.configure import configure, listed
from tunesmith.tokens import renderers


def audit(
    data: str | Path | Sequence[str | Path],
    *,
    model: str | None = None,
    tokenizer: str | None = None,
    against: Sequence[str | Path] = (),
    accept: Sequence[str] = (),
    compare: str | Path | Sequence[str | Path] = (),
    fix: str | Path | None = None,
    page: str | Path | None = None,
    embed: bool | None = None,
    processes: int | None = None,
    config: Sequence[str | Path] = (),
    preset: str | None = None,
    sets: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
    notify: Sink = events.silent,
) -> Audit:
    """Audit the rows: what would ruin a fine-tune on them, each finding with its rows and what to do.

    model: its tokenizer counts tokens and its hidden states place the prompts (embed False: TF-IDF does;
    True: the model of the settings). tokenizer: ``mistral-v3`` (the default) or a folder. against: evaluation
    sets and prompts that no row may repeat. accept: findings to let pass. compare: files to compare ``data``
    with, as `Audit.compared`. fix: where a corrected copy goes, with a ledger beside it, as `Audit.fixed`.
    page: where an HTML page goes. processes: how many at most (default: one a core). Raises DataError or
    ConfigError."""
    named = model or (None if preset or config else tokenizer or BUILT_IN)
    sets = [*listed(sets), *([f"audit.against={json.dumps(listed(against))}"] if against else [])]
    spec = configure(
        model=named,
        data=listed(data),
        config=config,
        preset=preset,
        sets=sets,
        accept=accept,
        environ=environ,
    ).spec
    if fix is not None:
        fixes.require_free(spec.data.train, Path(fix))
    if page is not None:
        pages.check(Path(page))
    words = tokenizer_source(spec.model, tokenizer)
    by_hidden_states = embed if embed is not None else model is not None
    embedder = _embedder(spec, words, notify) if by_hidden_states else None
    setup = survey.Setup(spec.data, spec.audit, str(words), spec.template, spec.batch.length)

    def survey_of(files: Sequence[str]) -> Audit:
        return survey.audit(files, setup, embed=embedder, processes=processes, notify=notify)

    result = survey_of(spec.data.train)
    if compare:
        result = replace(result, compared=comparison.compare(result, survey_of(listed(compare))))
    if fix is not None:
        result = replace(result, fixed=fixes.fix(spec.data.train, Path(fix), spec.data, result, notify))
    if page is not None:
        pages.write(result, Path(page))
    return result


def _embedder(spec: RunConfig, tokenizer: Path | str, notify: Sink) -> Callable[[Sequence[str]], np.ndarray]:
    if spec.model.path == BUILT_IN:
        raise ConfigError(
            "no model is named whose hidden states could place the prompts",
            where="--embed",
            hint="--model MODEL",
        )
    loaded = loading.load(spec.model, notify)
    renderer = renderers.load(tokenizer, spec.template.renderer)
    return embeddings.embedder(loaded, renderer, events.ticker(notify, "placing prompts"))
