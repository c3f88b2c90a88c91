"""Whose reading of an artefact is judged? That of llama.cpp for the files that it is made for, where it is
installed; else that of tunesmith, and it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from tunesmith.events import Notice, Sink
from tunesmith.exports import cost, fidelity, fresh, llama_cpp, llama_reading
from tunesmith.exports.fidelity import Probe
from tunesmith.exports.kind import ExportKind, ForLlamaCpp, LlamaFiles, Tolerance
from tunesmith.exports.llama_reading import LlamaJob, LlamaResult, Text
from tunesmith.runs.artefacts import OWN_READER, Cost, Distances, Exported
from tunesmith.tokens.renderers import MistralRenderer
from tunesmith.tokens.template import Renderer


@dataclass(frozen=True)
class Reading:
    """``by``: the program. ``logprobs``: what it computed, in numpy's format. ``tolerance``: by which they
    are judged. ``problems``: reasons to reject the artefact. ``rounding``: the mean KL divergence up to which
    the program's rounding may be the whole difference. ``unread_by``: the release of llama.cpp that could not
    read it, for a reason that says nothing of it."""

    by: str
    logprobs: Path
    tolerance: Tolerance
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    cost: Cost | None = None
    rounding: float = 0.0
    unread_by: str | None = None

    def shows_effect(self, measured: Distances) -> bool:
        """Whether what the adapter changes is more than the program's rounding can be."""
        return measured.mean > self.rounding or measured.lost <= self.tolerance.lost


def by_tunesmith(work: Path, tolerance: Tolerance, unread: str | None = None) -> Reading:
    """The reading that the fresh process wrote into ``work``. unread: why llama.cpp did not read an artefact
    that is made for it."""
    own = Reading(OWN_READER, work / fresh.LOGPROBS, tolerance)
    if unread is None:
        return own
    name = llama_cpp.name() if llama_cpp.missing() is None else None
    why = unread if name is None else f"{name} could not: {unread}"
    remark = f"judged by tunesmith's own reader, and its speed was not measured: {why}"
    return replace(own, remarks=(remark,), unread_by=name)


def by_llama_cpp(
    files: LlamaFiles,
    tolerance: Tolerance,
    probes: Sequence[Probe],
    texts: Sequence[Text],
    ends: Sequence[int],
    work: Path,
    notify: Sink,
) -> Reading:
    """Let llama.cpp read the files in a process of its own; if it could not for a reason that says nothing of
    the files, tunesmith's reading is judged. ends: the tokens that end trained rows."""
    notify(Notice("llama.cpp reads it"))
    rows = [(probe.ids, probe.places) for probe in probes]
    adapter = None if files.adapter is None else str(files.adapter)
    prompt = cost.prompt_of(probes)
    job = LlamaJob(str(files.model), adapter, rows, texts, ends, prompt, cost.ANSWER, cost.ROUNDS)
    result = llama_reading.run(job, work, notify)
    if result.failed is not None:
        return by_tunesmith(work, tolerance, result.failed)
    if result.refused is not None:
        return Reading(OWN_READER, work / fresh.LOGPROBS, tolerance, (result.refused,))
    remarks: list[str] = []
    if not texts:
        remarks.append("the ids that llama.cpp gives texts were not compared: no prompt can be written out")
    if files.adapter is not None:
        types = ", ".join(sorted(files.types))
        remarks.append(f"memory and speed are those beside a base whose matrices are {types}")
    return Reading(
        llama_cpp.name(),
        work / llama_reading.LOGPROBS,
        files.widened(tolerance),
        tuple(_problems(result, len(texts))),
        tuple(remarks),
        cost.summarised(result.load_s, result.memory_bytes, result.seconds),
        files.rounding.kl,
    )


def distant(reading: Reading, measured: Distances, own: Distances | None, tolerance: Tolerance) -> list[str]:
    """How the artefact is too far from the live adapter, by ``reading``, and if that is llama.cpp's also by
    tunesmith's ``own`` within the kind's ``tolerance``, which no rounding of inputs widens."""
    far = fidelity.distant(measured, reading.tolerance, effect=reading.shows_effect(measured))
    if own is not None:
        far += [f"by tunesmith's own reader: {each}" for each in fidelity.distant(own, tolerance)]
    return far


def of_faint_adapter(reading: Reading, measured: Distances) -> tuple[str, ...]:
    """The remark that llama.cpp's rounding hides the adapter's effect, if it does."""
    if reading.shows_effect(measured):
        return ()
    return (
        f"the adapter changes {measured.base:.1e} nats a token, which llama.cpp's rounding hides: whether "
        "its effect arrived was judged by tunesmith's own reader",
    )


def _problems(result: LlamaResult, n_texts: int) -> list[str]:
    problems: list[str] = []
    if result.other_ids:
        problems.append(
            f"other ids: llama.cpp gives {len(result.other_ids)} of {n_texts} prompts other ids than in "
            "training"
        )
    if result.endless:
        tokens = ", ".join(map(str, result.endless))
        problems.append(f"it never stops: llama.cpp goes on after the trained end token {tokens}")
    return problems


def is_up_to_date(exported: Exported, chosen: ExportKind) -> bool:
    """Whether the artefact was judged by the program that would judge it now, or that could not."""
    if not isinstance(chosen, ForLlamaCpp) or llama_cpp.missing() is not None:
        return exported.judged_by == OWN_READER
    return llama_cpp.name() in (exported.judged_by, exported.unread_by)


def written_out(probes: Sequence[Probe], renderer: Renderer) -> list[Text]:
    """The prompts of the rows (of plain text the rows themselves) as text, if a tokenizer that reads the text
    must give their ids. Mistral's reads no control token in a text, and llama.cpp's does; plain text has
    other ids there, as the documentation says."""
    texts: list[Text] = []
    is_mistral = isinstance(renderer, MistralRenderer)
    for probe in probes:
        ids = probe.ids[: probe.start] if probe.start > 1 else probe.ids
        text = renderer.decode(ids)
        if (is_mistral and probe.start > 1) or renderer.encoded_part(text) == ids:
            texts.append(Text(text, ids))
    return texts
