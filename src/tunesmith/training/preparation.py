"""From files to a plan of updates, loading no weights: everything that can be wrong with words is found
here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith import events
from tunesmith.auditing import survey
from tunesmith.auditing.findings import Audit
from tunesmith.auditing.rules import contamination
from tunesmith.auditing.views import Context
from tunesmith.data import formats
from tunesmith.events import Notice, Sink
from tunesmith.files import write_json
from tunesmith.learning.objective import Objective
from tunesmith.machine import backend
from tunesmith.model import loading as model
from tunesmith.runs.config import RunConfig
from tunesmith.runs.directory import AUDIT, DROPPED, PLAN, SHOWN, VALID, Run
from tunesmith.tokens import renderers, template
from tunesmith.tokens.batches import Cut, Group, Plan
from tunesmith.training.caution import lonely

RENDERED_ROWS_KEPT = 5


@dataclass(frozen=True)
class Prepared:
    """Words become updates: everything that is known before weights are loaded. ``objective``: settled for
    the training rows."""

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
    reference: Any = None  # `reference.Reference`, once the base has been measured

    @property
    def accepted(self) -> dict[str, str]:
        """Findings that were let pass: rule → what it says."""
        return {one.rule: one.what for one in self.audit.findings if one.accepted} if self.audit else {}


def prepare(config: RunConfig, notify: Sink = events.silent, *, audited: bool = False) -> Prepared:
    """Read, split, render, audit and plan, loading no weights. audited: the same rows have been, when the run
    began.

    Raises DataError or TemplateError.
    """
    read = formats.read(config.data.train, config.data)
    formats.require(read, config.data.max_dropped)
    if isinstance(config.data.valid, tuple):
        held_out = formats.read(config.data.valid, config.data) if config.data.valid else None
        if held_out is not None:
            formats.require(held_out, config.data.max_dropped)
        sides = [read.examples, held_out.examples if held_out else []]
        sources = [read, *([held_out] if held_out else [])]
        asked = {formats.prompt_key(example) for example in sides[0]}
        shared = sum(formats.prompt_key(example) in asked for example in sides[1])
        if shared and not config.audit.before_training:  # else the audit tells it
            notify(
                Notice(
                    "held-out rows whose prompt is also in the training rows", level="warning", count=shared
                )
            )
    else:
        sides, sources = list(formats.split(read.examples, config.data.valid, config.loop.seed)), [read]
    dropped = [row for source in sources for row in source.dropped]
    reasons = Counter(row.reason for row in dropped)
    folder = model.resolve(
        config.model.path, dtype=config.model.dtype, revision=config.model.revision, notify=notify
    )
    renderer = renderers.load(config.model.tokenizer or folder, config.template.renderer)
    kept: list[list[formats.Example]] = []
    sound: list[formats.Example] = []
    wanted: list[int] = []
    groups: list[list[Group]] = []
    rows: list[template.Row] = []
    unused: list[formats.Dropped] = []  # sound rows that the objective does not learn from
    notes: Counter[str] = Counter()
    for side in sides:
        selected, left_out, done = config.objective.select(side)
        reasons.update(reason for _, reason in left_out)
        notes += done
        wanted.append(len(selected))
        turned = (
            str(example.metadata["text_calls"])
            for example in side
            if config.data.structure_calls and "text_calls" in example.metadata
        )
        notes.update(f"calls written as text: {how}" for how in turned)
        unused += [
            formats.Dropped(one.source, why, f"not for {config.objective.kind}: {why}", "")
            for one, why in left_out
        ]
        tick = events.ticker(notify, "rendering")
        rendered = template.render(selected, renderer, config.template, config.batch.length, tick)
        dropped += rendered.dropped
        notes += rendered.notes
        rows += rendered.rows
        # Of a conversation in several rows one answer may be left out and the others stay.
        alive = {row.source for row in rendered.rows}
        notes.update(f"answers left out: {row.reason}" for row in rendered.dropped if row.source in alive)
        reasons.update(row.reason for row in rendered.dropped if row.source not in alive)
        kept.append([example for example in selected if example.source in alive])
        lost = {row.source for row in rendered.dropped} - alive
        sound = [example for example in side if example.source not in lost]
        groups.append(config.objective.groups(rendered.rows))
    audit = None
    if config.audit.before_training and not audited:
        audit = _audit(config, sides, read, renderer, rows, dropped, notify)
    if groups[0] or not wanted[0]:  # else all were dropped, which is told below
        config.objective.require(groups[0], sides[0])
    n_seen = sum(len(side) for side in sides) + sum(len(source.dropped) for source in sources)
    formats.require(formats.Read(kept[0], dropped, n_seen, read.files), config.data.max_dropped)
    dropped += unused
    for reason, count in sorted(reasons.items()):
        places = [row.source for row in dropped if row.reason == reason]
        where = ", ".join(places[:3]) + (", …" if len(places) > 3 else "")
        notify(Notice(f"rows left out: {reason}", level="warning", count=count, where=where))
    for note, count in sorted(notes.items()):
        notify(Notice(note, count=count))
    objective, remarks = config.objective.settled(groups[0])
    for remark in remarks:
        notify(Notice(remark.text, level=remark.level, where="objective"))
    bucket = (
        backend.setup().kind == "gpu" and not config.batch.pack
        if config.loop.compile is None
        else config.loop.compile
    )
    cut, lengths = Cut.around(config.batch, groups[0], bucket)
    positions = tuple(group.positions for group in groups[0])
    plan = Plan(
        lengths,
        config.batch.sequences,
        cut,
        config.loop.seed,
        config.loop.epochs,
        config.loop.steps,
        positions,
    )
    if few := lonely(plan, groups[0]):
        notify(
            Notice("updates with rows of one class only: raise batch.sequences", level="warning", count=few)
        )
    tokens = sum(group.tokens for group in groups[0])
    counts = {
        "rows_read": sum(source.rows for source in sources),
        "rows_dropped": dict(sorted(reasons.items())),
        "rows_train": len(kept[0]),
        "rows_valid": len(kept[1]),
        "sequences_train": len(groups[0]),
        "sequences_valid": len(groups[1]),
        "tokens": tokens,
        "supervised_tokens": sum(
            int((part.targets[1:] > 0).sum()) for group in groups[0] for part in group.sequences
        ),
        "padding_share": round(plan.padding_share(), 4),
        "steps": plan.steps,
        "loss": objective.unit,
        "notes": dict(sorted(notes.items())),
    }
    if any(group.label is not None for group in groups[0]):
        good = [sum(group.label is True for group in side) for side in groups]
        if groups[1] and good[1] in (0, len(groups[1])):
            what = f"all held-out rows are {'desirable' if good[1] else 'undesirable'}: they give no margin and no accuracy"
            notify(
                Notice(what, level="warning", hint="more rows of the other label, with prompts of their own")
            )
        counts["labels"] = {
            f"{name}_{side}": count
            for side, true, rows in zip(("train", "valid"), good, groups, strict=True)
            for name, count in (("desirable", true), ("undesirable", len(rows) - true))
        }
    hashes = {
        "data": {key: value for source in sources for key, value in source.files.items()},
        "template": renderer.fingerprint,
    }
    shown = rows[:RENDERED_ROWS_KEPT]
    return Prepared(
        objective, renderer, kept[1], sound, groups[0], groups[1], plan, dropped, counts, hashes, shown, audit
    )


def _audit(
    config: RunConfig,
    sides: list[list[formats.Example]],
    read: formats.Read,
    renderer: template.Renderer,
    rows: list[template.Row],
    refused: list[formats.Dropped],
    notify: Sink,
) -> Audit:
    """What is found in the training rows; warnings are told. Raises DataError where that should stop the
    run."""
    against = [contamination.load(path, config.data) for path in config.audit.against]
    against += [contamination.held_out(sides[1])] if sides[1] else []
    name = Path(config.model.tokenizer or config.model.path).name
    # Rows that cannot be used are counted against data.max_dropped, here too many are no error.
    seen = Context(
        config.audit,
        config.batch.length,
        1.0,
        renderer,
        name,
        against=against,
        template=config.template,
        refusals=False,
    )
    weighted = config.template.prompt_weight > 0  # then targets do not tell the answer from the prompt
    seen.rendered = None if weighted else survey.rendered(rows, refused, seen)
    found = survey.examine(sides[0], read.files, seen, notify)
    survey.require(found)
    for one in [*found.of("warning"), *(one for one in found.findings if one.accepted)]:
        where = ", ".join(row.source for row in one.rows[:3]) + (", …" if len(one.rows) > 3 else "")
        notify(
            Notice(
                f"{one.rule}{', accepted' * bool(one.accepted)}: {one.what}",
                "warning",
                max(one.count, 1),
                where or "audit",
                one.hint or None,
            )
        )
    return found


def write(run: Run, prepared: Prepared) -> None:
    """What was read, left out and planned, for everything that comes after and reads only the run
    directory."""
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
class Prompt:
    """``ids``: up to where the assistant speaks. ``text``: what was asked. ``reference``: what the data
    answers."""

    ids: list[int]
    text: str
    reference: str


def prompts(examples: list[formats.Example], renderer: template.Renderer, count: int) -> list[Prompt]:
    """Up to ``count`` last assistant turns, spread evenly over ``examples``, as prompts. Documents ask
    nothing."""
    asking = [example for example in examples if not isinstance(example, formats.Document)]
    count = min(count, len(asking))
    asked: list[Prompt] = []
    for example in (asking[index * len(asking) // count] for index in range(count)):
        if isinstance(example, formats.Completion):
            ids, text = renderer.text_prompt(example.prompt), example.prompt
            asked.append(Prompt(ids, text, example.completion))
        else:
            assert not isinstance(example, formats.Document)
            conversation = example.chosen if isinstance(example, formats.Preference) else example.conversation
            context = formats.Conversation(conversation.messages[:-1], conversation.tools)
            last = conversation.messages[-1]
            reference = last.content or "\n".join(f"{call.name} {call.arguments}" for call in last.calls)
            text = context.messages[-1].content if context.messages else ""
            asked.append(Prompt(renderer.prompt(context), text, reference))
    return asked
