"""From files to a plan of updates, without loading weights: all errors in the data appear here."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tunesmith import events
from tunesmith.auditing import survey
from tunesmith.auditing.findings import Audit
from tunesmith.auditing.rules import contamination
from tunesmith.auditing.views import Context
from tunesmith.checks.calls import ReferenceAnswer, references
from tunesmith.data import asking, formats, mixing
from tunesmith.data.examples import REASONING_BESIDE
from tunesmith.data.sources import files as files_of
from tunesmith.errors import ConfigError, DataError, ResumeMismatch
from tunesmith.events import Notice, Sink
from tunesmith.files import write_json
from tunesmith.learning.objective import Objective, Selected
from tunesmith.machine import backend
from tunesmith.model import loading, vocabulary
from tunesmith.runs import thinking
from tunesmith.runs.config import MOST_STEPS, RunConfig
from tunesmith.runs.directory import AUDIT, DROPPED, PLAN, SHOWN, VALID, Run
from tunesmith.runs.thinking import Reasoning
from tunesmith.tokens import renderers, template
from tunesmith.tokens.batches import Cut, Group, Plan
from tunesmith.tokens.renderers import Recorded
from tunesmith.training.caution import lonely

RENDERED_ROWS_KEPT = 5
SAME = ("rows_train", "sequences_train", "tokens", "supervised_tokens", "steps")
"""Counts that a resumed run has as when it began."""


@dataclass(frozen=True)
class Prepared:
    """Everything that is known before weights are loaded. ``objective``: settled for the training rows."""

    objective: Objective
    renderer: template.Renderer
    valid_examples: list[formats.Example]
    held_out: list[formats.Example]
    train: list[Group]
    valid: list[Group]
    plan: Plan
    dropped: list[formats.Dropped]
    counts: dict[str, Any]
    hashes: dict[str, Any]
    rendered: list[template.Row]
    audit: Audit | None = None
    day: date | None = None  # that the template saw
    tools: tuple[formats.JSON, ...] = ()  # that the task's rows declare, if all of them declare the same ones
    reference: Any = None  # `reference.Reference`, once the base has been measured

    @property
    def accepted(self) -> dict[str, str]:
        """Findings that ``audit.accept`` allowed: rule → message."""
        findings = self.audit.findings if self.audit else []
        return {finding.rule: finding.what for finding in findings if finding.accepted}


@dataclass(frozen=True)
class Sources:
    """The files as read, and their examples as the two sides of the run. ``mixed``: for each entry of
    ``data.mix`` its rows, which are trained on too; ``reads`` has them last."""

    reads: list[formats.Read]
    train: list[formats.Example]
    valid: list[formats.Example]
    mixed: list[list[formats.Example]]

    @property
    def trained_on(self) -> list[formats.Example]:
        """The rows of the task and the mixed ones, each once."""
        return [*self.train, *(example for examples in self.mixed for example in examples)]

    @property
    def trained_files(self) -> dict[str, str]:
        """Path → hash of the files of ``trained_on``."""
        reads = [self.reads[0], *self.reads[len(self.reads) - len(self.mixed) :]]
        return {path: digest for read in reads for path, digest in read.files.items()}

    @property
    def dropped(self) -> list[formats.Dropped]:
        return [row for read in self.reads for row in read.dropped]

    @property
    def files(self) -> dict[str, str]:
        """Path → hash."""
        return {path: digest for read in self.reads for path, digest in read.files.items()}


@dataclass(frozen=True)
class Side:
    """Training or held-out rows: what was read, what the objective takes of it, and what that became."""

    examples: list[formats.Example]
    selected: Selected
    rendered: template.Rendered
    groups: list[Group]

    @property
    def usable(self) -> list[formats.Example]:
        """The selected examples that gave at least one row."""
        sources = self._rendered_sources
        return [example for example in self.selected.examples if example.source in sources]

    @property
    def sound(self) -> list[formats.Example]:
        """The examples that were read, without those of which no row could be rendered."""
        lost = {row.source for row in self.rendered.dropped} - self._rendered_sources
        return [example for example in self.examples if example.source not in lost]

    def unused(self, kind: str) -> list[formats.Dropped]:
        """Sound examples that the objective ``kind`` does not learn from."""
        return [
            formats.Dropped(example.source, reason, f"not for {kind}: {reason}", "")
            for example, reason in self.selected.left_out
        ]

    @property
    def reasons(self) -> Counter[str]:
        """Why examples were left out, with counts."""
        sources = self._rendered_sources
        refused = (row.reason for row in self.rendered.dropped if row.source not in sources)
        return Counter(reason for _, reason in self.selected.left_out) + Counter(refused)

    @property
    def notes(self) -> Counter[str]:
        """Changes to rows. Of a conversation in several rows, one answer may be left out and the others
        stay."""
        sources = self._rendered_sources
        answers = Counter(
            f"answers left out: {row.reason}" for row in self.rendered.dropped if row.source in sources
        )
        return self.selected.notes + self.rendered.notes + answers

    @property
    def _rendered_sources(self) -> set[str]:
        return {row.source for row in self.rendered.rows}


@dataclass(frozen=True)
class Sides:
    """All sides of a run. ``mixed``: one for each entry of ``data.mix``."""

    train: Side
    valid: Side
    mixed: list[Side]

    @property
    def all(self) -> list[Side]:
        return [self.train, self.valid, *self.mixed]

    @property
    def rows(self) -> list[template.Row]:
        return [row for side in self.all for row in side.rendered.rows]

    @property
    def refused(self) -> list[formats.Dropped]:
        """Rows that could not be rendered."""
        return [row for side in self.all for row in side.rendered.dropped]

    def unused(self, kind: str) -> list[formats.Dropped]:
        return [row for side in self.all for row in side.unused(kind)]

    @property
    def reasons(self) -> Counter[str]:
        return sum((side.reasons for side in self.all), Counter())

    @property
    def notes(self) -> Counter[str]:
        return sum((side.notes for side in self.all), Counter())


def prepare(
    config: RunConfig,
    notify: Sink = events.silent,
    *,
    audited: bool = False,
    recorded: Recorded | None = None,
    held_out: Sequence[formats.Example] | None = None,
) -> Prepared:
    """Read, split, render, audit and plan, without loading weights. audited: these rows were audited when the
    run began. recorded: of the run that is resumed. held_out: the held-out rows; None: those that the
    settings name. Raises DataError, TemplateError, or ModelError for an id that the model does not know."""
    is_new = recorded is None or recorded.fingerprint is None
    recorded = recorded or Recorded.now()
    sources = _read(config, notify) if held_out is None else _read_around(held_out, config)
    renderer, known = _renderer(config, recorded, notify)
    sides = _sides(sources, config, renderer, known, notify)
    train, valid = sides.train, sides.valid
    refused = [*sources.dropped, *sides.refused]
    audit = None
    if config.audit.before_training and not audited:
        audit = _audit(config, sources, renderer, sides.rows, refused, notify)
    _require(config, sources, sides, refused)
    dropped = [*refused, *sides.unused(config.objective.kind)]
    reasons = Counter(row.reason for row in sources.dropped) + sides.reasons
    notes = sides.notes + _structured_calls(config, sources)
    remarks = formats.remarks((*sources.trained_on, *sources.valid))
    _tell(config.objective, refused, dropped, reasons, notes, notify)
    reasoning = _settle_thinking(config, renderer, (*train.usable, *valid.usable), notify)
    _tell_remarks(remarks, reasoning, audit is not None, notify)
    notes += Counter({remark.text: count for remark, count in remarks.items()})
    mixed = _mixed(config, sides)
    groups = [*train.groups, *(group for entry in mixed for group in entry.groups)]
    objective = _settled_objective(config, groups, notify)
    plan = _plan(config, groups, notify)
    if is_new:
        _require_few_updates(plan)
    counts = _counts(sources, sides, groups, plan, objective.unit)
    counts |= {"thinking": renderer.thinking, "reasoning": reasoning}
    counts["rows_dropped"], counts["notes"] = dict(sorted(reasons.items())), dict(sorted(notes.items()))
    counts |= _labels(groups, valid.groups, notify) | _mix_counts(config, sides, mixed)
    return Prepared(
        objective=objective,
        renderer=renderer,
        valid_examples=valid.usable,
        held_out=valid.sound,
        train=groups,
        valid=valid.groups,
        plan=plan,
        dropped=dropped,
        counts=counts,
        hashes={"data": sources.files, "template": renderer.fingerprint},
        rendered=sides.rows[:RENDERED_ROWS_KEPT],
        audit=audit,
        day=recorded.day,
        tools=asking.common_tools(train.usable),
    )


def _renderer(config: RunConfig, recorded: Recorded, notify: Sink) -> tuple[template.Renderer, int | None]:
    """What renders the rows, and how many tokens the model knows (None: as many as there are)."""
    folder = loading.resolve(
        config.model.path, dtype=config.model.dtype, revision=config.model.revision, notify=notify
    )
    renderer = renderers.load(config.model.tokenizer or folder, config.template, recorded)
    renderer.follow(config.template, config.data.text_control)
    return renderer, None if config.model.resize_embeddings else vocabulary.stored(folder)


def _settled_objective(config: RunConfig, groups: Sequence[Group], notify: Sink) -> Objective:
    """The objective with the settings that depend on the training rows; its remarks on them are reported."""
    objective, remarks = config.objective.settled(groups)
    for remark in remarks:
        notify(Notice(remark.text, level=remark.level, where="objective"))
    return objective


def _settle_thinking(
    config: RunConfig, renderer: template.Renderer, examples: Sequence[formats.Example], notify: Sink
) -> Reasoning:
    """Decide whether prompts without an answer ask for reasoning, and say so if the template has a choice, or
    if reasoning is learned."""
    conversations = [
        example.chosen if isinstance(example, formats.Preference) else example.conversation
        for example in examples
        if isinstance(example, formats.Demonstration | formats.Judged | formats.Preference)
    ]
    reasoned: list[bool] = []
    for conversation in conversations:
        with suppress(template.Refused):  # no answer is learned
            for place in template.learned_places(conversation, config.template.learn, 0, Counter()):
                reasoned.append(bool(template.thought_of(conversation.messages[place].content).reasoning))
    if config.template.thinking == "auto":
        renderer.thinking = 2 * sum(reasoned) >= len(reasoned) > 0
    switch = renderer.thinking_switch
    reasoning = Reasoning(
        answers=len(reasoned),
        with_reasoning=sum(reasoned),
        switch=switch,
        decided_by="rows" if config.template.thinking == "auto" else "template.thinking",
    )
    if (text := thinking.line(renderer.thinking, reasoning)) is not None:
        mixed = switch is not None and not all(reasoned)
        hint = "a row without reasoning is learned with thinking off" if mixed else None
        notify(Notice(text, where="template.thinking", hint=hint))
    return reasoning


def _counts(sources: Sources, sides: Sides, groups: Sequence[Group], plan: Plan, unit: str) -> dict[str, Any]:
    """What the run directory says of the rows; `prepare` adds what was dropped and changed. Tokens are those
    of an epoch, mixed rows included; rows and sequences to train on are the task's."""
    train, valid = sides.train, sides.valid
    return {
        "rows_read": sum(read.rows for read in sources.reads),
        "rows_dropped": {},
        "rows_train": len(train.usable),
        "rows_valid": len(valid.usable),
        "sequences_train": len(train.groups),
        "sequences_valid": len(valid.groups),
        "tokens": sum(group.tokens for group in groups),
        "supervised_tokens": _learned_tokens(groups),
        "padding_share": round(plan.padding_share(), 4),
        "steps": plan.steps,
        "loss": unit,
        "asked_as": asking.asked_as(train.usable),
    }


def _learned_tokens(groups: Iterable[Group]) -> int:
    return sum(group.n_learned for group in groups)


class MixedRows(NamedTuple):
    """The rows of an entry of ``data.mix`` in an epoch, as groups. ``rows``: how many they are."""

    rows: int
    groups: list[Group]


def _mixed(config: RunConfig, sides: Sides) -> list[MixedRows]:
    """Draws the rows of each entry of ``data.mix``. Raises DataError if none of its rows can be learned."""
    n_rows = [len(side.usable) for side in sides.mixed]
    for entry, count in zip(config.data.mix, n_rows, strict=True):
        if not count:
            message = f"data.mix: {config.objective.kind} can learn none of these rows"
            hint = "the reasons are above; give rows of a kind that the objective learns"
            raise DataError(message, where=", ".join(entry.path), hint=hint)
    wanted = mixing.rows_an_epoch(config.data.mix, len(sides.train.usable), n_rows)
    entries: list[MixedRows] = []
    for place, side in enumerate(sides.mixed):
        by_source: dict[str, list[Group]] = defaultdict(list)
        for group in side.groups:
            by_source[group.source].append(_as_mixed(group, config.data.mix[place]))
        sources = [example.source for example in side.usable]
        drawn = mixing.draw(len(sources), wanted[place], config.loop.seed, place)
        entries.append(MixedRows(len(drawn), [group for row in drawn for group in by_source[sources[row]]]))
    return entries


def _as_mixed(group: Group, entry: mixing.MixSpec) -> Group:
    sequences = tuple(
        sequence._replace(targets=(entry.weight * sequence.targets).astype(np.float32))
        for sequence in group.sequences
    )
    return group._replace(sequences=sequences, mixed=True, distilled=entry.distill)


def _mix_counts(config: RunConfig, sides: Sides, mixed: Sequence[MixedRows]) -> dict[str, Any]:
    """Counts of ``data.mix`` by the names of its files; empty if nothing is mixed in."""
    entries = {
        name: {
            "rows": len(side.usable),
            "rows_an_epoch": drawn.rows,
            "tokens": sum(group.tokens for group in drawn.groups),
            "supervised_tokens": _learned_tokens(drawn.groups),
            **({"weight": entry.weight} if entry.weight != 1 else {}),
            **({"distilled": True} if entry.distill else {}),
        }
        for name, side, drawn, entry in zip(
            mixing.names(config.data.mix), sides.mixed, mixed, config.data.mix, strict=True
        )
    }
    return {"mix": entries} if entries else {}


def _read(config: RunConfig, notify: Sink) -> Sources:
    """The rows of both sides: held-out files, or a share of the training files; and those of ``data.mix``.
    Raises DataError."""
    read, mixed = _read_trained(config)
    if not isinstance(config.data.valid, tuple):
        train, valid = formats.split(read.examples, config.data.valid, config.loop.seed)
        reads = [read]
    elif not config.data.valid:
        train, valid, reads = read.examples, [], [read]
    else:
        held_out = formats.read(config.data.valid, config.data)
        formats.require(held_out, config.data.max_dropped)
        train, valid, reads = read.examples, held_out.examples, [read, held_out]
    sources = Sources([*reads, *mixed], train, valid, [entry.examples for entry in mixed])
    if not config.audit.before_training:  # else the audit reports it
        prompts = {formats.prompt_key(example) for example in sources.trained_on}
        shared = sum(formats.prompt_key(example) in prompts for example in valid)
        if shared:
            text = "held-out rows whose prompt is also in the training rows"
            notify(Notice(text, level="warning", count=shared))
    return sources


def _read_around(held_out: Sequence[formats.Example], config: RunConfig) -> Sources:
    """The rows of the training files whose prompts are not those of ``held_out``. Raises DataError."""
    read, mixed = _read_trained(config)
    prompts = set(map(formats.prompt_key, held_out))
    train, *others = (
        [example for example in entry.examples if formats.prompt_key(example) not in prompts]
        for entry in (read, *mixed)
    )
    return Sources([read, *mixed], train, list(held_out), others)


def _read_trained(config: RunConfig) -> tuple[formats.Read, list[formats.Read]]:
    """The rows of ``data.train``, and of each entry of ``data.mix``. Raises DataError, also if a file is
    given twice."""
    read = formats.read(config.data.train, config.data)
    formats.require(read, config.data.max_dropped)
    if config.data.mix:
        files_of(config.data.trained_on)
    mixed = [formats.read(entry.path, config.data) for entry in config.data.mix]
    for entry in mixed:
        formats.require(entry, config.data.max_dropped)
    return read, mixed


def _sides(
    sources: Sources, config: RunConfig, renderer: template.Renderer, known: int | None, notify: Sink
) -> Sides:
    """All rows as tokens. Raises as `_render` does."""
    return Sides(
        _render(sources.train, config, renderer, known, notify),
        _render(sources.valid, config, renderer, known, notify),
        [_render(examples, config, renderer, known, notify) for examples in sources.mixed],
    )


def _render(
    examples: list[formats.Example],
    config: RunConfig,
    renderer: template.Renderer,
    known: int | None,
    notify: Sink,
) -> Side:
    """What the objective takes of ``examples``, as rows of tokens and as its groups. Raises ModelError if an
    id is not below ``known``, the rows of the embedding."""
    selected = config.objective.select(examples)
    tick = events.ticker(notify, "rendering")
    rendered = template.render(selected.examples, renderer, config.template, config.batch.length, tick)
    if known is not None:
        places = ((row.source, row.tokens.ids) for row in rendered.rows)
        vocabulary.require(known, places, renderer.decode)
    return Side(examples, selected, rendered, config.objective.groups(rendered.rows))


def _require(config: RunConfig, sources: Sources, sides: Sides, refused: list[formats.Dropped]) -> None:
    """Raises DataError if the objective cannot learn from the training rows, or if too many rows were
    dropped."""
    train = sides.train
    if train.groups or not train.selected.examples:  # else all were dropped, which is reported below
        config.objective.require(train.groups, sources.train)
    rows_read = len(sources.trained_on) + len(sources.valid) + len(sources.dropped)
    read = formats.Read(train.usable, refused, rows_read, sources.trained_files)
    formats.require(read, config.data.max_dropped)


def _structured_calls(config: RunConfig, sources: Sources) -> Counter[str]:
    """Calls that were written as text and became structured ones, by what was done with them."""
    if not config.data.structure_calls:
        return Counter()
    return Counter(
        f"calls written as text: {example.metadata['text_calls']}"
        for example in (*sources.trained_on, *sources.valid)
        if "text_calls" in example.metadata
    )


def _tell(
    objective: Objective,
    refused: list[formats.Dropped],
    dropped: list[formats.Dropped],
    reasons: Counter[str],
    notes: Counter[str],
    notify: Sink,
) -> None:
    """Report rows that were left out, with the first places and what is wrong there, and changes to rows.
    refused: those of ``dropped`` that cannot be used; the others are not for ``objective``."""
    examples = {row.reason: row for row in reversed(refused)}
    for reason, count in sorted(reasons.items()):
        places = [row.source for row in dropped if row.reason == reason]
        where = ", ".join(places[:3]) + (", …" if len(places) > 3 else "")
        text, example = f"rows left out: {reason}", examples.get(reason)
        if example is not None:
            text += (
                f": {example.fault}" if len(places) == 1 else f", such as {example.source}: {example.fault}"
            )
        hint = objective.hints.get(reason) if example is None else example.hint or None
        notify(Notice(text, level="warning", count=count, where=where, hint=hint))
    for note, count in sorted(notes.items()):
        if note != template.REASONED:  # `_settle_thinking` says it
            notify(Notice(note, count=count))


def _tell_remarks(
    remarks: Counter[formats.RowRemark], reasoning: Reasoning, audited: bool, notify: Sink
) -> None:
    """Report how rows were read. If the rows were audited, its report names the keys that are not read; if
    reasoning is learned, `_settle_thinking` has said so."""
    for remark, count in sorted(remarks.items()):
        is_learned = remark.text == REASONING_BESIDE and reasoning["with_reasoning"] > 0
        if not is_learned and not (remark.doubt and audited):
            notify(Notice(remark.text, level="warning" if remark.doubt else "info", count=count))


def _plan(config: RunConfig, groups: list[Group], notify: Sink) -> Plan:
    """Which rows make which update."""
    bucket = config.loop.compile
    if bucket is None:
        bucket = backend.setup().kind == "gpu" and not config.batch.pack
    cut, lengths = Cut.around(config.batch, groups, bucket)
    positions = tuple(group.positions for group in groups)
    spec = config.loop
    plan = Plan(lengths, config.batch.sequences, cut, spec.seed, spec.epochs, spec.steps, positions)
    if any(group.distilled for group in groups):
        plan = replace(plan, distilled=tuple(group.distilled for group in groups))
    if config.data.order == "length":
        plan = plan.easy_first([group.tokens for group in groups])
    if config.data.order != "shuffled" and plan.steps < plan.steps_per_epoch:
        text = f"the run ends within its first epoch, so that data.order={config.data.order} leaves out "
        text += "the longest rows" if config.data.order == "length" else "the hardest rows"
        notify(Notice(text, level="warning", where="data.order"))
    if few := lonely(plan, groups):
        text = "updates with rows of one class only: raise batch.sequences"
        notify(Notice(text, level="warning", count=few))
    return plan


def replanned(prepared: Prepared, config: RunConfig) -> Prepared:
    """The same rows, cut into the micro-batches of other settings."""
    plan = _plan(config, prepared.train, events.silent)
    return replace(prepared, plan=plan, counts=prepared.counts | {"steps": plan.steps})


def _require_few_updates(plan: Plan) -> None:
    """Raises ConfigError if the epochs of a new run make more updates than `MOST_STEPS`."""
    if plan.steps > MOST_STEPS:
        message = f"makes {plan.steps:,} updates of these rows, and a run has at most {MOST_STEPS:,}"
        raise ConfigError(message, where="loop.epochs", hint="lower it, or give loop.steps")


def _labels(train: list[Group], valid: list[Group], notify: Sink) -> dict[str, Any]:
    """Counts of desirable and undesirable rows; empty if the rows have no labels."""
    if all(group.label is None for group in train):
        return {}
    sides = {"train": train, "valid": valid}
    good = {name: sum(group.label is True for group in side) for name, side in sides.items()}
    if valid and good["valid"] in (0, len(valid)):
        label = "desirable" if good["valid"] else "undesirable"
        text = f"all held-out rows are {label}: they give no margin and no accuracy"
        hint = "add rows of the other label with other prompts"
        notify(Notice(text, level="warning", hint=hint))
    labels: dict[str, int] = {}
    for name, side in sides.items():
        labels |= {f"desirable_{name}": good[name], f"undesirable_{name}": len(side) - good[name]}
    return {"labels": labels}


def _audit(
    config: RunConfig,
    sources: Sources,
    renderer: template.Renderer,
    rows: list[template.Row],
    refused: list[formats.Dropped],
    notify: Sink,
) -> Audit:
    """The audit of the training rows, mixed ones included; its warnings are reported. Raises DataError if it
    found an error."""
    against = [contamination.load(path, config.data) for path in config.audit.against]
    against += [contamination.held_out(sources.valid)] if sources.valid else []
    name = Path(config.model.tokenizer or config.model.path).name
    # Rows that cannot be used count against data.max_dropped; here too many of them are no error.
    context = Context(
        config.audit,
        config.batch.length,
        1.0,
        renderer,
        name,
        against=against,
        template=config.template,
        charts=False,
        refusals=False,
    )
    weighted = config.template.prompt_weight > 0  # then targets do not mark the answer
    context.rendered = None if weighted else survey.rendered(rows, refused, context)
    audit = survey.examine(sources.trained_on, sources.trained_files, context, notify)
    survey.require(audit)
    for finding in audit.of("warning"):
        where = ", ".join(row.source for row in finding.rows[:3]) + (", …" if len(finding.rows) > 3 else "")
        text, hint = f"{finding.rule}: {finding.what}", finding.hint or None
        notify(Notice(text, "warning", max(finding.count, 1), where or "audit", hint))
    accepted = [f"{finding.rule} {finding.count:,}" for finding in audit.findings if finding.accepted]
    if accepted:
        notify(Notice(f"accepted findings, with rows: {', '.join(accepted)}", where="audit.accept"))
    return audit


def require_same(run: Run, prepared: Prepared) -> None:
    """Raises ResumeMismatch if the rows of ``run`` gave other tokens when it began: another release may read
    them otherwise."""
    try:
        plan = json.loads((run.path / PLAN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return
    was = plan if isinstance(plan, dict) else {}
    changed = [key for key in SAME if key in was and was[key] != prepared.counts[key]]
    if changed:
        lines = "".join(f"\n  {key}: {was[key]} → {prepared.counts[key]}" for key in changed)
        raise ResumeMismatch(
            f"the rows give other tokens than when the run began:{lines}",
            where=str(run.path),
            hint="this release reads them otherwise (docs/data.md): begin a new run",
        )


def write(run: Run, prepared: Prepared) -> None:
    """Write what was read, dropped and planned to the run directory, for the verbs that read only that."""
    formats.write_dropped(prepared.dropped, run.path / DROPPED)
    formats.write_examples(prepared.held_out, run.path / VALID)
    write_json(run.path / PLAN, prepared.counts)
    if prepared.audit is not None:
        write_json(run.path / AUDIT, prepared.audit.to_json())
    decode = prepared.renderer.decode
    shown = [
        {
            "source": row.source,
            "tokens": [[decode([token]), float(weight)] for token, weight in zip(*row.tokens, strict=True)],
        }
        for row in prepared.rendered
    ]
    write_json(run.path / SHOWN, shown)


@dataclass(frozen=True)
class SamplePrompt:
    """``ids``: up to where the assistant answers. ``text``: the last message of the prompt. ``reference``:
    the answer in the data; None if the user wrote the prompt."""

    ids: list[int]
    text: str
    reference: str | None


def prompts(examples: list[formats.Example], renderer: template.Renderer, count: int) -> list[SamplePrompt]:
    """Prompts for up to ``count`` last assistant turns, spread evenly over ``examples``; documents have
    none."""
    with_prompt = [example for example in examples if not isinstance(example, formats.Document)]
    count = min(count, len(with_prompt))
    return [_prompt(with_prompt[index * len(with_prompt) // count], renderer) for index in range(count)]


class ScoredPrompt(NamedTuple):
    """A held-out prompt and the answer that it is scored by."""

    ids: list[int]
    reference: ReferenceAnswer


def scored_prompts(
    examples: list[formats.Example], renderer: template.Renderer, count: int
) -> list[ScoredPrompt]:
    """Up to ``count`` of the last answers of ``examples``, spread evenly over those that can be measured
    against: `calls.references`."""
    answers = [answer for answer in map(references, examples) if answer is not None]
    count = min(count, len(answers))
    chosen = [answers[index * len(answers) // count] for index in range(count)]
    return [
        ScoredPrompt(
            renderer.text_prompt(answer.prompt)
            if isinstance(answer.prompt, str)
            else renderer.prompt(answer.prompt),
            answer,
        )
        for answer in chosen
    ]


def own_prompts(prepared: Prepared, texts: Sequence[str]) -> list[SamplePrompt]:
    """``texts`` as the training rows ask, in a chat with the tools that they declare. Raises
    TemplateError."""
    kind = prepared.counts["asked_as"]
    listed: list[SamplePrompt] = []
    for text in texts:
        question = asking.question([formats.Message("user", text)], kind, prepared.tools)
        if isinstance(question, str):
            ids = prepared.renderer.text_prompt(question)
        else:
            ids = prepared.renderer.prompt(question)
            prepared.renderer.require_tools(question.tools, ids)
        listed.append(SamplePrompt(ids, text, None))
    return listed


def _prompt(
    example: formats.Completion | formats.Demonstration | formats.Judged | formats.Preference,
    renderer: template.Renderer,
) -> SamplePrompt:
    if isinstance(example, formats.Completion):
        return SamplePrompt(renderer.text_prompt(example.prompt), example.prompt, example.completion)
    conversation = example.chosen if isinstance(example, formats.Preference) else example.conversation
    context = formats.Conversation(conversation.messages[:-1], conversation.tools)
    last = conversation.messages[-1]
    reference = last.content or "\n".join(f"{call.name} {call.arguments}" for call in last.calls)
    text = context.messages[-1].content if context.messages else ""
    return SamplePrompt(renderer.prompt(context), text, reference)
