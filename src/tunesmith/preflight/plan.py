"""What would ``train`` do? Everything up to the first update, as counts; nothing is trained or written."""

from __future__ import annotations

from tunesmith import events
from tunesmith.data.formats import JSON
from tunesmith.events import Notice, Sink
from tunesmith.runs import lineage
from tunesmith.runs.config import RunConfig
from tunesmith.settings.config import Resolved
from tunesmith.training import frozen, ordering, preparation, reference, story


def plan(config: Resolved[RunConfig], *, notify: Sink = events.silent) -> dict[str, JSON]:
    """What ``train`` would do, as counts: rows, tokens, padding, steps, trainable parameters. Trains nothing.

    ``adapter``: in one line, which layers are adapted and which are not. ``micro_batches``: of the first
    epoch. If layers lie below the adapter: the share of the layers' work that ``loop.cache_frozen`` saves (0
    within one epoch), and the disk space that it takes."""
    spec = lineage.anchored(config.spec)
    for text in config.notes:
        notify(Notice(text, where="data.train"))
    for text in spec.warnings():
        notify(Notice(text, level="warning"))
    prepared = preparation.prepare(spec, notify)
    model = story.open_model(spec, prepared.train, notify)
    schedule = prepared.plan
    micro_batches = [
        rows
        for step in range(min(schedule.steps, schedule.steps_per_epoch))
        for rows in schedule.update(step)
    ]
    largest = [schedule.lengths[index] for index in schedule.largest()]
    counts: dict[str, JSON] = {
        **prepared.counts,
        "trainable": model.attached.trainable,
        "total": model.attached.total,
        "adapter": model.attached.coverage,
        "micro_batches": len(micro_batches),
        "largest_micro_batch": {"rows": len(largest), "tokens": schedule.cut.size(largest)},
    }
    if sequences := reference.count(prepared, spec):
        counts["reference_sequences"] = sequences
    if spec.data.order == "difficulty":
        counts["difficulty_sequences"] = ordering.count(prepared)
    if depth := frozen.depth(model.net):
        epochs = schedule.steps / schedule.steps_per_epoch
        saving = frozen.saving(model.net, epochs, spec.loop.checkpoint_gradients)
        disk_bytes = frozen.Lower(model.net).needed(prepared.train)
        counts |= {
            "frozen_layers_below": depth,
            "cache_frozen_saves": round(saving, 3),
            "cache_frozen_gb": round(disk_bytes / 1e9, 3),
        }
    return counts
