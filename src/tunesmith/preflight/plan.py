"""What would ``train`` do, and what would it need? Nothing is trained or written.

`plan` reads only the headers of the weights; `rehearse`, the dry run, also reads and checks them."""

from __future__ import annotations

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import mlx.nn as nn
from markupsafe import Markup

from tunesmith import events
from tunesmith.adapters.specs import Attached
from tunesmith.data.formats import JSON
from tunesmith.display import counts, notebook
from tunesmith.display.console import size
from tunesmith.display.notebook import NotebookResult
from tunesmith.events import Notice, Sink
from tunesmith.model import outlines, vocabulary
from tunesmith.preflight import fitting
from tunesmith.preflight.fitting import Proposal
from tunesmith.runs import lineage
from tunesmith.runs.config import RunConfig
from tunesmith.runs.forecasts import Forecast, Term
from tunesmith.settings.config import Resolved
from tunesmith.training import forecast, frozen, ordering, preparation, reference, story, trial
from tunesmith.training.forecast import Needs, Outline, duration_range
from tunesmith.training.preparation import Prepared

ASSUMED = "the run measures which rows are hard: it is planned as if the longest were the hardest"


@dataclass(frozen=True)
class Planned(NotebookResult):
    """``counts``: rows, tokens, padding, steps, trainable parameters. ``proposal``: changes with which the
    run would fit, if they were asked for."""

    counts: dict[str, JSON]
    forecast: Forecast
    proposal: Proposal | None = None

    def to_json(self) -> dict[str, object]:
        proposal = None if self.proposal is None else self.proposal.to_json()
        return {**self.counts, "forecast": asdict(self.forecast), "proposal": proposal}

    def lines(self) -> list[str]:
        """Tables of the counts and of what is needed."""
        return [counts.table(self.counts), "", *table(self.forecast)]


def plan(
    config: Resolved[RunConfig],
    *,
    measure: bool = False,
    fit: str | None = None,
    fit_time: str | None = None,
    notify: Sink = events.silent,
) -> Planned:
    """What ``train`` would need: memory, disk and time with intervals, from row lengths and headers.

    measure: load the model and make two updates of the longest micro-batches, by which the estimate is
    corrected. fit, fit_time: propose changes until the run needs at most so much memory ("16GB") or time
    ("8h")."""
    limits = fitting.limits(fit, fit_time)
    spec = _anchored(config, notify)
    with tempfile.TemporaryDirectory(prefix="tunesmith-plan-") as name:
        model = outlines.outlined(spec.model, Path(name), notify)
        outlined = spec.model_copy(update={"model": model})
        prepared = preparation.prepare(outlined, notify)
        outline = Outline.of(outlined, notify)
        vocabulary.require_rows(outline.net, prepared.train)
        needs, rate = outline.needs(prepared), forecast.product_rate()
        if measure:
            opened = story.open_model(spec, prepared.train, notify)
            needs, rate = trial.calibrated(needs, opened, notify)
        counted = _counts(needs.prepared, outline.config, outline.net, outline.attached)
        proposal = None if limits is None else fitting.propose(needs, limits, rate)
    return Planned(counted, needs.forecast(rate), proposal)


def rehearse(config: Resolved[RunConfig], *, notify: Sink = events.silent) -> Planned:
    """The dry run of ``train``: as `plan`, and everything that ``train`` checks is checked, weights
    included."""
    spec = _anchored(config, notify)
    prepared = preparation.prepare(spec, notify)
    model = story.open_model(spec, prepared.train, notify)
    needs = Needs.of(model.config, prepared, model.net, model.loaded.config)
    return Planned(_counts(needs.prepared, spec, model.net, model.attached), needs.forecast())


def _anchored(config: Resolved[RunConfig], notify: Sink) -> RunConfig:
    spec = lineage.anchored(config.spec)
    for text in config.notes:
        notify(Notice(text, where="data.train"))
    for text in spec.warnings():
        notify(Notice(text, level="warning"))
    if spec.data.order == "difficulty":
        notify(Notice(ASSUMED, where="data.order"))
    return spec


def _counts(prepared: Prepared, spec: RunConfig, net: nn.Module, attached: Attached) -> dict[str, JSON]:
    """``adapter``: in one line, which layers are adapted and which are not. ``micro_batches``: of the first
    epoch. If layers lie below the adapter: the share of the layers' work that ``loop.cache_frozen`` saves (0
    within one epoch), and the disk space that it takes."""
    schedule = prepared.plan
    micro_batches = [
        rows
        for step in range(min(schedule.steps, schedule.steps_per_epoch))
        for rows in schedule.update(step)
    ]
    largest = [schedule.lengths[index] for index in schedule.largest()]
    counted: dict[str, JSON] = {
        **prepared.counts,
        "trainable": attached.trainable,
        "total": attached.total,
        "adapter": attached.coverage,
        "micro_batches": len(micro_batches),
        "largest_micro_batch": {"rows": len(largest), "tokens": schedule.cut.size(largest)},
    }
    if sequences := reference.count(prepared, spec):
        counted["reference_sequences"] = sequences
    if spec.data.order == "difficulty":
        counted["difficulty_sequences"] = ordering.count(prepared)
    if depth := frozen.depth(net):
        epochs = schedule.steps / schedule.steps_per_epoch
        saving = frozen.saving(net, epochs, spec.loop.checkpoint_gradients)
        disk_bytes = frozen.Lower(net).needed(prepared.train)
        counted |= {
            "frozen_layers_below": depth,
            "cache_frozen_saves": round(saving, 3),
            "cache_frozen_gb": round(disk_bytes / 1e9, 3),
        }
    return counted


def table(forecast: Forecast) -> list[str]:
    """What a run needs, one part a line, with the interval that covers nine of ten."""
    lines: list[str] = []
    for title, part in _parts(forecast):
        lines += [f"{title}:", *(f"  {name:<34}{value:>28}  {note}".rstrip() for name, value, note in part)]
    return lines


def _cell(planned: Planned) -> Markup:
    """What a notebook shows: whether it fits, what is needed, what is counted."""
    forecast = planned.forecast
    tone = "error" if forecast.cannot_fit else "warning" if forecast.may_not_fit else "good"
    duration = f"{forecast.steps:,} updates in {duration_range(forecast.total_s)}"
    parts = [notebook.verdict(f"{_sizes(Term('', forecast.needed))}, {duration}: {_verdict(forecast)}", tone)]
    if planned.proposal is not None and planned.proposal.sets:
        changes = ", ".join(planned.proposal.sets)
        needed = _sizes(Term("", planned.proposal.forecast.needed))
        parts.append(Markup("<p>With {}: {}.</p>").format(Markup("<code>{}</code>").format(changes), needed))
    rows = [(title, *row) for title, part in _parts(forecast) for row in part]
    parts.append(notebook.table(["", "part", "needs", ""], rows, numbers=(2,)))
    counted = notebook.table(["counted", ""], counts.entries(planned.counts))
    return Markup("").join([*parts, notebook.folded("Rows, tokens and weights", counted)])


notebook.register(Planned, _cell)


def _parts(forecast: Forecast) -> list[tuple[str, list[tuple[str, str, str]]]]:
    """Rows of name, amount and note by title."""
    rows = [_row(term) for term in forecast.memory]
    rows.append(("peak of MLX", _sizes(Term("", forecast.peak)), f"at {forecast.moment}"))
    rows.append(("the program itself", size(forecast.program), "interpreter and libraries"))
    rows.append(("in all", _sizes(Term("", forecast.needed)), _verdict(forecast)))
    beside = [_row(term) for term in forecast.beside]
    disk = [_row(term) for term in forecast.disk]
    basis = "from shapes; --measure corrects it" if forecast.basis == "shapes" else "from measured updates"
    times = [
        ("an update", duration_range(forecast.update_s), basis),
        (f"{forecast.steps:,} updates", duration_range(forecast.total_s), "with validations and samples"),
    ]
    parts = [("memory", rows), ("at other moments", beside), ("disk", disk), ("time", times)]
    return [(title, part) for title, part in parts if part]


def _row(term: Term) -> tuple[str, str, str]:
    return term.name, _sizes(term), term.note


def _sizes(term: Term) -> str:
    low, high = size(term.amount.low), size(term.amount.high)
    return low if low == high else f"{low} to {high}"


def _verdict(forecast: Forecast) -> str:
    ceiling = f"this machine has {size(forecast.ceiling)}, other programs hold {size(forecast.others)}"
    if not forecast.may_not_fit:
        return f"fits: {ceiling}"
    swap = f"; the rest is swapped, up to {size(forecast.swap)}, and slow" if forecast.swap else ""
    return f"{'does not fit' if forecast.cannot_fit else 'may not fit'}: {ceiling}{swap}"
