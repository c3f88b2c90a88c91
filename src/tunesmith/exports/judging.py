"""Whose reading of an artefact is judged? That of llama.cpp for the files that it is made for, where it is
installed; else that of tunesmith, and it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.events import Notice, Sink
from tunesmith.exports import cost, fidelity, fresh, llama_cpp, llama_reading
from tunesmith.exports.fidelity import EffectReading, Probe
from tunesmith.exports.kind import LlamaFiles, Tolerance
from tunesmith.exports.llama_reading import LlamaJob, LlamaResult, Text
from tunesmith.runs.artefacts import OWN_READER, Cost, Distances, Exported
from tunesmith.tokens.renderers import MistralRenderer
from tunesmith.tokens.template import Renderer


@dataclass(frozen=True)
class Reading:
    """``by``: the program. ``logprobs``: what it computed, in numpy's format. ``tolerance``: by which they
    are judged. ``problems``: reasons to reject the artefact. ``rounding``: the mean KL divergence up to which
    the program's rounding may be the whole difference."""

    by: str
    logprobs: Path
    tolerance: Tolerance
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    cost: Cost | None = None
    rounding: float = 0.0


def by_tunesmith(work: Path, tolerance: Tolerance, remarks: tuple[str, ...] = ()) -> Reading:
    """The reading that the fresh process wrote into ``work``."""
    return Reading(OWN_READER, work / fresh.LOGPROBS, tolerance, remarks=remarks)


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
    result = llama_reading.run(job, work)
    if result.failed is not None:
        return by_tunesmith(work, tolerance, not_by_llama_cpp(result.failed))
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
        files.rounding,
    )


def of_effect(
    reading: Reading, measured: Distances, own: Distances | None, tolerance: Tolerance
) -> EffectReading | None:
    """tunesmith's own reading, if by llama.cpp's the adapter's effect did not arrive and the difference is
    not more than llama.cpp's rounding: beside a very faint adapter this says nothing of the file. None: that
    of ``reading`` is judged. tolerance: of the kind."""
    if own is None or measured.mean > reading.rounding:
        return None
    if measured.lost <= reading.tolerance.lost and not fidelity.is_inert(measured):
        return None
    return EffectReading(own, tolerance.lost)


def of_faint_adapter(effect: EffectReading | None) -> tuple[str, ...]:
    """The remark that tunesmith judged the effect."""
    if effect is None:
        return ()
    return (
        f"the adapter changes {effect.distances.base:.1e} nats a token, which llama.cpp's rounding hides: "
        "whether its effect arrived was judged by tunesmith's own reader",
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


def not_by_llama_cpp(why: str) -> tuple[str, ...]:
    """The remark that tunesmith judged an artefact for llama.cpp, which names llama.cpp's release if it is
    installed."""
    if llama_cpp.missing() is None:
        why = f"{llama_cpp.name()} could not: {why}"
    return (f"judged by tunesmith's own reader, and its speed was not measured: {why}",)


def is_up_to_date(exported: Exported, for_llama_cpp: bool) -> bool:
    """Whether the artefact was judged by the program that would judge it now, or that could not."""
    if not for_llama_cpp or llama_cpp.missing() is not None:
        return exported.judged_by == OWN_READER
    name = llama_cpp.name()
    return exported.judged_by == name or any(name in remark for remark in exported.remarks)


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
