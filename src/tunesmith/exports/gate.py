"""Does an artefact say what the live adapter says? The live adapter and its base are measured once, each
artefact is written, reloaded in a fresh process, measured alike and judged by the tolerance of its kind."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path

import mlx.core as mx
import numpy as np

from tunesmith import adapters, events
from tunesmith.adapters import merging
from tunesmith.errors import ExportError, TunesmithError
from tunesmith.events import Event, Notice, Sink, Tick, Working
from tunesmith.exports import fidelity, fresh, headlines, judging, llama_cpp, weights
from tunesmith.exports.fidelity import Carried, Ended, Probe
from tunesmith.exports.headlines import TaskScores
from tunesmith.exports.judging import Reading
from tunesmith.exports.kind import ArtefactNotes, ExportKind, ForLlamaCpp, Importance, Tuned
from tunesmith.exports.llama_reading import Text
from tunesmith.runs import checkpoints
from tunesmith.runs.artefacts import OWN_READER, CarriedSummary, Exported
from tunesmith.runs.directory import COMPOSED, FULL, Run
from tunesmith.runs.opening import Source
from tunesmith.runs.registry import FINISHED
from tunesmith.tokens.template import Renderer

ROWS = 64
"""Held-out rows that an artefact is measured on."""
BASE, LIVE = "base.npy", "live.npy"


@dataclass(frozen=True)
class Scope:
    """What is measured. ``rows``: held-out rows. ``tasks``: groups of tasks, each asked on the first
    ``limit`` rows and items, none: all."""

    rows: int = ROWS
    tasks: tuple[str, ...] = ()
    limit: int | None = None


@dataclass(frozen=True)
class LiveSide:
    """Base and live adapter. ``ids``: of each row. ``trained``: the tokens that end rows. ``texts``: prompts,
    and their ids. ``base``, ``live``: sketches of their weights."""

    probes: Sequence[Probe]
    ids: Sequence[Sequence[int]]
    trained: Sequence[int]
    answers: Sequence[Ended]
    texts: Sequence[Text]
    base: Mapping[str, np.ndarray]
    live: Mapping[str, np.ndarray]
    scores: TaskScores = field(default_factory=dict)


def prepared(source: Source, limit: int, notify: Sink) -> tuple[Tuned, list[Probe]]:
    """The run of ``source``, whose base is not read yet, and at most ``limit`` of its held-out rows. Raises
    ModelError if the base is not that of the run."""
    run, config, checkpoint = source.run, source.config, source.checkpoint
    assert run is not None and config is not None and checkpoint is not None
    opened = source.open(notify, lazily=True)
    renderer = opened.renderer
    rows = fidelity.rows(run, config, renderer, limit)
    ends = _ends(renderer, fidelity.trained_ends(rows, renderer.eos_ids))
    return Tuned(run, config, source.model, checkpoint, opened.loaded, renderer, ends), rows


def write(chosen: ExportKind, tuned: Tuned, artefact: Path, notify: Sink) -> ArtefactNotes:
    """Write the artefact into the empty folder ``artefact``, without measuring it."""
    adapters.load(tuned.loaded.net, tuned.checkpoint, lazily=True)
    return chosen.write(tuned, artefact, notify)


class Gate:
    """Makes and measures artefacts of one run. ``work``: a folder for what is measured."""

    def __init__(self, source: Source, scope: Scope, work: Path, notify: Sink) -> None:
        assert source.run is not None and source.config is not None and source.checkpoint is not None
        self.run, self.config, self.checkpoint = source.run, source.config, source.checkpoint
        self._source, self._scope, self._work, self._notify = source, scope, work, notify
        self._live: LiveSide | None = None
        self._importance: Importance | None = None

    def make(self, chosen: ExportKind, artefact: Path) -> Exported:
        """Write the artefact into the empty folder ``artefact`` and measure it. Raises ExportError if the
        kind cannot express the run, or if the disk is full."""
        try:
            live, written = self._written(chosen, artefact)
            mx.clear_cache()  # the fresh process needs the memory
            result = self._reloaded(chosen, artefact, live)
            reading = self._read(chosen, artefact, live)
            return self._judged(chosen, artefact, live, written, result, reading)
        except OSError as error:
            if error.errno not in FULL:
                raise
            hint = "make room, or choose --out on another disk"
            raise ExportError(f"the disk is full: {error.strerror}", hint=hint) from error

    def _written(self, chosen: ExportKind, artefact: Path) -> tuple[LiveSide, ArtefactNotes]:
        """Write the artefact; measure the live side before, if that was not done for an earlier one."""
        tuned, rows = prepared(self._source, self._scope.rows, self._notify)
        chosen.accepts(tuned)
        if self._live is None:
            self._live = self._measured(tuned, rows)
            mx.clear_cache()
        self._notify(Notice(f"writing {chosen.name}: {chosen.announcement(tuned)}"))
        written = write(chosen, replace(tuned, importance=self._importance), artefact, self._notify)
        self._importance = written.importance or self._importance
        options = fidelity.needed_options(self.run, self.config, tuned.renderer, self._scope.rows)
        if options and not chosen.has_own_template:
            remark = (
                f"pass chat_template_kwargs {json.dumps(options)} with every request (llama-server: "
                "--chat-template-kwargs, mlx_lm.generate: --chat-template-config): without them prompts get "
                "other ids than in training"
            )
            written = written._replace(remarks=(*written.remarks, remark))
        return self._live, written

    def _reloaded(self, chosen: ExportKind, artefact: Path, live: LiveSide) -> fresh.Result:
        self._notify(Notice("reloading it in a fresh process"))
        job = fresh.Job(
            chosen.name,
            str(artefact.resolve()),
            str(self.run.path.resolve()),
            self._source.model,
            self._scope.rows,
            live.probes,
            live.ids,
            self._scope.tasks,
            self._scope.limit,
        )
        return fresh.run(job, self._work, self._notify)

    def _read(self, chosen: ExportKind, artefact: Path, live: LiveSide) -> Reading:
        """What is judged: llama.cpp's reading if the artefact is made for it and it can be used, else that of
        the fresh process."""
        if not isinstance(chosen, ForLlamaCpp):
            return judging.by_tunesmith(self._work, chosen.tolerance)
        base = partial(self._base, live)
        try:
            if (missing := llama_cpp.missing()) is not None:
                raise ExportError(missing)
            files = chosen.llama_files(base, artefact, self._work)
        except TunesmithError as error:
            return judging.by_tunesmith(self._work, chosen.tolerance, error.what)
        mx.clear_cache()
        probes, texts, ends = live.probes, live.texts, live.trained
        return judging.by_llama_cpp(files, chosen.tolerance, probes, texts, ends, self._work, self._notify)

    def _base(self, live: LiveSide) -> Tuned:
        """The run without its adapter."""
        opened = self._source.open(self._progress, lazily=True)
        ends = _ends(opened.renderer, live.trained)
        model, loaded = self._source.model, opened.loaded
        return Tuned(self.run, self.config, model, self.checkpoint, loaded, opened.renderer, ends)

    def _measured(self, tuned: Tuned, rows: list[Probe]) -> LiveSide:
        """Measure the base, attach the adapter, and measure it. The model is in memory until this returns."""
        net, renderer = merging.load(tuned.located, self._progress).net, tuned.renderer
        probes = fidelity.thinned(rows, net(mx.zeros((1, 2), mx.int32)).shape[-1])
        self._notify(Notice(f"measuring base and live adapter on {len(probes)} rows"))
        fidelity.log_probabilities(net, probes, self._work / BASE, self._ticker("base: rows"))
        base = weights.sketch(net, self._ticker("base: tensors"))
        adapters.load(net, tuned.checkpoint)
        fidelity.log_probabilities(net, probes, self._work / LIVE, self._ticker("live adapter: rows"))
        answers = fidelity.answers(net, probes, renderer.eos_ids, self._ticker("live adapter: answers"))
        scope = self._scope
        scores = headlines.measure(net, renderer, self.run, scope.tasks, scope.limit, self._notify)
        return LiveSide(
            probes,
            [probe.ids for probe in rows],
            fidelity.trained_ends(rows, renderer.eos_ids),
            answers,
            judging.written_out(probes, renderer),
            base,
            weights.sketch(net, self._ticker("live adapter: tensors")),
            scores,
        )

    def _ticker(self, label: str) -> Tick:
        return events.ticker(self._notify, label)

    def _progress(self, event: Event) -> None:
        """Pass on progress alone: notices on the base came when it was opened."""
        if isinstance(event, Working):
            self._notify(event)

    def _judged(
        self,
        chosen: ExportKind,
        artefact: Path,
        live: LiveSide,
        written: ArtefactNotes,
        result: fresh.Result,
        reading: Reading,
    ) -> Exported:
        with np.load(self._work / fresh.SKETCH) as sketches:
            arrived = fidelity.carried(live.base, live.live, dict(sketches))
        paths = self._work / LIVE, self._work / BASE, reading.logprobs
        own, base, its = (np.load(path, "r") for path in paths)
        of_row = fidelity.rows_of(live.probes)
        measured = fidelity.distances(own, base, its, of_row)
        second = None
        if reading.by != OWN_READER:
            second = fidelity.distances(own, base, np.load(self._work / fresh.LOGPROBS, "r"), of_row)
        stopping = fidelity.stops(live.answers, result.answers, live.trained, result.ends)
        far = judging.distant(reading, measured, second, chosen.tolerance)
        reasons = fidelity.reasons(far, stopping, arrived, reading.tolerance, written.survived)
        return Exported(
            path=artefact,
            kind=chosen.name,
            checkpoint=self.checkpoint.name,
            rows=len(live.probes),
            size_bytes=sum(file.stat().st_size for file in artefact.rglob("*") if file.is_file()),
            distances=measured,
            stops=stopping,
            weights=_summary(arrived, written.survived),
            reasons=(*result.problems, *reading.problems, *reasons),
            remarks=(
                *_unfinished(self.run),
                *written.remarks,
                *result.remarks,
                *reading.remarks,
                *judging.of_faint_adapter(reading, measured),
                *fidelity.undecided(stopping),
            ),
            cost=result.cost or reading.cost,
            loss=fidelity.loss(own, its, live.probes),
            scores=headlines.compare(live.scores, result.scores),
            tunesmith=version("tunesmith"),
            rows_limit=self._scope.rows,
            adapter_sha256=checkpoints.weights_hash(self.checkpoint),
            base_sha256=self.run.hashes["base"],
            judged_by=reading.by,
            unread_by=reading.unread_by,
            own_reading=second,
            quantised=written.quantised,
        )


def _unfinished(run: Run) -> tuple[str, ...]:
    """That the run did not end, if it did not."""
    if run.status in (*FINISHED, COMPOSED):
        return ()
    return (f"the run is not finished (status: {run.status}): its checkpoint is exported as it is",)


def _summary(arrived: Carried, survived: float | None) -> CarriedSummary:
    least = sorted(arrived.gains.items(), key=lambda item: item[1])[:3]
    return CarriedSummary(len(arrived.gains), dict(least), survived)


def _ends(renderer: Renderer, trained: Sequence[int]) -> tuple[int, ...]:
    """The tokens that end an answer, first those that end rows; of these first the one that ends texts."""
    texts = [token for token in trained if token == renderer.text_end_id]
    return tuple(dict.fromkeys((*texts, *trained, *renderer.eos_ids)))
