"""The verb ``sweep``: from its file to one page."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith import events
from tunesmith.display import notebook
from tunesmith.display.notebook import NotebookResult
from tunesmith.errors import ConfigError, TrainingError
from tunesmith.events import Event, Notice, Sink
from tunesmith.runs.configure import listed
from tunesmith.settings.config import EXAMPLE
from tunesmith.settings.origins import parse, plain
from tunesmith.sweeps import ledger, measured, outcome, page, spec, trials
from tunesmith.sweeps.execution import Execution, only_one
from tunesmith.sweeps.outcome import SweepOutcome
from tunesmith.sweeps.room import TrialRoom
from tunesmith.sweeps.search import Search
from tunesmith.sweeps.spec import BaseSpec, SweepSpec
from tunesmith.sweeps.trials import SweepPlan

WHOLE = (1, 1)
"""The part that is all trials."""
FOLDER = "runs"
"""Where sweeps are made, so that ``tunesmith runs`` lists their trials."""


@dataclass(frozen=True)
class SweepReport(NotebookResult):
    """A sweep that was run. ``folder``: with ``sweep.json``, ``sweep.html`` and the trials."""

    folder: Path
    outcome: SweepOutcome

    @property
    def page(self) -> Path:
        return self.folder / page.PAGE

    @property
    def lines(self) -> list[str]:
        """The verdict, then what explains it."""
        return [self.outcome.verdict, *self.outcome.lines]


notebook.register(SweepReport, lambda report: page.in_notebook(report.outcome))


@dataclass(frozen=True)
class SweepRequest:
    """A sweep as it was asked for. ``file``: which was read. ``base``: with the options over the file's.
    ``options``: those of the command line that change the base, as words."""

    file: Path
    folder: Path
    spec: SweepSpec
    base: BaseSpec
    plan: SweepPlan
    options: tuple[str, ...]


def request(
    file: str | Path,
    *,
    out: str | Path | None = None,
    preset: str | None = None,
    config: Sequence[str | Path] = (),
    model: str | None = None,
    data: Sequence[str] = (),
    sets: Sequence[str] = (),
) -> SweepRequest:
    """Read and check everything, and train nothing. Raises ConfigError."""
    path = spec.find(file)
    asked = spec.read(path)
    name = asked.name or path.stem
    base = asked.base.model_copy(
        update={
            "config": (*asked.base.config, *listed(config)),
            "settings": {**asked.base.settings, **dict(map(_assigned, sets))},
            **({} if preset is None else {"preset": preset}),
            **({} if model is None else {"model": model}),
            **({"data": tuple(listed(data))} if data else {}),
        }
    )
    measured.metric(asked)
    plan = trials.expand(asked, base, str(file), os.environ)
    folder = Path(FOLDER) / name if out is None else Path(out)
    given = BaseSpec(preset=preset, config=tuple(listed(config)), model=model, data=tuple(listed(data)))
    options = (*trials.base_words(given), *(word for text in sets for word in ("--set", text)))
    return SweepRequest(path, folder, asked.model_copy(update={"name": name}), base, plan, options)


def _assigned(text: str) -> tuple[str, object]:
    key, sign, value = text.partition("=")
    if not sign:
        raise ConfigError(f'must be key=value, not "{text}"', where="--set", hint=f"for example {EXAMPLE}")
    return key.strip(), plain(parse(value, lambda line: "--set"))


def sweep(
    file: str | Path,
    *,
    out: str | Path | None = None,
    preset: str | None = None,
    config: Sequence[str | Path] = (),
    model: str | None = None,
    data: Sequence[str] = (),
    sets: Sequence[str] = (),
    parallel: int | None = None,
    optuna: int | None = None,
    part: str | None = None,
    notify: Sink = events.silent,
) -> SweepReport:
    """Train every trial of ``file`` (a YAML file, or the name of a ready-made sweep), compare them, and write
    ``sweep.html``. Called again with the same settings it goes on where it stopped.

    out: folder of the sweep (default ``runs/NAME``). preset, config, model, data, sets: as for `configure`,
    over the base that the file names. parallel: processes at a time, instead of the file's. optuna:
    search the file's space with so many settings in all. part: train only these trials, "1/3" the first,
    fourth and so on, to divide a sweep among machines. Raises ConfigError if the sweep was begun with other
    settings, TrainingError if no trial could be trained."""
    asked = request(file, out=out, preset=preset, config=config, model=model, data=data, sets=sets)
    at_once = parallel or asked.spec.parallel
    if optuna is not None:
        if part is not None:
            hint = "what is tried next depends on all that was tried"
            raise ConfigError("a search cannot be divided", where="--part", hint=hint)
        return _searched(asked, optuna, at_once, notify)
    require_trials(asked)
    return _require_result(_run(asked, at_once, notify, parse_part(part)))


def require_trials(asked: SweepRequest) -> None:
    """Raises ConfigError if what is tried is for a search to say."""
    if asked.spec.space:
        hint = "--optuna 20 tries twenty settings of it; a grid or trials need no search"
        raise ConfigError("a space is searched with --optuna", where=str(asked.file), hint=hint)


def parse_part(text: str | None) -> tuple[int, int]:
    """(number, count) of "1/3". Raises ConfigError if it is not a part."""
    if text is None:
        return WHOLE
    number, _, count = text.partition("/")
    if number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count):
        return int(number), int(count)
    hint = "for example 1/2 on one machine and 2/2 on another"
    raise ConfigError(f'"{text}" is not a part', where="--part", hint=hint)


def _searched(asked: SweepRequest, count: int, parallel: int, notify: Sink) -> SweepReport:
    """A sweep over what Optuna suggests, as many settings at a time as there are processes. A setting that
    fails is told as such, and the search goes on."""
    ledger.require_own(asked.folder)
    study = Search(asked.folder, asked.spec, measured.metric(asked.spec))
    notify = _once(notify)
    report: SweepReport | None = None
    while report is None or study.pending or len(study.changes) < count:
        if not study.pending:
            study.suggest(min(parallel, count - len(study.changes)))
        chosen = asked.spec.model_copy(update={"grid": {}, "trials": tuple(study.changes)})
        plan = trials.expand(chosen, asked.base, str(asked.file), os.environ)
        extended = replace(asked, spec=chosen, plan=plan)
        report = _run(extended, parallel, notify, retry=report is None)
        study.tell(report.outcome)
    return _require_result(report)


def _once(notify: Sink) -> Sink:
    """Passes on each notice once: every round of a search goes through all trials so far."""
    told: set[tuple[str, str | None]] = set()

    def tell(event: Event) -> None:
        if isinstance(event, Notice):
            if (event.what, event.where) in told:
                return
            told.add((event.what, event.where))
        notify(event)

    return tell


def _run(
    asked: SweepRequest, parallel: int, notify: Sink, part: tuple[int, int] = WHOLE, retry: bool = True
) -> SweepReport:
    """Train what is not trained yet, and compare. retry: what failed before as well."""
    folder = asked.folder
    page.check(folder)
    ledger.require_own(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with only_one(folder):
        return _trained(asked, parallel, notify, part, retry)


def _trained(
    asked: SweepRequest, parallel: int, notify: Sink, part: tuple[int, int], retry: bool
) -> SweepReport:
    folder = asked.folder
    book, plan = ledger.opened(folder, asked.spec, asked.plan, asked.file)
    base = trials.frozen_base(asked.base, folder)
    for trial in plan.trials:
        entry = book.entry(trial.name)
        if entry.state == "waiting":
            entry.words = list(trials.words(base, plan.settings[trial.setting].changes, trial.seed))
    for text in plan.notes:
        notify(Notice(text))
    book.write(folder)
    try:
        room = TrialRoom(base, plan.settings)
        Execution(folder, asked.spec, plan, book, parallel, room, part, notify, retry).run()
    finally:
        report = _concluded(asked, plan, book)
    return report


def _require_result(report: SweepReport) -> SweepReport:
    """``report``. Raises TrainingError if no trial has a value."""
    if report.outcome.best is None:
        notes = [note for setting in report.outcome.settings for note in setting.notes]
        hint = f"what the trials said is in {report.folder / trials.LOGS}"
        message = f"no trial could be trained: {'; '.join(dict.fromkeys(notes))}"
        raise TrainingError(message, where=str(report.folder), hint=hint)
    return report


def _concluded(asked: SweepRequest, plan: SweepPlan, book: ledger.Ledger) -> SweepReport:
    """Compare what has ended, and write it down."""
    name = asked.spec.name or asked.folder.name
    result = outcome.outcome(name, asked.folder, plan, book, measured.metric(asked.spec))
    book.results = result.to_json()
    book.write(asked.folder)
    command = ["tunesmith", "sweep", str(asked.file), *asked.options, "--out", str(asked.folder)]
    page.write(result, asked.folder, command)
    return SweepReport(asked.folder, result)
