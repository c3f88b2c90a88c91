"""Who judges an artefact for llama.cpp: llama.cpp, unless it could not, or its rounding hides the effect."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tunesmith.errors import ExportError, SetupError
from tunesmith.events import Event, Sink, Working, silent
from tunesmith.exports import judging, llama_cpp, llama_reading, processes
from tunesmith.exports.fidelity import Probe
from tunesmith.exports.judging import Reading
from tunesmith.exports.kind import LlamaFiles, Tolerance
from tunesmith.exports.kinds.gguf import GGUFF16
from tunesmith.exports.kinds.hf import Merged
from tunesmith.exports.llama_reading import LlamaJob, LlamaResult
from tunesmith.exports.processes import EndedProcess
from tunesmith.runs.artefacts import CarriedSummary, Distances, Exported, Stops

EXACT = Tolerance(kl=1e-4, p99=1e-3, top=0.99, lost=0.01)
PROBES = [Probe([1, 2, 3], 1, [0, 1])]


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_the_system_ended_says_nothing_of_the_artefact(number):
    result = llama_reading.meaning(EndedProcess(-number, ""))
    assert result.refused is None and "out of memory" in (result.failed or "")


def test_a_crash_is_held_against_the_artefact_unless_memory_lacked():
    crash = llama_reading.meaning(EndedProcess(-signal.SIGSEGV, ""))
    assert crash.failed is None
    assert crash.refused == "llama.cpp crashed when it read the artefact: exit status -11"
    lacking = llama_reading.meaning(EndedProcess(-signal.SIGABRT, "what():  std::bad_alloc"))
    assert lacking.refused is None and lacking.failed


def test_an_error_of_python_is_not_held_against_the_artefact():
    result = llama_reading.meaning(
        EndedProcess(1, "Traceback\nValueError: shapes (2,3) and (4,) not aligned\n")
    )
    assert result.refused is None and "ValueError: shapes" in (result.failed or "")


JOB = LlamaJob("m.gguf", None, [([1, 2], [0])], [], [], [1], 1, 1)


@pytest.mark.parametrize(
    ("error", "field"), [(ExportError("no tensor"), "refused"), (SetupError("no library"), "failed")]
)
def test_the_process_tells_a_refusal_from_its_own_fault(error, field, tmp_path, monkeypatch):
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(llama_reading, "LlamaCpp", refuse)
    monkeypatch.setattr(processes, "follow", in_this_process)
    result = llama_reading.run(JOB, tmp_path, silent)
    assert getattr(result, field) == error.what
    assert (result.refused is None) != (result.failed is None)


class Reads:
    """A stand-in for llama.cpp that reads everything."""

    def __init__(self, *given: object) -> None: ...

    def generate(self, prompt: list[int], count: int) -> None: ...

    def logits(self, ids: list[int], places: list[int]) -> np.ndarray:
        return np.zeros((len(places), 8), np.float32)


def test_the_progress_of_llama_cpp_is_told_round_by_round_and_row_by_row(tmp_path, monkeypatch):
    monkeypatch.setattr(llama_reading, "LlamaCpp", Reads)
    monkeypatch.setattr(processes, "follow", in_this_process)
    heard: list[Event] = []
    job = replace(JOB, rows=[([1, 2, 3], [0, 1]), ([4, 5], []), ([6, 7], [0])], rounds=2)
    result = llama_reading.run(job, tmp_path, heard.append)
    assert result.failed is None and len(result.seconds) == 2
    told = [(event.label, event.done, event.total) for event in heard if isinstance(event, Working)]
    for label in ("llama.cpp: speed", "llama.cpp: rows"):
        assert [part for part in told if part[0] == label] == [(label, done, 3) for done in range(4)]


PROCESS = """
import sys
from pathlib import Path
from tunesmith.events import Notice, Working
from tunesmith.exports import processes

report = processes.reporter()
print("what libraries print", flush=True)
report(Working("rows", 1, 2))
report(Notice("not passed on"))
if Path(sys.argv[1]).name == "failing":
    sys.exit("the last line")
"""


@pytest.mark.parametrize(
    ("name", "status", "last"), [("whole", 0, "what libraries print"), ("failing", 1, "the last line")]
)
def test_a_process_passes_its_progress_on_and_keeps_what_libraries_print(
    name, status, last, tmp_path, monkeypatch, fresh_processes
):
    (tmp_path / "reading.py").write_text(PROCESS)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")]))
    (tmp_path / name).mkdir()
    heard: list[Event] = []
    process = processes.follow("reading", tmp_path / name, heard.append)
    passed = [event for event in heard if isinstance(event, Working)]
    assert passed == heard and [(event.label, event.done, event.total) for event in passed] == [
        ("rows", 1, 2)
    ]
    assert "what libraries print" in process.said
    assert (process.status, process.last_line) == (status, last)


def in_this_process(module: str, folder: Path, notify: Sink) -> EndedProcess:
    result = llama_reading.outcome(folder, notify)
    (folder / llama_reading.RESULT).write_text(json.dumps(vars(result)))
    return EndedProcess(0, "")


def test_what_llama_cpp_says_of_memory_is_not_a_refusal():
    model = object.__new__(llama_cpp.LlamaCpp)
    model._errors = ["alloc_tensor_range: failed to allocate CPU buffer of size 9"]
    with pytest.raises(SetupError):
        model._required(None, Path("m.gguf"))
    model._errors = ["tensor 'blk.0.attn_q.weight' data is not within the file bounds"]
    with pytest.raises(ExportError):
        model._required(None, Path("m.gguf"))


def by_llama_cpp(monkeypatch, tmp_path: Path, result: LlamaResult) -> Reading:
    monkeypatch.setattr(llama_reading, "run", lambda job, work, notify: result)
    files = LlamaFiles(Path("m.gguf"), frozenset({"F32"}))
    return judging.by_llama_cpp(files, EXACT, PROBES, [], [], tmp_path, silent)


def test_if_llama_cpp_could_not_read_our_own_reading_is_judged_and_it_is_said(tmp_path, monkeypatch):
    failed = by_llama_cpp(monkeypatch, tmp_path, LlamaResult(failed="ended"))
    assert failed.by == "tunesmith" and failed.tolerance == EXACT and not failed.problems
    assert failed.logprobs == tmp_path / "artefact.npy"
    assert len(failed.remarks) == 1 and failed.remarks[0].endswith("ended")
    refused = by_llama_cpp(monkeypatch, tmp_path, LlamaResult(refused="crashed"))
    assert refused.problems == ("crashed",)


def distances(mean: float, base: float, from_base: float) -> Distances:
    survived = from_base / base
    return Distances(9, mean, mean, mean, mean, mean, 1, 0, base, from_base, survived)


BY_LLAMA = Reading("llama.cpp", Path(), EXACT._replace(lost=0.1), rounding=1e-5)


def test_the_effect_of_a_very_faint_adapter_is_judged_by_our_own_reading():
    noisy = distances(mean=5e-6, base=1e-6, from_base=4e-6)  # nearer to the base, and 500 % lost
    assert judging.distant(BY_LLAMA, noisy, distances(0, 1e-6, 1e-6), EXACT) == []
    (inert, lost) = judging.distant(BY_LLAMA, noisy, distances(1e-6, 1e-6, 0), EXACT)
    assert inert.startswith("by tunesmith's own reader: inert") and "share of the adapter's effect" in lost
    assert judging.of_faint_adapter(BY_LLAMA, noisy)


def test_what_is_more_than_rounding_is_judged_by_llama_cpp():
    wrong = distances(mean=5e-5, base=1e-5, from_base=4e-5)
    assert len(judging.distant(BY_LLAMA, wrong, distances(0, 1e-5, 1e-5), EXACT)) == 2
    small = distances(mean=5e-6, base=1e-3, from_base=1e-3)
    assert judging.distant(BY_LLAMA, small, distances(0, 1e-3, 1e-3), EXACT) == []
    assert not judging.of_faint_adapter(BY_LLAMA, wrong) and not judging.of_faint_adapter(BY_LLAMA, small)


def test_what_the_rounding_of_llama_cpp_allows_our_own_reader_must_not_find():
    measured, own = distances(mean=5e-5, base=1e-3, from_base=1e-3), distances(5e-5, 1e-3, 1e-3)
    assert judging.distant(BY_LLAMA, measured, distances(0, 1e-3, 1e-3), EXACT) == []
    (lost,) = judging.distant(BY_LLAMA, measured, own, EXACT)
    assert lost == "by tunesmith's own reader: share of the adapter's effect that was lost 0.05, at most 0.01"


def test_an_earlier_reading_is_up_to_date_if_the_same_program_would_judge_now(monkeypatch):
    exported = Exported(
        path=Path(),
        kind="gguf-f16",
        checkpoint="000001",
        rows=9,
        size_bytes=1,
        distances=distances(0, 1, 1),
        stops=Stops(9, 9, 9, 9, ()),
        weights=CarriedSummary(1),
    )
    by_release = replace(exported, judged_by="llama.cpp (xllamacpp 1)")
    monkeypatch.setattr(llama_cpp, "missing", lambda: "not installed")
    assert judging.is_up_to_date(exported, GGUFF16()) and judging.is_up_to_date(exported, Merged())
    assert not judging.is_up_to_date(by_release, GGUFF16())
    monkeypatch.setattr(llama_cpp, "missing", lambda: None)
    monkeypatch.setattr(llama_cpp, "name", lambda: "llama.cpp (xllamacpp 1)")
    assert judging.is_up_to_date(by_release, GGUFF16())
    assert not judging.is_up_to_date(exported, GGUFF16()) and judging.is_up_to_date(exported, Merged())
    reading = judging.by_tunesmith(Path(), EXACT, "the base takes 9.0 GB")
    assert "xllamacpp 1) could not: the base takes" in reading.remarks[0]
    could_not = replace(exported, unread_by=reading.unread_by)
    assert judging.is_up_to_date(could_not, GGUFF16())
    monkeypatch.setattr(llama_cpp, "name", lambda: "llama.cpp (xllamacpp 2)")
    assert not judging.is_up_to_date(by_release, GGUFF16()) and not judging.is_up_to_date(
        could_not, GGUFF16()
    )
