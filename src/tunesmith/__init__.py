"""Fine-tune language models on your own machine, with proof that it worked.

Each verb of the command line is a function here, under the same name and with the same meaning.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tunesmith.machine import backend

if TYPE_CHECKING:
    from tunesmith.auditing.findings import Audit
    from tunesmith.data.formats import JSON
    from tunesmith.engine.generation import Chat
    from tunesmith.evaluation.evaluate import Evaluation
    from tunesmith.events import Sink
    from tunesmith.reports.compare import Comparison
    from tunesmith.runs.directory import Run, RunConfig
    from tunesmith.settings.config import Resolved
    from tunesmith.tokens.template import Rendered, Renderer

__all__ = [
    "audit",
    "chat",
    "compare",
    "configure",
    "doctor",
    "evaluate",
    "generate",
    "init",
    "plan",
    "report",
    "show",
    "train",
    "watch",
]


# The one thing done at import: MLX binds its BLAS when it is loaded, whichever module of the package loads it
# first.
backend.prepare()


def _many(values: str | Path | Sequence[str | Path]) -> list[str]:
    """One path or text stands for a list of one; a text is never taken letter by letter."""
    return [str(values)] if isinstance(values, str | Path) else [str(value) for value in values]


def _silent(event: object) -> None:
    pass


def configure(
    *,
    preset: str | None = None,
    config: Sequence[str | Path] = (),
    model: str | None = None,
    data: Sequence[str] = (),
    sets: Sequence[str] = (),
    accept: Sequence[str] = (),
    environ: Mapping[str, str] | None = None,
) -> Resolved[RunConfig]:
    """Settings from all layers, later ones first: sets, model, data and accept, environ, config files,
    preset, defaults.

    Raises ConfigError naming every key that is wrong.
    """
    backend.setup()
    from tunesmith.runs.directory import RunConfig
    from tunesmith.settings.config import load

    overrides: dict[str, tuple[JSON, str]] = {}
    if model is not None:
        overrides["model.path"] = (model, "--model")
    if data:
        overrides["data.train"] = (list(_many(data)), "--data")
    layers = {
        "preset": preset,
        "files": [Path(path) for path in _many(config)],
        "environ": environ or {},
        "sets": _many(sets),
    }
    found = load(RunConfig, overrides=overrides, **layers)
    if not accept:
        return found
    both = dict.fromkeys([*found.spec.audit.accept, *_many(accept)])  # on top of what the settings accept
    return load(RunConfig, overrides={**overrides, "audit.accept": ([*both], "--accept")}, **layers)


def init(*, preset: str | None = None, model: str | None = None, data: Sequence[str] = ()) -> str:
    """A complete configuration as YAML, each key with its meaning, default and range; what you must name is
    marked."""
    backend.setup()
    from tunesmith.runs.directory import RunConfig, flat
    from tunesmith.settings import config, origins

    values: dict[str, JSON] = {}
    if preset is not None:
        values |= flat(origins.plain(origins.read(config.preset_file(preset), str)))
    values |= {"model.path": model} if model else {}
    values |= {"data.train": list(_many(data))} if data else {}
    return config.annotated(RunConfig, values)


def doctor(path: str | Path = ".", *, overfit: bool = True, notify: Sink = _silent) -> dict[str, Any]:
    """Will it run here? Versions, device, memory, disk, BLAS, compiler, and a ten-step overfit with a known
    end."""
    from tunesmith.preflight import doctor as preflight

    return preflight.doctor(Path(path), overfit, notify)


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
    named = model or (None if preset or config else tokenizer or "mistral-v3")
    spec = configure(model=named, data=data, config=config, preset=preset, sets=sets, environ=environ).spec
    from tunesmith.data import formats
    from tunesmith.tokens import template

    read = formats.read(spec.data.train, spec.data)
    formats.require(read, 1.0)
    renderer = template.renderer(_tokenizer(spec, tokenizer), spec.template.renderer)
    lenient = (
        spec.template.model_copy(update={"too_long": "drop"})
        if spec.template.too_long == "refuse"
        else spec.template
    )
    rendered = template.render(read.examples[:limit], renderer, lenient, spec.batch.length)
    rendered.dropped[:0] = read.dropped
    return rendered, renderer


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
    notify: Sink = _silent,
) -> Audit:
    """What would ruin a fine-tune on these rows, each finding with its rows and what to do.

    model: its tokenizer counts tokens and its hidden states place the prompts (embed False: TF-IDF does;
    True: the model of the settings). tokenizer: ``mistral-v3`` (the default) or a folder. against: evaluation
    sets and prompts that no row may repeat. accept: findings to let pass. compare: files to hold against
    ``data``, as `Audit.compared`. fix: where a corrected copy goes, with a ledger beside it, as
    `Audit.fixed`. page: where an HTML page goes. processes: at most so many; None: one a core. Raises
    DataError or ConfigError."""
    named = model or (None if preset or config else tokenizer or "mistral-v3")
    sets = [*_many(sets), *([f"audit.against={json.dumps(_many(against))}"] if against else [])]
    spec = configure(
        model=named, data=_many(data), config=config, preset=preset, sets=sets, accept=accept, environ=environ
    ).spec
    from dataclasses import replace

    from tunesmith import events
    from tunesmith.auditing import comparison as comparing
    from tunesmith.auditing import embeddings, survey
    from tunesmith.auditing import fix as fixes
    from tunesmith.auditing import page as pages
    from tunesmith.errors import ConfigError
    from tunesmith.model import loading as models
    from tunesmith.tokens import template

    if fix is not None:
        fixes.require_free(spec.data.train, Path(fix))
    if page is not None:
        pages.check(Path(page))
    words = _tokenizer(spec, tokenizer)
    embedder = None
    if embed and spec.model.path == "mistral-v3":
        raise ConfigError(
            "no model is named whose hidden states could place the prompts",
            where="--embed",
            hint="--model MODEL",
        )
    if embed if embed is not None else model is not None:
        loaded = models.load(spec.model, notify)
        renderer = template.renderer(words, spec.template.renderer)
        embedder = embeddings.embedder(loaded, renderer, events.ticker(notify, "placing prompts"))
    setup = survey.Setup(spec.data, spec.audit, str(words), spec.template, spec.batch.length)
    found = survey.audit(spec.data.train, setup, embed=embedder, processes=processes, notify=notify)
    if compare:
        other = survey.audit(_many(compare), setup, embed=embedder, processes=processes, notify=notify)
        found = replace(found, compared=comparing.compare(found, other))
    if fix is not None:
        found = replace(found, fixed=fixes.fix(spec.data.train, Path(fix), spec.data, found, notify))
    if page is not None:
        pages.write(found, Path(page))
    return found


def _tokenizer(spec: RunConfig, tokenizer: str | None) -> Path | str:
    """Where the tokenizer is that ``tokenizer``, else the settings name."""
    from tunesmith.model import loading as models

    if chosen := tokenizer or spec.model.tokenizer:
        return chosen
    path = spec.model.path
    return (
        path
        if path == "mistral-v3"
        else models.resolve(path, dtype=spec.model.dtype, revision=spec.model.revision)
    )


def train(
    config: Resolved[RunConfig] | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    sets: Sequence[str] = (),
    notify: Sink = _silent,
) -> Run | None:
    """Train, write the report, and return the run directory; or go on with the run ``resume``.

    Under `mlx.launch`, None on all ranks but the first. ``sets`` beside ``resume`` may change only what moves
    no weight. Raises a TunesmithError."""
    backend.setup()
    from tunesmith import reports
    from tunesmith.errors import ConfigError
    from tunesmith.events import Notice
    from tunesmith.machine import ranks
    from tunesmith.runs.directory import CONFIG, Run, RunConfig
    from tunesmith.settings.config import load
    from tunesmith.training import loop as training

    if resume is not None:
        run = Run.open(resume)
        spec = load(RunConfig, files=[run.path / CONFIG], sets=sets).spec
        if run.manifest["status"] in ("completed", "stopped_early"):
            run.require_same(spec, run.manifest["hashes"])
            notify(Notice(f"{run.path} is complete: nothing is left to do"))
            return run if ranks.join().writes else None
        run = training.train(spec, resume=run, notify=notify)
    elif config is not None:
        where = None if out is None else Path(out)
        run = training.train(config.spec, config.origins, out=where, notes=config.unused, notify=notify)
    else:
        raise ConfigError("nothing to train: neither settings nor a run to resume is given")
    if run is not None:
        reports.write(run.path)
    return run


def plan(config: Resolved[RunConfig], *, notify: Sink = _silent) -> dict[str, JSON]:
    """What ``train`` would do, as counts: rows, tokens, padding, steps, trainable parameters. Trains nothing.

    ``micro_batches``: of the first epoch. Where layers lie below the adapter: the share of the layers' work
    that ``loop.cache_frozen`` saves (0 within one epoch) and the room on disk that it takes."""
    backend.setup()
    from tunesmith.events import Notice
    from tunesmith.model import loading as models
    from tunesmith.training import frozen, gradients, preparation, reference
    from tunesmith.training import loop as training

    spec = config.spec.anchored()
    for text in spec.warnings():
        notify(Notice(text, level="warning"))
    prepared = preparation.prepare(spec, notify)
    loaded = models.load(spec.model, notify)
    attached = spec.adapter.attach(loaded.net, spec.loop.seed)
    training.begin(spec, loaded, notify)
    counts: dict[str, JSON] = {**prepared.counts, "trainable": attached.trainable, "total": attached.total}
    gradients.require(loaded.net, spec, prepared.train, notify)
    loop, run = spec.loop, prepared.plan
    micro = [part for step in range(min(run.steps, run.steps_per_epoch)) for part in run.update(step)]
    lengths = [run.lengths[index] for index in run.largest()]
    counts |= {
        "micro_batches": len(micro),
        "largest_micro_batch": {"rows": len(lengths), "tokens": run.cut.size(lengths)},
    }
    counts |= {"reference_sequences": sequences} if (sequences := reference.count(prepared, spec)) else {}
    if depth := frozen.depth(loaded.net):
        saved = frozen.saving(loaded.net, run.steps / run.steps_per_epoch, loop.checkpoint_gradients)
        kept = frozen.Lower(loaded.net, Path()).needed(prepared.train)
        counts |= {
            "frozen_layers_below": depth,
            "cache_frozen_saves": round(saved, 3),
            "cache_frozen_gb": round(kept / 1e9, 3),
        }
    return counts


def evaluate(
    run: str | Path,
    *,
    data: Sequence[str] = (),
    checkpoint: str = "best",
    model: str | None = None,
    tasks: Sequence[str] = (),
    base: bool = True,
    fresh: bool = False,
    notify: Sink = _silent,
    **options: Any,
) -> Evaluation | None:
    """Scores of base and tuned on the run's held-out rows (or ``data``) and the suites, with intervals; the
    report is renewed.

    model: where the run's model lies now, None: where it was trained. tasks: names of `evaluation.TASKS`,
    none: the whole suite. options: the fields of `tasks.EvaluationSpec`, as ``max_tokens``, ``limit`` or
    ``benchmarks``. fresh: measure again what is known from before. None on ranks but the first of
    `mlx.launch`."""
    backend.setup()
    from tunesmith import reports
    from tunesmith.evaluation import evaluate as evaluation
    from tunesmith.evaluation.tasks import EvaluationSpec
    from tunesmith.runs.directory import Run
    from tunesmith.settings.config import load

    given = {key: ([*value] if isinstance(value, tuple) else value, key) for key, value in options.items()}
    spec = load(EvaluationSpec, overrides=given).spec
    chosen = [*(_many(tasks) or evaluation.SUITE), *(["benchmarks"] if spec.benchmarks else [])]
    found = evaluation.evaluate(
        Run.open(run),
        data=_many(data),
        checkpoint=checkpoint,
        model=model,
        tasks=chosen,
        base=base,
        fresh=fresh,
        spec=spec,
        notify=notify,
    )
    if found is not None:
        reports.write(found.run.path)
    return found


def compare(
    runs: Sequence[str | Path],
    *,
    out: str | Path = "comparison",
    against: str | Path | None = None,
    notify: Sink = _silent,
) -> Comparison:
    """What differs between runs, and how their evaluations differ on the same prompts; a page, a text and
    JSON go to ``out``.

    against: the run that the others are held against (the first one). Raises DataError where one is no run,
    or there is one only."""
    from tunesmith.reports import compare as comparing

    paths = [Path(run) for run in _many(runs)]
    return comparing.compare(
        paths, Path(out), against=None if against is None else Path(against), notify=notify
    )


def watch(run: str | Path, *, once: bool = False) -> None:
    """Show the curves of a run in the terminal while it trains; ``once``: as they are now."""
    import sys

    from tunesmith.reports import live

    live.watch(Path(run), sys.stdout, once=once)


def report(run: str | Path) -> Path:
    """Write ``report.md`` and all that stands beside it (page, JSON, pictures, model card) anew; the path of
    ``report.md``."""
    from tunesmith import reports
    from tunesmith.runs.directory import Run

    return reports.write(Run.open(run).path)


def generate(
    target: str | Path,
    prompts: Sequence[str],
    *,
    checkpoint: str = "best",
    model: str | None = None,
    adapter: bool = True,
    system: str | None = None,
    max_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    notify: Sink = _silent,
) -> list[str]:
    """One answer a prompt from a run, a checkpoint folder, or a plain model; batched.

    model: where the run's model lies now, None: where it was trained. adapter False asks the run's base as it
    was before training."""
    backend.setup()
    from tunesmith import events
    from tunesmith.engine import generation as answers

    speaker = answers.load(target, checkpoint, model_path=model, adapter=adapter, notify=notify)
    asked = [answers.asked(prompt, system) for prompt in _many(prompts)]
    sampling = answers.Sampling(max_tokens, temperature, top_p, seed)
    return speaker.answer(asked, sampling, events.ticker(notify, "answering"))


def chat(
    target: str | Path,
    *,
    checkpoint: str = "best",
    model: str | None = None,
    system: str | None = None,
    max_tokens: int = 512,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    notify: Sink = _silent,
) -> Chat:
    """A conversation with a run, a checkpoint folder or a plain model: ``for piece in chat(run).say("Hello"):
    …``."""
    backend.setup()
    from tunesmith.data.formats import Message
    from tunesmith.engine import generation as answers

    speaker = answers.load(target, checkpoint, model_path=model, notify=notify)
    sampling = answers.Sampling(max_tokens, temperature, top_p, seed)
    return answers.Chat(speaker, sampling, [Message("system", system)] if system else [])
