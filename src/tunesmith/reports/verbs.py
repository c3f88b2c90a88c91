"""The verbs that end in a report: ``train``, ``compose`` and ``evaluate`` renew it, ``report`` and
``compare`` write it, ``watch`` shows it live."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith import events, reports
from tunesmith.adapters.composition import Recipe
from tunesmith.display import notebook
from tunesmith.errors import ConfigError, DataError
from tunesmith.evaluation import evaluate as evaluation
from tunesmith.evaluation import interference
from tunesmith.evaluation.evaluate import Evaluation
from tunesmith.evaluation.tasks import EvaluationSpec, suite
from tunesmith.events import Notice, Sink
from tunesmith.machine import ranks
from tunesmith.reports import cells, comparison, comparison_page, live
from tunesmith.reports.comparison import RunComparison
from tunesmith.reports.mixture import MixtureReport
from tunesmith.runs import composed, manifest
from tunesmith.runs.config import RunConfig, of_run
from tunesmith.runs.configure import listed
from tunesmith.runs.directory import COMPOSED, CONFIG, Run
from tunesmith.settings.config import Resolved, from_arguments
from tunesmith.training import story

notebook.register(Run, cells.run)
notebook.register(Evaluation, cells.evaluation)
notebook.register(RunComparison, comparison_page.in_notebook)


def train(
    config: Resolved[RunConfig] | None = None,
    *,
    out: str | Path | None = None,
    resume: str | Path | None = None,
    sets: Sequence[str] = (),
    anyway: bool = False,
    notify: Sink = events.silent,
) -> Run | None:
    """Train, write the report, and return the run directory; or resume the run ``resume``.

    Returns None on ranks other than the first of `mlx.launch`. With ``resume``, ``sets`` may change only
    settings that have no effect on the weights. anyway: train also if memory is too small (`plan`). Raises a
    TunesmithError."""
    if resume is not None:
        run = Run.open(resume)
        spec = of_run(run.path / CONFIG, sets)
        if run.status == COMPOSED:
            hint = f"to train it further, begin a run with --set adapter.start={shlex.quote(str(run.path))}"
            raise DataError("was composed of other runs, not trained", where=str(run.path), hint=hint)
        if run.status in ("completed", "stopped_early"):
            manifest.require_same(run, spec, run.hashes)
            if not ranks.join().writes:
                return None
            if reports.is_current(run.path):
                longer = (
                    f"to train further, begin a run with --set adapter.start={shlex.quote(str(run.path))}"
                )
                notify(Notice(f"{run.path} is complete: there is nothing to do", hint=longer))
            else:  # the process died after the last update
                notify(Notice(f"{run.path} is complete: only its report is written"))
                with run.lock():
                    reports.write(run.path)
            return run
        run = story.train(spec, resume=run, notify=notify)
    elif config is not None:
        where = None if out is None else Path(out)
        notes = (*config.unused, *config.notes)
        run = story.train(config.spec, config.origins, out=where, notes=notes, anyway=anyway, notify=notify)
    else:
        raise ConfigError("nothing to train: neither settings nor a run to resume is given")
    if run is not None:
        reports.write(run.path)
    return run


def evaluate(
    run: str | Path,
    *,
    data: Sequence[str] = (),
    checkpoint: str = "best",
    model: str | None = None,
    tasks: Sequence[str] = (),
    base: bool = True,
    fresh: bool = False,
    notify: Sink = events.silent,
    **options: Any,
) -> Evaluation | None:
    """Score base and tuned on the run's held-out rows (or ``data``) and the suites, with intervals, and renew
    the report.

    model: path of the run's model, if it was moved since training. tasks: by name (default: the whole suite).
    fresh: measure again instead of using scores kept from before. options: the fields of
    `evaluation.tasks.EvaluationSpec`, such as ``max_tokens``, ``limit`` or ``benchmarks``. Returns None on
    ranks other than the first of `mlx.launch`."""
    spec = from_arguments(EvaluationSpec, options)
    chosen = [*(listed(tasks) or suite()), *(["benchmarks"] if spec.benchmarks else [])]
    result = evaluation.evaluate(
        Run.open(run),
        data=listed(data),
        checkpoint=checkpoint,
        model=model,
        tasks=chosen,
        base=base,
        fresh=fresh,
        spec=spec,
        notify=notify,
    )
    if result is not None:
        reports.write(result.run.path)
    return result


def compose(
    sources: Mapping[str, float] | Mapping[Path, float],
    *,
    out: str | Path,
    model: str | None = None,
    evaluate: bool = False,
    limit: int | None = None,
    max_tokens: int = 256,
    notify: Sink = events.silent,
    **recipe: Any,
) -> MixtureReport:
    """Combine the adapters of ``sources`` (run or checkpoint folder → weight; negative weights subtract) into
    a new run at ``out``, which every verb takes.

    model: path of the base, if it was moved since training. evaluate: measure each source's held-out rows
    under the mixture and under the source alone; limit, max_tokens: as for `evaluate`. recipe: the fields of
    `adapters.composition.Recipe`, such as ``method`` or ``rank``."""
    given = {"limit": limit is not None, "max_tokens": max_tokens != 256}
    if not evaluate and (unused := [name for name, is_given in given.items() if is_given]):
        where = f"--{unused[0].replace('_', '-')}"
        raise ConfigError("nothing is measured that it limits", where=where, hint="add --evaluate")
    spec = from_arguments(EvaluationSpec, {"limit": limit, "max_tokens": max_tokens})
    made = composed.compose(sources, from_arguments(Recipe, recipe), Path(out), model=model, notify=notify)
    effects = interference.measure(made, model=model, spec=spec, notify=notify) if evaluate else []
    if evaluate:
        composed.add_to_record(made.run, "kept", [effect.to_json() for effect in effects])
    reports.write(made.run.path)
    return MixtureReport(made, tuple(effects))


def compare(
    runs: Sequence[str | Path],
    *,
    out: str | Path = "comparison",
    against: str | Path | None = None,
    notify: Sink = events.silent,
) -> RunComparison:
    """How runs differ in settings and curves, and how their evaluations differ on the same prompts; a page, a
    text and JSON go to ``out``.

    against: the run that all others are compared with (default: the first). Raises DataError if one of them
    is not a run, or if only one is given."""
    comparison_page.check(Path(out))
    paths = [Path(run) for run in listed(runs)]
    compared = comparison.compare(paths, Path(out), None if against is None else Path(against), notify)
    comparison_page.write(compared)
    return compared


def report(run: str | Path) -> Path:
    """Write ``report.md`` and the files beside it (page, JSON, pictures, model card) again; the path of
    ``report.md``."""
    return reports.write(Run.open(run).path)


def watch(run: str | Path, *, once: bool = False) -> None:
    """Show the curves of a run in the terminal while it trains; ``once``: as they are now."""
    live.watch(Path(run), sys.stdout, once=once)
