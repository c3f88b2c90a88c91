"""What stops a run from being read or written says which file, which key, and what to do."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tunesmith import files
from tunesmith.errors import CorruptCheckpoint, DataError, DiskFull, EvaluationError, TrainingError
from tunesmith.runs import checkpoints, directory
from tunesmith.runs.checkpoints import Cursor
from tunesmith.runs.config import LoopSpec, RunConfig
from tunesmith.runs.directory import Run


@pytest.fixture
def config() -> RunConfig:
    return RunConfig.model_validate({"model": {"path": "model"}, "data": {"train": ("rows.jsonl",)}})


@pytest.fixture
def run(tmp_path, config) -> Run:
    hashes = {"data": {"rows.jsonl": "d1"}, "template": "7e", "base": "ba"}
    return Run.create(tmp_path / "run", config, {}, {"hashes": hashes})


def saved(run: Run, *steps: int) -> None:
    """Checkpoints of a few bytes."""
    for step in steps:

        def write(folder: Path) -> None:
            for name in (directory.ADAPTERS, directory.ADAPTER_CONFIG, directory.OPTIMIZER):
                (folder / name).write_bytes(b"x")

        checkpoints.save(run, Cursor(step=step), write, 0)


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("", "Expecting value"),
        ("[]", "must be a JSON object"),
        ("{}", "the key status is missing"),
        ('{"status": 3}', "status: must be a valid string"),
        ('{"status": "completed"}', "the key hashes is missing"),
        ('{"status": "completed", "hashes": []}', "hashes: must be a JSON object"),
        ('{"status": "completed", "hashes": {"data": {}}}', "the key hashes.template is missing"),
        ("[" * 100_000, "recursion"),
    ],
)
def test_a_damaged_manifest_is_named_with_its_key_and_the_cure(run, content, told):
    (run.path / "manifest.json").write_text(content)
    with pytest.raises(DataError) as caught:
        assert run.hashes
    assert caught.value.where == str(run.path / "manifest.json") and told in caught.value.what
    assert caught.value.hint == directory.RESTORE


def test_marking_a_run_keeps_the_keys_of_other_releases(run):
    path = run.path / "manifest.json"
    before = json.loads(path.read_text()) | {"later": [1, {"a": None}]}
    path.write_text(json.dumps(before))
    run.mark("completed")
    assert json.loads(path.read_text()) == before | {"status": "completed"}


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "Expecting property name"),
        ("[]", "must be a JSON object"),
        ('{"step": "two"}', "step: must be a valid integer"),
        ('{"step": 2, "sha256": [1]}', "sha256: must be a JSON object"),
        ("{}", "does not describe this checkpoint"),
    ],
)
def test_a_damaged_cursor_is_named_with_its_key_and_the_cure(run, content, told):
    saved(run, 2)
    path = run.checkpoint(2) / "cursor.json"
    path.write_text(content)
    with pytest.raises(CorruptCheckpoint) as caught:
        checkpoints.choose(run)
    assert caught.value.where == str(path) and told in caught.value.what
    assert "--checkpoint STEP" in (caught.value.hint or "")


def test_a_disk_that_is_full_before_the_run_has_begun(tmp_path, config, monkeypatch):
    """At each of the first writes."""
    whole = files.write_bytes
    for n_allowed in range(3):
        left = n_allowed

        def write(path: Path, content: bytes) -> None:
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device", str(path))
            whole(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(files, "write_bytes", write)
            with pytest.raises(DiskFull, match=r"the disk is full.*\nhint: make room, and start again"):
                Run.create(tmp_path / "run", config, {}, {})
        assert not list(tmp_path.iterdir()), "a draft was left"


def test_of_two_runs_at_one_place_the_later_is_refused(tmp_path, config, monkeypatch):
    Run.create(tmp_path / "run", config, {}, {})
    monkeypatch.setattr(directory, "require_free", lambda path: None)  # both looked before either was made
    with pytest.raises(DataError, match="another process made it a moment ago\nhint: choose another --out"):
        Run.create(tmp_path / "run", config, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_run_that_is_moved_while_it_is_written_to(run):
    with pytest.raises(
        TrainingError, match="was moved or removed while it was in use\nhint: if it was moved"
    ):
        with run.room():
            run.path.rename(run.path.with_name("elsewhere"))
            run.mark("completed")


def test_a_folder_in_a_files_place_is_named(run):
    (run.path / ".lock").mkdir()
    with pytest.raises(DataError, match=r"\.lock: cannot be written: Is a directory\nhint: "):
        with run.lock():
            pass
    (run.path / "evals").write_text("")
    with pytest.raises(EvaluationError, match="evals: cannot be written: File exists\nhint: "):
        with run.evaluating(lambda event: None):
            pass


def test_drafts_of_ended_processes_go_and_those_of_living_ones_stay(run, tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    here = files.draft_name(run.path / "x").name.partition("-")[2][:8]
    old = {
        run.path / f".{ended.pid}-{here}0123abcd.report.json",
        run.path / f".{os.getpid()}-{here}0123abcd.plan.json",  # of an earlier process with this number
        run.path / f".{os.getppid()}-0123abcd0123abcd.config.yaml",  # of another system, long ago
        run.path / "exports" / f".{ended.pid}-{here}0123abcd.hf",
        run.path / "data" / ".0123abcd.audit.json",
        run.path / "checkpoints" / ".000002.0123abcd",
        tmp_path / ".run.0123abcd",
    }
    (run.path / "exports").mkdir()
    for path in old:
        path.write_text("")
        os.utime(path, (0, 0))
    other = {
        run.path / f".{os.getppid()}-{here}0123abcd.report.md",
        run.path / f".{ended.pid}-0123abcd0123abcd.report.md",  # its process may live, in another container
        tmp_path / ".other.0123abcd",
        run.path / ".x",
    }
    for path in other:
        path.write_text("")
    folder = run.path / "data" / f".{ended.pid}-0123abcd0123abcd.frozen"  # old, but still written to
    folder.mkdir()
    (folder / "part").write_text("")
    os.utime(folder, (0, 0))
    with files.draft(run.path / "now") as own:
        own.write_text("")
        with run.lock():
            assert not any(path.exists() for path in old)
            assert all(path.exists() for path in (*other, folder, own))


def test_a_checkpoint_that_is_read_is_removed_by_a_later_retention(run):
    spec = LoopSpec(keep_last=1, keep_best=False)
    saved(run, 1, 2)
    with checkpoints.held(run.checkpoint(1)):
        checkpoints.retain(run, Cursor(step=2), spec)
        assert run.checkpoints() == [1, 2]
    (run.path / "checkpoints" / ".000000.0123abcd").mkdir()  # a removal that was interrupted
    checkpoints.retain(run, Cursor(step=2), spec)
    assert {path.name for path in (run.path / "checkpoints").iterdir()} == {"000002", "index.json"}
    with pytest.raises(DataError, match="was removed a moment ago"):
        with checkpoints.held(run.checkpoint(1)):
            pass


def test_a_second_evaluation_says_for_whom_it_waits(run):
    code = (
        "import sys; from pathlib import Path; from tunesmith.runs.directory import Run\n"
        "with Run(Path(sys.argv[1])).evaluating(print):\n    print('held', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(run.path)]
    first = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert first.stdin is not None and first.stdout is not None
    assert first.stdout.readline() == "held\n"
    told: list[str] = []

    def notify(event) -> None:
        told.append(event.what)
        first.communicate()  # it ends

    with run.evaluating(notify):
        pass
    assert len(told) == 1 and f"(process {first.pid} on " in told[0]
    with run.evaluating(notify):
        pass
    assert len(told) == 1
