"""Whose reading of an artefact is judged? That of llama.cpp for the files that it is made for, where it is
installed; else that of tunesmith, and it is said."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tunesmith.events import Notice, Sink
from tunesmith.exports import cost, fresh, llama_cpp, llama_reading
from tunesmith.exports.fidelity import Probe
from tunesmith.exports.kind import LlamaFiles, Tolerance
from tunesmith.exports.llama_reading import LlamaJob, LlamaResult, Text
from tunesmith.runs.artefacts import OWN_READER, Cost
from tunesmith.tokens.renderers import MistralRenderer
from tunesmith.tokens.template import Renderer


@dataclass(frozen=True)
class Reading:
    """``by``: the program. ``logprobs``: what it computed, in numpy's format. ``tolerance``: by which they
    are judged. ``problems``: reasons to reject the artefact."""

    by: str
    logprobs: Path
    tolerance: Tolerance
    problems: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    cost: Cost | None = None


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
    """Let llama.cpp read the files in a process of its own. ends: the tokens that end trained rows."""
    notify(Notice("llama.cpp reads it"))
    rows = [(probe.ids, probe.places) for probe in probes]
    adapter = None if files.adapter is None else str(files.adapter)
    prompt = cost.prompt_of(probes)
    job = LlamaJob(str(files.model), adapter, rows, texts, ends, prompt, cost.ANSWER, cost.ROUNDS)
    result = llama_reading.run(job, work)
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
    """The remark that tunesmith judged an artefact for llama.cpp."""
    return (f"judged by tunesmith's own reader, and its speed was not measured: {why}",)


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
