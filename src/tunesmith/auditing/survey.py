"""Runs an audit: one pass over the rows, then the findings.

Rows are read as a stream and shown to the rules in one process per core; only what the rules return for a row
stays in memory. The few rows that are needed again (candidates of near duplicates) are read a second time."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, cast

from tunesmith import events
from tunesmith.auditing import AuditSpec, clusters, quality
from tunesmith.auditing.clusters import Clustering
from tunesmith.auditing.findings import Audit, Finding, Print, gravest_first
from tunesmith.auditing.registry import Rule, rules
from tunesmith.auditing.rules import contamination
from tunesmith.auditing.views import LOOKED_AT, Context, Survey, View, beginning
from tunesmith.checks.content import masked
from tunesmith.data import formats, sources
from tunesmith.data.examples import Example
from tunesmith.data.formats import DataSpec, Dropped
from tunesmith.data.sources import Raw
from tunesmith.display.text import excerpt
from tunesmith.errors import ConfigError, DataError, listing
from tunesmith.events import Notice, Sink
from tunesmith.machine import imports
from tunesmith.tokens import renderers
from tunesmith.tokens.template import Refused, Renderer, Row, TemplateSpec

BATCH = 256  # rows that travel to a process at once
ALONE = 3_000
"""Up to this many rows one process is faster: starting others and loading libraries in each takes seconds."""
APART = 300
"""From so many rows on, and up to `ALONE`, a second process clusters the prompts while this one looks at the
rows."""
WORST = 20
EXTRA = {
    "sklearn": "the map of prompts shows two principal components, not t-SNE: scikit-learn is not installed",
    "joblib": "one process reads all rows: joblib is not installed",
}
"""Module of the extra ``audit`` → what is different without it."""


@dataclass(frozen=True)
class Setup:
    """What each process builds its `Context` from. ``tokenizer``: a folder, ``mistral-v3``, or None to count
    words."""

    data: DataSpec
    spec: AuditSpec
    tokenizer: str | None = None
    template: TemplateSpec | None = field(default=None, hash=False)  # its options are a dictionary
    limit: int = 2048
    share: float = 1.0
    call: str = ""  # differs from audit to audit, so that a process that outlives one reads its files anew
    known: int | None = None  # see `Context`
    rules: tuple[Rule, ...] = field(default_factory=rules, compare=False)


class Looked(NamedTuple):
    """The result for one row. ``kept``: what each rule returned, in the order of the rules. ``shortened``:
    only its beginning was looked at."""

    source: str
    label: bool | None
    dropped: Dropped | None
    asked: str
    kept: tuple[Any, ...]
    shortened: bool = False


def audit(
    paths: Sequence[str | Path],
    setup: Setup,
    *,
    embed: Callable[[Sequence[str]], Any] | None = None,
    processes: int | None = None,
    notify: Sink = events.silent,
) -> Audit:
    """Audit the rows of ``paths``. processes: at most so many, or None for one per core.

    Training rows must not repeat rows of the held-out files that ``setup.data.valid`` names. Raises DataError
    if a file cannot be read as a whole, ConfigError if ``accept`` names no rule."""
    started = time.perf_counter()
    check_accepted(setup.spec)
    for text in [text for module, text in EXTRA.items() if not imports.installed(module)]:
        notify(Notice(text, hint="pip install 'tunesmith[audit]'"))
    files_read = sources.files(paths)
    tick = events.ticker(notify, "counting rows")
    total = 0
    for done, path in enumerate(files_read):
        tick(done, len(files_read))
        total += sum(1 for _ in sources.raws(path))
    if not total:
        raise DataError("no rows", where=", ".join(map(str, files_read)), hint="name files of rows")
    setup = replace(setup, share=min(1.0, setup.spec.sample / max(total, 1)), call=uuid.uuid4().hex)
    beside = APART <= total <= ALONE and setup.share == 1 and embed is None and _available(processes) > 1
    survey = Survey(
        setup.spec,
        context=replace(
            context(setup), embed=embed, clusters=_clusters_beside(files_read, setup.data) if beside else None
        ),
        fetch=lambda rows: _fetch(files_read, rows, setup.data),
    )
    tick = events.ticker(notify, "rows audited")
    shortened = 0
    for looked in _looks(files_read, setup, total, processes):
        _add(survey, looked, setup.rules)
        shortened += looked.shortened
        if len(survey) % 50 == 0 or len(survey) == total:
            tick(len(survey), total)
    _tell_shortened(shortened, notify)
    files = {str(path): sources.sha256(path) for path in files_read}
    return _judged(survey, setup.rules, files, notify, started)


def examine(
    examples: Sequence[Example], files: dict[str, str], known: Context, notify: Sink = events.silent
) -> Audit:
    """Audit examples that are in memory, with their rendered tokens if ``known`` has them."""
    started = time.perf_counter()
    check_accepted(known.spec)
    applied = rules()
    known = replace(known, share=min(1.0, known.spec.sample / max(len(examples), 1)))
    survey = Survey(
        known.spec,
        context=known,
        fetch=lambda rows: {row: _shown(examples[row], examples[row].source) for row in rows},
    )
    tick = events.ticker(notify, "rows audited")
    shortened = 0
    for done, example in enumerate(examples, 1):
        looked = _look(_shown(example, example.source), known, applied)
        _add(survey, looked, applied)
        shortened += looked.shortened
        tick(done, len(examples))
    _tell_shortened(shortened, notify)
    return _judged(survey, applied, files, notify, started)


def _tell_shortened(count: int, notify: Sink) -> None:
    if count:
        text = f"rows of more than {LOOKED_AT:,} characters, of which the audit looks at the beginning"
        notify(Notice(text, level="warning", count=count))


def require(audit: Audit) -> None:
    """Raises DataError with what was found if there are errors that were not accepted."""
    if not (errors := audit.of("error")):
        return
    lines = []
    for error in errors:
        where = ", ".join(row.source for row in error.rows[:3]) + (", …" if len(error.rows) > 3 else "")
        place, hint = f" ({where})" if where else "", f"; {error.hint}" if error.hint else ""
        lines.append(f"{error.rule}: {error.what}{place}{hint}")
    accept = " ".join(f"--accept {error.rule}" for error in errors)
    raise DataError(
        f"the audit found errors:\n{listing(lines)}",
        where=", ".join(audit.files) or None,
        hint=f"`tunesmith audit` shows every row; {accept} trains on it as it is",
    )


def check_accepted(spec: AuditSpec) -> None:
    """Raises ConfigError if ``accept`` names a dimension that no rule has."""
    known = [rule.name for rule in rules()]
    for name in spec.accept:
        if (dimension := name.partition(".")[0]) not in known:
            near = get_close_matches(dimension, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}"
            raise ConfigError(f'no rule is called "{name}"', where="audit.accept", hint=hint)


@lru_cache(maxsize=1)
def context(setup: Setup) -> Context:
    """Built once in each process."""
    made_renderer: Renderer | None = (
        None if setup.tokenizer is None else renderers.load(setup.tokenizer, setup.template)
    )
    if made_renderer and setup.template:
        made_renderer.follow(setup.template, setup.data.text_control)
    against = [contamination.load(path, setup.data) for path in setup.spec.against]
    if isinstance(setup.data.valid, tuple) and setup.data.valid:
        against.append(
            contamination.held_out(
                row for row in formats.rows(setup.data.valid, setup.data) if not isinstance(row, Dropped)
            )
        )
    name = Path(setup.tokenizer).name if setup.tokenizer else ""
    return Context(
        setup.spec,
        setup.limit,
        setup.share,
        made_renderer,
        name,
        against=against,
        template=setup.template,
        known=setup.known,
    )


def rendered(
    rows: Iterable[Row], refusals: Iterable[Dropped], other: Context
) -> Callable[[Example], list[Row]]:
    """A function from an example to its sequences, which raises `Refused` as the renderer did. ``other``
    renders examples that are not among ``rows``."""
    known: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        known.setdefault((row.source, row.example_id), []).append(row)
    bad = {refusal.source: refusal for refusal in refusals if refusal.reason != "too_long"}

    def look_up(example: Example) -> list[Row]:
        if (sequences := known.get((example.source, example.id))) is not None:
            return sequences
        if (refusal := bad.get(example.source)) is not None:
            raise Refused(refusal.reason, refusal.fault, refusal.hint or None)
        return other.render(example)

    return look_up


def _looks(files: Sequence[Path], setup: Setup, total: int, processes: int | None) -> Iterator[Looked]:
    raws = (raw for path in files for raw in sources.raws(path))
    batches = iter(lambda: list(islice(raws, BATCH)), [])
    if total <= ALONE or (processes := _available(processes)) == 1:
        for batch in batches:
            yield from _look_all(batch, setup)
        return
    import joblib
    from joblib.externals.loky import get_reusable_executor

    work = joblib.Parallel(n_jobs=processes, return_as="generator", pre_dispatch="3*n_jobs")
    parts = cast(
        Iterable[list[Looked]], work(joblib.delayed(_look_in_worker)(batch, setup) for batch in batches)
    )
    for part in parts:
        yield from part
    get_reusable_executor().shutdown(wait=True)  # its processes would hold their memory while the rules judge


def _available(processes: int | None) -> int:
    """``processes``, or one for each core, never more than there are cores; one without joblib."""
    if not imports.installed("joblib"):
        return 1
    import joblib

    return min(processes or joblib.cpu_count(), joblib.cpu_count())


def _clusters_beside(files: Sequence[Path], data: DataSpec) -> Callable[[Sequence[str]], Clustering]:
    """Starts to cluster the prompts of ``files`` in another process; a function that waits for the result, or
    computes it if it is called with other prompts."""
    from joblib.externals.loky import get_reusable_executor

    executor = get_reusable_executor(max_workers=1)
    future = executor.submit(_clusters_in_worker, files, data)

    def clusters_of(prompts: Sequence[str]) -> Clustering:
        try:
            clustered, clustering = future.result()
        except BrokenExecutor:  # the process was killed, as when memory runs out
            return clusters.clusters(prompts)
        finally:
            executor.shutdown(wait=False)
        return clustering if clustered == list(prompts) else clusters.clusters(prompts)

    return clusters_of


def _clusters_in_worker(files: Sequence[Path], data: DataSpec) -> tuple[list[str], Clustering]:
    imports.hide("pandas")  # scikit-learn would load it
    views = (_view(raw, data) for path in files for raw in sources.raws(path))
    subjects = (clusters.subject(view) for view in views if view.example is not None)
    prompts = [subject for subject in subjects if subject]
    return prompts, clusters.clusters(prompts)


def _look_in_worker(batch: Sequence[Raw], setup: Setup) -> list[Looked]:
    imports.hide("torch")  # each process would load it with the tokenizer
    return _look_all(batch, setup)


def _look_all(batch: Sequence[Raw], setup: Setup) -> list[Looked]:
    known = context(setup)
    return [_look(_view(raw, setup.data), known, setup.rules) for raw in batch]


def _view(raw: Raw, data: DataSpec) -> View:
    example = formats.row(raw, data)
    if isinstance(example, Dropped):
        return View(raw.source, None, example._replace(raw=""))
    return _shown(example, raw.source)


def _shown(example: Example, source: str) -> View:
    start = beginning(example)
    return View(source, start, shortened=start is not example)


def _look(view: View, known: Context, rules: Sequence[Rule]) -> Looked:
    drawn = known.drawn(view)
    try:
        facts = tuple(rule.look(view, known) if drawn or not rule.drawn else None for rule in rules)
    except RecursionError:
        bad = Dropped(view.source, "json", "expected a row, found values nested too deeply", "")
        return _look(View(view.source, None, bad), known, rules)
    return Looked(
        view.source, view.label, view.dropped, excerpt(view.asked or view.said), facts, view.shortened
    )


def _add(survey: Survey, looked: Looked, applied: Sequence[Rule]) -> None:
    survey.sources.append(looked.source)
    survey.labels.append(looked.label)
    survey.dropped.append(looked.dropped)
    survey.asked.append(looked.asked)
    for rule, fact in zip(applied, looked.kept, strict=True):
        survey.kept.setdefault(rule.name, []).append(fact)


def _judged(
    survey: Survey, applied: Sequence[Rule], files: dict[str, str], notify: Sink, started: float
) -> Audit:
    for rule in rules():  # those that are left out kept nothing
        survey.kept.setdefault(rule.name, [None] * len(survey))
    prints = _prints(survey)
    findings: list[Finding] = []
    tick = events.ticker(notify, "rules judged")
    for done, rule in enumerate(applied, 1):
        findings += _findings_of(rule, survey)
        survey.kept[rule.name] = []  # of many rows it is much, and no rule reads another's
        tick(done, len(applied))
    _tell_unused(survey.spec, findings, notify)
    findings = [_accepted(finding, survey.spec) for finding in findings]
    unreadable = [source for source, bad in zip(survey.sources, survey.dropped, strict=True) if bad]
    scores, why = quality.scores(survey.sources, unreadable, findings)
    prompts = dict(zip(survey.sources, survey.asked, strict=True))
    survey.charts["worst"] = [
        {"source": source, "score": score, "why": why.get(source, []), "text": masked(prompts[source])}
        for source, score in islice(scores.items(), WORST)
        if score < 100
    ]
    seconds = time.perf_counter() - started
    return Audit(files, len(survey), gravest_first(findings), scores, survey.charts, prints, seconds)


def _findings_of(rule: Rule, survey: Survey) -> list[Finding]:
    """Raises ConfigError if a finding is more severe than its rule states."""
    findings = list(rule.judge(survey.kept[rule.name], survey))
    for finding in findings:
        if not rule.allows(finding):
            name = finding.rule.partition(".")[2]
            raise ConfigError(
                f"the finding {finding.rule} is of severity {finding.severity}, more than the rule states",
                where=f"{type(rule).__module__}.{type(rule).__qualname__}",
                hint=f'add "{name if name in rule.findings else ""}": "{finding.severity}" to its `gravest`',
            )
    return findings


def _prints(survey: Survey) -> list[Print]:
    repeats, conflicts = survey.kept["duplicates"], survey.kept["conflicts"]
    return [
        Print(source, label, words.same, prompt.prompt if prompt else None)
        for source, label, words, prompt in zip(
            survey.sources, survey.labels, repeats, conflicts, strict=True
        )
        if words is not None
    ]


def _tell_unused(spec: AuditSpec, findings: Sequence[Finding], notify: Sink) -> None:
    names = {name for finding in findings for name in (finding.rule, finding.dimension)}
    for name in spec.accept:
        if name not in names:
            text = f"{name} is accepted, but no rule of that name was applied"
            notify(Notice(text, "warning", where="audit.accept"))


def _accepted(finding: Finding, spec: AuditSpec) -> Finding:
    grave = finding.severity in ("error", "warning")
    passes = finding.rule in spec.accept or finding.dimension in spec.accept
    return replace(finding, severity="note", accepted=finding.severity) if grave and passes else finding


def _fetch(files: Sequence[Path], rows: Sequence[int], data: DataSpec) -> dict[int, View]:
    wanted, views = set(rows), {}
    raws = (raw for path in files for raw in sources.raws(path))
    for row, raw in enumerate(raws if wanted else ()):
        if row in wanted:
            views[row] = _view(raw, data)
            if len(views) == len(wanted):
                break
    return views
